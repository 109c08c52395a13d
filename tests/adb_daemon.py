"""A daemon that speaks adb's protocol on the loopback address, for the real adb client; not a test itself.

Its phone is this machine: commands run in /bin/sh, and /data/local/tmp is a folder of the test. It asks for no key: not
for anything but 127.0.0.1. The protocol is that of packages/modules/adb of Android: protocol.txt, SYNC.TXT, and
shell_protocol.h of shell version 2, which has exit statuses.
"""

import contextlib
import os
import socket
import stat
import struct
import subprocess
import threading
from pathlib import Path

PHONE_FOLDER = "/data/local/tmp"
_LARGEST = 256 * 1024  # bytes of a message
_VERSION = 0x01000001  # messages without checksums
_BANNER = b"device::ro.product.name=test;ro.product.model=Test;ro.product.device=test;features=shell_v2,cmd,stat_v2"
_OUTPUT, _ERRORS, _STATUS = 1, 2, 3  # kinds of packets of a shell
_NO_CHECKSUM = 0


class Daemon:
    """A phone on `127.0.0.1:port`, from `with Daemon(folder, environment) as daemon` on.

    Args:
        folder: Its /data/local/tmp.
        environment: Environment variables of its shell.
    """

    def __init__(self, folder, environment):
        self.folder, self.environment, self.commands = folder, environment, []
        self._server, self._connections = socket.create_server(("127.0.0.1", 0)), []
        self.port = self._server.getsockname()[1]

    def __enter__(self):
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.disconnect()

    def disconnect(self):
        """Ends all connections for good, as a cable that is pulled."""
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        for connection in self._connections:
            connection.close()

    def here(self, text):
        """A path or a command of the phone as one of this machine."""
        return text.replace(PHONE_FOLDER, str(self.folder))

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection = Connection(self, self._server.accept()[0])
                self._connections.append(connection)
                threading.Thread(target=connection.serve, daemon=True).start()


class Connection:
    """A connection of an adb server, which carries several streams."""

    def __init__(self, daemon, sock):
        self.daemon, self._socket, self._lock, self._streams = daemon, sock, threading.Lock(), {}
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, command, first, second, data=b""):
        """Sends a message: six numbers, and data."""
        (number,) = struct.unpack("<I", command)
        head = struct.pack("<6I", number, first, second, len(data), _NO_CHECKSUM, number ^ 0xFFFFFFFF)
        with self._lock:
            self._socket.sendall(head + data)

    def serve(self):
        """Answers messages until the connection ends."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                number, first, second, size, _, _ = struct.unpack("<6I", self._receive(24))
                self._answer(struct.pack("<I", number), first, second, self._receive(size))
        self.close()

    def close(self):
        """Ends the connection and its streams."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for stream in list(self._streams.values()):
            stream.ended()

    def _answer(self, command, first, second, data):
        if command == b"CNXN":
            self.send(b"CNXN", _VERSION, _LARGEST, _BANNER)
        elif command == b"OPEN":
            stream = Stream(self, own=len(self._streams) + 1, other=first)
            self._streams[stream.own] = stream
            self.send(b"OKAY", stream.own, first)
            service = data.rstrip(b"\0").decode()
            threading.Thread(target=stream.serve, args=(service,), daemon=True).start()
        elif second in self._streams:
            stream = self._streams[second]
            {b"WRTE": stream.received, b"OKAY": stream.acknowledged, b"CLSE": stream.ended}[command](data)

    def _receive(self, size):
        data = b""
        while len(data) < size:
            if not (more := self._socket.recv(size - len(data))):
                raise EOFError
            data += more
        return data


class Stream:
    """A service of the phone: a shell command, or transfers of files."""

    def __init__(self, connection, own, other):
        self.own, self._connection, self._other = own, connection, other
        self._data, self._free, self._has_ended, self._changed = b"", True, False, threading.Condition()

    def serve(self, service):
        """Runs a service, and closes the stream."""
        with contextlib.suppress(EOFError, OSError):
            kind, _, command = service.partition(":")
            if kind == "sync":
                Files(self, self._connection.daemon).serve()
            elif kind.startswith("shell,v2"):
                self._run(command)
            self._connection.send(b"CLSE", self.own, self._other)

    def received(self, data):
        """Takes data of the other side, which waits until it is acknowledged."""
        with self._changed:
            self._data += data
            self._changed.notify_all()
        self._connection.send(b"OKAY", self.own, self._other)

    def acknowledged(self, _=b""):
        """The other side takes the next message."""
        with self._changed:
            self._free = True
            self._changed.notify_all()

    def ended(self, _=b""):
        """The other side closed the stream."""
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    def read(self, size):
        """The next bytes of the other side."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._data) >= size or self._has_ended)
            if len(self._data) < size:
                raise EOFError
            data, self._data = self._data[:size], self._data[size:]
        return data

    def write(self, data):
        """Sends bytes, one message at a time."""
        for start in range(0, len(data), _LARGEST):
            with self._changed:
                self._changed.wait_for(lambda: self._free or self._has_ended)
                if self._has_ended:
                    raise EOFError
                self._free = False
            self._connection.send(b"WRTE", self.own, self._other, data[start : start + _LARGEST])

    def _run(self, command):
        daemon = self._connection.daemon
        daemon.commands.append(command)
        process = subprocess.Popen(
            ["/bin/sh", "-c", daemon.here(command)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=daemon.environment,
            cwd=daemon.folder,
        )
        output, errors = process.communicate()
        for kind, data in ((_OUTPUT, output), (_ERRORS, errors), (_STATUS, bytes([process.returncode & 255]))):
            for start in range(0, len(data), 32_768):
                part = data[start : start + 32_768]
                self.write(struct.pack("<BI", kind, len(part)) + part)


class Files:
    """The service `sync`: files are sent to the phone, and received from it."""

    def __init__(self, stream, daemon):
        self._stream, self._daemon = stream, daemon

    def serve(self):
        """Answers requests, each a name of four letters and a path."""
        while True:
            request, size = struct.unpack("<4sI", self._stream.read(8))
            if request == b"QUIT":
                return
            path = self._stream.read(size).decode()
            {
                b"STAT": self._stat,
                b"STA2": self._stat2,
                b"LST2": self._stat2,
                b"SEND": self._send,
                b"RECV": self._receive,
            }[request](path, request)

    def _stat(self, path, _):
        try:
            found = os.stat(self._daemon.here(path))
            numbers = found.st_mode, found.st_size, int(found.st_mtime)
        except OSError:
            numbers = 0, 0, 0
        self._stream.write(b"STAT" + struct.pack("<3I", *numbers))

    def _stat2(self, path, request):
        try:
            found, error = os.stat(self._daemon.here(path)), 0
            times = int(found.st_atime), int(found.st_mtime), int(found.st_ctime)
            owner = found.st_nlink, found.st_uid, found.st_gid
            numbers = (found.st_dev, found.st_ino, found.st_mode, *owner, found.st_size, *times)
        except OSError as missing:
            error, numbers = missing.errno or 1, (0,) * 10
        self._stream.write(request + struct.pack("<IQQIIIIQqqq", error, *numbers))

    def _send(self, path, _):
        path, _, mode = path.rpartition(",")
        content, error = [], None
        while True:
            part, size = struct.unpack("<4sI", self._stream.read(8))
            if part == b"DONE":  # and the time of the file
                break
            content.append(self._stream.read(size))
        try:
            Path(self._daemon.here(path)).write_bytes(b"".join(content))
            os.chmod(self._daemon.here(path), stat.S_IMODE(int(mode)))
        except OSError as failure:
            error = failure.strerror.encode()
        self._stream.write(b"OKAY\0\0\0\0" if error is None else b"FAIL" + struct.pack("<I", len(error)) + error)

    def _receive(self, path, _):
        content = Path(self._daemon.here(path)).read_bytes()
        for start in range(0, len(content), 65_536):
            part = content[start : start + 65_536]
            self._stream.write(b"DATA" + struct.pack("<I", len(part)) + part)
        self._stream.write(b"DONE\0\0\0\0")
