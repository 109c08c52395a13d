"""The loop: the files after each epoch and after every kind of interruption, and that training resumes from them."""

import contextlib
import csv
import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import keras
import numpy as np
import pytest

import se_keras
from se_keras.runs import MODEL_FILE, RUN_FILE
from se_keras.training import Execution, Preempted, checkpoint, fit, record, stopping
from se_keras.training.data import Arrays, Files, SkippedFiles, digits, folder
from se_keras.training.recipes import DIGITS, Augmentation
from se_keras.training.stopping import EXIT_SAVED

FIGURES = ("loss", "accuracy", "val_loss", "val_accuracy", "val_top5", "learning_rate")
FILES = {MODEL_FILE, RUN_FILE, checkpoint.FILE, record.CSV, record.EVENTS, *record.CURVES}
SHORT = replace(DIGITS, epochs=3)  # of 8 steps
STEPS = 8


@pytest.fixture(scope="module")
def data():
    return digits()


@pytest.fixture(scope="module")
def few(data):
    """256 digits to train on and 100 to evaluate on: an epoch takes a fraction of a second."""
    return replace(
        data,
        train=Arrays(images=data.train.images[:256], labels=data.train.labels[:256]),
        test=Arrays(images=data.test.images[:100], labels=data.test.labels[:100]),
    )


def small(name="small", classes=10, size=8, dropout=0.1):
    """A network with every kind of state: kernels, BatchNorm, SE, and dropout's seed; the same at each call."""
    keras.utils.set_random_seed(0)
    images = keras.Input((size, size, 1))
    x = keras.layers.Conv2D(8, 3, strides=2, use_bias=False)(images)
    x = keras.layers.ReLU()(keras.layers.BatchNormalization(momentum=0.9)(x))
    x = keras.layers.Dropout(dropout)(keras.layers.Flatten()(se_keras.SqueezeExcite(2)(x)))
    return keras.Model(images, keras.layers.Dense(classes, activation="softmax")(x), name=name)


def content(folder):
    """The files of a run except TensorBoard's and its lock; partial ones would be here too."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


def assert_same_weights(a, b):
    for x, y in zip(a.weights, b.weights, strict=True):
        np.testing.assert_array_equal(x.numpy(), y.numpy(), err_msg=x.path)


class Stop(Exception):
    """Ends a run from within."""


def stopping_at(epoch, step, how):
    """A `progress` that does `how()` when a run gets there."""

    def progress(now):
        if (now.epoch, now.step) == (epoch, step):
            how()

    return progress


def end():
    raise Stop


# A run


@pytest.fixture(scope="module")
def uninterrupted(few, tmp_path_factory):
    """Three epochs on a few digits: model, figures, folder, and each `Progress`."""
    folder, reports = tmp_path_factory.mktemp("uninterrupted"), []
    return *fit(small(), SHORT, few, folder, progress=reports.append), folder, reports


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Three epochs of the small SE network of the quick start: model, figures, folder."""
    folder = tmp_path_factory.mktemp("trained")
    keras.utils.set_random_seed(0)
    model, figures = fit(se_keras.create("se_resnet11_digits", classes=10), replace(DIGITS, epochs=3), data, folder)
    return model, figures, folder


def test_training_raises_the_accuracy(trained):
    _, figures, _ = trained
    assert figures["accuracy"][0] < figures["accuracy"][2]
    # A random guess has 0.1; logistic regression has 0.96.
    assert figures["val_accuracy"][2] > 0.9


def test_figures_are_one_value_for_each_epoch(trained):
    assert {name: len(values) for name, values in trained[1].items()} == dict.fromkeys(FIGURES, 3)


def test_figures_of_the_test_are_those_of_the_model_returned(trained, data):
    model, figures, _ = trained
    predicted = model.predict(data.test.images, verbose=0)
    ranks = (predicted > predicted[np.arange(360), data.test.labels][:, None]).sum(axis=1)
    loss = keras.losses.CategoricalCrossentropy(label_smoothing=DIGITS.label_smoothing)
    assert figures["val_accuracy"][-1] == np.mean(ranks == 0)
    assert figures["val_top5"][-1] == np.mean(ranks < 5)
    assert figures["val_loss"][-1] == pytest.approx(float(loss(np.eye(10)[data.test.labels], predicted)), rel=1e-5)


def test_run_json_has_the_network_the_data_the_recipe_and_what_made_it(trained):
    _, figures, folder = trained
    run = json.loads((folder / RUN_FILE).read_text())
    made_with = run.pop("made_with")
    assert run == {
        "network": "se_resnet11_digits",
        "input_shape": [8, 8, 1],
        "data": "digits",
        "training_images": 1437,
        "classes": [str(digit) for digit in range(10)],
        "normalization": {"mean": [0.0], "std": [1.0]},
        "recipe": json.loads(json.dumps(asdict(replace(DIGITS, epochs=3)))),
        "pixels": {"mean": [0.0], "std": [255.0]},  # in files: the digits' own are in 0 to 1
        "source": "digits",
        "strategy": "none",
        "replicas": 1,
        "execution": asdict(Execution()),
        "figures": figures,
        "corrupt": [],
    }
    assert made_with["versions"]["keras"] == keras.version()
    assert len(made_with["source_sha256"]) == 64


def test_model_file_holds_the_model_returned(trained):
    model, _, folder = trained
    assert_same_weights(keras.saving.load_model(folder / MODEL_FILE), model)


def test_history_has_the_figures_of_each_epoch(trained):
    _, figures, folder = trained
    rows = list(csv.DictReader((folder / record.CSV).read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert {name: [float(row[name]) for row in rows] for name in FIGURES} == figures


def test_run_leaves_its_files_and_nothing_else(trained):
    assert {path.name for path in trained[2].iterdir()} == FILES


def test_finished_run_returns_at_once(trained, data, monkeypatch):
    model, figures, folder = trained
    before = content(folder)
    monkeypatch.setattr(
        "se_keras.training.step.Trainer.train", lambda *_, **__: pytest.fail("A finished run was trained")
    )
    again, same = fit(se_keras.create("se_resnet11_digits", classes=10), replace(DIGITS, epochs=3), data, folder)
    assert_same_weights(again, model)
    assert same == figures
    assert content(folder) == before


def test_progress_tells_each_step_and_each_epoch(uninterrupted):
    reports = uninterrupted[3]
    steps = [(0, 0), *((epoch, step) for epoch in range(3) for step in range(1, STEPS + 1))]
    ends = [(epoch, 0) for epoch in (1, 2, 3)]
    assert sorted((now.epoch, now.step) for now in reports) == sorted(steps + ends)
    assert {(now.epochs, now.steps) for now in reports} == {(3, STEPS)}
    assert reports[-1].figures == uninterrupted[1]


@pytest.mark.slow
def test_callbacks_of_keras_hear_of_epochs_and_batches(few, tmp_path):
    calls = []

    class Listener(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            calls.append((epoch, sorted(logs)))
            self.model.stop_training = epoch == 1

        def on_train_batch_end(self, batch, logs=None):
            calls.append(batch)

    _, figures = fit(small(), SHORT, few, tmp_path, callbacks=[Listener()])
    assert calls == [*range(STEPS), (0, sorted(FIGURES)), *range(STEPS), (1, sorted(FIGURES))]
    assert len(figures["loss"]) == 2


def test_learning_rate_falls_to_zero(uninterrupted):
    rates = uninterrupted[1]["learning_rate"]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-8)


@pytest.mark.slow
def test_learning_rate_falls_on_a_plateau(few, tmp_path):
    # Nothing is learned, so no epoch is better than the one before: the rate falls after each.
    recipe = replace(SHORT, schedule="plateau", patience=1, learning_rate=1e-30, decay=0.5)
    _, figures = fit(small(), recipe, few, tmp_path)
    assert figures["learning_rate"] == pytest.approx([1e-30, 1e-30, 0.5e-30])


@pytest.mark.slow
def test_order_of_the_images_is_the_seeds(few, tmp_path):
    runs = [fit(small(), replace(SHORT, epochs=1, seed=seed), few, tmp_path / str(seed))[1] for seed in (0, 1)]
    assert runs[0]["loss"] != runs[1]["loss"]


@pytest.mark.slow
def test_weights_are_averaged_where_the_recipe_says_so(few, tmp_path):
    recipe = replace(SHORT, ema=0.5)
    model, figures = fit(small(), recipe, few, tmp_path)
    predicted = model.predict(few.test.images, verbose=0).argmax(axis=1)
    assert figures["val_accuracy"][-1] == np.mean(predicted == few.test.labels)
    assert_same_weights(keras.saving.load_model(tmp_path / MODEL_FILE), model)
    tensors, _ = checkpoint.load_checkpoint(tmp_path / checkpoint.FILE)
    kernel = next(values for name, values in tensors.items() if name.endswith("kernel"))
    assert not np.array_equal(kernel, model.layers[1].kernel.numpy())  # the checkpoint has the other ones


@pytest.mark.slow
def test_batch_norm_is_frozen_in_the_last_epochs(few, tmp_path):
    seen = []

    class Look(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            norm = self.model.layers[2]
            seen.append(np.concatenate([w.numpy() for w in norm.weights]))

    model, _ = fit(small(), replace(SHORT, frozen_batch_norm_epochs=1), few, tmp_path, callbacks=[Look()])
    assert not np.array_equal(seen[0], seen[1])
    np.testing.assert_array_equal(seen[1], seen[2])
    assert model.layers[2].trainable


@pytest.mark.slow
def test_gradients_of_parts_are_those_of_the_whole_batch(few, tmp_path):
    def without_batch_norm():
        keras.utils.set_random_seed(0)
        images = keras.Input((8, 8, 1))
        x = keras.layers.Flatten()(keras.layers.Conv2D(4, 3, activation="relu")(images))
        return keras.Model(images, keras.layers.Dense(10, activation="softmax")(x), name="plain")

    runs = [
        fit(without_batch_norm(), replace(SHORT, weight_decay=1e-2), few, tmp_path / str(parts),
            execution=Execution(accumulate=parts))[0]
        for parts in (1, 4)
    ]  # fmt: skip
    for x, y in zip(*(model.get_weights() for model in runs), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)  # sums in another order


def test_weight_decay_draws_kernels_to_zero_and_nothing_else(few, tmp_path):
    images = np.zeros_like(few.train.images)  # no gradient but the decay's reaches the kernel
    blank = replace(few, train=replace(few.train, images=images))
    recipe = replace(SHORT, epochs=1, momentum=0.0, weight_decay=0.1, learning_rate=0.1, schedule="plateau")
    images = keras.Input((8, 8, 1))
    model = keras.Model(images, keras.layers.Dense(10, activation="softmax")(keras.layers.Flatten()(images)))
    before = model.get_weights()[0]
    fitted, _ = fit(model, recipe, blank, tmp_path)
    np.testing.assert_allclose(fitted.get_weights()[0], before * (1 - 0.1 * 0.1) ** STEPS, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"steps_per_execution": 3}, {"jit_compile": True}], ids=lambda how: [*how][0])
def test_execution_changes_nothing_but_rounding(few, tmp_path, how):
    # Without dropout, whose masks XLA draws by another generator.
    runs = [
        fit(small(dropout=0.0), SHORT, few, tmp_path / name, execution=execution)[1]
        for name, execution in (("plain", Execution()), ("other", Execution(**how)))
    ]
    for name in FIGURES:
        np.testing.assert_allclose(runs[0][name], runs[1][name], rtol=1e-4, err_msg=name)


@pytest.mark.slow
def test_mixed_precision_trains_with_a_scaled_loss(few, tmp_path, mixed_float16):
    model, figures = fit(small(), SHORT, few, tmp_path)
    assert model.layers[1].compute_dtype == "float16"
    assert figures["val_loss"][-1] < figures["val_loss"][0]


# Interrupted and resumed


@pytest.mark.slow
@pytest.mark.parametrize("epoch, step", [(1, 0), (1, 3), (2, STEPS)])
@pytest.mark.parametrize("number, error", [(signal.SIGTERM, Preempted), (signal.SIGINT, KeyboardInterrupt)])
def test_run_that_a_signal_ended_goes_on_to_the_same_weights(few, tmp_path, uninterrupted, epoch, step, number, error):
    def sent():
        os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    with pytest.raises(error, match=f"holds epoch {3 if step == STEPS else epoch}") as ended:
        fit(small(), SHORT, few, tmp_path, progress=stopping_at(epoch, step, sent))
    assert signal.getsignal(number) == handler
    if error is Preempted:
        assert ended.value.code == EXIT_SAVED
    model, figures = fit(small(), SHORT, few, tmp_path)
    assert_same_weights(model, uninterrupted[0])
    assert figures == uninterrupted[1]


@pytest.mark.slow
def test_run_with_averages_and_chance_goes_on_to_the_same_weights(few, tmp_path):
    augmentation = Augmentation(crop="pad", padding=1, flip=True, mixup=0.2)
    recipe = replace(SHORT, ema=0.9, weight_decay=1e-4, augmentation=augmentation, sampling="balanced")
    expected, figures = fit(small(), recipe, few, tmp_path / "through")
    how = {"execution": Execution(checkpoint_steps=3)}
    with pytest.raises(Stop):
        fit(small(), recipe, few, tmp_path / "ended", progress=stopping_at(1, 7, end), **how)
    assert checkpoint.position(tmp_path / "ended" / checkpoint.FILE) == (1, 6)
    model, same = fit(small(), recipe, few, tmp_path / "ended", **how)
    assert_same_weights(model, expected)
    assert same == figures


def in_place_of_call(owner, name, number, instead):
    """Context: call `number` of a function, from 1, does `instead(call)`, where `call` is what it would have done."""

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
    raise Stop


def disk_full(call):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


INTERRUPTIONS = {
    "before the model of epoch 2": in_place_of_call(keras.Model, "save", 2, killed),
    "before the history of epoch 2": in_place_of_call(record, "write_csv", 2, killed),
    "before the checkpoint of epoch 2": in_place_of_call(checkpoint, "save_checkpoint", 2, killed),
    "disk full at the checkpoint of epoch 2": in_place_of_call(checkpoint, "save_checkpoint", 2, disk_full),
    "disk full at the model of epoch 2": in_place_of_call(keras.Model, "save", 2, disk_full),
}


@pytest.mark.slow
@pytest.mark.parametrize("interruption", INTERRUPTIONS.values(), ids=INTERRUPTIONS)
def test_run_killed_anywhere_goes_on_from_its_last_checkpoint(few, tmp_path, uninterrupted, interruption):
    with interruption(), pytest.raises((Stop, OSError)):
        fit(small(), SHORT, few, tmp_path)
    assert checkpoint.position(tmp_path / checkpoint.FILE) == (1, 0)
    model, figures = fit(small(), SHORT, few, tmp_path)
    assert_same_weights(model, uninterrupted[0])
    assert figures == uninterrupted[1]
    assert {path.name for path in tmp_path.iterdir()} == FILES


def test_what_a_killed_process_left_half_written_goes(few, tmp_path):
    (tmp_path / f".{checkpoint.FILE}.partial-abc").write_bytes(b"half")
    (tmp_path / ".model.keras.partial-def").mkdir()
    fit(small(), replace(SHORT, epochs=1), few, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES


@pytest.mark.slow
def test_second_training_in_a_folder_is_refused_while_the_first_one_runs(few, tmp_path, uninterrupted):
    refused = []

    def train_again(now):
        if (now.epoch, now.step) in ((0, 0), (1, 1)):
            match = f"One process at a time .+ Received: '{tmp_path}/.lock', held by process {os.getpid()}"
            with pytest.raises(BlockingIOError, match=match):
                fit(small(), SHORT, few, tmp_path)
            refused.append(now)

    model, figures = fit(small(), SHORT, few, tmp_path, progress=train_again)
    assert len(refused) == 2
    assert_same_weights(model, uninterrupted[0])
    assert figures == uninterrupted[1]
    assert {path.name for path in tmp_path.iterdir()} == FILES


# A mutex that is locked twice waits for ever, and no signal wakes it: as a call of TensorFlow's to a lost machine.
# A shell lets programs in the background ignore Ctrl-C, and those that they start: it is heeded here.
WAITING = """
import ctypes, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, sys.argv[1])
import stopping
stopping._PATIENCE = 0.3
mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
with stopping.stop_requests():
    print(flush=True)
    time.sleep(60 if sys.argv[2] == "Python" else 0.2)
    libc.pthread_mutex_lock(mutex), libc.pthread_mutex_lock(mutex)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["Python", "native code"])
def test_second_signal_ends_the_process_wherever_it_waits(where, number):
    folder = str(Path(stopping.__file__).parent)
    command = [sys.executable, "-c", WAITING, folder, where]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "\n"
        time.sleep(0.4)
        process.send_signal(number)
        time.sleep(0.5)
        assert process.poll() is None  # one is a request
        process.send_signal(number)
        try:
            _, stderr = process.communicate(timeout=30)
        finally:
            process.kill()  # or a process that still waits would keep the tests waiting
    assert process.returncode == (-number if where == "Python" else 128 + number)
    assert ("ended by two signals" in stderr) is (where != "Python")


# Invalid arguments


@pytest.fixture(scope="module")
def stopped(few, tmp_path_factory):
    """The files of a run that ended in its second epoch."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Stop):
        fit(small(), SHORT, few, folder, progress=stopping_at(1, 1, end))
    return content(folder)


@pytest.fixture
def run(stopped, tmp_path):
    for name, file in stopped.items():
        (tmp_path / name).write_bytes(file)
    return tmp_path


@pytest.mark.parametrize(
    "argument, value",
    [("model", 5), ("recipe", "digits"), ("data", "digits"), ("execution", "x"), ("strategy", np.ones(2))],
)
def test_argument_of_another_type_is_refused_before_anything_is_written(few, tmp_path, argument, value):
    arguments = {"model": small(), "recipe": SHORT, "data": few} | {argument: value}
    match = f"{argument} must be of the type .+ Received: {type(value).__name__}$"
    with pytest.raises(TypeError, match=match):
        fit(folder=tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "model, recipe, name, differing",
    [
        ("other", {}, "digits", "network 'small', now 'other'\\."),
        ("small", {"learning_rate": 0.1}, "digits", "learning_rate .*, now 0.1\\."),
        ("small", {"epochs": 5}, "digits", "epochs .*, now 5\\."),
        ("small", {}, "others", "data 'digits', now 'others'\\."),
        ("other", {"seed": 1}, "digits", "network 'small', now 'other'; seed .*, now 1\\."),
    ],
)
def test_folder_of_another_run_is_refused_and_left_alone(few, run, stopped, model, recipe, name, differing):
    with pytest.raises(ValueError, match=f"holds another run: {differing}.* Take a new folder"):
        fit(small(model), replace(SHORT, **recipe), replace(few, name=name), run)
    assert content(run) == stopped


def test_checkpoint_of_another_network_of_that_name_is_refused(few, run, stopped):
    images = keras.Input((8, 8, 1))
    softmax = keras.layers.Dense(10, activation="softmax")(keras.layers.Flatten()(images))
    other = keras.Model(images, softmax, name="small")
    with pytest.raises(ValueError, match="is of another network or optimizer than small: .+ values differ, model/0"):
        fit(other, SHORT, few, run)
    assert content(run) == stopped


def test_model_without_its_checkpoint_is_not_trained_over(few, run, stopped):
    (run / checkpoint.FILE).unlink()
    with pytest.raises(ValueError, match=r"has a model.keras and no checkpoint.safetensors to resume from"):
        fit(small(), SHORT, few, run)
    assert content(run) == {name: file for name, file in stopped.items() if name != checkpoint.FILE}


def cut(file):
    return file[:-100]


def flipped(file):
    return file[:-50] + bytes([file[-50] ^ 1]) + file[-49:]


@pytest.mark.parametrize("damage", [cut, flipped, lambda _: b"", lambda _: b"{}" * 99], ids=["cut", "flip", "", "text"])
def test_damaged_checkpoint_is_refused_in_one_line_and_left_alone(few, run, damage):
    path = run / checkpoint.FILE
    path.write_bytes(damage(path.read_bytes()))
    before = content(run)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint|is damaged, or not a checkpoint") as error:
        fit(small(), SHORT, few, run)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert content(run) == before


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


@pytest.mark.parametrize(
    "recipe, execution, message",
    [
        ({"batch_size": 257}, {}, "at most the 256 training images of digits. Received: batch_size=257"),
        ({}, {"accumulate": 5}, "accumulate must divide a replica's batch of 32. Received: accumulate=5"),
    ],
)
def test_batch_that_cannot_be_made_is_refused(few, tmp_path, recipe, execution, message):
    with pytest.raises(ValueError, match=message):
        fit(small(), replace(SHORT, **recipe), few, tmp_path, execution=Execution(**execution))
    assert content(tmp_path) == {}


@pytest.mark.parametrize("field", ["steps_per_execution", "accumulate", "checkpoint_steps", "corrupt_budget"])
@pytest.mark.parametrize("value", [-1, 1.5])
def test_execution_refuses_what_cannot_be_done(field, value):
    with pytest.raises(ValueError, match=rf"{field} must be an int of at least [01]. Received: {field}={value}"):
        Execution(**{field: value})


def with_images(few, images):
    return replace(few, train=replace(few.train, images=images))


def test_nan_images_stop_the_first_epoch_with_nothing_saved(few, tmp_path):
    images = few.train.images.copy()
    images[7] = np.nan
    with pytest.raises(ValueError, match="The loss is nan in epoch 1: nothing was saved"):
        fit(small(), SHORT, with_images(few, images), tmp_path)
    assert content(tmp_path) == {}


def test_far_too_high_a_learning_rate_stops_the_run(few, tmp_path):
    with pytest.raises(ValueError, match="The (val_)?loss is (nan|inf) in epoch .+ Lower the learning rate"):
        fit(small(), replace(SHORT, learning_rate=1e38), few, tmp_path)


@pytest.mark.slow
def test_loss_that_is_no_longer_finite_leaves_the_last_good_checkpoint_and_names_it(few, tmp_path):
    images, good = few.train.images.copy(), []

    def poison():
        good.append(content(tmp_path))
        images[:] = np.nan

    with pytest.raises(ValueError, match=f"The loss is nan in epoch 3: '{tmp_path / checkpoint.FILE}' holds epoch 2"):
        fit(small(), SHORT, with_images(few, images), tmp_path, progress=stopping_at(2, 0, poison))
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


def test_folder_that_cannot_be_written_is_told_before_the_first_step(few, unwritable, monkeypatch):
    monkeypatch.setattr("se_keras.training.step.Trainer.train", lambda *_, **__: pytest.fail("in vain"))
    with pytest.raises(OSError):
        fit(small(), SHORT, few, unwritable)


# Files that cannot be decoded


@pytest.fixture
def photographs(tmp_path):
    """Twenty small PNG files in two classes; two of them are cut short."""
    for number in range(20):
        path = tmp_path / "photographs" / f"class{number % 2}" / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        keras.utils.save_img(path, np.random.default_rng(number).integers(0, 255, (9, 9, 3)), scale=False)
    for path in (tmp_path / "photographs" / "class0" / "02.png", tmp_path / "photographs" / "class1" / "03.png"):
        path.write_bytes(path.read_bytes()[:40])
    return folder(tmp_path / "photographs")


def network_of_photographs():
    images = keras.Input((8, 8, 3))
    return keras.Model(images, keras.layers.Dense(2)(keras.layers.Flatten()(images)), name="linear")


@pytest.mark.slow
def test_files_that_cannot_be_decoded_are_left_out_and_told(photographs, tmp_path):
    recipe = replace(SHORT, batch_size=4)
    _, figures = fit(
        network_of_photographs(), recipe, photographs, tmp_path / "run", execution=Execution(corrupt_budget=2)
    )
    assert np.isfinite(figures["loss"]).all()
    skipped = json.loads((tmp_path / "run" / RUN_FILE).read_text())["corrupt"]
    assert sorted(path[-6:] for path in skipped) == ["02.png", "03.png"]


def test_too_many_files_that_cannot_be_decoded_end_the_run_with_their_names(photographs, tmp_path):
    with pytest.raises(ValueError, match=r"[12] files? cannot be decoded, and at most 0 may be skipped .+0[23].png"):
        fit(network_of_photographs(), replace(SHORT, batch_size=4), photographs, tmp_path / "run")


def test_files_to_be_judged_by_count_too(photographs, tmp_path):
    (tmp_path / "no.png").write_bytes(b"no picture")
    whole = [path for path in photographs.train.paths if path[-6:] not in ("02.png", "03.png")]
    train = Files(paths=tuple(whole), labels=np.array([int(path[-8] == "1") for path in whole], "int32"))
    test = Files(paths=(str(tmp_path / "no.png"), *whole[:3]), labels=np.zeros(4, "int32"))
    data = replace(photographs, train=train, test=test)
    with pytest.raises(ValueError, match="1 file cannot be decoded, and at most 0 may be skipped .+no.png"):
        fit(network_of_photographs(), replace(SHORT, batch_size=4), data, tmp_path / "run")


def test_budget_counts_a_file_once():
    skipped = SkippedFiles(budget=1)
    skipped.add("a.png")
    skipped.add("a.png")
    with pytest.raises(ValueError, match="2 files cannot be decoded, and at most 1 may be skipped .+: a.png, b.png"):
        skipped.add("b.png")
