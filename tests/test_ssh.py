"""The measurement on a board with ssh: a real sshd on the loopback address, which runs the real program."""

import ast
import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import pytest
import ssh_server
from keras import layers

import se_keras_cli
from se_keras.environment import environment
from se_keras.export.benchmark.devices import DeviceLost
from se_keras.export.benchmark.measuring import pair_of_files
from se_keras.export.benchmark.programs import footprint, paired_runs
from se_keras.export.benchmark.targets.ssh import Ssh
from se_keras.export.litert.conversion import to_litert
from se_keras.export.litert.file import load_litert

needs_sshd = pytest.mark.skipif(bool(ssh_server.MISSING), reason=f"needs {ssh_server.MISSING}")
GOLDEN = Path(__file__).parent / "golden" / "from_0_1" / "tiny_int8.tflite"
PATH = f"{Path(sys.executable).parent}:/usr/bin:/bin"
# A command of authorized_keys, in which the text stands for what runs before the user's own command.
BEFORE = 'command="{}; eval \\"$SSH_ORIGINAL_COMMAND\\""'


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ssh_server.serving(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture
def board(server, tmp_path):
    """`board(**more)`: ssh's configuration for a new board, whose temporary files are in `tmp_path / "board"`."""
    (tmp_path / "board").mkdir()

    def like(**more):
        usual = {"PATH": PATH, "HOME": tmp_path, "TMPDIR": tmp_path / "board"}
        return server.board(f"board{time.monotonic_ns()}", **usual | more)

    yield like
    assert is_clean(tmp_path / "board")


def is_clean(folder):
    """Whether a board has removed everything: at once, or soon after a disconnect, for which nobody waits."""
    until = time.monotonic() + 20
    while list(folder.iterdir()) and time.monotonic() < until:
        time.sleep(0.05)
    return not list(folder.iterdir())


def path_with(folder, python):
    """A PATH with a program `python3` of this text, or none, and the few commands that a board needs."""
    (folder / "bin").mkdir()
    for command in ("sh", "mktemp", "rm"):
        (folder / "bin" / command).symlink_to(f"/bin/{command}")
    if python is not None:
        (folder / "bin" / "python3").write_text(python)
        (folder / "bin" / "python3").chmod(0o755)
    return folder / "bin"


@pytest.fixture(scope="module")
def files():
    """Two files with the same input: B computes ten times as much as A."""
    images = keras.Input((32, 32, 4), name="images")
    return [to_litert(keras.Model(images, layers.Conv2D(n, 3)(images), name=f"small{n}")) for n in (8, 80)]


def target(config, **options):
    return Ssh(ssh="board", ssh_config=config, **{"blocks": 2, "runs": 1} | options)


def measure(config, files, progress=print, threads=1, **options):
    """The `Overhead` of two files on a board."""
    (found,) = target(config, **options).measure([pair_of_files(*files, threads=threads)], progress)
    return found


@needs_sshd
def test_board_measures_and_is_left_clean(board, files, tmp_path):
    board = target(board(options=BEFORE.format("echo Welcome to the board")), blocks=3, runs=2)
    where, here = board.connect(print), environment()
    (found,) = board.measure([pair_of_files(*files, threads=2)], print)
    assert where["target"] == "ssh"
    same = ("processor", "matrix_units", "cores", "governor", "system", "python", "runtime", "versions")
    assert {key: where[key] for key in same} == {key: here[key] for key in same}
    assert found.comparison.ratio.median > 1  # B computes ten times as much
    assert (found.comparison.blocks, found.comparison.runs, found.threads) == (3, 2, 2)
    assert found.comparison.a.p50 >= found.comparison.a_ms > 0
    assert found.footprints[1].bytes == len(files[1].content) and found.footprints[1].init_ms > 0
    assert (found.device.missing, found.undelegated) == (None, ())
    assert is_clean(tmp_path / "board")


@needs_sshd
@pytest.mark.slow
def test_several_pairs_are_measured_in_one_connection(board, files):
    steps, integers = [], load_litert(GOLDEN)
    several = [pair_of_files(*files), pair_of_files(integers, integers)]
    first, second = target(board()).measure(several, steps.append)
    assert (first.precision, second.precision) == ("float32", "int8")
    assert sum("connecting" in step for step in steps) == 1


@needs_sshd
def test_connection_that_ends_leaves_the_blocks_before(server, board, files):
    def progress(step):
        if "block 4 of 50" in step:
            server.end_sessions()

    found = measure(board(), files, progress, blocks=50)
    assert found.comparison.blocks == 3
    assert found.device.missing.startswith("3 of 50 blocks: board no longer answers: the connection ended. Received: ")


@needs_sshd
@pytest.mark.parametrize("block, blocks", [(2, None), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_program_that_is_killed_is_told_and_removed(board, files, tmp_path, block, blocks):
    def progress(step):
        if f"block {block} of 50" in step:
            (folder,) = (tmp_path / "board").iterdir()
            os.kill(ssh_server.process_with(str(folder)), signal.SIGKILL)

    ended = r"board no longer answers: its program was ended by SIGKILL"
    if blocks is None:
        with pytest.raises(DeviceLost, match=f"^{ended}"):
            measure(board(), files, progress, blocks=50)
    else:
        found = measure(board(), files, progress, blocks=50)
        assert found.comparison.blocks == blocks and re.match(f"2 of 50 blocks: {ended}", found.device.missing)


@needs_sshd
@pytest.mark.slow
def test_board_that_nothing_is_measured_on_is_left_clean(board, tmp_path):
    connected = target(board())
    connected.connect(print)
    assert list((tmp_path / "board").iterdir())
    del connected
    gc.collect()
    assert is_clean(tmp_path / "board")


KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIwd0ExHqSMGTVDC53ixMPZJWGpPg4VKF2SX/BaELFZk"
SPARC = "\x7fELF\x01\x02\x01" + "\0" * 9 + "\0\x02\0\x02" + "\0" * 32  # the head of a program
BARE = f'#!/bin/sh\nexec {sys.executable} -S "$@"\n'  # this Python without the packages that are installed
OLD = f"""#!/bin/sh
shift 2  # -u -c
exec {sys.executable} -c 'import sys; sys.version = "3.7.3 (default)"; sys.version_info = (3, 7, 3)
exec(sys.argv.pop(1))' "$@"
"""  # this Python, which says that it is an old one
CONNECTION = {
    "unknown host key": (
        {"host_key": ""},
        "The host key of board is not known yet: connect once with ssh, which shows the key and asks. "
        "Received: Host key verification failed$",
    ),
    "changed host key": (
        {"host_key": KEY},
        "The host key of board has changed: it was set up anew, or another machine answers for it. If you know why, "
        "remove the old key with ssh-keygen -R. Received: Offending ED25519 key in .+:1",
    ),
    "key that is not accepted": ({"accepted": False}, "board accepts no key of yours.+ssh-copy-id.+Permission denied"),
    "account without commands": (
        {"options": 'command="echo This account is not available >&2; exit 1"'},
        r"board does not run the program, which ended with status 1. Received: This account is not available",
    ),
    "no Python": (
        {"python": None},
        "board has no python3: --python names the Python there. Received: .+not found",
    ),
    "Python for another processor": (
        {"python": SPARC},
        "board cannot run python3: it must be a program for its processor. Received: .+Exec format error",
    ),
    "old Python": ({"python": OLD}, "Python of board must be 3.9 or newer: --python names another. Received: 3.7.3$"),
    "no packages": (
        {"python": BARE},
        "Python of board needs numpy and ai-edge-litert: --setup installs them in a temporary folder there, --python "
        "names another Python. Received: No module named 'ai_edge_litert'",
    ),
    "no folder": (
        {"TMPDIR": "/nonexistent"},
        "board cannot make a folder for temporary files. Received: mktemp: .+No such file",
    ),
}


@needs_sshd
@pytest.mark.parametrize("case", CONNECTION)
def test_board_that_cannot_be_used_is_told_in_a_line(board, tmp_path, case):
    facts, message = CONNECTION[case]
    if "python" in facts:
        facts = {"PATH": path_with(tmp_path, facts["python"])}
    with pytest.raises(OSError, match=f"^{message}") as raised:
        target(board(**facts)).connect(print)
    assert "\n" not in str(raised.value)


@needs_sshd
def test_host_that_does_not_answer_is_told(board, tmp_path):
    config = tmp_path / "config"
    config.write_text(re.sub(r"Port \d+", "Port 9", board().read_text()))  # discard: nobody listens
    with pytest.raises(OSError, match="ssh does not reach board: is the name right.+ Received: .+Connection refused"):
        target(config).connect(print)
    config.write_text("Nonsense yes\n")
    with pytest.raises(OSError, match="The configuration of ssh has an error. Received: .+ option: nonsense"):
        target(config).connect(print)
    with pytest.raises(FileNotFoundError, match="There is no configuration of ssh '.+/missing'"):
        target(tmp_path / "missing").connect(print)


@needs_sshd
def test_full_disk_is_told(board, files):
    config = board(options=BEFORE.format("ulimit -f 1"))  # blocks of 512 or 1024 bytes a file
    with pytest.raises(OSError, match="board has no space left where its temporary files are: .+File too large"):
        measure(config, files)


@needs_sshd
@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a file system")
def test_full_file_system_is_told(board, files, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        with pytest.raises(OSError, match="board has no space left where its temporary files are: .+No space left"):
            measure(board(TMPDIR=small), files)
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", small], check=True)


@needs_sshd
@pytest.mark.slow
def test_file_with_other_outputs_is_not_timed(board, files, tmp_path):
    # Kernels that are wrong by a tenth: Python imports this module when it starts.
    (tmp_path / "sitecustomize.py").write_text(
        "from ai_edge_litert.interpreter import Interpreter\n"
        "right = Interpreter.get_tensor\n"
        "Interpreter.get_tensor = lambda self, index: 1.1 * right(self, index)\n"
    )
    steps = []
    with pytest.raises(ValueError, match="File A must have the same outputs on the board as here, to 0.0001 of their"):
        measure(board(PYTHONPATH=tmp_path), files, steps.append)
    assert not any("block" in step for step in steps)


@needs_sshd
@pytest.mark.slow
def test_operators_outside_xnnpack_are_refused_unless_allowed(board, files):
    images = keras.Input((32, 32, 4), name="images")
    slow = to_litert(keras.Model(images, layers.Conv2D(3, 1)(keras.ops.cumsum(images, axis=1)), name="slow"))
    config = board()
    with pytest.raises(ValueError, match=r"^Not delegated to XNNPACK: CUMSUM\."):
        measure(config, (files[0], slow))
    assert measure(config, (files[0], slow), allow_undelegated=True).undelegated == ("CUMSUM",)


@pytest.mark.parametrize("host", ["", "-oProxyCommand=touch /tmp/x", "pi@board -v", "pi@board\n", "--"])
def test_what_is_no_host_is_refused(host):
    with pytest.raises(ValueError, match="A host must be user@host, without blanks, and without a dash first. Rec"):
        Ssh(ssh=host)


@needs_sshd
@pytest.mark.parametrize(
    "host", ["pi@-oProxyCommand=touch${IFS}touched", "$(touch${IFS}touched)", "`touch${IFS}touched`"]
)
def test_host_of_a_stranger_runs_no_command(host, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="^ssh does not reach "):
        Ssh(ssh=host).connect(print)
    assert not list(tmp_path.iterdir())


@needs_sshd
def test_python_there_is_a_path_and_no_command(board, tmp_path):
    with pytest.raises(OSError, match=r"board has no python3; touch .+: --python names the Python there"):
        target(board(), python=f"python3; touch {tmp_path / 'touched'}").connect(print)
    assert not (tmp_path / "touched").exists()
    (tmp_path / "its own").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')  # in the home directory there
    (tmp_path / "its own").chmod(0o755)
    assert target(board(), python="~/its own").connect(print)["target"] == "ssh"


@pytest.mark.parametrize(
    "option, value", [("blocks", 1), ("runs", 0), ("rest", -1), ("within", 0), ("seconds", float("inf"))]
)
def test_option_out_of_range_is_refused(option, value):
    with pytest.raises(ValueError, match=f"{option}={value!r}"):
        Ssh(ssh="board", **{option: value})


def test_missing_ssh_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="ssh is not on the PATH: your system's package openssh-client brings"):
        Ssh(ssh="pi@board").connect(print)


@pytest.mark.parametrize("module", [paired_runs, footprint])
def test_programs_for_boards_are_python_of_2020(module):
    source = Path(module.__file__).read_text()
    tree = ast.parse(source, feature_version=(3, 9))
    assert "from __future__ import annotations" in source
    modules = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    foreign = {name.partition(".")[0] for name in modules} - sys.stdlib_module_names
    assert foreign == {"numpy", "ai_edge_litert"}


# What takes longer: the command, and pip.

SE_KERAS = (sys.executable, "-c", "import sys; from se_keras_cli import main; sys.exit(main())")


def command(config, *more):
    files = ("--files", GOLDEN, GOLDEN, "--blocks", 40)
    return [str(x) for x in ("benchmark", "--ssh", "board", "--ssh-config", config, *files, *more)]


@needs_sshd
@pytest.mark.slow
def test_command_measures_on_a_board_what_is_missing(server, board, tmp_path, capfd):
    results = tmp_path / "r.json"
    arguments = command(board(), "-o", results)
    long = [*SE_KERAS, *arguments, "--blocks", "100000"]
    with subprocess.Popen(long, stderr=subprocess.PIPE, text=True) as process:
        next(line for line in process.stderr if "block 4 of" in line)
        server.end_sessions()
        warning = process.stderr.read()
    assert process.returncode == 0 and re.search("warning: measured .+ of 100,?000 blocks: board no longer", warning)
    (partial,) = json.loads(results.read_text())["overhead"]
    assert 3 <= partial["comparison"]["blocks"] < 100_000
    assert se_keras_cli.main(arguments) == 0
    assert "with XNNPACK" in capfd.readouterr().out
    (record,) = json.loads(results.read_text())["overhead"]
    assert (record["missing"], record["comparison"]["blocks"]) == (None, 40)
    assert se_keras_cli.main(["report", str(results), "-o", str(tmp_path / "r.html")]) == 0
    assert environment()["processor"] in (tmp_path / "r.html").read_text()


@needs_sshd
@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_command_that_is_interrupted_or_killed_leaves_the_board_clean(board, tmp_path, how):
    # A shell lets programs in the background ignore Ctrl-C, and those that they start.
    heeding = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    )
    arguments = [sys.executable, "-c", heeding, *SE_KERAS, *command(board(), "--blocks", 100000)]
    with subprocess.Popen(list(map(str, arguments)), stderr=subprocess.PIPE, text=True) as process:
        next(line for line in process.stderr if "block 2 of" in line)
        process.send_signal(how)
        rest = process.stderr.read()
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL)
    assert "Traceback" not in rest
    assert is_clean(tmp_path / "board")


@needs_sshd
@pytest.mark.slow
def test_packages_that_cannot_be_installed_are_told_with_the_last_line_of_pip(board):
    with pytest.raises(OSError, match="--setup fails on board: ERROR: No matching distribution found for ai-edge-lit"):
        target(board(PIP_NO_INDEX="1"), setup=True).connect(print)


@needs_sshd
@pytest.mark.slow
def test_packages_are_installed_in_a_folder_that_is_removed(board, files, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    wheel = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", tmp_path, "ai-edge-litert"]
    if subprocess.run(wheel, capture_output=True).returncode:
        pytest.skip("needs a package index")
    found = measure(board(PATH=f"{tmp_path / 'bare' / 'bin'}:{PATH}"), files, setup=True)
    assert found.comparison.blocks == 2 and found.footprints[0].init_ms > 0
    assert {path.name for path in (tmp_path / "bare" / "lib").glob("python*/site-packages/*")} == set()
