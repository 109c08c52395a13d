"""What a run costs in energy, where the system tells: Linux' powercap counters of the processor's packages (RAPL).

Source: https://docs.kernel.org/power/powercap/powercap.html. Since 2020 most systems let root alone read them.
"""

from dataclasses import dataclass
from pathlib import Path

FOLDER = "/sys/class/powercap"


@dataclass(frozen=True)
class Meter:
    """The packages' counters of microjoules.

    Args:
        counters: `(file, largest value)` of each package: behind that it begins at 0 again.
    """

    counters: tuple[tuple[Path, int], ...]

    def read(self):
        """What the counters show, for `between`."""
        return tuple(int(file.read_text()) for file, _ in self.counters)

    def between(self, before, after):
        """Microjoules that all packages took between two readings."""
        return sum((b - a) % (most + 1) for a, b, (_, most) in zip(before, after, self.counters, strict=True))


def find_meter(folder=FOLDER):
    """The machine's `Meter`; None where there is none, or where it may not be read."""
    try:
        # A zone may be a part of a package, or the whole platform ("psys"), which counts the packages once more.
        packages = [name.parent for name in sorted(Path(folder).glob("*-rapl:*/name")) if "package" in name.read_text()]
        meter = Meter(tuple((path / "energy_uj", int((path / "max_energy_range_uj").read_text())) for path in packages))
        meter.read()
    except (OSError, ValueError):
        return None
    return meter if packages else None
