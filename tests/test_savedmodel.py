"""SavedModels for TF Serving: whole or absent, numbered, and of use where there is neither Keras nor XLA."""

import errno
import hashlib
import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from export_fixtures import Subclassed, grouped_network, images_for, scattered
from keras import layers

from se_keras.export import savedmodel
from se_keras.export.savedmodel import next_version, to_savedmodel
from se_keras.layers import SqueezeExcite

BATCHES = (1, 3, 7)

# What TF Serving does, as near as pip has it: the graph and the variables alone, in a session, with XLA switched off by
# the function that the server calls. Keras, which TensorFlow imports where it can, is kept out.
SERVER = """
import sys
sys.modules |= {"keras": None, "tf_keras": None, "se_keras": None}
import ctypes, json, os
import numpy as np
import tensorflow as tf

library = os.path.join(os.path.dirname(tf.__file__), "libtensorflow_cc.so.2")
ctypes.CDLL(library)._ZN10tensorflow21DisableXlaCompilationEv()
folder, report = sys.argv[1], {}
batches = np.load(os.path.join(folder, "batches.npz"))
for name in sys.argv[2:]:
    with tf.Graph().as_default() as graph, tf.compat.v1.Session(graph=graph) as session:
        try:
            meta = tf.compat.v1.saved_model.load(session, ["serve"], os.path.join(folder, name))
            signature = meta.signature_def["serving_default"]
            (image_name, images), = signature.inputs.items()
            (output_name, outputs), = signature.outputs.items()
            results = {key: session.run(outputs.name, {images.name: batch}) for key, batch in batches.items()}
        except Exception as error:
            report[name] = {"error": str(error)}
            continue
        np.savez(os.path.join(folder, name.replace("/", "_") + ".npz"), **results)
        shapes = [[d.size for d in x.tensor_shape.dim] for x in (images, outputs)]
        report[name] = {"error": None, "input": [image_name, shapes[0]], "output": [output_name, shapes[1]]}
print(json.dumps(report))
"""


def small():
    """A model of one convolution and a squeeze, exported in a moment."""
    images = keras.Input((4, 4, 2), name="images")
    x = layers.BatchNormalization()(layers.Conv2D(4, 1)(images))
    x = layers.GlobalAveragePooling2D()(SqueezeExcite(2)(x))
    return keras.Model(images, layers.Dense(3, activation="softmax")(x), name="small")


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    return scattered(small())


@pytest.fixture(scope="module")
def network():
    keras.utils.set_random_seed(0)
    return scattered(grouped_network())


@pytest.fixture(scope="module")
def exports(network, tmp_path_factory):
    """A folder with a network with grouped convolutions: lowered, as published, and as Keras alone writes it."""
    folder = tmp_path_factory.mktemp("exports")
    to_savedmodel(network, folder / "lowered")
    to_savedmodel(network, folder / "published", lowering=False)
    savedmodel.trace(network, folder / "keras")
    return folder


@pytest.fixture(scope="module")
def served(exports, network):
    """What the server says of each export: outputs for each batch size, names and shapes, or its error."""
    batches = {str(size): images_for(network, samples=size, seed=size) for size in BATCHES}
    np.savez(exports / "batches.npz", **batches)
    names = ["lowered/1", "published/1", "keras"]
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-c", SERVER, str(exports), *names], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    for name in names:
        if report[name]["error"] is None:
            report[name]["results"] = dict(np.load(exports / f"{name.replace('/', '_')}.npz"))
    return report, batches


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# In the server.


@pytest.mark.parametrize("size", BATCHES)
@pytest.mark.parametrize("form", ["lowered", "published"])
def test_server_without_keras_and_xla_gives_keras_probabilities(served, network, form, size):
    report, batches = served
    assert report[f"{form}/1"]["error"] is None
    expected = network(batches[str(size)], training=False)
    # Eight layers in float32, rounded in another order: 1e-6 and less measured.
    np.testing.assert_allclose(report[f"{form}/1"]["results"][str(size)], expected, rtol=0, atol=1e-5)


def test_server_refuses_grouped_convolutions_as_keras_writes_them(served):
    # The reason for `_forget_xla`: where Keras stops asking for XLA, it can go.
    assert "XLA" in served[0]["keras"]["error"]


@pytest.mark.parametrize("form", ["lowered", "published"])
def test_signature_is_from_images_of_any_batch_size_to_probabilities(served, form):
    report = served[0][f"{form}/1"]
    assert report["input"] == ["images", [-1, 8, 8, 3]]
    assert report["output"] == ["probabilities", [-1, 10]]


@pytest.mark.parametrize("form", ["lowered", "published"])
def test_nothing_asks_for_xla(exports, form):
    assert b"_XlaMustCompile" not in (exports / form / "1" / "saved_model.pb").read_bytes()
    assert b"_XlaMustCompile" in (exports / "keras" / "saved_model.pb").read_bytes()


def test_signature_is_the_one_that_serving_asks_for(exports):
    assert list(tf.saved_model.load(exports / "lowered" / "1").signatures) == ["serving_default"]


def test_lowered_graph_has_no_batchnorm(exports):
    for form, names in {"lowered": False, "published": True}.items():
        content = (exports / form / "1" / "saved_model.pb").read_bytes()
        assert (b"FusedBatchNorm" in content or b"moving_variance" in content) is names


def test_free_size_stays_free(tmp_path):
    images = keras.Input((None, None, 2), name="images")
    free = keras.Model(images, SqueezeExcite(2)(layers.ReLU()(images)))
    serve = tf.saved_model.load(to_savedmodel(free, tmp_path, lowering=False).path).signatures["serving_default"]
    for shape in ((1, 5, 6, 2), (2, 9, 3, 2)):
        x = np.random.default_rng(0).normal(size=shape).astype("float32")
        (actual,) = serve(images=tf.constant(x)).values()
        np.testing.assert_allclose(actual, free(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: layers.BatchNormalization(name="last")(layers.Conv2D(4, 1, name="conv")(x)),
        lambda x: SqueezeExcite(2, name="last")(layers.Conv2D(4, 1, name="conv")(x)),
    ],
    ids=["BatchNormalization", "SqueezeExcite"],
)
def test_output_keeps_its_name_where_lowering_renames_the_last_layer(function, tmp_path):
    images = keras.Input((4, 4, 2), name="images")
    model = keras.Model(images, function(images))
    assert list(to_savedmodel(model, tmp_path).manifest["signature"]["outputs"]) == ["last"]


def test_several_outputs_are_compared_by_name(tmp_path):
    images = keras.Input((4, 4, 2), name="images")
    model = keras.Model(images, [layers.ReLU(name="b")(images), layers.Conv2D(3, 1, name="a")(images)])
    outputs = to_savedmodel(model, tmp_path).manifest["signature"]["outputs"]
    assert {name: x["shape"] for name, x in outputs.items()} == {"b": [None, 4, 4, 2], "a": [None, 4, 4, 3]}


# Versions.


def test_versions_count_up(model, tmp_path):
    assert [to_savedmodel(model, tmp_path).path.name for _ in range(2)] == ["1", "2"]
    assert names_in(tmp_path) == ["1", "2"]


@pytest.mark.parametrize(
    ("present", "version"),
    [((), 1), (("1",), 2), (("1", "3"), 4), (("9", "10"), 11), (("latest", ".2.partial-x", "v7"), 1), (("007",), 8)],
)
def test_next_version_is_behind_the_highest(present, version, tmp_path):
    for name in present:
        (tmp_path / name).mkdir()
    assert next_version(tmp_path) == version


def test_first_version_of_a_missing_folder_is_one(tmp_path):
    assert next_version(tmp_path / "new") == 1


def test_version_can_be_chosen(model, tmp_path):
    saved = to_savedmodel(model, tmp_path / "new" / "model", version=20261122)
    assert saved.path == tmp_path / "new" / "model" / "20261122"
    assert (saved.path / "saved_model.pb").is_file()


@pytest.mark.parametrize("version", [0, -1, "1", 1.0, True, "latest"])
def test_version_that_serving_would_not_read_is_an_error(model, tmp_path, version):
    with pytest.raises(ValueError, match="version must be an int of at least 1. Received: version="):
        to_savedmodel(model, tmp_path, version=version)
    assert names_in(tmp_path) == []


def test_existing_version_is_refused_and_left_as_it_is(model, tmp_path):
    (tmp_path / "3").mkdir()
    (tmp_path / "3" / "saved_model.pb").write_text("old")
    with pytest.raises(FileExistsError, match="3' exists. The next free version is 4"):
        to_savedmodel(model, tmp_path, version=3)
    assert (tmp_path / "3" / "saved_model.pb").read_text() == "old"


def test_folder_that_is_a_file_is_refused(model, tmp_path):
    (tmp_path / "model").write_text("a file")
    with pytest.raises(NotADirectoryError, match="needs a folder. Received: the file '.*model'"):
        to_savedmodel(model, tmp_path / "model")
    assert (tmp_path / "model").read_text() == "a file"


def test_folder_under_a_file_is_an_os_error(model, tmp_path):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(OSError):
        to_savedmodel(model, tmp_path / "file" / "model")


def test_version_that_appears_meanwhile_is_not_overwritten(model, tmp_path, monkeypatch):
    agree = savedmodel.agreement

    def meanwhile(*sides):
        (tmp_path / "1").mkdir()
        (tmp_path / "1" / "saved_model.pb").write_text("another's")
        return agree(*sides)

    monkeypatch.setattr(savedmodel, "agreement", meanwhile)
    with pytest.raises(FileExistsError):
        to_savedmodel(model, tmp_path)
    assert names_in(tmp_path) == ["1"]
    assert (tmp_path / "1" / "saved_model.pb").read_text() == "another's"


# Whole or absent.


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("step", ["trace", "_forget_xla", "agreement", "manifest"])
def test_failure_in_the_middle_leaves_nothing(model, tmp_path, monkeypatch, step, failure):
    do = getattr(savedmodel, step)

    def fail(*args, **kwargs):
        do(*args, **kwargs)  # so that there is something to leave
        raise failure

    monkeypatch.setattr(savedmodel, step, fail)
    with pytest.raises(type(failure)):
        to_savedmodel(model, tmp_path)
    assert names_in(tmp_path) == []


def test_numbered_folder_appears_when_everything_is_in_it(model, tmp_path, monkeypatch):
    seen, replace = [], os.replace

    def record(source, target):
        if os.path.isdir(source):
            seen.append(
                (names_in(tmp_path), sorted(os.listdir(source)), os.listdir(os.path.join(source, "assets.extra")))
            )
        replace(source, target)

    monkeypatch.setattr(os, "replace", record)
    to_savedmodel(model, tmp_path)
    ((beside, content, extra),) = seen
    assert not any(name.isdecimal() for name in beside)  # TF Serving loads numbered folders, half-copied ones too
    assert {"saved_model.pb", "variables", "assets.extra"} <= set(content)
    assert extra == ["manifest.json"]


def test_savedmodel_that_disagrees_with_keras_is_an_error_and_leaves_nothing(model, tmp_path, monkeypatch):
    def other(model):
        copy = small()
        copy.set_weights([weight + 0.1 for weight in model.get_weights()])
        return copy

    monkeypatch.setattr(savedmodel, "lower", other)
    with pytest.raises(
        ValueError, match="The SavedModel disagrees with the Keras model: max error .* Nothing was written"
    ):
        to_savedmodel(model, tmp_path)
    assert names_in(tmp_path) == []


# Manifests.


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    images = images_for(model, samples=11)
    return to_savedmodel(model, tmp_path_factory.mktemp("saved"), held_out=images)


def test_manifest_is_in_assets_extra(saved):
    assert json.loads((saved.path / "assets.extra" / "manifest.json").read_text()) == saved.manifest


def test_manifest_has_the_checksum_of_every_other_file(saved):
    files = [path for path in saved.path.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert saved.manifest["files"] == {
        str(path.relative_to(saved.path)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }
    assert "saved_model.pb" in saved.manifest["files"]


def test_manifest_has_the_signature_at_any_batch_size(saved):
    assert saved.manifest["signature"] == {
        "inputs": {"images": {"shape": [None, 4, 4, 2], "dtype": "float32"}},
        "outputs": {"probabilities": {"shape": [None, 3], "dtype": "float32"}},
    }


def test_manifest_says_how_the_export_was_made(saved):
    assert (saved.manifest["network"], saved.manifest["precision"]) == ("small", "float32")
    assert saved.manifest["lowering"] == {"hoisted": 1, "unhoisted": 0, "folded": 1, "dropped": 0}
    assert saved.manifest["versions"]["tensorflow"] == tf.__version__


def test_manifest_of_the_published_form_has_no_lowering(exports):
    record = json.loads((exports / "published" / "1" / "assets.extra" / "manifest.json").read_text())
    assert record["lowering"] is None


def test_manifest_has_the_agreement_on_the_held_out_images(saved):
    assert (saved.manifest["agreement"]["samples"], saved.manifest["agreement"]["held_out"]) == (11, True)
    assert saved.manifest["agreement"]["max_error"] <= 1e-5


def test_noise_counts_as_not_calibrated_on_as_it_does_in_litert(exports):
    # `manifest`: "whether it was measured on inputs that calibration did not see".
    record = json.loads((exports / "lowered" / "1" / "assets.extra" / "manifest.json").read_text())
    assert record["agreement"]["held_out"] is True


# Arguments.


def test_held_out_images_may_be_float64(model, tmp_path):
    images = images_for(model).astype("float64")
    assert to_savedmodel(model, tmp_path, held_out=images).manifest["agreement"]["samples"] == 2


@pytest.mark.parametrize(
    "held_out",
    [np.zeros((2, 4, 4, 3)), np.full((2, 4, 4, 2), np.nan), np.zeros((0, 4, 4, 2)), ["a.png"]],
    ids=["shape", "NaN", "empty", "strings"],
)
def test_bad_held_out_images_are_an_error_and_leave_nothing(model, tmp_path, held_out):
    with pytest.raises((ValueError, TypeError)):
        to_savedmodel(model, tmp_path, held_out=held_out)
    assert names_in(tmp_path) == []


def test_several_inputs_are_an_error(tmp_path):
    inputs = [keras.Input((4, 4, 2), name="left"), keras.Input((4, 4, 2), name="right")]
    model = keras.Model(inputs, layers.Add()(inputs), name="pair")
    with pytest.raises(ValueError, match="one input can be exported. Received: pair with 2"):
        to_savedmodel(model, tmp_path)


@pytest.mark.parametrize("lowering", [True, False])
@pytest.mark.parametrize(
    "model", [Subclassed(), keras.Sequential([layers.ReLU()]), None], ids=["subclass", "unbuilt", "None"]
)
def test_what_is_no_functional_model_is_a_type_error(model, lowering, tmp_path):
    with pytest.raises(TypeError, match="functional"):
        to_savedmodel(model, tmp_path, lowering=lowering)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("lowering", [True, False])
def test_sequential_model_is_exported(lowering, tmp_path):
    model = keras.Sequential([keras.Input((4, 4, 2), name="images"), layers.Flatten(), layers.Dense(3)])
    x = images_for(model)
    serve = tf.saved_model.load(to_savedmodel(model, tmp_path, lowering=lowering).path).signatures["serving_default"]
    (actual,) = serve(tf.constant(x)).values()
    np.testing.assert_allclose(actual, model(x), rtol=0, atol=1e-6)


def test_model_stays_as_it_was(tmp_path):
    model = scattered(small())
    weights, config = model.get_weights(), model.to_json()
    to_savedmodel(model, tmp_path)
    assert all(map(np.array_equal, model.get_weights(), weights))
    assert model.to_json() == config
