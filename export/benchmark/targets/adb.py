"""Measures pairs of LiteRT files on a phone, with adb and LiteRT's `benchmark_model`.

Since 2025 `benchmark_model` writes its measurements as a BenchmarkResult. Versions since 2019 print them as text, with
a line of timings in microseconds.
"""

import contextlib
import random
import re
import secrets
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from se_keras import protos
from se_keras.environment import versions
from se_keras.errors import first_line
from se_keras.timing import check_plan
from se_keras.typing import FilePath, Json, OnMessage

from .. import binaries
from ..devices import DeviceLost, check_rest, measured_blocks, warmest
from ..measuring import Pair
from ..results import Footprint, Overhead

FOLDER = "/data/local/tmp"
_ON_PHONE, _FETCH = "device:", "fetch"  # instead of a path of the binary
_LONGEST_CALL = 1800  # seconds that a call of adb may take: a phone that is gone may never answer
_TIMINGS = (
    r"Inference timings in us: Init: (?P<init>[\d.e+]+), First inference: (?P<first>[\d.e+]+), .*?"
    r"Inference \(avg\): (?P<average>[\d.e+]+)",
    r"Average inference timings in us: Warmup: (?P<first>[\d.e+]+), Init: (?P<init>[\d.e+]+), "
    r"no stats: (?P<average>[\d.e+]+)",
)
_RESULT = "Saved benchmark result to:"
# tensorflow/lite/tools/benchmark/proto/benchmark_result.proto
_LATENCY = {"avg_ms": (1, float), "min_ms": (2, float), "init_ms": (8, float), "first_inference_ms": (9, float)}
_BenchmarkResult = protos.message(
    "BenchmarkResult",
    {
        "LatencyMetrics": _LATENCY,
        "MemoryMetrics": {"overall_footprint_kb": (2, int)},
        "BenchmarkResult": {"latency_metrics": (2, "LatencyMetrics"), "memory_metrics": (3, "MemoryMetrics")},
    },
)
_PARTIAL = re.compile(r"(partially executed|not be executed) by the delegate")
_LOST = re.compile(
    r"device '?[^\n]*'? not found|no devices/emulators found|device offline|error: closed|protocol fault"
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """The measurements of one call of `benchmark_model`; None for those that it does not report.

    Args:
        average_us, fastest_us, first_us: Time of a run of the model, in microseconds.
        init_us: Time until the model can be run.
        memory_mb: Memory that the model had added at the end, in 10^6 bytes.
        partial: Whether some operators, or all, are not delegated to XNNPACK.
    """

    average_us: float
    fastest_us: float | None
    init_us: float
    first_us: float
    memory_mb: float | None
    partial: bool


def parse(text: str, result: bytes | None = None) -> Run:
    """Reads the output of `benchmark_model`, and the BenchmarkResult that it wrote, if any.

    Raises:
        ValueError: If the output has no timings.
    """
    partial = bool(_PARTIAL.search(text))
    if result:
        message = _BenchmarkResult.FromString(result)
        latency, memory = message.latency_metrics, message.memory_metrics
        return Run(
            average_us=latency.avg_ms * 1e3,
            fastest_us=latency.min_ms * 1e3,
            init_us=latency.init_ms * 1e3,
            first_us=latency.first_inference_ms * 1e3,
            memory_mb=memory.overall_footprint_kb * 1024 / 1e6 if memory.HasField("overall_footprint_kb") else None,
            partial=partial,
        )
    found = next((match for pattern in _TIMINGS if (match := re.search(pattern, text))), None)
    if found is None:
        last = first_line((text.strip().splitlines() or ["nothing"])[-1])
        raise ValueError(f"benchmark_model prints its timings at the end. Received: {last}")
    counts = re.findall(r"count=\d+[^\n]*", text)  # of the warm-up, then of the runs; a single run has no fastest
    fastest = re.search(r"min=([\d.e+]+)", counts[-1]) if counts else None
    memory = re.search(r"emory footprint[^:]*\(MB\): init=[\d.e+-]+ overall=([\d.e+-]+)", text)
    return Run(
        average_us=float(found["average"]),
        fastest_us=float(fastest[1]) if fastest else None,
        init_us=float(found["init"]),
        first_us=float(found["first"]),
        memory_mb=float(memory[1]) * 2**20 / 1e6 if memory else None,
        partial=partial,
    )


class Phone:
    """A phone that adb reaches: `phone("push", source, target)` runs `adb push` and returns its output.

    Raises:
        OSError: If adb is missing, or no phone answers.
        ValueError: If there are several phones and `serial` is None.
    """

    def __init__(self, serial: str | None = None):
        if shutil.which("adb") is None:
            raise FileNotFoundError(
                "adb is not on the PATH: it comes with Android's platform tools (docs/guides/phone.md says from where)"
            )
        # "SERIAL<tab>STATE", of which each can have blanks; lines about the daemon have no tab.
        listed = [line.strip().split("\t") for line in self._call("devices").splitlines() if "\t" in line.strip()]
        ready = [name for name, *state in listed if state == ["device"]]
        states = ", ".join(map(" ".join, listed)) or "none"
        if serial is None and len(ready) > 1:
            raise ValueError(f"There are several phones: say which with --serial. Received: {', '.join(ready)}")
        if not ready or serial not in (None, *ready):
            raise OSError(
                f"No phone answers adb{'' if serial is None else f' as {serial!r}'}: unlock it, allow USB debugging, "
                f"and see `adb devices`. Received: {states}"
            )
        self.serial = serial or ready[0]

    def __call__(self, *arguments: str) -> str:
        """The output of an adb command; OSError if it fails, DeviceLost if the phone no longer answers."""
        return self._call("-s", self.serial, *arguments)

    def shell(self, command: str) -> str:
        """The output of a command in the phone's shell."""
        return self("shell", command)

    def pull(self, source: str) -> bytes:
        """The content of a file on the phone."""
        with tempfile.TemporaryDirectory() as folder:
            self("pull", source, f"{folder}/file")
            return Path(folder, "file").read_bytes()

    def push(self, content: bytes, target: str) -> None:
        """Writes a file on the phone."""
        with tempfile.NamedTemporaryFile() as file:
            file.write(content)
            file.flush()
            self("push", file.name, target)

    def properties(self) -> dict[str, str | None]:
        """Model, processor and system of the phone, as far as it reports them."""
        commands = {
            "model": "getprop ro.product.model",
            "processor": "getprop ro.soc.model",
            "board": "getprop ro.board.platform",
            "android": "getprop ro.build.version.release",
            "abi": "getprop ro.product.cpu.abi",
            "governor": "cat /sys/devices/system/cpu/cpu0/cpufreq/scaling_governor",
        }
        found = {}
        for name, command in commands.items():
            with contextlib.suppress(OSError):
                found[name] = self.shell(f"{command} 2>/dev/null || true").strip() or None
        return found

    def celsius(self) -> float | None:
        """Temperature of the warmest sensor; None where the sensors cannot be read."""
        return warmest(self.shell("cat /sys/class/thermal/thermal_zone*/temp 2>/dev/null || true"))

    def is_connected(self) -> bool:
        """Whether the phone still answers."""
        try:
            return self("get-state").strip() == "device"
        except OSError:
            return False

    def _call(self, *arguments):
        command = ["adb", *arguments]
        try:
            result = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, errors="replace", timeout=_LONGEST_CALL
            )
        except subprocess.TimeoutExpired:
            raise DeviceLost(f"The phone no longer answers: adb waited for {_LONGEST_CALL} seconds") from None
        output = f"{result.stdout}\n{result.stderr}"
        if result.returncode and _LOST.search(result.stderr):
            raise DeviceLost(f"The phone no longer answers: {first_line(result.stderr)}")
        if not result.returncode and "not executable" not in output:
            return result.stdout
        if "No space left" in output:
            raise OSError(f"The phone has no space left in {FOLDER}")
        if any(text in output for text in ("not executable", "cannot execute", "Exec format error")):
            raise OSError("The phone cannot run this benchmark_model: take the one for its processor, such as arm64")
        lines = [line.strip() for line in output.splitlines() if line.strip()] or ["it printed no message"]
        verb = arguments[2 if arguments[0] == "-s" else 0]
        raise OSError(f"adb {verb} fails with status {result.returncode}: {lines[-1]}")


@dataclass(frozen=True, kw_only=True)
class Adb:
    """A phone, reached with adb.

    Args:
        benchmark_model: Path of LiteRT's binary for the phone; `device:/path` if it is already on the phone; `fetch` to
            get the one that is published for the installed LiteRT.
        serial: Serial number of the phone; needed if there are several.
        blocks: Paired measurements: each runs the baseline, the network and the baseline again, in random order.
        runs: Runs of a file in each measurement.
        rest: Seconds between blocks. The pause is longer while the phone is warmer than before the first block.
        within, seconds: As in `timing.compare`.
        allow_undelegated: Whether to measure files with operators that are not delegated to XNNPACK.

    Raises:
        ValueError: If a number is out of its range, or if there is no binary.
    """

    benchmark_model: FilePath | None = None
    serial: str | None = None
    blocks: int = 10
    runs: int = 20
    rest: float = 5.0
    within: float | None = None
    seconds: float | None = None
    allow_undelegated: bool = False

    def __post_init__(self):
        if self.benchmark_model is None:
            raise ValueError("--adb needs --benchmark-model, LiteRT's binary for the phone: a PATH, or fetch to get it")
        check_plan(self.blocks, self.runs)
        check_rest(self.rest)

    def connect(self, progress: OnMessage) -> Json:
        """The phone: see `Target`. Raises OSError if adb, the phone or the binary is missing."""
        if self.benchmark_model != _FETCH:
            require_binary(self.benchmark_model)
        found = Phone(self.serial).properties()
        if self.benchmark_model == _FETCH:
            if found.get("abi") != binaries.ABI:
                raise ValueError(
                    f"--benchmark-model fetch is for phones of {binaries.ABI}: give the path of one for this phone. "
                    f"Received: {found.get('abi')}"
                )
            binaries.fetch(progress=progress)
        name = " ".join(filter(None, (found.get("model"), found.get("processor") or found.get("board"))))
        return found | {
            "target": "adb",
            "processor": name or "a phone",
            "matrix_units": [],
            "system": f"Android {found.get('android') or 'of an unknown version'}",
            "runtime": "benchmark_model with XNNPACK",
            "versions": versions(),
        }

    def measure(self, pairs: Iterable[Pair], progress: OnMessage) -> Iterator[Overhead]:
        """Times pairs: see `Target`. A phone that is lost after two blocks or more leaves those of them.

        Raises:
            OSError: If adb, the phone or space is missing; DeviceLost if the phone is lost before two blocks.
            ValueError: If operators are not delegated to XNNPACK.
        """
        given = self.benchmark_model
        binary = str(binaries.fetch(progress=progress) if given == _FETCH else given)
        require_binary(binary)
        for pair in pairs:
            progress(f"timing {pair}")
            yield (found := self._measure(binary, pair, progress))
            if found.device.missing:
                return

    def _measure(self, binary, pair, progress):
        phone, plan = Phone(self.serial), (f"--num_runs={self.runs}", "--warmup_runs=3", "--min_secs=0")
        flags = (f"--num_threads={pair.cell.threads}", "--use_xnnpack=true", *plan)
        files = {"a": pair.baseline.content, "b": pair.network.content}
        order, last = random.Random(0), {}
        with _copied(phone, binary, files, progress) as (binary, folder):

            def run_block():
                for side in order.sample(("a", "b", "control"), 3):
                    last[side] = _run(phone, binary, folder, "a" if side == "control" else side, flags, self)
                return {side: 1e3 * (run.fastest_us or run.average_us) for side, run in last.items()}

            blocks, conditions = measured_blocks(run_block, phone.celsius, self, phone.serial, progress)
        return pair.overhead(
            blocks.comparison(runs=self.runs),
            undelegated=("a part",) if last["a"].partial or last["b"].partial else (),
            footprints=tuple(_footprint(content, last[side]) for side, content in files.items()),
            device=replace(conditions, flags=flags),
        )


def require_binary(path: FilePath) -> bool:
    """Whether the binary is a file here, not on the phone; raises FileNotFoundError if there is no such file here."""
    is_local = not str(path).startswith(_ON_PHONE)
    if is_local and not Path(path).is_file():
        raise FileNotFoundError(f"There is no benchmark_model {str(path)!r}: --benchmark-model fetch gets it")
    return is_local


@contextlib.contextmanager
def _copied(phone: Phone, path: str, files: dict[str, bytes], progress) -> Iterator[tuple[str, str]]:
    """Copies the binary and the files into a new folder on the phone; yields the binary's path and the folder."""
    folder = f"{FOLDER}/se_keras_{secrets.token_hex(4)}"
    try:
        phone.shell(f"rm -rf {FOLDER}/se_keras_*")  # left by a measurement that lost its phone
        phone.shell(f"mkdir -p {folder}")
        binary = path.removeprefix(_ON_PHONE)
        if require_binary(path):
            progress(f"copying {binary} to {phone.serial}")
            phone.push(Path(binary).read_bytes(), f"{folder}/benchmark_model")
            binary = f"{folder}/benchmark_model"
            phone.shell(f"chmod 755 {binary}")
        for name, content in files.items():
            progress(f"copying file {name.upper()}, {len(content) / 1e6:.1f} MB")
            phone.push(content, f"{folder}/{name}.tflite")
        yield binary, folder
    finally:
        with contextlib.suppress(OSError):
            phone.shell(f"rm -rf {folder}")


def _run(phone, binary, folder, name, flags, options):
    """Runs a file on the phone once: a `Run`. Old versions ignore the flag for the result file, and write none."""
    result = f"{folder}/result.pb"
    command = f"{shlex.quote(binary)} --graph={folder}/{name}.tflite {' '.join(flags)} --result_file_path={result} 2>&1"
    try:
        text = phone.shell(command)
        found = parse(text, phone.pull(result) if _RESULT in text else None)
    except (OSError, ValueError) as error:  # if the cable is pulled, status and output of the run can be anything
        if isinstance(error, DeviceLost) or phone.is_connected():
            raise
        raise DeviceLost(f"The phone no longer answers: {first_line(error)}") from None
    if found.partial and not options.allow_undelegated:
        raise ValueError(
            f"Operators of file {name.upper()} are not delegated to XNNPACK on the phone and run on slow kernels: "
            "--allow-undelegated measures the files anyway"
        )
    return found


def _footprint(content, run):
    return Footprint(bytes=len(content), init_ms=run.init_us / 1e3, first_ms=run.first_us / 1e3, peak_mb=run.memory_mb)
