"""The measurement on a phone, with a stand-in for adb and for four generations of benchmark_model."""

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import keras
import pytest
from keras import layers

import se_keras_cli
from se_keras.catalogue import create
from se_keras.export.benchmark.devices import DeviceLost
from se_keras.export.benchmark.measuring import pair_of_files
from se_keras.export.benchmark.targets.adb import Adb, Phone, parse
from se_keras.export.litert.conversion import to_litert


@pytest.fixture(scope="module")
def pair():
    """Two LiteRT files of 10,000 and 11,000 bytes: the stand-in takes 10 us a byte."""
    images = keras.Input((2, 2, 1), name="images")
    file = to_litert(keras.Model(images, layers.Conv2D(1, 1)(images), name="small"))
    return [replace(file, content=file.content.ljust(size, b"\0")) for size in (10_000, 11_000)]


@pytest.fixture
def phone(tmp_path, monkeypatch):
    """`phone(**properties)`: puts the stand-in on the PATH, and returns its folder."""
    (tmp_path / "bin").mkdir()
    script = Path(__file__).with_name("adb_stand_in.py")
    (tmp_path / "bin" / "adb").write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{script}" "$@"\n')
    (tmp_path / "bin" / "adb").chmod(0o755)
    (tmp_path / "benchmark_model").write_bytes(b"\x7fELF")
    (tmp_path / "log").touch()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("STAND_IN", str(tmp_path))

    def like(**what):
        (tmp_path / "phone.json").write_text(json.dumps({"serials": ["PIXEL"]} | what))
        return tmp_path

    return like


@pytest.fixture
def measured(pair):
    """`measured(home, **options)`: measures the two files on the phone."""

    def run(home, **options):
        defaults = {"benchmark_model": home / "benchmark_model", "blocks": 3, "runs": 5, "rest": 0}
        threads = options.pop("threads", 1)
        (found,) = Adb(**defaults | options).measure([pair_of_files(*pair, threads=threads)], print)
        return found

    return run


def left_on(home):
    return [path for path in (home / "phone").rglob("*") if path.is_file()]


@pytest.mark.slow
@pytest.mark.parametrize("version", ["newest", "new", "old", "oldest"])
def test_every_generation_of_benchmark_model_is_read(phone, measured, version):
    home = phone(version=version)
    found = measured(home)
    assert found.comparison.ratio.median == pytest.approx(1.1, rel=1e-3)
    assert found.comparison.control.median == pytest.approx(1, rel=1e-3)
    assert (found.comparison.a_ms, found.comparison.blocks) == (pytest.approx(100, rel=1e-3), 3)
    footprint = found.footprints[1]
    assert (footprint.bytes, footprint.init_ms, footprint.first_ms) == pytest.approx((11_000, 12.75, 14.744))
    assert footprint.peak_mb == (None if version == "oldest" else pytest.approx(19.65, abs=0.05))
    assert ((home / "log").read_text().count("pull") > 0) is (version == "newest")
    assert (found.device.missing, found.undelegated) == (None, ())


def test_phone_says_what_it_is_and_is_left_clean(phone, measured):
    home = phone()
    found, where = measured(home), Adb(benchmark_model=home / "benchmark_model").connect(print)
    assert where["model"] == "Pixel 9" and where["processor"] == "Pixel 9 Tensor G4" and where["system"] == "Android 16"
    assert where["governor"] is None
    assert found.device.celsius == (33.5,) * 3
    assert left_on(home) == []


def test_blocks_run_a_b_and_a_again_in_changing_order(phone, measured):
    home = phone()
    measured(home, blocks=6, threads=4)
    lines = [line for line in (home / "log").read_text().splitlines() if "--graph" in line]
    files = ["".join(line.split("--graph=")[1].split()[0][-8] for line in lines[i : i + 3]) for i in range(0, 18, 3)]
    assert {"".join(sorted(three)) for three in files} == {"aab"}
    assert len(set(files)) > 1
    assert all("--num_threads=4 --use_xnnpack=true --num_runs=5" in line for line in lines)


def test_binary_on_the_phone_is_used_as_it_is(phone, measured):
    home = phone()
    measured(home, benchmark_model="device:/data/local/tmp/bm", blocks=2, runs=1)
    log = (home / "log").read_text()
    assert log.count("push") == 2 and "/data/local/tmp/bm --graph=" in log


def test_phone_that_is_lost_leaves_what_it_has(phone, measured):
    found = measured(phone(lost_after=8), blocks=5)
    assert found.comparison.blocks == 2
    assert found.device.missing.startswith(
        "2 of 5 blocks: The phone no longer answers: error: device 'PIXEL' not found"
    )


@pytest.mark.parametrize("status", [255, 0], ids=["torn stream", "adb without statuses"])
def test_cable_that_is_pulled_in_a_run_leaves_the_blocks_before(phone, measured, status):
    found = measured(phone(torn_after=8, torn_status=status), blocks=5)
    assert found.comparison.blocks == 2
    assert found.device.missing.startswith("2 of 5 blocks: The phone no longer answers: ")


def test_what_a_lost_phone_kept_is_removed_by_the_next_run(phone, measured):
    home = phone()
    (home / "phone/data/local/tmp/se_keras_old").mkdir(parents=True)
    (home / "phone/data/local/tmp/se_keras_old/a.tflite").write_bytes(b"old")
    measured(home)
    assert left_on(home) == []


def test_phone_that_is_lost_at_once_is_told(phone, measured):
    with pytest.raises(DeviceLost, match="The phone no longer answers: error: device 'PIXEL' not found"):
        measured(phone(lost_after=3))


@pytest.mark.parametrize(
    "what, error, message",
    [
        ({"serials": []}, OSError, "No phone answers adb: unlock it, .+ Received: none"),
        ({"state": "unauthorized"}, OSError, "allow USB debugging, .+ Received: PIXEL unauthorized"),
        ({"serials": ["A", "B"]}, ValueError, "There are several phones: say which with --serial. Received: A, B"),
        ({"full": True}, OSError, "The phone has no space left in /data/local/tmp"),
        ({"abi": "wrong"}, OSError, "The phone cannot run this benchmark_model: take the one for its processor"),
        ({"partial": True}, ValueError, "Operators of file [AB] are not delegated to XNNPACK on the phone"),
        ({"partial": "nothing"}, ValueError, "Operators of file [AB] are not delegated to XNNPACK on the phone"),
    ],
)
def test_what_stands_in_the_way_is_told_in_a_line_and_the_phone_left_clean(phone, measured, what, error, message):
    home = phone(**what)
    with pytest.raises(error, match=message) as raised:
        measured(home)
    assert "\n" not in str(raised.value)
    assert left_on(home) == []


def test_one_of_several_phones_is_named(phone, measured):
    home = phone(serials=["A", "B"])
    measured(home, serial="B")
    assert "-s B shell" in (home / "log").read_text() and "-s A" not in (home / "log").read_text()
    with pytest.raises(OSError, match="No phone answers adb as 'C'"):
        measured(home, serial="C")


def test_partial_delegation_is_measured_where_it_is_asked_for(phone, measured):
    assert measured(phone(partial=True), allow_undelegated=True).undelegated == ("a part",)


def test_missing_adb_is_told(tmp_path, measured, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "bm").touch()
    with pytest.raises(FileNotFoundError, match="adb is not on the PATH: it comes with Android's platform tools"):
        measured(tmp_path, benchmark_model=tmp_path / "bm")


def test_missing_binary_is_told(tmp_path, measured):
    with pytest.raises(FileNotFoundError, match="There is no benchmark_model '.+/bm': --benchmark-model fetch gets it"):
        measured(tmp_path, benchmark_model=tmp_path / "bm")


DAEMON = "* daemon not running; starting now at tcp:5037\n* daemon started successfully\n"
NO_PERMISSIONS = "no permissions (user in plugdev group; are your udev rules wrong?); see [http://x/device.html]"


@pytest.mark.parametrize(
    "lines, serial",
    {
        "ABC\tdevice\n": "ABC",
        "adb-ABC (2)._adb-tls-connect._tcp\tdevice\n": "adb-ABC (2)._adb-tls-connect._tcp",
        "emulator-5554\toffline\n192.168.1.5:5555\tdevice\n": "192.168.1.5:5555",
        f"009d\t{NO_PERMISSIONS}\nABC\tdevice\n\n": "ABC",
    }.items(),
)
@pytest.mark.parametrize("before", ["", DAEMON, "adb server version (40) doesn't match this client (41); killing...\n"])
def test_phone_is_found_in_what_adb_lists(phone, monkeypatch, lines, serial, before):
    phone()
    monkeypatch.setattr(Phone, "_call", lambda *_: f"{before}List of devices attached\n{lines}")
    assert Phone().serial == Phone(serial).serial == serial


@pytest.mark.parametrize(
    "lines, received", [("", "none"), (f"009d\t{NO_PERMISSIONS}\n", rf"009d {re.escape(NO_PERMISSIONS)}")]
)
def test_phone_that_adb_may_not_use_is_refused_with_its_state(phone, monkeypatch, lines, received):
    phone()
    monkeypatch.setattr(Phone, "_call", lambda *_: f"{DAEMON}List of devices attached\n{lines}")
    with pytest.raises(OSError, match=f"No phone answers adb: .+ Received: {received}$"):
        Phone()


@pytest.mark.parametrize("rest", [-1, float("nan"), float("inf")])
def test_pause_that_no_clock_waits_is_refused(phone, measured, rest):
    with pytest.raises(ValueError, match="rest must be 0 seconds or more, and finite. Received: rest="):
        measured(phone(), rest=rest)


@pytest.mark.parametrize("text", ["", "Segmentation fault", "INFO: STARTING!\nERROR: Failed to load model"])
def test_output_without_timings_is_refused(text):
    with pytest.raises(ValueError, match="benchmark_model prints its timings at the end. Received: "):
        parse(text)


def test_time_ends_a_comparison_on_a_phone(phone, measured):
    assert measured(phone(), blocks=1000, seconds=0.5).comparison.blocks < 100


def command_on(home, *more, network="se_resnet11_digits"):
    command = ["benchmark", "--adb", "--benchmark-model", str(home / "benchmark_model"), "--blocks", "2", "--rest", "0"]
    command += ["--network", network, "--precision", "float32", "--form", "lowered", "-o", str(home / "r.json")]
    return se_keras_cli.main([*command, *more])


@pytest.mark.slow
def test_command_measures_on_a_phone_and_report_shows_it(phone, capsys):
    home = phone()
    assert command_on(home, "--site", "3x3") == 0
    assert "Pixel 9 Tensor G4" in capsys.readouterr().out
    (record,) = json.loads((home / "r.json").read_text())["overhead"]
    assert record["se"]["site"] == "3x3" and record["celsius"] == [33.5, 33.5] and "--num_threads=1" in record["flags"]
    assert record["footprints"][0]["init_ms"] == pytest.approx(12.75)
    assert se_keras_cli.main(["report", str(home / "r.json"), "-o", str(home / "r.html")]) == 0
    page = (home / "r.html").read_text()
    assert "On Pixel 9 Tensor G4 with 1 thread" in page and "Android 16" in page


def test_single_run_has_no_fastest():
    counts = "count=3 first=9 curr=7 min=7 max=9\ncount=1 curr=8\n"
    timings = "Inference timings in us: Init: 1, First inference: 9, Warmup (avg): 8, Inference (avg): 8"
    assert parse(counts + timings).fastest_us is None


@pytest.mark.slow
def test_command_measures_on_a_phone_what_is_missing(phone, capfd):
    home = phone(lost_after=6 + 2)
    assert command_on(home, "--blocks", "5") == 0
    assert "warning: measured 2 of 5 blocks" in capfd.readouterr().err
    phone()  # it is back
    assert command_on(home, "--site", "3x3") == 0  # and what was cut short stays while another cell is measured
    first, other = json.loads((home / "r.json").read_text())["overhead"]
    for _ in range(2):  # until it is measured again, once
        calls = (home / "log").read_text().count("--graph")
        assert command_on(home, "--blocks", "5") == 0
    assert (home / "log").read_text().count("--graph") == calls
    kept, second = json.loads((home / "r.json").read_text())["overhead"]
    assert (first["comparison"]["blocks"], second["comparison"]["blocks"], kept) == (2, 5, other)
    assert second["missing"] is None


@pytest.mark.slow
def test_files_with_different_inputs_are_no_pair_on_a_phone_either(phone, capsys, tmp_path):
    home = phone()
    for size in (32, 16):
        model = create("resnet11_digits", input_shape=(size, size, 1))
        to_litert(model).save(tmp_path / f"{size}.tflite")
    command = ["benchmark", "--adb", "--benchmark-model", str(home / "benchmark_model")]
    command += ["--files", str(tmp_path / "32.tflite"), str(tmp_path / "16.tflite")]
    assert se_keras_cli.main(command) == 2
    assert "A pair needs the same input. Received: (1, 16, 16, 1) and (1, 32, 32, 1)" in capsys.readouterr().err
    assert "push" not in (home / "log").read_text()
