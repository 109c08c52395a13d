"""Measures two LiteRT files on this machine."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from se_keras.timing import compare

from ...litert.file import LiteRTModel
from ...outputs import noise
from ..energy import find_meter
from ..programs import footprint as footprint_program
from ..programs import run
from ..results import Footprint, Overhead, described, require_pair


def measure(
    baseline: LiteRTModel,
    network: LiteRTModel,
    *,
    variant: str,
    threads: int = 1,
    blocks: int = 30,
    runs: int = 3,
    within: float | None = None,
    seconds: float | None = None,
    allow_undelegated: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Overhead:
    """Times two LiteRT files with the same input in pairs, on this machine.

    Args:
        variant: Variant of both files, for the record: see `Overhead`.
        blocks, runs, within, seconds, progress: As in `timing.compare`.
        allow_undelegated: Whether to measure files with operators that are not delegated to XNNPACK.

    Raises:
        ValueError: If operators are not delegated to XNNPACK, or if the inputs differ.
    """
    a, b, control = (model.runner(threads=threads) for model in (baseline, network, baseline))
    shape = require_pair(a, b)
    undelegated = sorted(set(a.undelegated() + b.undelegated()))
    if undelegated and not allow_undelegated:
        raise ValueError(
            f"Not delegated to XNNPACK: {', '.join(undelegated)}. These operators run on slow kernels, which would "
            "distort the ratio; allow_undelegated=True (--allow-undelegated) measures the files anyway"
        )
    images = noise(shape[1:], samples=shape[0])
    comparison = compare(
        a=a.prepare(images),
        b=b.prepare(images),
        control=control.prepare(images),
        blocks=blocks,
        runs=runs,
        within=within,
        seconds=seconds,
        meter=find_meter(),
        progress=progress,
    )
    return Overhead(
        **described(baseline, network),
        variant=variant,
        threads=threads,
        input_shape=shape,
        comparison=comparison,
        undelegated=tuple(undelegated),
        footprints=tuple(footprint(side.content, threads=threads) for side in (baseline, network)),
    )


def footprint(content: bytes, *, threads: int = 1) -> Footprint:
    """Start-up times and memory of a LiteRT file in a new process; raises ValueError if the file does not run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tflite"
        path.write_bytes(content)
        *_, found = run(footprint_program, path, threads, failure="The file does not run in a separate process")
    return Footprint(bytes=len(content), **found)
