"""Campaigns of damaged files: many mutations of a good file, read in child processes with limits.

def read(path): ...  # of a module in tests/; ValueError, TypeError and OSError are its way to refuse a file

found = run_campaign("png", [content], read, suffix=".png")
assert found.faults == [], found.faults
"""

import faulthandler
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

MUTATIONS, SECONDS, MEGABYTES = 200, 20, 1024
REFUSALS = (ValueError, TypeError, OSError)


def flipped(content, rng):
    """One to eight bits, half of the time among the first 64 bytes, which are headers."""
    among = min(64, len(content)) if rng.random() < 0.5 else len(content)
    changed = bytearray(content)
    for _ in range(rng.integers(1, 9)):
        changed[rng.integers(among)] ^= 1 << rng.integers(8)
    return bytes(changed)


def truncated(content, rng):
    """The beginning."""
    return content[: rng.integers(len(content))]


def inserted(content, rng):
    """One to 64 random bytes anywhere."""
    at = rng.integers(len(content) + 1)
    return content[:at] + rng.bytes(rng.integers(1, 65)) + content[at:]


def zeroed(content, rng):
    """One to 64 bytes are zero."""
    at, count = rng.integers(len(content)), rng.integers(1, 65)
    return content[:at] + bytes(len(content[at : at + count])) + content[at + count :]


MUTATORS = (flipped, truncated, inserted, zeroed)


def mutated(content, number, rng):
    """The kinds of damage in turn."""
    return MUTATORS[number % len(MUTATORS)](content, rng)


@dataclass
class Campaign:
    """How many files were read and how many refused; `faults` are texts of what must not happen."""

    kind: str
    read: int = 0
    refused: int = 0
    megabytes: int = 0  # peak above what the process had before
    faults: list[str] = field(default_factory=list)

    def __str__(self):
        count = self.read + self.refused + len(self.faults)
        counts = f"{self.read} read, {self.refused} refused, {len(self.faults)} faults"
        return f"{self.kind}: {count} damaged files: {counts}, {self.megabytes} MB at most"


def run_campaign(
    kind, seeds, read, *, suffix="", mutate=mutated, count=MUTATIONS, seconds=SECONDS, megabytes=MEGABYTES
):
    """Reads `count` mutations of the `seeds`, good files' contents, and prints the counts.

    A fault is a signal, an error other than `REFUSALS`, more than `seconds` for a file, or more than `megabytes` in
    addition to what the process has after reading the seeds, which must be readable.

    Args:
        read: A function of a path, in a module of tests/.
        mutate: From content, number and random generator to content.
    """
    found = Campaign(kind)
    with tempfile.TemporaryDirectory() as folder:
        for number, content in enumerate(seeds):
            Path(folder, f"seed{number}{suffix}").write_bytes(content)
        for number in range(count):
            rng = np.random.default_rng([1709, number])
            content = mutate(seeds[number // len(MUTATORS) % len(seeds)], number, rng)
            Path(folder, f"{number:05}{suffix}").write_bytes(content)
        number = 0
        while number < count:
            number = _read_from(number, found, folder, f"{read.__module__}:{read.__qualname__}", seconds, megabytes)
    print(found)
    return found


def _read_from(number, found, folder, read, seconds, megabytes):
    """One child reads files from `number` on; the number of the file to go on with."""
    limits = [str(number), str(seconds), str(megabytes)]
    child = subprocess.run(
        [sys.executable, __file__, folder, read, *limits], capture_output=True, text=True, errors="replace"
    )
    lines = child.stdout.splitlines()
    if "ready" not in lines:
        raise RuntimeError(f"The child did not read the seeds: {child.stderr[-2000:]}")
    for line in lines[lines.index("ready") + 1 :]:
        answer = json.loads(line)
        found.megabytes = max(found.megabytes, answer["megabytes"])
        if answer["fault"]:
            found.faults.append(f"{found.kind} {number}: {answer['fault']}")
        else:
            found.read, found.refused = found.read + answer["read"], found.refused + (not answer["read"])
        number += 1
    if child.returncode:  # killed, or out of time: at the file after the last answer
        what = "time-out" if "Timeout (" in child.stderr else f"status {child.returncode}"
        found.faults.append(f"{found.kind} {number}: {what}: {child.stderr[-500:]}")
        number += 1
    return number


def peak_megabytes():
    """The largest memory of this process. That of getrusage begins with the parent's."""
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) // 1024


def _answer(read, path, megabytes, before):
    """One line for the parent: whether a file was read, the fault if there was one, and the peak of memory."""
    fault = is_read = None
    try:
        read(path)
        is_read = True
    except UnicodeError as error:  # a ValueError whose text is not ours
        fault = f"{type(error).__name__}: {error}"[:500]
    except REFUSALS:
        is_read = False
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"[:500]
    peak = peak_megabytes() - before
    if peak > megabytes:
        fault = fault or f"{peak} MB"
    return {"read": bool(is_read), "fault": fault, "megabytes": peak}


def main(folder, read, start, seconds, megabytes):
    """What a child does. Its answers go to the parent alone: what the reader prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    faulthandler.enable()
    module, _, name = read.partition(":")
    read = getattr(importlib.import_module(module), name)
    for path in sorted(Path(folder).glob("seed*")):
        read(path)
    before = peak_megabytes()
    # A file that asks for the whole memory fails before the machine does: twice the bound in addition.
    data = sum(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (data + (2 * int(megabytes) << 20),) * 2)
    print("ready", file=answers)
    for path in sorted(Path(folder).glob("[0-9]*"))[int(start) :]:
        faulthandler.dump_traceback_later(int(seconds), exit=True)
        print(json.dumps(_answer(read, path, int(megabytes), before)), file=answers)
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main(*sys.argv[1:])
