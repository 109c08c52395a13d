"""The digits, recipes, and the loop: files whole after each epoch, the same weights however it was interrupted."""

import contextlib
import errno
import json
import os
from dataclasses import FrozenInstanceError, replace

import keras
import numpy as np
import pytest
from sklearn.datasets import load_digits

import se_keras
from se_keras.training.data import Split, digits, load
from se_keras.training.fit import MODEL_FILE, RUN_FILE, fit
from se_keras.training.recipe import DIGITS, Recipe

FIGURES = {"loss", "accuracy", "val_loss", "val_accuracy"}
SHORT = replace(DIGITS, epochs=4)


@pytest.fixture(scope="module")
def data():
    return digits()


@pytest.fixture(scope="module")
def few(data):
    """256 digits to learn and 100 to be judged by: an epoch in a fraction of a second."""
    return replace(
        data,
        train=Split(images=data.train.images[:256], labels=data.train.labels[:256]),
        test=Split(images=data.test.images[:100], labels=data.test.labels[:100]),
    )


def small(name="small", classes=10, size=8):
    """A network with all that a run keeps (kernels, BatchNorm, SE), traced in a second; the same at each call."""
    keras.utils.set_random_seed(0)
    images = keras.Input((size, size, 1))
    x = keras.layers.Conv2D(8, 3, strides=2, use_bias=False)(images)
    x = keras.layers.ReLU()(keras.layers.BatchNormalization(momentum=0.9)(x))
    x = keras.layers.Flatten()(se_keras.SqueezeExcite(2)(x))
    return keras.Model(images, keras.layers.Dense(classes, activation="softmax")(x), name=name)


def digits_network():
    keras.utils.set_random_seed(0)
    return se_keras.create("se_resnet11_digits", classes=10)


def content(folder):
    """The files of a run; partial ones would show too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def epochs_on_disk(folder, few, recipe=SHORT):
    """Epochs that `model.keras` has been through, and those that `run.json` tells of."""
    model = keras.saving.load_model(folder / MODEL_FILE)
    steps = -(-len(few.train) // recipe.batch_size)
    told = {len(values) for values in json.loads((folder / RUN_FILE).read_text())["figures"].values()}
    return int(model.optimizer.iterations.numpy()) / steps, told


def assert_same_weights(a, b):
    for x, y in zip(a.weights, b.weights, strict=True):
        np.testing.assert_array_equal(x.numpy(), y.numpy(), err_msg=x.path)


# The digits


def test_digits_are_all_scans_of_scikit_learn_each_once(data):
    def rows(images, labels):
        return sorted((label, image.tobytes()) for image, label in zip(images, labels.tolist(), strict=True))

    scans = load_digits()
    expected = rows((scans.images[..., None] / 16).astype("float32"), scans.target)
    assert len(expected) == 1797
    # So the two splits are disjoint, too: together they hold no scan more often than the data set does.
    assert sorted(rows(data.train.images, data.train.labels) + rows(data.test.images, data.test.labels)) == expected


@pytest.mark.parametrize("split, samples", [("train", 1437), ("test", 360)])
def test_digits_are_float32_images_of_8x8_pixels(data, split, samples):
    images, labels = getattr(data, split).images, getattr(data, split).labels
    assert (images.shape, images.dtype) == ((samples, 8, 8, 1), "float32")
    assert (labels.shape, labels.dtype) == ((samples,), "int32")


@pytest.mark.parametrize("split", ["train", "test"])
def test_digits_fill_the_range_from_0_to_1(data, split):
    images = getattr(data, split).images
    assert (images.min(), images.max()) == (0, 1)


def test_every_digit_gives_a_fifth_of_its_scans_to_the_test(data):
    train, test = (np.bincount(split.labels, minlength=10) for split in (data.train, data.test))
    # 360 of 1,797 cannot be an exact fifth of each class: at most one scan more or less.
    assert np.abs(test - (train + test) / 5).max() < 1


def test_digits_are_the_same_each_time(data):
    again = digits()
    for split in ("train", "test"):
        np.testing.assert_array_equal(getattr(again, split).images, getattr(data, split).images)
        np.testing.assert_array_equal(getattr(again, split).labels, getattr(data, split).labels)


def test_classes_of_the_digits_are_named_after_them(data):
    assert data.classes == tuple("0123456789")


def test_split_is_as_long_as_its_images(data):
    assert (len(data.train), len(data.test)) == (1437, 360)


def test_data_are_loaded_by_name(data):
    assert load("digits").name == data.name == "digits"


def test_unknown_data_are_refused():
    with pytest.raises(ValueError, match=r"data must be one of \('digits',\). Received: 'mnist'"):
        load("mnist")


# Recipes


@pytest.mark.parametrize(
    "field, value",
    [
        ("epochs", 0),
        ("epochs", 2.5),
        ("batch_size", 0),
        ("batch_size", 1.5),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("label_smoothing", 1.0),
        ("label_smoothing", float("nan")),
        ("seed", -1),
    ],
)
def test_recipe_refuses_what_cannot_be_trained_with(field, value):
    with pytest.raises((ValueError, TypeError), match=rf"{field}.* Received: {field}={value}"):
        replace(DIGITS, **{field: value})


def test_recipe_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        DIGITS.epochs = 1


def test_recipe_names_its_source():
    with pytest.raises(TypeError, match="source"):
        Recipe(epochs=1, batch_size=32, learning_rate=0.1)


# A run


@pytest.fixture(scope="module")
def uninterrupted(few, tmp_path_factory):
    """Four epochs on a few digits: model, figures, and what was seen at each call of `progress`."""
    folder, seen = tmp_path_factory.mktemp("uninterrupted"), []

    def look(done, figures):
        on_disk = (set(content(folder)), *epochs_on_disk(folder, few)) if done else None
        seen.append({"done": done, "figures": {len(values) for values in figures.values()}, "on disk": on_disk})

    return *fit(small(), SHORT, few, folder, progress=look), seen


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Three epochs of the small SE network of the quick start: model, figures, folder."""
    folder = tmp_path_factory.mktemp("trained")
    model, figures = fit(digits_network(), replace(DIGITS, epochs=3), data, folder)
    return model, figures, folder


def test_training_raises_the_accuracy(trained):
    _, figures, _ = trained
    assert figures["accuracy"][0] < figures["accuracy"][2]
    # Chance is 0.1; logistic regression gets 0.96.
    assert figures["val_accuracy"][2] > 0.9


def test_figures_are_one_value_for_each_epoch(trained):
    _, figures, _ = trained
    assert {name: len(values) for name, values in figures.items()} == dict.fromkeys(FIGURES, 3)


def test_accuracy_told_is_that_of_the_model_returned(trained, data):
    model, figures, _ = trained
    predicted = model.predict(data.test.images, verbose=0).argmax(axis=1)
    assert figures["val_accuracy"][-1] == pytest.approx(np.mean(predicted == data.test.labels), abs=1e-6)


def test_run_json_has_the_network_the_recipe_and_the_figures(trained):
    _, figures, folder = trained
    assert json.loads((folder / RUN_FILE).read_text()) == {
        "network": "se_resnet11_digits",
        "data": "digits",
        "recipe": {
            "epochs": 3,
            "batch_size": 32,
            "learning_rate": 0.05,
            "momentum": 0.9,
            "label_smoothing": 0.1,
            "seed": 0,
            "source": DIGITS.source,
        },
        "figures": figures,
    }


def test_model_file_holds_the_model_returned(trained):
    model, _, folder = trained
    assert_same_weights(keras.saving.load_model(folder / MODEL_FILE), model)


def test_run_leaves_its_two_files_and_nothing_else(trained):
    assert set(content(trained[2])) == {MODEL_FILE, RUN_FILE}


def test_finished_run_returns_at_once(trained, data, monkeypatch):
    model, figures, folder = trained
    before, told = content(folder), []
    monkeypatch.setattr(keras.Model, "fit", lambda *_, **__: pytest.fail("A finished run was trained"))
    again, same = fit(digits_network(), replace(DIGITS, epochs=3), data, folder, progress=lambda *now: told.append(now))
    assert_same_weights(again, model)
    assert same == figures
    assert told == [(3, figures)]
    assert content(folder) == before


def test_progress_tells_the_epochs_done_from_0_on(uninterrupted):
    seen = uninterrupted[2]
    assert [now["done"] for now in seen] == [0, 1, 2, 3, 4]
    assert [now["figures"] for now in seen] == [set(), {1}, {2}, {3}, {4}]


def test_files_are_whole_after_each_epoch(uninterrupted):
    whole = [({MODEL_FILE, RUN_FILE}, epoch, {epoch}) for epoch in (1, 2, 3, 4)]
    assert [now["on disk"] for now in uninterrupted[2]] == [None, *whole]


def test_learning_rate_falls_to_zero(uninterrupted):
    assert float(uninterrupted[0].optimizer.learning_rate) == pytest.approx(0, abs=1e-8)


def test_order_of_the_images_is_the_seeds(few, tmp_path):
    runs = [fit(small(), replace(SHORT, epochs=1, seed=seed), few, tmp_path / str(seed))[1] for seed in (0, 1)]
    assert runs[0]["loss"] != runs[1]["loss"]


# Interrupted and resumed


def stop_after_epoch_2(done, figures):
    if done == 2:
        raise KeyboardInterrupt


def test_resumed_run_of_an_se_network_has_the_weights_of_an_uninterrupted_one(few, tmp_path):
    expected, figures = fit(digits_network(), SHORT, few, tmp_path / "through")
    with pytest.raises(KeyboardInterrupt):
        fit(digits_network(), SHORT, few, tmp_path / "stopped", progress=stop_after_epoch_2)
    resumed, same = fit(digits_network(), SHORT, few, tmp_path / "stopped")
    assert_same_weights(resumed, expected)
    assert same == figures


def in_place_of_call(owner, name, number, instead):
    """Context: call `number` of a method, from 1, does `instead(call)`, where `call` is what it would have done."""

    @contextlib.contextmanager
    def patched():
        original, calls = getattr(owner, name), 0

        def counted(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == number:
                return instead(lambda: original(*args, **kwargs))
            return original(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, counted)
            yield

    return patched


def killed(call):
    raise KeyboardInterrupt


def killed_at_the_end(call):
    call()
    raise KeyboardInterrupt


def disk_full(call):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


INTERRUPTIONS = {
    "during epoch 3": in_place_of_call(keras.Model, "fit", 3, killed_at_the_end),
    "between the two files of epoch 3": in_place_of_call(keras.Model, "save", 3, killed),
    "while model.keras is renamed": in_place_of_call(os, "replace", 6, killed),
    "disk full at run.json": in_place_of_call(os, "fsync", 9, disk_full),
    "disk full at model.keras": in_place_of_call(os, "fsync", 11, disk_full),
}


@pytest.mark.parametrize("interruption", INTERRUPTIONS.values(), ids=INTERRUPTIONS)
def test_run_interrupted_anywhere_has_the_weights_and_figures_of_an_uninterrupted_one(
    few, tmp_path, uninterrupted, interruption
):
    with interruption(), pytest.raises((KeyboardInterrupt, OSError)):
        fit(small(), SHORT, few, tmp_path)
    assert set(content(tmp_path)) == {MODEL_FILE, RUN_FILE}
    assert epochs_on_disk(tmp_path, few)[0] == 2
    model, figures = fit(small(), SHORT, few, tmp_path)
    assert_same_weights(model, uninterrupted[0])
    assert figures == uninterrupted[1]


def test_run_json_ahead_of_the_model_counts_up_to_the_model(few, tmp_path):
    with INTERRUPTIONS["between the two files of epoch 3"](), pytest.raises(KeyboardInterrupt):
        fit(small(), SHORT, few, tmp_path)
    assert epochs_on_disk(tmp_path, few) == (2, {3})
    told = []
    with pytest.raises(KeyboardInterrupt):

        def first(done, figures):
            told.append((done, {name: len(values) for name, values in figures.items()}))
            raise KeyboardInterrupt

        fit(small(), SHORT, few, tmp_path, progress=first)
    assert told == [(2, dict.fromkeys(FIGURES, 2))]


def test_run_killed_before_its_first_model_starts_over(few, tmp_path, uninterrupted):
    with in_place_of_call(keras.Model, "save", 1, killed)(), pytest.raises(KeyboardInterrupt):
        fit(small(), SHORT, few, tmp_path)
    assert set(content(tmp_path)) == {RUN_FILE}
    model, figures = fit(small(), SHORT, few, tmp_path)
    assert_same_weights(model, uninterrupted[0])
    assert figures == uninterrupted[1]


# Refusals


@pytest.fixture(scope="module")
def stopped(few, tmp_path_factory):
    """The two files of a run that was stopped after two of four epochs."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(KeyboardInterrupt):
        fit(small(), SHORT, few, folder, progress=stop_after_epoch_2)
    return content(folder)


@pytest.fixture
def folder(stopped, tmp_path):
    for name, file in stopped.items():
        (tmp_path / name).write_bytes(file)
    return tmp_path


@pytest.mark.parametrize(
    "model, recipe, name, differing",
    [
        ("other", {}, "digits", "its network differ"),
        ("small", {"learning_rate": 0.1}, "digits", "its recipe differ"),
        ("small", {"epochs": 5}, "digits", "its recipe differ"),
        ("small", {}, "others", "its data differ"),
        ("other", {"seed": 1}, "digits", "its network and recipe differ"),
    ],
)
def test_folder_of_another_run_is_refused_and_left_alone(few, folder, stopped, model, recipe, name, differing):
    with pytest.raises(ValueError, match=f"holds another run: {differing}.* Take a new folder"):
        fit(small(model), replace(SHORT, **recipe), replace(few, name=name), folder)
    assert content(folder) == stopped


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def uncompiled(path):
    model = keras.saving.load_model(path, compile=False)
    model.save(path)


DAMAGES = {
    "model.keras truncated": (MODEL_FILE, cut),
    "model.keras empty": (MODEL_FILE, lambda path: path.write_bytes(b"")),
    "model.keras without its optimizer": (MODEL_FILE, uncompiled),
    "run.json truncated": (RUN_FILE, cut),
    "run.json empty": (RUN_FILE, lambda path: path.write_bytes(b"")),
    "run.json not of a run": (RUN_FILE, lambda path: path.write_text("[1, 2]")),
    "run.json missing": (RUN_FILE, lambda path: path.unlink()),
}


@pytest.mark.parametrize("file, damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_run_is_refused_in_one_line_and_left_alone(few, folder, file, damage):
    damage(folder / file)
    before = content(folder)
    with pytest.raises(ValueError, match="holds no run that can be resumed: .+") as error:
        fit(small(), SHORT, few, folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)
    assert content(folder) == before


@pytest.mark.parametrize(
    "model",
    [
        lambda: small(classes=11),
        lambda: small(size=9),
        lambda: se_keras.create("se_resnet11_digits", include_top=False, input_shape=(8, 8, 1)),
    ],
    ids=["11 classes", "9x9 images", "no classifier"],
)
def test_model_that_does_not_fit_the_data_is_refused_before_anything_is_written(few, tmp_path, model):
    with pytest.raises(ValueError, match=r"digits has images of \(8, 8, 1\) in 10 classes. Received: .+ from .+ to "):
        fit(model(), SHORT, few, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nan_images_stop_the_first_epoch_with_nothing_saved(few, tmp_path):
    images = few.train.images.copy()
    images[7] = np.nan
    poisoned = replace(few, train=replace(few.train, images=images))
    with pytest.raises(ValueError, match="The loss is nan in epoch 1: nothing was saved"):
        fit(small(), SHORT, poisoned, tmp_path)
    assert content(tmp_path) == {}


def test_far_too_high_a_learning_rate_stops_the_run(few, tmp_path):
    with pytest.raises(ValueError, match="The loss is (nan|inf) in epoch .+ Lower the learning rate"):
        fit(small(), replace(SHORT, learning_rate=1e38), few, tmp_path)


def test_loss_that_is_no_longer_finite_leaves_the_last_good_epoch_and_names_it(few, tmp_path):
    images, good = few.train.images.copy(), []

    def poison_after_epoch_2(done, figures):
        if done == 2:
            good.append(content(tmp_path))
            images[:] = np.nan

    poisoned = replace(few, train=replace(few.train, images=images))
    with pytest.raises(ValueError, match=f"The loss is nan in epoch 3: '{tmp_path / MODEL_FILE}' holds epoch 2"):
        fit(small(), SHORT, poisoned, tmp_path, progress=poison_after_epoch_2)
    assert content(tmp_path) == good[0]


def test_epoch_whose_last_step_ruined_the_weights_is_not_saved(few, tmp_path):
    # One step an epoch: its loss is that of the weights before the step, and finite.
    images = keras.Input((8, 8, 1))
    softmax = keras.layers.Dense(10, activation="softmax")(keras.layers.Flatten()(images))
    recipe = replace(SHORT, batch_size=len(few.train), learning_rate=1e38)
    with pytest.raises(ValueError, match="loss is (nan|inf) in epoch 1: nothing was saved"):
        fit(keras.Model(images, softmax), recipe, few, tmp_path)
    assert content(tmp_path) == {}


@pytest.fixture(params=["under a file", "/proc"])
def unwritable(request, tmp_path):
    if request.param == "/proc":
        return "/proc/run"
    (tmp_path / "file").touch()
    return tmp_path / "file" / "run"


def test_folder_that_cannot_be_written_is_an_os_error(few, unwritable):
    with pytest.raises(OSError):
        fit(small(), replace(SHORT, epochs=1), few, unwritable)


def test_folder_that_cannot_be_written_is_told_before_the_first_epoch(few, unwritable, monkeypatch):
    monkeypatch.setattr(keras.Model, "fit", lambda *_, **__: pytest.fail("An epoch was trained in vain"))
    with pytest.raises(OSError):
        fit(small(), SHORT, few, unwritable)
