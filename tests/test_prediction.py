"""The classes that `predict` names are those of the model's own outputs, and files that cannot be read are named."""

import io
import json
import subprocess
import sys

import keras
import numpy as np
import pytest
from PIL import Image

import se_keras
import se_keras_cli
from se_keras.prediction import class_probabilities, classifier_of, predict_files
from se_keras.training.data import digits

COUNT, DAMAGED = 12, (3, 5, 11)


def pixels_of(index):
    return np.rint(digits().test.images[index, ..., 0] * 255).astype("uint8")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of scanned digits as PNG files, three of them damaged, and a text."""
    folder = tmp_path_factory.mktemp("photos")
    for index in range(COUNT):
        Image.fromarray(pixels_of(index)).save(folder / f"{index:02}.png")
    for index in DAMAGED:
        path = folder / f"{index:02}.png"
        path.write_bytes(path.read_bytes()[:30])
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def model(trained_digits):
    return keras.saving.load_model(trained_digits / "model.keras")


@pytest.mark.parametrize("file", ["model.keras", "float32.tflite"])
def test_scores_are_the_models_own_probabilities(file, model, trained_digits, photos):
    expected = model.predict(pixels_of(0)[None, ..., None] / 255.0, verbose=0)[0]
    scores = se_keras.predict(trained_digits / file, photos / "00.png", top=10)
    assert [score.index for score in scores] == list(np.argsort(-expected))
    np.testing.assert_allclose([score.probability for score in scores], np.sort(expected)[::-1], atol=1e-6)
    assert all(score.name == str(score.index) for score in scores)  # the labels of the digits


def test_photo_is_a_path_the_bytes_of_a_file_or_pixels(trained_digits, photos):
    path = photos / "00.png"
    forms = (path, str(path), path.read_bytes(), pixels_of(0)[..., None])
    answers = [se_keras.predict(trained_digits / "float32.tflite", photo) for photo in forms]
    assert answers[1:] == answers[:-1] and len(answers[0]) == 5


def test_logits_become_probabilities():
    x = keras.Input((8, 8, 1))
    logits = keras.Model(x, keras.layers.Dense(4)(keras.layers.Flatten()(x)))
    softmax = keras.Model(x, keras.layers.Softmax()(logits.outputs[0]))
    image = np.full((8, 8, 1), 100, "uint8")
    of_logits, of_softmax = (se_keras.predict(each, image, normalization=(0, 255)) for each in (logits, softmax))
    np.testing.assert_allclose([x.probability for x in of_logits], [x.probability for x in of_softmax], atol=1e-6)
    assert sum(score.probability for score in of_logits) == pytest.approx(1)
    assert [score.name for score in of_logits] == [str(score.index) for score in of_logits]


def test_labels_name_the_classes(photos):
    x = keras.Input((8, 8, 1))
    own = keras.Model(x, keras.layers.Dense(2)(keras.layers.Flatten()(x)))
    scores = se_keras.predict(own, photos / "00.png", labels=["cat", "dog"], normalization=(0, 255))
    assert {score.index: score.name for score in scores} == {0: "cat", 1: "dog"}
    with pytest.raises(ValueError, match="has 2 classes. Received: 3 labels$"):
        se_keras.predict(own, photos / "00.png", labels=["a", "b", "c"], normalization=(0, 255))


def test_labels_that_contradict_the_training_are_refused(trained_digits, photos):
    names = [*"abcdefghij"]
    with pytest.raises(ValueError, match="class 0 is '0'. Received: 'a'$"):
        se_keras.predict(trained_digits / "model.keras", photos / "00.png", labels=names)
    scores = se_keras.predict(trained_digits / "model.keras", photos / "00.png", labels=names, override=True)
    assert scores[0].name == names[scores[0].index]


def test_normalization_that_is_not_known_is_refused(photos):
    x = keras.Input((8, 8, 1))
    own = keras.Model(x, keras.layers.Dense(2)(keras.layers.Flatten()(x)), name="own")
    with pytest.raises(ValueError, match=r"normalization \(--normalize MEAN STD\).*Received: own, whose files do not"):
        se_keras.predict(own, photos / "00.png")


def model_of(*shape):
    x = keras.Input(shape)
    return keras.Model(x, keras.layers.Dense(2)(keras.layers.Flatten()(x)), name="own")


REFUSED = {
    "no image's model": (lambda: model_of(7), {}, r"Photos are for models .*Received: own of \(7,\)$"),
    "four channels": (lambda: model_of(8, 8, 4), {}, r"1 or 3 channels\)\. Received: own of \(8, 8, 4\)$"),
    "top": (lambda: model_of(8, 8, 1), {"top": 0}, r"top must be an int of at least 1\. Received: top=0$"),
}


@pytest.mark.parametrize("make, options, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_classify_photos_is_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        classifier_of(make(), normalization=(0, 255), **options)


def test_one_value_for_two_classes_is_refused():
    x = keras.Input((8, 8, 1))
    binary = keras.Model(x, keras.layers.Dense(1, activation="sigmoid")(keras.layers.Flatten()(x)), name="binary")
    with pytest.raises(
        ValueError, match=r"one output of two or more classes\. Received: binary with outputs \[\(1,\)\]$"
    ):
        se_keras.predict(binary, np.zeros((8, 8, 1), "uint8"), normalization=(0, 255))


def test_pixels_of_another_number_of_channels_are_refused(trained_digits):
    with pytest.raises(ValueError, match=r"Pixels are \(height, width, 1\)\. Received: \(8, 8, 3\)$"):
        se_keras.predict(trained_digits / "float32.tflite", np.zeros((8, 8, 3), "uint8"))


def test_outputs_that_are_not_finite_are_refused():
    x = keras.Input((8, 8, 1))
    own = keras.Model(x, keras.layers.Lambda(lambda x: x[:, 0, :, 0] * float("nan"))(x), name="own")
    classifier = classifier_of(own, normalization=(0, 1))
    with pytest.raises(ValueError, match="^The outputs of own are not finite$"):
        class_probabilities(classifier.model, classifier.model.normalization)(np.ones((1, 8, 8, 1), "float32"))


def test_damaged_files_among_good_ones_have_an_error(trained_digits, photos):
    found = list(predict_files(classifier_of(trained_digits / "float32.tflite"), [photos]))
    assert [answer.photo for answer in found] == [str(photos / f"{index:02}.png") for index in range(COUNT)]
    assert [index for index, answer in enumerate(found) if answer.error] == [*DAMAGED]
    assert {len(answer.scores) for answer in found if not answer.error} == {5}
    (text,) = {answer.error for answer in found if answer.error}
    assert text == "The photo cannot be decoded: it is damaged, or not a PNG, JPEG, BMP, GIF or WebP image"


def command(capfd, *arguments):
    status = se_keras_cli.main(["predict", *map(str, arguments)])
    return status, *capfd.readouterr()


def test_command_shows_the_classes_of_each_photo_as_bars(trained_digits, photos, capfd):
    status, out, _ = command(capfd, photos / "00.png", photos / "01.png", "--model", trained_digits / "model.keras")
    assert status is None or status == 0
    scores = se_keras.predict(trained_digits / "model.keras", photos / "00.png")
    for line, score in zip(out.splitlines()[1:6], scores, strict=True):
        assert line.split()[0] == score.name
        assert line.split()[-1] == f"{score.probability:.1%}"
    assert out.count(".png") == 2


def test_command_answers_the_good_files_and_names_the_others_with_status_1(trained_digits, photos, capfd):
    status, out, err = command(capfd, photos, "--model", trained_digits / "float32.tflite", "--json", "--top", 1)
    answers = json.loads(out)
    assert (status, len(answers)) == (1, COUNT)
    assert [len(answer["scores"]) for answer in answers] == [0 if i in DAMAGED else 1 for i in range(COUNT)]
    assert answers[0]["scores"][0].keys() == {"name", "probability", "index"}
    named = [line for line in err.splitlines() if "has no answer" in line]
    assert len(named) == len(DAMAGED) and f"{DAMAGED[0]:02}.png" in named[0]


def test_command_answers_the_others_where_a_file_is_missing(trained_digits, photos, capfd):
    model = trained_digits / "float32.tflite"
    status, out, err = command(capfd, photos / "nope.png", photos / "00.png", "--model", model)
    assert status == 1 and "00.png" in out
    assert "nope.png' has no answer. No such file or directory" in err


def test_command_reads_standard_input(trained_digits, photos, capfd, monkeypatch):
    content = io.BytesIO((photos / "00.png").read_bytes())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(content))
    status, out, _ = command(capfd, "-", "--model", trained_digits / "float32.tflite", "--json")
    (answer,) = json.loads(out)
    assert not status and answer["photo"] == "-"
    best = se_keras.predict(trained_digits / "float32.tflite", photos / "00.png")[0]
    assert answer["scores"][0] == best._asdict()


REFUSED_COMMANDS = {
    "00.png": "Give one of --model FILE and --network NAME",
    "00.png --model {model} --network se_resnet50": "Give one of --model FILE and --network NAME",
    "00.png --model {model} --override": "--override is for --labels and --normalize. Received: neither",
    "00.png --network se_resnet50 --labels digits": "--labels is for --model. Received: --network",
    "00.png --model nope.tflite": "nope.tflite",
    "empty --model {model}": "has no images",
}


@pytest.mark.parametrize("arguments, message", REFUSED_COMMANDS.items(), ids=REFUSED_COMMANDS)
def test_command_refuses_in_one_line(arguments, message, trained_digits, photos, capfd, monkeypatch):
    monkeypatch.chdir(photos)
    (photos / "empty").mkdir(exist_ok=True)
    status, out, err = command(capfd, *arguments.format(model=trained_digits / "float32.tflite").split())
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1] and "Traceback" not in err


def test_classes_without_names_are_numbers_and_that_is_said(photos, tmp_path, capfd):
    model_of(8, 8, 1).save(tmp_path / "own.keras")
    status, out, err = command(capfd, photos / "00.png", "--model", tmp_path / "own.keras", "--normalize", 0, 255)
    assert not status
    assert "class 0" in out and "class 1" in out
    assert "own.keras has no names of classes: they are numbers, or --labels FILE" in err


@pytest.mark.slow
def test_module_is_the_command():
    result = subprocess.run([sys.executable, "-m", "se_keras", "--version"], capture_output=True, text=True)
    assert (result.returncode, result.stdout[:9]) == (0, "se-keras ")
