"""Time per operator: each has its kernel, each block its squeeze-and-excitation, and the sum is the run's."""

import keras
import pytest

from se_keras.catalogue import create
from se_keras.export.benchmark import profiler
from se_keras.export.benchmark.profiler import profile
from se_keras.export.benchmark.programs import profiler_events as events
from se_keras.export.litert.conversion import to_litert
from se_keras.export.litert.file import LiteRTModel
from se_keras.recalibration import SEConfig


@pytest.fixture(scope="module")
def pair():
    """SE-ResNet-50 and ResNet-50 at 64x64, lowered."""
    keras.utils.set_random_seed(0)
    return {
        name: to_litert(create("se_resnet50", input_shape=(64, 64, 3), classifier_activation=None, **se))
        for name, se in (("se", {}), ("plain", {"se": None}))
    }


@pytest.fixture(scope="module")
def profiles(pair):
    return {name: profile(file, runs=20) for name, file in pair.items()}


@pytest.mark.slow
def test_every_operator_but_fused_padding_has_a_kernel(profiles):
    for found in profiles.values():
        assert {row.operator for row in found.rows if not row.kernel} <= {"PAD", "RESHAPE"}
        assert found.others == ()


@pytest.mark.slow
def test_sum_of_the_operators_is_the_time_of_the_run(profiles):
    for found in profiles.values():
        # What is left is the runtime's own work around XNNPACK, and what another program took meanwhile.
        assert 0.6 * found.profiled_us < found.total_us <= 1.02 * found.profiled_us
        assert found.unattributed < 0.1 * found.total_us


@pytest.mark.slow
def test_every_block_has_its_squeeze_excitation_and_scale(profiles):
    blocks = {
        f"stage{stage}_block{number + 1}"
        for stage, count in ((2, 3), (3, 4), (4, 6), (5, 3))
        for number in range(count)
    }
    for part, count in (("squeeze", 1), ("excitation", 3), ("scale", 1)):
        found = [row.block for row in profiles["se"].rows if row.part == part]
        assert sorted(found) == sorted(blocks) * 1 if count == 1 else len(found) == count * len(blocks)
        assert set(found) == blocks
    assert {"squeeze", "excitation", "scale"}.isdisjoint(row.part for row in profiles["plain"].rows)


@pytest.mark.slow
def test_squeeze_by_the_maximum_has_its_kernel():
    model = create("se_resnet11_digits", se=SEConfig(squeeze="max"))
    rows = [row for row in profile(to_litert(model, lowering=False), runs=2).rows if row.part == "squeeze"]
    assert [row.operator for row in rows] == ["REDUCE_MAX"] * 3
    assert all(row.kernel for row in rows)


@pytest.mark.slow
def test_squeeze_and_excitation_is_what_differs(profiles):
    def others(found):
        return [(row.operator, row.layer) for row in found.rows if row.part not in ("squeeze", "excitation", "scale")]

    assert others(profiles["se"]) == others(profiles["plain"])


@pytest.mark.slow
def test_sums_by_stage_are_those_of_the_rows(profiles):
    found = profiles["se"]
    assert sum(found.by("stage").values()) + found.unattributed == pytest.approx(found.total_us)
    assert [stage for (stage,) in found.by("stage")] == ["", "stage2", "stage3", "stage4", "stage5"]


def test_operators_and_kernels_are_matched_as_one_sequence():
    operators = [("PAD", "a"), ("CONV_2D", "b"), ("PAD", "c"), ("MAX_POOL_2D", "d"), ("RESHAPE", "e"), ("ADD", "f")]
    times = [
        ("Convolution (NHWC, F32)", 9.0),
        ("Constant Pad (ND, X32)", 2.0),
        ("Max Pooling (NHWC, F32)", 3.0),
        ("Copy of its own", 0.5),
        ("Transpose (ND, X32)", 4.0),
        ("Add (ND)", 1.0),
    ]
    rows, unattributed = profiler._attributed(operators, times)
    assert [row.microseconds for row in rows] == [0, 9, 2, 3, 0.5, 1]
    assert unattributed == 4


@pytest.mark.parametrize(
    "tensor, layer",
    [
        ("se_resnet50_1/stage2_block1_conv1_1/convolution;se_resnet50_1/x", "stage2_block1_conv1"),
        ("StatefulPartitionedCall:0", ""),
    ],
)
def test_layer_is_read_from_the_name_of_a_tensor(tensor, layer):
    assert profiler._layer(tensor) == layer


# What cannot be profiled


@pytest.mark.parametrize("content", [b"", b"no file", b"\x00" * 1000])
def test_file_that_is_none_is_refused_in_one_line(content):
    file = LiteRTModel(content=content, manifest={"network": "x", "precision": "float32"})
    with pytest.raises(ValueError, match=r"cannot report the time of each operator \(exit status -?\d+\): .+") as error:
        profile(file)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_file_that_was_cut_off_is_refused(pair):
    file = pair["se"]
    cut = LiteRTModel(content=file.content[: len(file.content) // 2], manifest=file.manifest)
    with pytest.raises(ValueError, match="cannot report the time of each operator"):
        profile(cut)


@pytest.mark.slow
def test_runtime_without_the_functions_is_told(pair, monkeypatch, tmp_path):
    other = tmp_path / "events.py"
    with open(events.__file__) as file:
        other.write_text(file.read().replace('"LiteRtStartProfiler"', '"LiteRtBeginProfiler"'))
    monkeypatch.setattr(events, "__file__", str(other))
    with pytest.raises(
        ValueError, match=r"each operator \(exit status 1\): libLiteRt.so of this version has no LiteRtBeginProfiler"
    ):
        profile(pair["se"], runs=1)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [{"runs": 0}, {"runs": 1.5}, {"threads": 0}])
def test_plan_that_cannot_be_done_is_refused(pair, wrong):
    ((name, value),) = wrong.items()
    rule = "1 to 1024" if name == "threads" else "at least 1"
    with pytest.raises(ValueError, match=rf"{name} must be an int of {rule}. Received: {name}={value}"):
        profile(pair["se"], **wrong)
