"""Instructions that are counted on Arm: what is counted, that counts repeat, and what is said if a part is missing."""

import json
import shutil
from dataclasses import replace

import pytest

import se_keras_cli
from se_keras.export.benchmark import arm
from se_keras.export.benchmark.measuring import Pair
from se_keras.export.benchmark.overhead import pairs
from se_keras.export.benchmark.report import as_markdown, read
from se_keras.export.benchmark.sentences import added_by_kind
from se_keras.export.benchmark.targets import instructions
from se_keras.export.benchmark.targets.instructions import KINDS, Instructions, compiled_plugin, kind_of, read_counts

# As binutils 2.40 assembles them.
WORDS = {
    "smull v0.8h, v1.8b, v2.8b": (0x0E22C020, "smull"),
    "smull2 v0.8h, v1.16b, v2.16b": (0x4E22C020, "smull"),
    "smlal2 v0.8h, v1.16b, v2.16b": (0x4E228020, "smull"),
    "sdot v0.4s, v1.16b, v2.16b": (0x4E829420, "sdot"),
    "sdot v16.4s, v4.16b, v0.4b[3]": (0x4FA0E890, "sdot"),
    "smmla v0.4s, v1.16b, v2.16b": (0x4E82A420, "smmla"),
    "smopa za0.s, p0/m, p1/m, z0.b, z1.b": (0xA0812000, "smopa"),
    "fmla v0.4s, v1.4s, v2.4s": (0x4E22CC20, "fmla"),
    "fmla v16.4s, v4.4s, v0.s[3]": (0x4FA01890, "fmla"),
    "fmul v0.4s, v1.4s, v2.4s": (0x6E22DC20, "fmul"),
    "fmul v0.4s, v1.4s, v2.s[1]": (0x4FA29020, "fmul"),
    "fmopa za0.s, p0/m, p1/m, z0.s, z1.s": (0x80812000, "fmopa"),
    "smull v0.4s, v1.4h, v2.4h": (0x0E62C020, "vector"),  # of int16: not a matrix product
    "sqrdmulh v0.4s, v1.4s, v2.4s": (0x6EA2B420, "vector"),
    "sadalp v0.4s, v1.8h": (0x4E606820, "vector"),
    "fadd v0.4s, v1.4s, v2.4s": (0x4E22D420, "vector"),
    "ldr x0, [x1]": (0xF9400020, "load"),
    "ldr w0, [x1, x2]": (0xB8626820, "load"),
    "ldrsw x0, [x1, #4]": (0xB9800420, "load"),
    "ldr q0, [x1], #16": (0x3CC10420, "load"),
    "ldp q0, q1, [x0]": (0xAD400400, "load"),
    "ld1 {v0.16b-v3.16b}, [x1], #64": (0x4CDF2020, "load"),
    "ld1r {v0.4s}, [x1]": (0x4D40C820, "load"),
    "ldxr x0, [x1]": (0xC85F7C20, "load"),
    "ldr x0, .": (0x58000000, "load"),
    "str x0, [x1]": (0xF9000020, "store"),
    "strb w0, [x1, x2]": (0x38226820, "store"),
    "str q0, [x1], #16": (0x3C810420, "store"),
    "stp x0, x1, [sp, #-16]!": (0xA9BF07E0, "store"),
    "st1 {v0.16b}, [x1], #16": (0x4C9F7020, "store"),
    "stxr w2, x0, [x1]": (0xC8027C20, "store"),
    "prfm pldl1keep, [x1, #64]": (0xF9802020, "other"),
    "add x0, x1, #4": (0x91001020, "other"),
    "b.ne .": (0x54000001, "other"),
    "blr x1": (0xD63F0020, "other"),
}
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


@pytest.mark.parametrize("text", WORDS)
def test_instructions_are_of_their_kind(text):
    word, kind = WORDS[text]
    assert kind_of(word) == kind


def test_every_row_of_kinds_has_an_instruction_here():
    rows = {
        next(row for row, (_, mask, value) in enumerate(KINDS) if word & mask == value) for word, _ in WORDS.values()
    }
    assert rows == set(range(len(KINDS)))


def test_counts_are_those_between_two_marks():
    first, second = range(len(KINDS)), range(10, 10 + len(KINDS))
    found = read_counts("\n".join(" ".join(map(str, line)) for line in (first, second, [99] * len(KINDS))))
    assert found["total"] == sum(found.values()) - found["total"] == 10 * len(KINDS)
    assert found["smopa"] == 10 and found["sdot"] == 20  # of two rows


def test_interval_holds_the_ratios_to_both_counts_of_the_baseline():
    counts = instructions._counts({"total": 1000}, {"total": 1010}, {"total": 1111})
    assert (counts.ratio.low, counts.ratio.high) == (1.1, 1.111)
    assert counts.ratio.low < counts.ratio.median < counts.ratio.high
    assert counts.control.median == 1.01 and counts.is_significant
    same = instructions._counts({"total": 1000}, {"total": 1000}, {"total": 1111}).ratio
    assert same.low == same.median == same.high == 1.111


@needs_compiler
def test_plugin_is_compiled_once(tmp_path):
    plugin = compiled_plugin(tmp_path / "new")
    content = plugin.read_bytes()
    assert content.startswith(b"\x7fELF") and b"qemu_plugin_install\0" in content
    before = plugin.stat().st_mtime_ns
    assert compiled_plugin(tmp_path / "new") == plugin and plugin.stat().st_mtime_ns == before
    assert list(plugin.parent.iterdir()) == [plugin]


def test_missing_or_failing_compiler_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", "false")
    with pytest.raises(OSError, match=r"^false fails with status 1: it printed no message$"):
        compiled_plugin(tmp_path / "new")
    monkeypatch.setenv("CC", "no_compiler")
    with pytest.raises(FileNotFoundError, match=r"^Counting needs a C compiler.*Missing: no_compiler$"):
        Instructions(arm_folder=tmp_path / "new" / "arm").connect(print)
    assert not list(tmp_path.iterdir())


@needs_compiler
def test_missing_environment_is_named_with_how_to_get_it(tmp_path, monkeypatch):
    target = Instructions(arm_folder=tmp_path / "arm")
    rule = r"must have qemu and Python for Arm. Missing: qemu, Python for Arm, LiteRT for Arm. --fetch gets them"
    with pytest.raises(FileNotFoundError, match=rule):
        target.connect(print)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    with pytest.raises(FileNotFoundError, match=r"A folder that exists is not filled: remove it, or name another$"):
        Instructions(arm_folder=tmp_path / "other", fetch=True).connect(print)
    monkeypatch.setattr(arm, "_TOOLS", ("no-apt-get", "dpkg"))
    with pytest.raises(OSError, match=r"^Python for Arm needs Debian's apt-get and dpkg. Missing: no-apt-get"):
        Instructions(arm_folder=tmp_path / "arm", fetch=True).connect(print)
    assert not (tmp_path / "arm").exists()


def test_options_for_counting_are_refused_elsewhere(capsys):
    assert se_keras_cli.main(["benchmark", "--fetch"]) == 2
    assert "--fetch is for --arm-instructions. Received: this machine" in capsys.readouterr().err
    assert se_keras_cli.main(["benchmark", "--arm-instructions", "--blocks", "3"]) == 2
    assert "--blocks is for this machine" in capsys.readouterr().err


# With qemu and Debian's Python for Arm


@pytest.fixture(scope="module")
def machine():
    if missing := [tool for tool in ("cc", *arm._TOOLS) if shutil.which(tool) is None]:
        pytest.skip(f"counting on Arm needs {', '.join(missing)}")
    try:
        return arm.fetch()
    except OSError as error:
        pytest.skip(f"there is no Arm environment: {error}")


@pytest.fixture(scope="module")
def small_pair() -> Pair:
    """se_resnet11_digits and its baseline in int8."""
    (pair,) = pairs("se_resnet11_digits", precisions=["int8"], variants=["lowered"])
    return pair


@pytest.mark.slow
def test_counts_repeat(machine, small_pair):
    target = Instructions(arm_instructions=["cortex-a76"])
    found = [record for _ in range(2) for record in target.measure([small_pair], lambda message: None)]
    totals = [[x["total"] for x in (y.comparison.a_instructions, y.comparison.b_instructions)] for y in found]
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)
    assert found[0].comparison.control.median == pytest.approx(1, abs=1e-3)  # 170,000 instructions, of which Python's
    assert found[0].comparison.a_instructions["sdot"] > 1000


@pytest.mark.slow
def test_wrong_outputs_are_not_counted(machine, small_pair):
    """With SME, int8 files give other outputs under qemu 7.2: a real wrong kernel."""
    with pytest.raises(
        ValueError, match=r"resnet11_digits must have the same outputs on max and on this machine, with"
    ):
        list(Instructions(arm_instructions=["max"]).measure([small_pair], lambda message: None))


@pytest.mark.slow
def test_unknown_processors_are_refused(machine):
    with pytest.raises(
        ValueError, match=r"takes processors of qemu, such as cortex-a53.*Received: 'pentium'.*unable to"
    ):
        Instructions(arm_instructions=["pentium"]).connect(print)
    with pytest.raises(ValueError, match=r"takes processors of qemu.*Received: 'max,sme=maybe'"):
        Instructions(arm_instructions=["max,sme=maybe"]).connect(print)


@pytest.mark.slow
def test_one_thread_is_counted(machine, small_pair):
    pair = replace(small_pair, cell=replace(small_pair.cell, threads=2))
    with pytest.raises(ValueError, match=r"^Instructions are counted on one thread. Received: 2 threads$"):
        next(Instructions().measure([pair], print))


# SE-ResNet-50 over ResNet-50 in int8, lowered, at 96x96.
RATIOS = {"Cortex-A53": 1.0148, "Cortex-A76": 1.0394, "Arm with i8mm": 1.0545}


@pytest.mark.slow
def test_ratios_are_these(machine, tmp_path, capsys):
    """A change of the exporter, or of its runtime, shows here."""
    command = ["benchmark", "--arm-instructions", "--fetch", "--size", "96", "--precision", "int8", "--form", "lowered"]
    output = tmp_path / "results.json"
    assert se_keras_cli.main([*command, "-o", str(output)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "in million instructions" in printed and "vector" in printed and " ms" not in printed
    results = read(output)
    assert results["environment"]["target"] == "instructions"
    found = {x["environment"]["processor"].partition(" (counted under qemu")[0]: x for x in results["overhead"]}
    ratios = {name: record["comparison"]["ratio"]["median"] for name, record in found.items()}
    assert ratios == pytest.approx(RATIOS, abs=1e-3)
    for record in found.values():
        comparison = record["comparison"]
        assert comparison["null"]["median"] == pytest.approx(1, abs=1e-5) and record["is_real"]
        # What SE adds is mostly the multiplication by the gates.
        assert next(kind for kind in added_by_kind(record) if kind != "total") == "vector"
    text = as_markdown([results])
    assert text.count("million instructions") == 6 and text.count("not timed") == 3
    assert se_keras_cli.main([*command, "-o", str(output)]) == 0  # nothing is counted again
    assert "counting" not in capsys.readouterr().err
    assert json.loads(output.read_text()) == results
