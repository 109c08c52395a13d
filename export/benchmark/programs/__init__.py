"""Programs that run in a separate process: each prints lines of JSON."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from types import ModuleType

from se_keras.typing import Json


def run(
    program: ModuleType,
    *arguments: object,
    failure: str,
    plan: Json | None = None,
    on_row: Callable[[Json], object] = lambda row: None,
) -> list[Json]:
    """Runs a program of this folder in a new process, on the CPU, and returns the JSON objects that it prints.

    Args:
        plan: The standard input of the program, as JSON.
        on_row: Called with each object as soon as it is printed.

    Raises:
        ValueError: If the program fails: `failure`, its exit status and the last line that it wrote.
    """
    # -P: without it, the files of this folder would hide modules of the same name.
    command = [sys.executable, "-P", str(program.__file__), *map(str, arguments)]
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    rows = []
    with tempfile.TemporaryFile("w+") as stdin, tempfile.TemporaryFile("w+", errors="replace") as errors:
        json.dump(plan, stdin)
        stdin.seek(0)
        with subprocess.Popen(
            command, stdin=stdin, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process:
            try:
                for line in process.stdout or ():
                    if line.startswith("{"):  # a library may print lines of its own
                        rows.append(json.loads(line))
                        on_row(rows[-1])
            except BaseException:
                process.kill()
                raise
        if process.returncode or not rows:
            errors.seek(0)
            *_, last = errors.read().strip().splitlines() or ["it printed no message"]
            raise ValueError(f"{failure} (exit status {process.returncode}): {last}")
    return rows
