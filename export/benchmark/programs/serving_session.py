"""A SavedModel as TF Serving runs it: a graph in a session, without Keras and with XLA switched off.

Nothing else that pip installs is closer to TF Serving. As a program, `python -P serving_session.py` reads a plan from
its standard input, as JSON, and prints a line of JSON for each measurement. It does not import Keras and se_keras.
"""

import sys

if __name__ == "__main__":
    # TensorFlow imports Keras if it is installed. None makes these imports fail.
    sys.modules |= dict.fromkeys(("keras", "tf_keras", "se_keras"))  # pyright: ignore[reportArgumentType]

import ctypes
import json
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf


class Session:
    """A SavedModel, the folder of a version, in a session.

    Without `threads`, operators use one thread for each processor, as in TF Serving.
    """

    def __init__(self, path: str | Path, *, threads: int = 0):
        graph = tf.Graph()
        config = tf.compat.v1.ConfigProto(intra_op_parallelism_threads=threads, inter_op_parallelism_threads=threads)
        self._session = tf.compat.v1.Session(graph=graph, config=config)
        with graph.as_default():
            meta = tf.compat.v1.saved_model.load(self._session, ["serve"], str(path))
        self.signatures = {name: x for name, x in meta.signature_def.items() if not name.startswith("__")}

    def predict(self, signature: str, inputs: dict[str, Any]) -> dict[str, Any]:
        """`{output: array}` of a signature for `{input: array}`; a KeyError names a missing signature or input."""
        described = self.signatures[signature]
        feeds = {described.inputs[name].name: values for name, values in inputs.items()}
        return self._session.run({name: x.name for name, x in described.outputs.items()}, feeds)


def switch_off_xla() -> None:
    """Switches XLA off in this process, as TF Serving does unless --xla_cpu_compilation_enabled is given."""
    library = Path(tf.__file__).parent / "libtensorflow_cc.so.2"
    ctypes.CDLL(str(library))._ZN10tensorflow21DisableXlaCompilationEv()


def stress(call: Callable[[], object], callers: int, seconds: float) -> tuple[list[float], float]:
    """Calls `call` repeatedly from `callers` threads for `seconds`, at least once from each.

    Returns:
        The time of each call, and the total time, in seconds.
    """
    times, begin = [], time.perf_counter()

    def caller():
        while True:
            start = time.perf_counter()
            call()
            end = time.perf_counter()
            times.append(end - start)
            if end - begin > seconds:
                return

    with ThreadPoolExecutor(callers) as pool:
        for done in [pool.submit(caller) for _ in range(callers)]:
            done.result()  # raises the error of a caller
    return times, time.perf_counter() - begin


def main(plan: dict[str, Any]) -> None:
    """Runs the SavedModels of a plan in random order and prints each measurement."""
    switch_off_xla()
    sessions = {path: Session(path, threads=plan["threads"]) for path in plan["paths"]}
    order = random.Random(0)
    for callers, batch, paths in plan["cells"]:
        calls = {path: _request(sessions[path], batch) for path in paths}
        for call in calls.values():
            call()
        for _ in range(plan["blocks"]):
            for path in order.sample(paths, len(paths)):
                times, seconds = stress(calls[path], callers, plan["seconds"])
                row = {"path": path, "callers": callers, "batch": batch, "seconds": seconds, "times": times}
                print(json.dumps(row), flush=True)


def _request(session, batch):
    """A function that makes a request of `batch` images."""
    ((name, images),) = session.signatures["serving_default"].inputs.items()
    shape = (batch, *(side.size for side in images.tensor_shape.dim[1:]))
    inputs = {name: np.random.default_rng(0).normal(size=shape).astype("float32")}
    return lambda: session.predict("serving_default", inputs)


if __name__ == "__main__":
    main(json.load(sys.stdin))
