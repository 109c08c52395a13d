"""Results of the benchmark as a page of HTML without external files, or as a Markdown table."""

import base64
import html
import io
import json
import string
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from se_keras.records import read_json
from se_keras.typing import FilePath, Json

from .results import AS_GIVEN, PAPER, ResultsRecord, placement, thread_count

SCHEMA = 1
_SE_PARTS = ("squeeze", "excitation", "scale")
_PART_COLORS = {
    "convolution": "0.8",
    "add": "0.65",
    "classifier": "0.5",
    "other": "0.35",
    "squeeze": "#56B4E9",
    "excitation": "#E69F00",
    "scale": "#D55E00",
}
_WIDTH = 4.8  # inches: on a phone of 360 pixels, the letters of a picture have three quarters of their size
_COLORS = {"published": "#D55E00", "lowered": "#0072B2", AS_GIVEN: "#009E73"}


def read(path: FilePath) -> Json:
    """Reads results that `se-keras benchmark` wrote.

    Raises:
        FileNotFoundError, ValueError: If there is no such file, or if its results are incomplete or of another version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file of results {str(path)!r}")
    results = read_json(path, ResultsRecord, what="a file of results of se-keras benchmark")
    if results["schema"] != SCHEMA:
        raise ValueError(
            f"Results of schema {SCHEMA} can be read. Received: {str(path)!r} of schema {results['schema']}"
        )
    return results


def headline(results: Sequence[Json]) -> str | None:
    """The first result as a sentence, of a lowered network if there is one; None without results."""
    for found in results:
        lowered = [record for record in found["overhead"] if record["form"] != "published"]
        for record in lowered or found["overhead"]:
            return f"On {found['environment']['processor']} with {thread_count(record['threads'])}, {_claim(record)}."
    return None


def as_markdown(results: Sequence[Json]) -> str:
    """A table for a README, with a row for each pair."""
    lines = [
        "| network | baseline | precision | variant | threads | baseline ms | SE ms | cost of SE | 95 % interval "
        "| machine |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | --- | --- |",
        f"| se_resnet50 | resnet50 | float32 | the paper's | | {PAPER['resnet50_ms']} | {PAPER['se_resnet50_ms']} | "
        f"{_percent(PAPER['ratio'])} | | arXiv:1709.01507, section 4 |",
    ]
    rows = ((*_cells(x), found["environment"]["processor"]) for found in results for x in found["overhead"])
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows)])


def as_html(results: Sequence[Json]) -> str:
    """One page with all pictures and all data in it; raises ValueError if there are no results."""
    sentence = headline(results)
    if sentence is None:
        raise ValueError("A report needs results. Received: none")
    page = resources.files("se_keras.export.benchmark").joinpath("report.html").read_text(encoding="utf-8")
    return string.Template(page).substitute(
        headline=html.escape(sentence),
        sections="".join(map(_section, results)),
        data=json.dumps(results).replace("</", "<\\/"),  # a script ends at the first closing tag
        paper=_percent(PAPER["ratio"]),
    )


# Text


def _claim(record):
    """The claim that the interval of a record supports."""
    ratio = record["comparison"]["ratio"]
    median, interval = _percent(ratio["median"]), _interval(ratio)
    pair = f"{_network(record)} in {record['precision']} takes"
    if not record["is_real"]:
        noise = f"the difference, {median} [{interval}], is not larger than the noise of this machine"
        return f"{pair} as long as {record['baseline']}: {noise}"
    difference = f"{100 * abs(ratio['median'] - 1):.1f} % {'more' if ratio['median'] > 1 else 'less'}"
    claim = f"{pair} {difference} time than {record['baseline']} [{interval}]"
    if not _is_the_papers_pair(record):
        return claim
    below = "less than" if ratio["high"] < PAPER["ratio"] else "as much as"
    compared = "more than" if ratio["low"] > PAPER["ratio"] else below
    return f"{claim}, {compared} the paper's {_percent(PAPER['ratio'])}"


def _is_the_papers_pair(record):
    """Whether the paper reports the cost of this pair: SE-ResNet-50 as published, at 224x224, in float32."""
    pair = (record["network"], record["baseline"], record["precision"]) == ("se_resnet50", "resnet50", "float32")
    return pair and not placement(record.get("se")) and list(record["input_shape"][1:3]) == [224, 224]


def _percent(ratio):
    return f"{100 * (ratio - 1):+.1f} %"


def _interval(ratio):
    return f"{_percent(ratio['low'])} to {_percent(ratio['high'])}"


def _network(record):
    height, width = record["input_shape"][1:3]
    return f"{record['network']}{placement(record.get('se'))} at {height}x{width}"


def _setting(record):
    return f"{record['precision']} {record['form']}, {thread_count(record['threads'])}"


def _label(record):
    """A short name of a measured pair."""
    return f"{_network(record)}, {_setting(record)}"


def _cells(record):
    comparison = record["comparison"]
    return (
        _network(record),
        record["baseline"],
        record["precision"],
        record["form"],
        str(record["threads"]),
        f"{comparison['a_ms']:.3g}",
        f"{comparison['b_ms']:.3g}",
        _percent(comparison["ratio"]["median"]),
        _interval(comparison["ratio"]),
    )


# HTML


def _section(found):
    """The results of one machine."""
    records = found["overhead"]
    alternative = f"Ratios with their intervals: {len(records)} pairs; the table below has the numbers."
    return (
        f"<h2>{html.escape(found['environment']['processor'])}</h2>{_image(_ratio_figure(records), alternative)}"
        f"{_overview(records)}{_notes(records)}{_profiles(records)}{_footprints(records)}{_machine(found['environment'])}"
    )


def _overview(records):
    rows = []
    for record in records:
        _, baseline, *_, baseline_ms, ms, cost, interval = _cells(record)
        control, significant = _interval(record["comparison"]["null"]), "yes" if record["is_real"] else "no"
        rows.append((_label(record), cost, interval, ms, baseline, baseline_ms, control, significant))
    return _table(("", "cost", "95 % interval", "ms", "baseline", "ms", "A/A control", "significant"), rows)


def _table(titles, rows):
    """A table without its empty columns; only the first column breaks its lines."""
    columns = [column for column in zip(titles, *rows, strict=True) if any(column[1:])]
    head, *body = zip(*columns, strict=True)
    lines = "".join(_row(cells, "td") for cells in body)
    return f'<div class="wide"><table><thead>{_row(head, "th")}</thead><tbody>{lines}</tbody></table></div>'


def _row(cells, tag):
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"


def _notes(records):
    """Notes on single pairs that a reader has to know."""
    notes = [f"{_label(record)}: measured {record['missing']}" for record in records if record.get("missing")]
    notes += [
        f"{_label(record)}: the warmest sensor had {min(record['celsius']):.0f} to {max(record['celsius']):.0f} "
        "degrees Celsius before the blocks"
        for record in records
        if record.get("celsius")
    ]
    notes += sorted({f"flags of benchmark_model: {' '.join(x['flags'])}" for x in records if x.get("flags")})
    notes += [
        f"{_label(record)}: not delegated to XNNPACK: {', '.join(record['undelegated'])}, which ran on slow kernels"
        for record in records
        if record.get("undelegated")
    ]
    return f"<ul>{''.join(f'<li>{html.escape(line)}.</li>' for line in notes)}</ul>" if notes else ""


def _footprints(records):
    """Sizes, start-up times, memory and energy, as far as they were measured."""
    rows = []
    for record in records:
        names = (record["baseline"], record["network"])
        for side, name, footprint in zip("ab", names, record.get("footprints") or (), strict=False):
            spread = record["comparison"].get(side) or {}
            cells = (
                f"{name}, {_setting(record)}",
                f"{footprint['bytes'] / 1e6:.1f}",
                f"{footprint['init_ms']:.0f}",
                f"{footprint['first_ms']:.1f}",
                _number(footprint["peak_mb"], ".0f"),
                " / ".join(f"{spread[q]:.3g}" for q in ("p50", "p90", "p99")) if spread else "",
                _number(record["comparison"].get(f"{side}_mj"), ".3g"),
            )
            rows.append(cells)
    titles = ("", "MB", "init ms", "first run ms", "peak MB", "p50 / p90 / p99 ms", "mJ a run")
    return f"<h3>Files, start and memory</h3>{_table(titles, rows)}" if rows else ""


def _number(value, spec):
    """A number; empty where the system did not report it."""
    return "" if value is None else f"{value:{spec}}"


def _machine(environment):
    affinity, cores = environment.get("affinity"), environment.get("cores")
    facts = {
        "runtime": environment.get("runtime"),
        "system": environment.get("system"),
        "cores": f"{cores}, of which {len(affinity)} may be used" if affinity else cores,
        "governor": environment.get("governor") or "not reported by the system",
        "matrix units": ", ".join(environment.get("matrix_units") or ()) or "none",
        "versions": ", ".join(f"{name} {number}" for name, number in (environment.get("versions") or {}).items()),
    }
    rows = "".join(f"<dt>{name}</dt><dd>{html.escape(str(value))}</dd>" for name, value in facts.items() if value)
    return f"<h3>Measured on</h3><dl>{rows}</dl>"


def _profiles(records):
    """Where the time goes, for each pair that was profiled."""
    figures = []
    for record in records:
        if record.get("profiles"):
            without, with_se = (
                sum(parts.get(part, 0.0) for parts in side.values() for part in _SE_PARTS)
                for side in record["profiles"]
            )
            ms = (with_se - without) / 1e3
            text = f"{_label(record)}: squeeze, excitation and scale take {ms:.2f} ms in the profiler"
            caption, image = html.escape(f"{text}."), _image(_stage_figure(record), text)
            figures.append(f"<figure><figcaption>{caption}</figcaption>{image}</figure>")
    if not figures:
        return ""
    note = (
        "The two files are profiled one after the other, not in pairs. Therefore the time of SE's parts is more exact "
        "than the difference between two bars."
    )
    return f'<h3>Where the time goes</h3><p>{note}</p><div class="pictures">{"".join(figures)}</div>'


# Figures


def _image(figure, alternative):
    """A figure as part of the page."""
    text = io.StringIO()
    figure.savefig(text, format="svg")
    picture = base64.b64encode(text.getvalue().encode()).decode()
    return f'<img alt="{html.escape(alternative)}" src="data:image/svg+xml;base64,{picture}">'


def _axes(height):
    from matplotlib.figure import Figure

    axes = Figure(figsize=(_WIDTH, height), layout="constrained").subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _stage_figure(record):
    """Two bars for each stage, without and with SE; a bar stacks the parts."""
    without, with_se = record["profiles"]
    stages = list(dict.fromkeys([*without, *with_se]))
    axes = _axes(3)
    for side, offset in ((without, -0.2), (with_se, 0.2)):
        bottom = [0.0] * len(stages)
        for part, color in _PART_COLORS.items():
            values = [side.get(stage, {}).get(part, 0.0) / 1e3 for stage in stages]
            positions = [index + offset for index in range(len(stages))]
            label = part if side is with_se else None
            axes.bar(positions, values, width=0.36, bottom=bottom, color=color, label=label)
            bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    axes.set_xticks(range(len(stages)), stages)
    axes.set_ylabel("ms (left without, right with SE)")
    axes.set_ylim(top=1.35 * axes.get_ylim()[1])  # room for the legend
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper left")
    return axes.figure


def _ratio_figure(records):
    """Ratios with their intervals, the controls, and the paper's ratio as a line."""
    axes = _axes(0.9 + 0.42 * len(records))
    axes.axvline(100 * (PAPER["ratio"] - 1), color="0.35", linestyle="--", linewidth=1)
    axes.axvline(0, color="0.7", linewidth=1)
    for index, record in enumerate(records):
        ratio, control = record["comparison"]["ratio"], record["comparison"]["null"]
        median, low, high = (100 * (ratio[name] - 1) for name in ("median", "low", "high"))
        width, left = 100 * (control["high"] - control["low"]), 100 * (control["low"] - 1)
        axes.barh(index, width, left=left, height=0.6, color="0.9")
        color = _COLORS.get(record["form"], "black")
        axes.errorbar(median, index, xerr=[[median - low], [high - median]], fmt="o", color=color, capsize=3)
    labels = [f"{x['network']}{placement(x.get('se'))}\n{_setting(x)}" for x in records]
    axes.set_yticks(range(len(records)), labels, fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("added time, %\n(dashed: the paper's; gray: A/A control)")
    return axes.figure
