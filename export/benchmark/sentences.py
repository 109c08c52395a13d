"""Records of results.json in words, for the terminal, for tables and for the page."""

import math
from collections.abc import Sequence

from se_keras.typing import Json
from se_keras.wording import counted

from .results import AS_GIVEN, PAPER, device_of, machine

_EXACT = 1e-5  # of a ratio: counts of instructions repeat to this
_MOST_DRIFT = 1.1  # on an idle machine, the thirds of a measurement differ by a few percent


def headline(results: Sequence[Json]) -> str | None:
    """The first result as a sentence, of a lowered network if there is one; None without results."""
    found = first(results)
    if found is None:
        return None
    record, environment = found
    return f"On {machine(environment)} with {counted(record['threads'], 'thread')}, {_claim(record)}."


def first(results: Sequence[Json]) -> tuple[Json, Json] | None:
    """The record that the headline is about, and its environment: the first one of a lowered network, or of all."""
    for found in results:
        lowered = [record for record in found["overhead"] if record["form"] != "published"]
        for record in lowered or found["overhead"]:
            return record, device_of(record, found)
    return None


def is_of_files(record: Json) -> bool:
    """Whether a record compares two files of the user, of which the paper says nothing."""
    return record["form"] == AS_GIVEN


def is_counted(record: Json) -> bool:
    """Whether a record counts instructions, which say nothing about time."""
    return "a_instructions" in record["comparison"]


def amount(record: Json, side: str) -> str:
    """What side `"a"` or `"b"` of a record takes, without its unit."""
    if is_counted(record):
        return _millions(record["comparison"][f"{side}_instructions"]["total"])
    return f"{record['comparison'][f'{side}_ms']:.3g}"


def unit(record: Json) -> str:
    """The unit of `amount`."""
    return "million instructions" if is_counted(record) else "ms"


def added_by_kind(record: Json) -> dict[str, float]:
    """The instructions that the network executes more than its baseline, by kind, as shares of the baseline's total."""
    a, b = (record["comparison"][f"{side}_instructions"] for side in "ab")
    added = {kind: (b[kind] - a.get(kind, 0)) / a["total"] for kind in b}
    return dict(sorted(added.items(), key=lambda item: -item[1]))


def _millions(number):
    """A number in millions, with three digits or more."""
    return f"{number / 1e6:,.0f}" if abs(number) >= 1e8 else f"{number / 1e6:.3g}"


def percent(ratio: float) -> str:
    """A ratio as a difference: "+1.8 %"."""
    return f"{100 * (ratio - 1):+.1f} %"


def interval(ratio: Json) -> str:
    """The interval of a ratio as two differences: "+1.0 % to +1.5 %"; "exact" if they are equal, as of counts."""
    if math.isclose(ratio["low"], ratio["high"], rel_tol=_EXACT):
        return "exact"
    return f"{percent(ratio['low'])} to {percent(ratio['high'])}"


def placement(se: Json | None) -> str:
    """Site and stages of squeeze-and-excitation as text, " at 3x3, stages 3 4". Empty if as published, or for files."""
    if se is None:
        return ""
    site = "" if se["site"] == "standard" else f" at {se['site']}"
    return site if se["stages"] == "all" else f"{site}, stages {' '.join(map(str, se['stages']))}"


def network_at_size(record: Json) -> str:
    """The network of a record with the place of its squeeze-and-excitation and the size of its images."""
    height, width = record["input_shape"][1:3]
    return f"{record['network']}{placement(record.get('se'))} at {height}x{width}"


def setting(record: Json) -> str:
    """Precision, variant and threads of a record."""
    return f"{record['precision']} {record['form']}, {counted(record['threads'], 'thread')}"


def label(record: Json) -> str:
    """A name of a measured pair."""
    return f"{network_at_size(record)}, {setting(record)}"


def cells(record: Json) -> tuple[str, ...]:
    """A row for a record: network, baseline, precision, variant, threads, what both take, cost, interval."""
    comparison = record["comparison"]
    return (
        network_at_size(record),
        record["baseline"],
        record["precision"],
        record["form"],
        str(record["threads"]),
        *(f"{amount(record, side)} {unit(record)}" for side in "ab"),
        percent(comparison["ratio"]["median"]),
        interval(comparison["ratio"]),
    )


def doubts(record: Json) -> list[str]:
    """Why a measurement does not show a difference, or may show another one next time: a text for each reason."""
    comparison, found = record["comparison"], []
    ratio, difference = comparison["ratio"], f"the difference, {_with_interval(comparison)},"
    if ratio["low"] <= 1 <= ratio["high"]:
        found.append(f"{difference} has an interval that contains zero")
    elif not record["is_real"]:
        noise = f"two copies of {record['baseline']} differ by {interval(comparison['null'])}"
        found.append(f"{difference} is not larger than the noise: {noise}")
    if (drift := comparison.get("drift") or 1.0) > _MOST_DRIFT:
        found.append(f"the time of {record['baseline']} changed by {drift - 1:.0%} while it was measured")
    return found


def _claim(record):
    """The claim that the interval of a record supports."""
    comparison, ratio = record["comparison"], record["comparison"]["ratio"]
    does, more = ("executes", "instructions") if is_counted(record) else ("takes", "time")
    pair = f"{network_at_size(record)} in {record['precision']} {does}"
    if not record["is_real"]:
        noise = f"the difference, {_with_interval(comparison)}, is not larger than the noise of this machine"
        return f"{pair} as {'many instructions' if is_counted(record) else 'long'} as {record['baseline']}: {noise}"
    difference = f"{100 * abs(ratio['median'] - 1):.1f} % {'more' if ratio['median'] > 1 else 'less'}"
    claim = f"{pair} {difference} {more} than {record['baseline']}"
    if is_counted(record):
        return claim
    claim = f"{claim} [{interval(ratio)}]"
    if not _is_the_papers_pair(record):
        return claim
    below = "less than" if ratio["high"] < PAPER["ratio"] else "as much as"
    compared = "more than" if ratio["low"] > PAPER["ratio"] else below
    return f"{claim}, {compared} the paper's {percent(PAPER['ratio'])}"


def _is_the_papers_pair(record):
    """Whether the paper reports the time of this pair: SE-ResNet-50 as published, at 224x224, in float32."""
    pair = (record["network"], record["baseline"], record["precision"]) == ("se_resnet50", "resnet50", "float32")
    return (
        pair
        and not is_counted(record)
        and not placement(record.get("se"))
        and list(record["input_shape"][1:3]) == [224, 224]
    )


def _with_interval(comparison):
    return f"{percent(comparison['ratio']['median'])} [{interval(comparison['ratio'])}]"
