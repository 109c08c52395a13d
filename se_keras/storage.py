"""Atomic files: written under a temporary name in the folder of the target, flushed to the disk, then renamed."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from se_keras.typing import FilePath


@contextlib.contextmanager
def staged(target: FilePath) -> Iterator[Path]:
    """Yields a temporary path that is renamed to `target` when the block ends, or removed when the block fails.

    The block writes a file or a folder there. The temporary name is neither numeric nor the name of the target, so no
    reader mistakes it for the result. An existing file is replaced atomically; an existing folder is refused.
    After an error, such as a full disk, `target` is unchanged, and no folder is left that was not there before.
    """
    target = Path(target)
    created = [parent for parent in target.parents if not parent.exists()]
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
        for parent in created:
            with contextlib.suppress(OSError):  # it is not empty
                parent.rmdir()


def remove_partial(folder: FilePath) -> None:
    """Removes the unfinished files that a killed process left in a folder."""
    for path in Path(folder).glob(".*.partial-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_writable(target: FilePath) -> None:
    """Raises OSError if `target` cannot be written. Call this before long work."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=target.parent) as file:
        file.write(b"0")


def write_bytes(target: FilePath, content: bytes) -> None:
    """Writes a file atomically."""
    write_together({Path(target): content})


def write_json(target: FilePath, value: Any) -> None:
    """Writes a JSON file atomically."""
    write_bytes(target, as_json(value))


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Writes files that belong together, `{target: bytes}`. None is renamed to its target before all are on disk.

    The first file is described by the others. Their old versions are removed before the new first file appears, so a
    killed process never leaves a file with the description of another file.
    """
    written = {}
    try:
        for target, content in contents.items():
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
    """Renames old files during the block. If the block fails, they get their names back; otherwise they are removed."""
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


def as_json(value: Any) -> bytes:
    """The content of a JSON file."""
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


def sha256(content: bytes) -> str:
    """Hexadecimal SHA-256 of bytes."""
    return hashlib.sha256(content).hexdigest()


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
