"""Measures pairs of LiteRT files on this machine."""

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from se_keras.environment import environment
from se_keras.timing import Blocks, check_plan, compare
from se_keras.typing import Json, OnMessage

from ...outputs import noise
from .. import profiler
from ..energy import find_meter
from ..measuring import Pair, require_delegated
from ..programs import footprint as footprint_program
from ..programs import run
from ..results import Footprint, Overhead, Profile


@dataclass(frozen=True, kw_only=True)
class Host:
    """This machine, with LiteRT and XNNPACK.

    Args:
        blocks, runs, within, seconds: As in `timing.compare`.
        profile: Whether to profile both files too. If that fails, `progress` is called with the reason.
        allow_undelegated: Whether to measure files with operators that are not delegated to XNNPACK.
    """

    blocks: int = 30
    runs: int = 3
    within: float | None = None
    seconds: float | None = None
    profile: bool = False
    allow_undelegated: bool = False

    def __post_init__(self):
        check_plan(self.blocks, self.runs)
        Blocks(within=self.within, seconds=self.seconds)  # checks both

    def connect(self, progress: OnMessage) -> Json:
        """The environment of this machine: see `Target`."""
        return environment() | {"target": "host"}

    def measure(self, pairs: Iterable[Pair], progress: OnMessage) -> Iterator[Overhead]:
        """Times pairs: see `Target`. Raises ValueError if operators are not delegated to XNNPACK."""
        for pair in pairs:
            progress(f"timing {pair}")
            yield self._measure(pair, progress)

    def _measure(self, pair, progress):
        threads = pair.cell.threads
        a, b, control = (model.runner(threads=threads) for model in (pair.baseline, pair.network, pair.baseline))
        undelegated = sorted(set(a.undelegated() + b.undelegated()))
        require_delegated(undelegated, allow_undelegated=self.allow_undelegated)
        images = noise(pair.cell.input_shape[1:], samples=pair.cell.input_shape[0])
        comparison = compare(
            a=a.prepare(images),
            b=b.prepare(images),
            control=control.prepare(images),
            blocks=self.blocks,
            runs=self.runs,
            within=self.within,
            seconds=self.seconds,
            meter=find_meter(),
        )
        return pair.overhead(
            comparison,
            undelegated=tuple(undelegated),
            footprints=tuple(footprint(side.content, threads=threads) for side in (pair.baseline, pair.network)),
            profiles=_profiles(pair, progress) if self.profile else (),
        )


def footprint(content: bytes, *, threads: int = 1) -> Footprint:
    """Start-up times and memory of a LiteRT file in a new process; raises ValueError if the file does not run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tflite"
        path.write_bytes(content)
        *_, found = run(footprint_program, path, threads, failure="The file does not run in a separate process")
    return Footprint(bytes=len(content), **found)


def _profiles(pair: Pair, progress: OnMessage) -> tuple[Profile, ...]:
    """Microseconds by stage and part of both files; empty, with a message, if they cannot be profiled."""
    profiles = []
    try:
        for file in (pair.baseline, pair.network):
            profiles.append({})
            for (stage, part), microseconds in (
                profiler.profile(file, threads=pair.cell.threads).by("stage", "part").items()
            ):
                profiles[-1].setdefault(stage or "outside", {})[part] = microseconds
        return tuple(profiles)
    except ValueError as error:
        progress(f"not profiled: {error}")
        return ()
