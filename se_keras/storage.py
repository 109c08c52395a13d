"""Atomic files: written under a temporary name in the folder of the target, flushed to the disk, then renamed."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from se_keras.errors import first_line
from se_keras.typing import FilePath

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None

_PARTIAL = re.compile(r"\..+\.partial-\w+")


@contextlib.contextmanager
def staged(target: FilePath) -> Iterator[Path]:
    """Yields a temporary path that is renamed to `target` when the block ends, or removed when the block fails.

    The block writes a file or a folder there. The temporary name is neither numeric nor the name of the target, so no
    reader mistakes it for the result. An existing file is replaced atomically; anything else is refused before the
    block. After an error, such as a full disk, `target` is unchanged, and no folder is left that was not there before.
    """
    target = destination(target)
    with _writing(target.parent):
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


def destination(target: FilePath) -> Path:
    """The path that is written for `target`: where a symbolic link leads, else `target` itself.

    Raises:
        FileExistsError: If there is a folder, a device or a pipe: only a plain file is replaced.
    """
    target = Path(target)
    if target.exists() and not target.is_file():
        raise FileExistsError(f"{str(target)!r} exists and is not a plain file: nothing was written")
    return Path(os.path.realpath(target)) if target.is_symlink() else target


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Makes a folder, removed again if it stays empty, and shares a lock on it with all who write there.

    The first one, who finds nobody else, removes what killed processes left.
    """
    created = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # somebody is there, or the file system has no locks of folders
            _flock(descriptor)
            remove_partial(folder)
        for _ in range(100):  # a second; somebody who keeps the folder for longer removes nothing
            try:
                _flock(descriptor, shared=True)
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:
                break
            else:
                break
        yield
    finally:
        os.close(descriptor)
        for parent in created:
            with contextlib.suppress(OSError):  # it is not empty
                parent.rmdir()


def remove_partial(folder: FilePath) -> None:
    """Removes the unfinished files that a killed process left in a folder."""
    for path in Path(folder).iterdir():
        if _PARTIAL.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def locked(file: FilePath, *, timeout: float = 0.0) -> Iterator[None]:
    """Holds a lock during the block: one process at a time, also of several machines with a shared drive.

    The system frees the lock when its process ends, however that ends.

    Args:
        file: Is locked, says whose it is, and is removed at the end.
        timeout: Seconds to wait for another process.

    Raises:
        BlockingIOError: If another process has the lock.

    Warns:
        UserWarning: If the file system has no locks.
    """
    path, deadline = Path(file), time.monotonic() + timeout
    path.parent.mkdir(parents=True, exist_ok=True)
    while (descriptor := _lock(path)) is None:
        if time.monotonic() >= deadline:
            owner = path.read_text(errors="replace") if path.exists() else ""
            rule = "One process at a time writes here: wait for its end, or take another name"
            raise BlockingIOError(f"{rule}. Received: {str(path)!r}, held by {owner or 'another process'}")
        time.sleep(0.01)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(path):
    """Opens and locks a file: its descriptor, or None if another process has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _flock(descriptor)
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):  # it is another's, or was until now
        pass
    except OSError as error:
        why = f"{str(path)!r} cannot be locked: {first_line(error)}"
        warnings.warn(f"{why}. If two processes write there, one overwrites the other's files", stacklevel=4)
        return descriptor
    os.close(descriptor)
    return None


def _flock(descriptor, *, shared=False):
    """Locks an open file or folder; raises BlockingIOError if another process has it, OSError if there are no locks."""
    if fcntl is None:
        raise OSError("this system has no locks of files")
    fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def check_writable(target: FilePath) -> None:
    """Raises OSError if `target` cannot be written. Call this before long work."""
    target = destination(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=target.parent) as file:
        file.write(b"0")


def cache(name: str) -> Path:
    """The folder of what was fetched: `$XDG_CACHE_HOME/se_keras/NAME`, or `~/.cache/se_keras/NAME`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "se_keras" / name


def write_bytes(target: FilePath, content: bytes) -> None:
    """Writes a file atomically."""
    write_in_order([(Path(target), content)])


def write_json(target: FilePath, value: Any) -> None:
    """Writes a JSON file atomically."""
    write_bytes(target, as_json(value))


def write_in_order(contents: Sequence[tuple[Path, bytes]]) -> None:
    """Writes files, `(target, content)`, one after the other, when all are on the disk under temporary names.

    A target may come twice: whenever the process is killed, the first ones have been replaced, and the others not.
    """
    with contextlib.ExitStack() as stack:
        partial = []
        for target, content in contents:
            target = destination(target)
            stack.enter_context(_writing(target.parent))
            descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.partial-", dir=target.parent)
            os.close(descriptor)
            path = Path(name)
            stack.callback(path.unlink, missing_ok=True)
            path.write_bytes(content)
            path.chmod(0o666 & ~_umask())
            _flush(path)
            partial.append((path, target))
        for path, target in partial:
            os.replace(path, target)
        for folder in dict.fromkeys(target.parent for _, target in partial):
            _flush(folder)


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
