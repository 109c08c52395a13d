"""How an exported model describes itself: labels, normalization, training."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from se_keras.errors import first_line
from se_keras.normalization import Normalization
from se_keras.typing import Json

LABELS_FILE = "labels.txt"


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """The description of an exported model, which a .tflite file and a SavedModel contain.

    Args:
        network: Name of the network.
        precision: Name of the precision; "unknown" in files of other programs.
        labels: Names of the classes, in the order of the outputs; None if unknown.
        normalization: `(mean, std)`, each with one value or one for each channel: the network takes
            (pixel - mean) / std of pixels in 0 to 255. None if unknown. MediaPipe 1.2 opens a float file only if each
            has one value.
        training: How the network was trained, as a dict for JSON.
    """

    network: str
    precision: str
    labels: tuple[str, ...] | None = None
    normalization: Normalization | None = None
    training: Json | None = None

    def __post_init__(self):
        if self.normalization is not None:
            object.__setattr__(self, "normalization", Normalization(*self.normalization))


def describe(
    *,
    network: str,
    precision: str,
    channels: int,
    classes: int | None,
    labels: Iterable[str] | None = None,
    normalization: Any = None,
    training: Json | None = None,
    converted: Metadata | None = None,
) -> Metadata:
    """Checks what a user says about a model, and returns it as `Metadata`.

    Args:
        network: Name of the network.
        precision: Name of the precision.
        channels: Number of channels of the input.
        classes: Number of classes; None for a network that does not classify.
        labels: Names of the classes.
        normalization: `(mean, std)`, each a number or one for each channel.
        training: How the network was trained, for JSON.
        converted: The metadata of the same network in another precision: defaults for the last three arguments.

    Raises:
        TypeError, ValueError: If an argument is not valid, or does not fit the number of channels or classes.
    """
    known: Any = {}
    if labels is not None:
        known["labels"] = _labels(labels, classes)
    if normalization is not None:
        known["normalization"] = Normalization.of(normalization, channels=channels)
    if training is not None:
        known["training"] = _training(training)
    base = converted or Metadata(network=network, precision=precision)
    return replace(base, network=network, precision=precision, **known)


def _labels(labels: Any, classes: int | None) -> tuple[str, ...]:
    if not isinstance(labels, Iterable) or isinstance(labels, str) or not all(isinstance(x, str) for x in labels):
        raise TypeError(f"labels must be a sequence of strings. Received: labels={labels!r}")
    labels = tuple(map(str, labels))  # strings of numpy become Python's
    if len(labels) != classes:
        has = "no classes" if classes is None else f"{classes} classes"
        raise ValueError(f"labels must name each class once: the network has {has}. Received: {len(labels)} labels")
    bad = next((label for label in labels if label.splitlines() != [label] or label != label.strip()), None)
    if bad is not None:
        raise ValueError(f"A label is one line of text without space around it. Received: {bad!r}")
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise ValueError(f"Labels must differ: an app identifies a class by its label. Received: {twice!r} twice")
    return labels


def _training(training: Any) -> Json:
    if not isinstance(training, dict):
        raise TypeError(f"training must be a dict for JSON. Received: {type(training).__name__}")
    try:
        return json.loads(json.dumps(training, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise type(error)(f"training must be a dict for JSON: {first_line(error)}") from None
