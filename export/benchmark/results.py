"""Results of the measurement of two LiteRT files: the records of results.json."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, NotRequired, TypedDict

from se_keras.recalibration import SEConfig
from se_keras.timing import Comparison, Ratio, is_significant
from se_keras.typing import Json

from ..litert.file import LiteRTRunner

AS_GIVEN = "as given"  # the variant of files that were not exported for the measurement
PAPER = {"resnet50_ms": 164, "se_resnet50_ms": 167, "ratio": 167 / 164, "source": "arXiv:1709.01507, section 4"}


class IntervalRecord(TypedDict):
    """A ratio in results.json."""

    median: float
    low: float
    high: float


class PercentilesRecord(TypedDict):
    """Milliseconds in results.json."""

    p50: float
    p90: float
    p99: float


class ComparisonRecord(TypedDict):
    """A comparison in results.json: of times, or of counted instructions."""

    ratio: IntervalRecord
    null: IntervalRecord
    a_ms: NotRequired[float]
    b_ms: NotRequired[float]
    a_instructions: NotRequired[dict[str, int]]
    b_instructions: NotRequired[dict[str, int]]
    drift: NotRequired[float | None]
    a: NotRequired[PercentilesRecord | None]
    b: NotRequired[PercentilesRecord | None]
    a_mj: NotRequired[float | None]
    b_mj: NotRequired[float | None]


class FootprintRecord(TypedDict):
    """A footprint in results.json."""

    bytes: int
    init_ms: float
    first_ms: float
    peak_mb: float | None


class SERecord(TypedDict):
    """The squeeze-and-excitation in results.json."""

    ratio: int
    squeeze: str
    excitation: str
    bias: bool
    site: str
    stages: Literal["all"] | list[int]
    minimum_units: NotRequired[int]


Profile = dict[str, dict[str, float]]  # microseconds by stage and part


class OverheadRecord(TypedDict):
    """A measured pair in results.json; those of version 0.1.0 have all of these keys."""

    baseline: str
    network: str
    precision: str
    form: str
    threads: int
    input_shape: list[int]
    comparison: ComparisonRecord
    is_real: bool
    sha256: NotRequired[list[str]]
    se: NotRequired[SERecord | None]
    undelegated: NotRequired[list[str]]
    footprints: NotRequired[list[FootprintRecord]]
    profiles: NotRequired[tuple[()] | tuple[Profile, Profile]]
    flags: NotRequired[list[str]]
    celsius: NotRequired[list[float]]
    missing: NotRequired[str | None]
    environment: NotRequired["EnvironmentRecord | None"]


class EnvironmentRecord(TypedDict):
    """The environment in results.json."""

    processor: str
    target: NotRequired[str]
    runtime: NotRequired[str]
    affinity: NotRequired[list[int] | None]
    cores: NotRequired[int | None]
    matrix_units: NotRequired[list[str] | None]
    versions: NotRequired[dict[str, str] | None]


class ResultsRecord(TypedDict):
    """The file results.json."""

    schema: int
    environment: EnvironmentRecord
    overhead: list[OverheadRecord]


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Size, start-up times and memory of a LiteRT file in a separate process.

    Args:
        init_ms: Time until the file can be run: reading, and XNNPACK's packing of the weights.
        first_ms: Time of the first run.
        peak_mb: Memory that the file added to the process, in 10^6 bytes: at the peak on a computer, at the end on a
            phone. None where the system does not report it.
    """

    bytes: int
    init_ms: float
    first_ms: float
    peak_mb: float | None


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How many instructions one inference executes, of baseline A and network B. An instruction is not a time.

    Args:
        ratio: Instructions of B over those of A.
        control: The same of A, counted a second time, over A.
        a_instructions: Instructions of A by kind; `total` is their sum.
        b_instructions: The same of B.
    """

    ratio: Ratio
    control: Ratio
    a_instructions: dict[str, int]
    b_instructions: dict[str, int]

    @property
    def is_significant(self) -> bool:
        """Whether the difference is larger than that of two counts of A."""
        return is_significant(self.ratio, self.control)

    def to_json(self) -> Json:
        """The counts as a dict for JSON, where the control is called `null`."""
        return {"null" if field == "control" else field: value for field, value in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class DeviceConditions:
    """The conditions of a measurement on another device; all are empty for a measurement on this machine.

    Args:
        flags: Flags of `benchmark_model`.
        celsius: Temperature of the warmest sensor before each block; empty where the sensors cannot be read.
        missing: Which blocks were not measured, and why; None if the measurement is complete.
    """

    flags: tuple[str, ...] = ()
    celsius: tuple[float, ...] = ()
    missing: str | None = None


HERE = DeviceConditions()


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """A measured pair of LiteRT files.

    Args:
        precision: Precision of both files; `"float32/int8"` if they differ.
        variant: Variant of both files: `"published"`, `"lowered"` or `"as given"`.
        input_shape: `(1, height, width, channels)`.
        comparison: A is the baseline, B the network.
        undelegated: Operators of either file that are not delegated to XNNPACK.
        sha256, footprints: For the baseline and the network.
        se: The fields of the network's `SEConfig`; None for two existing files.
        profiles: For both, if profiled: microseconds by stage and part, `{"stage2": {"scale": 1.0}}`.
        environment: The device of this record, where the devices of a file differ; None: the environment of the file.
    """

    baseline: str
    network: str
    precision: str
    variant: str
    threads: int
    input_shape: tuple[int, ...]
    comparison: Comparison | Counts
    undelegated: tuple[str, ...]
    sha256: tuple[str, str]
    se: dict[str, Any] | None = None
    footprints: tuple[Footprint, ...] = ()
    profiles: tuple[Profile, ...] = ()
    device: DeviceConditions = HERE
    environment: Json | None = None

    def to_json(self) -> Json:
        """The record as a dict for JSON, with the keys of results.json."""
        record = {"form" if field == "variant" else field: value for field, value in asdict(self).items()}
        record |= {"comparison": self.comparison.to_json()} | record.pop("device")
        return record | {"is_real": self.comparison.is_significant}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The identity of a measurement: two records with the same cell repeat one measurement."""

    network: str
    baseline: str
    precision: str
    variant: str
    threads: int
    input_shape: tuple[int, ...]
    se: SEConfig | None

    @classmethod
    def of(cls, record: Json) -> "Cell":
        """The cell of a record of results.json."""
        same = {field: record[field] for field in ("network", "baseline", "precision", "threads")}
        shape, se = tuple(record["input_shape"]), record["se"] and SEConfig(**record["se"])
        return cls(**same, variant=record["form"], input_shape=shape, se=se)


def device_of(record: Json, results: Json) -> Json:
    """The environment that a record of results was measured in: its own, or that of the file."""
    return record.get("environment") or results["environment"]


def machine(environment: Json) -> str:
    """The name of a device: a board at the end of ssh is not this machine, even if both have the same processor."""
    return environment["processor"] + ", with ssh" * (environment.get("target") == "ssh")


def with_record(records: Iterable[Json], record: Json) -> list[Json]:
    """Records and one more. It replaces one of the same measurement that is partial or has a device of its own."""

    def is_replaced(other):
        return (other.get("missing") or other.get("environment")) and _identity(other) == _identity(record)

    return [*(other for other in records if not is_replaced(other)), record]


def _identity(record):
    device = record.get("environment") or {}
    return Cell.of(record), device.get("processor"), device.get("id")


def kept(results: Json) -> list[Json]:
    """The records that the same command does not measure again.

    A target that always measures on the same devices names them in `devices` of the environment. A pair that all of
    them have measured has one record here, without the device.
    """
    records, devices = results["overhead"], results["environment"].get("devices")
    if devices is None:
        return complete(records)
    measured: dict[Cell, dict[str, Json]] = {}
    for record in records:
        measured.setdefault(Cell.of(record), {})[device_of(record, results)["processor"]] = record
    return [next(iter(on.values())) | {"environment": None} for on in measured.values() if on.keys() >= set(devices)]


def complete(records: Iterable[Json]) -> list[Json]:
    """The records of complete measurements on the device of the file."""
    return [record for record in records if not record.get("missing") and not record.get("environment")]


def require_pair(baseline: LiteRTRunner, network: LiteRTRunner) -> tuple[int, ...]:
    """The shape of the input of two files; raises ValueError if the shapes differ, or leave the size free."""
    shapes = sorted({runner.input_shape for runner in (baseline, network)}, key=lambda sizes: [x or 0 for x in sizes])
    if len(shapes) != 1:
        raise ValueError(f"A pair needs the same input. Received: {' and '.join(map(str, shapes))}")
    batch, *size = shapes.pop()
    if None in size:
        raise ValueError(f"A pair needs images of a fixed size. Received: files of {(batch, *size)}")
    return (batch or 1, *size)
