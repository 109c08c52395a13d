"""Files that are whole or absent: written beside their target, flushed to the disk, then renamed."""

import contextlib
import hashlib
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


def remove_partial(folder):
    """Removes what a killed process has left half written in a folder."""
    for path in Path(folder).glob(".*.partial-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_writable(target):
    """Raises OSError at once, not after an hour's work, if a file beside `target` cannot be written."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=target.parent) as file:
        file.write(b"0")


def write_bytes(target, content):
    """Writes a file whole or not at all."""
    write_together({target: content})


def write_json(target, value):
    """Writes a JSON file whole or not at all."""
    write_bytes(target, as_json(value))


def write_together(contents):
    """Writes files that belong together, `{target: bytes}`: none takes its place before all are on the disk.

    The first is what the others describe. Where it replaces an older one, they go before it comes: whenever the process
    is killed, no file stands beside the description of another.
    """
    written = {}
    try:
        for target, content in contents.items():
            target = Path(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.partial-", dir=target.parent)
            os.close(descriptor)
            written[target] = Path(name)
            written[target].write_bytes(content)
            _flush(written[target])
        first, *others = written
        with _set_aside(others):
            for path in written.values():
                path.chmod(0o666 & ~_umask())
            os.replace(written[first], first)
        for target in others:
            os.replace(written[target], target)
        for target in written:
            _flush(target.parent)
    finally:
        for path in written.values():
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _set_aside(targets):
    """Takes old files out of the way, and puts them back where the block fails."""
    aside = {}
    try:
        for target in filter(Path.exists, targets):
            path = target.with_name(f".{target.name}.partial-{os.getpid()}")
            os.replace(target, path)
            aside[target] = path
        yield
    except BaseException:
        for target, path in aside.items():
            os.replace(path, target)
        raise
    for path in aside.values():
        path.unlink()


def as_json(value):
    """A value as the bytes of a JSON file."""
    return (json.dumps(value, indent=2) + "\n").encode()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(content):
    """Hexadecimal SHA-256 of bytes."""
    return hashlib.sha256(content).hexdigest()


def file_sha256(path):
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
