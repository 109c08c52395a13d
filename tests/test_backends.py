"""A network of each family under Keras' other backends: built, trained, saved, and the same under TensorFlow."""

import dataclasses
import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from export_fixtures import difference, outputs_of

from se_keras.catalogue import create
from se_keras.counting import complexity

pytestmark = pytest.mark.slow

# A small row of each family and of each custom layer, and an image that takes little time.
ROWS = {
    "se_resnet11_digits": (8, 8, 1),
    "se_vgg11_bn": (32, 32, 3),
    "se_bn_inception": (32, 32, 3),
    "se_mobilenet_025": (32, 32, 3),
    "se_shufflenet_g1_025": (64, 64, 3),
    "se_resnet20": (16, 16, 3),
    "se_shake_shake_26_2x96d": (8, 8, 3),
}
CLASSES = 3
SCRIPT = """
import json, sys

import se_keras

found = {"tensorflow imported": "tensorflow" in sys.modules, "rows": {}}

import dataclasses
import keras, numpy as np

found["backend"] = keras.backend.backend()
for name, shape in json.loads(sys.argv[1]).items():
    try:
        keras.utils.set_random_seed(0)
        model = se_keras.create(name, input_shape=shape, classes=int(sys.argv[2]), classifier_activation=None)
        rng = np.random.default_rng(0)
        images, labels = rng.normal(size=(8, *shape)).astype("float32"), np.arange(8) % 3
        before = model.get_weights()
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.01), loss)
        loss = model.train_on_batch(images, labels)
        after = model.get_weights()
        model.save(f"{name}.keras")
        output = model.predict_on_batch(images)
        loaded = keras.saving.load_model(f"{name}.keras").predict_on_batch(images)
        np.savez(f"{name}.npz", images=images, output=output, loaded=loaded)
        pairs = zip(model.weights, before, after, strict=True)
        still = [w.path for w, old, new in pairs if np.array_equal(old, new)]
        counts = dataclasses.asdict(se_keras.complexity(model))
        found["rows"][name] = {
            "loss": float(loss), "still": still, "variables": len(before), "complexity": counts
        }
    except Exception as error:
        found["rows"][name] = {"error": f"{type(error).__name__}: {error}"}
json.dump(found, open("found.json", "w"))
"""


@pytest.fixture(scope="module", params=["torch", "jax"])
def under(request, tmp_path_factory):
    """What a process under another backend found: a dict, and the folder of its files."""
    backend = request.param
    pytest.importorskip(backend, reason=f"the backend {backend} is not installed")
    folder = tmp_path_factory.mktemp(backend)
    command = [sys.executable, "-c", SCRIPT, json.dumps(ROWS), str(CLASSES)]
    environment = os.environ | {"KERAS_BACKEND": backend}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads((folder / "found.json").read_text())
    assert found["backend"] == backend
    return found, folder


@pytest.fixture
def row(under, name):
    """What it found of one network."""
    found = under[0]["rows"][name]
    assert "error" not in found, found["error"]
    return found


each_row = pytest.mark.parametrize("name", ROWS)


def test_import_does_not_import_tensorflow(under):
    assert not under[0]["tensorflow imported"]


@each_row
def test_loss_of_a_training_step_is_finite(row):
    assert np.isfinite(row["loss"])


@each_row
def test_training_step_moves_the_weights_from_the_last_to_the_first(row):
    # In between a ReLU may be zero on all eight images, the more so in a bottleneck of one channel.
    ends = ("conv1/", "predictions/", "stage1_block1_conv/")
    assert [path for path in row["still"] if path.startswith(ends)] == []
    assert len(row["still"]) < 0.1 * row["variables"]


@each_row
def test_training_step_moves_every_statistic(row):
    assert [path for path in row["still"] if path.endswith(("moving_mean", "moving_variance"))] == []


@each_row
def test_saved_network_loads_and_computes_the_same(row, under, name):
    arrays = np.load(under[1] / f"{name}.npz")
    # The same kernels on the same machine; a convolution may still split its sum over other threads.
    assert difference([arrays["output"]], [arrays["loaded"]]) < 1e-6


@each_row
def test_saved_network_computes_the_same_under_tensorflow(row, under, name):
    arrays = np.load(under[1] / f"{name}.npz")
    model = keras.saving.load_model(under[1] / f"{name}.keras")
    # Some tens of layers whose sums are taken in another order, and whose statistics are those of a single step.
    assert difference([arrays["output"]], outputs_of(model, arrays["images"])) < 1e-4


@each_row
def test_counts_are_those_under_tensorflow(row, name):
    with keras.StatelessScope(initialize_variables=False):  # counts read no value
        counts = complexity(create(name, input_shape=ROWS[name], classes=CLASSES))
    keras.utils.clear_session()
    assert row["complexity"] == json.loads(json.dumps(dataclasses.asdict(counts)))
