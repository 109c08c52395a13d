"""What a model says about itself: labels, normalization, training."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace

from se_keras.errors import first_line
from se_keras.normalization import Normalization


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """What a .tflite file says about itself.

    Args:
        network: Name of the network.
        precision: Name of the precision.
        labels: Names of the classes, in the order of the outputs; None where they are not told.
        normalization: `(mean, std)`, each of one value or one for each channel: the network takes (pixel - mean) / std
            of pixels in 0 to 255. None where it is not told. MediaPipe 1.2 opens a float file only with one value.
        training: How the network was trained, as JSON has it.
    """

    network: str
    precision: str
    labels: tuple[str, ...] | None = None
    normalization: Normalization | None = None
    training: dict | None = None

    def __post_init__(self):
        if self.normalization is not None:
            object.__setattr__(self, "normalization", Normalization(*self.normalization))


def describe(*, network, precision, channels, classes, labels=None, normalization=None, training=None, converted=None):
    """Metadata from what a user gives, checked.

    Args:
        network, precision: Names.
        channels: Of the input.
        classes: Number of the classes; None for a network that does not classify.
        labels: A sequence of strings.
        normalization: `(mean, std)`, each a number or one for each channel.
        training: A dict for JSON.
        converted: `Metadata` of another precision, for what is not given.

    Raises:
        TypeError, ValueError: If one of them is not that, or if their numbers do not fit.
    """
    given = {
        "labels": labels if labels is None else _labels(labels, classes),
        "normalization": normalization if normalization is None else Normalization.of(normalization, channels=channels),
        "training": training if training is None else _training(training),
    }
    base = converted or Metadata(network=network, precision=precision)
    known = {field: value for field, value in given.items() if value is not None}
    return replace(base, network=network, precision=precision, **known)


def _labels(labels, classes):
    if not isinstance(labels, Iterable) or isinstance(labels, str) or not all(isinstance(x, str) for x in labels):
        raise TypeError(f"labels must be a sequence of strings. Received: labels={labels!r}")
    labels = tuple(map(str, labels))  # numpy's strings too
    if len(labels) != classes:
        has = "no classes" if classes is None else f"{classes} classes"
        raise ValueError(f"labels must name each class once: the network has {has}. Received: {len(labels)} labels")
    bad = next((label for label in labels if label.splitlines() != [label] or label != label.strip()), None)
    if bad is not None:
        raise ValueError(f"A label is one line of text without space around it. Received: {bad!r}")
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise ValueError(f"Labels must differ: an app could not tell their classes apart. Received: {twice!r} twice")
    return labels


def _training(training):
    if not isinstance(training, dict):
        raise TypeError(f"training must be a dict for JSON. Received: {type(training).__name__}")
    try:
        return json.loads(json.dumps(training, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise type(error)(f"training must be a dict for JSON: {first_line(error)}") from None


LABELS_FILE = "labels.txt"
