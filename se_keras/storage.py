"""Files that are whole or absent: written beside their target, flushed to the disk, then renamed."""

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path


@contextlib.contextmanager
def staged(target):
    """Yields a path beside `target` that takes its place when the block ends, and vanishes when it fails.

    What is written there may be a file or a folder. The name is neither numeric nor the target's, so that no reader
    takes it for the finished thing. An existing file is replaced at once; an existing folder is refused.

    Raises:
        OSError: If the target's folder cannot be written or is full; then `target` is as it was.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        path = folder / target.name
        yield path
        if path.is_dir() and target.exists():
            raise FileExistsError(f"{str(target)!r} exists: nothing was written")
        for written in [path, *path.rglob("*")]:
            _flush(written)
        os.replace(path, target)
        _flush(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_writable(target):
    """Raises OSError at once, not after an hour's work, if a file beside `target` cannot be written."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=target.parent) as file:
        file.write(b"0")


def write_bytes(target, content):
    """Writes a file whole or not at all."""
    with staged(target) as path:
        path.write_bytes(content)


def write_json(target, value):
    """Writes a JSON file whole or not at all."""
    write_bytes(target, (json.dumps(value, indent=2) + "\n").encode())


def _flush(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
