"""Time of each operator of a LiteRT file, by block and part: shows where squeeze-and-excitation adds time."""

import re
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from se_keras.typing import Json

from ..litert.file import LiteRTModel, check_threads, plain_interpreter
from .programs import profiler_events, run

# For each LiteRT operator, the beginnings of the names of the XNNPACK operators that compute it. XNNPACK computes a 1x1
# convolution with stride 1 as a matrix product.
_COMPUTED_BY = {
    "CONV_2D": ("Convolution", "Fully Connected"),
    "DEPTHWISE_CONV_2D": ("Convolution",),
    "FULLY_CONNECTED": ("Fully Connected", "Convolution"),
    "MEAN": ("Mean", "Global Average Pooling", "Sum"),
    "REDUCE_MAX": ("Reduce Max",),
    "MUL": ("Multiply",),
    "ADD": ("Add",),
    "LOGISTIC": ("Sigmoid",),
    "MAX_POOL_2D": ("Max Pooling",),
    "AVERAGE_POOL_2D": ("Average Pooling",),
    "PAD": ("Constant Pad",),
    "CONCATENATION": ("Copy", "Concatenate"),
    "TRANSPOSE": ("Transpose",),
    "RESHAPE": ("Static Reshape", "Copy"),
    "SOFTMAX": ("Softmax",),
    "QUANTIZE": ("Convert",),
    "DEQUANTIZE": ("Convert",),
    "RELU": ("Clamp",),
    "STRIDED_SLICE": ("Slice", "Copy"),
    "SPLIT": ("Copy", "Slice"),
}
_SE_PARTS = {"MEAN": "squeeze", "MAX_POOL_2D": "squeeze", "REDUCE_MAX": "squeeze", "MUL": "scale"}
_PARTS = {"CONV_2D": "convolution", "DEPTHWISE_CONV_2D": "convolution", "ADD": "add", "FULLY_CONNECTED": "classifier"}
PARTS = ("convolution", "squeeze", "excitation", "scale", "add", "classifier", "other")


@dataclass(frozen=True, kw_only=True)
class Row:
    """The time of an operator.

    Args:
        operator: Its name in LiteRT.
        layer: The layer of the network that it computes; empty if the file does not have its name.
        kernel: The XNNPACK operator that computed it; empty if nothing had to be computed.
        microseconds: Mean of the runs.
        stage, block: Such as `stage2` and `stage2_block1`; empty outside of the stages.
        part: One of `PARTS`.
    """

    operator: str
    layer: str
    kernel: str
    microseconds: float
    stage: str
    block: str
    part: str


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Where a file spends its time.

    Args:
        rows: One for each operator, in order.
        unattributed: Microseconds of XNNPACK operators that belong to no LiteRT operator, such as copies.
        run_us, profiled_us: Microseconds of a run without and with the profiler.
        others: Operators that XNNPACK does not compute.
    """

    rows: tuple[Row, ...]
    unattributed: float
    run_us: float
    profiled_us: float
    others: tuple[str, ...]

    @property
    def total_us(self) -> float:
        """Microseconds of all operators together."""
        return sum(row.microseconds for row in self.rows) + self.unattributed

    def by(self, *fields: str) -> dict[tuple[str, ...], float]:
        """Microseconds for each combination of values of fields of `Row`, such as `by("stage", "part")`."""
        sums: dict[tuple[str, ...], float] = defaultdict(float)
        for row in self.rows:
            sums[tuple(getattr(row, field) for field in fields)] += row.microseconds
        return dict(sums)

    def table(self) -> dict[str, dict[str, float]]:
        """Microseconds by stage, in order, and part: `{"stage2": {"scale": 1.0, ..., "all": 9.0}, ..., "all": {...}}`.

        Operators outside of the stages are `"outside"`.
        """
        found = {row.stage or "outside": dict.fromkeys((*PARTS, "all"), 0.0) for row in self.rows}
        found["all"] = dict.fromkeys((*PARTS, "all"), 0.0)
        for row in self.rows:
            for stage, part in product((row.stage or "outside", "all"), (row.part, "all")):
                found[stage][part] += row.microseconds
        return found

    def to_json(self) -> Json:
        """The profile as a dict for JSON."""
        record = {"unplaced" if field == "unattributed" else field: value for field, value in asdict(self).items()}
        return record | {"told_us": self.total_us}


def noise(first: Profile, second: Profile) -> dict[str, float]:
    """How far two profiles of one file differ: for each part, and for `"all"`, the most of its stages and their sum.

    In microseconds. A smaller difference between two files can come from the machine.
    """
    a, b = first.table(), second.table()
    return {part: max(abs(a[stage][part] - b[stage][part]) for stage in a) for part in (*PARTS, "all")}


def profile(file: LiteRTModel, *, threads: int = 1, runs: int = 50) -> Profile:
    """Profiles a LiteRT file with XNNPACK; raises ValueError if the installed runtime cannot report the times."""
    check_threads(threads)
    if type(runs) is not int or runs < 1:
        raise ValueError(f"runs must be an int of at least 1. Received: runs={runs!r}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tflite"
        path.write_bytes(file.content)
        failure = "The installed ai-edge-litert cannot report the time of each operator"
        *_, measured = run(profiler_events, path, threads, runs, failure=failure)
    times = [(tag, elapsed / runs) for tag, elapsed in _summed_over_runs(measured["events"], runs)]
    rows, unattributed = _attributed(_operators(file.content), times)
    run_us, profiled_us = (1e6 * measured[key] / runs for key in ("seconds", "profiled_seconds"))
    others = tuple(name for name in measured["others"] if name != "Invoke")
    return Profile(rows=rows, unattributed=unattributed, run_us=run_us, profiled_us=profiled_us, others=others)


def _summed_over_runs(events, runs):
    """Sums the events of several runs, which all have the same operators, over the runs."""
    if not events or len(events) % runs:
        same = f"The installed ai-edge-litert must report as many events for each of {runs} runs"
        raise ValueError(f"{same}. Received: {len(events)} events")
    count = len(events) // runs
    names = [tag for tag, _ in events[:count]]
    if any([tag for tag, _ in events[start : start + count]] != names for start in range(0, len(events), count)):
        raise ValueError("The installed ai-edge-litert reports different operators in each run")
    return [(name, sum(elapsed for _, elapsed in events[index::count])) for index, name in enumerate(names)]


def _attributed(
    operators: Sequence[tuple[str, str]], times: Sequence[tuple[str, float]]
) -> tuple[tuple[Row, ...], float]:
    """The rows of LiteRT's operators with the times of XNNPACK's operators, and the time that belongs to no row.

    Both come in the order of execution. Some LiteRT operators have no XNNPACK operator: padding that is part of a
    convolution, a reshape that copies nothing. Therefore they are matched by the longest common subsequence.
    """
    most = [[0] * (len(times) + 1) for _ in range(len(operators) + 1)]
    for i in reversed(range(len(operators))):
        for j in reversed(range(len(times))):
            pair = most[i + 1][j + 1] + 1 if _computes(times[j][0], operators[i][0]) else 0
            most[i][j] = max(pair, most[i + 1][j], most[i][j + 1])
    rows, unattributed, j = [], 0.0, 0
    for i, (operator, layer) in enumerate(operators):
        while j < len(times) and most[i][j] == most[i][j + 1] > most[i + 1][j]:
            unattributed, j = unattributed + times[j][1], j + 1
        own = j < len(times) and _computes(times[j][0], operator) and most[i][j] == most[i + 1][j + 1] + 1
        rows.append(_row(operator, layer, *(times[j] if own else ("", 0.0))))
        j += own
    return tuple(rows), unattributed + sum(us for _, us in times[j:])


def _computes(tag, operator):
    return tag.startswith(_COMPUTED_BY.get(operator, ()))


def _row(operator, layer, kernel, microseconds):
    found = re.match(r"stage\d+_block\d+|stage\d+\w*?(?=_)", layer)
    block = found[0] if found else ""
    parts, rest = (_SE_PARTS, "excitation") if re.search(r"_se(_|$)", layer) else (_PARTS, "other")
    place = {"stage": block.partition("_")[0], "block": block, "part": parts.get(operator, rest)}
    return Row(operator=operator, layer=layer, kernel=kernel, microseconds=microseconds, **place)


def _operators(content):
    """Each operator of a file in order, with the layer whose output it computes."""
    reader = plain_interpreter(content)
    names = {tensor["index"]: tensor["name"] for tensor in reader.get_tensor_details()}
    return [(op["op_name"], _layer(names.get(op["outputs"][0], ""))) for op in reader._get_ops_details()]


def _layer(tensor):
    """The layer in a tensor's name: `stage2_block1_conv1` of `se_resnet50_1/stage2_block1_conv1_1/convolution;...`."""
    parts = tensor.partition(";")[0].split("/")
    return re.sub(r"_\d+$", "", parts[1]) if len(parts) > 1 else ""
