"""The benchmark's measurement on this machine."""

import tempfile
from pathlib import Path

from se_keras.timing import compare

from ...agreement import noise
from ..energy import find_meter
from ..programs import footprint as footprint_program
from ..programs import run
from ..results import Footprint, Overhead, described, require_pair


def measure(
    baseline,
    network,
    *,
    variant,
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
        variant: What to call both in the record.
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
    models = {"a": baseline, "b": network, "control": baseline}
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
        variant=variant,
        threads=threads,
        input_shape=shape,
        comparison=comparison,
        undelegated=tuple(undelegated),
        footprints=tuple(footprint(side.content, threads=threads) for side in (baseline, network)),
    )


def footprint(content: bytes, *, threads: int = 1) -> Footprint:
    """Start-up times and memory of a LiteRT file, measured in a new process.

    Raises:
        ValueError: If the file does not run.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tflite"
        path.write_bytes(content)
        *_, found = run(footprint_program, path, threads, failure="The file does not run in a process of its own")
    return Footprint(bytes=len(content), **found)
