"""The benchmark's measurement on a phone, through adb and LiteRT's own `benchmark_model`: A, B and A again in turn.

What `benchmark_model` prints is read as text: of all versions since 2019 it has a line of timings in microseconds.
"""

import contextlib
import random
import re
import secrets
import shutil
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from se_keras.errors import first_line
from se_keras.export.benchmark import Comparison, check_plan, ratio_of

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
        memory_mb: Memory that the model added; None where it does not tell.
        partial: Whether XNNPACK took a part of the model alone.
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
        phone: What it says of itself: model, processor, system, and so on.
        runs: Of the last block, A's and B's.
        flags: Of `benchmark_model`.
        celsius: Warmest sensor before each block; empty where they cannot be read.
        missing: What could not be measured, and why; None if all was.
    """

    comparison: Comparison
    phone: dict
    runs: tuple[Run, Run]
    flags: tuple[str, ...]
    celsius: tuple[float, ...]
    missing: str | None = None


class PhoneLost(ConnectionError):
    """The phone no longer answers."""


def parse(text):
    """Reads what `benchmark_model` prints.

    Raises:
        ValueError: If there are no timings in it.
    """
    found = next((match for pattern in _TIMINGS if (match := re.search(pattern, text))), None)
    if found is None:
        last = first_line((text.strip().splitlines() or ["nothing"])[-1])
        raise ValueError(f"benchmark_model prints its timings at the end. Received: {last}")
    counts = re.findall(r"count=\d+ .*?min=([\d.e+]+)", text)
    memory = re.search(r"emory footprint[^:]*\(MB\): init=[\d.e+-]+ overall=([\d.e+-]+)", text)
    return Run(
        average_us=float(found["average"]),
        fastest_us=float(counts[-1]) if counts else None,
        init_us=float(found["init"]),
        first_us=float(found["first"]),
        memory_mb=float(memory[1]) if memory else None,
        partial="partially executed by the delegate" in text,
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

    def _call(self, *arguments):
        result = subprocess.run(["adb", *arguments], capture_output=True, text=True, errors="replace")
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
            raise OSError(f"adb {' '.join(arguments[-2:])}: {first_line(told)}")
        return result.stdout


def measure_on_phone(
    a, b, *, benchmark_model, serial=None, threads=1, blocks=10, runs=20, rest=5.0, allow_undelegated=False, seed=0,
    progress=None,
):  # fmt: skip
    """Times two LiteRT files on a phone, in pairs.

    Args:
        a: Bytes of the file that stands for 1.
        b: Of the other.
        benchmark_model: Path of LiteRT's binary for the phone; `device:/path` where it lies there already.
        serial: Of the phone, if there are several.
        threads: Number of threads.
        blocks: Paired measurements: each runs A, B and A again, in random order.
        runs: Runs of a file in each.
        rest: Seconds between blocks; longer where the phone is still warm.
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
    local = not str(benchmark_model).startswith(_ON_PHONE)
    if local and not Path(benchmark_model).is_file():
        raise FileNotFoundError(
            f"There is no benchmark_model {str(benchmark_model)!r}: docs/phone.md says where to get it"
        )
    phone = Phone(serial)
    tell = progress or (lambda line: None)
    folder = f"{FOLDER}/se_keras_{secrets.token_hex(4)}"
    flags = (f"--num_threads={threads}", "--use_xnnpack=true", f"--num_runs={runs}", "--warmup_runs=3", "--min_secs=0")
    described, times, last, celsius, missing = phone.described(), {"a": [], "b": [], "double": []}, {}, [], None
    try:
        phone.shell(f"mkdir -p {folder}")
        binary = str(benchmark_model).removeprefix(_ON_PHONE)
        if local:
            tell(f"copying {binary} to {described.get('model') or phone.serial}")
            _push(phone, Path(binary).read_bytes(), f"{folder}/benchmark_model")
            binary = f"{folder}/benchmark_model"
        for name, content in (("a", a), ("b", b)):
            tell(f"copying file {name.upper()}, {len(content) / 1e6:.1f} MB")
            _push(phone, content, f"{folder}/{name}.tflite")
        phone.shell(f"chmod 755 {binary}")
        order = random.Random(seed)
        for block in range(blocks):
            tell(f"timing on {described.get('model') or phone.serial}: block {block + 1} of {blocks}")
            _rest(phone, celsius, rest if block else 0)
            found = {}
            for side in order.sample(sorted(times), 3):
                file = f"{folder}/{'a' if side == 'double' else side}.tflite"
                found[side] = parse(phone.shell(f"{binary} --graph={file} {' '.join(flags)} 2>&1"))
                if found[side].partial and not allow_undelegated:
                    name = "B" if side == "b" else "A"
                    raise ValueError(
                        f"Operators of file {name} fell off XNNPACK on the phone and run on slow kernels: "
                        "--allow-undelegated measures all the same"
                    )
            for side, run in found.items():
                times[side].append(run.fastest_us or run.average_us)
            last = found
    except PhoneLost as lost:
        if len(times["a"]) < 2:
            raise
        missing = f"{len(times['a'])} of {blocks} blocks: {lost}"
    finally:
        with contextlib.suppress(OSError):
            phone.shell(f"rm -rf {folder}")
    comparison = Comparison(
        ratio=ratio_of(times["b"], times["a"], seed),
        null=ratio_of(times["double"], times["a"], seed),
        a_ms=statistics.median(times["a"]) / 1e3,
        b_ms=statistics.median(times["b"]) / 1e3,
        blocks=len(times["a"]),
        runs=runs,
    )
    return PhoneMeasurement(
        comparison=comparison,
        phone=described,
        runs=(last["a"], last["b"]),
        flags=flags,
        celsius=tuple(celsius),
        missing=missing,
    )


def _push(phone, content, target):
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        phone("push", file.name, target)


def _rest(phone, celsius, seconds):
    """Waits, and goes on waiting while the phone is warmer than it was at first."""
    time.sleep(seconds)
    now, until = phone.celsius(), time.monotonic() + _LONGEST_REST
    while seconds and celsius and now is not None and now > celsius[0] + _WARMER and time.monotonic() < until:
        time.sleep(seconds)
        now = phone.celsius()
    if now is not None:
        celsius.append(now)
