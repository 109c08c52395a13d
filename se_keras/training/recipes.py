"""Training recipes, each with its source, and execution options, which do not change the result.

Values out of their range raise ValueError.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

Crop = Literal["none", "scale_and_aspect", "pad"]
Schedule = Literal["cosine", "steps", "plateau"]
Sampling = Literal["shuffled", "balanced"]
CROPS, SCHEDULES, SAMPLINGS = get_args(Crop), get_args(Schedule), get_args(Sampling)


def _is_int(value: Any, least: int) -> bool:
    return type(value) is int and least <= value < 2**32  # a seed's limit in numpy; products of two fit 64 bits


def _check(values, **valid):
    for field, is_valid in valid.items():
        if not is_valid:
            raise ValueError(f"{field} is out of its range. Received: {field}={getattr(values, field)!r}")


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random changes to each training image.

    Args:
        crop: `"scale_and_aspect"`, a part of the image of random size and aspect ratio, resized to the network's size
            (Szegedy et al. 2015, arXiv:1409.4842, section 6); `"pad"`, a random crop of the zero-padded image
            (He et al. 2015, arXiv:1512.03385, section 4.2); or `"none"`, the centre crop.
        area: For `"scale_and_aspect"`: the smallest and the largest share of the image's area.
        aspect: For `"scale_and_aspect"`: the smallest and the largest ratio of width to height.
        padding: For `"pad"`: pixels on each side.
        flip: Whether half of the images are mirrored left to right.
        rand_augment: Strength of two operations of `keras.layers.RandAugment` (arXiv:1909.13719), 0 to 1; 0 for none.
        cutout: Side in pixels of a square that is set to the mean; its centre is anywhere in the image
            (arXiv:1708.04552, section 3.2). 0 for none.
        mixup: alpha of `keras.layers.MixUp` (arXiv:1710.09412); 0 for none.
    """

    crop: Crop = "none"
    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    padding: int = 4
    flip: bool = False
    rand_augment: float = 0.0
    cutout: int = 0
    mixup: float = 0.0

    def __post_init__(self):
        _check(
            self,
            crop=self.crop in CROPS,
            area=len(self.area) == 2 and 0 < self.area[0] <= self.area[1] <= 1,
            aspect=len(self.aspect) == 2 and 0 < self.aspect[0] <= self.aspect[1] < math.inf,
            padding=_is_int(self.padding, 0),
            cutout=_is_int(self.cutout, 0),
            rand_augment=0 <= self.rand_augment <= 1,
            mixup=0 <= self.mixup < math.inf,
        )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train: SGD with momentum, a learning rate schedule and augmentation.

    Args:
        batch_size: Images in a step, over all replicas.
        learning_rate: The initial learning rate, or the one at the end of the warm-up.
        momentum: Argument of SGD.
        nesterov: Argument of SGD.
        weight_decay: L2 regularization of the kernels; biases and BatchNorm's parameters have none.
        schedule: The learning rate schedule. `"cosine"` ends at zero (arXiv:1608.03983, eq. 5, without restarts),
            `"steps"` multiplies it by `decay` after each number of epochs in `decay_epochs`, `"plateau"` whenever the
            held-out loss has not fallen for `patience` epochs.
        decay_epochs: See `schedule`.
        decay: See `schedule`.
        patience: See `schedule`.
        warmup_epochs: Epochs of linear warm-up before the cosine (arXiv:1706.02677, section 2.2).
        label_smoothing: Share of each label that is spread over all classes (arXiv:1512.00567, section 7).
        ema: Decay per step of the averaged weights, which are then evaluated and saved; 0 for none.
        frozen_batch_norm_epochs: Number of last epochs in which BatchNorm runs as in inference and is not trained.
        sampling: `"shuffled"`, or `"balanced"`: each class equally often (arXiv:1512.05830, section 4).
        seed: Seed of the initial weights, the order of the images and their augmentation.
        source: Where the values come from.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    schedule: Schedule = "cosine"
    decay_epochs: tuple[int, ...] = (30, 60, 90)
    decay: float = 0.1
    patience: int = 5
    warmup_epochs: int = 0
    label_smoothing: float = 0.0
    ema: float = 0.0
    frozen_batch_norm_epochs: int = 0
    sampling: Sampling = "shuffled"
    augmentation: Augmentation = Augmentation()
    seed: int = 0
    source: str

    def __post_init__(self):
        _check(
            self,
            epochs=_is_int(self.epochs, 1),
            batch_size=_is_int(self.batch_size, 1),
            seed=_is_int(self.seed, 0),
            decay_epochs=all(_is_int(epoch, 1) for epoch in self.decay_epochs)
            and list(self.decay_epochs) == sorted(set(self.decay_epochs)),
            patience=_is_int(self.patience, 1),
            warmup_epochs=_is_int(self.warmup_epochs, 0),
            frozen_batch_norm_epochs=_is_int(self.frozen_batch_norm_epochs, 0),
            learning_rate=0 < self.learning_rate < math.inf,
            momentum=0 <= self.momentum < 1,
            weight_decay=0 <= self.weight_decay < 1,
            decay=0 < self.decay < 1,
            label_smoothing=0 <= self.label_smoothing < 1,
            ema=0 <= self.ema < 1,
            schedule=self.schedule in SCHEDULES,
            sampling=self.sampling in SAMPLINGS,
        )
        warmup = self.warmup_epochs
        if warmup and self.schedule != "cosine":
            raise ValueError(
                f"warmup_epochs need schedule='cosine'. Received: warmup_epochs={warmup}, schedule={self.schedule!r}"
            )
        if warmup >= self.epochs:
            raise ValueError(f"warmup_epochs must be fewer than epochs. Received: {warmup} of {self.epochs}")
        if self.ema and self.frozen_batch_norm_epochs:
            raise ValueError(
                "ema and frozen_batch_norm_epochs exclude each other: freezing changes which weights are averaged. "
                f"Received: ema={self.ema}, frozen_batch_norm_epochs={self.frozen_batch_norm_epochs}"
            )

    def scaled_to(self, batch_size: int) -> "Recipe":
        """The recipe with another batch and the learning rate in proportion: arXiv:1706.02677, section 2.1."""
        at_batch = replace(self, batch_size=batch_size)  # checks the batch before the learning rate
        return replace(at_batch, learning_rate=self.learning_rate * batch_size / self.batch_size)


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a training is computed. The result is the same, except for rounding.

    Args:
        steps_per_execution: Steps between two checks of the clock, of signals and of the loss.
        accumulate: Number of parts of a replica's batch that are computed one after the other; BatchNorm sees one part
            at a time.
        jit_compile: Whether XLA compiles the forward and backward pass.
        checkpoint_steps: Steps between two checkpoints within an epoch; None for a checkpoint after each epoch only.
        corrupt_budget: Number of files that are skipped if they cannot be decoded; with more, training fails.
        cache: Whether the held-out images are kept in memory.
        service: Address of a tf.data service that prepares the images, such as `"grpc://host:5000"`.
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
            if value is not None and not _is_int(value, lowest):
                raise ValueError(f"{name} must be an int of at least {lowest}. Received: {name}={value!r}")


_IMAGENET_CROPS = Augmentation(crop="scale_and_aspect", flip=True)
_CIFAR_CROPS = Augmentation(crop="pad", padding=4, flip=True)
_DECAY = "weight decay is not stated there, 1e-4 is that of ResNet's authors (arXiv:1512.03385, section 3.4)"

DIGITS = Recipe(
    epochs=15,
    batch_size=32,
    learning_rate=0.05,
    label_smoothing=0.1,
    source="this project's own, for 8x8 digits; momentum and smoothing as in arXiv:1709.01507",
)
PAPER_IMAGENET = Recipe(
    epochs=100,
    batch_size=1024,
    learning_rate=0.6,
    weight_decay=1e-4,
    schedule="steps",
    augmentation=_IMAGENET_CROPS,
    source=f"arXiv:1709.01507, section 5.1; {_DECAY}; crops of 8 to 100 % and 3/4 to 4/3 as its repository has them",
)
# A checkpoint resumes only with the same recipe, source included. A changed text here breaks all unfinished runs.
RECIPES: dict[str, Recipe] = {
    "digits": DIGITS,
    "paper_imagenet": PAPER_IMAGENET,
    "paper_mobile": replace(
        PAPER_IMAGENET,
        epochs=400,
        batch_size=256,
        learning_rate=0.1,
        weight_decay=4e-5,
        schedule="plateau",
        augmentation=replace(_IMAGENET_CROPS, area=(0.25, 1.0)),
        source="arXiv:1709.01507, section 5.1: momentum, batch, the learning rate and its plateaus, some 400 epochs, "
        "and milder augmentation, as ShuffleNet's authors; weight decay is theirs (arXiv:1707.01083, section 4). What "
        "a plateau is and how mild the crops are is not stated: 5 epochs and at least 25 % are this project's",
    ),
    "paper_cifar": Recipe(
        epochs=164,
        batch_size=128,
        learning_rate=0.1,
        weight_decay=1e-4,
        schedule="steps",
        decay_epochs=(82, 123),
        augmentation=_CIFAR_CROPS,
        source="arXiv:1709.01507, section 5.1, trains as each network's authors: arXiv:1603.05027, appendix, for the "
        "pre-activation ResNets (64k steps, a tenth after 32k and 48k), without its first 400 steps at 0.01",
    ),
    "paper_cifar_wide": Recipe(
        epochs=200,
        batch_size=128,
        learning_rate=0.1,
        nesterov=True,
        weight_decay=5e-4,
        schedule="steps",
        decay_epochs=(60, 120, 160),
        decay=0.2,
        augmentation=_CIFAR_CROPS,
        source="arXiv:1709.01507, section 5.1, trains as each network's authors: arXiv:1605.07146, section 3",
    ),
    "paper_cifar_shake": Recipe(
        epochs=1800,
        batch_size=128,
        learning_rate=0.2,
        weight_decay=1e-4,
        augmentation=replace(_CIFAR_CROPS, cutout=16),
        source="arXiv:1709.01507, section 5.1, trains as each network's authors: arXiv:1705.07485, section 2.2; with "
        "Cutout (Tables 4 and 5), of 16 pixels as its authors' repository for CIFAR-10; for CIFAR-100 they are 8",
    ),
    "senet154": replace(
        PAPER_IMAGENET,
        batch_size=2048,
        learning_rate=1.0,
        label_smoothing=0.1,
        frozen_batch_norm_epochs=5,
        source="arXiv:1709.01507, appendix: batch, learning rate, label smoothing, BatchNorm fixed in the last few "
        f"epochs (5 is this project's) and dropout of 0.2, which is the network's; else as paper_imagenet; {_DECAY}",
    ),
    "ablation": replace(
        PAPER_IMAGENET,
        epochs=300,
        batch_size=256,
        learning_rate=0.1,
        schedule="plateau",
        label_smoothing=0.1,
        source="arXiv:1709.01507, section 6: learning rate, plateaus, some 300 epochs, label smoothing; give the "
        f"network SEConfig(bias=False). Batch: 256 on one server, as its repository says; a plateau of 5 epochs is "
        f"this project's, and the learning rate falls at each, where the paper repeats its cycle three times; {_DECAY}",
    ),
    "places365": replace(
        PAPER_IMAGENET,
        source="arXiv:1709.01507, section 5.2, follows the protocols of the Places365 networks and of "
        "arXiv:1512.05830, and states no figures: all values are those of paper_imagenet",
    ),
    "modern": Recipe(
        epochs=350,
        batch_size=4096,
        learning_rate=1.6,
        weight_decay=4e-5,
        warmup_epochs=5,
        label_smoothing=0.1,
        ema=0.9999,
        augmentation=replace(_IMAGENET_CROPS, rand_augment=0.5, mixup=0.2),
        source="ResNet-RS, arXiv:2103.07579, section 4 and appendix: epochs, batch, learning rate, cosine, warm-up, "
        "weight decay, label smoothing, average, RandAugment of two operations (0.5 is Keras' own strength); without "
        "its dropout and stochastic depth. mixup, which it has not, from arXiv:1710.09412, section 3.1",
    ),
}
