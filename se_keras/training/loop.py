"""The training loop, on one device or on many machines. After an interruption, the same call resumes."""

import contextlib
import json
import math
import reprlib
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from se_keras import storage
from se_keras.errors import first_line, require_type
from se_keras.runs import MODEL_FILE, RUN_FILE
from se_keras.training import checkpoint, record
from se_keras.training.data import Data, EpochOrder, SkippedFiles
from se_keras.training.distribution import Replicas, Strategy, replicas
from se_keras.training.pipeline import batches, held_out, read_errors
from se_keras.training.recipes import Execution, Recipe
from se_keras.training.schedules import after_plateaus, steps_per_epoch
from se_keras.training.step import Trainer, averaged, batch_norm_frozen, optimizer_for
from se_keras.training.stopping import stop_requests
from se_keras.typing import FilePath
from se_keras.wording import counted

_LOCK = ".lock"
_DRAW_SECONDS = 10  # curves are drawn after epochs that took longer, and at the end

Figures = dict[str, list[float]]  # one value for each epoch


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The progress of a training.

    Args:
        epoch: Number of finished epochs.
        epochs: Number of all epochs.
        step: Number of finished steps in the current epoch.
        steps: Number of all steps in an epoch.
        loss: Mean over the current epoch so far; None before its first step.
        accuracy: Likewise.
        images_per_second: In the last execution; None before the first.
        figures: Figures of the finished epochs.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float | None = None
    accuracy: float | None = None
    images_per_second: float | None = None
    figures: Figures = field(default_factory=dict)


def fit(
    model: keras.Model,
    recipe: Recipe,
    data: Data,
    folder: FilePath,
    *,
    strategy: Strategy | Replicas = "none",
    execution: Execution | None = None,
    progress: Callable[[Progress], object] | None = None,
    callbacks: Iterable[keras.callbacks.Callback] = (),
) -> tuple[keras.Model, Figures]:
    """Trains a classifier, or resumes if `folder` holds an unfinished training of the same network and recipe.

    `folder/checkpoint.safetensors` has the full state of the training, after each epoch and after SIGTERM or Ctrl-C:
    training resumes with the next step and ends with the same weights. After each epoch `folder/model.keras` holds the
    network (with averaged weights, if the recipe has them), `run.json` the recipe, the figures and the versions that
    made them, `history.csv`, `tensorboard/`, `curves.png` and `curves.svg` the figures. The first worker writes; each
    file is written atomically, except TensorBoard's events, which are appended to.

    Args:
        model: A functional model from images to probabilities or logits of the data's classes. Training starts from
            its weights. Under a strategy a copy of it is trained.
        recipe: Its batch is divided among all replicas.
        folder: Folder of this run. All workers must see the same folder.
        strategy: A name, or `Replicas`. `"multi-worker"` must be created before the model is built.
        progress: Called before the first step, after each execution and after each epoch.
        callbacks: Called for training, epochs and batches; an epoch's logs have the evaluation too.

    Returns:
        The trained model, and the figures of each epoch: `loss`, `accuracy`, `val_loss`, `val_accuracy`, `val_top5` and
        the last `learning_rate`.

    Raises:
        TypeError: If the model, the recipe, the data, the strategy or the execution has another type.
        ValueError: If the model does not fit the data, if the batch is larger than the data or cannot be shared, if
            `folder` holds another training, if the loss is not finite, or if too many files cannot be decoded.
        OSError: If the folder cannot be written or is full; BlockingIOError, if another process trains there;
            ConnectionError, if a worker was lost.
        KeyboardInterrupt, Preempted: After Ctrl-C and SIGTERM, when everything is saved.
    """
    execution = Execution() if execution is None else execution
    values = {"model": (model, keras.Model), "recipe": (recipe, Recipe), "data": (data, Data)}
    for argument, (value, kind) in {**values, "execution": (execution, Execution)}.items():
        require_type(argument, value, kind)
    if not isinstance(strategy, Replicas):
        strategy = replicas(strategy)
    run = _Run(model, recipe, data, Path(folder), strategy, execution, progress)
    called = keras.callbacks.CallbackList(list(callbacks), model=run.model, epochs=recipe.epochs, steps=run.steps)
    with run.opened(), stop_requests() as stop:
        called.on_train_begin()
        run.report()
        for epoch in range(run.epoch, recipe.epochs):
            called.on_epoch_begin(epoch)
            logs = run.one_epoch(stop, called)
            called.on_epoch_end(epoch, logs)
            if getattr(run.model, "stop_training", False):
                break
        called.on_train_end()
        if stop.signal is not None:  # it arrived after the last step
            raise stop.exception(run.saved())
    with strategy.strategy.scope():  # the weights that were evaluated
        run.optimizer.finalize_variable_values(run.model.trainable_variables)
    return run.model, run.figures


class _Run:
    """A training in progress: its state, and the files that it writes."""

    def __init__(self, model, recipe, data, folder, replicas, execution, progress):
        self.recipe, self.data, self.folder, self.execution = recipe, data, folder, execution
        self.replicas, self._progress = replicas, progress
        self.size = _image_size(model, data)
        self.share = replicas.share(recipe.batch_size)
        batch, parts = recipe.batch_size // replicas.count, execution.accumulate
        if batch % parts:
            raise ValueError(f"accumulate must divide a replica's batch of {batch}. Received: accumulate={parts}")
        self.steps = steps_per_epoch(recipe, data)
        self.description = {
            "network": model.name,
            "input_shape": list(model.input_shape[1:]),
            "data": data.name,
            "training_images": len(data.train),
            "classes": list(data.classes),
            "normalization": data.normalization.to_json(),
            "recipe": json.loads(json.dumps(asdict(recipe))),  # with lists for tuples, as in the file
        }
        self.epoch, self.step, self.figures, self._traced_frozen = 0, 0, {}, False
        self.sums = np.zeros(3)  # over the current epoch: loss, correct predictions, images
        self.skipped = SkippedFiles(budget=execution.corrupt_budget)
        with replicas.strategy.scope():
            self.model = model
            if replicas.name != "none":  # variables of the strategy
                self.model = keras.models.clone_model(model)
                self.model.set_weights(model.get_weights())
            self.optimizer = optimizer_for(self.model, recipe, self.steps)
        self.trainer = Trainer(self.model, self.optimizer, replicas, recipe, execution)

    @contextlib.contextmanager
    def opened(self):
        """Resumes what the folder holds. Until the end of the block, no other training writes there."""
        with contextlib.ExitStack() as stack:
            if self.replicas.is_chief:  # the other workers write nothing
                storage.check_writable(self.folder / checkpoint.FILE)
                stack.enter_context(storage.locked(self.folder / _LOCK))
                storage.remove_partial(self.folder)
            if (self.folder / checkpoint.FILE).exists():
                self._resume()
            elif (self.folder / MODEL_FILE).exists():
                missing = f"a {MODEL_FILE} and no {checkpoint.FILE} to resume from"
                raise ValueError(f"{str(self.folder)!r} has {missing}: take a new folder")
            self._require_same_step()
            yield

    def one_epoch(self, stop, callbacks):
        """Runs the remaining steps of an epoch, evaluates, writes all files, and returns the figures."""
        started = time.monotonic()
        frozen = self.epoch >= self.recipe.epochs - self.recipe.frozen_batch_norm_epochs
        with batch_norm_frozen(self.model, when=frozen):
            if frozen != self._traced_frozen:
                self._traced_frozen = frozen
                self.trainer.trace()
            if self.recipe.schedule == "plateau":
                self.optimizer.learning_rate = after_plateaus(self.recipe, self.figures.get("val_loss", []))
            iterator = self._training_batches()
            while self.step < self.steps:
                self._execute(iterator, stop, callbacks)
        self.trainer.synchronize()
        with averaged(self.model, self.optimizer, self.replicas):
            figures = self._evaluate()
            self.figures = {name: [*self.figures.get(name, []), value] for name, value in figures.items()}
            self.epoch, self.step, self.sums = self.epoch + 1, 0, np.zeros(3)
            if self.replicas.is_chief:
                self._write_files(draw=time.monotonic() - started > _DRAW_SECONDS)
        # After the other files: a run that resumes from the previous checkpoint writes them again.
        self._save()
        if self.replicas.is_chief:  # after the checkpoint, or a repeated epoch would be in the events twice
            record.write_tensorboard(self.folder, figures, self.epoch)
        self.report()
        return figures

    def _execute(self, iterator, stop, callbacks):
        count = min(self.execution.steps_per_execution, self.steps - self.step)
        if every := self.execution.checkpoint_steps:
            count = min(count, every - self.step % every)
        callbacks.on_train_batch_begin(self.step)
        started = time.monotonic()
        with self._explained_errors(self.data.train):
            sums = self.trainer.train(iterator, count, stopping=stop.signal is not None)
        self._require_finite("loss", sums[0])
        self.step += count
        self.sums = self.sums + sums[:3]
        seconds = time.monotonic() - started
        logs = {"loss": self.sums[0] / max(self.sums[2], 1), "accuracy": self.sums[1] / max(self.sums[2], 1)}
        callbacks.on_train_batch_end(self.step - 1, logs)
        self.report(images_per_second=count * self.recipe.batch_size / seconds, **logs)
        stopping = sums[3] > 0  # a worker asked to stop
        if stopping or (every and self.step % every == 0 and self.step < self.steps):
            self.trainer.synchronize()
            self._save()
        if stopping:
            raise stop.exception(f"{self.saved()}; the same command resumes")

    def report(self, **now):
        """Calls `progress`."""
        if self._progress:
            here = {"epoch": self.epoch, "epochs": self.recipe.epochs, "step": self.step, "steps": self.steps}
            self._progress(Progress(**here, figures=self.figures, **now))

    def _order(self, **order):
        return EpochOrder(batch=self.share, part=self.replicas.worker, parts=self.replicas.workers, **order)

    def _training_batches(self):
        dataset = batches(
            self.data.train,
            self.data,
            size=self.size,
            order=self._order(seed=self.recipe.seed, epoch=self.epoch, sampling=self.recipe.sampling, start=self.step),
            augmentation=self.recipe.augmentation,
            skipped=self.skipped,
            service=self.execution.service,
        )
        return self.replicas.distribute(dataset, self.recipe.batch_size)

    def _evaluate(self):
        cache, order = self.execution.cache, self._order()
        dataset = held_out(self.data.test, self.data, size=self.size, order=order, cache=cache, skipped=self.skipped)
        steps = math.ceil(len(self.data.test) / self.recipe.batch_size)
        with self._explained_errors(self.data.test):
            iterator = self.replicas.distribute(dataset, self.recipe.batch_size)
            loss, top1, top5, images = self.trainer.evaluate(iterator, steps)
        # The last step of an epoch can ruin the weights: only the loss on the test images shows that.
        self._require_finite("val_loss", loss)
        return {
            "loss": float(self.sums[0] / self.sums[2]),
            "accuracy": float(self.sums[1] / self.sums[2]),
            "val_loss": float(loss / images),
            "val_accuracy": float(top1 / images),
            "val_top5": float(top5 / images),
            "learning_rate": float(np.asarray(keras.ops.convert_to_numpy(self.optimizer.learning_rate))),
        }

    @contextlib.contextmanager
    def _explained_errors(self, split):
        """Turns TensorFlow's errors into errors that name the cause: bad files, damaged shards, a lost worker."""
        try:
            yield
        except tf.errors.OpError as error:
            self.skipped.check()
            with read_errors(split, self.skipped):
                if isinstance(error, tf.errors.DataLossError):
                    raise
            if self.replicas.workers == 1:
                raise
            lost = f"A worker was lost in epoch {self.epoch + 1}: {self.saved()}"
            raise ConnectionError(f"{lost}. Start all workers again ({first_line(error)})") from None

    def _require_finite(self, name, value):
        if not np.isfinite(value):
            raise ValueError(
                f"The {name} is {value} in epoch {self.epoch + 1}: {self.saved()}. Lower the learning rate"
            )

    def saved(self):
        """What the checkpoint holds, for messages."""
        position = checkpoint.position(self.folder / checkpoint.FILE)
        if position is None:
            return "nothing was saved"
        where = f"epoch {position[0]}" + (f" and {counted(position[1], 'step')} of the next" if position[1] else "")
        return f"{str(self.folder / checkpoint.FILE)!r} holds {where} of {self.recipe.epochs}"

    def _write_files(self, *, draw):
        entries = self.description | {
            "pixels": self.data.normalization_of_pixels.to_json(),
            "source": self.data.source,
            "strategy": self.replicas.name,
            "replicas": self.replicas.count,
            "execution": asdict(self.execution),
            "figures": self.figures,
            "corrupt": self.skipped.paths,
            "made_with": record.provenance(),
        }
        storage.write_json(self.folder / RUN_FILE, entries)
        with storage.staged(self.folder / MODEL_FILE) as path:
            self.model.save(path)
        record.write_csv(self.folder, self.figures)
        if draw or self.epoch == self.recipe.epochs:
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
        if differing := "; ".join(_differences(about, self.description)):
            raise ValueError(f"{str(self.folder)!r} holds another run: {differing}. Take a new folder")
        with self.replicas.strategy.scope():
            checkpoint.restore(path, tensors, self.model, self.optimizer)
        self.epoch, self.step, self.figures = about["epoch"], about["step"], about["figures"]
        self.sums = np.array(about["sums"])

    def _require_same_step(self):
        """Refuses workers that start from different checkpoints, which means that their folders differ."""
        here = self.epoch * self.steps + self.step
        if not self.replicas.agree(here):
            raise ValueError(
                f"All workers must see the same folder. Received: {str(self.folder)!r}, where worker "
                f"{self.replicas.worker} finds {here} finished steps, and other workers another number"
            )


def _image_size(model, data):
    """Height and width of the model's images; refuses a model that does not fit the data."""
    *size, _ = model.input_shape[1:]
    pixels = getattr(data.train, "images", None)
    shape = (*size, len(data.mean)) if pixels is None else pixels.shape[1:]
    if model.output_shape != (None, len(data.classes)) or model.input_shape[1:] != shape:
        raise ValueError(
            f"{data.name} has images of {shape} in {len(data.classes)} classes. "
            f"Received: {model.name} from {model.input_shape[1:]} to {model.output_shape[1:]}"
        )
    if None in size:
        raise ValueError(
            f"Training needs a fixed input_shape, as an argument of create. Received: {model.input_shape[1:]}"
        )
    return tuple(size)


def _differences(before, now):
    """What differs between two descriptions of runs, as texts. Entries that an older checkpoint lacks do not."""
    for key, value in now.items():
        known = before.get(key, value)
        if isinstance(known, dict) and isinstance(value, dict):
            yield from _differences(known, value)
        elif known != value:
            yield f"{key} {reprlib.repr(known)}, now {reprlib.repr(value)}"
