"""Two logical CPUs, the published figures, and what is expensive, made once and shared."""

import functools
import gc
import json
from dataclasses import dataclass, replace
from pathlib import Path

import keras
import pytest
import tensorflow as tf
from filelock import FileLock

from se_keras.catalogue import AS_PUBLISHED, create
from se_keras.counting import Complexity, complexity
from se_keras.export import to_litert
from se_keras.training import RECIPES, fit
from se_keras.training.data import digits

# Sessions of Keras are cleared by collecting garbage: without looking through all imported modules each time.
gc.collect()
gc.freeze()
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
    """One process runs the tests of a file, which share what is expensive.

    Or those of a row of test_networks.py; or those of all files that build each network for its counts.
    """
    for item in items:
        row = item.callspec.params.get("network") if hasattr(item, "callspec") else None
        by_row = row and item.path.stem == "test_networks"
        by_file = "facts" if "facts" in item.fixturenames else item.path.stem
        item.add_marker(pytest.mark.xdist_group(str(row) if by_row else by_file))


@pytest.fixture(autouse=True)
def seed():
    keras.utils.set_random_seed(1709)


@pytest.fixture
def channels_first():
    keras.config.set_image_data_format("channels_first")
    yield
    keras.config.set_image_data_format("channels_last")


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


@pytest.fixture(scope="session")
def trained_digits(tmp_path_factory, worker_id):
    """The folder of a run of se_resnet11_digits, 97 % of the test after three epochs, and its file `float32.tflite`.

    Trained and converted once, whichever process comes first.
    """
    shared = tmp_path_factory.getbasetemp() if worker_id == "master" else tmp_path_factory.getbasetemp().parent
    folder = shared / "trained_digits"
    with FileLock(f"{folder}.lock"):
        if not (folder / "float32.tflite").exists():
            keras.utils.set_random_seed(0)
            data, model = digits(), create("se_resnet11_digits", classes=10)
            model, _ = fit(model, replace(RECIPES["digits"], epochs=3), data, folder)
            to_litert(model, held_out=data.test.images).save(folder / "float32.tflite")
    return folder
