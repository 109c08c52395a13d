"""SavedModels for TF Serving: atomic, numbered, and usable without Keras and XLA."""

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from export_fixtures import INTEGERS, Subclassed, grouped_network, images_for, network_of_integers, scattered
from keras import layers

from se_keras.catalogue import create
from se_keras.export import description
from se_keras.export.benchmark.programs import serving_session as session
from se_keras.export.model import check_images, predict, trace
from se_keras.export.outputs import agreement
from se_keras.export.serving import conversion, savedmodel, warmup
from se_keras.export.serving.conversion import to_savedmodel
from se_keras.export.serving.savedmodel import next_version
from se_keras.layers import SqueezeExcite

BATCHES = (1, 3, 7)

MEAN, STD = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)
LABELS = [f"class {i}" for i in range(10)]

# The process of export/benchmark/programs/serving_session.py, without Keras and XLA. It answers images by each
# signature that takes them, files by `image_bytes`, and the warm-up requests, which it reads by the protos of
# tensorflow-serving-api.
SERVER = """
import sys
sys.modules |= dict.fromkeys(("keras", "tf_keras", "se_keras"))
import pickle, runpy
import tensorflow as tf
from tensorflow_serving.apis import prediction_log_pb2

session_file, asked, answered = sys.argv[1:]
server = runpy.run_path(session_file)
server["switch_off_xla"]()
report = {}
for path, (batches, files) in pickle.load(open(asked, "rb")).items():
    answers = report[path] = {}
    try:
        session = server["Session"](path)
        for name, signature in session.signatures.items():
            if "image_bytes" in signature.inputs:
                answers[name] = session.predict(name, {"image_bytes": files})
            else:
                answers[name] = [session.predict(name, {"images": images}) for images in batches]
        warmup = f"{path}/assets.extra/tf_serving_warmup_requests"
        for record in tf.data.TFRecordDataset(warmup).as_numpy_iterator() if tf.io.gfile.exists(warmup) else ():
            request = prediction_log_pb2.PredictionLog.FromString(record).predict_log.request
            inputs = {key: tf.make_ndarray(value) for key, value in request.inputs.items()}
            name = request.model_spec.signature_name
            answers["warm-up", request.model_spec.name, name] = session.predict(name, inputs)
        answers["signatures"] = {name: [sorted(x.inputs), sorted(x.outputs)] for name, x in session.signatures.items()}
    except Exception as error:
        report[path] = str(error)
pickle.dump(report, open(answered, "wb"))
"""


def ask(folder, questions):
    """The answers of the server: `{path: (batches, files)}` gives `{path: answers}`, or an error as text."""
    paths = folder / "asked.pickle", folder / "answered.pickle"
    paths[0].write_bytes(pickle.dumps({str(path): question for path, question in questions.items()}))
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", SERVER, session.__file__, *paths]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return pickle.loads(paths[1].read_bytes())


def png(pixels):
    return tf.io.encode_png(pixels).numpy()


def small():
    """A small model with a convolution and a SqueezeExcite, which is exported fast."""
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
    """Exports of a network with grouped convolutions: lowered, as published, and by Keras itself."""
    folder = tmp_path_factory.mktemp("exports")
    about = {"labels": LABELS, "normalization": (MEAN, STD), "top": 3}
    to_savedmodel(network, folder / "lowered", **about)
    to_savedmodel(network, folder / "published", lowering=False, **about)
    trace(network, folder / "keras")
    return folder


@pytest.fixture(scope="module")
def batches(network):
    return [images_for(network, samples=size, seed=size) for size in BATCHES]


@pytest.fixture(scope="module")
def files():
    """A picture of the size of the network, and bytes that are not a picture."""
    return np.array([png(np.random.default_rng(0).integers(0, 256, (8, 8, 3), "uint8")), b"no picture"], object)


@pytest.fixture(scope="module")
def served(exports, batches, files, tmp_path_factory):
    """The answers of the server for each export: those of its signatures, or an error."""
    # In another folder, to test that the labels are part of the SavedModel.
    moved = tmp_path_factory.mktemp("elsewhere") / "models"
    shutil.copytree(exports, moved)
    paths = {"lowered": moved / "lowered" / "1", "published": moved / "published" / "1", "keras": moved / "keras"}
    report = ask(moved, dict.fromkeys(paths.values(), (batches, files)))
    return {form: report[str(path)] for form, path in paths.items()}


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# In the server.


@pytest.mark.slow
@pytest.mark.parametrize("size", range(len(BATCHES)))
@pytest.mark.parametrize("form", ["lowered", "published"])
def test_server_without_keras_and_xla_gives_keras_probabilities(served, network, batches, form, size):
    expected = network(batches[size], training=False)
    # Eight layers in float32, rounded in another order: 1e-6 and less measured.
    answer = served[form]["serving_default"][size]
    np.testing.assert_allclose(answer["probabilities"], expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["lowered", "published"])
def test_logits_are_those_of_the_probabilities(served, form):
    for logits, answer in zip(served[form]["logits"], served[form]["serving_default"], strict=True):
        np.testing.assert_allclose(tf.nn.softmax(logits["logits"]), answer["probabilities"], rtol=0, atol=1e-6)
        assert (logits["logits"].sum(axis=1) != 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["lowered", "published"])
def test_picture_is_classified_by_name_and_what_is_none_is_left_out(served, network, files, form):
    pixels = tf.io.decode_png(files[0]).numpy()
    (expected,) = network((pixels[None] - np.array(MEAN)) / STD, training=False).numpy()
    best = np.argsort(-expected)[:3]
    answer = served[form]["image_bytes"]
    assert answer["classes"].tolist() == [[LABELS[i].encode() for i in best], [b""] * 3]
    np.testing.assert_allclose(answer["scores"], [expected[best], np.zeros(3)], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["lowered", "published"])
def test_warm_up_requests_are_one_for_each_signature_and_are_answered(served, form):
    answers = {key[1:]: outputs for key, outputs in served[form].items() if key[0] == "warm-up"}
    signatures = ("serving_default", "logits", "image_bytes")
    assert set(answers) == {("se_resnext_small", name) for name in signatures}
    assert {len(x) for outputs in answers.values() for x in outputs.values()} == {1}


@pytest.mark.slow
def test_server_refuses_grouped_convolutions_as_keras_writes_them(served):
    # The reason for `_remove_xla`. If Keras stops requesting XLA, it can be deleted.
    assert "XLA" in served["keras"]


@pytest.mark.slow
def test_networks_of_the_catalogue_with_grouped_convolutions_are_served(tmp_path):
    # A family each: groups of 4 channels, groups of 1x1 convolutions with a shuffle, 64 groups.
    questions, expected = {}, {}
    for name in ("resnext50_32x4d", "shufflenet_g3", "senet154"):
        keras.utils.set_random_seed(0)
        model = create(name, input_shape=(64, 64, 3))
        saved = to_savedmodel(model, tmp_path / name)
        assert saved.manifest["agreement"]["max_error"] < 1e-3
        images = check_images(model, samples=2)
        questions[saved.path], expected[saved.path] = ([images], None), predict(model, images)
        keras.utils.clear_session()
    answers = ask(tmp_path, questions)
    for path, outputs in expected.items():
        assert isinstance(answers[str(path)], dict), answers[str(path)]
        # As `require_equal`: rounding leaves 1e-6 to 1e-4 in networks of this depth, a wrong graph 1e-2.
        answer = answers[str(path)]["serving_default"][0]
        assert agreement(outputs, answer, as_logits="probabilities" in outputs).max_error < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("form", ["lowered", "published"])
def test_signatures_have_the_names_that_clients_use(served, form):
    assert served[form]["signatures"] == {
        "serving_default": [["images"], ["probabilities"]],
        "logits": [["images"], ["logits"]],
        "image_bytes": [["image_bytes"], ["classes", "scores"]],
    }


@pytest.mark.slow
@pytest.mark.parametrize("form", ["lowered", "published"])
def test_nothing_asks_for_xla(exports, form):
    assert b"_XlaMustCompile" not in (exports / form / "1" / "saved_model.pb").read_bytes()
    assert b"_XlaMustCompile" in (exports / "keras" / "saved_model.pb").read_bytes()


@pytest.mark.slow
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


def test_outputs_of_a_dict_have_its_keys(tmp_path):
    images = keras.Input((4, 4, 2), name="images")
    maps = {"boxes": layers.Conv2D(3, 1, name="z")(images), "scores": layers.Conv2D(3, 1, name="a")(images)}
    model = keras.Model(images, maps)
    exported, x = to_savedmodel(model, tmp_path), np.random.default_rng(0).normal(size=(2, 4, 4, 2)).astype("float32")
    expected, actual = model(x), exported.runner()(x)
    assert set(actual) == set(exported.manifest["signature"]["outputs"]) == set(maps)
    for key in maps:
        np.testing.assert_allclose(actual[key], expected[key], rtol=0, atol=1e-6)


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
    agree = conversion.agreement

    def meanwhile(*sides, as_logits):
        (tmp_path / "1").mkdir()
        (tmp_path / "1" / "saved_model.pb").write_text("another's")
        return agree(*sides, as_logits=as_logits)

    monkeypatch.setattr(conversion, "agreement", meanwhile)
    with pytest.raises(FileExistsError):
        to_savedmodel(model, tmp_path)
    assert names_in(tmp_path) == ["1"]
    assert (tmp_path / "1" / "saved_model.pb").read_text() == "another's"


# Atomic.


@pytest.mark.slow
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("step", ["trace", "_remove_xla", "agreement", "_batching", "manifest"])
def test_failure_in_the_middle_leaves_nothing(model, tmp_path, monkeypatch, step, failure):
    do = getattr(conversion, step)

    def fail(*args, **kwargs):
        do(*args, **kwargs)  # so that there is something to leave
        raise failure

    monkeypatch.setattr(conversion, step, fail)
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
    assert {"saved_model.pb", "variables", "assets.extra", "batching_params.pbtxt"} <= set(content)
    assert sorted(extra) == ["manifest.json", "tf_serving_warmup_requests"]


def test_another_file_system_than_that_of_temporary_files_is_written(model, tmp_path):
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system to write to")
    with tempfile.TemporaryDirectory(dir=shm) as folder:
        assert to_savedmodel(model, folder).path.is_dir()
        assert names_in(Path(folder)) == ["1"]


def test_file_system_that_cannot_rename_folders_is_told_and_left_as_it_was(model, tmp_path, monkeypatch):
    replace = os.replace

    def refuse(source, target):  # as mounted buckets and some overlays do
        if os.path.isdir(source):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source), None, str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="Invalid cross-device link: '.*' -> '.*/1'"):
        to_savedmodel(model, tmp_path)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (tf.make_tensor_proto(0.0, "float32", (1, 4, 4, 3)), "The warm-up request for 'serving_default' fails: "),
        (tf.make_tensor_proto(np.nan, "float32", (1, 4, 4, 2)), "answer to the warm-up request .* is not finite"),
        (tf.make_tensor_proto(["text"]), "The warm-up request for 'serving_default' fails: "),
    ],
    ids=["shape", "NaN", "type"],
)
def test_warm_up_request_that_would_fail_the_load_is_an_error_and_leaves_nothing(
    model, tmp_path, monkeypatch, tensor, message
):
    monkeypatch.setattr(conversion, "_requests", lambda *_: [("serving_default", {"images": tensor})])
    with pytest.raises(ValueError, match=f"{message}.*Nothing was written"):
        to_savedmodel(model, tmp_path)
    assert names_in(tmp_path) == []


def test_warm_up_request_for_no_signature_is_an_error(saved, tmp_path):
    warmup.write(tmp_path, "small", [("regress", {})])
    with pytest.raises(ValueError, match="The warm-up request for 'regress' fails"):
        warmup.replay(tmp_path, saved.runner().signatures)


def test_savedmodel_that_disagrees_with_keras_is_an_error_and_leaves_nothing(model, tmp_path, monkeypatch):
    def other(model):
        copy = small()
        copy.set_weights([weight + 0.1 for weight in model.get_weights()])
        return copy

    monkeypatch.setattr(conversion, "lower", other)
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
    assert saved.manifest["lowering"] == {
        "hoisted": 1,
        "unhoisted": 0,
        "constant": 0,
        "folded": 1,
        "dropped": 0,
        "reasons": {},
    }
    assert saved.manifest["versions"]["tensorflow"] == tf.__version__


@pytest.mark.slow
def test_manifest_has_every_signature(exports):
    record = json.loads((exports / "lowered" / "1" / "assets.extra" / "manifest.json").read_text())
    images = {"images": {"shape": [None, 8, 8, 3], "dtype": "float32"}}
    assert record["signatures"] == {
        "image_bytes": {
            "inputs": {"image_bytes": {"shape": [None], "dtype": "string"}},
            "outputs": {
                "classes": {"shape": [None, 3], "dtype": "string"},
                "scores": {"shape": [None, 3], "dtype": "float32"},
            },
        },
        "logits": {"inputs": images, "outputs": {"logits": {"shape": [None, 10], "dtype": "float32"}}},
        "serving_default": {"inputs": images, "outputs": {"probabilities": {"shape": [None, 10], "dtype": "float32"}}},
    }


@pytest.mark.slow
def test_manifest_has_a_golden_output_that_the_server_gives(exports, saved):
    for path in (exports / "lowered" / "1", exports / "published" / "1", saved.path):
        found = savedmodel.load_savedmodel(path)
        assert description.reference_error(found.runner(), found.manifest["golden"]) <= 1e-6
    assert saved.manifest["golden_file"] is None


def test_batches_are_gathered_up_to_the_largest_size_that_is_allowed(saved):
    # BatchingParameters: the last of the allowed sizes has to be the largest batch, or TF Serving refuses the model.
    text = (saved.path / "batching_params.pbtxt").read_text()
    (most,) = map(int, re.findall(r"^max_batch_size \{ value: (\d+) \}$", text, re.MULTILINE))
    allowed = [*map(int, re.findall(r"^allowed_batch_sizes: (\d+)$", text, re.MULTILINE))]
    assert allowed == sorted(allowed) and allowed[0] == 1 and allowed[-1] == most == 32


@pytest.mark.slow
def test_manifest_of_the_published_form_has_no_lowering(exports):
    record = json.loads((exports / "published" / "1" / "assets.extra" / "manifest.json").read_text())
    assert record["lowering"] is None


def test_manifest_has_the_agreement_on_the_held_out_images(saved):
    assert (saved.manifest["agreement"]["samples"], saved.manifest["agreement"]["held_out"]) == (11, True)
    assert saved.manifest["agreement"]["max_error"] <= 1e-5


@pytest.mark.slow
def test_noise_counts_as_not_calibrated_on_as_it_does_in_litert(exports):
    # `manifest`: "whether it was measured on inputs that calibration did not see".
    record = json.loads((exports / "lowered" / "1" / "assets.extra" / "manifest.json").read_text())
    assert record["agreement"]["held_out"] is True


@pytest.mark.parametrize("lowering", [True, False], ids=["lowered", "published"])
def test_mixed_precision_is_compared_with_its_float32_model(lowering, mixed_float16, tmp_path):
    mixed = scattered(small())
    saved = to_savedmodel(mixed, tmp_path, held_out=images_for(mixed, samples=8), lowering=lowering)
    output = saved.manifest["signature"]["outputs"]["probabilities"]
    assert output == saved.manifest["signatures"]["serving_default"]["outputs"]["probabilities"]
    if lowering:
        # float32 rounds to 6e-8, float16 to 5e-4.
        assert output["dtype"] == "float32" and saved.manifest["agreement"]["max_error"] < 1e-5
        assert 1e-5 < saved.manifest["trained_precision"]["max_error"] < 1e-2
    else:  # the mixed model itself
        assert output["dtype"] == "float16" and "trained_precision" not in saved.manifest


# Batches.


def fixed(size, function):
    images = keras.Input((4, 4, 2), batch_size=size, name="images")
    return keras.Model(images, layers.Dense(3, name="top")(function(images)), name="fixed")


@pytest.mark.parametrize("size", [1, 8])
def test_model_of_a_fixed_batch_size_takes_any_as_a_savedmodel(size, tmp_path):
    model = fixed(size, lambda x: layers.Flatten()(SqueezeExcite(2)(x)))
    saved = to_savedmodel(model, tmp_path, held_out=images_for(model, samples=5))
    assert saved.manifest["signature"]["inputs"]["images"]["shape"] == [None, 4, 4, 2]
    assert saved.runner()(images_for(model, samples=3))["top"].shape == (3, 3)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_model_that_computes_with_its_batch_size_is_refused(size, tmp_path):
    model = fixed(size, lambda x: keras.ops.reshape(x, (size, 32)))
    message = (
        f"^A SavedModel must take batches of any size. Received: fixed, which computes with a batch size of {size}$"
    )
    with pytest.raises(ValueError, match=message):
        to_savedmodel(model, tmp_path)
    assert names_in(tmp_path) == []


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": LABELS[:3]}, "needs labels and normalization, both of them. Received: labels alone"),
        ({"normalization": (0, 1)}, "needs labels and normalization, both of them. Received: normalization alone"),
        ({"labels": LABELS[:2], "normalization": (0, 1)}, "the network has 3 classes. Received: 2 labels"),
        ({"labels": LABELS[:3], "normalization": (0, 0)}, "std above zero. Received: normalization=\\(0, 0\\)"),
        ({"top": 0}, "top must be an int of at least 1. Received: top=0"),
    ],
)
def test_bad_description_is_an_error_and_leaves_nothing(tmp_path, arguments, message):
    images = keras.Input((4, 4, 3), name="images")
    model = keras.Model(images, layers.Dense(3, activation="softmax")(layers.Flatten()(images)))
    with pytest.raises(ValueError, match=message):
        to_savedmodel(model, tmp_path, **arguments)
    assert names_in(tmp_path) == []


def test_files_need_images_of_a_fixed_size_in_gray_or_rgb(model, tmp_path):
    with pytest.raises(ValueError, match=r"a fixed size with 1 or 3 channels. Received: a model of \(4, 4, 2\)"):
        to_savedmodel(model, tmp_path, labels=LABELS[:3], normalization=(0, 1))
    images = keras.Input((None, None, 3), name="images")
    free = keras.Model(images, layers.Dense(3, activation="softmax")(layers.GlobalAveragePooling2D()(images)))
    with pytest.raises(ValueError, match=r"Received: a model of \(None, None, 3\)"):
        to_savedmodel(free, tmp_path, labels=LABELS[:3], normalization=(0, 1))


def test_fewer_classes_than_asked_for_are_all_given(tmp_path):
    images = keras.Input((4, 4, 1), name="images")
    model = keras.Model(images, layers.Dense(3, activation="softmax")(layers.Flatten()(images)))
    saved = to_savedmodel(model, tmp_path, labels=LABELS[:3], normalization=(0, 255))
    assert sorted(saved.manifest["golden_file"]["classes"]) == LABELS[:3]
    assert sum(saved.manifest["golden_file"]["scores"]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("end", "has_logits"),
    [
        (lambda x: layers.Dense(3, activation="softmax", use_bias=False)(x), True),
        (lambda x: layers.Softmax()(layers.Dense(3)(x)), True),
        (lambda x: layers.Activation("softmax")(layers.Dense(3)(x)), True),
        (lambda x: layers.Dense(3)(x), False),
        (lambda x: layers.Dense(3, activation="sigmoid")(x), False),
    ],
    ids=["no bias", "Softmax", "Activation", "linear", "sigmoid"],
)
def test_logits_are_given_where_the_model_ends_in_a_softmax(tmp_path, end, has_logits):
    images = keras.Input((4, 4, 1), name="images")
    model = keras.Model(images, end(layers.Flatten()(images)))
    runner = to_savedmodel(model, tmp_path, lowering=False).runner()
    assert ("logits" in runner.signatures) is has_logits
    if has_logits:
        x = images_for(model)
        np.testing.assert_allclose(tf.nn.softmax(runner(x, signature="logits")["logits"]), model(x), rtol=0, atol=1e-6)


def test_several_inputs_are_an_error(tmp_path):
    inputs = [keras.Input((4, 4, 2), name="left"), keras.Input((4, 4, 2), name="right")]
    model = keras.Model(inputs, layers.Add()(inputs), name="pair")
    with pytest.raises(ValueError, match="Only models with one input can be exported. Received: pair with 2"):
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


@pytest.mark.slow
@pytest.mark.parametrize("dtype", INTEGERS)
def test_savedmodel_takes_the_integers_of_its_model(dtype, tmp_path):
    network, images = network_of_integers(dtype)
    made = to_savedmodel(network, tmp_path, held_out=images, labels=list("abcd"), normalization=(0, 1), top=4)
    assert made.manifest["signatures"]["serving_default"]["inputs"]["images"]["dtype"] == dtype
    assert made.manifest["golden"]["input"]["dtype"] == dtype
    assert made.manifest["agreement"]["max_error"] < 1e-5
    # A file of 8x8 pixels is not resized: `image_bytes` scores its integers.
    pixels = np.random.default_rng(1).integers(0, 128, (8, 8, 3)).astype("uint8")
    answer = made.runner().signatures["image_bytes"](tf.constant([tf.io.encode_png(pixels).numpy()]))
    (expected,) = predict(network, pixels[None]).values()
    np.testing.assert_allclose(answer["scores"], -np.sort(-expected), rtol=0, atol=1e-5)
