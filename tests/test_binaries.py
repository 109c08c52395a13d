"""`benchmark_model` from a server on the loopback address: fetched once, checked, and kept."""

import base64
import hashlib
import http.server
import threading
from importlib.metadata import version

import pytest

from se_keras.export.benchmark import binaries

ARM = b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\x00\xb7\x00" + bytes(44)  # the header of a program for 64-bit Arm
X86 = ARM[:18] + b"\x3e\x00" + ARM[20:]
VERSION = version("ai-edge-litert")
NO_PROGRAM = "benchmark_model must be a program for 64-bit Arm. Received: b"


def hash_of(content):
    """As Cloud Storage says it, with a second checksum that is not read."""
    return f"crc32c=AAAAAA==,md5={base64.b64encode(hashlib.md5(content).digest()).decode()}"


@pytest.fixture
def publish(monkeypatch, tmp_path):
    """`publish(content, **headers)`: publishes a binary, and returns the list of requests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    servers = []

    def serve(content, status=200, **headers):
        requests = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                requests.append(self.path)
                self.send_response(status)
                for name, value in ({"Content_Length": str(len(content))} | headers).items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        monkeypatch.setattr(binaries, "ADDRESS", f"http://127.0.0.1:{server.server_port}/{{version}}/benchmark_model")
        return requests

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_binary_of_the_installed_version_is_fetched_once(publish):
    requests, steps = publish(ARM, x_goog_hash=hash_of(ARM)), []
    path = binaries.fetch(progress=steps.append)
    assert path.read_bytes() == ARM
    assert requests == [f"/{VERSION}/benchmark_model"] and steps == [f"fetching benchmark_model of LiteRT {VERSION}"]
    assert binaries.fetch(progress=steps.append) == path and len(requests) == len(steps) == 1


def test_damaged_file_of_the_cache_is_fetched_again(publish):
    requests = publish(ARM)
    path = binaries.fetch()
    path.write_bytes(ARM[:-1])
    assert binaries.fetch().read_bytes() == ARM and len(requests) == 2


@pytest.mark.parametrize(
    "content, headers, error, message",
    [
        (
            ARM,
            {"x_goog_hash": hash_of(X86)},
            ValueError,
            "benchmark_model must have the MD5 .+, as its server says",
        ),
        (
            X86,
            {"x_goog_hash": hash_of(X86)},
            ValueError,
            NO_PROGRAM,
        ),
        (b"<html>", {}, ValueError, f"{NO_PROGRAM}'<html>' from http"),
        (b"", {}, ValueError, f"{NO_PROGRAM}'' from http://127.0.0.1"),
        (ARM, {"Content_Length": "999"}, OSError, r"benchmark_model of LiteRT .+ cannot be fetched \(IncompleteRead"),
        (
            ARM,
            {"status": 404},
            OSError,
            rf"LiteRT {VERSION} has no benchmark_model there \(HTTP 404\): it is",
        ),
    ],
    ids=["other checksum", "other processor", "a page", "nothing", "torn", "missing"],
)
def test_what_is_not_the_binary_is_refused_and_not_kept(publish, tmp_path, content, headers, error, message):
    publish(content, **headers)
    with pytest.raises(error, match=f"^{message}") as raised:
        binaries.fetch()
    assert "\n" not in str(raised.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_without_a_network_one_line_says_where_it_is_published(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(binaries, "ADDRESS", "http://127.0.0.1:9/{version}/benchmark_model")  # nobody listens
    where = (
        f"it is published at http://127.0.0.1:9/{VERSION}/benchmark_model; --benchmark-model PATH takes one that you"
    )
    with pytest.raises(OSError, match=rf"cannot be fetched \(.*Connection refused\): {where} downloaded$"):
        binaries.fetch()


def test_address_is_that_of_a_version():
    assert binaries.ADDRESS.format(version="2.3.0") == (
        "https://storage.googleapis.com/litert/binaries/2.3.0/android_arm64/benchmark_model"
    )
