"""What is written beside an export: what it is, what made it, and how well it agrees with the model it came from."""

import itertools
import math
from dataclasses import asdict

import numpy as np

from se_keras.environment import versions
from se_keras.storage import sha256


def manifest(*, network, precision, signature, lowering, agreement, held_out, **more):
    """The manifest as a dict for JSON.

    Args:
        network: Name of the model.
        precision: Name of the precision.
        signature: `{"inputs": {name: {"shape", "dtype"}}, "outputs": ...}`.
        lowering: A `Lowering`, or None for a model exported as published.
        agreement: An `Agreement` with the Keras model.
        held_out: Whether it was measured on inputs that calibration did not see.
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


_RULE = (
    "x becomes (1664525 x + 1013904223) mod 2^32, beginning with the seed; each value is low + (high - low) x / 2^32 "
    "in double precision, rounded down for integers; last axis first; the checksum is of the bytes, little-endian"
)


# As a share of the largest output. In float32 other kernels add in another order: 3e-7 on the digits between XNNPACK
# and LiteRT's reference. Integers are exact, but other kernels round sums elsewhere, and a step of one unit grows
# through the layers: 0.04 between the same two.
_TOLERANCE = {"float32": 1e-4}


_TOLERANCE_OF_OTHERS = 0.1


_VALUES = 64


def reference_outputs(runner, *, low, high, precision, shape=None, seed=0):
    """What `runner` makes of noise in `low` to `high`, as a dict for JSON; `reference_error` compares another run with it.

    Of an output of more than 64 values, every second one is kept, or every third, and so on.

    Args:
        runner: A `Runner`.
        low, high: Range of the pixels that the network is used to; integers take all of their own.
        precision: Name of the precision, for the tolerance.
        shape: Of the input, batch first; default: the runner's.
        seed: Of the noise.
    """
    dtype = runner.input_dtype
    if dtype.kind in "iu":
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max + 1
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
        "tolerance": _TOLERANCE.get(precision, _TOLERANCE_OF_OTHERS),
    }
    images = _images(record["input"])
    record["input"]["sha256"] = sha256(images.tobytes())
    for name, values in runner(images).items():
        every = math.ceil(values.size / _VALUES)
        # The shortest decimals that are these numbers.
        record["outputs"][name] = {"every": every, "values": [float(str(x)) for x in values.reshape(-1)[::every]]}
    return record


def reference_error(runner, record):
    """How far the outputs of `runner` are from the golden ones: the largest difference as a share of the largest value.

    Infinitely far where one of them is not a number.

    Raises:
        ValueError: If the input cannot be made again, or if the outputs are others.
    """
    images = _images(record["input"])
    if sha256(images.tobytes()) != record["input"]["sha256"]:
        raise ValueError("The golden input cannot be made again: its SHA-256 is not the manifest's")
    outputs, worst = runner(images), 0.0
    if sorted(outputs) != sorted(record["outputs"]):
        raise ValueError(f"The golden outputs are {sorted(record['outputs'])}. Received: {sorted(outputs)}")
    for name, kept in record["outputs"].items():
        actual = outputs[name].reshape(-1)[:: kept["every"]]
        expected = np.asarray(kept["values"], dtype=actual.dtype)
        if actual.shape != expected.shape:
            raise ValueError(f"{name} has {expected.size} golden values. Received: {actual.size}")
        if not np.isfinite(actual).all():
            return math.inf
        difference = np.abs(actual.astype("float64") - expected).max()
        worst = max(worst, float(difference / (np.abs(expected).max() or 1)))
    return worst


def _images(recipe):
    steps = itertools.accumulate(
        range(math.prod(recipe["shape"])), lambda x, _: (1664525 * x + 1013904223) % 2**32, initial=recipe["seed"]
    )
    uniform = np.fromiter(itertools.islice(steps, 1, None), dtype="float64") / 2**32
    dtype = np.dtype(recipe["dtype"]).newbyteorder("<")
    values = recipe["low"] + (recipe["high"] - recipe["low"]) * uniform
    return (np.floor(values) if dtype.kind in "iu" else values).astype(dtype).reshape(recipe["shape"])
