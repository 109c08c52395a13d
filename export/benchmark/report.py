"""Results of the benchmark for people: one page of HTML that needs no network, or a Markdown table."""

import base64
import html
import io
import json
import string
from importlib import resources
from pathlib import Path

from .results import AS_GIVEN, PAPER

SCHEMA = 1
_FIELDS = ("network", "baseline", "precision", "form", "threads", "input_shape", "comparison", "is_real")
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
_WIDTH = 4.8  # inches, of a picture: on a phone of 360 pixels its letters are three quarters of their size
_COLORS = {"published": "#D55E00", "lowered": "#0072B2", AS_GIVEN: "#009E73"}


def read(path):
    """Results as `se-keras benchmark` writes them.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no results, or those of another version.
    """
    path = Path(path)
    try:
        results = json.loads(path.read_text())
        schema, records = results["schema"], results["overhead"]
        complete = (
            all(field in record for record in records for field in _FIELDS) and "processor" in results["environment"]
        )
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no file of results {str(path)!r}") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{str(path)!r} holds no results of se-keras benchmark") from None
    if schema != SCHEMA:
        raise ValueError(f"Results of schema {SCHEMA} can be read. Received: {str(path)!r} of schema {schema!r}")
    if not complete:
        raise ValueError(f"{str(path)!r} holds no whole results of se-keras benchmark")
    return results


def headline(results):
    """What was found, in a sentence: of the first network, lowered, in the first precision; None without results."""
    for found in results:
        lowered = [record for record in found["overhead"] if record["form"] != "published"]
        for record in lowered or found["overhead"]:
            ratio = record["comparison"]["ratio"]
            differs, low, high = (_percent(ratio[name]) for name in ("median", "low", "high"))
            where = f"On {found['environment']['processor']} with {_threads(record)}"
            pair = f"{where}, {record['network']}{_placed(record)}{_sized(record)} in {record['precision']} takes"
            if not record["is_real"]:
                noise = f"what differs, {differs} [{low} to {high}], is no more than the machine's own noise"
                return f"{pair} as long as {record['baseline']}: {noise}."
            more = f"{differs} more" if ratio["median"] > 1 else f"{100 * (1 - ratio['median']):.1f} % less"
            told = f"{pair} {more} time than {record['baseline']} [{low} to {high}]"
            if not _is_the_papers(record):
                return f"{told}."
            paper = _percent(PAPER["ratio"])
            below = "less than" if ratio["high"] < PAPER["ratio"] else "as much as"
            return f"{told}, {'more than' if ratio['low'] > PAPER['ratio'] else below} the paper's {paper}."
    return None


def as_markdown(results):
    """A table for a README: a row for each pair."""
    lines = [
        "| network | beside | precision | form | threads | plain ms | SE ms | SE costs | 95 % interval | machine |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | --- | --- |",
        f"| se_resnet50 | resnet50 | float32 | the paper's | | {PAPER['resnet50_ms']} | {PAPER['se_resnet50_ms']} | "
        f"{_percent(PAPER['ratio'])} | | arXiv:1709.01507, section 4 |",
    ]
    for found in results:
        for record in found["overhead"]:
            cells = (*_cells(record), found["environment"]["processor"])
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def as_html(results):
    """One page, whole: pictures and all data are in it.

    Raises:
        ValueError: If there are no results.
    """
    told = headline(results)
    if told is None:
        raise ValueError("A report needs results. Received: none")
    sections = []
    for found in results:
        alternative = f"Ratios with their intervals: {len(found['overhead'])} pairs; the table below has the numbers."
        sections.append(
            f"<h2>{html.escape(found['environment']['processor'])}</h2>"
            f"{_image(_picture(found['overhead']), alternative)}"
            f"{_table(_TITLES, [_row(record) for record in found['overhead']])}{_caveats(found['overhead'])}"
            f"{_profiles(found['overhead'])}{_memory(found['overhead'])}{_machine(found['environment'])}"
        )
    data = json.dumps(results).replace("</", "<\\/")  # a script ends at its first closing tag
    page = string.Template(resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8"))
    return page.substitute(
        headline=html.escape(told), sections="".join(sections), data=data, paper=_percent(PAPER["ratio"])
    )


def _is_the_papers(record):
    """Whether the paper's figure is of such a pair: SE-ResNet-50 as published, at 224x224, in float32."""
    pair = (record["network"], record["baseline"], record["precision"]) == ("se_resnet50", "resnet50", "float32")
    return pair and not _placed(record) and list(record["input_shape"][1:3]) == [224, 224]


def _percent(ratio):
    return f"{100 * (ratio - 1):+.1f} %"


def _threads(record):
    return f"{record['threads']} thread{'s' * (record['threads'] > 1)}"


def _placed(record):
    se = record.get("se") or {"site": "standard", "stages": "all"}
    site = "" if se["site"] == "standard" else f" at {se['site']}"
    return site if se["stages"] == "all" else f"{site}, stages {' '.join(map(str, se['stages']))}"


def _sized(record):
    height, width = record["input_shape"][1:3]
    return f" at {height}x{width}"


def _cells(record):
    measured = record["comparison"]
    ratio = measured["ratio"]
    return (
        record["network"] + _placed(record) + _sized(record),
        record["baseline"],
        record["precision"],
        record["form"],
        str(record["threads"]),
        f"{measured['a_ms']:.3g}",
        f"{measured['b_ms']:.3g}",
        _percent(ratio["median"]),
        f"{_percent(ratio['low'])} to {_percent(ratio['high'])}",
    )


_TITLES = ("", "costs", "95 % interval", "ms", "beside", "ms", "A/A null", "real?")


def _row(record):
    _, baseline, *_, baseline_ms, ms, costs, interval = _cells(record)
    null = record["comparison"]["null"]
    noise = f"{_percent(null['low'])} to {_percent(null['high'])}"
    return _name(record), costs, interval, ms, baseline, baseline_ms, noise, "yes" if record["is_real"] else "no"


def _name(record):
    """What was measured, in a few words."""
    what = f"{record['network']}{_placed(record)}{_sized(record)}"
    return f"{what}, {record['precision']} {record['form']}, {_threads(record)}"


def _table(titles, rows):
    """A table, without the columns in which nothing is told; only the first one breaks its lines."""
    columns = [column for column in zip(titles, *rows, strict=True) if any(column[1:])]
    head, *body = (
        "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
        for tag, row in zip(("th", *("td",) * len(rows)), zip(*columns, strict=True), strict=True)
    )
    told = "".join(f"<tr>{row}</tr>" for row in body)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{told}</tbody></table></div>'


def _caveats(records):
    """What a reader has to know of single pairs."""
    told = [f"{_name(record)}: measured {record['missing']}" for record in records if record.get("missing")]
    told += [
        f"{_name(record)}: the warmest sensor had {min(record['celsius']):.0f} to {max(record['celsius']):.0f} degrees "
        "Celsius in front of the blocks"
        for record in records
        if record.get("celsius")
    ]
    told += sorted({f"flags of benchmark_model: {' '.join(x['flags'])}" for x in records if x.get("flags")})
    told += [
        f"{_name(record)}: {', '.join(record['undelegated'])} ran outside XNNPACK, on slow kernels"
        for record in records
        if record.get("undelegated")
    ]
    return f"<ul>{''.join(f'<li>{html.escape(line)}.</li>' for line in told)}</ul>" if told else ""


def _memory(records):
    """Sizes, first runs and memory, where they were measured."""
    rows = []
    for record in records:
        for name, side, footprint in zip(
            (record["baseline"], record["network"]), ("a", "b"), record.get("footprints") or (), strict=False
        ):
            spread = record["comparison"].get(side) or {}
            rows.append(
                (
                    f"{name}, {record['precision']} {record['form']}, {_threads(record)}",
                    f"{footprint['bytes'] / 1e6:.1f}",
                    f"{footprint['init_ms']:.0f}",
                    f"{footprint['first_ms']:.1f}",
                    _told(footprint["peak_mb"], ".0f"),
                    " / ".join(f"{spread[q]:.3g}" for q in ("p50", "p90", "p99")) if spread else "",
                    _told(record["comparison"].get(f"{side}_mj"), ".3g"),
                )
            )
    titles = ("", "MB", "init ms", "first run ms", "peak MB", "p50 / p90 / p99 ms", "mJ a run")
    return f"<h3>Files, start and memory</h3>{_table(titles, rows)}" if rows else ""


def _told(value, how):
    """A number, or nothing where the system has not told it."""
    return "" if value is None else f"{value:{how}}"


def _machine(environment):
    affinity = environment.get("affinity")
    cores = environment.get("cores")
    told = {
        "runtime": environment.get("runtime"),
        "system": environment.get("system"),
        "cores": f"{cores}, of which {len(affinity)} may be used" if affinity else cores,
        "governor": environment.get("governor") or "not told by the system",
        "matrix units": ", ".join(environment.get("matrix_units") or ()) or "none",
        "versions": ", ".join(f"{name} {number}" for name, number in (environment.get("versions") or {}).items()),
    }
    rows = "".join(f"<dt>{name}</dt><dd>{html.escape(str(value))}</dd>" for name, value in told.items() if value)
    return f"<h3>Measured on</h3><dl>{rows}</dl>"


def _image(figure, alternative):
    """A picture as part of the page."""
    text = io.StringIO()
    figure.savefig(text, format="svg")
    picture = base64.b64encode(text.getvalue().encode()).decode()
    return f'<img alt="{html.escape(alternative)}" src="data:image/svg+xml;base64,{picture}">'


def _profiles(records):
    """Where the time goes, of each pair that was profiled: a bar for each stage and side, its parts stacked."""
    pictures = []
    for record in records:
        if not record.get("profiles"):
            continue
        plain, other = (
            sum(parts.get(part, 0.0) for parts in side.values() for part in _SE_PARTS) for side in record["profiles"]
        )
        added = other - plain
        text = f"{_name(record)}: squeeze, excitation and scale take {added / 1e3:.2f} ms by the profiler"
        pictures.append(
            f"<figure><figcaption>{html.escape(text)}.</figcaption>{_image(_stages(record), text)}</figure>"
        )
    note = (
        "<p>One file is profiled after the other, not in pairs: what SE's parts take tells more than two heights.</p>"
    )
    return f'<h3>Where the time goes</h3>{note}<div class="pictures">{"".join(pictures)}</div>' if pictures else ""


def _stages(record):
    from matplotlib.figure import Figure

    plain, other = record["profiles"]
    stages = list(dict.fromkeys([*plain, *other]))
    figure = Figure(figsize=(_WIDTH, 3), layout="constrained")
    axes = figure.subplots()
    for side, offset in ((plain, -0.2), (other, 0.2)):
        bottom = [0.0] * len(stages)
        for part, color in _PART_COLORS.items():
            values = [side.get(stage, {}).get(part, 0.0) / 1e3 for stage in stages]
            places = [place + offset for place in range(len(stages))]
            label = part if side is other else None
            axes.bar(places, values, width=0.36, bottom=bottom, color=color, label=label)
            bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    axes.set_xticks(range(len(stages)), stages)
    axes.set_ylabel("ms (left without, right with SE)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(top=1.35 * axes.get_ylim()[1])  # room for the legend
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="upper left")
    return figure


def _picture(records):
    """Ratios with their intervals, the paper's as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, 0.9 + 0.42 * len(records)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(100 * (PAPER["ratio"] - 1), color="0.35", linestyle="--", linewidth=1)
    axes.axvline(0, color="0.7", linewidth=1)
    for place, record in enumerate(records):
        ratio, null = record["comparison"]["ratio"], record["comparison"]["null"]
        middle, low, high = (100 * (ratio[name] - 1) for name in ("median", "low", "high"))
        axes.barh(place, 100 * (null["high"] - null["low"]), left=100 * (null["low"] - 1), height=0.6, color="0.9")
        color = _COLORS.get(record["form"], "black")
        axes.errorbar(middle, place, xerr=[[middle - low], [high - middle]], fmt="o", color=color, capsize=3)
    axes.set_yticks(
        range(len(records)),
        [f"{r['network']}{_placed(r)}\n{r['precision']} {r['form']}, {_threads(r)}" for r in records],
        fontsize=9,
    )
    axes.invert_yaxis()
    axes.set_xlabel("time that is added, %\n(dashed: the paper's; gray: A/A null)")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
