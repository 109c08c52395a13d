"""Programs for Arm on this machine: qemu, with Debian's Python and LiteRT for Arm, in a folder."""

import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from se_keras import storage
from se_keras.typing import FilePath, OnMessage

FOLDER = storage.cache("arm")
LITERT = "2.1.6"  # 2.2.0 and 2.3.0 crash with a segmentation fault under qemu 7.2
# Debian 12: qemu-user of Debian 13 has no plugins.
_RELEASE = "bookworm"
_KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_TOOLS = ("apt-get", "dpkg", "dpkg-deb")
_GLIBC = range(17, 37)  # wheels for these versions of glibc 2: Debian 12 has 2.36


class Arm:
    """qemu, and Python with LiteRT for Arm, in a folder that `fetch` made.

    Raises:
        FileNotFoundError: If the folder does not have them.
    """

    def __init__(self, folder: FilePath = FOLDER):
        self.folder = folder = Path(folder).resolve()
        self._host, self._root, self._site = (folder / name for name in ("host", "root", "site"))
        found = {
            "qemu": self._host / "usr/bin/qemu-aarch64",
            "Python for Arm": _python(self._root),
            "LiteRT for Arm": next(self._site.glob("ai_edge_litert-*.dist-info"), None),
        }
        if missing := [name for name, path in found.items() if path is None or not path.exists()]:
            raise FileNotFoundError(f"{str(folder)!r} must have qemu and Python for Arm. Missing: {', '.join(missing)}")
        (self._loader,) = self._host.glob("lib/*/ld-linux-*.so.*")
        self._program = found["qemu"]
        self.versions = {
            "qemu": finish(self._start("--version")).split()[2],
            "ai-edge-litert for Arm": found["LiteRT for Arm"].name.removesuffix(".dist-info").partition("-")[2],
        }

    def python(self, cpu: str, *arguments: object) -> str:
        """Runs Python with these arguments on an emulated processor, and returns what it prints.

        Raises:
            OSError: If it fails, with the last line that it printed.
        """
        return finish(self.start_python(cpu, *arguments))

    def start_python(self, cpu: str, *arguments: object, options: Sequence[str] = ()) -> "subprocess.Popen[str]":
        """Starts Python, as `python` runs it; `finish` waits for it.

        Args:
            cpu: As qemu names it, such as `"cortex-a76"`.
            options: More options of qemu.
        """
        # One thread, one order of hashes, and symbols that are all bound at the start: every run is the same.
        same = {"OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "LD_BIND_NOW": "1"}
        same |= {"PYTHONPATH": str(self._site)}
        machine = ("-cpu", cpu, "-L", self._root, *(x for name in same for x in ("-E", f"{name}={same[name]}")))
        return self._start(*machine, *options, _python(self._root), *arguments)

    def _start(self, *arguments):
        """Starts qemu through the loader of its own C library: nothing of it is installed."""
        folders = (self._loader.parent, self._host / "usr/lib" / self._loader.parent.name)
        libraries = ("--library-path", ":".join(map(str, folders)), self._program)
        return start("qemu-aarch64", *libraries, *arguments, executable=self._loader, env={})


def fetch(folder: FilePath = FOLDER, *, progress: OnMessage = lambda message: None) -> Arm:
    """Makes the folder of an `Arm`, if there is none, by this machine's apt-get and pip. Nothing is installed.

    Raises:
        OSError: If a tool is missing or fails. Then there is no folder.
    """
    folder = Path(folder).resolve()
    if not folder.exists() or not any(folder.iterdir()):
        if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
            raise OSError(f"Python for Arm needs Debian's apt-get and dpkg. Missing: {', '.join(missing)}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.partial-", dir=folder.parent) as temporary:
            new = Path(temporary) / "new"
            progress("fetching qemu and Debian's Python for Arm")
            _unpack_debian(new, Path(temporary) / "packages")
            progress(f"fetching ai-edge-litert {LITERT} and numpy for Arm")
            _unpack_wheels(new)
            new.rename(folder)
    try:
        return Arm(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}. A folder that exists is not filled: remove it, or name another") from None


def _unpack_debian(folder, packages):
    """Unpacks qemu with its libraries into `host`, and Python for Arm into `root`."""
    state, cache, status = packages / "state", packages / "cache", packages / "status"
    for partial in (state / "lists/partial", cache / "archives/partial"):
        partial.mkdir(parents=True)
    status.touch()  # as if nothing were installed, so that everything that Python and qemu need is fetched
    host = call("dpkg", "--print-architecture").strip()
    options = {
        "APT::Architectures": f"{host},arm64",
        "Dir::State": state,
        "Dir::State::status": status,
        "Dir::Cache": cache,
        "APT::Sandbox::User": "root",  # another user could not write to this folder
        "APT::Update::Error-Mode": "any",  # without it, an update without a network succeeds
    } | _sources(packages)
    apt = ["apt-get", "--quiet", "--yes", *(f"--option={name}={value}" for name, value in options.items())]
    call(*apt, "update")
    wanted = (f"qemu-user:{host}", "python3:arm64", "libstdc++6:arm64")
    call(*apt, "install", "--download-only", "--no-install-recommends", *wanted)
    folder.mkdir()
    for architecture, target in ((host, folder / "host"), ("arm64", folder / "root")):
        for package in (cache / "archives").glob(f"*_{architecture}.deb"):
            call("dpkg-deb", "--extract", package, target)
    for other in (folder / "host/usr/bin").glob("qemu-*"):
        if other.name != "qemu-aarch64":
            other.unlink()


def _sources(folder):
    """Options of apt-get for where packages come from: as this machine has it, if it is of the same release."""
    if platform.freedesktop_os_release().get("VERSION_CODENAME") == _RELEASE:
        return {}
    if not _KEYS.is_file():
        raise OSError(f"Packages of Debian {_RELEASE} need its keys: install debian-archive-keyring. Missing: {_KEYS}")
    sources = folder / "sources.list"
    sources.write_text(f"deb [signed-by={_KEYS}] http://deb.debian.org/debian {_RELEASE} main\n")
    return {"Dir::Etc::sourcelist": sources, "Dir::Etc::sourceparts": "/dev/null"}


def _unpack_wheels(folder):
    """Unpacks the wheels of LiteRT and numpy for Arm into `site`."""
    version = _python(folder / "root").name.removeprefix("python")
    options = ["--quiet", "--no-deps", "--only-binary=:all:", f"--python-version={version}"]
    options += [f"--platform=manylinux_2_{minor}_aarch64" for minor in _GLIBC]
    wanted = (f"ai-edge-litert=={LITERT}", "numpy")
    call(sys.executable, "-m", "pip", "install", *options, "--target", folder / "site", *wanted)


def _python(root):
    return next((root / "usr/bin").glob("python3.*"), None)


def call(*command: object, **options: Any) -> str:
    """What a command prints; raises OSError with its last line, or apt's first error, if it fails."""
    return finish(start(*command, **options))


def start(*command: object, **options: Any) -> "subprocess.Popen[str]":
    """Starts a command, which `finish` waits for."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(list(map(str, command)), **pipes, text=True, errors="replace", **options)


def finish(process: "subprocess.Popen[str]") -> str:
    """What a command printed, when it ends: see `call`. It is killed if this is interrupted."""
    with process:
        try:
            printed, errors = process.communicate()
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        lines = (errors or printed).strip().splitlines() or ["it printed no message"]
        said = next((line for line in lines if line.startswith("E: ")), lines[-1])
        raise OSError(f"{Path(process.args[0]).name} fails with status {process.returncode}: {said}")
    return printed
