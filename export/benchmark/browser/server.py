"""The server of one page: files of a table and answers of a table, under an address that only the command prints.

It is for one measurement in a network of people who know each other. Whoever has the address can measure, and read the
files that are measured; nobody else gets anything.
"""

import contextlib
import ipaddress
import json
import re
import secrets
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from se_keras.records import parse_json
from se_keras.typing import Json

_LOCAL, _EVERYWHERE = "127.0.0.1", "0.0.0.0"
_LARGEST_POST = 2**18  # bytes: of the outputs that are compared, 4096 numbers
_LONGEST_SILENCE = 60.0  # seconds that a connection may be silent
_LETTERS = "abcdefghjkmnpqrstuvwxyz23456789"  # of the token, without those that look alike
_HEADERS = {
    # Both are needed for threads and for a fine clock: https://web.dev/articles/coop-coep
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True)
class File:
    """What a GET is answered with."""

    kind: str
    content: bytes


@dataclass(frozen=True)
class Answer:
    """What a POST is answered with.

    Args:
        shape: The `TypedDict` that its JSON must be.
        of: From the value to the answer; a ValueError is the stranger's fault, and its message is the answer.
    """

    shape: Any
    of: Callable[[Any], Json]


class Refused(Exception):
    """A request that is not answered."""

    def __init__(self, status: HTTPStatus, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


class PageServer:
    """Serves a page until `close`.

    Args:
        files: `{address: File}`; the address "" is the page. Files may be added at any time.
        answers: `{address: Answer}`.
        lan: Whether other devices in the network reach it; otherwise this computer alone.
        port: 0 for any that is free.
        make_context: For HTTPS: from the host to the settings.

    Raises:
        ValueError: If there is no such port.
        OSError: If the port is in use, or if this computer is in no network.
    """

    def __init__(
        self,
        files: Mapping[str, File],
        answers: Mapping[str, Answer],
        *,
        lan: bool = False,
        port: int = 0,
        make_context: Callable[[str], ssl.SSLContext] | None = None,
    ):
        if not 0 <= port <= 65535:
            raise ValueError(f"port must be an int of 0 to 65535. Received: port={port!r}")
        self.host = lan_address() if lan else _LOCAL
        self.token = "".join(secrets.choice(_LETTERS) for _ in range(12))  # 59 bits
        self._scheme, context = ("https", make_context(self.host)) if make_context else ("http", None)
        try:
            self._server = _Server((_EVERYWHERE if lan else _LOCAL, port), self.token, files, answers, context)
        except OSError as error:
            raise OSError(f"Port {port} cannot be used ({error.strerror}): take another, such as --port 0") from None
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()

    @property
    def address(self) -> str:
        """The address of the page."""
        return self.address_at(self.host)

    def address_at(self, host: str) -> str:
        """The address of the page on another name of this computer."""
        return f"{self._scheme}://{host}:{self.port}/{self.token}/"

    def close(self) -> None:
        """Ends the server."""
        self._server.shutdown()
        self._server.server_close()


def lan_address() -> str:
    """The address of this computer in its network; raises OSError if it is in none."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # an address of documentation, RFC 5737: connect sends no packet
        return probe.getsockname()[0]
    raise OSError("This computer is in no network: join the phone's Wi-Fi, or leave out --lan")


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address, token, files, answers, context):
        super().__init__(address, _Handler)
        self.token, self.files, self.answers, self._context = token, files, answers, context

    def get_request(self):
        connection, address = super().get_request()
        if self._context:  # the handshake waits for the thread of the request: a silent stranger would stop all others
            connection = self._context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def handle_error(self, request, client_address):
        pass  # a browser that went away, or no browser


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = _LONGEST_SILENCE
    server: _Server

    def do_GET(self):
        with self._refusing():
            file = self.server.files.get(self._name())
            if file is None:
                raise Refused(HTTPStatus.NOT_FOUND, "There is no such file")
            self._send(HTTPStatus.OK, file.kind, file.content)

    def do_POST(self):
        with self._refusing():
            answer = self.server.answers.get(self._name())
            if answer is None:
                raise Refused(HTTPStatus.NOT_FOUND, "There is no such answer")
            body = self._body()
            try:
                value = parse_json(body, answer.shape, refusal="This is not what the page sends")
                found = answer.of(value)
            except ValueError as error:
                raise Refused(HTTPStatus.BAD_REQUEST, str(error)) from None
            self._send(HTTPStatus.OK, "application/json", json.dumps(found).encode())

    def end_headers(self):
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format, *args):
        pass

    def _name(self):
        """The address in the page's own folder; Refused without the token, and under another name of this computer."""
        # A page of a stranger whose name leads to this computer, by "DNS rebinding", has that name here.
        if not _has_number(self.headers.get("Host", "")):
            raise Refused(HTTPStatus.FORBIDDEN, "Open the address that se-keras printed, with its numbers")
        _, token, *rest = [*urlsplit(self.path).path.split("/", 2), ""]
        if not secrets.compare_digest(token.encode(), self.server.token.encode()):
            raise Refused(HTTPStatus.NOT_FOUND, "Open the whole address that se-keras printed")
        return rest[0]

    def _body(self):
        length = self.headers.get("Content-Length")
        if length is None:
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "Content-Length is missing")
        if not re.fullmatch(r"[0-9]{1,20}", length):
            raise Refused(HTTPStatus.BAD_REQUEST, "Content-Length must be a number of bytes")
        if int(length) > _LARGEST_POST:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"At most {_LARGEST_POST:,} bytes are taken")
        return self.rfile.read(int(length))

    @contextlib.contextmanager
    def _refusing(self):
        try:
            yield
        except Refused as refused:
            self.close_connection = True  # its body, if any, was not read
            self._send(refused.status, "text/plain; charset=utf-8", f"{refused.reason}\n".encode())

    def _send(self, status, kind, content):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)


def _has_number(host):
    """Whether the host of a request is an IP address or localhost, not a name that somebody registered."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or bool(ipaddress.ip_address(name))
    except ValueError:
        return False
