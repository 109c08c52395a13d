"""Hyperparameters as values, each with its source."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train: SGD with momentum, and a learning rate that falls to zero along a cosine.

    Args:
        epochs: Passes over the training images.
        batch_size: Images in a step.
        learning_rate: The first; arXiv:1608.03983, eq. 5, without restarts, takes it to zero.
        momentum: Of SGD.
        label_smoothing: Share of each label that is spread over all classes.
        seed: Of the initial weights and of the order of the images.
        source: Where the values come from.

    Raises:
        ValueError: If a value is out of its range.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    momentum: float = 0.9
    label_smoothing: float = 0.0
    seed: int = 0
    source: str

    def __post_init__(self):
        for field, fits in {
            "epochs": type(self.epochs) is int and self.epochs >= 1,
            "batch_size": type(self.batch_size) is int and self.batch_size >= 1,
            "seed": type(self.seed) is int and self.seed >= 0,
            "learning_rate": 0 < self.learning_rate < float("inf"),
            "momentum": 0 <= self.momentum < 1,
            "label_smoothing": 0 <= self.label_smoothing < 1,
        }.items():
            if not fits:
                raise ValueError(f"{field} is out of its range. Received: {field}={getattr(self, field)}")


DIGITS = Recipe(
    epochs=15,
    batch_size=32,
    learning_rate=0.05,
    label_smoothing=0.1,
    source="this project's own, for 8x8 digits; momentum and smoothing as in arXiv:1709.01507",
)
