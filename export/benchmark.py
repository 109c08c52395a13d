"""Times two callables in pairs, so that the ratio holds where the clock drifts. Knows no models.

A block runs A, B and A's double once each, in random order, and yields one ratio; a machine that slows down slows both
sides of it. The double's ratio to A is the null: what this machine calls a difference where there is none.
"""

import math
import random
import statistics
import time
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Median of the blocks' ratios, with the 95 % interval of a bootstrap over blocks."""

    median: float
    low: float
    high: float

    def __str__(self):
        return f"{self.median:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How long B takes beside A.

    Args:
        ratio: Time of B over time of A.
        null: Time of A's double over time of A.
        a_ms: Median time of A in a block, in milliseconds.
        b_ms: The same of B.
        blocks: Number of blocks.
        runs: Number of runs of each side in a block; a block counts the fastest.
    """

    ratio: Ratio
    null: Ratio
    a_ms: float
    b_ms: float
    blocks: int
    runs: int

    @property
    def is_real(self):
        """Whether the interval leaves out 1 and the difference exceeds the null's."""
        outside = not self.ratio.low <= 1 <= self.ratio.high
        noise = max(abs(math.log(self.null.low)), abs(math.log(self.null.high)))
        return outside and abs(math.log(self.ratio.median)) > noise


def compare(a, b, double, *, blocks=30, runs=3, warmup=3, seed=0, progress=None):
    """Measures the time of `b` beside that of `a`.

    Args:
        a, b: Callables without arguments.
        double: A second instance of A, made as A was: the null.
        blocks: Number of blocks; each gives one ratio.
        runs: Runs of each side in a block, in random order; the fastest counts, for only disturbances make it slower.
        warmup: Runs of each before the first block.
        seed: Of the order and of the bootstrap.
        progress: Called after each block with the number of blocks done.

    Returns:
        A `Comparison`.

    Raises:
        ValueError: If there are fewer than two blocks or one run.
    """
    check_plan(blocks, runs, warmup)
    sides = {"a": a, "b": b, "double": double}
    for side in list(sides.values()) * warmup:
        side()
    order = random.Random(seed)
    times = {name: [] for name in sides}
    for block in range(blocks):
        fastest = dict.fromkeys(sides, math.inf)
        for name in order.sample(list(sides) * runs, len(sides) * runs):
            start = time.perf_counter_ns()
            sides[name]()
            fastest[name] = min(fastest[name], time.perf_counter_ns() - start)
        for name, nanoseconds in fastest.items():
            times[name].append(nanoseconds)
        if progress:
            progress(block + 1)
    return Comparison(
        ratio=_ratio(times["b"], times["a"], seed),
        null=_ratio(times["double"], times["a"], seed),
        a_ms=statistics.median(times["a"]) / 1e6,
        b_ms=statistics.median(times["b"]) / 1e6,
        blocks=blocks,
        runs=runs,
    )


def check_plan(blocks, runs, warmup=0):
    """Raises ValueError unless a comparison can be made of so many blocks, runs and runs to warm up."""
    if blocks < 2 or runs < 1 or warmup < 0:
        raise ValueError(f"At least 2 blocks of 1 run. Received: blocks={blocks}, runs={runs}, warmup={warmup}")


def _ratio(numerators, denominators, seed, *, resamples=2000):
    logs = np.log(numerators) - np.log(denominators)
    picks = np.random.default_rng(seed).integers(len(logs), size=(resamples, len(logs)))
    low, high = np.quantile(np.median(logs[picks], axis=1), (0.025, 0.975))
    return Ratio(median=float(np.exp(np.median(logs))), low=float(np.exp(low)), high=float(np.exp(high)))
