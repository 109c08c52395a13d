"""What squeeze-and-excitation costs: a network and its baseline, exported alike and timed in pairs."""

import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import keras

from se_keras.catalogue import AS_PUBLISHED, create, spec_of
from ..agreement import noise
from .energy import find_meter
from .profiler import profile
from ..litert.conversion import PRECISIONS, check_threads, to_litert
from ..manifest import sha256, versions
from ..serving.savedmodel import check_images
from se_keras.timing import Comparison, compare

FORMS = {"published": False, "lowered": True}  # the exporter's `lowering`
AS_GIVEN = "as given"  # the form of files that were exported before
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
        form: `"published"` or `"lowered"`, both sides alike, or `"as given"`.
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
    form: str
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
        return asdict(self) | {"is_real": self.comparison.is_real}


def measure(
    baseline,
    network,
    *,
    form,
    threads=1,
    blocks=30,
    runs=3,
    within=None,
    seconds=None,
    allow_undelegated=False,
    progress=None,
):
    """Times two LiteRT files in pairs, on this machine.

    Args:
        baseline: A `LiteRTModel`: what stands for 1.
        network: Another, with the same input.
        form: What to call both in the record.
        threads: Number of threads of each.
        blocks: Blocks of the comparison.
        runs: Runs of each side in a block.
        within, seconds: What ends the comparison before all blocks, as in `benchmark.compare`.
        allow_undelegated: Whether to report a pair with operators that fell off XNNPACK.
        progress: Called after each block with the number of blocks done.

    Returns:
        An `Overhead`.

    Raises:
        ValueError: If operators fell off XNNPACK, or if the inputs differ.
    """
    models = {"a": baseline, "b": network, "double": baseline}
    runners = {side: model.runner(threads=threads) for side, model in models.items()}
    shape = require_pair(runners["a"], runners["b"])
    undelegated = sorted(set(runners["a"].undelegated() + runners["b"].undelegated()))
    if undelegated and not allow_undelegated:
        raise ValueError(
            f"{', '.join(undelegated)} fell off XNNPACK and run on slow kernels: the ratio would not be the networks'. "
            "allow_undelegated=True (--allow-undelegated) measures all the same"
        )
    images = noise(shape[1:], samples=shape[0])
    comparison = compare(
        **{side: runner.prepare(images) for side, runner in runners.items()},
        blocks=blocks,
        runs=runs,
        within=within,
        seconds=seconds,
        meter=find_meter(),
        progress=progress,
    )
    return Overhead(
        **described(baseline, network),
        form=form,
        threads=threads,
        input_shape=shape,
        comparison=comparison,
        undelegated=tuple(undelegated),
        footprints=tuple(footprint(side.content, threads=threads) for side in (baseline, network)),
    )


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


def overheads(
    network,
    *,
    precisions,
    forms=tuple(FORMS),
    se=AS_PUBLISHED,
    input_shape=None,
    threads=(1,),
    kept=(),
    profiled=False,
    measure=measure,
    progress=None,
):
    """Exports and measures a network beside its baseline, yielding each `Overhead` as soon as it is there.

    Args:
        network: A network of the catalogue with squeeze-and-excitation.
        precisions: Names of precisions of `to_litert`.
        forms: Of `FORMS`.
        se: An `SEConfig` in place of the network's own.
        input_shape: `(height, width, channels)`; default: the network's own.
        threads: Numbers of threads.
        kept: Records of earlier measurements, as `to_json` gives them: what is among them is not measured again.
        profiled: Whether to profile both files too; where the runtime cannot, `progress` is told, and nothing is lost.
        measure: What measures a pair: `functools.partial(measure, blocks=10)`, or `android.measure` for a phone.
        progress: Called with what is done next, as a string.

    Raises:
        ValueError: If the network has no squeeze-and-excitation, if a form or precision is none, or as `measure` does.
    """
    for what, given, possible in (("form", forms, tuple(FORMS)), ("precision", precisions, PRECISIONS)):
        if not given or not set(given) <= set(possible):
            raise ValueError(f"{what} must be one or more of {possible}. Received: {', '.join(given) or 'none'}")
    config = _config(network, se)
    for number in threads:
        check_threads(number)
    shape = (1, *(input_shape or spec_of(network).input_shape))
    done = {cell(record) for record in kept if not record.get("missing")}

    def missing(form):
        cells = {(precision, number) for precision in precisions for number in threads}
        pair = (network, baseline_name(network))
        return {(p, n) for p, n in cells if (*pair, p, form, n, shape, _text(asdict(config))) not in done}

    for form in forms:
        wanted = missing(form)
        if not wanted:
            continue
        needed = [precision for precision in precisions if precision in {p for p, _ in wanted}]
        exporting = {"precisions": needed, "se": config, "input_shape": input_shape, "progress": progress}
        pairs = export_pairs(network, form=form, **exporting)
        gc.collect()  # Keras models are cycles of some hundred megabytes
        for precision in needed:
            pair = pairs.pop(precision)
            for number in (number for number in threads if (precision, number) in wanted):
                if progress:
                    more = f", {number} threads" * (number > 1)
                    progress(f"timing {network} beside {baseline_name(network)}, {precision} {form}{more}")
                found = replace(measure(**pair, form=form, threads=number), se=asdict(config))
                if profiled:
                    try:
                        found = replace(found, profiles=tuple(_by_stage(file, number) for file in pair.values()))
                    except ValueError as error:  # the times are there all the same
                        if progress:
                            progress(f"not profiled: {error}")
                yield found


def overheads_of_files(baseline, network, *, names, threads=(1,), kept=(), measure=measure, progress=None):
    """Measures two LiteRT files, yielding an `Overhead` for each number of threads.

    Args:
        baseline, network: As in `measure`.
        names: What to call them in the record: files of one network differ in their names alone.
        threads, kept, measure, progress: As in `overheads`.
    """
    done = {(tuple(record["sha256"]), record["threads"]) for record in kept if not record.get("missing")}
    for number in threads:
        if (described(baseline, network)["sha256"], number) not in done:
            if progress:
                progress(f"timing {' beside '.join(reversed(names))}{f', {number} threads' * (number > 1)}")
            found = measure(baseline, network, form=AS_GIVEN, threads=number)
            yield replace(found, baseline=names[0], network=names[1])


def _by_stage(file, threads):
    sums = {}
    for (stage, part), microseconds in profile(file, threads=threads).by("stage", "part").items():
        sums.setdefault(stage or "outside", {})[part] = microseconds
    return sums


def cell(record):
    """What a record is of: no two measurements differ in this alone."""
    fields = ("network", "baseline", "precision", "form", "threads")
    return *(record[name] for name in fields), tuple(record["input_shape"]), _text(record["se"])


def _text(se):
    return json.dumps(se, sort_keys=True)  # tuples and lists alike


def export_pairs(network, *, form, precisions, se=AS_PUBLISHED, input_shape=None, progress=None):
    """Exports a network and its baseline with random weights, which cost as much time as trained ones.

    Returns:
        `{precision: {"baseline": LiteRTModel, "network": LiteRTModel}}`; the arguments are those of `overheads`.
    """
    config = _config(network, se)
    keras.utils.set_random_seed(0)  # the same weights, and so the same int8 scales, every time
    pairs = {precision: {} for precision in precisions}
    for side, arguments in {
        "baseline": {"se": None, "name": baseline_name(network)},
        "network": {"se": config},
    }.items():
        if progress:
            progress(f"exporting {arguments.get('name', network)} {form}")
        # Logits: the softmax of an untrained network is 0 and 1, and would hide how well the files agree.
        model = create(network, input_shape=input_shape, classifier_activation=None, **arguments)
        images = check_images(model, samples=5)
        float32 = to_litert(model, held_out=images, lowering=FORMS[form])
        for precision in precisions:
            pairs[precision][side] = (
                float32
                if precision == "float32"
                else to_litert(
                    model,
                    precision=precision,
                    calibration=images,
                    lowering=FORMS[form],
                    converted=float32,
                )
            )
    return pairs


def _config(network, se):
    """The `SEConfig` of what is measured."""
    config = spec_of(network).se if se == AS_PUBLISHED else se
    if config is None:
        raise ValueError(f"{network} is a baseline: name a network with squeeze-and-excitation, such as se_resnet50")
    return config


def footprint(content, *, threads=1):
    """Runs a LiteRT file in a process of its own, and tells what it takes: a `Footprint`.

    Raises:
        ValueError: If it does not run.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tflite"
        path.write_bytes(content)
        command = [sys.executable, "-c", _ALONE, str(path), str(threads)]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise ValueError(f"The file does not run in a process of its own: {result.stderr.strip().splitlines()[-1:]}")
    return Footprint(bytes=len(content), **json.loads(result.stdout.splitlines()[-1]))


_ALONE = """
import json, sys, time
import numpy as np
from ai_edge_litert.interpreter import Interpreter

def peak():
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 / 1e6 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None

before, start = peak(), time.perf_counter()
interpreter = Interpreter(sys.argv[1], num_threads=int(sys.argv[2]))
interpreter.allocate_tensors()
ready = time.perf_counter()
for detail in interpreter.get_input_details():
    interpreter.set_tensor(detail["index"], np.zeros(detail["shape"], detail["dtype"]))
first = time.perf_counter()
interpreter.invoke()
end, after = time.perf_counter(), peak()
print(json.dumps({
    "init_ms": 1e3 * (ready - start),
    "first_ms": 1e3 * (end - first),
    "peak_mb": None if before is None else after - before,
}))
"""


def baseline_name(network):
    """What the baseline of a network is called: se_resnet50's is resnet50."""
    return network.removeprefix("se_") if network.startswith("se_") else f"{network}_without_se"


def environment():
    """Where a measurement was made: processor, system and versions."""
    processor, flags = _processor()
    return {
        "processor": processor,
        # Matrix units make int8 convolutions faster, not the multiplication of a gate: SE's share grows.
        "matrix_units": sorted(flag for flag in flags if flag in _MATRIX_UNITS),
        "cores": os.cpu_count(),
        "affinity": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "runtime": f"LiteRT {versions()['ai-edge-litert']} with XNNPACK",
        "versions": versions(),
    }


def _read(path):
    """What a file of the system says; None where there is none."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


_MATRIX_UNITS = ("amx_int8", "amx_bf16", "i8mm", "sme", "sme2")


def _processor():
    """Model name and feature flags, where the system tells them."""
    try:
        with open("/proc/cpuinfo") as file:
            entries = dict(line.rstrip("\n").split(":", 1) for line in file if ":" in line)
    except OSError:
        entries = {}
    entries = {key.strip(): value.strip() for key, value in entries.items()}
    flags = entries.get("flags") or entries.get("Features") or ""
    return entries.get("model name") or platform.processor() or platform.machine(), flags.split()
