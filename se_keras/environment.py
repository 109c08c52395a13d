"""The machine and the versions that a file or a measurement was made with."""

import os
import platform
from collections.abc import Iterable
from importlib.metadata import version

from se_keras.typing import Json


def environment() -> Json:
    """Processor, system and versions of this machine."""
    processor, flags = _processor()
    return {
        "processor": processor,
        "matrix_units": matrix_units(flags),
        "cores": os.cpu_count(),
        "affinity": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "runtime": f"LiteRT {versions()['ai-edge-litert']} with XNNPACK",
        "versions": versions(),
    }


def _read(path):
    """The text of a file of the system; None if it cannot be read."""
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return None


_MATRIX_UNITS = ("amx_int8", "amx_bf16", "i8mm", "sme", "sme2")


def matrix_units(flags: Iterable[str]) -> list[str]:
    """The matrix units among the feature flags of a processor.

    They speed up int8 convolutions, not the multiplication by the gate: SE takes more of the time.
    """
    return sorted(flag for flag in flags if flag in _MATRIX_UNITS)


def _processor():
    """Model name and feature flags of the processor, as far as the system reports them."""
    lines = (_read("/proc/cpuinfo") or "").splitlines()
    entries = {key.strip(): value.strip() for key, colon, value in (line.partition(":") for line in lines) if colon}
    flags = entries.get("flags") or entries.get("Features") or ""
    return entries.get("model name") or platform.processor() or platform.machine(), flags.split()


TRAINING_PACKAGES = ("se-keras", "keras", "tensorflow", "numpy")
PACKAGES = (*TRAINING_PACKAGES, "ai-edge-litert", "ai-edge-quantizer", "tensorflow-model-optimization", "tf-keras")


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Installed versions of packages; by default, of those that affect an export."""
    return {package: version(package) for package in packages}
