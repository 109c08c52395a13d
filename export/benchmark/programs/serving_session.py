"""A SavedModel as TF Serving runs it: the graph in a session, without Keras, and with XLA switched off.

The nearest to TF Serving that pip has. As a program, `python -P session.py` reads from its input, as JSON, what to load
and how, and prints a line of JSON for each measurement; Keras and se_keras are kept out of that process.
"""

import sys

if __name__ == "__main__":
    sys.modules |= dict.fromkeys(("keras", "tf_keras", "se_keras"))  # TensorFlow imports Keras where it can

import ctypes
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tensorflow as tf


class Session:
    """A SavedModel in a session: `session.predict(signature, {input: array})` gives `{output: array}`.

    Args:
        path: Folder of a version.
        threads: Of the operators; default: as many as there are processors, as in TF Serving.
    """

    def __init__(self, path, *, threads=0):
        graph = tf.Graph()
        how = tf.compat.v1.ConfigProto(intra_op_parallelism_threads=threads, inter_op_parallelism_threads=threads)
        self._session = tf.compat.v1.Session(graph=graph, config=how)
        with graph.as_default():
            meta = tf.compat.v1.saved_model.load(self._session, ["serve"], str(path))
        self.signatures = {name: x for name, x in meta.signature_def.items() if not name.startswith("__")}

    def predict(self, signature, inputs):
        """Outputs of a signature; a KeyError names what is not there."""
        described = self.signatures[signature]
        feeds = {described.inputs[name].name: values for name, values in inputs.items()}
        return self._session.run({name: x.name for name, x in described.outputs.items()}, feeds)


def switch_off_xla():
    """Does to this process what TF Serving does to itself, unless --xla_cpu_compilation_enabled is given."""
    library = Path(tf.__file__).parent / "libtensorflow_cc.so.2"
    ctypes.CDLL(str(library))._ZN10tensorflow21DisableXlaCompilationEv()


def load(call, callers, seconds):
    """Calls `call` from so many threads at once, each waiting for its answer, and for so long; `(times, elapsed)`.

    Every thread calls at least once. Times are in seconds.
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
            done.result()  # an error of any of them ends the measurement
    return times, time.perf_counter() - begin


def _main(plan):
    """Loads the SavedModels of a plan in turns, in random order, and prints each measurement."""
    switch_off_xla()
    sessions = {path: Session(path, threads=plan["threads"]) for path in plan["paths"]}
    order = random.Random(0)
    for callers, batch, paths in plan["cells"]:
        calls = {path: _call(sessions[path], batch) for path in paths}
        for call in calls.values():
            call()
        for _ in range(plan["blocks"]):
            for path in order.sample(paths, len(paths)):
                times, seconds = load(calls[path], callers, plan["seconds"])
                row = {"path": path, "callers": callers, "batch": batch, "seconds": seconds, "times": times}
                print(json.dumps(row), flush=True)


def _call(session, batch):
    """A request of `batch` images, ready to be made."""
    ((name, images),) = session.signatures["serving_default"].inputs.items()
    shape = (batch, *(side.size for side in images.tensor_shape.dim[1:]))
    inputs = {name: np.random.default_rng(0).normal(size=shape).astype("float32")}
    return lambda: session.predict("serving_default", inputs)


if __name__ == "__main__":
    _main(json.load(sys.stdin))
