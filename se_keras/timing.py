"""Times two callables in pairs, so that the ratio is right even if the clock rate of the machine drifts.

A block runs A, B and the control, a second instance of A, in random order, and gives one ratio of B to A. A machine
that slows down slows both sides of a ratio. The ratio of the control to A is the A/A control: the difference that this
machine measures between equals.
"""

import math
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from se_keras.typing import Json


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
    """Percentiles of the times of all runs, in milliseconds, disturbed runs included."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How long B takes compared with A.

    Args:
        ratio: Time of B over time of A.
        control: Time of the second instance of A over time of A: the A/A control.
        a_ms: Median time of A in a block, in milliseconds.
        b_ms: The same of B.
        blocks: Number of blocks.
        runs: Runs of each side in a block; the fastest counts.
        drift: How far the time of A changed: of three parts of the blocks, the slowest median over the fastest. None
            where it is unknown.
        a: Percentiles of all runs of A; None where they are unknown.
        b: The same of B.
        a_mj: Energy of the processor in a run of A, in millijoules; None where the system does not report it.
        b_mj: The same of B.
    """

    ratio: Ratio
    control: Ratio
    a_ms: float
    b_ms: float
    blocks: int
    runs: int
    drift: float | None = None
    a: Percentiles | None = None
    b: Percentiles | None = None
    a_mj: float | None = None
    b_mj: float | None = None

    @property
    def is_significant(self) -> bool:
        """Whether the interval excludes 1 and the difference is larger than the control's."""
        return is_significant(self.ratio, self.control)

    def to_json(self) -> Json:
        """The comparison as a dict for JSON, where the control is called `null`."""
        return {"null" if field == "control" else field: value for field, value in asdict(self).items()}


def is_significant(ratio: Ratio, control: Ratio) -> bool:
    """Whether the interval of a ratio excludes 1 and its difference is larger than the control's."""
    outside = not ratio.low <= 1 <= ratio.high
    noise = max(abs(math.log(control.low)), abs(math.log(control.high)))
    return outside and abs(math.log(ratio.median)) > noise


FEWEST_BLOCKS = 10  # measured before a narrow interval may end a comparison
_RESAMPLES = 2000  # of the bootstrap


class Blocks:
    """The blocks that were measured so far. The arguments are those of `compare`."""

    def __init__(self, *, within: float | None = None, seconds: float | None = None, seed: int = 0):
        if within is not None and not 0 < within < math.inf:
            raise ValueError(f"within must be a finite number above 0. Received: within={within!r}")
        if seconds is not None and not 0 <= seconds < math.inf:
            raise ValueError(f"seconds must be a finite number of at least 0. Received: seconds={seconds!r}")
        self._within, self._seconds, self._seed, self._began = within, seconds, seed, time.monotonic()
        self._times = {"a": [], "b": [], "control": []}

    def __len__(self):
        return len(self._times["a"])

    def add(self, times: Mapping[str, float]) -> None:
        """Adds a block: `{side: nanoseconds}` of the sides `a`, `b` and `control`."""
        for side, nanoseconds in times.items():
            self._times[side].append(nanoseconds)

    def are_enough(self) -> bool:
        """Whether the time is over, or the interval is narrower than `within`."""
        if self._seconds is not None and len(self) > 1 and time.monotonic() - self._began > self._seconds:
            return True
        if self._within is None or len(self) < FEWEST_BLOCKS:
            return False
        ratio = self._ratio("b")
        return ratio.high / ratio.low - 1 < self._within

    def comparison(self, *, runs: int, **more: Any) -> Comparison:
        """The `Comparison`; `more` are its other fields."""
        a_ms, b_ms = (statistics.median(self._times[side]) / 1e6 for side in ("a", "b"))
        ratio, control = self._ratio("b"), self._ratio("control")
        medians = [np.median(part) for part in np.array_split(self._times["a"], min(3, len(self)))]
        plan = {"blocks": len(self), "runs": runs, "drift": float(max(medians) / min(medians))}
        return Comparison(ratio=ratio, control=control, a_ms=a_ms, b_ms=b_ms, **plan, **more)

    def _ratio(self, side):
        return ratio_of(self._times[side], self._times["a"], self._seed)


class EnergyMeter(Protocol):
    """The methods of an energy meter that `compare` needs."""

    def read(self) -> tuple[int, ...]:
        """A reading."""
        ...

    def between(self, before: tuple[int, ...], after: tuple[int, ...]) -> int:
        """Microjoules between two readings."""
        ...


def compare(
    a: Callable[[], object],
    b: Callable[[], object],
    control: Callable[[], object],
    *,
    blocks: int = 30,
    runs: int = 3,
    warmup: int = 3,
    within: float | None = None,
    seconds: float | None = None,
    seed: int = 0,
    meter: EnergyMeter | None = None,
    progress: Callable[[int], object] | None = None,
) -> Comparison:
    """Measures the time of `b` compared with that of `a`.

    Args:
        control: A second instance of A, made in the same way: the A/A control.
        blocks: Number of blocks, at least 2; each gives one ratio.
        runs: Runs of each side in a block, in random order. The fastest counts: disturbances only make a run slower.
        warmup: Runs of each side before the first block.
        within: Ends the comparison, after at least ten blocks, once the interval is narrower: 0.01 is 1 % of the ratio.
        seconds: Ends the comparison after this time, and at least two blocks.
        seed: Seed of the order and of the bootstrap.
        meter: Read before and after each run.
        progress: Called after each block with the number of blocks done.

    Raises:
        ValueError: If a number is out of its range.
    """
    check_plan(blocks, runs, warmup)
    found = Blocks(within=within, seconds=seconds, seed=seed)
    sides = {"a": a, "b": b, "control": control}
    for side in list(sides.values()) * warmup:
        side()
    order = random.Random(seed)
    every, microjoules = defaultdict(list), defaultdict(int)
    for block in range(blocks):
        fastest = dict.fromkeys(sides, math.inf)
        for name in order.sample(list(sides) * runs, len(sides) * runs):
            before = meter.read() if meter else ()
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
    more: dict[str, Any] = {}
    for side in ("a", "b"):
        more[side] = percentiles(every[side])
        more[f"{side}_mj"] = microjoules[side] / len(every[side]) / 1e3 if meter else None
    return found.comparison(runs=runs, **more)


def check_plan(blocks: int, runs: int, warmup: int = 0) -> None:
    """Raises ValueError unless these numbers of blocks, runs and warm-up runs are enough for a comparison."""
    if blocks < 2 or runs < 1 or warmup < 0:
        raise ValueError(f"At least 2 blocks of 1 run. Received: blocks={blocks}, runs={runs}, warmup={warmup}")


def percentiles(nanoseconds: Sequence[float]) -> Percentiles:
    """The `Percentiles` of the times of all runs."""
    p50, p90, p99 = (float(np.percentile(nanoseconds, q)) / 1e6 for q in (50, 90, 99))
    return Percentiles(p50=p50, p90=p90, p99=p99)


def ratio_of(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> Ratio:
    """The `Ratio` of two lists of measurements; measurements with the same index belong to one block."""
    logs = np.log(numerators) - np.log(denominators)
    picks = np.random.default_rng(seed).integers(len(logs), size=(_RESAMPLES, len(logs)))
    low, high = np.quantile(np.median(logs[picks], axis=1), (0.025, 0.975))
    return Ratio(median=float(np.exp(np.median(logs))), low=float(np.exp(low)), high=float(np.exp(high)))
