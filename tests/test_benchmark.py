"""Comparisons with a clock that the test controls, and the record of what squeeze-and-excitation costs."""

import io
import json
import math
import os
import platform
import random
import re
import time
import types
from dataclasses import FrozenInstanceError, replace
from functools import partial

import keras
import pytest
from keras import layers

import se_keras.environment
from se_keras.catalogue import baseline_name
from se_keras.environment import environment
from se_keras.export.benchmark import overhead, profiler, programs
from se_keras.export.benchmark.energy import find_meter
from se_keras.export.benchmark.measuring import pair_of_files
from se_keras.export.benchmark.overhead import export_pairs, pairs
from se_keras.export.benchmark.results import PAPER, Overhead
from se_keras.export.benchmark.targets import host
from se_keras.export.benchmark.targets.host import Host
from se_keras.export.litert.conversion import to_litert
from se_keras.layers import SqueezeExcite
from se_keras.recalibration import SEConfig
from se_keras.storage import sha256
from se_keras.timing import FEWEST_BLOCKS, Comparison, Ratio, compare

QUICK = Host(blocks=2, runs=1)


def measure(baseline, network, *, variant, threads=1, **options):
    """The `Overhead` of two files on this machine."""
    (found,) = Host(**options).measure([pair_of_files(baseline, network, variant=variant, threads=threads)], print)
    return found


def overheads(network, target=QUICK, progress=print, input_shape=(4, 4, 2), **wanted):
    """Records of a network, whose files are those of the fixture `exported`."""
    return target.measure(pairs(network, progress=progress, input_shape=input_shape, **wanted), progress)


class Clock:
    """A clock that only its own callables advance; `pace` is the nanoseconds that a unit of work takes."""

    def __init__(self):
        self.now, self.pace, self.calls = 1_000, 1_000, []

    def work(self, name, units):
        """A callable of `units` of work, or of `units()`."""

        def run():
            self.calls.append(name)
            self.now += (units() if callable(units) else units) * self.pace

        return run


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter_ns", lambda: clock.now)
    return clock


def exact(value):
    """A ratio is the exponential of a difference of logarithms of integers: a few roundings of 2e-16."""
    return pytest.approx(value, rel=1e-12)


def three(clock, a, b):
    return {"a": clock.work("a", a), "b": clock.work("b", b), "control": clock.work("control", a)}


# Pairs.


@pytest.mark.parametrize(("a", "b"), [(100, 200), (200, 100), (1000, 1018), (7, 7)])
def test_ratio_is_that_of_the_times(clock, a, b):
    result = compare(**three(clock, a, b))
    assert result.ratio.median == exact(b / a)
    assert (result.ratio.low, result.ratio.high) == (exact(b / a), exact(b / a))


def test_null_is_one(clock):
    control = compare(**three(clock, 100, 200)).control
    assert (control.low, control.median, control.high) == (1, 1, 1)


def test_times_are_in_milliseconds(clock):
    clock.pace = 1_000_000
    result = compare(**three(clock, 3, 5))
    assert (result.a_ms, result.b_ms) == (3, 5)


def test_clock_that_drifts_between_blocks_does_not_move_the_ratio(clock):
    # 1.8 times slower, the drift seen between runs, and back: unpaired means would be anywhere.
    paces = random.Random(0)

    def drift(done):
        clock.pace = paces.choice([1_000, 1_100, 1_500, 1_800])

    result = compare(**three(clock, 100, 102), progress=drift)
    assert (result.ratio.low, result.ratio.median, result.ratio.high) == (exact(1.02),) * 3
    assert (result.control.low, result.control.high) == (1, 1)
    assert result.is_significant


def test_drift_is_that_of_thirds_of_the_blocks(clock):
    # Three blocks at each pace, one of them disturbed, which the median of a third does not see.
    paces = iter([1_100, 9_000, 1_100, 1_000, 1_000, 1_000, 1_300, 1_300, 1_300])

    def drift(done):
        clock.pace = next(paces, 1_000)

    drift(0)
    assert compare(**three(clock, 100, 102), warmup=0, blocks=9, progress=drift).drift == exact(1.3)


@pytest.mark.parametrize("blocks", [2, 3, 4])
def test_steady_clock_does_not_drift(clock, blocks):
    assert compare(**three(clock, 100, 102), blocks=blocks).drift == 1


def test_disturbance_of_one_run_does_not_count(clock):
    # Of the three runs of a side in a block, the fastest counts.
    runs = {"b": 0}

    def disturbed():
        runs["b"] += 1
        return 2_000 if runs["b"] % 3 == 0 else 200

    result = compare(**three(clock, 100, disturbed), warmup=0, runs=3)
    assert (result.ratio.low, result.ratio.high) == (exact(2), exact(2))


def test_median_is_of_the_blocks_and_does_not_see_a_few_disturbed_ones(clock):
    blocks = {"done": 0}

    def disturbed():
        return 900 if blocks["done"] in (2, 5) else 200

    result = compare(**three(clock, 100, disturbed), blocks=11, progress=lambda done: blocks.update(done=done))
    assert result.ratio.median == exact(2)


def test_interval_holds_the_median_and_lies_within_the_blocks_ratios(clock):
    noise = random.Random(1)
    result = compare(**three(clock, 1_000, lambda: noise.randint(1_900, 2_100)), runs=1)
    assert 1.9 <= result.ratio.low <= result.ratio.median <= result.ratio.high <= 2.1
    assert result.ratio.low < result.ratio.high


def test_interval_of_more_blocks_is_narrower(clock):
    def width(blocks):
        noise = random.Random(1)
        result = compare(**three(clock, 1_000, lambda: noise.randint(1_500, 2_500)), runs=1, blocks=blocks)
        return result.ratio.high - result.ratio.low

    # 16 times as many blocks: a quarter as wide, give or take.
    assert width(320) < width(20) / 2


def test_interval_holds_the_true_ratio_nineteen_times_in_twenty(clock):
    def holds(seed):
        noise = random.Random(seed)
        ratio = compare(**three(clock, 1_000, lambda: noise.randint(1_500, 2_500)), runs=1, seed=seed).ratio
        return ratio.low <= 2 <= ratio.high

    # Three standard deviations of a hundred draws about 95 are 88 and, at most, 99: an interval that always holds it
    # is too wide.
    assert 88 <= sum(map(holds, range(100))) <= 99


def test_interval_is_repeatable(clock):
    def measured():
        noise = random.Random(1)
        return compare(**three(clock, 1_000, lambda: noise.randint(1_900, 2_100)), runs=1)

    assert measured() == measured()


# The order.


def order_of(clock, **options):
    clock.calls.clear()
    compare(**three(clock, 100, 200), **options)
    return list(clock.calls)


def test_every_side_runs_as_often(clock):
    calls = order_of(clock, blocks=5, runs=4, warmup=3)
    assert {name: calls.count(name) for name in ("a", "b", "control")} == dict.fromkeys(
        ("a", "b", "control"), 3 + 5 * 4
    )


def test_every_side_runs_as_often_in_every_block(clock):
    calls = order_of(clock, blocks=5, runs=2, warmup=0)
    blocks = [calls[start : start + 6] for start in range(0, len(calls), 6)]
    assert all(sorted(block) == ["a", "a", "b", "b", "control", "control"] for block in blocks)


def test_warm_up_comes_first_and_is_not_timed(clock):
    warm = {"calls": 0}

    def cold():
        warm["calls"] += 1
        return 5_000 if warm["calls"] <= 2 else 200

    result = compare(**three(clock, 100, cold), warmup=2, runs=1, blocks=2)
    assert clock.calls[:6] == ["a", "b", "control"] * 2
    assert result.ratio.high == exact(2)


def test_order_is_shuffled(clock):
    calls = order_of(clock, blocks=20, runs=1, warmup=0)
    blocks = {tuple(calls[start : start + 3]) for start in range(0, 60, 3)}
    assert len(blocks) == 6  # every order of three sides comes within twenty blocks of this seed


def test_order_is_that_of_the_seed(clock):
    assert order_of(clock, seed=1) == order_of(clock, seed=1) != order_of(clock, seed=2)


def test_progress_counts_the_blocks(clock):
    blocks = []
    compare(**three(clock, 100, 200), blocks=4, progress=blocks.append)
    assert blocks == [1, 2, 3, 4]


def test_comparison_says_how_it_was_made(clock):
    result = compare(**three(clock, 100, 200), blocks=4, runs=2)
    assert (result.blocks, result.runs) == (4, 2)


@pytest.mark.parametrize("bad", [{"blocks": 1}, {"blocks": 0}, {"runs": 0}, {"runs": -1}, {"warmup": -1}], ids=repr)
def test_too_few_blocks_or_runs_are_an_error(clock, bad):
    with pytest.raises(ValueError, match="At least 2 blocks of 1 run. Received: blocks="):
        compare(**three(clock, 100, 200), **bad)
    assert clock.calls == []


def test_error_of_a_side_comes_through(clock):
    def broken():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        compare(clock.work("a", 1), broken, clock.work("control", 1))


# What counts as a difference.


def comparison(ratio, control):
    low, median, high = ratio
    return Comparison(
        ratio=Ratio(low=low, median=median, high=high),
        control=Ratio(low=control[0], median=control[1], high=control[2]),
        a_ms=1.0,
        b_ms=1.0,
        blocks=2,
        runs=1,
    )


@pytest.mark.parametrize(
    ("ratio", "null", "is_real"),
    [
        ((1.01, 1.02, 1.03), (0.999, 1.0, 1.001), True),
        ((0.97, 0.98, 0.99), (0.999, 1.0, 1.001), True),
        ((0.99, 1.02, 1.05), (0.999, 1.0, 1.001), False),  # the interval holds 1
        ((1.01, 1.02, 1.03), (0.999, 1.01, 1.021), False),  # the control is as slow
        ((1.01, 1.02, 1.03), (0.97, 1.0, 1.001), False),  # the control is as fast
        ((0.97, 0.98, 0.99), (0.999, 1.01, 1.03), False),
        ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), False),
    ],
)
def test_difference_is_real_outside_one_and_beyond_the_null(ratio, null, is_real):
    assert comparison(ratio, null).is_significant is is_real


def test_equal_sides_make_no_real_difference(clock):
    assert not compare(**three(clock, 100, 100)).is_significant


def test_double_that_differs_from_a_makes_differences_as_small_unreal(clock):
    result = compare(clock.work("a", 100), clock.work("b", 105), clock.work("control", 106))
    assert not result.is_significant


def test_ratio_reads_with_its_interval():
    assert str(Ratio(low=1.01, median=1.01829, high=1.0277)) == "1.0183 [1.0100, 1.0277]"


def test_comparison_is_frozen(clock):
    with pytest.raises(FrozenInstanceError):
        compare(**three(clock, 100, 200)).a_ms = 1.0


# Pairs of files.


def tiny(channels=4, size=4, function=lambda x: x, name="tiny"):
    images = keras.Input((size, size, 2), name="images")
    x = layers.Conv2D(3, 1)(function(layers.Conv2D(channels, 1)(images)))
    return to_litert(keras.Model(images, x, name=name))


@pytest.fixture(scope="module")
def narrow():
    return tiny(name="narrow")


@pytest.fixture(scope="module")
def wide():
    return tiny(channels=8, name="wide")


@pytest.fixture(scope="module")
def slow():
    """A file with an operator that XNNPACK does not take."""
    return tiny(function=lambda x: keras.ops.cumsum(x, axis=1), name="slow")


@pytest.fixture(scope="module")
def measured(narrow, wide):
    return measure(narrow, wide, variant="lowered", blocks=3, runs=2)


def test_record_names_what_was_measured(measured, narrow, wide):
    assert (measured.baseline, measured.network) == ("narrow", "wide")
    assert (measured.precision, measured.variant, measured.threads) == ("float32", "lowered", 1)
    assert measured.input_shape == (1, 4, 4, 2)
    assert measured.undelegated == ()


def test_record_has_the_checksums_of_both_files(measured, narrow, wide):
    assert measured.sha256 == (sha256(narrow.content), sha256(wide.content))


def test_record_has_the_comparison(measured):
    assert (measured.comparison.blocks, measured.comparison.runs) == (3, 2)
    assert measured.comparison.ratio.low <= measured.comparison.ratio.median <= measured.comparison.ratio.high


# The file format: programs and old results.json files have these names.
KEYS = (
    "baseline network precision form threads input_shape comparison undelegated sha256 se footprints profiles "
    "environment flags celsius missing is_real"
)
COMPARISON_KEYS = "ratio null a_ms b_ms blocks runs drift a b a_mj b_mj"


def test_keys_of_a_record_are_those_of_the_file_format(measured):
    record = measured.to_json()
    assert list(record) == KEYS.split()
    assert list(record["comparison"]) == list(measured.comparison.to_json()) == COMPARISON_KEYS.split()
    assert set(record["comparison"]["null"]) == {"median", "low", "high"}
    assert [list(x) for x in record["footprints"]] == [["bytes", "init_ms", "first_ms", "peak_mb"]] * 2


def test_record_goes_through_json(measured):
    record = measured.to_json()
    assert json.loads(json.dumps(record))["sha256"] == list(measured.sha256)
    assert record["is_real"] is measured.comparison.is_significant
    assert set(record["comparison"]["ratio"]) == {"median", "low", "high"}


def test_baseline_is_a_and_its_double_and_the_network_is_b(narrow, wide, monkeypatch):
    prepared = {}

    def record(**sides):
        options = {key: sides.pop(key) for key in ("blocks", "runs", "within", "seconds", "meter")}
        prepared.update(options)
        # A bound method knows its interpreter, whose convolution knows its number of channels.
        for side, call in sides.items():
            call()
            prepared[side] = max(detail["shape"][-1] for detail in call.__self__.get_tensor_details())
        return comparison((1.0, 1.0, 1.0), (1.0, 1.0, 1.0))

    monkeypatch.setattr(host, "compare", record)
    measure(narrow, wide, variant="lowered", blocks=7, runs=5, within=0.1, seconds=9)
    options = {"blocks": 7, "runs": 5, "within": 0.1, "seconds": 9, "meter": find_meter()}
    assert prepared == {"a": 4, "b": 8, "control": 4, **options}


def test_operator_off_xnnpack_is_refused_by_name(narrow, slow):
    for pair in ((narrow, slow), (slow, narrow)):
        with pytest.raises(
            ValueError, match=r"^Not delegated to XNNPACK: CUMSUM\. These operators run on slow kernels"
        ):
            measure(*pair, variant="lowered")


def test_operator_off_xnnpack_is_in_the_record_where_it_is_allowed(narrow, slow):
    record = measure(narrow, slow, variant="lowered", blocks=2, runs=1, allow_undelegated=True)
    assert record.undelegated == ("CUMSUM",)


def test_files_with_different_inputs_are_no_pair(narrow):
    with pytest.raises(ValueError, match=r"same input. Received: \(1, 4, 4, 2\) and \(1, 5, 5, 2\)"):
        measure(narrow, tiny(size=5), variant="lowered")


@pytest.mark.parametrize(
    "limit, message",
    [
        ({"within": math.nan}, "within must be a finite number above 0. Received: within=nan"),
        ({"within": -0.01}, "within must be a finite number above 0. Received: within=-0.01"),
        ({"seconds": math.inf}, "seconds must be a finite number of at least 0. Received: seconds=inf"),
        ({"seconds": -1}, "seconds must be a finite number of at least 0. Received: seconds=-1"),
    ],
)
def test_limits_that_end_nothing_are_refused_before_anything_runs(limit, message):
    with pytest.raises(ValueError, match=message):
        compare(pytest.fail, pytest.fail, pytest.fail, **limit)


def test_number_of_threads_goes_to_every_file(narrow, wide):
    assert measure(narrow, wide, variant="lowered", threads=2, blocks=2, runs=1).threads == 2
    with pytest.raises(ValueError, match="threads must be an int of 1 to 1024"):
        measure(narrow, wide, variant="lowered", threads=0)


@pytest.mark.parametrize("network", ["resnet50", "resnet11_digits"])
def test_baseline_is_no_network_to_measure(network):
    with pytest.raises(ValueError, match=f"^{network} is a baseline: name a network with squeeze-and-excitation"):
        export_pairs(network, variant="lowered", precisions=("float32",))
    with pytest.raises(ValueError, match="is a baseline"):
        next(overheads(network, precisions=("float32",)))


@pytest.mark.parametrize(("network", "baseline"), [("se_resnet50", "resnet50"), ("senet154", "senet154_without_se")])
def test_baseline_is_called_after_the_network(network, baseline):
    assert baseline_name(network) == baseline


@pytest.fixture(scope="module")
def exported_digits():
    messages, precisions = [], ("float32", "int8")
    files = export_pairs("se_resnet11_digits", variant="lowered", precisions=precisions, progress=messages.append)
    return files, messages


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_pair_is_the_network_and_its_baseline_alike(exported_digits, precision):
    pair = exported_digits[0][precision]
    assert [model.manifest["network"] for model in pair] == ["resnet11_digits", "se_resnet11_digits"]
    assert {model.manifest["precision"] for model in pair} == {precision}
    assert [model.manifest["lowering"]["hoisted"] for model in pair] == [0, 3]


@pytest.mark.slow
def test_pair_is_measured_in_int8(exported_digits):
    record = measure(*exported_digits[0]["int8"], variant="lowered", blocks=2, runs=1)
    assert (record.baseline, record.network, record.precision) == ("resnet11_digits", "se_resnet11_digits", "int8")


@pytest.mark.slow
def test_progress_names_what_is_exported(exported_digits):
    assert exported_digits[1] == ["exporting resnet11_digits lowered", "exporting se_resnet11_digits lowered"]


def test_published_pair_is_not_lowered(monkeypatch):
    lowerings = []
    monkeypatch.setattr(overhead, "to_litert", lambda model, lowering, **options: lowerings.append(lowering))
    export_pairs("se_resnet11_digits", variant="published", precisions=("float32",))
    assert lowerings == [False, False]


def test_size_goes_to_both_sides(monkeypatch):
    shapes = []
    monkeypatch.setattr(overhead, "to_litert", lambda model, **options: shapes.append(model.input_shape))
    export_pairs("se_resnet11_digits", variant="lowered", precisions=("float32",), input_shape=(16, 16, 1))
    assert shapes == [(None, 16, 16, 1)] * 2


@pytest.fixture
def exported(narrow, wide, monkeypatch):
    """`export_pairs` that has files at hand; the variants and precisions that it was asked for."""
    asked = []

    def pairs(network, *, variant, precisions, se, input_shape, for_gpu, progress):
        asked.append((variant, tuple(precisions)))
        return {precision: (narrow, replace(wide)) for precision in precisions}

    monkeypatch.setattr(overhead, "export_pairs", pairs)
    return asked


@pytest.mark.slow
def test_every_form_is_measured_in_every_precision(exported):
    records = list(overheads("se_resnet50", precisions=("float32", "int8")))
    assert [record.variant for record in records] == ["published", "published", "lowered", "lowered"]
    assert all(isinstance(record, Overhead) for record in records)
    assert exported == [("published", ("float32", "int8")), ("lowered", ("float32", "int8"))]


def test_record_says_where_squeeze_and_excitation_stands(exported):
    se = SEConfig(site="3x3", stages=(3, 4))
    (record,) = overheads("se_resnet50", precisions=("int8",), variants=("lowered",), se=se)
    assert (record.se["site"], record.se["stages"]) == ("3x3", (3, 4))


@pytest.mark.slow
def test_network_is_exported_with_its_squeeze_and_excitation_elsewhere(monkeypatch):
    made = []

    def create(network, **arguments):
        made.append(real(network, **arguments))
        return made[-1]

    real = overhead.create
    monkeypatch.setattr(overhead, "create", create)
    export_pairs("se_resnet11_digits", variant="lowered", precisions=("float32",), se=SEConfig(stages=(4,)))
    counted = [[layer.name for layer in model.layers if isinstance(layer, SqueezeExcite)] for model in made]
    assert counted == [[], ["stage4_block1_se"]]


def test_measurements_come_one_by_one(exported):
    records = overheads("se_resnet50", precisions=("float32",))
    next(records)
    assert exported == [("published", ("float32",))]


def test_progress_names_what_is_timed(exported):
    messages = []
    list(overheads("se_resnet50", precisions=("int8",), variants=("lowered",), progress=messages.append))
    assert messages == ["timing se_resnet50 compared with resnet50, int8 lowered"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            {"variants": ("folded",)},
            r"variant must be one or more of \('published', 'lowered'\). Received: folded",
        ),
        ({"variants": ()}, "variant must be one or more of .* Received: none"),
        ({"precisions": ("int4",)}, r"precision must be one or more of \('float32', .*'int8', .*\). Received: int4"),
        ({"se": None}, "se_resnet50 is a baseline: name a network with squeeze-and-excitation"),
        ({"precisions": ()}, "precision must be one or more of .* Received: none"),
    ],
)
def test_form_or_precision_that_is_none_is_an_error(wrong, said, exported):
    with pytest.raises(ValueError, match=said):
        next(overheads("se_resnet50", **{"precisions": ("float32",)} | wrong))
    assert exported == []


# Where it was measured.


def test_environment_goes_through_json():
    assert json.loads(json.dumps(environment())) == environment()


def test_environment_names_processor_cores_and_versions():
    record = environment()
    assert record["processor"] and record["cores"] == os.cpu_count()
    assert record["versions"]["keras"] == keras.__version__
    assert record["versions"]["ai-edge-litert"] in record["runtime"]


def cpuinfo(monkeypatch, text):
    def opened(path, *args):
        if text is None:
            raise FileNotFoundError(path)
        return io.StringIO(text)

    monkeypatch.setattr(se_keras.environment, "open", opened, raising=False)


@pytest.mark.parametrize(
    ("text", "processor", "matrix_units"),
    [
        ("model name\t: Xeon\nflags\t\t: sse amx_int8 avx amx_bf16\n", "Xeon", ["amx_bf16", "amx_int8"]),
        ("processor\t: 0\nmodel name\t: Zen: 4\nflags\t: avx2\n\nprocessor\t: 1\n", "Zen: 4", []),
        ("processor\t: 0\nFeatures\t: asimd i8mm\n", None, ["i8mm"]),
        ("", None, []),
        (None, None, []),
    ],
    ids=["x86", "no matrix unit", "arm", "empty", "no such file"],
)
def test_processor_is_what_the_system_tells(monkeypatch, text, processor, matrix_units):
    cpuinfo(monkeypatch, text)
    record = environment()
    assert record["processor"] == (processor or platform.processor() or platform.machine())
    assert record["matrix_units"] == matrix_units


def test_papers_figures_are_the_papers():
    # Section 4: "164 ms ... compared to 167 ms" for a pass of SE-ResNet-50 on a CPU.
    assert PAPER["ratio"] == pytest.approx(1.018, abs=5e-4)


# Early ends, percentiles, energy, footprints, and records that are kept


def test_comparison_ends_when_its_interval_is_narrow():
    def steady():
        time.sleep(0.001)

    found = compare(steady, steady, steady, blocks=200, runs=1, warmup=0, within=10.0)
    assert found.blocks == FEWEST_BLOCKS


def test_comparison_ends_when_its_time_is_up():
    found = compare(lambda: None, lambda: None, lambda: time.sleep(0.01), blocks=10_000, runs=1, warmup=0, seconds=0.1)
    assert 2 <= found.blocks < 100


def test_percentiles_count_the_disturbed_runs_too():
    waits = iter([0.0] * 19 + [0.05])
    found = compare(lambda: time.sleep(next(waits, 0.0)), lambda: None, lambda: None, blocks=10, runs=2, warmup=0)
    assert found.a.p50 < 10 < found.a.p99
    assert found.a.p50 <= found.a.p90 <= found.a.p99


@pytest.fixture
def powercap(tmp_path):
    """The counters of two packages, as Linux has them; `spend(microjoules)` uses energy of the first one."""
    names = {"intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:1": "psys", "intel-rapl:2": "package-1"}
    for name, zone in names.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(f"{zone}\n")
        (tmp_path / name / "energy_uj").write_text("998000\n")
        (tmp_path / name / "max_energy_range_uj").write_text("999999\n")

    def spend(microjoules):
        for name in ("intel-rapl:0", "intel-rapl:0:0", "intel-rapl:1"):  # a part of the package, and the platform
            file = tmp_path / name / "energy_uj"
            file.write_text(f"{(int(file.read_text()) + microjoules) % 1_000_000}\n")

    return tmp_path, spend


def test_energy_is_that_of_the_packages_over_the_end_of_their_counters(powercap):
    folder, spend = powercap
    sides = {side: partial(spend, cost) for side, cost in {"a": 40_000, "b": 41_000, "control": 40_000}.items()}
    found = compare(**sides, blocks=20, runs=2, meter=find_meter(folder))
    assert (found.a_mj, found.b_mj) == (40, 41)


def test_energy_is_not_told_where_the_system_does_not(tmp_path, powercap):
    assert find_meter(tmp_path / "none") is None
    folder, _ = powercap
    (folder / "intel-rapl:2" / "energy_uj").unlink()
    assert find_meter(folder) is None
    found = compare(lambda: None, lambda: None, lambda: None, blocks=2)
    assert (found.a_mj, found.b_mj) == (None, None)


def test_footprint_is_that_of_a_process_of_its_own(narrow):
    found = host.footprint(narrow.content)
    assert found.bytes == len(narrow.content)
    assert found.init_ms > 0 and found.first_ms > 0
    assert 0 <= found.peak_mb < 100  # the interpreter's own pages, and a network of a few kilobytes


def test_file_that_does_not_run_alone_is_refused():
    with pytest.raises(ValueError, match=r"The file does not run in a separate process \(exit status 1\): .+"):
        host.footprint(b"no file")


def test_profile_that_fails_loses_no_comparison(exported, monkeypatch):
    def broken(*_, **__):
        raise ValueError("The installed ai-edge-litert cannot report the times")

    messages = []
    monkeypatch.setattr(profiler, "profile", broken)
    found = overheads(
        "se_resnet50", precisions=("float32",), target=replace(QUICK, profile=True), progress=messages.append
    )
    assert [record.profiles for record in found] == [(), ()]
    assert messages.count("not profiled: The installed ai-edge-litert cannot report the times") == 2


@pytest.mark.slow
def test_what_is_kept_is_not_measured_again():
    run = partial(overheads, "se_resnet11_digits", input_shape=None, precisions=("float32",), variants=("lowered",))
    first = [found.to_json() for found in run()]
    kept = json.loads(json.dumps(first))  # as a file has it
    more = list(run(threads=(1, 2), kept=kept))
    assert [(record["threads"], len(record["footprints"])) for record in first] == [(1, 2)]
    assert [found.threads for found in more] == [2]
    assert list(run(kept=kept)) == []


# Child programs


@pytest.fixture
def program(tmp_path):
    """`program(text)`: a module with this text as a program."""

    def write(text):
        (tmp_path / "program.py").write_text(f"import json, sys\n{text}\n")
        module = types.ModuleType("program")
        module.__file__ = str(tmp_path / "program.py")
        return module

    return write


def test_program_reads_its_arguments_and_plan_and_prints_rows_of_json(program):
    text = "print('a log line'); print(json.dumps({'x': sys.argv[1:]})); print(json.dumps(json.load(sys.stdin)))"
    rows = []
    found = programs.run(program(text), 1, "b", plan={"y": 2}, on_row=rows.append, failure="It fails")
    assert found == rows == [{"x": ["1", "b"]}, {"y": 2}]


@pytest.mark.parametrize(
    "text, message",
    [
        ("sys.exit('no\\nlibrary')", "It fails (exit status 1): library"),
        ("sys.exit(3)", "It fails (exit status 3): it printed no message"),
        ("import os; os.kill(os.getpid(), 9)", "It fails (exit status -9): it printed no message"),
        ("pass", "It fails (exit status 0): it printed no message"),
    ],
)
def test_program_that_fails_gives_its_status_and_its_last_line(program, text, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        programs.run(program(text), failure="It fails")


def test_program_ends_with_the_error_of_its_caller(program):
    def interrupted(row):
        raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        programs.run(program("print('{}', flush=True); import time; time.sleep(60)"), on_row=interrupted, failure="")
    assert time.monotonic() - start < 30  # it was killed
