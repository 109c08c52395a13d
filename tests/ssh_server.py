"""A real sshd on the loopback address, with a key for each board. Tests start it; not a test itself."""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
MISSING = next((name for name in ("ssh", "ssh-keygen") if shutil.which(name) is None), "" if SSHD else "sshd")


@dataclass(frozen=True)
class Server:
    """A server. Its boards are this machine, each with an environment of its own."""

    folder: Path
    port: int
    process: subprocess.Popen

    def board(self, name, *, options="", host_key=None, accepted=True, **environment):
        """Adds a board, with a key of its own, and returns ssh's configuration, in which it is called `board`.

        Args:
            options: Options of authorized_keys.
            host_key: The host key that the user knows; "" for none. Default: the server's.
            accepted: Whether the server accepts the board's key.
            environment: Environment variables of its sessions.
        """
        known, key = self.folder / f"{name}.known_hosts", new_key(self.folder / name)
        if accepted:
            given = [f'environment="{variable}={value}"' for variable, value in environment.items()]
            with (self.folder / "authorized_keys").open("a") as file:
                file.write(" ".join(filter(None, (",".join(filter(None, (options, *given))), key))) + "\n")
        host_key = (self.folder / "host.pub").read_text() if host_key is None else host_key
        known.write_text(f"[127.0.0.1]:{self.port} {host_key}\n" if host_key else "")
        config = self.folder / f"{name}.config"
        config.write_text(
            f"Host board\n  HostName 127.0.0.1\n  Port {self.port}\n  User {getpass.getuser()}\n"
            f'  IdentityFile "{self.folder / name}"\n  IdentitiesOnly yes\n'
            f'  UserKnownHostsFile "{known}"\n  GlobalKnownHostsFile none\n'
        )
        return config

    def end_sessions(self):
        """Ends the processes that serve connections, as if the network were gone."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        for session in children.split():
            os.kill(int(session), signal.SIGKILL)


def process_with(argument):
    """The process that has this argument last."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may have ended
            if (folder / "cmdline").read_bytes().endswith(f"\0{argument}\0".encode()):
                found.append(int(folder.name))
    (pid,) = found
    return pid


def new_key(path):
    """Makes a pair of keys, and returns the public one."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    return path.with_name(f"{path.name}.pub").read_text().strip()


@contextlib.contextmanager
def serving(folder):
    """A server that runs as long as the `with` block."""
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd of root wants it, and the system's service makes it
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    new_key(folder / "host")
    (folder / "authorized_keys").touch(mode=0o600)
    settings = {
        "ListenAddress": "127.0.0.1",
        "Port": port,
        "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "authorized_keys",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
        "PermitRootLogin": "yes",
        "PermitUserEnvironment": "yes",
    }
    (folder / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
    try:
        for _ in range(100):
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        yield Server(folder, port, process)
    finally:
        process.terminate()
        process.wait(10)


if __name__ == "__main__":  # to measure by hand: python tests/ssh_server.py, until Ctrl-C
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with (
        contextlib.suppress(KeyboardInterrupt),
        tempfile.TemporaryDirectory() as scratch,
        serving(Path(scratch)) as server,
    ):
        options = f"--ssh-config {server.board('here')} --python {sys.executable}"
        print(f"se-keras benchmark --ssh board {options}", flush=True)
        signal.pause()
