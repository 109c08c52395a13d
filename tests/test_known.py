"""What a model knows about its images is asked of its own files: labels, normalization, size, protocol and data."""

import json
import re
import warnings
from dataclasses import replace

import keras
import numpy as np
import pytest
import tensorflow as tf

import se_keras_cli
from se_keras.catalogue import create, names, spec_of
from se_keras.evaluation import data_of, evaluate, protocol_for
from se_keras.export import to_litert, to_savedmodel
from se_keras.export.description import known_from
from se_keras.export.litert.file import load_litert
from se_keras.export.litert.metadata import read
from se_keras.export.model import default_normalization
from se_keras.export.verification import runnable, verify
from se_keras.normalization import IMAGENET, Normalization
from se_keras.runs import training_of
from se_keras.training import RECIPES, fit
from se_keras.training.data import Arrays, Data, digits, folder
from se_keras.training.schedules import steps_per_epoch

COLORS = {"blue": (30, 60, 200), "green": (40, 190, 50), "red": (210, 40, 60)}
NORMALIZATION = Normalization((90.0, 100.0, 110.0), (80.0, 60.0, 70.0))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of noisy 16x16 photos in three colours, which a small network can tell apart."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name, color in COLORS.items():
        (root / name).mkdir()
        for number in range(30):
            pixels = np.clip(rng.normal(color, 60, (16, 16, 3)), 0, 255).astype("uint8")
            (root / name / f"{number}.png").write_bytes(tf.io.encode_png(pixels).numpy())
    return root


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    """The folder of a run on the photos."""
    path = tmp_path_factory.mktemp("run")
    assert fit_colors(16, photos, path)["val_accuracy"][-1] > 0.9
    return path


def fit_colors(size, photos, path):
    keras.utils.set_random_seed(0)
    images = keras.Input((size, size, 3), name="images")
    x = keras.layers.Conv2D(8, 3, padding="same", activation="relu")(images)
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(images, keras.layers.Dense(3, activation="softmax")(x), name="colors")
    data = folder(photos, mean=NORMALIZATION.mean, std=NORMALIZATION.std)
    recipe = replace(RECIPES["digits"], epochs=6, batch_size=6, learning_rate=0.1)
    _, figures = fit(model, recipe, data, path)
    return figures


def test_run_with_another_image_size_is_refused(run, photos):
    before = (run / "model.keras").read_bytes()
    with pytest.raises(
        ValueError, match=r"another run: input_shape \[16, 16, 3\], now \[32, 32, 3\]\. Take a new folder$"
    ):
        fit_colors(32, photos, run)
    assert (run / "model.keras").read_bytes() == before


@pytest.fixture
def cli(capsys, monkeypatch):
    """`cli(*arguments)`: the exit status, stdout and stderr of the command."""

    monkeypatch.setenv("COLUMNS", "400")

    def call(*arguments):
        with warnings.catch_warnings():
            status = se_keras_cli.main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """Exports of the run without a word on labels or normalization: `{name: path}`."""
    path, model, training = tmp_path_factory.mktemp("exports"), run / "model.keras", training_of(run / "model.keras")
    network = keras.saving.load_model(model)
    photos = training["source"]
    to_litert(network, training=training).save(path / "colors.tflite")
    camera = to_litert(network, precision="int8", calibration=photos, input_type="uint8", training=training)
    camera.save(path / "camera.tflite")
    to_savedmodel(network, path / "served", training=training)
    return {"run": model, **{name: path / name for name in ("colors.tflite", "camera.tflite", "served")}}


# From a folder of photos to answers, without --normalize and --labels.


@pytest.mark.parametrize("kind", ["run", "colors.tflite", "camera.tflite", "served"])
def test_files_of_a_run_know_its_labels_and_its_normalization(exported, kind):
    about = runnable(exported[kind])
    assert about.about.labels == tuple(COLORS)
    expected = Normalization((0.0,), (1.0,)) if kind == "camera.tflite" else NORMALIZATION
    assert about.normalization == expected


@pytest.mark.parametrize("kind", ["run", "colors.tflite", "camera.tflite", "served"])
def test_evaluate_asks_the_model(exported, photos, run, cli, kind):
    data = [] if kind == "run" else ["--data", photos]  # paths of the machine that trained stay in run.json
    status, out, _ = cli("evaluate", exported[kind], *data, "--json")
    report = json.loads(out)
    assert (status, report["data"], report["protocol"]) == (0, photos.name, "plain")
    trained = training_of(run / "model.keras")["figures"]["val_accuracy"][-1]
    assert report["top1"]["value"] == pytest.approx(trained, abs=1e-6 if kind != "camera.tflite" else 0.06)


@pytest.mark.slow
def test_commands_go_from_photos_to_a_served_model_and_a_camera_file(run, photos, cli, tmp_path):
    status, _, err = cli("export", run / "model.keras", "-o", tmp_path / "served")
    assert status == 0, err
    options = ("--precision", "int8", "--calibration", photos, "--input-type", "uint8")
    status, _, err = cli("export", run / "model.keras", *options, "-o", tmp_path / "camera.tflite")
    assert status == 0, err
    pixels = [tf.io.read_file(str(photos / name / "0.png")) for name in COLORS]
    answer = runnable(tmp_path / "served")  # its runner serves TF Serving's signatures
    served = tf.saved_model.load(str(tmp_path / "served" / "1")).signatures["image_bytes"](tf.stack(pixels))
    assert answer.about.labels == tuple(COLORS)
    assert [x[0].decode() for x in served["classes"].numpy()] == [*COLORS]
    camera = load_litert(tmp_path / "camera.tflite").runner()
    assert camera.input_dtype == "uint8"
    images = np.stack([tf.io.decode_png(x).numpy() for x in pixels])
    assert [[*COLORS][i] for i in camera(images)["probabilities"].argmax(axis=1)] == [*COLORS]


@pytest.mark.slow
@pytest.mark.parametrize("kind, tolerance", [("colors.tflite", 1e-4), ("camera.tflite", 0.2), ("served", 1e-4)])
def test_verify_gives_each_file_the_same_photos(exported, photos, cli, kind, tolerance):
    status, out, _ = cli("verify", exported["run"], exported[kind], "--images", photos, "--json")
    assert not status and json.loads(out)["agreement"]["max_error"] < tolerance


def test_inspect_shows_the_figures_of_the_last_epoch_and_lists_whole(exported, cli):
    _, out, _ = cli("inspect", exported["camera.tflite"])
    assert re.search(r"decay_epochs \[30, 60, 90\]", out) and "classes tissue" not in out
    assert re.search(r"val_accuracy (0\.9|1)", out)


def test_no_path_of_the_machine_that_trained_is_in_a_file(exported, photos):
    assert str(photos).encode() not in exported["colors.tflite"].read_bytes()


# What contradicts a run is refused by name.


@pytest.mark.parametrize("target", ["x.tflite", "served"])
def test_contradiction_is_refused_unless_overridden(run, cli, tmp_path, target):
    (tmp_path / "reversed.txt").write_text("\n".join(reversed(COLORS)))
    command = ("export", run / "model.keras", "-o", tmp_path / target)
    status, _, err = cli(*command, "--labels", tmp_path / "reversed.txt")
    assert status == 2 and "class 0 is 'blue'. Received: 'red'" in err and "--override" in err
    status, _, err = cli(*command, "--normalize", "0", "255")
    assert status == 2 and "(pixel - (90, 100, 110)) / (80, 60, 70). Received: (pixel - (0)) / (255)" in err
    assert not (tmp_path / target).exists()
    status, _, err = cli(*command, "--normalize", "0", "255", "--override")
    assert status == 0, err
    assert runnable(tmp_path / target).about.normalization == ((0.0,), (255.0,))


def test_data_with_other_classes_are_refused(run, photos):
    data = replace(folder(photos), classes=("cyan", "green", "red"))
    with pytest.raises(ValueError, match="classes of .*model.keras must be as in its training.* class 0 is 'blue'"):
        evaluate(run / "model.keras", data.test, data)


def test_evaluate_takes_the_normalization_of_the_run_and_not_that_of_the_data(run, photos):
    data = folder(photos)  # with ImageNet's
    found = evaluate(run / "model.keras", data.test, data)
    assert found.top1.value == pytest.approx(training_of(run / "model.keras")["figures"]["val_accuracy"][-1])
    with pytest.raises(ValueError, match="normalization of .* must be as in its training, unless override=True"):
        evaluate(run / "model.keras", data.test, data, normalization=IMAGENET)


def test_rounded_numbers_are_no_contradiction(run):
    network, training = keras.saving.load_model(run / "model.keras"), training_of(run / "model.keras")
    made = to_litert(network, training=training, normalization=((90.2, 99.9, 110), (80, 60.1, 70)))
    assert read(made.content).normalization == NORMALIZATION


# Without a run.


def test_model_that_does_not_know_its_normalization_is_refused_where_it_is_needed(photos, cli, tmp_path):
    images = keras.Input((16, 16, 3), name="images")
    model = keras.Model(images, keras.layers.Dense(3)(keras.layers.Flatten()(images)), name="unknown")
    model.save(tmp_path / "unknown.keras")
    for command in (
        ("evaluate", tmp_path / "unknown.keras", "--data", photos),
        (
            "export",
            tmp_path / "unknown.keras",
            "--precision",
            "int8",
            "--calibration",
            photos,
            "-o",
            tmp_path / "x.tflite",
        ),
    ):
        status, _, err = cli(*command)
        assert status == 2 and re.search(r"normalization \(--normalize MEAN STD\) says what becomes of them", err), err
    status, _, err = cli("evaluate", tmp_path / "unknown.keras")
    assert status == 2 and "data (--data) are needed" in err


def test_catalogue_knows_the_normalization_of_networks_with_the_published_classes():
    with keras.StatelessScope(initialize_variables=False):
        published, fine_tuned = create("se_resnet20"), create("se_resnet20", classes=7)
    assert default_normalization(published) == spec_of("se_resnet20").normalization
    assert default_normalization(fine_tuned) is None
    own = keras.Input((32, 32, 3))  # a network of somebody else with the same name
    assert default_normalization(keras.Model(own, keras.layers.Flatten()(own), name="se_resnet20")) is None


def test_layer_that_scales_pixels_takes_them_as_they_are():
    with keras.StatelessScope(initialize_variables=False):
        model = create("se_resnet20", include_preprocessing=True)
    assert default_normalization(model) == ((0.0,), (1.0,))


# Runs and data.


def test_digits_in_zero_to_one_are_pixels_divided_by_255(trained_digits):
    assert digits().normalization_of_pixels == ((0.0,), (255.0,))
    run = training_of(trained_digits / "model.keras")
    assert known_from(run) == {"labels": tuple("0123456789"), "normalization": Normalization((0.0,), (255.0,))}
    older = {key: value for key, value in run.items() if key not in ("pixels", "source")}
    assert known_from(older) == known_from(run)


@pytest.mark.parametrize("largest, dtype, white", [(1.0, "float32", 1), (255.0, "float32", 255), (1, "uint8", 255)])
def test_white_is_one_for_floats_up_to_one(largest, dtype, white):
    split = Arrays(images=np.full((4, 8, 8, 1), largest, dtype), labels=np.array([0, 1, 0, 1]))
    data = Data(name="x", train=split, test=split, classes=("a", "b"), mean=(0.0,), std=(0.5,))
    assert data.white == white and data.normalization_of_pixels.std == (0.5 * 255 / white,)


@pytest.mark.parametrize(
    "training", [None, {}, {"classes": 10}, {"normalization": "x"}, {"data": "digits", "epochs": 3}]
)
def test_record_of_another_program_says_nothing(training):
    assert known_from(training) == {}


def test_data_of_a_run_are_where_they_were(exported, photos, trained_digits):
    assert data_of([exported["run"]]) == str(photos.resolve())
    assert data_of([trained_digits / "model.keras"]) == "digits"
    with pytest.raises(ValueError, match=r"data \(--data\) are needed"):
        data_of([exported["colors.tflite"]])


@pytest.mark.parametrize("size, protocol", [(8, "plain"), (32, "plain"), (224, "224"), (299, "299"), (320, "320")])
def test_protocol_is_that_of_the_size(size, protocol):
    images = keras.Input((size, size, 1))
    model = keras.Model(images, keras.layers.GlobalAveragePooling2D()(images))
    assert protocol_for([model], digits()) == protocol


def test_row_decides_the_recipe():
    recipes = {name: spec_of(name).recipe for name in names()}
    assert set(recipes.values()) <= RECIPES.keys()
    assert {recipes[name] for name in names() if spec_of(name).input_shape[0] == 32} == {"paper_cifar"}
    assert {recipes[name] for name in names() if spec_of(name).input_shape[0] >= 224} == {"paper_imagenet"}


def test_recipe_with_few_steps_an_epoch_warns():
    images = np.zeros((40, 8, 8, 1), "float32")
    split = Arrays(images=images, labels=np.arange(40) % 2)
    data = Data(name="few", train=split, test=split, classes=("a", "b"), mean=(0.0,), std=(1.0,))
    with pytest.warns(UserWarning, match="An epoch has 2 steps: 40 training images of few in batches of 20. A smaller"):
        assert steps_per_epoch(RECIPES["digits"].scaled_to(20), data) == 2


def test_both_get_whole_pixels_where_the_normalization_differs(exported, photos):
    images = NORMALIZATION.apply(np.random.default_rng(0).uniform(0, 255, (4, 16, 16, 3)))
    assert verify(exported["run"], exported["camera.tflite"], images).agreement.cosine > 0.98
