"""Measures pairs of LiteRT files on a Linux board that ssh reaches, such as a Raspberry Pi."""

import base64
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from se_keras.environment import matrix_units, versions
from se_keras.timing import Blocks, check_plan, percentiles
from se_keras.typing import FilePath, Json, OnMessage, Outputs

from ...outputs import agreement, noise
from ..connection import Connection, check_host
from ..devices import check_rest, measured_blocks, warmest
from ..measuring import Pair, largest_difference, require_delegated
from ..programs import footprint, paired_runs
from ..results import Footprint, Overhead

_WARMUP = 3  # runs of each file before the first block


@dataclass(frozen=True, kw_only=True)
class Ssh:
    """A Linux board that ssh reaches, with Python 3.9 or newer, numpy and ai-edge-litert.

    Args:
        ssh: `user@host`, a name of ssh's configuration, or `ssh://user@host:port`.
        ssh_config: A configuration of ssh. Default: the user's own.
        python: Python there, a name or a path; `~/` is the home directory there.
        setup: Whether to install the packages there, in a temporary folder that is removed at the end.
        rest: Seconds between blocks. The pause is longer while the board is warmer than before the first block.
        blocks, runs, within, seconds: As in `timing.compare`.
        allow_undelegated: Whether to measure files with operators that are not delegated to XNNPACK.

    Raises:
        ValueError: If a number is out of its range, or if `ssh` is not the name of a host.
    """

    ssh: str
    ssh_config: FilePath | None = None
    python: str = "python3"
    setup: bool = False
    rest: float = 0.0
    blocks: int = 30
    runs: int = 3
    within: float | None = None
    seconds: float | None = None
    allow_undelegated: bool = False
    # Of `connect`, for `measure`: what `setup` installs lies in the folder of a connection.
    _connected: list[Connection] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self):
        check_host(self.ssh)
        check_plan(self.blocks, self.runs)
        check_rest(self.rest)
        Blocks(within=self.within, seconds=self.seconds)  # checks both

    def connect(self, progress: OnMessage) -> Json:
        """The board: see `Target`. It stays connected until `measure` ends.

        Raises:
            OSError: If ssh does not connect, if the board lacks Python, packages or space, or if `setup` fails.
        """
        progress(f"connecting to {self.ssh}")
        board = Connection(self.ssh, paired_runs, config=self.ssh_config, python=self.python)
        if self.setup:
            progress(f"installing numpy and ai-edge-litert on {self.ssh}")
        with ExitStack() as unless_started:
            unless_started.callback(board.close)
            found = board.ask("start", Path(str(footprint.__file__)).read_bytes(), setup=self.setup)
            self._connected[:] = [board]
            unless_started.pop_all()
        litert = found.pop("litert")
        return found | {
            "target": "ssh",
            "matrix_units": matrix_units(found.pop("features")),
            "runtime": f"LiteRT {litert} with XNNPACK",
            "versions": versions() | {"ai-edge-litert": litert},  # the one that runs the files
        }

    def measure(self, pairs: Iterable[Pair], progress: OnMessage) -> Iterator[Overhead]:
        """Times pairs: see `Target`. A board that is lost after two blocks or more leaves those of them.

        Raises:
            OSError: As `connect`; DeviceLost if the board is lost before two blocks.
            ValueError: If the outputs of a file are not those of this machine, or if operators are not delegated.
        """
        if not self._connected:
            self.connect(progress)
        with self._connected.pop() as board:
            for pair in pairs:
                progress(f"timing {pair}")
                yield (found := self._measure(board, pair, progress))
                if found.device.missing:
                    return

    def _measure(self, board, pair, progress):
        files = {"a": pair.baseline, "b": pair.network}
        prepared = self._prepared(board, pair, files, progress)
        undelegated = sorted({name for side in prepared.values() for name in side["undelegated"] or ()})
        require_delegated(undelegated, allow_undelegated=self.allow_undelegated)
        every = defaultdict(list)

        def run_block():
            times = board.ask("block", runs=self.runs)
            for side, nanoseconds in times.items():
                every[side] += nanoseconds
            return {side: min(nanoseconds) for side, nanoseconds in times.items()}

        def celsius():
            return warmest(board.ask("temperatures")["readings"])

        blocks, conditions = measured_blocks(run_block, celsius, self, self.ssh, progress)
        return pair.overhead(
            blocks.comparison(runs=self.runs, a=percentiles(every["a"]), b=percentiles(every["b"])),
            undelegated=tuple(undelegated),
            footprints=tuple(
                Footprint(bytes=len(file.content), **prepared[side]["footprint"]) for side, file in files.items()
            ),
            device=conditions,
        )

    def _prepared(self, board, pair, files, progress):
        """The board's answer on two files that it has loaded and run once, with the outputs of this machine."""
        batch, *size = pair.cell.input_shape
        images, runners = noise(size, samples=batch), {side: file.runner() for side, file in files.items()}
        contents = [file.content for file in files.values()]
        progress(f"copying {sum(map(len, contents)) / 1e6:.1f} MB to {self.ssh}")
        contents += [runner.typed_images(images).tobytes() for runner in runners.values()]
        prepared = board.ask("prepare", *contents, threads=pair.cell.threads, warmup=_WARMUP)
        for side, runner in runners.items():
            _require_agreement(f"File {side.upper()}", runner(images), prepared[side]["outputs"], pair.cell.precision)
        return prepared


def _require_agreement(file: str, expected: Outputs, answer: Json, precision: str) -> None:
    """Raises ValueError if the outputs of a board are not those of this machine."""
    actual = {
        name: np.frombuffer(base64.b64decode(entry["values"]), "float32").reshape(entry["shape"])
        for name, entry in answer.items()
    }
    bound, error = largest_difference(precision), agreement(expected, actual).max_error
    if error > bound:
        raise ValueError(
            f"{file} must have the same outputs on the board as here, to {bound:g} of their range: it is not timed. "
            f"Received: a difference of {error:.2g}"
        )
