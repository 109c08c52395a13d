"""The report: what its headline claims, that it needs no other file, and that it fits two widths."""

import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest

from se_keras.export.benchmark.report import as_html, as_markdown, headline, read
from se_keras.export.benchmark.results import DeviceConditions, Footprint, Overhead
from se_keras.timing import Comparison, Percentiles, Ratio

CONTROL = Ratio(median=1.0, low=0.998, high=1.003)
ENVIRONMENT = {
    "processor": "AMD EPYC </script>",
    "runtime": "LiteRT 2.3.0 with XNNPACK",
    "cores": 2,
    "affinity": [0, 1],
    "governor": None,
    "matrix_units": [],
    "system": "Linux",
    "versions": {"keras": "3.15.1"},
}
SPREAD = Percentiles(p50=33.2, p90=33.9, p99=36.0)


def record(median, low, high, *, control=CONTROL, **fields):
    measured = Comparison(
        ratio=Ratio(median=median, low=low, high=high),
        control=control,
        a_ms=33.2,
        b_ms=33.2 * median,
        blocks=20,
        runs=3,
        a=SPREAD,
        b=SPREAD,
    )
    footprint = Footprint(bytes=102_000_000, init_ms=80.0, first_ms=50.0, peak_mb=230.0)
    made = Overhead(
        baseline="resnet50",
        network="se_resnet50",
        precision="float32",
        variant="lowered",
        threads=1,
        input_shape=(1, 224, 224, 3),
        comparison=measured,
        undelegated=(),
        sha256=("a", "b"),
        se={"site": "standard", "stages": "all"},
        footprints=(footprint, footprint),
    )
    return replace(made, **fields).to_json()


def results(*records):
    return json.loads(json.dumps({"schema": 1, "environment": ENVIRONMENT, "overhead": records}))


BELOW = record(1.012, 1.010, 1.015)


@pytest.mark.parametrize(
    "measured, claim",
    [
        (BELOW, "takes 1.2 % more time than resnet50 [+1.0 % to +1.5 %], less than the paper's +1.8 %."),
        (record(1.018, 1.015, 1.022), "[+1.5 % to +2.2 %], as much as the paper's +1.8 %."),
        (record(1.03, 1.02, 1.04), "[+2.0 % to +4.0 %], more than the paper's +1.8 %."),
        (
            record(1.002, 0.999, 1.004),
            "takes as long as resnet50: the difference, +0.2 % [-0.1 % to +0.4 %], is not larger",
        ),
        (record(1.03, 1.02, 1.04, control=Ratio(median=1, low=0.95, high=1.05)), "takes as long as resnet50"),
        (record(0.571, 0.55, 0.61, network="b", baseline="a"), "takes 42.9 % less time than a [-45.0 % to -39.0 %]."),
        (
            record(1.02, 1.01, 1.03, precision="int8"),
            "in int8 takes 2.0 % more time than resnet50 [+1.0 % to +3.0 %].",
        ),
        (record(1.02, 1.01, 1.03, input_shape=(1, 64, 64, 3)), "se_resnet50 at 64x64 in float32 takes 2.0 % more"),
        (record(1.02, 1.01, 1.03, se={"site": "3x3", "stages": "all"}), "resnet50 [+1.0 % to +3.0 %]."),
        (record(1.03, 1.02, 1.04, network="se_mobilenet", baseline="mobilenet"), "than mobilenet [+2.0 % to +4.0 %]."),
    ],
)
def test_headline_claims_what_the_interval_allows(measured, claim):
    sentence = headline([results(measured)])
    assert sentence.startswith("On AMD EPYC </script> with 1 thread, ")
    assert claim in sentence


def test_headline_speaks_of_the_lowered_network():
    sentence = headline([results(record(1.08, 1.07, 1.09, variant="published"), BELOW)])
    assert "takes 1.2 % more time" in sentence


def test_page_has_all_data_and_needs_no_network():
    given = results(BELOW, record(1.1, 1.09, 1.11, precision="int8"))
    page = as_html([given])
    (data,) = re.findall(r'<script type="application/json" id="results">(.*?)</script>', page, re.DOTALL)
    assert json.loads(data) == [given]
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "AMD EPYC &lt;/script&gt;" in page
    for text in (
        "+10.0 %",
        "33.2 / 33.9 / 36",
        "102.0",
        "230",
        "not reported by the system",
        "say nothing about accuracy",
    ):
        assert text in page


def test_profiled_pair_shows_what_its_parts_take():
    plain = {"stage2": {"convolution": 9000.0, "add": 200.0}}
    other = {"stage2": {"convolution": 9100.0, "add": 200.0, "squeeze": 100.0, "excitation": 50.0, "scale": 600.0}}
    page = as_html([results(record(1.1, 1.09, 1.11, profiles=(plain, other)))])
    assert "squeeze, excitation and scale take 0.75 ms in the profiler" in page
    assert page.count("data:image/svg+xml;base64,") == 2


def test_page_tells_what_is_missing_and_what_ran_on_slow_kernels():
    device = DeviceConditions(missing="2 of 5 blocks: gone")
    page = as_html([results(record(1.1, 1.09, 1.11, device=device, undelegated=["CUMSUM", "ABS"]))])
    assert "se_resnet50 at 224x224, float32 lowered, 1 thread: measured 2 of 5 blocks: gone." in page
    assert "not delegated to XNNPACK: CUMSUM, ABS, which ran on slow kernels." in page
    assert "<ul>" not in as_html([results(BELOW)])


def test_page_of_a_phone_tells_its_flags_and_how_warm_it_was():
    device = DeviceConditions(celsius=(33.5, 35.2), flags=("--num_threads=1", "--num_runs=20"))
    page = as_html([results(record(1.1, 1.09, 1.11, device=device))])
    assert "the warmest sensor had 34 to 35 degrees Celsius" in page
    assert "flags of benchmark_model: --num_threads=1 --num_runs=20." in page


def test_column_in_which_nothing_is_told_is_left_out():
    measured = record(1.1, 1.09, 1.11)
    assert "mJ a run" not in as_html([results(measured)])
    measured["comparison"] |= {"a_mj": 210.0, "b_mj": 231.4}
    page = as_html([results(measured)])
    assert "mJ a run" in page and "<td>231</td>" in page


def test_markdown_has_the_paper_and_a_row_for_each_pair():
    lines = as_markdown([results(BELOW), results(record(1.1, 1.09, 1.11, precision="int8"))]).splitlines()
    assert "| 164 | 167 | +1.8 % |" in lines[2]
    assert len(lines) == 5
    assert len({line.count("|") for line in lines}) == 1
    assert "| +1.2 % | +1.0 % to +1.5 % |" in lines[3]


def test_page_without_results_is_refused():
    with pytest.raises(ValueError, match="A report needs results. Received: none"):
        as_html([results()])


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is not a file of results of se-keras benchmark: Expecting value"),
        ("[]", "results of se-keras benchmark: it must be an object. Received: \\[\\]"),
        ("{}", "results of se-keras benchmark: it lacks environment, overhead, schema"),
        ('{"schema": 2, "environment": {"processor": "x"}, "overhead": []}', "Results of schema 1 .+ of schema 2"),
        (
            '{"schema": 1, "environment": {"processor": "x"}, "overhead": [{}]}',
            "overhead.0 lacks baseline, ",
        ),
    ],
)
def test_file_that_holds_no_results_is_refused(tmp_path, text, message):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "results.json")


def test_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file of results '.+/results.json'"):
        read(tmp_path / "results.json")


@pytest.mark.parametrize("width", [360, 1400])
def test_page_fits_its_window_and_logs_no_error(tmp_path, width):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium is installed")
    page = as_html([results(BELOW, record(1.1, 1.09, 1.11, precision="int8"))])
    script = "<script>document.title = [document.documentElement.scrollWidth, window.innerWidth].join()</script>"
    (tmp_path / "page.html").write_text(page.replace("</body>", f"{script}</body>"))
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--enable-logging=stderr",
        f"--window-size={width},1000",
        f"--user-data-dir={tmp_path}/profile",
        "--dump-dom",
        (tmp_path / "page.html").as_uri(),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    needed, given = map(int, re.search(r"<title>(\d+),(\d+)</title>", result.stdout).groups())
    assert needed <= given
    assert "CONSOLE" not in result.stderr
