"""Results of the benchmark, read from files and shown as a page of HTML or as a Markdown table."""

import math
from collections.abc import Sequence
from pathlib import Path

from se_keras.records import read_json
from se_keras.typing import FilePath, Json

from .page import page
from .results import PAPER, ResultsRecord, device_of, machine
from .sentences import cells, headline, is_of_files, percent

__all__ = ["SCHEMA", "as_html", "as_markdown", "headline", "read"]
SCHEMA = 1


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
    for record in results["overhead"]:
        if not _has_plausible_numbers(record):
            rule = "Ratios, times and counts must be finite and above 0, profiled times finite and at least 0"
            raise ValueError(f"{rule}. Received: others for {record['network']} in {str(path)!r}")
    return results


def _has_plausible_numbers(record):
    ratios = [record["comparison"][name][field] for name in ("ratio", "null") for field in ("median", "low", "high")]
    comparison = record["comparison"]
    for side in "ab":
        counts = comparison.get(f"{side}_instructions")
        ratios.append(comparison.get(f"{side}_ms") if counts is None else counts.get("total"))
    times = [x for side in record.get("profiles") or () for parts in side.values() for x in parts.values()]
    return all(x is not None and 0 < x < math.inf for x in ratios) and all(0 <= x < math.inf for x in times)


def as_markdown(results: Sequence[Json]) -> str:
    """A table for a README, with a row for each pair, and one of the paper's unless all are files of the user."""
    first, second = "SE", "cost of SE"
    rows = [(*cells(x), machine(device_of(x, found))) for found in results for x in found["overhead"]]
    if rows and all(is_of_files(record) for found in results for record in found["overhead"]):
        first, second = "network", "difference"
    else:
        times = f"{PAPER['resnet50_ms']} ms", f"{PAPER['se_resnet50_ms']} ms", percent(PAPER["ratio"])
        pair = "se_resnet50", "resnet50", "float32", "the paper's"
        rows.insert(0, (*pair, "", *times, "", "arXiv:1709.01507, section 4"))
    lines = [
        f"| network | baseline | precision | variant | threads | baseline | {first} | {second} | 95 % interval "
        "| machine |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def as_html(results: Sequence[Json]) -> str:
    """One page with all charts and all data in it; raises ValueError if there are no results."""
    if headline(results) is None:
        raise ValueError("A report needs results. Received: none")
    return page(results)
