"""Agreement of two artefacts: how far apart their outputs are on the same images."""

from dataclasses import dataclass

import numpy as np

LEAST_PROBABILITY = 1e-30  # that is told from 0; float32 ends at 1e-38


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How well `actual` follows `expected`.

    Args:
        samples: Number of images.
        max_error: Largest absolute difference, as a share of the range of `expected`.
        mean_error: Mean absolute difference, likewise.
        cosine: Cosine of the angle between the two as vectors.
        top1: Share of the images with the same largest output.

    Several outputs count as one long one.
    """

    samples: int
    max_error: float
    mean_error: float
    cosine: float
    top1: float

    def __str__(self):
        return (
            f"max error {self.max_error:.1e} and mean error {self.mean_error:.1e} of the range, "
            f"cosine {self.cosine:.6f}, top-1 agreement {self.top1:.1%} on {self.samples} images"
        )


def agreement(expected, actual, *, in_steps=False):
    """Compares the outputs of two artefacts on the same images: `{name: array}`, each array `(samples, ...)`.

    Outputs named `probabilities` are compared as the logits that they came from, up to a constant: a softmax near 0 and
    1 would hide every difference, and double the smallest one where two classes tie. Where outputs come `in_steps`, as
    those of integer files do, most of a softmax's are 0, which has no logit: they are compared as they are.

    Raises:
        ValueError: If their names or shapes differ, or if a value is not finite.
    """
    shapes = [{name: tuple(x.shape) for name, x in sorted(side.items())} for side in (expected, actual)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"The outputs differ in name or shape. Received: {shapes[0]} and {shapes[1]}")
    expected, actual = (
        np.concatenate([_comparable("" if in_steps else name, side[name]) for name in shapes[0]], axis=1)
        for side in (expected, actual)
    )
    for side, values in (("expected", expected), ("actual", actual)):
        if not np.isfinite(values).all():
            raise ValueError(f"The {side} outputs are not finite: {np.count_nonzero(~np.isfinite(values))} values")
    difference = np.abs(expected - actual)
    extent = max(np.ptp(expected), np.finfo("float32").tiny)
    norms = np.linalg.norm(expected) * np.linalg.norm(actual)
    return Agreement(
        samples=len(expected),
        max_error=float(difference.max() / extent),
        mean_error=float(difference.mean() / extent),
        cosine=float((expected * actual).sum() / norms) if norms else float(np.array_equal(expected, actual)),
        top1=float((expected.argmax(axis=1) == actual.argmax(axis=1)).mean()),
    )


def logit_range(outputs):
    """The range of the logits behind outputs named `probabilities`; None if there are none."""
    found = outputs.get("probabilities")
    return None if found is None else float(np.ptp(_comparable("probabilities", found)))


def _comparable(name, values):
    """One output as rows of float64."""
    rows = np.asarray(values, dtype="float64").reshape(len(values), -1)
    if name != "probabilities":
        return rows
    logits = np.log(np.maximum(rows, LEAST_PROBABILITY))
    return logits - logits.mean(axis=1, keepdims=True)


def noise(shape, *, samples=4, seed=0):
    """Seeded standard normal images, `(samples, *shape)`: to compare on where no real ones are given."""
    return np.random.default_rng(seed).normal(size=(samples, *shape)).astype("float32")


def in_batches(run, images, *, size=None):
    """Outputs of `run`, `{name: array}`, for `images`, a few at a time: all at once would hold every layer of each.

    `size` is the batch that `run` insists on: a last one that is smaller is filled up, and the surplus cut off again.
    """
    step, results = size or 8, []
    for start in range(0, len(images), step):
        batch = images[start : start + step]
        if size and len(batch) < size:
            batch = np.concatenate([batch, np.repeat(batch[-1:], size - len(batch), axis=0)])
        results.append(run(batch))
    return {name: np.concatenate([np.asarray(x[name]) for x in results])[: len(images)] for name in results[0]}
