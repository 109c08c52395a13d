"""Data to train on. So far the digits of scikit-learn, which are real, small and installed with it."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Images `(samples, height, width, channels)`, float32, and their labels `(samples,)`."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self):
        return len(self.images)


@dataclass(frozen=True, kw_only=True, eq=False)
class Data:
    """A data set: what to learn from, what to be judged by, and the names of the classes."""

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]


def digits():
    """1,797 scans of handwritten digits, 8x8 pixels in 0..1; every class gives a fifth of its scans to the test.

    Source: https://archive.ics.uci.edu/dataset/80, as shipped with scikit-learn.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans = load_digits()
    images = (scans.images[..., None] / 16).astype("float32")
    labels = scans.target.astype("int32")
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    return Data(
        name="digits",
        train=Split(images=images[train], labels=labels[train]),
        test=Split(images=images[test], labels=labels[test]),
        classes=tuple(map(str, scans.target_names)),
    )


DATA = {"digits": digits}


def load(name):
    """Loads a data set by name.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in DATA:
        raise ValueError(f"data must be one of {tuple(DATA)}. Received: {name!r}")
    return DATA[name]()
