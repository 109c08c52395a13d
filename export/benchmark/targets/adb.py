"""The benchmark's measurement on a phone, through adb and LiteRT's own `benchmark_model`: A, B and A again in turn.

Since 2025 `benchmark_model` writes what it has measured as a BenchmarkResult; what the versions since 2019 print is
read as text, which has a line of timings in microseconds.
"""

import contextlib
import random
import re
import secrets
import shlex
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from se_keras import protos
from se_keras.environment import versions
from se_keras.errors import first_line
from se_keras.timing import Blocks, Comparison, check_plan

from ...litert.file import check_threads
from ..results import Footprint, Overhead, described, require_pair

FOLDER = "/data/local/tmp"
_ON_PHONE = "device:"
_WARMER = 3.0  # degrees Celsius above the beginning that a phone may be before a block
_LONGEST_REST = 300  # seconds to wait for that
_TIMINGS = (
    r"Inference timings in us: Init: (?P<init>[\d.e+]+), First inference: (?P<first>[\d.e+]+), .*?"
    r"Inference \(avg\): (?P<average>[\d.e+]+)",
    r"Average inference timings in us: Warmup: (?P<first>[\d.e+]+), Init: (?P<init>[\d.e+]+), "
    r"no stats: (?P<average>[\d.e+]+)",
)
_RESULT = "Saved benchmark result to:"
# tensorflow/lite/tools/benchmark/proto/benchmark_result.proto
_BenchmarkResult = protos.message(
    "BenchmarkResult",
    {
        "LatencyMetrics": {"avg_ms": (1, float), "min_ms": (2, float), "init_ms": (8, float),
                           "first_inference_ms": (9, float)},
        "MemoryMetrics": {"overall_footprint_kb": (2, int)},
        "BenchmarkResult": {"latency_metrics": (2, "LatencyMetrics"), "memory_metrics": (3, "MemoryMetrics")},
    },
)  # fmt: skip
_NOT_WHOLLY = re.compile(r"(partially executed|not be executed) by the delegate")
_LONGEST_CALL = 1800  # seconds that a call of adb may take: a phone that has gone may never answer
_GONE = re.compile(
    r"device '?[^\n]*'? not found|no devices/emulators found|device offline|error: closed|protocol fault"
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run of `benchmark_model` tells.

    Args:
        average_us: Mean time of a run of the model, in microseconds.
        fastest_us: The fastest; None where it does not tell.
        init_us: Until the model can be run.
        first_us: The first run.
        memory_mb: Memory that the model had added at the end, in 10^6 bytes; None where it does not tell.
        partial: Whether XNNPACK took a part of the model alone, or nothing.
    """

    average_us: float
    fastest_us: float | None
    init_us: float
    first_us: float
    memory_mb: float | None
    partial: bool


@dataclass(frozen=True, kw_only=True)
class PhoneMeasurement:
    """Two files on a phone.

    Args:
        comparison: The times; A is what stands for 1.
        runs: Of the last block, A's and B's.
        flags: Of `benchmark_model`.
        celsius: Warmest sensor before each block; empty where they cannot be read.
        missing: What could not be measured, and why; None if all was.
    """

    comparison: Comparison
    runs: tuple[Run, Run]
    flags: tuple[str, ...]
    celsius: tuple[float, ...]
    missing: str | None = None


class PhoneLost(ConnectionError):
    """The phone no longer answers."""


def parse(text, result=None):
    """Reads what `benchmark_model` prints, and the BenchmarkResult that it wrote, where it did.

    Args:
        text: What it prints.
        result: Bytes of the BenchmarkResult.

    Raises:
        ValueError: If there are no timings in it.
    """
    partial = bool(_NOT_WHOLLY.search(text))
    if result:
        told = _BenchmarkResult.FromString(result)
        latency, memory = told.latency_metrics, told.memory_metrics
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
    counts = re.findall(r"count=\d+[^\n]*", text)  # of warming up, and of the runs: one run alone has no fastest
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
    """A phone that adb reaches.

    Args:
        serial: Which, if there are several.

    Raises:
        OSError: If adb is missing, or no phone answers.
        ValueError: If there are several and none was named.
    """

    def __init__(self, serial=None):
        if shutil.which("adb") is None:
            raise FileNotFoundError(
                "adb is not on the PATH: it comes with Android's platform tools (docs/phone.md says from where)"
            )
        listed = [line.split()[:2] for line in self._call("devices").splitlines()[1:] if line.strip()]
        ready = [name for name, state in listed if state == "device"]
        states = ", ".join(f"{name} {state}" for name, state in listed) or "none"
        if serial is None and len(ready) > 1:
            raise ValueError(f"There are several phones: say which with --serial. Received: {', '.join(ready)}")
        if not ready or serial not in (None, *ready):
            raise OSError(
                f"No phone answers adb{'' if serial is None else f' as {serial!r}'}: unlock it, allow USB debugging, "
                f"and see `adb devices`. Received: {states}"
            )
        self.serial = serial or ready[0]

    def __call__(self, *arguments):
        """What adb prints.

        Raises:
            PhoneLost: If the phone no longer answers.
            OSError: If it refuses.
        """
        return self._call("-s", self.serial, *arguments)

    def shell(self, command):
        """What a command of the phone's shell prints."""
        return self("shell", command)

    def described(self):
        """What the phone says of itself."""
        asked = {
            "model": "getprop ro.product.model",
            "processor": "getprop ro.soc.model",
            "board": "getprop ro.board.platform",
            "android": "getprop ro.build.version.release",
            "abi": "getprop ro.product.cpu.abi",
            "governor": "cat /sys/devices/system/cpu/cpu0/cpufreq/scaling_governor",
        }
        told = {}
        for name, command in asked.items():
            with contextlib.suppress(OSError):
                told[name] = self.shell(f"{command} 2>/dev/null || true").strip() or None
        return told

    def celsius(self):
        """Its warmest sensor; None where none can be read."""
        text = self.shell("cat /sys/class/thermal/thermal_zone*/temp 2>/dev/null || true")
        degrees = [int(x) / 1000 for x in text.split() if re.fullmatch(r"\d{4,6}", x)]
        return max((x for x in degrees if 10 < x < 120), default=None)

    def answers(self):
        """Whether it is still there."""
        try:
            return self("get-state").strip() == "device"
        except OSError:
            return False

    def _call(self, *arguments):
        how = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "errors": "replace"}
        try:
            result = subprocess.run(["adb", *arguments], **how, timeout=_LONGEST_CALL)
        except subprocess.TimeoutExpired:
            raise PhoneLost(f"The phone no longer answers: no word in {_LONGEST_CALL} seconds") from None
        told = f"{result.stdout}\n{result.stderr}"
        if result.returncode and _GONE.search(result.stderr):
            raise PhoneLost(f"The phone no longer answers: {first_line(result.stderr)}")
        if result.returncode or "not executable" in told:
            if "No space left" in told:
                raise OSError(f"The phone has no space left in {FOLDER}")
            if "not executable" in told or "cannot execute" in told or "Exec format error" in told:
                raise OSError(
                    "The phone cannot run this benchmark_model: take the one for its processor, such as arm64"
                )
            lines = [line.strip() for line in told.splitlines() if line.strip()] or ["nothing is told"]
            raise OSError(f"adb {arguments[-2]} fails with status {result.returncode}: {lines[-1]}")
        return result.stdout


def environment(serial=None):
    """Where a phone measures: what it says of itself, with the fields of `overhead.environment`."""
    told = Phone(serial).described()
    name = " ".join(filter(None, (told.get("model"), told.get("processor") or told.get("board"))))
    return told | {
        "processor": name or "a phone",
        "matrix_units": [],
        "system": f"Android {told.get('android') or 'of a version that it does not tell'}",
        "runtime": "benchmark_model with XNNPACK",
        "versions": versions(),
    }


def measure(
    baseline, network, *, variant, benchmark_model, serial=None, threads=1, blocks=10, runs=20, rest=5.0, within=None,
    seconds=None, allow_undelegated=False, progress=None,
):  # fmt: skip
    """Times two LiteRT files in pairs, on a phone: `overhead.measure` for one.

    Args:
        baseline: A `LiteRTModel`: what stands for 1.
        network: Another, with the same input.
        variant: What to call both in the record.
        benchmark_model, serial, threads, blocks, runs, rest, within, seconds, allow_undelegated, progress: As in
            `measure_on_phone`.

    Returns:
        An `Overhead`, with the `flags` of benchmark_model, the warmest sensor before each block in `celsius` (empty
        where they cannot be read), and what is `missing`, and why, where the phone was lost.

    Raises:
        ValueError: If the inputs differ, or as `measure_on_phone` does.
        OSError: As `measure_on_phone` does.
    """
    shape = require_pair(baseline.runner(), network.runner())
    found = measure_on_phone(
        baseline.content, network.content, benchmark_model=benchmark_model, serial=serial, threads=threads,
        blocks=blocks, runs=runs, rest=rest, within=within, seconds=seconds, allow_undelegated=allow_undelegated,
        progress=progress,
    )  # fmt: skip
    return Overhead(
        **described(baseline, network),
        variant=variant,
        threads=threads,
        input_shape=shape,
        comparison=found.comparison,
        undelegated=("a part",) if any(run.partial for run in found.runs) else (),
        footprints=tuple(
            Footprint(bytes=len(side.content), init_ms=run.init_us / 1e3, first_ms=run.first_us / 1e3,
                      peak_mb=run.memory_mb) for side, run in zip((baseline, network), found.runs, strict=True)
        ),
        flags=found.flags,
        celsius=found.celsius,
        missing=found.missing,
    )  # fmt: skip


def measure_on_phone(
    a, b, *, benchmark_model, serial=None, threads=1, blocks=10, runs=20, rest=5.0, within=None, seconds=None,
    allow_undelegated=False, seed=0, progress=None,
):  # fmt: skip
    """Times the contents of two LiteRT files on a phone, in pairs.

    Args:
        a: Bytes of the file that stands for 1.
        b: Of the other.
        benchmark_model: Path of LiteRT's binary for the phone; `device:/path` where it lies there already.
        serial: Of the phone, if there are several.
        threads: Number of threads.
        blocks: Paired measurements: each runs A, B and A again, in random order.
        runs: Runs of a file in each.
        rest: Seconds between blocks; longer where the phone is still warm.
        within, seconds: What ends the comparison before all blocks, as in `benchmark.compare`.
        allow_undelegated: Whether to report though XNNPACK took a part of a file alone.
        seed: Of the order.
        progress: Called with what is done next, as a string.

    Returns:
        A `PhoneMeasurement`. Where the phone is lost after two blocks, of those that it has.

    Raises:
        OSError: If adb, the phone, the binary or space is missing; PhoneLost, if it is lost before two blocks.
        ValueError: If an argument is out of range, or if operators fell off XNNPACK.
    """
    check_plan(blocks, runs)
    check_threads(threads)
    if not rest >= 0:
        raise ValueError(f"rest must be 0 seconds or more. Received: rest={rest!r}")
    local = require_binary(benchmark_model)
    phone = Phone(serial)
    tell = progress or (lambda line: None)
    folder = f"{FOLDER}/se_keras_{secrets.token_hex(4)}"
    flags = (f"--num_threads={threads}", "--use_xnnpack=true", f"--num_runs={runs}", "--warmup_runs=3", "--min_secs=0")
    found, last, celsius, missing = Blocks(within=within, seconds=seconds, seed=seed), {}, [], None
    try:
        phone.shell(f"rm -rf {FOLDER}/se_keras_*")  # of a run whose phone was lost
        phone.shell(f"mkdir -p {folder}")
        binary = str(benchmark_model).removeprefix(_ON_PHONE)
        if local:
            tell(f"copying {binary} to {phone.serial}")
            _push(phone, Path(binary).read_bytes(), f"{folder}/benchmark_model")
            binary = f"{folder}/benchmark_model"
            phone.shell(f"chmod 755 {binary}")
        for name, content in (("a", a), ("b", b)):
            tell(f"copying file {name.upper()}, {len(content) / 1e6:.1f} MB")
            _push(phone, content, f"{folder}/{name}.tflite")
        order = random.Random(seed)
        for block in range(blocks):
            tell(f"timing on {phone.serial}: block {block + 1} of {blocks}")
            _rest(phone, celsius, rest if block else 0, tell)
            runs_of = {}
            for side in order.sample(("a", "b", "control"), 3):
                runs_of[side] = _run(phone, binary, folder, "a" if side == "control" else side, flags)
                if runs_of[side].partial and not allow_undelegated:
                    name = "B" if side == "b" else "A"
                    raise ValueError(
                        f"Operators of file {name} fell off XNNPACK on the phone and run on slow kernels: "
                        "--allow-undelegated measures all the same"
                    )
            found.add({side: 1e3 * (run.fastest_us or run.average_us) for side, run in runs_of.items()})
            last = runs_of
            if found.are_enough():
                break
    except PhoneLost as lost:
        if len(found) < 2:
            raise
        missing = f"{len(found)} of {blocks} blocks: {lost}"
    finally:
        with contextlib.suppress(OSError):
            phone.shell(f"rm -rf {folder}")
    return PhoneMeasurement(
        comparison=found.comparison(runs=runs),
        runs=(last["a"], last["b"]),
        flags=flags,
        celsius=tuple(celsius),
        missing=missing,
    )


def require_binary(benchmark_model):
    """Whether the binary lies here, not on the phone; raises FileNotFoundError if it lies nowhere."""
    local = not str(benchmark_model).startswith(_ON_PHONE)
    if local and not Path(benchmark_model).is_file():
        raise FileNotFoundError(
            f"There is no benchmark_model {str(benchmark_model)!r}: docs/phone.md says where to get it"
        )
    return local


def _run(phone, binary, folder, name, flags):
    """Runs a file on the phone once: a `Run`. A version that does not write its result passes over where to."""
    result = f"{folder}/result.pb"
    command = f"{shlex.quote(binary)} --graph={folder}/{name}.tflite {' '.join(flags)} --result_file_path={result} 2>&1"
    try:
        text = phone.shell(command)
        return parse(text, _pull(phone, result) if _RESULT in text else None)
    except (OSError, ValueError) as error:  # a cable that is pulled ends a run with any status, and half of its words
        if isinstance(error, PhoneLost) or phone.answers():
            raise
        raise PhoneLost(f"The phone no longer answers: {first_line(error)}") from None


def _pull(phone, source):
    with tempfile.TemporaryDirectory() as folder:
        phone("pull", source, f"{folder}/file")
        return Path(folder, "file").read_bytes()


def _push(phone, content, target):
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        phone("push", file.name, target)


def _rest(phone, celsius, seconds, tell):
    """Waits, and goes on waiting while the phone is warmer than it was at first."""
    time.sleep(seconds)
    now, until = phone.celsius(), time.monotonic() + _LONGEST_REST
    while seconds and celsius and now is not None and now > celsius[0] + _WARMER and time.monotonic() < until:
        tell(f"waiting for {phone.serial} to cool down: {now:.1f} degrees Celsius, {celsius[0]:.1f} at first")
        time.sleep(seconds)
        now = phone.celsius()
    if now is not None:
        celsius.append(now)
