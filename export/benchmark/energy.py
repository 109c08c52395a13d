"""Energy of a run, from Linux' powercap counters of the processor's packages (RAPL).

Source: https://docs.kernel.org/power/powercap/powercap.html. Since 2020 only root can read them on most systems.
"""

from dataclasses import dataclass
from pathlib import Path

from se_keras.typing import FilePath

FOLDER = "/sys/class/powercap"


@dataclass(frozen=True)
class Meter:
    """The counters of all packages, in microjoules."""

    counters: tuple[tuple[Path, int], ...]  # file and largest value of each; after that a counter starts at 0 again

    def read(self) -> tuple[int, ...]:
        """The values of the counters, for `between`."""
        return tuple(int(file.read_text()) for file, _ in self.counters)

    def between(self, before: tuple[int, ...], after: tuple[int, ...]) -> int:
        """Microjoules that all packages used between two readings."""
        return sum((b - a) % (most + 1) for a, b, (_, most) in zip(before, after, self.counters, strict=True))


def find_meter(folder: FilePath = FOLDER) -> Meter | None:
    """The machine's `Meter`; None if it has none, or if reading it is not allowed."""
    try:
        # Other zones are parts of a package, or the whole platform ("psys"), which contains the packages.
        packages = [name.parent for name in sorted(Path(folder).glob("*-rapl:*/name")) if "package" in name.read_text()]
        meter = Meter(tuple((path / "energy_uj", int((path / "max_energy_range_uj").read_text())) for path in packages))
        meter.read()
    except (OSError, ValueError):
        return None
    return meter if packages else None
