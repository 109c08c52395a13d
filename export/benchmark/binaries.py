"""LiteRT's `benchmark_model` for phones, which is published for each version of LiteRT: fetched once, and checked."""

import base64
import hashlib
import http.client
import re
import urllib.error
import urllib.request
from pathlib import Path

from se_keras import storage
from se_keras.environment import versions
from se_keras.errors import first_line
from se_keras.typing import OnMessage

ABI = "arm64-v8a"  # Android's name of the processors that it is for
# The address that LiteRT's own command takes it from: PyPI, litert-cli 0.2.1, litert_cli/core/constants.py.
ADDRESS = "https://storage.googleapis.com/litert/binaries/{version}/android_arm64/benchmark_model"
_TIMEOUT = 60  # seconds without an answer
_ELF, _AARCH64 = b"\x7fELF\x02", 183  # 64 bits; e_machine, two bytes at 18


def fetch(*, progress: OnMessage = lambda message: None) -> Path:
    """The path of the `benchmark_model` of the installed LiteRT, in the cache. Its name there is its MD5.

    Raises:
        OSError: If it cannot be fetched.
        ValueError: If it has another checksum than the server says, or is no program for 64-bit Arm.
    """
    version = versions(("ai-edge-litert",))["ai-edge-litert"]
    address, folder = ADDRESS.format(version=version), storage.cache(f"benchmark_model-{version}")
    for path in folder.glob("*"):
        if _md5(path.read_bytes()).hexdigest() == path.name:
            return path
    by_hand = f"it is published at {address}; --benchmark-model PATH takes one that you downloaded"
    progress(f"fetching benchmark_model of LiteRT {version}")
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT) as answer:
            content, hashes = answer.read(), answer.headers.get_all("x-goog-hash") or []
    except urllib.error.HTTPError as error:
        error.close()
        raise OSError(f"LiteRT {version} has no benchmark_model there (HTTP {error.code}): {by_hand}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = first_line(getattr(error, "reason", error))
        raise OSError(f"benchmark_model of LiteRT {version} cannot be fetched ({reason}): {by_hand}") from None
    expected = re.search(r"md5=([\w+/=]+)", ",".join(hashes))  # Cloud Storage sends it with each file
    if expected and expected[1] != base64.b64encode(_md5(content).digest()).decode():
        raise ValueError(f"benchmark_model must have the MD5 {expected[1]}, as its server says: it came damaged")
    if content[:5] != _ELF or int.from_bytes(content[18:20], "little") != _AARCH64:
        raise ValueError(f"benchmark_model must be a program for 64-bit Arm. Received: {content[:20]!r} from {address}")
    storage.write_bytes(path := folder / _md5(content).hexdigest(), content)
    return path


def _md5(content):
    return hashlib.md5(content, usedforsecurity=False)
