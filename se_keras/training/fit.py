"""The training loop: the end of each epoch is on the disk, so that an interrupted run goes on where it was."""

import json
import math
from dataclasses import asdict
from pathlib import Path

import keras
import numpy as np

from se_keras import storage
from se_keras.errors import first_line

MODEL_FILE = "model.keras"
RUN_FILE = "run.json"


def fit(model, recipe, data, folder, *, progress=None):
    """Trains a classifier, or goes on where `folder` holds an unfinished run of the same network and recipe.

    After each epoch `folder/model.keras` holds the network with its optimizer, and `folder/run.json` the recipe and
    the figures so far. Both are written whole: whenever the run is interrupted, the last finished epoch is there.

    Args:
        model: A model from the data's images to probabilities of its classes; training starts from its weights.
        recipe: A `Recipe`.
        data: A `Data`.
        folder: Of this run.
        progress: Called before the first epoch and after each with the epochs done and the figures so far.

    Returns:
        The trained model, and a dict of the figures of each epoch: `loss`, `accuracy`, `val_loss`, `val_accuracy`.

    Raises:
        ValueError: If the model does not fit the data, if `folder` holds another run, or if the loss is not finite.
    """
    folder = Path(folder)
    outputs = model.output_shape
    if model.input_shape[1:] != data.train.images.shape[1:] or outputs != (None, len(data.classes)):
        raise ValueError(
            f"{data.name} has images of {data.train.images.shape[1:]} in {len(data.classes)} classes. "
            f"Received: {model.name} from {model.input_shape[1:]} to {outputs[1:]}"
        )
    description = {"network": model.name, "data": data.name, "recipe": asdict(recipe)}
    storage.check_writable(folder / MODEL_FILE)
    steps = math.ceil(len(data.train) / recipe.batch_size)
    figures = {}
    if (folder / MODEL_FILE).exists():
        model, figures, taken = _resume(folder, description)
        done = taken // steps
        figures = {name: values[:done] for name, values in figures.items()}
    else:
        done = 0
        _compile(model, recipe, steps)
    if progress:
        progress(done, figures)
    classes = len(data.classes)
    held_out = (data.test.images, keras.utils.to_categorical(data.test.labels, classes))
    for epoch in range(done, recipe.epochs):
        order = np.random.default_rng((recipe.seed, epoch)).permutation(len(data.train))
        history = model.fit(
            data.train.images[order],
            keras.utils.to_categorical(data.train.labels[order], classes),
            batch_size=recipe.batch_size,
            validation_data=held_out,
            shuffle=False,
            verbose=0,
        ).history
        # The loss on the test images too: the last step of an epoch can ruin weights that the loss before it had not.
        ruined = next((history[name][0] for name in ("loss", "val_loss") if not np.isfinite(history[name][0])), None)
        if ruined is not None:
            kept = f"{str(folder / MODEL_FILE)!r} holds epoch {epoch}" if epoch else "nothing was saved"
            raise ValueError(f"The loss is {ruined} in epoch {epoch + 1}: {kept}. Lower the learning rate")
        figures = {name: [*figures.get(name, []), values[0]] for name, values in history.items()}
        # The model goes last: its step count tells which epochs of the figures it has been through.
        storage.write_json(folder / RUN_FILE, description | {"figures": figures})
        with storage.staged(folder / MODEL_FILE) as path:
            model.save(path)
        if progress:
            progress(epoch + 1, figures)
    return model, figures


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


def _compile(model, recipe, steps):
    rate = keras.optimizers.schedules.CosineDecay(recipe.learning_rate, recipe.epochs * steps)
    model.compile(
        keras.optimizers.SGD(rate, momentum=recipe.momentum),
        keras.losses.CategoricalCrossentropy(label_smoothing=recipe.label_smoothing),
        metrics=[keras.metrics.CategoricalAccuracy(name="accuracy")],
    )


def _resume(folder, description):
    try:
        run = json.loads((folder / RUN_FILE).read_text())
        figures = run.pop("figures")
        model = keras.saving.load_model(folder / MODEL_FILE)
        taken = int(keras.ops.convert_to_numpy(model.optimizer.iterations))
    except Exception as error:  # json, zipfile, h5py and Keras raise their own kinds for what is cut or foreign
        raise ValueError(f"{str(folder)!r} holds no run that can be resumed: {first_line(error)}") from error
    differing = [key for key in description if run.get(key) != description[key]]
    if differing:
        raise ValueError(f"{str(folder)!r} holds another run: its {' and '.join(differing)} differ. Take a new folder")
    return model, figures, taken
