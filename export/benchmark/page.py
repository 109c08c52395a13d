"""The page of the report: first what it costs, then where the time goes, the numbers, and how they were measured."""

import html
import itertools
import json
import string
from collections import Counter
from collections.abc import Sequence
from importlib import resources

from se_keras.typing import Json
from se_keras.wording import counted

from .charts import Difference, Stack, difference_chart, legend, stack_chart, typeset
from .results import AS_GIVEN, PAPER, device_of, machine
from .sentences import (
    cells,
    doubts,
    first,
    headline,
    interval,
    is_counted,
    is_of_files,
    label,
    network_at_size,
    percent,
    placement,
)

_SE_PARTS = ("squeeze", "excitation", "scale")
_PARTS = ("convolution", "add", "classifier", "other", *_SE_PARTS)  # in a bar, from left to right
_KINDS = {"published": "published", "lowered": "lowered", AS_GIVEN: "given"}  # of bars
_OF_THE_CATALOGUE = (
    f"<p>The paper (arXiv:1709.01507, section 4) reports {PAPER['resnet50_ms']} ms for ResNet-50 and "
    f"{PAPER['se_resnet50_ms']} ms for SE-ResNet-50 on a CPU: {percent(PAPER['ratio'])}. Times depend on shapes, not "
    "on weights. Networks of the catalogue were measured with random weights: their times say nothing about "
    "accuracy.</p>"
    "<p><i>published</i> is the network as the paper defines it; <i>lowered</i> is the same function with BatchNorm "
    "folded and the squeeze hoisted. Network and baseline are lowered in the same way.</p>"
)


def page(results: Sequence[Json]) -> str:
    """The page of results that have at least one measured pair."""
    devices = _devices(results)
    records = _with_device(devices)
    paper = not all(map(is_of_files, records))
    title = "What squeeze-and-excitation costs"
    if not paper:
        title = f"{records[0]['network']} compared with {records[0]['baseline']}"
    template = resources.files("se_keras.export.benchmark").joinpath("report.html").read_text(encoding="utf-8")
    return string.Template(template).substitute(
        title=html.escape(title),
        figures=_figures(results),
        headline=typeset(headline(results) or ""),
        chart=_overview_charts(records),
        sections=f"{_side_by_side(records)}{_profiles(records)}{_numbers(records)}{_footprints(records)}",
        catalogue=_OF_THE_CATALOGUE if paper else "",
        machines="".join(itertools.starmap(_machine, devices)),
        data=json.dumps(results).replace("</", "<\\/"),  # a script ends at the first closing tag
    )


def _devices(results):
    """`[(name, environment, records)]`: the records of each device, those of one file and device together."""
    found = []
    for of_file in results:
        devices = {}
        for record in of_file["overhead"]:
            environment = device_of(record, of_file)
            key = environment["processor"], environment.get("id")
            devices.setdefault(key, (environment, []))[1].append(record)
        found += devices.values()
    names = [machine(environment) for environment, _ in found]
    counts = Counter(names)
    return [
        (f"{name} ({number})" if counts[name] > 1 else name, environment, records)
        for number, (name, (environment, records)) in enumerate(zip(names, found, strict=True), 1)
    ]


def _with_device(devices):
    """All records, each with the name of its device if there are several; those that differ in the variant in a row."""
    several = len(devices) > 1
    records = [record | {"device": name if several else ""} for name, _, of_device in devices for record in of_device]
    order = {key: number for number, key in reversed([*enumerate(map(_all_but_variant, records))])}
    return sorted(records, key=lambda record: order[_all_but_variant(record)])


def _all_but_variant(record):
    return record["device"], network_at_size(record), record["baseline"], record["threads"], record["precision"]


def _label(record):
    return ", ".join(filter(None, (record["device"], label(record))))


def _figures(results):
    """The figure that the sentence is about, and the paper's."""
    record, _ = first(results)
    ratio = record["comparison"]["ratio"]
    kind, noise = (_kind(record), "") if record["is_real"] else ("noise", ", not larger than the noise")
    text = "instructions, counted: not a time" if is_counted(record) else f"95 % interval: {interval(ratio)}{noise}"
    shown = [(percent(ratio["median"]), text, f"measured {kind}")]
    if not is_of_files(record) and not is_counted(record):
        times = f"{PAPER['resnet50_ms']} ms, with SE {PAPER['se_resnet50_ms']} ms"
        shown.append((percent(PAPER["ratio"]), f"ResNet-50 in the paper: {times}", "paper"))
    return "".join(
        f'<p class="{kind}"><strong>{typeset(figure)}</strong> <span>{typeset(text)}</span></p>'
        for figure, text, kind in shown
    )


def _kind(record):
    """The class of a record's color."""
    return _KINDS.get(record["form"], "given")


# The chart of all pairs


def _overview_charts(records):
    """All pairs as rows: a chart of those that measure time, and one of those that count instructions."""
    charts = {}
    for record, text in zip(records, _short_labels(records), strict=True):
        charts.setdefault(is_counted(record), []).append((record, _difference(record, text)))
    return "".join(_overview_chart(*zip(*charts[counts], strict=True)) for counts in sorted(charts))


def _overview_chart(records, rows):
    kinds = {row.kind for row in rows}
    signs = {kind: form for form, kind in _KINDS.items() if kind in kinds and len(kinds) > 1}
    signs |= {"interval": "95 % interval", "control": "A/A control: the same file twice"}
    if any(row.reference for row in rows):
        signs["reference"] = f"the paper's {percent(PAPER['ratio'])}"
    what = "Instructions" if is_counted(records[0]) else "Time"
    caption = f"Difference in {what.lower()}" if kinds == {"given"} else f"{what} that squeeze-and-excitation adds"
    return f"<figure><figcaption>{caption}</figcaption>{legend(signs)}{difference_chart(rows)}</figure>"


def _short_labels(records):
    """Names that say what differs between the records, and always precision and variant, or which file it is."""
    columns = [
        [record["device"] for record in records],
        [f"{record['network']}{placement(record.get('se'))}" for record in records],
        ["x".join(map(str, record["input_shape"][1:3])) for record in records],
        [counted(record["threads"], "thread") for record in records],
    ]
    names = columns[1] if any(map(is_of_files, records)) else ()
    shown = [column for column in columns if column is names or len(set(column)) > 1]
    shown.append([x["precision"] if is_of_files(x) else f"{x['precision']} {x['form']}" for x in records])
    return [", ".join(texts) for texts in zip(*shown, strict=True)]


def _difference(record, text):
    ratio, control = ([100 * (x[y] - 1) for y in ("median", "low", "high")] for x in _ratios(record))
    return Difference(
        label=text,
        kind=_kind(record),
        value=ratio[0],
        interval=(ratio[1], ratio[2]),
        control=(control[1], control[2]),
        is_real=record["is_real"],
        reference=None if is_of_files(record) or is_counted(record) else 100 * (PAPER["ratio"] - 1),
    )


def _ratios(record):
    return record["comparison"]["ratio"], record["comparison"]["null"]


# Sections


def _side_by_side(records):
    """Devices as rows, if there are several: what each measured pair costs there."""
    devices = list(dict.fromkeys(record["device"] for record in records))
    if len(devices) < 2:
        return ""
    labels = _short_labels([record | {"device": ""} for record in records])
    labels = [f"{x}, instructions" if is_counted(y) else x for x, y in zip(labels, records, strict=True)]
    shown = {(x["device"], label): x["comparison"]["ratio"] for x, label in zip(records, labels, strict=True)}
    columns = list(dict.fromkeys(labels))
    rows = [(device, *(_cost(shown.get((device, label))) for label in columns)) for device in devices]
    name = "Devices side by side"
    return f"<section><h2>{name}</h2>{_table(('', *columns), rows, name)}</section>"


def _cost(ratio):
    return f"{percent(ratio['median'])} [{interval(ratio)}]" if ratio else ""


def _profiles(records):
    """Where the time goes, for each pair that was profiled."""
    figures = [_profile(record) for record in records if record.get("profiles")]
    if not figures:
        return ""
    note = (
        "For each stage, the thin bar is the baseline and the thick one the network. The two files are profiled one "
        "after the other, not in pairs. Therefore the time of SE's parts is more exact than the difference between two "
        "bars."
    )
    signs = legend({f"part {part}": part for part in _PARTS if any(part in parts for parts in _parts(records))})
    pictures = f'<div class="pictures">{"".join(figures)}</div>'
    return f"<section><h2>Where the time goes</h2><p>{note}</p>{signs}{pictures}</section>"


def _parts(records):
    return [parts for record in records for side in record.get("profiles") or () for parts in side.values()]


def _profile(record):
    """The stages of a pair, and a sentence on what SE takes in all of them."""
    without, with_se = record["profiles"]
    stages = dict.fromkeys([*without, *with_se])
    chart = stack_chart([_stage(stage, without.get(stage, {}), with_se.get(stage, {})) for stage in stages])
    (before, own_before), (after, own_after) = (
        [sum(_sum(parts, of) for parts in side.values()) for of in (_PARTS, _SE_PARTS)] for side in (without, with_se)
    )
    text = f"squeeze, excitation and scale take {_time(own_after - own_before)} in the profiler"
    if not own_before + own_after:
        text = f"the operators take {_time(after)} in the profiler, those of {record['baseline']} {_time(before)}"
    return f"<figure><figcaption>{html.escape(f'{_label(record)}: {text}.')}</figcaption>{chart}</figure>"


def _stage(stage, before, after):
    own = _sum(after, _SE_PARTS)
    return Stack(
        label="outside the stages" if stage == "outside" else stage,
        before={part: before.get(part, 0.0) for part in _PARTS},
        after={part: after.get(part, 0.0) for part in _PARTS},
        value=_time(_sum(after, _PARTS)),
        remark=f"SE {_time(own)}" if own else f"baseline {_time(_sum(before, _PARTS))}",
    )


def _sum(parts, of):
    """Microseconds of some parts of a stage."""
    return sum(parts.get(part, 0.0) for part in of)


def _time(us):
    """Microseconds as text, in milliseconds from 0.01 on."""
    return f"{us / 1e3:.3g} ms" if abs(us) >= 10 else f"{us:.2g} us"


def _numbers(records):
    rows = []
    for record in records:
        _, baseline, *_, by_baseline, taken, cost, between = cells(record)
        control, real = interval(record["comparison"]["null"]), "yes" if record["is_real"] else "no"
        rows.append((_label(record), cost, between, taken, baseline, by_baseline, control, real))
    titles = ("", "difference", "95 % interval", "network", "compared with", "baseline", "A/A control", "real?")
    return f"<section><h2>The numbers</h2>{_table(titles, rows, 'The numbers')}{_notes(records)}</section>"


def _notes(records):
    """Notes on single pairs that a reader has to know."""
    notes = [f"{_label(record)}: measured {record['missing']}" for record in records if record.get("missing")]
    notes += [f"{_label(record)}: {doubt}" for record in records for doubt in doubts(record)]
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
            variant = f"{name}, {record['precision']} {record['form']}, {counted(record['threads'], 'thread')}"
            row = (
                ", ".join(filter(None, (record["device"], variant))),
                f"{footprint['bytes'] / 1e6:.1f}",
                f"{footprint['init_ms']:.0f}",
                f"{footprint['first_ms']:.1f}",
                _number(footprint["peak_mb"], ".0f"),
                " / ".join(f"{spread[q]:.3g}" for q in ("p50", "p90", "p99")) if spread else "",
                _number(record["comparison"].get(f"{side}_mj"), ".3g"),
            )
            rows.append(row)
    titles = ("", "MB", "init ms", "first run ms", "peak MB", "p50 / p90 / p99 ms", "mJ a run")
    name = "Files, start and memory"
    return f"<section><h2>{name}</h2>{_table(titles, rows, name)}</section>" if rows else ""


def _number(value, spec):
    """A number; empty where the system did not report it."""
    return "" if value is None else f"{value:{spec}}"


def _table(titles, rows, name):
    """A table without its empty columns, in a frame that scrolls; only the first column breaks its lines."""
    columns = [column for column in zip(titles, *rows, strict=True) if any(column[1:])]
    head, *body = zip(*columns, strict=True)
    lines = "".join(_row(texts, "td") for texts in body)
    table = f"<table><thead>{_row(head, 'th')}</thead><tbody>{lines}</tbody></table>"
    return f'<div class="wide" role="region" aria-label="{name}" tabindex="0">{table}</div>'


def _row(texts, tag):
    return f"<tr>{''.join(f'<{tag}>{html.escape(text)}</{tag}>' for text in texts)}</tr>"


_REPORTED = {  # what devices report of themselves, by the name that the page shows
    "runtime": "runtime",
    "accelerator": "accelerator",
    "adapter": "GPU",
    "system": "system",
    "model": "model",
    "user_agent": "browser",
    "device_memory": "memory, GB",
    "hardware_concurrency": "cores",
    "timer_step_ms": "step of the clock, ms",
    "secure_context": "secure context",
    "cross_origin_isolated": "isolated from other sites",
}


def _machine(name, environment, records):
    """What measured the records."""
    cores, affinity = environment.get("cores"), environment.get("affinity")
    plans = {(x["comparison"].get("blocks"), x["comparison"].get("runs")) for x in records}
    is_here = environment.get("target", "host") == "host"
    facts = {title: environment.get(key) for key, title in _REPORTED.items()}
    facts = {title: {True: "yes", False: "no"}.get(value, value) for title, value in facts.items()} | {
        "cores": f"{cores}, of which {len(affinity)} may be used" if affinity else cores or facts["cores"],
        "governor": environment.get("governor") or ("not reported by the system" if is_here else None),
        "matrix units": ", ".join(environment.get("matrix_units") or ()) or ("none" if is_here else None),
        "blocks": "; ".join(f"{counted(b, 'block')} of {counted(r, 'run')}" for b, r in sorted(plans) if b and r),
        "versions": ", ".join(f"{name} {number}" for name, number in (environment.get("versions") or {}).items()),
    }
    rows = "".join(
        f"<dt>{title}</dt><dd>{html.escape(str(value))}</dd>"
        for title, value in facts.items()
        if value not in (None, "")
    )
    what = "Counted for" if any(map(is_counted, records)) else "Measured on"
    return f"<h3>{what} {html.escape(name)}</h3><dl>{rows}</dl>"
