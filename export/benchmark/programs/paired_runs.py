"""Runs on a board that ssh reaches: measures pairs of LiteRT files, and prints a line of JSON for each request.

A request is a line of JSON on the standard input, {"action": ..., "sizes": [...], ...}, and then the bytes of its
contents. Everything is written to one folder, which the shell that started the program removes at its end. The program
ends when the standard input closes, or after an hour without a request.

Python 3.9, numpy and ai-edge-litert are enough. It does not import se_keras.
"""

from __future__ import annotations

import base64
import errno
import glob
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import signal
import subprocess
import sys
import time

_PATIENCE = 3600  # seconds without a request, after which the connection is lost
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_THERMAL = "/sys/class/thermal/thermal_zone*/temp"
_GOVERNOR = "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"


class Board:
    """This board: one method for each action. `folder` is where files are written."""

    def __init__(self, folder):
        self.folder, self.python, self.footprint = folder, sys.executable, ""
        self.sides, self.order = {}, random.Random(0)

    def start(self, contents, setup):
        """Makes a virtual environment if asked, and returns what this board is. The content is footprint.py."""
        self.footprint = contents[0].decode()
        if setup:
            self._set_up()
        import ai_edge_litert.interpreter  # noqa: F401  raises ImportError, which the host explains
        import numpy  # noqa: F401

        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what LiteRT notes would hide the last words of ssh
        entries = {}
        for line in (_read("/proc/cpuinfo") or "").splitlines():
            key, colon, value = line.partition(":")
            if colon:
                entries[key.strip()] = value.strip()
        names = [(_read("/proc/device-tree/model") or "").strip("\0 "), entries.get("model name", "")]
        return {
            "processor": ", ".join(name for name in names if name) or platform.processor() or platform.machine(),
            "features": (entries.get("flags") or entries.get("Features") or "").split(),
            "cores": os.cpu_count(),
            "affinity": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
            "governor": _read(_GOVERNOR),
            "system": platform.platform(),
            "python": platform.python_version(),
            "litert": importlib.metadata.version("ai-edge-litert"),
        }

    def prepare(self, contents, threads, warmup):
        """Loads two files and runs each once. The contents are file A, file B, and the bytes of the input of each."""
        import numpy as np
        from ai_edge_litert.interpreter import Interpreter

        self.sides, self.order, report = {}, random.Random(0), {}
        for number, side in enumerate("ab"):
            path = os.path.join(self.folder, side + ".tflite")
            with open(path, "wb") as file:
                file.write(contents[number])
            for copy in ("a", "control") if side == "a" else ("b",):
                interpreter = Interpreter(path, num_threads=threads)
                interpreter.allocate_tensors()
                (detail,) = interpreter.get_input_details()
                images = np.frombuffer(contents[2 + number], detail["dtype"]).reshape(detail["shape"])
                interpreter.set_tensor(detail["index"], images)
                for _ in range(warmup):
                    interpreter.invoke()
                self.sides[copy] = interpreter
            found = self.sides[side]
            report[side] = {"outputs": _outputs(found), "undelegated": _undelegated(found)}
            report[side]["footprint"] = self._footprint_of(path, threads)
        return report

    def temperatures(self, contents):
        """The readings of the temperature sensors."""
        return {"readings": " ".join(_read(zone) or "" for zone in sorted(glob.glob(_THERMAL)))}

    def block(self, contents, runs):
        """The nanoseconds of `runs` runs of each side in random order."""
        times = {side: [] for side in self.sides}
        for side in self.order.sample(list(self.sides) * runs, len(self.sides) * runs):
            invoke = self.sides[side].invoke
            start = time.perf_counter_ns()
            invoke()
            times[side].append(time.perf_counter_ns() - start)
        return times

    def _set_up(self):
        if importlib.util.find_spec("ensurepip") is None:
            raise SetupError("its Python has no ensurepip, which Debian's package python3-venv brings")
        venv = os.path.join(self.folder, "venv")
        quiet = ("--quiet", "--no-input", "--no-cache-dir", "--disable-pip-version-check")
        try:
            self._call(self.python, "-m", "venv", venv)
            self.python = os.path.join(venv, "bin", "python")
            self._call(self.python, "-m", "pip", "install", *quiet, "ai-edge-litert", "numpy")
        except RuntimeError as error:
            raise SetupError(str(error)) from None
        sys.path.insert(0, os.path.join(venv, "lib", "python{}.{}".format(*sys.version_info), "site-packages"))

    def _footprint_of(self, path, threads):
        return json.loads(self._call(self.python, "-c", self.footprint, path, str(threads))[-1])

    def _call(self, *command):
        """The lines that a command prints; RuntimeError with its last line if it fails."""
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env=dict(os.environ, TMPDIR=self.folder),
        )
        if result.returncode:
            lines = (result.stderr.strip() or result.stdout.strip() or "no message").splitlines()
            raise RuntimeError(lines[-1])
        return result.stdout.splitlines()


def _outputs(interpreter):
    """The outputs by name, as float32 in base64."""
    import numpy as np

    signature = next(iter(interpreter.get_signature_list()), None)
    if signature:
        details = interpreter.get_signature_runner(signature).get_output_details()
    else:
        details = {detail["name"]: detail for detail in interpreter.get_output_details()}
    found = {}
    for name, detail in details.items():
        values, (scale, zero_point) = interpreter.get_tensor(detail["index"]), detail["quantization"]
        floats = (values.astype("float32") - zero_point) * np.float32(scale) if scale else values.astype("float32")
        text = base64.b64encode(floats.tobytes()).decode()
        found[name] = {"shape": floats.shape, "values": text}
    return found


def _undelegated(interpreter):
    """The operators that run outside of XNNPACK, as in LiteRTRunner; None if this version does not tell."""
    if not hasattr(interpreter, "_get_ops_details"):
        return None
    produced_by = {}
    for operator in interpreter._get_ops_details():  # delegates come last, and replace other operators
        produced_by.update({int(tensor): operator for tensor in operator["outputs"]})
    needed = [int(output["index"]) for output in interpreter.get_output_details()]
    executed = {}
    while needed:
        operator = produced_by.get(needed.pop())
        if operator is not None and operator["index"] not in executed:
            executed[operator["index"]] = operator["op_name"]
            needed += [int(tensor) for tensor in operator["inputs"] if tensor >= 0]
    return sorted(name for name in executed.values() if name != "DELEGATE")


def _read(path):
    """The text of a file of the system; None if it cannot be read."""
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return None


class SetupError(Exception):
    """The packages cannot be installed."""


def _kind(error):
    """The kind of an error, which says what the user can do about it."""
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return "space"
    return {ImportError: "packages", ModuleNotFoundError: "packages", SetupError: "setup"}.get(type(error), "error")


def main(folder):
    """Answers requests until the standard input closes."""
    sys.path[:] = [path for path in sys.path if path]  # or files of the home directory would hide modules
    board, requests = Board(folder), sys.stdin.buffer
    while True:
        signal.alarm(_PATIENCE)  # ends the process
        line = requests.readline()
        if not line:
            return
        request = json.loads(line)
        contents = [requests.read(size) for size in request.pop("sizes")]
        signal.alarm(0)
        try:
            answer = getattr(board, request.pop("action"))(contents, **request)
        except Exception as error:
            answer = {"kind": _kind(error), "error": str(error) or type(error).__name__}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[2])
