"""Evaluation: shares and intervals against independent computations, the paper's views, and invalid arguments."""

import csv
from dataclasses import replace
from typing import get_args

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.metrics import confusion_matrix, top_k_accuracy_score

from se_keras.evaluation import PROTOCOLS, ProtocolName, Share, evaluate, write_confusion
from se_keras.export import to_litert, to_savedmodel
from se_keras.training.data import Arrays, digits, folder


@pytest.fixture(scope="module")
def data():
    return digits()


@pytest.fixture(scope="module")
def model(data):
    """A small network of one epoch, so that it has some errors."""
    keras.utils.set_random_seed(0)
    images = keras.Input((8, 8, 1), name="images")
    x = keras.layers.Flatten()(keras.layers.Conv2D(8, 3, activation="relu")(images))
    model = keras.Model(images, keras.layers.Dense(10, activation="softmax")(x), name="small")
    model.compile(keras.optimizers.SGD(0.05), "sparse_categorical_crossentropy")
    model.fit(data.train.images, data.train.labels, verbose=0)
    return model


@pytest.fixture(scope="module")
def found(model, data):
    return evaluate(model, data.test, data)


# Counts


def test_accuracies_and_confusion_are_scikit_learns(model, data, found):
    probabilities, labels = model.predict(data.test.images, verbose=0), data.test.labels
    assert found.images == 360
    assert 0.5 < found.top1.value < 0.99
    assert found.top1.value == top_k_accuracy_score(labels, probabilities, k=1)
    assert found.top5.value == top_k_accuracy_score(labels, probabilities, k=5)
    np.testing.assert_array_equal(found.confusion, confusion_matrix(labels, probabilities.argmax(axis=1)))


# Newcombe 1998, "Two-sided confidence intervals for the single proportion", Table I, method 3: to four digits.
@pytest.mark.parametrize(
    "count, total, low, high",
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (29, 29, 0.8830, 1.0)],
)
def test_interval_is_wilsons(count, total, low, high):
    share = Share.of(count, total)
    assert (share.low, share.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_every_kind_of_model_gives_the_same(model, data, found, tmp_path):
    model.save(tmp_path / "model.keras")
    to_litert(model).save(tmp_path / "model.tflite")
    to_savedmodel(model, tmp_path / "served")
    for path in ("model.keras", "model.tflite", "served"):
        np.testing.assert_array_equal(evaluate(tmp_path / path, data.test, data).confusion, found.confusion)


def test_logits_are_judged_as_probabilities_are(model, data, found):
    logits = keras.models.clone_model(model)
    logits.layers[-1].activation = keras.activations.linear
    logits = keras.Model(logits.inputs, logits.layers[-1](logits.layers[-2].output))
    logits.set_weights(model.get_weights())
    np.testing.assert_array_equal(evaluate(logits, data.test, data).confusion, found.confusion)


def test_ensemble_averages_probabilities(model, data):
    other = keras.models.clone_model(model)
    other.set_weights([w + np.random.default_rng(0).normal(0, 0.1, w.shape) for w in model.get_weights()])
    mean = np.mean([x.predict(data.test.images, verbose=0) for x in (model, other)], axis=0)
    expected = confusion_matrix(data.test.labels, mean.argmax(axis=1))
    np.testing.assert_array_equal(evaluate([model, other], data.test, data).confusion, expected)


def test_progress_is_told_some_ten_times(model, data):
    messages = []
    evaluate(model, data.test, data, progress=messages.append)
    assert 5 <= len(messages) <= 11
    assert messages[-1] == "evaluating: 360 of 360 images"


# Views


@pytest.fixture
def pixels():
    """Each pixel is its row, its column, and one."""
    rows, columns = np.meshgrid(np.arange(64.0), np.arange(96.0), indexing="ij")
    return tf.constant(np.stack([rows, columns, rows * 0 + 1], axis=-1), "float32")


def views(name, pixels, size=56):
    protocol = PROTOCOLS[name]
    return [protocol.views(pixels, (size, size), scale).numpy() for scale in protocol.scales]


def test_names_of_the_protocols_are_those_of_their_type():
    assert get_args(ProtocolName) == tuple(PROTOCOLS)


@pytest.mark.parametrize(
    "name, count", [("plain", 1), ("224", 1), ("299", 1), ("320", 1), ("ten_crop", 10), ("multi_scale", 8),
                    ("multi_crop", 144)]
)  # fmt: skip
def test_protocol_has_its_number_of_views(name, count, pixels):
    found = np.concatenate(views(name, pixels))
    assert found.shape == (count, 56, 56, 3)
    np.testing.assert_allclose(found[..., 2], 1, atol=1e-5)  # nothing from outside of the image


def test_ten_crops_are_the_corners_and_the_middle_and_their_mirror_images(pixels):
    # The shorter side is 64 already: 56 * 256/224.
    (found,) = views("ten_crop", pixels)
    corners = [tuple(view[0, 0, :2]) for view in found[:5]]
    assert corners == [(0, 0), (0, 40), (8, 0), (8, 40), (4, 20)]
    np.testing.assert_array_equal(found[5:], found[:5, :, ::-1])


@pytest.mark.parametrize("name, shorter", [("224", 256), ("299", 352)])
def test_single_crop_is_the_middle_of_the_papers_size(name, shorter):
    size = PROTOCOLS[name].size
    edge = np.zeros((shorter, shorter + 30, 1), "float32")
    top, left = (shorter - size) // 2, (shorter + 30 - size) // 2
    edge[top : top + size, left : left + size] = 1
    (found,) = views(name, tf.constant(edge), size=size)
    np.testing.assert_array_equal(found, 1)


@pytest.mark.slow
def test_photographs_are_judged_at_the_size_of_the_model(tmp_path):
    for number in range(20):
        path = tmp_path / f"class{number % 2}" / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        value = 255 * (number % 2)  # black or white
        keras.utils.save_img(path, np.full((40, 60, 3), value, "uint8"), scale=False)
    data = folder(tmp_path)
    images = keras.Input((24, 24, 3))
    dense = keras.layers.Dense(2)
    bright = keras.Model(images, dense(keras.layers.GlobalAveragePooling2D()(images)), name="bright")
    dense.set_weights([np.array([[-1.0, 1.0]] * 3), np.zeros(2)])
    for name in ("ten_crop", "multi_scale", "multi_crop"):
        assert evaluate(bright, data.train, data, protocol=name).top1.value == 1


def test_image_that_would_be_scaled_to_gigabytes_is_refused():
    with pytest.raises(tf.errors.InvalidArgumentError, match="the scaled image has too many pixels"):
        PROTOCOLS["ten_crop"].views(tf.zeros((1, 10000, 3)), (224, 224), 256 / 224)


# Invalid arguments


def test_unknown_protocol_is_refused(model, data):
    with pytest.raises(ValueError, match="protocol must be one of plain, 224, .+ Received: 'centre'"):
        evaluate(model, data.test, data, protocol="centre")


def test_no_models_and_no_images_are_refused(model, data):
    with pytest.raises(ValueError, match="At least one model and one image are needed. Received: 0 models, 360 images"):
        evaluate([], data.test, data)
    none = Arrays(images=data.test.images[:0], labels=data.test.labels[:0])
    with pytest.raises(ValueError, match="Received: 1 model, 0 images"):
        evaluate(model, none, data)


def test_model_of_another_size_than_the_protocols_is_refused(model, data):
    with pytest.raises(ValueError, match="'224' and the other models need images of 224x224. .+ small, .+ 8x8"):
        evaluate(model, data.test, data, protocol="224")


def test_model_of_other_channels_is_refused(data):
    images = keras.Input((8, 8, 3))
    color = keras.Model(images, keras.layers.Dense(10)(keras.layers.Flatten()(images)), name="color")
    with pytest.raises(ValueError, match="digits has 1 channels. Received: color of 3"):
        evaluate(color, data.test, data)


def test_model_of_other_classes_is_refused(model, data):
    nine = keras.Model(model.inputs, keras.layers.Dense(9)(model.layers[-2].output), name="nine")
    with pytest.raises(ValueError, match=r"A model must have one output of 10 classes. Received: nine .+ \[\(9,\)\]"):
        evaluate(nine, data.test, data)


def test_outputs_that_are_not_finite_are_refused(model, data):
    broken = keras.models.clone_model(model)
    broken.set_weights([w * np.nan for w in model.get_weights()])
    with pytest.raises(ValueError, match="The outputs of small are not finite"):
        evaluate(broken, data.test, data)


# The confusion matrix as a file


def test_confusion_is_written_as_a_table(found, data, tmp_path):
    write_confusion(tmp_path / "confusion.csv", found, data.classes)
    rows = list(csv.reader((tmp_path / "confusion.csv").read_text().splitlines()))
    assert rows[0] == ["", *data.classes] and [row[0] for row in rows[1:]] == list(data.classes)
    np.testing.assert_array_equal(np.array([row[1:] for row in rows[1:]], int), found.confusion)


@pytest.mark.parametrize("classes", [10, 100])
def test_confusion_is_drawn(found, tmp_path, classes):
    drawn = replace(found, confusion=np.eye(classes, dtype="int64"))
    write_confusion(tmp_path / "confusion.png", drawn, [f"class {i}" for i in range(classes)])
    pixels = tf.io.decode_png((tmp_path / "confusion.png").read_bytes()).numpy()[..., :3]
    # The darkest blue on the diagonal.
    assert (np.abs(pixels.astype(int) - (8, 48, 107)).max(axis=-1) < 3).sum() > 1000


def test_other_kinds_of_files_are_refused(found, data, tmp_path):
    with pytest.raises(ValueError, match="A confusion matrix is written as .csv, .png or .svg. Received: .+c.gif"):
        write_confusion(tmp_path / "c.gif", found, data.classes)
    assert list(tmp_path.iterdir()) == []
