"""A program of ours on a board, at the other end of one connection of the system's ssh.

What the program writes on the board lies in one folder, which the board's shell removes when the program ends. The
program ends when the connection does.
"""

import json
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from se_keras.errors import first_line
from se_keras.typing import FilePath, Json

from .devices import DeviceLost

OLDEST = (3, 9)  # of Python on the board
_OPTIONS = (
    *("BatchMode=yes", "ConnectTimeout=20", "ServerAliveInterval=15", "ServerAliveCountMax=4"),
    # What a configuration may ask for in a terminal.
    *("ClearAllForwardings=yes", "ForwardAgent=no", "ForwardX11=no", "RemoteCommand=none", "LogLevel=INFO"),
)
_NO_FOLDER, _CANNOT_RUN, _NOT_FOUND, _OF_SSH = 96, 126, 127, 255  # exit statuses
# Python 2 reads this text too. The arguments are the size of the program and the folder.
_LOADER = (
    f"import sys; sys.version_info < {OLDEST} and sys.exit(sys.version.split()[0]); "
    "exec(sys.stdin.buffer.read(int(sys.argv[1])))"
)
_CLOSING = 20  # seconds that the board has to remove its folder
# What ssh says if it does not connect, and what to do about it.
_REFUSALS = {
    r"Offending .*|.*[Hh]ost key .* has changed.*": (
        "The host key of {host} has changed: it was set up anew, or another machine answers for it. If you know why, "
        "remove the old key with ssh-keygen -R"
    ),
    r".*Host key verification failed.*": (
        "The host key of {host} is not known yet: connect once with ssh, which shows the key and asks"
    ),
    r".*Permission denied.*": (
        "{host} accepts no key of yours, and a password cannot be asked for here: ssh-copy-id copies a key to it, "
        "ssh-add loads a key that has a passphrase"
    ),
    r".*(Bad configuration|terminating, |Bad owner or permissions).*": "The configuration of ssh has an error",
}
_UNREACHABLE = "ssh does not reach {host}: is the name right, and is it switched on"


def check_host(host: str) -> None:
    """Raises ValueError if this cannot be the name of a host. An option of ssh could run any command here."""
    if not host or host.startswith("-") or not host.isprintable() or " " in host:
        raise ValueError(f"A host must be user@host, without blanks, and without a dash first. Received: {host!r}")


class Connection:
    """A program on a board: `connection.ask("block", runs=3)` sends a request, and returns the answer.

    Args:
        host: As for ssh: `user@host`, a name of its configuration, or `ssh://user@host:port`.
        program: A program of `programs/` that reads requests from its standard input, as `paired_runs` does.
        config: ssh's configuration. Default: the user's own.
        python: Python on the board, a name or a path; `~/` is the home directory there.

    Raises:
        FileNotFoundError: If there is no ssh, or no such configuration.
        ValueError: If `host` is not the name of a host.
    """

    def __init__(self, host: str, program: ModuleType, *, config: FilePath | None = None, python: str = "python3"):
        check_host(host)
        if shutil.which("ssh") is None:
            raise FileNotFoundError("ssh is not on the PATH: your system's package openssh-client brings it")
        if config is not None and not Path(config).is_file():
            raise FileNotFoundError(f"There is no configuration of ssh {str(config)!r}")
        self._host, self._python, self._has_answered = host, python, False
        source = Path(str(program.__file__)).read_bytes()
        options = [part for option in _OPTIONS for part in ("-o", option)]
        options += [] if config is None else ["-F", str(config)]
        # The board's shell knows its home directory.
        path = f'"$HOME"/{shlex.quote(python[2:])}' if python.startswith("~/") else shlex.quote(python)
        script = (
            f'd=$(mktemp -d "${{TMPDIR:-/tmp}}/se_keras.XXXXXX") || exit {_NO_FOLDER}; '
            f'trap "rm -rf \\"$d\\"" EXIT; trap "exit 129" HUP INT TERM PIPE; '
            f'{path} -u -c {shlex.quote(_LOADER)} {len(source)} "$d"'
        )
        self._errors = tempfile.TemporaryFile("w+", errors="replace")
        self._process = subprocess.Popen(
            ["ssh", "-T", *options, "--", host, f"exec sh -c {shlex.quote(script)}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        # Ends the program, and waits until the board has removed what it wrote; at the latest when Python exits.
        self.close = weakref.finalize(self, _close, self._process, self._errors)
        self._send(source)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def ask(self, action: str, *contents: bytes, **request: Any) -> Json:
        """Sends a request with its contents, and returns the program's answer.

        Raises:
            DeviceLost: If the connection or the program ends after the first answer.
            OSError: If it ends before, or if the board lacks packages or space.
            ValueError: If the program fails.
        """
        request |= {"action": action, "sizes": list(map(len, contents))}
        self._send(json.dumps(request).encode() + b"\n", *contents)
        line = next((line for line in self._process.stdout or () if line.startswith(b"{")), None)  # after a greeting
        if line is None:
            raise self._reason()
        answer, self._has_answered = json.loads(line), True
        if "error" in answer:
            raise self._failure(answer["kind"], first_line(answer["error"]))
        return answer

    def _send(self, *parts):
        with suppress(BrokenPipeError):  # the missing answer has the reason
            for part in parts:
                self._process.stdin.write(part)
            self._process.stdin.flush()

    def _failure(self, kind, error):
        if kind == "space":
            return OSError(f"{self._host} has no space left where its temporary files are: {error}")
        if kind == "setup":
            return OSError(f"--setup fails on {self._host}: {error}")
        if kind == "packages":
            return OSError(
                f"Python of {self._host} needs numpy and ai-edge-litert: --setup installs them in a temporary folder "
                f"there, --python names another Python. Received: {error}"
            )
        return ValueError(f"{self._host} cannot run the files: {error}")

    def _reason(self):
        """Why there is no answer: an OSError."""
        status = self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        last = lines[-1] if lines else ""
        if self._has_answered:
            ended = f"its program {_end(status)}" if status < _OF_SSH else "the connection ended"
            return DeviceLost(_received(f"{self._host} no longer answers: {ended}", last))
        rule = f"{self._host} does not run the program, which {_end(status)}"
        if status == _OF_SSH:
            known = ((line, rule) for at, rule in _REFUSALS.items() for line in lines if re.match(at, line))
            last, rule = next(known, (last, _UNREACHABLE))
            rule = rule.format(host=self._host)
        elif status == _NO_FOLDER:
            rule = f"{self._host} cannot make a folder for temporary files"
        elif status == _NOT_FOUND:
            rule = f"{self._host} has no {self._python}: --python names the Python there"
        elif status == _CANNOT_RUN:
            rule = f"{self._host} cannot run {self._python}: it must be a program for its processor"
        elif re.fullmatch(r"[23]\.\d+\.\d+\S*", last):
            oldest = ".".join(map(str, OLDEST))
            rule = f"Python of {self._host} must be {oldest} or newer: --python names another"
        return OSError(_received(rule, last))


def _close(process, errors):
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):
            pipe.close()
    try:
        process.wait(_CLOSING)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    errors.close()


def _received(rule, message):
    return f"{rule}. Received: {message.rstrip('.')}" if message else rule


def _end(status):
    """What an exit status says: shells add 128 to the number of a signal."""
    with suppress(ValueError):
        if status > 128:
            return f"was ended by {signal.Signals(status - 128).name}"
    return f"ended with status {status}"
