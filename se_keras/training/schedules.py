"""From a recipe: the number of steps of an epoch, and the learning rate of each step."""

import math
import warnings
from collections.abc import Iterable
from dataclasses import asdict

from keras.optimizers import schedules

from se_keras.training.data import Data
from se_keras.training.recipes import Recipe
from se_keras.typing import Json
from se_keras.wording import counted

FEWEST_STEPS = 10  # of an epoch, without a warning


def steps_per_epoch(recipe: Recipe, data: Data) -> int:
    """Number of full batches of the training images; ValueError if there is none.

    Warns:
        UserWarning: If there are fewer than ten, with which a recipe hardly trains.
    """
    if recipe.batch_size > len(data.train):
        raise ValueError(
            f"batch_size must be at most the {len(data.train)} training images of {data.name}. "
            f"Received: batch_size={recipe.batch_size}"
        )
    steps = len(data.train) // recipe.batch_size
    if steps < FEWEST_STEPS:
        warnings.warn(
            f"An epoch has {counted(steps, 'step')}: {counted(len(data.train), 'training image')} of {data.name} in "
            f"batches of {recipe.batch_size}. A smaller batch (--batch-size) trains more",
            stacklevel=2,
        )
    return steps


def learning_rates(recipe: Recipe, steps: int) -> schedules.LearningRateSchedule | float:
    """The learning rate as a Keras schedule, for `steps` steps per epoch; for `"plateau"`, the initial number."""
    if recipe.schedule == "plateau":
        return recipe.learning_rate
    if recipe.schedule == "steps":
        boundaries = [epoch * steps - 1 for epoch in recipe.decay_epochs]
        values = [recipe.learning_rate * recipe.decay**number for number in range(len(boundaries) + 1)]
        return schedules.PiecewiseConstantDecay(boundaries, values)
    if not recipe.warmup_epochs:
        return schedules.CosineDecay(recipe.learning_rate, recipe.epochs * steps)
    return schedules.CosineDecay(
        0.0,
        (recipe.epochs - recipe.warmup_epochs) * steps,
        warmup_target=recipe.learning_rate,
        warmup_steps=recipe.warmup_epochs * steps,
    )


def after_plateaus(recipe: Recipe, losses: Iterable[float]) -> float:
    """The learning rate of the next epoch under `"plateau"`, from the held-out loss of each epoch so far."""
    rate, best, waited = recipe.learning_rate, math.inf, 0
    for loss in losses:
        best, waited = (loss, 0) if loss < best else (best, waited + 1)
        if waited == recipe.patience:
            rate, waited = rate * recipe.decay, 0
    return rate


def plan(network: str, recipe: Recipe, data: Data) -> Json:
    """The plan of a training, as `se-keras train --dry-run --json` prints it.

    `learning_rate_at_epoch` has the learning rate of epoch 0, and of some later epochs where it has changed.
    """
    steps = steps_per_epoch(recipe, data)
    schedule = learning_rates(recipe, steps)
    epochs = {0, recipe.warmup_epochs, recipe.epochs // 2, recipe.epochs - 1}
    if recipe.schedule == "steps":
        epochs.update(epoch for epoch in recipe.decay_epochs if epoch < recipe.epochs)
    rates = {}
    for epoch in sorted(epochs):
        rate = float(schedule(epoch * steps)) if callable(schedule) else schedule
        if list(rates.values())[-1:] != [rate]:
            rates[epoch] = rate
    return {
        "network": network,
        "data": data.name,
        "training_images": len(data.train),
        "test_images": len(data.test),
        "classes": len(data.classes),
        "steps_per_epoch": steps,
        "learning_rate_at_epoch": rates,
        "recipe": asdict(recipe),
    }
