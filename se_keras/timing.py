"""Times two callables in pairs, so that the ratio holds where the clock drifts. Knows no models.

A block runs A, B and A's double once each, in random order, and yields one ratio; a machine that slows down slows both
sides of it. The double's ratio to A is the null: what this machine calls a difference where there is none.
"""

import math
import random
import statistics
import time
from collections import defaultdict
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
class Percentiles:
    """Of the times of all runs, in milliseconds: the disturbed ones too."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, nanoseconds):
        """Those of a list of times."""
        return cls(**{f"p{q}": float(np.percentile(nanoseconds, q)) / 1e6 for q in (50, 90, 99)})


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
        a, b: `Percentiles` of all runs; None where they are not known.
        a_mj, b_mj: Energy of a run, in millijoules, of the whole processor; None where the system does not tell.
    """

    ratio: Ratio
    null: Ratio
    a_ms: float
    b_ms: float
    blocks: int
    runs: int
    a: Percentiles | None = None
    b: Percentiles | None = None
    a_mj: float | None = None
    b_mj: float | None = None

    @property
    def is_real(self):
        """Whether the interval leaves out 1 and the difference exceeds the null's."""
        outside = not self.ratio.low <= 1 <= self.ratio.high
        noise = max(abs(math.log(self.null.low)), abs(math.log(self.null.high)))
        return outside and abs(math.log(self.ratio.median)) > noise


FEWEST_BLOCKS = 10  # before an interval may end a comparison


class Blocks:
    """The blocks of a comparison as they come: when there are enough of them, and what they tell.

    Args:
        within, seconds, seed: As in `compare`.
    """

    def __init__(self, *, within=None, seconds=None, seed=0):
        self._within, self._seconds, self._seed, self._began = within, seconds, seed, time.monotonic()
        self._times = {"a": [], "b": [], "double": []}

    def __len__(self):
        return len(self._times["a"])

    def add(self, times):
        """Takes a block: `{side: nanoseconds}`."""
        for side, nanoseconds in times.items():
            self._times[side].append(nanoseconds)

    def are_enough(self):
        """Whether time is up, or the interval as narrow as it was asked to be."""
        if self._seconds is not None and len(self) > 1 and time.monotonic() - self._began > self._seconds:
            return True
        if self._within is None or len(self) < FEWEST_BLOCKS:
            return False
        ratio = self._ratio("b")
        return ratio.high / ratio.low - 1 < self._within

    def comparison(self, *, runs, **more):
        """The `Comparison`; `more` are its other fields."""
        return Comparison(
            ratio=self._ratio("b"),
            null=self._ratio("double"),
            a_ms=statistics.median(self._times["a"]) / 1e6,
            b_ms=statistics.median(self._times["b"]) / 1e6,
            blocks=len(self),
            runs=runs,
            **more,
        )

    def _ratio(self, side):
        return ratio_of(self._times[side], self._times["a"], self._seed)


def compare(a, b, double, *, blocks=30, runs=3, warmup=3, within=None, seconds=None, seed=0, meter=None, progress=None):
    """Measures the time of `b` beside that of `a`.

    Args:
        a, b: Callables without arguments.
        double: A second instance of A, made as A was: the null.
        blocks: Number of blocks; each gives one ratio.
        runs: Runs of each side in a block, in random order; the fastest counts, for only disturbances make it slower.
        warmup: Runs of each before the first block.
        within: Ends the comparison before all blocks, after at least ten, when the interval is so narrow: 0.01 for a
            hundredth of the ratio.
        seconds: Ends it when so many have passed, after two blocks.
        seed: Of the order and of the bootstrap.
        meter: An `energy.Meter`, read before and after each run.
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
    found, every, microjoules = Blocks(within=within, seconds=seconds, seed=seed), defaultdict(list), defaultdict(int)
    for block in range(blocks):
        fastest = dict.fromkeys(sides, math.inf)
        for name in order.sample(list(sides) * runs, len(sides) * runs):
            before = meter and meter.read()
            start = time.perf_counter_ns()
            sides[name]()
            every[name].append(time.perf_counter_ns() - start)
            if meter:
                microjoules[name] += meter.between(before, meter.read())
            fastest[name] = min(fastest[name], every[name][-1])
        found.add(fastest)
        if progress:
            progress(block + 1)
        if found.are_enough():
            break
    spread = {side: Percentiles.of(every[side]) for side in ("a", "b")}
    energy = {f"{side}_mj": microjoules[side] / len(every[side]) / 1e3 for side in ("a", "b")} if meter else {}
    return found.comparison(runs=runs, **spread, **energy)


def check_plan(blocks, runs, warmup=0):
    """Raises ValueError unless a comparison can be made of so many blocks, runs and runs to warm up."""
    if blocks < 2 or runs < 1 or warmup < 0:
        raise ValueError(f"At least 2 blocks of 1 run. Received: blocks={blocks}, runs={runs}, warmup={warmup}")


def ratio_of(numerators, denominators, seed=0, *, resamples=2000):
    """The `Ratio` of two lists of measurements, of which those of a block stand at the same place."""
    logs = np.log(numerators) - np.log(denominators)
    picks = np.random.default_rng(seed).integers(len(logs), size=(resamples, len(logs)))
    low, high = np.quantile(np.median(logs[picks], axis=1), (0.025, 0.975))
    return Ratio(median=float(np.exp(np.median(logs))), low=float(np.exp(low)), high=float(np.exp(high)))
