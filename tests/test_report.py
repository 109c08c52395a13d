"""The report: what it claims, that it needs no other file, and that it fits two widths, in light, dark and print."""

import html
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
from documents import ROOT

from se_keras.export.benchmark.charts import Difference, Stack, difference_chart, stack_chart
from se_keras.export.benchmark.report import as_html, as_markdown, headline, read
from se_keras.export.benchmark.results import Counts, DeviceConditions, Footprint, Overhead, with_record
from se_keras.export.benchmark.sentences import doubts, percent
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


def record(median, low, high, *, control=CONTROL, drift=None, **fields):
    measured = Comparison(
        ratio=Ratio(median=median, low=low, high=high),
        control=control,
        a_ms=33.2,
        b_ms=33.2 * median,
        blocks=20,
        runs=3,
        drift=drift,
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


def results(*records, processor=ENVIRONMENT["processor"]):
    environment = ENVIRONMENT | {"processor": processor}
    return json.loads(json.dumps({"schema": 1, "environment": environment, "overhead": records}))


def shown(page):
    """The text of a page without its data and styles, as a reader sees it."""
    body = re.sub(r"<(style|script).*?</\1>", "", page, flags=re.DOTALL)
    text = html.unescape(re.sub(r"<[^>]+>", " ", body))
    return " ".join(text.replace("\N{NO-BREAK SPACE}", " ").replace("\N{MINUS SIGN}", "-").split())


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
    assert "stage2 10.1 ms SE 0.75 ms" in shown(page)
    assert page.count('class="part squeeze"') == 1 + 1  # in the bar with SE, and in the legend
    assert page.count('class="part add"') == 2 + 1


def test_profiled_pair_of_files_without_se_shows_what_its_operators_take():
    sides = {"outside": {"convolution": 9000.0}}, {"outside": {"convolution": 4000.0, "other": 500.0}}
    page = shown(as_html([results(of_files(0.57, 0.55, 0.61, profiles=sides))]))
    assert "the operators take 4.5 ms in the profiler, those of plain 9 ms." in page
    assert "outside the stages 4.5 ms baseline 9 ms" in page and "squeeze" not in page


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


def test_stages_of_a_small_network_are_in_microseconds():
    sides = {"stage2": {"convolution": 8.0}}, {"stage2": {"convolution": 8.2, "scale": 0.4}}
    page = shown(as_html([results(record(1.1, 1.09, 1.11, profiles=sides))]))
    assert "squeeze, excitation and scale take 0.4 us in the profiler." in page
    assert "stage2 8.6 us SE 0.4 us" in page


def test_column_in_which_nothing_is_told_is_left_out():
    measured = record(1.1, 1.09, 1.11)
    assert "mJ a run" not in as_html([results(measured)])
    measured["comparison"] |= {"a_mj": 210.0, "b_mj": 231.4}
    page = as_html([results(measured)])
    assert "mJ a run" in page and "<td>231</td>" in page


def test_markdown_has_the_paper_and_a_row_for_each_pair():
    lines = as_markdown([results(BELOW), results(record(1.1, 1.09, 1.11, precision="int8"))]).splitlines()
    assert "| 164 ms | 167 ms | +1.8 % |" in lines[2]
    assert len(lines) == 5
    assert len({line.count("|") for line in lines}) == 1
    assert "| +1.2 % | +1.0 % to +1.5 % |" in lines[3]


def of_files(median, low, high, **fields):
    return record(median, low, high, baseline="plain", network="my_net", variant="as given", se=None, **fields)


def test_first_screen_has_the_figure_with_its_interval_and_the_papers():
    page = as_html([results(BELOW)])
    first = shown(page[: page.index("<h1>")])
    assert first.endswith(
        "+1.2 % 95 % interval: +1.0 % to +1.5 % +1.8 % ResNet-50 in the paper: 164 ms, with SE 167 ms"
    )
    assert page.index("<h1>") < page.index('class="chart"') < page.index("The numbers") < page.index("<details>")
    assert "say nothing about accuracy" in page[page.index("<details>") :]


def test_figure_that_is_noise_says_so():
    page = as_html([results(record(1.002, 0.999, 1.004))])
    assert "+0.2 % 95 % interval: -0.1 % to +0.4 %, not larger than the noise" in shown(page)
    assert 'class="bar lowered unreal"' in page and 'class="bar lowered"' not in page


def test_report_of_files_has_nothing_of_the_paper():
    given = [results(of_files(0.571, 0.55, 0.61))]
    page = as_html(given)
    assert "<title>my_net compared with plain</title>" in page
    assert "-42.9 % 95 % interval: -45.0 % to -39.0 % On AMD EPYC" in shown(page)
    for text in ("paper", "arXiv", "random weights", "squeeze"):
        assert text not in shown(page)
    assert 'class="reference"' not in page
    markdown = as_markdown(given)
    assert len(markdown.splitlines()) == 3 and "164" not in markdown and "SE" not in markdown


def test_chart_has_a_row_for_each_pair_of_each_device_with_control_and_interval():
    here = results(
        record(1.1, 1.09, 1.11, precision="int8"),
        BELOW,
        record(1.08, 1.07, 1.09, precision="int8", variant="published"),
    )
    page = as_html([here, results(BELOW, processor="Pixel 9")])
    labels = re.findall(r'<div class="row"><span class="label">(.*?)</span>', page)
    assert labels == [
        "AMD EPYC &lt;/script&gt;, int8 lowered",  # the variants of a precision are neighbors
        "AMD EPYC &lt;/script&gt;, int8 published",
        "AMD EPYC &lt;/script&gt;, float32 lowered",
        "Pixel 9, float32 lowered",
    ]
    for kind in ('<rect class="control"', '<line class="reference"', '<rect class="bar '):
        assert page.count(kind) == 4
    assert page.count('<line class="interval"') == 4 * 3
    assert "Pixel 9, se_resnet50 at 224x224, float32 lowered, 1 thread" in shown(page)


@pytest.mark.parametrize(
    "other, labels",
    [
        ({"threads": 2}, ["1 thread, float32 lowered", "2 threads, float32 lowered"]),
        ({"input_shape": (1, 96, 96, 3)}, ["224x224, float32 lowered", "96x96, float32 lowered"]),
        (
            {"se": {"site": "3x3", "stages": "all"}},
            ["se_resnet50, float32 lowered", "se_resnet50 at 3x3, float32 lowered"],
        ),
        ({"variant": "as given", "network": "mine"}, ["se_resnet50, float32 lowered", "mine, float32"]),
    ],
)
def test_labels_of_a_chart_say_what_differs(other, labels):
    page = as_html([results(BELOW, record(1.1, 1.09, 1.11, **other))])
    assert re.findall(r'<div class="row"><span class="label">(.*?)</span>', page) == labels


def test_results_of_one_processor_twice_are_told_apart():
    labels = re.findall(r'<span class="label">(.*?)</span>', as_html([results(BELOW), results(BELOW)]))
    assert labels[:2] == [f"AMD EPYC &lt;/script&gt; ({number}), float32 lowered" for number in (1, 2)]


A76 = ENVIRONMENT | {"processor": "Cortex-A76", "target": "instructions", "runtime": "LiteRT 2.1.6 under qemu"}
PHONE = {"processor": "Pixel 9", "id": "1", "target": "browser", "runtime": "LiteRT.js", "secure_context": False}
EXACT = Ratio(median=1.038, low=1.038, high=1.038)


def counts(**fields):
    of_a = {"total": 4_000_000_000, "sdot": 1_000_000_000, "other": 3_000_000_000}
    of_b = {"total": 4_152_000_000, "sdot": 1_000_000_000, "other": 3_152_000_000}
    same = Ratio(median=1, low=1, high=1)
    counted = Counts(ratio=EXACT, control=same, a_instructions=of_a, b_instructions=of_b)
    return record(1, 1, 1, comparison=counted, footprints=(), environment=A76, precision="int8", **fields)


def test_instructions_are_never_called_a_time():
    given = results(counts())
    assert headline([given]) == (
        "On Cortex-A76 with 1 thread, se_resnet50 at 224x224 in int8 executes 3.8 % more instructions than resnet50."
    )
    page = as_html([given])
    text = shown(page.partition("</style>")[2].partition("<details")[0])
    assert "4,000 million instructions" in text and "Instructions that squeeze-and-excitation adds" in text
    assert "+3.8 % exact" in text and "to +3.8 %" not in text
    assert "not a time" in text and not re.search(r"\bms\b|Time", text)
    assert 'class="reference"' not in page  # the paper's is a time
    assert "4,152 million instructions" in as_markdown([given])


def test_devices_are_rows_side_by_side_with_intervals():
    """Two devices of one file, as from the browser, and one of another file."""
    given = results(BELOW, record(1.03, 1.02, 1.04, environment=PHONE), counts())
    page = as_html([given, results(BELOW, processor="Xeon")])
    table = shown(page).partition("Devices side by side")[2].partition("The numbers")[0]
    for row in ("AMD EPYC </script> +1.2 % [+1.0 % to +1.5 %]", "Pixel 9 +3.0 % [+2.0 % to +4.0 %]", "Xeon +1.2 %"):
        assert row in table
    assert "int8 lowered, instructions" in table and "Cortex-A76 +3.8 % [exact]" in table
    for name in ("AMD EPYC </script>", "Pixel 9", "Xeon"):
        assert f"Measured on {name}" in shown(page)
    assert "Counted for Cortex-A76" in shown(page) and "secure context no" in shown(page)
    assert "Pixel 9" in as_markdown([given]) and "Devices side by side" not in as_html([results(BELOW)])


@pytest.mark.parametrize(
    "file", sorted((ROOT / "docs" / "data" / "devices").glob("*.json")), ids=lambda path: path.stem
)
def test_page_of_devices_has_what_was_measured(file):
    rows = [line.split(" | ") for line in (ROOT / "docs/results/devices.md").read_text().splitlines()]
    given = read(file)
    assert as_html([given])
    for found in (x for x in given["overhead"] if x["form"] == "lowered"):
        name = (found.get("environment") or given["environment"])["processor"].partition(" (")[0]
        name = name.replace("Linux, headless Chrome 156", "Chromium 156 with LiteRT.js, on that Xeon")
        (row,) = (row for row in rows if row[0] == f"| {name}" and row[-1].startswith(("time", "instr")))
        assert row[1 if found["precision"] == "float32" else 2].startswith(
            percent(found["comparison"]["ratio"]["median"])
        )


def test_board_at_the_end_of_ssh_is_another_machine():
    board = results(BELOW)
    board["environment"]["target"] = "ssh"
    assert "AMD EPYC </script>, with ssh |" in as_markdown([results(BELOW), board])
    assert "Measured on AMD EPYC </script>, with ssh" in shown(as_html([results(BELOW), board]))


def test_record_of_a_device_replaces_its_own_alone():
    phone, other = (record(1.03, 1.02, 1.04, environment=PHONE | {"id": number}) for number in "12")
    records = with_record([BELOW, phone, other], record(1.05, 1.02, 1.09, environment=PHONE))
    assert [x["comparison"]["ratio"]["median"] for x in records] == [1.012, 1.03, 1.05]


def place(mark):
    """From where to where a mark of a chart goes, in percent."""
    values = {name: float(value) for name, value in re.findall(r'(x|width|x1|x2)="([\d.]+)%"', mark)}
    return values.get("x1", values.get("x")), values.get("x2", values.get("x", 0) + values.get("width", 0))


def test_marks_of_a_chart_lie_where_their_values_are():
    row = Difference(label="x", kind="given", value=10.0, interval=(8.0, 12.0), control=(-2.0, 2.0), reference=5.0)
    marks = re.findall(r"<(?:rect|line) [^>]+>", difference_chart([row]))
    found = {
        kind: place(next(x for x in marks if f'class="{kind}' in x))
        for kind in ("zero", "bar", "control", "interval", "reference")
    }
    zero, per_percent = found["zero"][0], (found["bar"][1] - found["zero"][0]) / 10
    at = {"bar": (0, 10), "control": (-2, 2), "interval": (8, 12), "reference": (5, 5)}
    for kind, ends in at.items():
        assert found[kind] == pytest.approx([zero + x * per_percent for x in ends], abs=0.05), kind
    assert 0 <= found["control"][0] and found["interval"][1] <= 100


@pytest.mark.parametrize(
    "value, ticks",
    [
        (0.0, ["0", "+0.2 %", "+0.4 %", "+0.6 %", "+0.8 %", "+1.0 %"]),
        (10.0, ["0", "+2 %", "+4 %", "+6 %", "+8 %", "+10 %"]),
        (-42.0, ["-40 %", "-30 %", "-20 %", "-10 %", "0"]),
        (399.0, ["0", "+100 %", "+200 %", "+300 %"]),
    ],
)
def test_ticks_are_few_and_round(value, ticks):
    row = Difference(label="", kind="given", value=value, interval=(value, value), control=(0.0, 0.0))
    assert [shown(x) for x in re.findall(r"<text .*?</text>", difference_chart([row]))] == ticks


def test_parts_of_a_stack_follow_one_another():
    chart = stack_chart([Stack(label="a", before={"add": 1.0}, after={"add": 1.0, "scale": 3.0}, value="4 ms")])
    assert [place(x) for x in re.findall(r"<rect [^>]+>", chart)] == [(0, 25), (0, 25), (25, 100)]


@pytest.mark.parametrize(
    "measured, texts",
    [
        (BELOW, []),
        (record(1.012, 1.010, 1.015, drift=1.08), []),
        (
            record(1.012, 0.999, 1.015),
            ["the difference, +1.2 % [-0.1 % to +1.5 %], has an interval that contains zero"],
        ),
        (
            record(1.002, 1.001, 1.004),
            [
                "the difference, +0.2 % [+0.1 % to +0.4 %], is not larger than the noise: "
                "two copies of resnet50 differ by -0.2 % to +0.3 %"
            ],
        ),
        (record(1.1, 1.09, 1.11, drift=1.374), ["the time of resnet50 changed by 37% while it was measured"]),
    ],
)
def test_doubts_are_noise_and_drift(measured, texts):
    assert doubts(measured) == texts
    notes = re.findall("<li>(.*?)</li>", as_html([results(measured)]))
    assert notes == [f"se_resnet50 at 224x224, float32 lowered, 1 thread: {text}." for text in texts]


def test_page_without_results_is_refused():
    with pytest.raises(ValueError, match="A report needs results. Received: none"):
        as_html([results()])


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is not a file of results of se-keras benchmark: it is not JSON: Expecting value"),
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


@pytest.mark.parametrize("ratio", [math.inf, math.nan, 0.0, -1.0])
def test_results_with_impossible_ratios_are_refused(tmp_path, ratio):
    given = results(record(1.1, 1.09, 1.11, se=None))
    given["overhead"][0]["comparison"]["null"]["high"] = ratio
    (tmp_path / "results.json").write_text(json.dumps(given))
    with pytest.raises(
        ValueError,
        match="Ratios, times and counts must be finite and above 0, .+ Received: others for se_resnet50 in '",
    ):
        read(tmp_path / "results.json")


def test_results_with_impossible_times_are_refused(tmp_path):
    given = results(record(1.1, 1.09, 1.11, se=None, profiles=({"stage2": {"add": -1.0}}, {})))
    (tmp_path / "results.json").write_text(json.dumps(given))
    with pytest.raises(ValueError, match="profiled times finite and at least 0"):
        read(tmp_path / "results.json")


def test_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file of results '.+/results.json'"):
        read(tmp_path / "results.json")


@pytest.fixture
def chromium(tmp_path):
    """`chromium(url, *options)`: what the browser prints, which must be no error of the page."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium is installed")
    basic = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    basic += ["--allow-file-access-from-files", f"--user-data-dir={tmp_path}/profile"]

    def run(path, *options):
        command = [browser, *basic, *options, path.as_uri()]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert "CONSOLE" not in result.stderr
        return result.stdout

    return run


STAGES = {"stage2": {"convolution": 9000.0}}, {"stage2": {"convolution": 9100.0, "scale": 600.0}}
MEASURED = """<script>
const frame = document.querySelector("iframe"), at = x => frame.contentDocument.querySelector(x);
frame.onload = () => {
  const color = frame.contentWindow.getComputedStyle(at("body")).backgroundColor;
  const wide = at(".wide"), track = at(".track").getBoundingClientRect();
  document.title = [at("html").scrollWidth, wide.scrollWidth > wide.clientWidth, Math.round(track.width), color].join();
};
</script>"""


@pytest.mark.parametrize(
    "width, scrolls, least, scheme, color",
    [
        (360, "true", 300, "light", "rgb(255, 255, 255)"),
        (1400, "false", 700, "light", "rgb(255, 255, 255)"),
        (1400, "false", 700, "dark", "rgb(18, 22, 27)"),
    ],
)
def test_page_fits_its_window_and_logs_no_error(tmp_path, chromium, width, scrolls, least, scheme, color):
    # A window of the browser has at least 500 pixels, a frame in it has any width.
    page = as_html([results(record(1.1, 1.09, 1.11, precision="int8", profiles=STAGES), BELOW)])
    if scheme == "dark":
        page = page.replace("screen and (prefers-color-scheme: dark)", "screen")
    (tmp_path / "page.html").write_text(page)
    (tmp_path / "frame.html").write_text(f'<iframe src="page.html" width="{width}" height="900"></iframe>{MEASURED}')
    out = chromium(tmp_path / "frame.html", "--window-size=1500,1000", "--dump-dom")
    needed, is_wide, track, *background = re.search("<title>(.*?)</title>", out)[1].split(",")
    assert int(needed) <= width
    assert is_wide == scrolls  # the table, in its own frame
    assert int(track) >= least
    assert ",".join(background) == color


def test_page_prints_on_few_sheets_with_what_is_folded(tmp_path, chromium):
    (tmp_path / "page.html").write_text(as_html([results(BELOW)]))
    chromium(tmp_path / "page.html", "--no-pdf-header-footer", f"--print-to-pdf={tmp_path}/folded.pdf")
    (tmp_path / "page.html").write_text(as_html([results(BELOW)]).replace("<details>", "<details open>"))
    chromium(tmp_path / "page.html", "--no-pdf-header-footer", f"--print-to-pdf={tmp_path}/open.pdf")
    folded, unfolded = ((tmp_path / f"{name}.pdf").read_bytes() for name in ("folded", "open"))
    assert folded.startswith(b"%PDF") and abs(len(folded) - len(unfolded)) < 1000
