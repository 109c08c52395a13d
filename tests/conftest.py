"""Two logical CPUs, the published figures, and the facts of each network gathered once a session."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import keras
import pytest
import tensorflow as tf

from se_keras.catalogue import AS_PUBLISHED, create
from se_keras.counting import Complexity, complexity

# A test of distribution needs two devices, and TensorFlow takes their number only before its first operation.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a network is apart from its values: small enough to keep for every row."""

    complexity: Complexity
    count_params: int
    weights: dict  # path -> shape
    layers: dict  # name -> (class name, config)


@pytest.hookimpl(tryfirst=True)  # in front of xdist's, which reads the groups
def pytest_collection_modifyitems(items):
    """One process runs the tests of a file, which share what is expensive; of test_networks.py, those of a row."""
    for item in items:
        row = item.callspec.params.get("network") if hasattr(item, "callspec") else None
        item.add_marker(pytest.mark.xdist_group(row if row and item.path.stem == "test_networks" else item.path.stem))


@pytest.fixture(autouse=True)
def seed():
    keras.utils.set_random_seed(1709)


@pytest.fixture
def mixed_float16():
    keras.config.set_dtype_policy("mixed_float16")
    yield
    keras.config.set_dtype_policy("float32")


@pytest.fixture(scope="session")
def golden():
    return json.loads((Path(__file__).parent / "golden" / "published.json").read_text())


@pytest.fixture(scope="session")
def facts():
    """`facts(name, se=...)`: of a network of the catalogue, built once and let go."""

    @functools.cache
    def gather(name, se=AS_PUBLISHED):
        # No fact reads a value: without any a network takes a fifth of the time, and no memory.
        with keras.StatelessScope(initialize_variables=False):
            model = create(name, se=se)
        gathered = Facts(
            complexity=complexity(model),
            count_params=model.count_params(),
            weights={weight.path: tuple(weight.shape) for weight in model.weights},
            layers={layer.name: (type(layer).__name__, layer.get_config()) for layer in model.layers},
        )
        keras.utils.clear_session()  # or the next scope would give the variables values after all
        return gathered

    return gather
