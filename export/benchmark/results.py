"""Results of the measurement of two LiteRT files: the records of results.json."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, NotRequired, TypedDict

from se_keras.recalibration import SEConfig
from se_keras.storage import sha256
from se_keras.timing import Comparison
from se_keras.typing import Json

from ..litert.file import LiteRTModel, LiteRTRunner

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
    """A comparison in results.json."""

    ratio: IntervalRecord
    null: IntervalRecord
    a_ms: float
    b_ms: float
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


class EnvironmentRecord(TypedDict):
    """The environment in results.json."""

    processor: str
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
class DeviceConditions:
    """The conditions of a measurement on a phone; all are empty for a measurement on this machine.

    Args:
        flags: Flags of `benchmark_model`.
        celsius: Temperature of the warmest sensor before each block; empty where the sensors cannot be read.
        missing: Which blocks were not measured, and why; None if the measurement is complete.
    """

    flags: tuple[str, ...] = ()
    celsius: tuple[float, ...] = ()
    missing: str | None = None


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
    """

    baseline: str
    network: str
    precision: str
    variant: str
    threads: int
    input_shape: tuple[int, ...]
    comparison: Comparison
    undelegated: tuple[str, ...]
    sha256: tuple[str, str]
    se: dict[str, Any] | None = None
    footprints: tuple[Footprint, ...] = ()
    profiles: tuple[Profile, ...] = ()
    device: DeviceConditions = DeviceConditions()

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


def complete(records: Iterable[Json]) -> list[Json]:
    """The records of complete measurements."""
    return [record for record in records if not record.get("missing")]


def require_pair(baseline: LiteRTRunner, network: LiteRTRunner) -> tuple[int, ...]:
    """The shape of the input of two files; raises ValueError if the shapes differ, or leave the size free."""
    shapes = sorted({runner.input_shape for runner in (baseline, network)}, key=lambda sizes: [x or 0 for x in sizes])
    if len(shapes) != 1:
        raise ValueError(f"A pair needs the same input. Received: {' and '.join(map(str, shapes))}")
    batch, *size = shapes.pop()
    if None in size:
        raise ValueError(f"A pair needs images of a fixed size. Received: files of {(batch, *size)}")
    return (batch or 1, *size)


def described(baseline: LiteRTModel, network: LiteRTModel) -> dict[str, Any]:
    """The fields of an `Overhead` that come from the manifests and contents of two files."""
    return {
        "baseline": baseline.manifest["network"],
        "network": network.manifest["network"],
        "precision": "/".join(dict.fromkeys(side.manifest["precision"] for side in (baseline, network))),
        "sha256": (sha256(baseline.content), sha256(network.content)),
    }
