"""The measurement on a phone with the real adb client, and a daemon that speaks its protocol on this machine."""

import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import keras
import pytest
from adb_daemon import Daemon
from keras import layers

from se_keras.export.benchmark import binaries
from se_keras.export.benchmark.devices import DeviceLost
from se_keras.export.benchmark.measuring import pair_of_files
from se_keras.export.benchmark.targets.adb import Adb, Phone
from se_keras.export.litert.conversion import to_litert

pytestmark = pytest.mark.skipif(shutil.which("adb") is None, reason="needs adb")
PROPERTIES = {"ro.product.model": "Test 1", "ro.soc.model": "T1", "ro.product.cpu.abi": "arm64-v8a"}


@pytest.fixture(scope="module")
def adb(tmp_path_factory):
    """The environment of an adb server of our own, with its keys in a folder of the test."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    home = {"HOME": str(tmp_path_factory.mktemp("adb")), "ANDROID_ADB_SERVER_PORT": str(port)}
    yield home
    subprocess.run(["adb", "kill-server"], env=os.environ | home, capture_output=True)


@pytest.fixture
def phone(adb, tmp_path, monkeypatch):
    """A phone that is connected: its daemon, whose `serial` is its name."""
    for name, value in adb.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "bin").mkdir()
    lines = "".join(f'  {name}) echo "{value}" ;;\n' for name, value in PROPERTIES.items())
    (tmp_path / "bin" / "getprop").write_text(f'#!/bin/sh\ncase "$1" in\n{lines}esac\n')
    (tmp_path / "bin" / "getprop").chmod(0o755)
    (tmp_path / "phone").mkdir()
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "HOME": str(tmp_path)}
    with Daemon(tmp_path / "phone", environment) as daemon:
        daemon.serial = f"127.0.0.1:{daemon.port}"
        subprocess.run(["adb", "connect", daemon.serial], check=True, capture_output=True)
        yield daemon
        subprocess.run(["adb", "disconnect", daemon.serial], capture_output=True)


@pytest.fixture
def binary(tmp_path):
    """A `benchmark_model` that really runs the file."""
    script = Path(__file__).with_name("benchmark_model.py")
    (tmp_path / "benchmark_model").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
    return tmp_path / "benchmark_model"


@pytest.fixture(scope="module")
def pair():
    """Two files with the same input: B computes 100 times as much as A."""
    images = keras.Input((64, 64, 4), name="images")
    return pair_of_files(
        *(to_litert(keras.Model(images, layers.Conv2D(n, 3)(images), name=f"small{n}")) for n in (4, 400))
    )


def test_files_commands_and_exit_statuses_go_through_the_real_client(phone, tmp_path):
    client, content = Phone(phone.serial), bytes(range(256)) * 1000
    client.push(content, "/data/local/tmp/file with a blank")
    assert (tmp_path / "phone" / "file with a blank").read_bytes() == content
    assert client.pull("/data/local/tmp/file with a blank") == content
    assert client.shell("cat /proc/self/cmdline; echo two") == "cat\0/proc/self/cmdline\0two\n"
    assert client.is_connected() and client.properties()["model"] == "Test 1"
    with pytest.raises(OSError, match="adb shell fails with status 3: why"):
        client.shell("echo why >&2; exit 3")
    with pytest.raises(OSError, match="adb pull fails with status 1: .+No such file"):
        client.pull("/data/local/tmp/missing")
    phone.disconnect()
    assert not client.is_connected()
    with pytest.raises(DeviceLost, match="The phone no longer answers: "):
        client.shell("true")


@pytest.mark.slow
def test_phone_runs_both_files_and_is_left_clean(phone, pair, binary, tmp_path):
    target = Adb(benchmark_model=binary, serial=phone.serial, blocks=3, runs=5, rest=0)
    where = target.connect(print)
    (found,) = target.measure([pair], print)
    assert (where["target"], where["processor"], where["abi"]) == ("adb", "Test 1 T1", "arm64-v8a")
    assert found.comparison.ratio.median > 2  # B computes 100 times as much
    assert (found.comparison.blocks, found.device.missing) == (3, None)
    assert found.footprints[1].init_ms > 0 and found.footprints[1].bytes == len(pair.network.content)
    assert not list((tmp_path / "phone").iterdir())
    assert sum("--graph" in command for command in phone.commands) == 9


@pytest.mark.slow
def test_cable_that_is_pulled_leaves_the_blocks_before(phone, pair, binary):
    def progress(step):
        if "block 4 of 50" in step:
            phone.disconnect()

    target = Adb(benchmark_model=binary, serial=phone.serial, blocks=50, runs=2, rest=0)
    (found,) = target.measure([pair], progress)
    assert found.comparison.blocks == 3
    assert found.device.missing.startswith("3 of 50 blocks: The phone no longer answers: ")


@pytest.mark.slow
def test_cable_that_is_pulled_in_a_run_leaves_the_blocks_before(phone, pair, binary):
    binary.write_text(binary.read_text().replace("exec", f"[ -f {binary}.pulled ] && sleep 5\nexec"))

    def progress(step):
        if "block 3 of 50" in step:
            binary.with_name("benchmark_model.pulled").touch()
            threading.Timer(1, phone.disconnect).start()

    target = Adb(benchmark_model=binary, serial=phone.serial, blocks=50, runs=2, rest=0)
    (found,) = target.measure([pair], progress)
    assert found.comparison.blocks == 2
    assert found.device.missing.startswith("2 of 50 blocks: The phone no longer answers: ")


@pytest.mark.slow
def test_binary_for_another_processor_is_told(phone, pair, binary):
    binary.write_bytes(b"\x7fELF\x01\x02\x01" + bytes(9) + b"\0\x02\0\x02" + bytes(32))  # the head of one for SPARC
    with pytest.raises(OSError, match="The phone cannot run this benchmark_model: take the one for its processor"):
        list(Adb(benchmark_model=binary, serial=phone.serial, rest=0).measure([pair], print))


@pytest.mark.slow
def test_fetched_binary_is_for_phones_of_its_processor(phone, monkeypatch, binary, pair):
    monkeypatch.setattr(binaries, "fetch", lambda progress: binary)
    target = Adb(benchmark_model="fetch", serial=phone.serial, blocks=2, runs=1, rest=0)
    assert target.connect(print)["abi"] == binaries.ABI
    (found,) = target.measure([pair], print)
    assert found.comparison.blocks == 2
    phone.environment["PATH"] = "/usr/bin:/bin"  # without getprop: an unknown processor
    with pytest.raises(ValueError, match="--benchmark-model fetch is for phones of arm64-v8a: .+ Received: None"):
        target.connect(print)
