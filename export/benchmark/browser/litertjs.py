"""LiteRT.js, LiteRT for browsers: two packages of npm, which are fetched once and checked, and not shipped."""

import base64
import hashlib
import re
import shutil
import subprocess
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path

from se_keras import storage
from se_keras.errors import first_line, translated
from se_keras.typing import FilePath, OnMessage

VERSION = "2.5.3"
_VARIANTS = ("", "_compat", "_jspi", "_threaded")  # of the WebAssembly, for browsers with and without a feature
# SHA-512, as of `npm view PACKAGE dist.integrity`, and the files that the page loads: {address: path in the package}.
_PACKAGES = {
    "@litertjs/core": (
        "PlGmbMOq9WitX7FO0jhbdJw9GthatsyuCQXjTt/wJZo0FLaw48q4tz8IwqgqCIkviYGr9OFDL1kCnN4nzWoyJQ==",
        {"core/index.js": "dist/index.js"}
        | {
            f"wasm/litert_wasm{variant}_internal.{suffix}": f"wasm/litert_wasm{variant}_internal.{suffix}"
            for variant in _VARIANTS
            for suffix in ("js", "wasm")
        },
    ),
    "@litertjs/wasm-utils": (
        "4fJiw6tBQnIs+0jH/OQ16nYOiSl8/+zZnn5h2ul8aTKHi05sVqZW580Tmk78pC2kT39A9OYBVdFawteZ/sI1kQ==",
        {"wasm-utils/index.js": "dist/index.js"},
    ),
}
_LONGEST_FETCH = 300  # seconds for 12 MB
_COMMAND = f"npm pack {' '.join(f'{name}@{VERSION}' for name in _PACKAGES)}"
_WAYS = (
    f"install npm (https://nodejs.org) and run this again with a network, or run `{_COMMAND}` on another computer and "
    "say where the two .tgz files are with --litertjs DIR"
)


def cache_folder() -> Path:
    """Where the packages are kept."""
    return storage.cache(f"litertjs-{VERSION}")


def load(folder: FilePath | None = None, *, progress: OnMessage = lambda message: None) -> dict[str, bytes]:
    """The files of LiteRT.js, `{address on the page: content}`.

    Args:
        folder: A folder with the two packages as .tgz files. Default: the cache, into which npm fetches them once.

    Raises:
        OSError: If npm or the network is missing, or if there is no such folder.
        ValueError: If a package is not the one with the known SHA-512.
    """
    if folder is None:
        found = _matching(cache_folder())
        if found.keys() != _PACKAGES.keys():  # nothing yet, or a damaged file
            progress(f"fetching LiteRT.js {VERSION} (12 MB) with npm")
            found = _fetch(cache_folder())
    else:
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"--litertjs must be a folder with two .tgz files. Received: {str(folder)!r}")
        found = _matching(Path(folder))
    if missing := [name for name in _PACKAGES if name not in found]:
        where = folder or "npm's registry"
        raise ValueError(
            f"LiteRT.js must be {' and '.join(missing)} {VERSION} as npm publishes it, with its SHA-512: "
            f"`{_COMMAND}` makes the files. Received: no such file from {str(where)!r}"
        )
    return {address: content for name in _PACKAGES for address, content in _members(name, found[name]).items()}


def _matching(folder: Path) -> dict[str, bytes]:
    """The packages in a folder, known by their SHA-512, whatever the names of the files."""
    found = {}
    for path in sorted(folder.glob("*.tgz")):
        content = path.read_bytes()
        checksum = base64.b64encode(hashlib.sha512(content).digest()).decode()
        found |= {name: content for name, (expected, _) in _PACKAGES.items() if expected == checksum}
    return found


def _fetch(cache: Path) -> dict[str, bytes]:
    """Fetches the packages into the cache. What has another checksum is not kept."""
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(f"LiteRT.js needs npm, which is not on the PATH: {_WAYS}")
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, *_COMMAND.split()[1:], "--ignore-scripts", "--pack-destination", folder]
        try:
            result = subprocess.run(
                command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_LONGEST_FETCH
            )
        except subprocess.TimeoutExpired:
            raise OSError(f"npm did not fetch LiteRT.js within {_LONGEST_FETCH} seconds: {_WAYS}") from None
        if result.returncode:
            code = re.search(r"npm error code (\w+)", result.stderr)
            reason = code[1] if code else first_line(result.stderr or "it printed no message")
            raise OSError(f"npm cannot fetch LiteRT.js ({reason}): {_WAYS}")
        found = _matching(Path(folder))
    for name, content in found.items():
        storage.write_bytes(cache / f"{name.split('/')[1]}.tgz", content)
    return found


def _members(name: str, package: bytes) -> dict[str, bytes]:
    """The files that the page loads from a package."""
    addresses = {f"package/{path}": address for address, path in _PACKAGES[name][1].items()}
    with translated(f"{name} {VERSION} cannot be read"), tarfile.open(fileobj=BytesIO(package), mode="r:gz") as archive:
        members = ((addresses.get(member.name), archive.extractfile(member)) for member in archive)
        return {address: file.read() for address, file in members if address and file}
