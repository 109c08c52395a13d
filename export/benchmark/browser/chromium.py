"""A Chromium without a window, in a profile of its own that is removed at the end."""

import contextlib
import os
import shutil
import subprocess
import tempfile

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
_FLAGS = (
    "--headless=new",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-dev-shm-usage",  # which is small in containers
    "--ignore-certificate-errors",  # the server's own certificate
    "--enable-unsafe-webgpu",
    "--enable-features=Vulkan",  # WebGPU without a window, on Linux
)


class Chromium:
    """A process that has a page open.

    Raises:
        FileNotFoundError: If there is no Chromium on the PATH.
    """

    def __init__(self, address: str):
        self._profile = tempfile.TemporaryDirectory(prefix="se_keras_chromium_", ignore_cleanup_errors=True)
        self._log = tempfile.TemporaryFile("w+", errors="replace")
        root = ["--no-sandbox"] * (hasattr(os, "geteuid") and os.geteuid() == 0)  # Chromium has no sandbox for root
        command = [find(), *_FLAGS, *root, f"--user-data-dir={self._profile.name}", address]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._log, start_new_session=True
        )

    def check(self) -> None:
        """Raises OSError if it has ended."""
        status = self._process.poll()
        if status is not None:
            self._log.seek(0)
            *_, last = self._log.read().strip().splitlines() or ["it printed no message"]
            raise OSError(f"The headless browser ended with status {status}: {last}")

    def close(self) -> None:
        """Ends it, and removes its profile."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with contextlib.suppress(OSError):
            self._profile.cleanup()
        self._log.close()


def find() -> str:
    """The path of a Chromium; raises FileNotFoundError if there is none."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        raise FileNotFoundError(
            "--headless needs Chromium or Chrome on the PATH; without it, open the address in a browser. "
            f"Received: none of {', '.join(_NAMES)}"
        )
    return found
