"""Folders of image files: which files and folders are read, by one rule for training, calibration and evaluation."""

import os
from pathlib import Path

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")  # of the files to read; their content decides the format
_LEFT_OUT = ("__macosx", "@eadir", "#recycle", "$recycle.bin")  # of archives from macOS, of Synology, of Windows


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted by name, without hidden ones and those of the system."""
    return sorted(path for path in folder.iterdir() if not _is_left_out(path.name) and path.is_dir())


def files_in(folder: Path, *, within: Path | None = None) -> list[Path]:
    """The files of a folder and its subfolders, in the order of their paths.

    Hidden files and folders, and those of the system, are left out. Links are followed, except to a folder that
    contains them, which would have no end.

    Args:
        within: A folder that contains `folder`, to which links are not followed either.
    """
    found, open_ = [], [(folder, frozenset([os.path.realpath(within or folder)]))]
    while open_:
        here, above = open_.pop()
        above |= {os.path.realpath(here)}
        for path in _entries(here):
            if not path.is_dir():
                found += [path] if path.is_file() else []
            elif os.path.realpath(path) not in above:
                open_.append((path, above))
    return sorted(found)


def is_image(path: Path) -> bool:
    """Whether the name of a file is that of an image."""
    return path.suffix.lower() in SUFFIXES


def printable(path: str | Path) -> str:
    """A path as text, with the bytes that are not UTF-8 as `\\xe9`."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _entries(folder):
    try:
        return [path for path in folder.iterdir() if not _is_left_out(path.name)]
    except PermissionError:  # such as lost+found
        return []


def _is_left_out(name):
    return name.startswith(".") or name.casefold() in _LEFT_OUT
