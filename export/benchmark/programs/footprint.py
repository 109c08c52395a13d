"""Loads a LiteRT file, runs it once, and prints the times and the memory use as JSON.

python -P footprint.py FILE THREADS

It runs on boards that ssh reaches too: Python 3.9, numpy and ai-edge-litert are enough.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
from ai_edge_litert.interpreter import Interpreter


def peak_mb() -> float | None:
    """The peak memory of this process, in 10^6 bytes; None where the system does not report it."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 / 1e6 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None


def main(path: str, threads: int) -> dict[str, float | None]:
    """The fields of a `Footprint`, except for the size of the file."""
    before, start = peak_mb(), time.perf_counter()
    interpreter = Interpreter(path, num_threads=threads)
    interpreter.allocate_tensors()
    ready = time.perf_counter()
    for detail in interpreter.get_input_details():
        interpreter.set_tensor(detail["index"], np.zeros(detail["shape"], detail["dtype"]))
    first = time.perf_counter()
    interpreter.invoke()
    end, after = time.perf_counter(), peak_mb()
    return {
        "init_ms": 1e3 * (ready - start),
        "first_ms": 1e3 * (end - first),
        "peak_mb": None if before is None or after is None else after - before,
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]))))
