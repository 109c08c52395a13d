"""Files are atomic: what is on the disk after a failure, an interrupt or a full disk."""

import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from se_keras import storage


class Interrupted(Exception):
    pass


FAILURES = (Interrupted, OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt, SystemExit)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def write_file(path):
    path.write_text("new")


def staged_bytes(target, content):
    with storage.staged(target) as path:
        path.write_bytes(content)


def write_folder(path):
    (path / "variables").mkdir(parents=True)
    (path / "variables" / "data").write_text("new")


@pytest.fixture
def flushed(monkeypatch):
    """The paths that `os.fsync` was called for, in order, with "replace" where the name was given."""
    events, opened = [], {}
    open_, fsync, replace = os.open, os.fsync, os.replace

    def opening(path, *args, **kwargs):
        descriptor = open_(path, *args, **kwargs)
        opened[descriptor] = Path(path).name
        return descriptor

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append(opened[descriptor]), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("replace"), replace(*paths)))
    return events


def test_file_takes_the_place_of_its_target(tmp_path):
    with storage.staged(tmp_path / "model") as path:
        write_file(path)
    assert (tmp_path / "model").read_text() == "new"


def test_folder_takes_the_place_of_its_target(tmp_path):
    with storage.staged(tmp_path / "1") as path:
        write_folder(path)
    assert (tmp_path / "1" / "variables" / "data").read_text() == "new"


def test_missing_folders_are_made(tmp_path):
    storage.write_bytes(tmp_path / "a" / "b" / "file", b"new")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"new"


def test_existing_file_is_replaced(tmp_path):
    (tmp_path / "file").write_text("old")
    storage.write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_open_reader_of_the_replaced_file_reads_the_old_one_to_its_end(tmp_path):
    (tmp_path / "file").write_text("old")
    with open(tmp_path / "file") as reader:
        storage.write_bytes(tmp_path / "file", b"new")
        assert reader.read() == "old"


def test_target_is_absent_until_the_block_ends(tmp_path):
    with storage.staged(tmp_path / "file") as path:
        write_file(path)
        assert not (tmp_path / "file").exists()


def test_staged_name_is_on_the_targets_file_system_and_taken_for_nothing_finished(tmp_path):
    with storage.staged(tmp_path / "7") as path:
        write_folder(path)
        (beside,) = tmp_path.iterdir()
        assert path.is_relative_to(beside)
        assert beside.name.startswith(".") and not beside.name.isdecimal()  # TF Serving loads numbered folders


def test_two_writers_of_one_target_do_not_meet(tmp_path):
    with storage.staged(tmp_path / "file") as first, storage.staged(tmp_path / "file") as second:
        assert first != second
        write_file(first)
        second.write_text("newer")
    assert names_in(tmp_path) == ["file"]


def test_failure_leaves_no_folder_that_was_not_there(tmp_path):
    with pytest.raises(OSError, match="full"), storage.staged(tmp_path / "a" / "b" / "1") as path:
        path.mkdir()
        raise OSError("full")
    assert list(tmp_path.iterdir()) == []


def test_nothing_temporary_is_left_behind_a_success(tmp_path):
    storage.write_bytes(tmp_path / "file", b"new")
    with storage.staged(tmp_path / "1") as path:
        write_folder(path)
    assert names_in(tmp_path) == ["1", "file"]


@pytest.mark.parametrize("write", [write_file, write_folder, lambda path: None], ids=["file", "folder", "nothing yet"])
@pytest.mark.parametrize("failure", FAILURES, ids=repr)
def test_failure_in_the_block_leaves_nothing(failure, write, tmp_path):
    with pytest.raises(failure if isinstance(failure, type) else type(failure)):
        with storage.staged(tmp_path / "target") as path:
            write(path)
            raise failure
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("failure", FAILURES, ids=repr)
def test_failure_in_the_block_leaves_the_old_file(failure, tmp_path):
    (tmp_path / "target").write_text("old")
    with pytest.raises(failure if isinstance(failure, type) else type(failure)):
        with storage.staged(tmp_path / "target") as path:
            write_file(path)
            raise failure
    assert names_in(tmp_path) == ["target"]
    assert (tmp_path / "target").read_text() == "old"


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("failure", FAILURES, ids=repr)
def test_failure_behind_the_block_leaves_the_old_file(failure, call, tmp_path, monkeypatch):
    def fail(*args):
        raise failure

    (tmp_path / "target").write_text("old")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(failure if isinstance(failure, type) else type(failure)):
        storage.write_bytes(tmp_path / "target", b"new")
    assert names_in(tmp_path) == ["target"]
    assert (tmp_path / "target").read_text() == "old"


def test_half_written_file_is_not_seen(tmp_path, monkeypatch):
    write_bytes = Path.write_bytes

    def full_disk(path, content):
        write_bytes(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        storage.write_bytes(tmp_path / "file", b"new content")
    assert names_in(tmp_path) == []


def test_block_that_wrote_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), storage.staged(tmp_path / "file"):
        pass
    assert names_in(tmp_path) == []


def test_existing_folder_is_not_replaced_by_a_folder(tmp_path):
    write_folder(tmp_path / "1")
    (tmp_path / "1" / "variables" / "data").write_text("old")
    with pytest.raises(FileExistsError, match="1' exists and is not a plain file: nothing was written"):
        with storage.staged(tmp_path / "1"):
            pytest.fail("the work began")
    assert (tmp_path / "1" / "variables" / "data").read_text() == "old"
    assert names_in(tmp_path) == ["1"]


@pytest.mark.parametrize("content", [(), ("data",)], ids=["empty", "full"])
def test_existing_folder_is_not_replaced_by_a_file(content, tmp_path):
    (tmp_path / "target").mkdir()
    for name in content:
        (tmp_path / "target" / name).touch()
    with pytest.raises(OSError):
        storage.write_bytes(tmp_path / "target", b"new")
    assert names_in(tmp_path) == ["target"]
    assert names_in(tmp_path / "target") == list(content)


def test_file_is_on_the_disk_before_its_name_and_its_name_thereafter(tmp_path, flushed):
    storage.write_bytes(tmp_path / "file", b"new")
    assert flushed[0].startswith(".file.partial-")
    assert flushed[1:] == ["replace", tmp_path.name]


def test_every_file_of_a_folder_is_on_the_disk_before_its_name(tmp_path, flushed):
    with storage.staged(tmp_path / "1") as path:
        write_folder(path)
    assert sorted(flushed[:-2]) == ["1", "data", "variables"]
    assert flushed[-2:] == ["replace", tmp_path.name]


def test_file_has_the_permissions_that_the_umask_leaves(tmp_path):
    # Only the owner can read a temporary file: a server or a colleague could not.
    mask = os.umask(0o027)
    try:
        storage.write_bytes(tmp_path / "file", b"new")
        with storage.staged(tmp_path / "1") as path:
            write_folder(path)
    finally:
        os.umask(mask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "1").stat().st_mode & 0o777 == 0o750


def test_umask_stays_as_it_was(tmp_path):
    mask = os.umask(0o027)
    try:
        storage.write_bytes(tmp_path / "file", b"new")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(mask)


def test_files_that_belong_together_are_all_written(tmp_path):
    storage.write_in_order([(tmp_path / "model", b"model"), (tmp_path / "new" / "manifest", b"manifest")])
    assert (tmp_path / "model").read_bytes() == b"model"
    assert (tmp_path / "new" / "manifest").read_bytes() == b"manifest"
    assert names_in(tmp_path) == ["model", "new"]


@pytest.mark.parametrize("failure", FAILURES, ids=repr)
def test_file_is_not_replaced_before_the_one_that_belongs_to_it_is_written(failure, tmp_path, monkeypatch):
    write_bytes = Path.write_bytes

    def fail_second(path, content):
        if content == b"manifest":
            raise failure
        return write_bytes(path, content)

    (tmp_path / "model").write_text("old")
    monkeypatch.setattr(Path, "write_bytes", fail_second)
    with pytest.raises(failure if isinstance(failure, type) else type(failure)):
        storage.write_in_order([(tmp_path / "model", b"model"), (tmp_path / "manifest", b"manifest")])
    assert names_in(tmp_path) == ["model"]
    assert (tmp_path / "model").read_text() == "old"


def test_file_is_not_replaced_where_the_one_that_belongs_to_it_cannot_be(tmp_path):
    (tmp_path / "model").write_text("old")
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        storage.write_in_order([(tmp_path / "model", b"model"), (tmp_path / "file" / "manifest", b"manifest")])
    assert (tmp_path / "model").read_text() == "old"
    assert names_in(tmp_path) == ["file", "model"]


def test_json_is_written_whole(tmp_path):
    value = {"bytes": 3, "names": ["a", "ü"], "nothing": None}
    storage.write_json(tmp_path / "file.json", value)
    assert json.loads((tmp_path / "file.json").read_text()) == value


def test_json_is_for_people_too(tmp_path):
    storage.write_json(tmp_path / "file.json", {"bytes": 3})
    assert (tmp_path / "file.json").read_text() == '{\n  "bytes": 3\n}\n'


def test_value_that_is_not_json_leaves_the_old_file(tmp_path):
    storage.write_json(tmp_path / "file.json", ["old"])
    with pytest.raises(TypeError):
        storage.write_json(tmp_path / "file.json", [object()])
    assert names_in(tmp_path) == ["file.json"]
    assert json.loads((tmp_path / "file.json").read_text()) == ["old"]


WRITERS = {
    "write_bytes": lambda path: storage.write_bytes(path, b"new"),
    "write_json": lambda path: storage.write_json(path, ["new"]),
    "staged": lambda path: storage.staged(path).__enter__(),
    "check_writable": storage.check_writable,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_target_under_a_file_is_an_os_error(write, tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(OSError):
        write(tmp_path / "file" / "target")
    assert (tmp_path / "file").read_text() == "old"


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as unbound:
        unbound.bind(path.name)  # the whole path may be longer than a socket's name can be


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, make_socket], ids=["folder", "pipe", "socket"])
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_only_a_plain_file_is_replaced(write, make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "target")
    (tmp_path / "link").symlink_to("target")
    before = (tmp_path / "target").stat()
    for name in ("target", "link"):
        with pytest.raises(FileExistsError, match=f"{name}' exists and is not a plain file: nothing was written"):
            write(tmp_path / name)
    assert os.path.samestat((tmp_path / "target").stat(), before)
    assert names_in(tmp_path) == ["link", "target"]


@pytest.mark.parametrize("content", ["old", None], ids=["to a file", "to nothing"])
@pytest.mark.parametrize("write", [storage.write_bytes, staged_bytes], ids=["write_bytes", "staged"])
def test_link_is_followed(write, content, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "file").symlink_to("disk/file")
    if content is not None:
        (tmp_path / "disk" / "file").write_text(content)
    write(tmp_path / "file", b"new")
    assert (tmp_path / "file").is_symlink()
    assert (tmp_path / "disk" / "file").read_bytes() == b"new"
    assert names_in(tmp_path / "disk") == ["file"]


@pytest.mark.parametrize("write", [storage.write_bytes, staged_bytes], ids=["write_bytes", "staged"])
def test_what_a_killed_process_left_is_removed_by_the_next_one(write, tmp_path):
    write_folder(tmp_path / ".1.partial-x_1abcde")
    (tmp_path / ".file.partial-abc").touch()
    kept = [".file.partial", "file.partial-abc", ".partial-abc", ".other"]
    for name in kept:
        (tmp_path / name).touch()
    write(tmp_path / "file", b"new")
    assert names_in(tmp_path) == sorted([*kept, "file"])


@contextlib.contextmanager
def other_process(block, path):
    """A process that is inside the block of `storage.staged` or `storage.locked`. It starts without Keras."""
    package = str(Path(storage.__file__).parent)
    script = (
        "import sys, types\nsys.modules['se_keras'] = package = types.ModuleType('se_keras')\n"
        "target, package.__path__ = sys.argv[1], [sys.argv[2]]\nfrom se_keras import storage\n"
        f"with storage.{block}:\n    print(flush=True)\n    input()\n"
    )
    command = [sys.executable, "-c", script, str(path), package]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline()
        yield process
        process.kill()


def test_what_a_living_process_writes_is_left_alone_until_it_is_killed(tmp_path):
    with other_process("staged(target)", tmp_path / "first") as process:
        storage.write_bytes(tmp_path / "second", b"second")
        ((first, *_), second) = sorted(tmp_path.iterdir()), "second"
        assert first.name.startswith(".first.partial-") and (tmp_path / second).is_file()
        process.kill()
        process.wait()
        storage.write_bytes(tmp_path / "second", b"second")
    assert names_in(tmp_path) == ["second"]


# Locks


def test_lock_of_another_process_is_refused_with_its_number(tmp_path):
    with other_process("locked(target)", tmp_path / ".lock") as process:
        owner = f"process {process.pid} on {os.uname().nodename}"
        match = rf"One process at a time .+ Received: '.+\.lock', held by {owner}"
        for timeout in (0, 0.05):
            with pytest.raises(BlockingIOError, match=match):
                with storage.locked(tmp_path / ".lock", timeout=timeout):
                    pytest.fail("two processes have the lock")


def test_lock_of_a_killed_process_holds_nobody(tmp_path):
    with other_process("locked(target)", tmp_path / ".lock") as process:
        process.kill()
        process.wait()
        assert names_in(tmp_path) == [".lock"]
        with storage.locked(tmp_path / ".lock"):
            assert str(os.getpid()) in (tmp_path / ".lock").read_text()
        assert names_in(tmp_path) == []


def test_lock_is_waited_for(tmp_path):
    with other_process("locked(target)", tmp_path / ".lock") as process:
        threading.Timer(0.1, process.kill).start()
        with storage.locked(tmp_path / ".lock", timeout=60):
            process.wait()
    assert names_in(tmp_path) == []


def test_lock_holds_within_a_process_too(tmp_path):
    with storage.locked(tmp_path / ".lock"):
        with pytest.raises(BlockingIOError, match=f"held by process {os.getpid()}"), storage.locked(tmp_path / ".lock"):
            pass
        assert names_in(tmp_path) == [".lock"]


def test_file_system_without_locks_is_written_with_a_warning(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(storage.fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match="lock' cannot be locked: .+ No locks available. If two processes write there"):
        with storage.locked(tmp_path / ".lock"):
            storage.write_bytes(tmp_path / "file", b"new")
    assert names_in(tmp_path) == ["file"]


def test_check_writable_leaves_nothing(tmp_path):
    storage.check_writable(tmp_path / "report.json")
    assert names_in(tmp_path) == []


def test_check_writable_makes_the_folder(tmp_path):
    storage.check_writable(tmp_path / "new" / "report.json")
    assert names_in(tmp_path) == ["new"]


def test_check_writable_leaves_an_existing_target_as_it_is(tmp_path):
    (tmp_path / "file").write_text("old")
    storage.check_writable(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "old"


def test_check_writable_notices_a_full_disk(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage.tempfile, "TemporaryFile", full)
    with pytest.raises(OSError, match="No space left"):
        storage.check_writable(tmp_path / "file")
