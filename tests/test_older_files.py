"""Files that version 0.1.0 wrote, before its modules moved, are read as ever: tests/golden/from_0_1/.

They are of a small network with each layer of se_keras, trained for one of two epochs on a few of the digits.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
import tf_keras

from se_keras.export import inspect, qat, to_litert, to_savedmodel, verify
from se_keras.export.benchmark.report import as_html, as_markdown, headline, read
from se_keras.export.benchmark.results import Cell
from se_keras.export.description import reference_error
from se_keras.export.litert.file import load_litert
from se_keras.export.serving.savedmodel import load_savedmodel
from se_keras.layers import ChannelShuffle, ShakeShake, SqueezeExcite
from se_keras.training import RECIPES, fit, load, training_of
from se_keras.training.data import Arrays, Data, digits

OLD = Path(__file__).parent / "golden" / "from_0_1"


@pytest.fixture
def few():
    """The data of the run."""
    data = digits()
    return Data(
        name="few digits",
        train=Arrays(images=data.train.images[:320], labels=data.train.labels[:320]),
        test=Arrays(images=data.test.images[:80], labels=data.test.labels[:80]),
        classes=data.classes,
        mean=data.mean,
        std=data.std,
    )


def test_keras_file_loads_by_its_registered_names():
    model = keras.saving.load_model(OLD / "run" / "model.keras")
    assert {SqueezeExcite, ChannelShuffle, ShakeShake} <= {type(layer) for layer in model.layers}
    known = np.load(OLD / "outputs.npz")
    # Another processor adds in another order.
    np.testing.assert_allclose(model(known["images"], training=False), known["outputs"], rtol=1e-5, atol=1e-6)


def test_run_is_read():
    run = training_of(OLD / "run" / "model.keras")
    assert (run["network"], run["data"], len(run["figures"]["loss"])) == ("tiny", "few digits", 1)
    assert run["normalization"] == {"mean": [0.0], "std": [1.0]} and run["recipe"]["epochs"] == 2


def test_interrupted_training_resumes_from_its_checkpoint(few, tmp_path):
    shutil.copytree(OLD / "run", tmp_path / "run")
    model = keras.saving.load_model(OLD / "run" / "model.keras")
    epochs = []
    recipe = replace(RECIPES["digits"], epochs=2, batch_size=32)
    model, figures = fit(model, recipe, few, tmp_path / "run", progress=lambda now: epochs.append(now.epoch))
    assert epochs[0] == 1  # the first was done by the old version
    known = json.loads((OLD / "whole_figures.json").read_text())
    assert figures.keys() == known.keys()
    for name, values in figures.items():
        # As the old version trained both epochs; sums of another processor differ.
        assert values == pytest.approx(known[name], rel=2e-3), name
    weights = np.load(OLD / "whole_weights.npz")
    for ours, theirs in zip(model.get_weights(), weights.values(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-2, atol=1e-3)

    new = {"/pixels", "/pixels/mean", "/pixels/mean/0", "/pixels/std", "/pixels/std/0", "/source"} | {
        "/input_shape",
        "/input_shape/0",
        "/training_images",
    }
    assert keys(json.loads((tmp_path / "run" / "run.json").read_text())) == new | keys(
        training_of(OLD / "run" / "model.keras")
    )


def keys(value, path=""):
    """The keys of a JSON file and of what is in it."""
    entries = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    return {path}.union(*(keys(inner, f"{path}/{key}") for key, inner in entries))


def test_manifests_have_the_same_keys_now(tmp_path):
    model, images = keras.saving.load_model(OLD / "run" / "model.keras"), digits().test.images[:20]
    exported = to_litert(model, precision="int8", calibration=images)
    later = "/float_operators", "/lowering/reasons", "/lowering/constant"
    found = {key for key in keys(exported.manifest) if not key.startswith(later)}
    assert found == keys(json.loads((OLD / "tiny_int8.tflite.json").read_text()))
    served = to_savedmodel(model, tmp_path, labels=list("0123456789"), normalization=(0, 255))
    new = {"/labels", "/labels/0", "/normalization", "/training"}
    new |= {f"/normalization/{key}" for key in ("mean", "mean/0", "std", "std/0")}
    found = {key for key in keys(served.manifest) if not key.startswith(later)}
    assert found == new | keys(load_savedmodel(OLD / "served").manifest)


def test_litert_file_and_its_manifest_are_read():
    file = load_litert(OLD / "tiny_int8.tflite")
    assert (file.manifest["network"], file.manifest["precision"]) == ("tiny", "int8")
    found = inspect(OLD / "tiny_int8.tflite")
    assert found.checked == "manifest" and found.metadata.labels == tuple("0123456789")
    assert found.metadata.normalization == ((0.0,), (255.0,)) and found.metadata.training["network"] == "tiny"
    assert reference_error(file.runner(), file.manifest["golden"]) <= file.manifest["golden"]["tolerance"]


def test_saved_model_and_its_manifest_are_read():
    saved = load_savedmodel(OLD / "served")
    assert saved.manifest["network"] == "tiny"
    assert reference_error(saved.runner(), saved.manifest["golden"]) <= saved.manifest["golden"]["tolerance"]
    assert verify(OLD / "run" / "model.keras", OLD / "served").agreement.max_error < 1e-3


def test_results_are_read_and_shown():
    results = read(OLD / "results.json")
    assert len(results["overhead"]) == 2 and len({Cell.of(record) for record in results["overhead"]}) == 2
    assert "se_resnet11_digits" in headline([results])
    assert "published" in as_markdown([results]) and "se_resnet11_digits" in as_html([results])


def test_packed_images_are_read():
    data = load(OLD / "shards")
    assert (data.classes, len(data.train), len(data.test)) == (("a", "b"), 6, 2)


def test_quantization_aware_model_is_loaded():
    with qat.scope():
        model = tf_keras.models.load_model(OLD / "quantize_aware.h5")
    known = np.load(OLD / "quantize_aware_outputs.npz")
    # A value between two steps may be rounded the other way where a processor adds in another order.
    np.testing.assert_allclose(model.predict(known["images"], verbose=0), known["outputs"], atol=0.02)
