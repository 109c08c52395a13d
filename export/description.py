"""The description of an exported model: labels, normalization, training; and the manifest, which also has versions."""

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NotRequired, TypedDict

import numpy as np

from se_keras.environment import versions
from se_keras.errors import first_line
from se_keras.normalization import Normalization
from se_keras.storage import sha256
from se_keras.typing import Array, Json, Outputs
from se_keras.wording import counted

from .lowering import Lowering
from .outputs import Agreement, integer_range

LABELS_FILE = "labels.txt"


class TensorRecord(TypedDict):
    """An input or output in a signature; a free size is None."""

    shape: list[int | None]
    dtype: str


class Signature(TypedDict):
    """Inputs and outputs by name."""

    inputs: dict[str, TensorRecord]
    outputs: dict[str, TensorRecord]


class ReferenceInput(TypedDict):
    """How the images of the reference outputs are made."""

    seed: int
    low: float
    high: float
    shape: list[int]
    dtype: str
    sha256: str


class ReferenceValues(TypedDict):
    """Every so many-th value of an output."""

    every: int
    values: list[float]


class ReferenceRecord(TypedDict):
    """What `reference_outputs` returns."""

    input: ReferenceInput
    outputs: dict[str, ReferenceValues]
    tolerance: float


class Manifest(TypedDict):
    """The manifest of an export, as far as it is read."""

    network: str
    precision: str
    signature: NotRequired[Signature]
    golden: NotRequired[ReferenceRecord]
    versions: NotRequired[dict[str, str]]


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """The description of an exported model, which a .tflite file and a SavedModel contain.

    Args:
        network: Name of the network.
        precision: Name of the precision; "unknown" in files that other programs made.
        labels: Names of the classes, in the order of the outputs; None if unknown.
        normalization: `(mean, std)`, each with one value or one for each channel: the network takes
            (pixel - mean) / std of pixels in 0 to 255. None if unknown. MediaPipe 1.2 opens a float file only if mean
            and std have one value each.
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

    def completed(self) -> "Metadata":
        """The description with the labels and the normalization of its training record, where it has none itself."""
        known = known_from(self.training)
        return replace(
            self,
            labels=self.labels or known.get("labels"),
            normalization=self.normalization or known.get("normalization"),
        )


def known_from(run: Json | None) -> Json:
    """The `labels`, and the `normalization` of pixels in 0 to 255, that the record of a run has (run.json)."""
    run, known = run or {}, {}
    classes = run.get("classes")
    if isinstance(classes, (list, tuple)) and classes and all(isinstance(name, str) for name in classes):
        known["labels"] = tuple(classes)
    recorded = run.get("pixels") or run.get("normalization")  # runs of version 0.1 have only the latter
    if isinstance(recorded, dict) and {"mean", "std"} <= recorded.keys():
        found = Normalization.of((recorded["mean"], recorded["std"]), channels=np.size(recorded["mean"]))
        of_digits = run.get("data") == "digits" and "pixels" not in run  # whose pixels are in 0 to 1
        known["normalization"] = found.scaled(255) if of_digits else found
    return known


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
    default: Normalization | None = None,
    override: bool = False,
) -> Metadata:
    """Checks what a user says about a model, and returns it with what is known already.

    Args:
        network: Name of the network.
        precision: Name of the precision.
        channels: Number of channels of the input.
        classes: Number of classes; None for a network that does not classify.
        labels: Names of the classes. Default: those in `training`.
        normalization: `(mean, std)`, each a number or one for each channel. Default: that in `training`.
        training: How the network was trained, for JSON, such as the content of run.json.
        converted: The metadata of the same network in another precision: defaults for the last three arguments.
        default: The normalization if nothing else says one.
        override: Whether labels and a normalization are taken that contradict `training`.

    Raises:
        TypeError, ValueError: If an argument is not valid, does not fit the number of channels or classes, or
            contradicts what is known.
    """
    base = converted or Metadata(network=network, precision=precision)
    if training is not None:
        base = replace(base, training=_training(training))
    recorded = known_from(base.training)
    known = {"labels": base.labels or recorded.get("labels"), "normalization": base.normalization}
    known["normalization"] = known["normalization"] or recorded.get("normalization") or default
    if classes is None:
        known["labels"] = None
    given = {"labels": labels, "normalization": normalization}
    checks = {
        "labels": lambda names: _labels(names, classes),
        "normalization": lambda pair: Normalization.of(pair, channels=channels),
    }
    for name, check in checks.items():
        if given[name] is not None:
            known[name] = agreed(name, check(given[name]), recorded.get(name), override=override)
        elif known[name] is not None:
            known[name] = check(known[name])
    return replace(base, network=network, precision=precision, **known)


def agreed(what: str, given: Any, known: Any, *, override: bool = False) -> Any:
    """Labels or a normalization that a user gives for a model of which something is known from its training.

    Returns what is known if `given` is the same, and `given` if nothing is known or with `override`. Else raises
    ValueError with the difference.
    """
    if known is None or override:
        return given
    if isinstance(known, Normalization):
        difference = None if known.agrees(given) else f"{_text(known)}. Received: {_text(given)}"
    else:
        pairs = enumerate(itertools.zip_longest(known, given))
        difference = next((f"class {i} is {a!r}. Received: {b!r}" for i, (a, b) in pairs if a != b), None)
    if difference:
        rule = f"The {what} must be as in its training, unless override=True (--override)"
        raise ValueError(f"{rule}: {difference}")
    return known


def _text(normalization: Normalization) -> str:
    mean, std = (", ".join(f"{value:.6g}" for value in values) for values in normalization)
    return f"(pixel - ({mean})) / ({std})"


def _labels(labels: Any, classes: int | None) -> tuple[str, ...]:
    if not isinstance(labels, Iterable) or isinstance(labels, str) or not all(isinstance(x, str) for x in labels):
        raise TypeError(f"labels must be a sequence of strings. Received: labels={labels!r}")
    labels = tuple(map(str, labels))  # strings of numpy become Python's
    if len(labels) != classes:
        has = "no classes" if classes is None else counted(classes, "class")
        raise ValueError(
            f"labels must name each class once: the network has {has}. Received: {counted(len(labels), 'label')}"
        )
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
        record = json.loads(json.dumps(training, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise type(error)(f"training must be a dict for JSON: {first_line(error)}") from None
    if os.path.isabs(str(record.get("source"))):  # of the machine that trained: it is not for those who get the file
        del record["source"]
    return record


_RULE = (
    "x becomes (1664525 x + 1013904223) mod 2^32, beginning with the seed; each value is low + (high - low) x / 2^32 "
    "in double precision, rounded down for integers; last axis first; the checksum is of the bytes, little-endian"
)


# Largest accepted error, as a share of the largest output. Kernels add in different orders: on the digits, XNNPACK and
# LiteRT's reference kernels differ by 3e-7 in float32. Sums of integers are exact, but kernels round them differently,
# and a difference of one step grows through the layers: the same kernels differ by 0.04.
_FLOAT32_TOLERANCE = 1e-4
_OTHER_TOLERANCE = 0.1
_VALUES = 64  # kept of each output
_LARGEST_INPUT = 2**25  # values; eleven images of 1000x1000, made in ten seconds


def manifest(
    *,
    network: str,
    precision: str,
    signature: Json,
    lowering: Lowering | None,
    agreement: Agreement,
    held_out: bool,
    **more: Any,
) -> Json:
    """The manifest as a dict for JSON.

    Args:
        network: Name of the model.
        precision: Name of the precision.
        signature: `{"inputs": {name: {"shape", "dtype"}}, "outputs": ...}`.
        lowering: None for a model that was exported as published.
        agreement: How well the export agrees with the Keras model.
        held_out: Whether `agreement` was measured on images that were not used for calibration.
        **more: Further entries.
    """
    return {
        "schema": 1,
        "network": network,
        "precision": precision,
        "signature": signature,
        "lowering": lowering and lowering.counts(),
        "agreement": asdict(agreement) | {"held_out": held_out},
        **more,
        "versions": versions(),
    }


def reference_outputs(
    runner: Any, *, low: float, high: float, precision: str, shape: Sequence[int] | None = None, seed: int = 0
) -> Json:
    """The outputs of `runner` for random images, as a dict for JSON. `reference_error` compares another run with it.

    At most 64 values of each output are kept, evenly spaced.

    Args:
        runner: Runs the exported model: a `LiteRTRunner` or a `SavedModelRunner`.
        low: Lowest value of the images. Ignored for an integer input, which takes its `integer_range`.
        high: Highest value of the images. Likewise.
        precision: Name of the precision, which determines the tolerance.
        shape: Shape of the images, batch first. Default: the runner's.
        seed: Seed of the random images.
    """
    dtype = runner.input_dtype
    limits = integer_range(dtype)
    if limits is not None:
        low, high = limits[0], limits[1] + 1
    record = {
        "input": {
            "rule": _RULE,
            "seed": seed,
            "low": float(low),
            "high": float(high),
            "shape": list(shape or runner.input_shape),
            "dtype": dtype.name,
        },
        "outputs": {},
        "tolerance": _FLOAT32_TOLERANCE if precision == "float32" else _OTHER_TOLERANCE,
    }
    images = _images(record["input"])
    record["input"]["sha256"] = sha256(images.tobytes())
    for name, values in runner(images).items():
        every = math.ceil(values.size / _VALUES)
        # str() gives the shortest decimal that is the same float32.
        record["outputs"][name] = {"every": every, "values": [float(str(x)) for x in values.reshape(-1)[::every]]}
    return record


def reference_error(runner: Callable[[Array], Outputs], record: Json) -> float:
    """The largest difference from the reference outputs, divided by the largest absolute value of that output.

    Infinite if an output is not finite.

    Args:
        runner: Runs the exported model.
        record: What `reference_outputs` returned.

    Raises:
        ValueError: If the input cannot be reproduced, or if names or sizes of the outputs differ.
    """
    images = _images(record["input"])
    if sha256(images.tobytes()) != record["input"]["sha256"]:
        raise ValueError("The reference input cannot be reproduced: its SHA-256 differs from the manifest's")
    outputs, largest = runner(images), 0.0
    if sorted(outputs) != sorted(record["outputs"]):
        raise ValueError(f"The reference outputs are {sorted(record['outputs'])}. Received: {sorted(outputs)}")
    for name, reference in record["outputs"].items():
        actual = outputs[name].reshape(-1)[:: reference["every"]]
        expected = np.asarray(reference["values"], dtype=actual.dtype)
        if actual.shape != expected.shape:
            raise ValueError(f"{name} has {expected.size} reference values. Received: {actual.size}")
        if not np.isfinite(actual).all():
            return math.inf
        difference = np.abs(actual.astype("float64") - expected).max()
        largest = max(largest, float(difference / (np.abs(expected).max() or 1)))
    return largest


def _images(recipe: Json) -> Array:
    """The images that a record describes by its `rule`."""
    if math.prod(recipe["shape"]) > _LARGEST_INPUT:
        raise ValueError(f"The reference input has more than {_LARGEST_INPUT:,} values. Received: {recipe['shape']}")
    states = itertools.accumulate(
        range(math.prod(recipe["shape"])), lambda x, _: (1664525 * x + 1013904223) % 2**32, initial=recipe["seed"]
    )
    uniform = np.fromiter(itertools.islice(states, 1, None), dtype="float64") / 2**32
    dtype = np.dtype(recipe["dtype"]).newbyteorder("<")
    values = recipe["low"] + (recipe["high"] - recipe["low"]) * uniform
    return (np.floor(values) if dtype.kind in "iu" else values).astype(dtype).reshape(recipe["shape"])
