"""The training loop, on one device or many machines: whatever stops it, the same call goes on where it was."""

import contextlib
import json
import math
import signal
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from se_keras import storage
from se_keras.errors import first_line
from se_keras.training import checkpoint, record
from se_keras.training.data import Corrupt, Pass
from se_keras.training.distribution import Replicas, Trainer, averaged, replicas
from se_keras.training.pipeline import batches, held_out
from se_keras.training.schedules import after_plateaus, learning_rates, steps_per_epoch

MODEL_FILE = "model.keras"
RUN_FILE = "run.json"
EXIT_SAVED = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on
_DRAW_SECONDS = 10  # curves are drawn after epochs that took longer, and at the end


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How the work of a training is done; what is learned stays the same, but for rounding.

    Args:
        steps_per_execution: Steps between two looks at the clock, at signals and at the loss.
        accumulate: Parts that a replica's batch is computed in, one after the other; BatchNorm sees one at a time.
        jit_compile: Whether XLA compiles the forward and backward pass.
        checkpoint_steps: Steps between two checkpoints within an epoch; None for one after each epoch.
        corrupt_budget: Files that cannot be decoded and are left out before training fails.
        cache: Whether the held-out images are kept in memory.
        service: Address of a tf.data service that prepares the images, such as `"grpc://host:5000"`.

    Raises:
        ValueError: If a number is out of its range.
    """

    steps_per_execution: int = 1
    accumulate: int = 1
    jit_compile: bool = False
    checkpoint_steps: int | None = None
    corrupt_budget: int = 0
    cache: bool = False
    service: str | None = None

    def __post_init__(self):
        least = {"steps_per_execution": 1, "accumulate": 1, "checkpoint_steps": 1, "corrupt_budget": 0}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < lowest):
                raise ValueError(f"{name} must be an int of at least {lowest}. Received: {name}={value!r}")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a training is.

    Args:
        epoch: Epochs done.
        epochs: In all.
        step: Steps done in the epoch that is going on.
        steps: Steps in an epoch.
        loss: Mean of its steps so far; None before the first.
        accuracy: Likewise.
        images_per_second: Of the last execution; None before the first.
        figures: Of each epoch that is done, `{name: [value, ...]}`.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float | None = None
    accuracy: float | None = None
    images_per_second: float | None = None
    figures: dict = field(default_factory=dict)


class Preempted(SystemExit):
    """SIGTERM came, and the training was saved: the process ends with a status of its own, 75."""

    def __init__(self, told):
        super().__init__(EXIT_SAVED)
        self.told = told

    def __str__(self):
        return self.told


def fit(model, recipe, data, folder, *, strategy="none", execution=None, progress=None, callbacks=()):
    """Trains a classifier, or goes on where `folder` holds an unfinished training of the same network and recipe.

    `folder/checkpoint.safetensors` has everything that the rest depends on, after each epoch and when SIGTERM or Ctrl-C
    comes: training goes on with the next step, to the same weights. After each epoch `folder/model.keras` holds the
    network (its averaged weights, if the recipe keeps any), `run.json` the recipe, the figures and what made them,
    `history.csv`, `tensorboard/`, `curves.png` and `curves.svg` the figures. The first worker writes, and each file is
    whole or absent; TensorBoard's events grow.

    Args:
        model: A functional model from images to probabilities or logits of the data's classes; training starts from
            its weights. Under a strategy a copy of it is trained.
        recipe: A `Recipe`; its batch is shared by all replicas.
        data: A `Data`.
        folder: Of this run. Several workers need to see the same one.
        strategy: One of `STRATEGIES`, or `Replicas`: several workers must be asked for before the model is built.
        execution: An `Execution`.
        progress: Called with a `Progress` before the first step and after each execution and each epoch.
        callbacks: Keras callbacks. They hear of training, epochs and batches; what is validated is in an epoch's logs.

    Returns:
        The trained model, and a dict of the figures of each epoch: `loss`, `accuracy`, `val_loss`, `val_accuracy`,
        `val_top5` and `learning_rate`, its last.

    Raises:
        ValueError: If the model does not fit the data, if the batch is larger than the data or cannot be shared, if
            `folder` holds another training, if the loss is not finite, or if too many files cannot be decoded.
        OSError: If the folder cannot be written or is full; ConnectionError, if a worker was lost.
        KeyboardInterrupt, Preempted: After Ctrl-C and SIGTERM, when all is saved.
    """
    given = strategy if isinstance(strategy, Replicas) else replicas(strategy)
    run = _Run(model, recipe, data, Path(folder), given, execution or Execution(), progress)
    heard = keras.callbacks.CallbackList(list(callbacks), model=run.model, epochs=recipe.epochs, steps=run.steps)
    with _stopping() as stop:
        heard.on_train_begin()
        run.report()
        for epoch in range(run.epoch, recipe.epochs):
            heard.on_epoch_begin(epoch)
            logs = run.one_epoch(stop, heard)
            heard.on_epoch_end(epoch, logs)
            if getattr(run.model, "stop_training", False):
                break
        heard.on_train_end()
        if stop.signal is not None:  # too late to stop before the end
            raise stop.outcome(run.kept())
    return run.result(), run.figures


def training_of(model_file):
    """How a model file was trained: what `fit` has written beside it; None where it has not.

    Raises:
        ValueError: If that is damaged.
    """
    run = Path(model_file).with_name(RUN_FILE)
    if Path(model_file).name != MODEL_FILE or not run.is_file():
        return None
    try:
        return json.loads(run.read_text())
    except ValueError as error:
        raise ValueError(f"{str(run)!r} is no record of a run: {first_line(error)}") from None


class _Run:
    """A training under way: where it is, and what it writes."""

    def __init__(self, model, recipe, data, folder, given, execution, progress):
        self.recipe, self.data, self.folder, self.execution = recipe, data, folder, execution
        self.replicas, self._progress = given, progress
        self.size = _size(model, data)
        self.share = given.share(recipe.batch_size)
        if self.share * given.workers // given.count % execution.accumulate:
            raise ValueError(
                f"accumulate must divide a replica's batch of {self.share * given.workers // given.count}. "
                f"Received: accumulate={execution.accumulate}"
            )
        self.steps = steps_per_epoch(recipe, data)
        self.description = {
            "network": model.name,
            "data": data.name,
            "classes": list(data.classes),
            "normalization": {"mean": list(data.mean), "std": list(data.std)},
            "recipe": json.loads(json.dumps(asdict(recipe))),  # tuples as the file has them: lists
        }
        if given.is_chief:
            storage.check_writable(folder / checkpoint.FILE)
            storage.remove_partial(folder)
        self.epoch, self.step, self.figures = 0, 0, {}
        self.sums = np.zeros(3)  # of the epoch that is going on: loss, right, images
        self._traced_frozen = False
        self.corrupt = Corrupt(budget=execution.corrupt_budget)
        with given.strategy.scope():
            self.model = model if given.name == "none" else _copy(model)
            self.optimizer = _optimizer(self.model, recipe, self.steps)
        self.trainer = Trainer(
            self.model,
            self.optimizer,
            given,
            label_smoothing=recipe.label_smoothing,
            weight_decay=recipe.weight_decay,
            accumulate=execution.accumulate,
            jit_compile=execution.jit_compile,
        )
        if (folder / checkpoint.FILE).exists():
            self._resume()
        elif (folder / MODEL_FILE).exists():
            raise ValueError(
                f"{str(folder)!r} has a {MODEL_FILE} and no {checkpoint.FILE} to go on from: take a new folder"
            )
        self._require_agreement()

    def one_epoch(self, stop, heard):
        """Takes the steps of an epoch that are left, judges, and writes everything."""
        started = time.monotonic()
        with _batch_norm_frozen(self.model, when=self._is_frozen()):
            if self._is_frozen() != self._traced_frozen:
                self._traced_frozen = self._is_frozen()
                self.trainer.trace()
            if self.recipe.schedule == "plateau":
                self.optimizer.learning_rate = after_plateaus(self.recipe, self.figures.get("val_loss", []))
            iterator = self._iterator()
            while self.step < self.steps:
                self._execute(iterator, stop, heard)
        self.trainer.synchronize()
        with averaged(self.model, self.optimizer, self.replicas):
            figures = self._judged()
            for name, value in figures.items():
                self.figures = self.figures | {name: [*self.figures.get(name, []), value]}
            self.epoch, self.step, self.sums = self.epoch + 1, 0, np.zeros(3)
            if self.replicas.is_chief:
                self._write_model(drawn=time.monotonic() - started > _DRAW_SECONDS)
        # The checkpoint goes last: what is written before it is written again by whoever goes on from the one before.
        self._save()
        if self.replicas.is_chief:  # behind it: events are added to, and an epoch that is done again would stand twice
            record.write_tensorboard(self.folder, figures, self.epoch)
        self.report()
        return figures

    def _execute(self, iterator, stop, heard):
        count = min(self.execution.steps_per_execution, self.steps - self.step)
        if every := self.execution.checkpoint_steps:
            count = min(count, every - self.step % every)
        heard.on_train_batch_begin(self.step)
        began = time.monotonic()
        with self._in_plain_words():
            sums = self.trainer.train(iterator, count, stopping=stop.signal is not None)
        self._require_finite("loss", sums[0])
        self.step += count
        self.sums = self.sums + sums[:3]
        seconds = time.monotonic() - began
        logs = {"loss": self.sums[0] / max(self.sums[2], 1), "accuracy": self.sums[1] / max(self.sums[2], 1)}
        heard.on_train_batch_end(self.step - 1, logs)
        self.report(images_per_second=count * self.recipe.batch_size / seconds, **logs)
        if sums[3]:
            self.trainer.synchronize()
            self._save()
            raise stop.outcome(f"{self.kept()}; the same command goes on")
        if every and self.step % every == 0 and self.step < self.steps:
            self.trainer.synchronize()
            self._save()

    def report(self, **now):
        """Tells where the training is."""
        if self._progress:
            here = {"epoch": self.epoch, "epochs": self.recipe.epochs, "step": self.step, "steps": self.steps}
            self._progress(Progress(**here, figures=self.figures, **now))

    def result(self):
        """The trained model: as it is judged."""
        with self.replicas.strategy.scope():
            self.optimizer.finalize_variable_values(self.model.trainable_variables)
        return self.model

    def _is_frozen(self):
        return self.epoch >= self.recipe.epochs - self.recipe.frozen_batch_norm_epochs

    def _iterator(self):
        how = Pass(
            batch=self.share,
            part=self.replicas.worker,
            parts=self.replicas.workers,
            seed=self.recipe.seed,
            epoch=self.epoch,
            sampling=self.recipe.sampling,
            start=self.step,
        )
        dataset = batches(
            self.data.train,
            self.data,
            size=self.size,
            a_pass=how,
            augmentation=self.recipe.augmentation,
            corrupt=self.corrupt,
            service=self.execution.service,
        )
        return self.replicas.distribute(dataset, self.recipe.batch_size)

    def _judged(self):
        dataset = held_out(
            self.data.test,
            self.data,
            size=self.size,
            batch=self.share,
            part=self.replicas.worker,
            parts=self.replicas.workers,
            cache=self.execution.cache,
            corrupt=self.corrupt,
        )
        steps = math.ceil(len(self.data.test) / self.recipe.batch_size)
        with self._in_plain_words():
            iterator = self.replicas.distribute(dataset, self.recipe.batch_size)
            loss, right, among, images = self.trainer.judge(iterator, steps)
        # The loss on the test images too: the last step of an epoch can ruin weights that the loss before it had not.
        self._require_finite("val_loss", loss)
        return {
            "loss": float(self.sums[0] / self.sums[2]),
            "accuracy": float(self.sums[1] / self.sums[2]),
            "val_loss": float(loss / images),
            "val_accuracy": float(right / images),
            "val_top5": float(among / images),
            "learning_rate": float(keras.ops.convert_to_numpy(self.optimizer.learning_rate)),
        }

    @contextlib.contextmanager
    def _in_plain_words(self):
        """Says of TensorFlow's errors what they come from."""
        try:
            yield
        except tf.errors.OpError as error:
            self.corrupt.check()
            if self.replicas.workers == 1:
                raise
            raise ConnectionError(
                f"A worker was lost in epoch {self.epoch + 1}: {self.kept()}. Start all workers again "
                f"({first_line(error)})"
            ) from None

    def _require_finite(self, name, value):
        if not np.isfinite(value):
            raise ValueError(f"The {name} is {value} in epoch {self.epoch + 1}: {self.kept()}. Lower the learning rate")

    def kept(self):
        """What is on the disk, in words."""
        saved = checkpoint.position(self.folder / checkpoint.FILE)
        if saved is None:
            return "nothing was saved"
        where = f"epoch {saved[0]}" + (f" and {saved[1]} steps of the next" if saved[1] else "")
        return f"{str(self.folder / checkpoint.FILE)!r} holds {where} of {self.recipe.epochs}"

    def _write_model(self, *, drawn):
        entries = self.description | {
            "strategy": self.replicas.name,
            "replicas": self.replicas.count,
            "execution": asdict(self.execution),
            "figures": self.figures,
            "corrupt": self.corrupt.paths,
            "made_with": record.provenance(),
        }
        storage.write_json(self.folder / RUN_FILE, entries)
        with storage.staged(self.folder / MODEL_FILE) as path:
            self.model.save(path)
        record.write_csv(self.folder, self.figures)
        if drawn or self.epoch == self.recipe.epochs:
            for name in record.CURVES:
                record.draw_curves(self.folder / name, {self.model.name: self.figures})

    def _save(self):
        tensors = checkpoint.state_of(self.model, self.optimizer)  # by all workers: some values are gathered
        if self.replicas.is_chief:
            here = {"epoch": self.epoch, "step": self.step, "sums": self.sums.tolist(), "figures": self.figures}
            checkpoint.save_checkpoint(self.folder / checkpoint.FILE, tensors, self.description | here)

    def _resume(self):
        path = self.folder / checkpoint.FILE
        tensors, about = checkpoint.load_checkpoint(path)
        differing = [key for key in self.description if about.get(key) != self.description[key]]
        if differing:
            raise ValueError(
                f"{str(self.folder)!r} holds another run: its {' and '.join(differing)} differ. Take a new folder"
            )
        with self.replicas.strategy.scope():
            checkpoint.restore(path, tensors, self.model, self.optimizer)
        self.epoch, self.step, self.figures = about["epoch"], about["step"], about["figures"]
        self.sums = np.array(about["sums"])

    def _require_agreement(self):
        here = self.epoch * self.steps + self.step
        if not self.replicas.agree(here):
            raise ValueError(
                f"All workers need to see the same folder. Received: {str(self.folder)!r}, where worker "
                f"{self.replicas.worker} finds {here} steps done, and others another number"
            )


def _size(model, data):
    """Height and width that a model takes; what does not fit the data is refused."""
    *size, _ = model.input_shape[1:]
    pixels = getattr(data.train, "images", None)
    shape = (*size, len(data.mean)) if pixels is None else pixels.shape[1:]
    if model.output_shape != (None, len(data.classes)) or model.input_shape[1:] != shape:
        raise ValueError(
            f"{data.name} has images of {shape} in {len(data.classes)} classes. "
            f"Received: {model.name} from {model.input_shape[1:]} to {model.output_shape[1:]}"
        )
    if None in size:
        raise ValueError(f"Training needs a size: give create an input_shape. Received: {model.input_shape[1:]}")
    return tuple(size)


def _copy(model):
    """The same network with variables of the strategy whose scope this is."""
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    return twin


def _optimizer(model, recipe, steps):
    optimizer = keras.optimizers.SGD(
        learning_rates(recipe, steps),
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        use_ema=recipe.ema > 0,
        ema_momentum=recipe.ema or 0.99,
    )
    if any(layer.compute_dtype == "float16" for layer in model.layers):
        # Gradients below 6e-8 are 0 in float16: they are scaled up, and down again.
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    return optimizer


@contextlib.contextmanager
def _batch_norm_frozen(model, *, when):
    """BatchNorm as in inference, its parameters fixed, while the block runs."""
    norms = [layer for layer in model.layers if when and isinstance(layer, keras.layers.BatchNormalization)]
    try:
        for layer in norms:
            layer.trainable = False
        yield
    finally:
        for layer in norms:
            layer.trainable = True


class _Stop:
    """What was asked for by a signal."""

    def __init__(self):
        self.signal = None

    def outcome(self, told):
        """The exception to end with. Where another worker was told, this one ends as after SIGTERM."""
        return KeyboardInterrupt(told) if self.signal == signal.SIGINT else Preempted(told)


@contextlib.contextmanager
def _stopping():
    """Takes SIGINT and SIGTERM for a wish, once; a second one ends the process as ever."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread can be told
        return

    def ask(number, _):
        stop.signal = number
        for each, handler in before.items():
            signal.signal(each, handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
