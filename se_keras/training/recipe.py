"""Hyperparameters as values, each with its source."""

import math
from dataclasses import dataclass, replace
from typing import Literal

CROPS = ("none", "scale_and_aspect", "pad")
SCHEDULES = ("cosine", "steps", "plateau")
SAMPLINGS = ("shuffled", "balanced")


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What training does to each image, by chance.

    Args:
        crop: `"scale_and_aspect"`, a part of the image of random size and proportions, scaled to the network's size
            (Szegedy et al. 2015, arXiv:1409.4842, section 6); `"pad"`, zeros around it and a part of its own size
            (He et al. 2015, arXiv:1512.03385, section 4.2); or `"none"`, its middle.
        area: Of `"scale_and_aspect"`: the least and the largest share of the image.
        aspect: The least and the largest width over height.
        padding: Of `"pad"`: pixels on each side.
        flip: Whether every other image is mirrored, left to right.
        rand_augment: Strength of two operations of `keras.layers.RandAugment` (arXiv:1909.13719), 0 to 1; 0 for none.
        mixup: alpha of `keras.layers.MixUp` (arXiv:1710.09412); 0 for none.

    Raises:
        ValueError: If a value is out of its range.
    """

    crop: Literal["none", "scale_and_aspect", "pad"] = "none"
    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    padding: int = 4
    flip: bool = False
    rand_augment: float = 0.0
    mixup: float = 0.0

    def __post_init__(self):
        _check(
            self,
            crop=self.crop in CROPS,
            area=len(self.area) == 2 and 0 < self.area[0] <= self.area[1] <= 1,
            aspect=len(self.aspect) == 2 and 0 < self.aspect[0] <= self.aspect[1] < math.inf,
            padding=_whole(self.padding, 0),
            rand_augment=0 <= self.rand_augment <= 1,
            mixup=0 <= self.mixup < math.inf,
        )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train: SGD with momentum, a schedule of its learning rate, and what is done to the images.

    Args:
        epochs: Passes over the training images.
        batch_size: Images in a step, over all replicas.
        learning_rate: The first, or the one that the warm-up rises to.
        momentum: Of SGD.
        weight_decay: L2 regularisation of the kernels; not of biases, BatchNorm's parameters among them.
        schedule: Of the learning rate. `"cosine"` takes it to zero (arXiv:1608.03983, eq. 5, without restarts),
            `"steps"` multiplies it by `decay` every `decay_epochs`, `"plateau"` whenever the held-out loss has not
            fallen for `patience` epochs.
        decay_epochs, decay, patience: See `schedule`.
        warmup_epochs: In which the learning rate rises to its value, linearly (arXiv:1706.02677, section 2.2).
        label_smoothing: Share of each label that is spread over all classes (arXiv:1512.00567, section 7).
        ema: Decay, a step, of the averaged weights that are judged and saved; 0 for none.
        frozen_batch_norm_epochs: The last epochs, in which BatchNorm is as in inference and does not learn.
        sampling: `"shuffled"`, or `"balanced"`: each class equally often (arXiv:1512.05830, section 4).
        augmentation: An `Augmentation`.
        seed: Of the initial weights, the order of the images and what happens to them.
        source: Where the values come from.

    Raises:
        ValueError: If a value is out of its range.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Literal["cosine", "steps", "plateau"] = "cosine"
    decay_epochs: int = 30
    decay: float = 0.1
    patience: int = 5
    warmup_epochs: int = 0
    label_smoothing: float = 0.0
    ema: float = 0.0
    frozen_batch_norm_epochs: int = 0
    sampling: Literal["shuffled", "balanced"] = "shuffled"
    augmentation: Augmentation = Augmentation()
    seed: int = 0
    source: str

    def __post_init__(self):
        _check(
            self,
            epochs=_whole(self.epochs, 1),
            batch_size=_whole(self.batch_size, 1),
            seed=_whole(self.seed, 0),
            decay_epochs=_whole(self.decay_epochs, 1),
            patience=_whole(self.patience, 1),
            warmup_epochs=_whole(self.warmup_epochs, 0),
            frozen_batch_norm_epochs=_whole(self.frozen_batch_norm_epochs, 0),
            learning_rate=0 < self.learning_rate < math.inf,
            momentum=0 <= self.momentum < 1,
            weight_decay=0 <= self.weight_decay < 1,
            decay=0 < self.decay < 1,
            label_smoothing=0 <= self.label_smoothing < 1,
            ema=0 <= self.ema < 1,
            schedule=self.schedule in SCHEDULES,
            sampling=self.sampling in SAMPLINGS,
        )

    def scaled_to(self, batch_size):
        """The recipe at another batch, its learning rate in proportion: arXiv:1706.02677, section 2.1."""
        return replace(self, batch_size=batch_size, learning_rate=self.learning_rate * batch_size / self.batch_size)


def _whole(value, least):
    return type(value) is int and value >= least


def _check(values, **fits):
    for field, fit in fits.items():
        if not fit:
            raise ValueError(f"{field} is out of its range. Received: {field}={getattr(values, field)}")


DIGITS = Recipe(
    epochs=15,
    batch_size=32,
    learning_rate=0.05,
    label_smoothing=0.1,
    source="this project's own, for 8x8 digits; momentum and smoothing as in arXiv:1709.01507",
)

RECIPES = {"digits": DIGITS}
