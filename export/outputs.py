"""Agreement of two models: how much their outputs on the same images differ."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from se_keras.typing import Array, Outputs
from se_keras.wording import counted

FREE_SIZE = 64  # of images, if a model leaves their size free
LEAST_PROBABILITY = 1e-30  # smaller ones are treated as this; the smallest normal float32 is 1e-38


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How well the `actual` outputs of a model agree with the `expected` ones. Several outputs are concatenated.

    Args:
        samples: Number of images.
        max_error: The largest absolute difference, as a share of the range of `expected`.
        mean_error: The mean absolute difference, as a share of the same range.
        cosine: Cosine of the angle between both outputs, each as one vector.
        top1: Share of the images whose largest output is the same.
    """

    samples: int
    max_error: float
    mean_error: float
    cosine: float
    top1: float

    def __str__(self) -> str:
        return (
            f"max error {self.max_error:.1e} and mean error {self.mean_error:.1e} of the range, "
            f"cosine {self.cosine:.6f}, top-1 agreement {self.top1:.1%} on {counted(self.samples, 'image')}"
        )


def agreement(expected: Outputs, actual: Outputs, *, as_logits: bool = False) -> Agreement:
    """Compares the outputs of two models on the same images: `{name: array}`, each array `(samples, ...)`.

    Args:
        expected: Outputs of the reference model.
        actual: Outputs of the other model.
        as_logits: Whether to compare probabilities as logits, which are known up to a constant. Near 0 and 1 a softmax
            hides every difference, and where two classes tie it doubles the smallest difference. Not for quantized
            probabilities: most of them are 0, which has no logit.

    Raises:
        ValueError: If names or shapes differ, or if a value is not finite.
    """
    shapes = [{name: tuple(x.shape) for name, x in sorted(side.items())} for side in (expected, actual)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"The outputs differ in name or shape. Received: {shapes[0]} and {shapes[1]}")
    a, b = (
        np.concatenate([_rows(side[name], as_logits=as_logits) for name in shapes[0]], axis=1)
        for side in (expected, actual)
    )
    for side, values in (("expected", a), ("actual", b)):
        if not np.isfinite(values).all():
            raise ValueError(
                f"The {side} outputs are not finite: {counted(np.count_nonzero(~np.isfinite(values)), 'value')}"
            )
    difference = np.abs(a - b)
    extent = max(np.ptp(a), np.finfo("float32").tiny)
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return Agreement(
        samples=len(a),
        max_error=float(difference.max() / extent),
        mean_error=float(difference.mean() / extent),
        cosine=float((a * b).sum() / norms) if norms else float(np.array_equal(a, b)),
        top1=float((a.argmax(axis=1) == b.argmax(axis=1)).mean()),
    )


def logit_range(probabilities: Array) -> float:
    """The range of the logits of probabilities, up to a constant for each sample."""
    return float(np.ptp(_rows(probabilities, as_logits=True)))


def _rows(values: Array, *, as_logits: bool) -> Array:
    """One output as rows of float64."""
    rows = np.asarray(values, dtype="float64").reshape(len(values), -1)
    if not as_logits:
        return rows
    logits = np.log(np.maximum(rows, LEAST_PROBABILITY))
    return logits - logits.mean(axis=1, keepdims=True)


def noise(shape: Sequence[int], *, samples: int = 4, seed: int = 0, dtype: Any = "float32") -> Array:
    """Standard normal images, `(samples, *shape)`: to compare models without real images.

    For an input of integers, uniform ones in their `integer_range`.
    """
    random, limits = np.random.default_rng(seed), integer_range(dtype)
    if limits is None:
        return random.normal(size=(samples, *shape)).astype("float32")
    return random.integers(*limits, size=(samples, *shape), dtype=np.dtype(dtype), endpoint=True)


def integer_range(dtype: Any) -> tuple[int, int] | None:
    """Lowest and highest value of images of integers; None for other types.

    Those of 8 and 16 bits take all values of their type. Wider ones are the type of pixels that were converted.
    """
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if not name.startswith(("int", "uint")):  # bfloat16 is unknown to numpy
        return None
    limits = np.iinfo(name)
    return (int(limits.min), int(limits.max)) if limits.bits <= 16 else (0, 255)


def as_integers(images: Array, dtype: Any) -> Array:
    """Images as an input of integers takes them: rounded and clipped. Unchanged for another `dtype`."""
    if integer_range(dtype) is None or images.dtype == dtype:
        return images
    limits = np.iinfo(dtype)
    return np.clip(np.rint(images.astype("float64")), limits.min, limits.max).astype(dtype)


def in_batches(run: Callable[[Any], Mapping[Any, Any]], images: Array, *, size: int | None = None) -> Outputs:
    """Runs `run` on batches of `images`, to save memory, and concatenates its outputs: `{name: array}`.

    Args:
        run: From a batch of images to its outputs.
        images: `(samples, ...)`.
        size: The batch size that `run` requires: a smaller last batch is padded, and the outputs of the padding are
            dropped. Default: 8, and the last batch may be smaller.
    """
    step, results = size or 8, []
    for start in range(0, len(images), step):
        batch = images[start : start + step]
        if size and len(batch) < size:
            batch = np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), axis=0)])
        results.append(run(batch))
    return {name: np.concatenate([np.asarray(x[name]) for x in results])[: len(images)] for name in results[0]}
