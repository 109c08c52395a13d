"""Counts the instructions of pairs of LiteRT files on Arm, which qemu emulates. Nothing is timed."""

import contextlib
import json
import math
import os
import shlex
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from se_keras.environment import versions
from se_keras.storage import sha256, staged
from se_keras.timing import Ratio
from se_keras.typing import Array, FilePath, Json, OnMessage

from ...litert.file import undelegated
from ...outputs import agreement, noise
from .. import arm
from ..measuring import Pair, largest_difference
from ..programs import marked_inference, run
from ..results import Counts, Overhead

# Processors of qemu. XNNPACK has int8 products of pairs for the first, of four for the second, and of 2x8 matrices for
# the third, which is qemu's processor with every extension of Arm, except SME: XNNPACK's int8 products for SME give
# wrong results under qemu 7.2.
CPUS = {"cortex-a53": "Cortex-A53", "cortex-a76": "Cortex-A76", "max,sme=off": "Arm with i8mm"}

# What an instruction is, as (kind, mask, value): the first row with word & mask == value, of Arm's A64 encoding.
# https://developer.arm.com/documentation/ddi0602/latest/Index-by-Encoding
KINDS = (
    # Products of int8, from the smallest to the largest: 8 or 16 products, 16 products, 32 products, an outer product.
    ("smull", 0xBFE0FC00, 0x0E20C000),
    ("smull", 0xBFE0FC00, 0x0E208000),  # smlal, which adds
    ("sdot", 0xBFE0FC00, 0x0E809400),
    ("sdot", 0xBFC0F400, 0x0F80E000),  # by an element
    ("smmla", 0xFFE0FC00, 0x4E80A400),
    ("smopa", 0xFFE0001C, 0xA0800000),  # SME
    # Products of floats
    ("fmla", 0xBFA0FC00, 0x0E20CC00),
    ("fmla", 0xBF80F400, 0x0F801000),  # by an element
    ("fmul", 0xBFA0FC00, 0x2E20DC00),
    ("fmul", 0xBF80F400, 0x0F809000),  # by an element
    ("fmopa", 0xFFE0001C, 0x80800000),  # SME
    ("other", 0xFEC00000, 0xF8800000),  # prefetches, which are encoded as loads
    ("load", 0xBE400000, 0x0C400000),  # of structures: ld1 to ld4
    ("load", 0x3F400000, 0x08400000),  # exclusive
    ("load", 0x3A400000, 0x28400000),  # of pairs
    ("load", 0x3B000000, 0x18000000),  # of literals
    ("load", 0x3E400000, 0x3C400000),  # of a vector
    ("store", 0xBE400000, 0x0C000000),
    ("store", 0x3F400000, 0x08000000),
    ("store", 0x3A400000, 0x28000000),
    ("store", 0x3E400000, 0x3C000000),
    ("store", 0x3EC00000, 0x38000000),  # of a register
    ("load", 0x3E000000, 0x38000000),  # into a register: every other one of these
    ("vector", 0x0E000000, 0x0E000000),  # other arithmetic of vectors and floats
    ("other", 0x00000000, 0x00000000),  # integers, addresses, branches
)


def kind_of(word: int) -> str:
    """The kind of an instruction."""
    return next(kind for kind, mask, value in KINDS if word & mask == value)


@dataclass(frozen=True, kw_only=True)
class Instructions:
    """Processors of Arm, whose instructions qemu counts for one inference, the first, on one thread.

    Args:
        arm_instructions: Processors as qemu names them, such as `"cortex-a76"`; empty: those of `CPUS`.
        fetch: Whether to get qemu and Python for Arm if the folder is missing.
        arm_folder: Folder of qemu and Python for Arm: see `arm.fetch`. The plugin that counts is kept there, too.
        allow_undelegated: Whether to count files with operators that are not delegated to XNNPACK.
    """

    arm_instructions: Sequence[str] = ()
    fetch: bool = False
    arm_folder: FilePath = arm.FOLDER
    allow_undelegated: bool = False

    def connect(self, progress: OnMessage) -> Json:
        """Compiles the plugin, and checks qemu and the names of the processors: see `Target`."""
        require_compiler()  # before anything is fetched
        machine = self._arm(progress)
        for cpu in self._cpus:
            try:
                machine.python(cpu, "--version")
            except OSError as error:
                rule = f"--arm-instructions takes processors of qemu, such as {', '.join(CPUS)}"
                raise ValueError(f"{rule}. Received: {cpu!r}: {error}") from error
        with tempfile.TemporaryDirectory() as folder:
            options = ("-plugin", f"{compiled_plugin(machine.folder)},out={folder}/counts")
            arm.finish(machine.start_python(self._cpus[0], "-c", "import ai_edge_litert.interpreter", options=options))
        devices = [_processor(machine, cpu) for cpu in self._cpus]
        return _environment(machine, _processor(machine, "Arm")) | {"devices": devices}

    def measure(self, pairs: Iterable[Pair], progress: OnMessage) -> Iterator[Overhead]:
        """Counts the instructions of pairs, on one processor after the other: see `Target`.

        Raises:
            ValueError: If the outputs on Arm are not those of this machine, if operators are not delegated to XNNPACK,
                or if a pair is for several threads.
        """
        machine = self._arm(progress)
        plugin = compiled_plugin(machine.folder)
        for pair in pairs:
            if pair.cell.threads != 1:
                raise ValueError(f"Instructions are counted on one thread. Received: {pair.cell.threads} threads")
            with tempfile.TemporaryDirectory() as folder:
                counter = _Counter(machine=machine, plugin=plugin, folder=Path(folder), pair=pair)
                for cpu in self._cpus:
                    progress(f"counting instructions of {pair} on {CPUS.get(cpu, cpu)}")
                    yield counter.count(cpu, allow_undelegated=self.allow_undelegated)

    @property
    def _cpus(self):
        return tuple(self.arm_instructions) or tuple(CPUS)

    def _arm(self, progress):
        if self.fetch:
            return arm.fetch(self.arm_folder, progress=progress)
        try:
            return arm.Arm(self.arm_folder)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}. --fetch gets them, with Debian's apt-get") from None


class _Counter:
    """Counts the instructions of a pair, whose files it writes into a folder with their outputs on this machine."""

    def __init__(self, *, machine: arm.Arm, plugin: Path, folder: Path, pair: Pair):
        self._machine, self._plugin, self._folder, self._pair = machine, plugin, folder, pair
        files = {"a": pair.baseline, "b": pair.network}
        batch, *shape = pair.cell.input_shape
        for name, file in files.items():
            (folder / f"{name}.tflite").write_bytes(file.content)
            dtype = file.runner().input_dtype
            np.save(folder / f"{name}.npy", noise(shape, samples=batch, dtype=dtype).astype(dtype)[None])
        self._expected = {}
        for name in files:
            run(marked_inference, *self._paths(name, name), failure="The file does not run on this machine")
            self._expected[name] = _outputs(folder / f"{name}.npz")

    def count(self, cpu: str, *, allow_undelegated: bool) -> Overhead:
        """The `Overhead` on a processor: A twice, and B. Their counts do not depend on what else runs."""
        sides = {"a": "a", "control": "a", "b": "b"}
        with contextlib.ExitStack() as stack:
            started = {}
            for side, name in sides.items():
                started[side] = stack.enter_context(self._start(cpu, name, side))
                stack.callback(started[side].kill)  # if another one failed
            a, control, b = (self._finish(process, cpu, sides[side], side) for side, process in started.items())
        found = sorted({*a[1], *b[1]})
        if found and not allow_undelegated:
            raise ValueError(
                f"Not delegated to XNNPACK on Arm: {', '.join(found)}. These operators run on slow kernels, which "
                "would distort the ratio; --allow-undelegated counts the files anyway"
            )
        return self._pair.overhead(
            _counts(a[0], control[0], b[0]),
            undelegated=tuple(found),
            environment=_environment(self._machine, _processor(self._machine, cpu)),
        )

    def _start(self, cpu, name, side):
        options = ("-plugin", f"{self._plugin},out={self._folder / f'{side}.counts'}")
        program = ("-P", marked_inference.__file__, *self._paths(name, f"{side}_on_arm"))
        return self._machine.start_python(cpu, *program, options=options)

    def _finish(self, process, cpu, name, side):
        """Instructions of one file by kind, and its operators that are not delegated to XNNPACK."""
        printed = arm.finish(process)
        self._check(cpu, name, _outputs(self._folder / f"{side}_on_arm.npz"))
        counts = read_counts((self._folder / f"{side}.counts").read_text())
        return counts, undelegated(**json.loads(printed.splitlines()[-1]))

    def _check(self, cpu, name, outputs):
        """Raises ValueError if the outputs on Arm are not those of this machine."""
        limit = largest_difference(self._pair.cell.precision)
        difference = agreement(self._expected[name], outputs).max_error
        if difference > limit:
            network = self._pair.cell.baseline if name == "a" else self._pair.cell.network
            raise ValueError(
                f"{network} must have the same outputs on {cpu} and on this machine, within {limit:.0e} of their "
                f"range, before its instructions are counted. Received: {difference:.1e}"
            )

    def _paths(self, name, outputs):
        return self._folder / f"{name}.tflite", self._folder / f"{name}.npy", self._folder / f"{outputs}.npz"


def _counts(a: dict[str, int], control: dict[str, int], b: dict[str, int]) -> Counts:
    """The `Counts` of three runs. The interval is between the ratios to both counts of A, which are mostly equal."""
    least, most = sorted((a["total"], control["total"]))
    ratio = Ratio(median=b["total"] / math.sqrt(least * most), low=b["total"] / most, high=b["total"] / least)
    same = control["total"] / a["total"]
    control_ratio = Ratio(median=same, low=same, high=same)
    return Counts(ratio=ratio, control=control_ratio, a_instructions=a, b_instructions=b)


def read_counts(text: str) -> dict[str, int]:
    """Instructions by kind between the first two marks, from the lines of the plugin; `total` is their sum."""
    before, after, *_ = ([int(number) for number in line.split()] for line in text.splitlines())
    found = Counter()
    for (kind, *_), first, second in zip(KINDS, before, after, strict=True):
        found[kind] += second - first
    return {"total": found.total(), **found}


def require_compiler() -> list[str]:
    """The command of the C compiler, which the variable CC may name; raises FileNotFoundError if there is none."""
    command = shlex.split(os.environ.get("CC") or "cc")
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(f"Counting needs a C compiler, such as Debian's gcc, or CC. Missing: {command[0]}")
    return command


def compiled_plugin(folder: Path) -> Path:
    """The plugin of qemu that counts, compiled into a folder if it is not there.

    Raises:
        OSError: If there is no C compiler, or if it fails.
    """
    source = Path(marked_inference.__file__).with_name("count_instructions.c").read_bytes()
    kinds = ", ".join(f"{{{mask:#x}, {value:#x}}}" for _, mask, value in KINDS)
    path = folder / f"count_instructions-{sha256(source + kinds.encode())[:16]}.so"
    if not path.exists():
        compiler = require_compiler()
        with staged(path) as target, tempfile.TemporaryDirectory() as temporary:
            (copy := Path(temporary) / "count_instructions.c").write_bytes(source)
            arm.call(*compiler, "-shared", "-fPIC", "-O2", f"-DKINDS={kinds}", "-o", target, copy)
    return path


def _environment(machine: arm.Arm, processor: str) -> Json:
    return {
        "processor": processor,
        "matrix_units": [],
        "system": "Debian for Arm in qemu's user mode",
        "runtime": f"LiteRT {machine.versions['ai-edge-litert for Arm']} with XNNPACK",
        "versions": versions() | machine.versions,
        "target": "instructions",
    }


def _processor(machine: arm.Arm, cpu: str) -> str:
    """The name of a processor in records."""
    return f"{CPUS.get(cpu, cpu)} (counted under qemu {machine.versions['qemu']}, not timed)"


def _outputs(path: Path) -> dict[str, Array]:
    with np.load(path) as outputs:
        return dict(outputs)
