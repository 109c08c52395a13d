"""What is measured of a pair of files: its record, and what it is a record of."""

import json
from dataclasses import asdict, dataclass

from se_keras.storage import sha256
from se_keras.timing import Comparison

AS_GIVEN = "as given"  # the variant of files that were exported before


PAPER = {"resnet50_ms": 164, "se_resnet50_ms": 167, "ratio": 167 / 164, "source": "arXiv:1709.01507, section 4"}


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a LiteRT file takes in a process of its own.

    Args:
        bytes: Of the file.
        init_ms: Until it can be run: reading, and XNNPACK's packing of the weights.
        first_ms: The first run.
        peak_mb: Most memory that it added to the process, in 10^6 bytes; on a phone, what it had added at the end. None
            where the system does not tell.
    """

    bytes: int
    init_ms: float
    first_ms: float
    peak_mb: float | None


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """A measured pair of LiteRT files.

    Args:
        baseline: Name of what stands for 1.
        network: Name of what is compared with it.
        precision: Of both; `"float32/int8"` where that of the baseline is another.
        variant: `"published"` or `"lowered"`, both sides alike, or `"as given"`.
        threads: Number of threads.
        input_shape: `(1, height, width, channels)`.
        comparison: The times; A is the baseline.
        undelegated: Operators that fell off XNNPACK, on either side.
        sha256: Of the baseline's file and the network's.
        se: Where and how the network recalibrates, the fields of its `SEConfig`; None for files that were given.
        footprints: Of the baseline and the network.
        profiles: Likewise, where they were asked for: microseconds by stage and part, `{"stage2": {"scale": 1.0}}`.
        flags, celsius, missing: Of a measurement on a phone: see `android.measure`.
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
    se: dict | None = None
    footprints: tuple[Footprint, ...] = ()
    profiles: tuple[dict, ...] = ()
    flags: tuple[str, ...] = ()
    celsius: tuple[float, ...] = ()
    missing: str | None = None

    def to_json(self):
        """The record as a dict for JSON."""
        record = {"form" if field == "variant" else field: value for field, value in asdict(self).items()}
        return record | {"comparison": self.comparison.to_json(), "is_real": self.comparison.is_significant}


def require_pair(baseline, network):
    """The shape of the input of two runners; raises ValueError if they differ in it."""
    shapes = {runner.input_shape for runner in (baseline, network)}
    if len(shapes) != 1:
        raise ValueError(f"A pair has the same input. Received: {' and '.join(map(str, sorted(shapes)))}")
    return shapes.pop()


def described(baseline, network):
    """What two files say of themselves, as fields of their `Overhead`."""
    precisions = dict.fromkeys(side.manifest["precision"] for side in (baseline, network))
    return {
        "baseline": baseline.manifest["network"],
        "network": network.manifest["network"],
        "precision": "/".join(precisions),
        "sha256": (sha256(baseline.content), sha256(network.content)),
    }


def cell(record):
    """What a record is of: no two measurements differ in this alone."""
    fields = ("network", "baseline", "precision", "form", "threads")
    return *(record[name] for name in fields), tuple(record["input_shape"]), _text(record["se"])


def _text(se):
    return json.dumps(se, sort_keys=True)  # tuples and lists alike
