"""The command that shows where a LiteRT file spends its time."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from .arguments import POSITIVE, THREADS, Commands, add_command
from .screen import print_json, print_line, print_table, show_progress

SLOWEST = 10  # operators that are shown


def add_profile(commands: Commands) -> None:
    """`se-keras profile FILE`."""
    add = add_command(commands, "profile", profile, json_output=True)
    add("file", metavar="FILE", type=Path, help="a .tflite file")
    add("--against", metavar="BASELINE", type=Path, help="a file to compare it with")
    add("--threads", type=THREADS, default=1, help="default: %(default)s")
    add("--runs", type=POSITIVE, default=50, help="default: %(default)s")


def profile(options: argparse.Namespace, console: Console) -> None:
    """Show where a LiteRT file spends its time and, with --against, what SE adds to a baseline.

    Examples:
      se-keras profile se_resnet50_int8.tflite
      se-keras profile se.tflite --against plain.tflite --threads 2
    """
    from se_keras.export.benchmark.profiler import noise, profile
    from se_keras.export.litert.file import load_litert

    paths = {"file": options.file}
    if options.against:  # its second profile is the A/A control
        paths = {"against": options.against, "file": options.file, "control": options.against}
    found = {}
    with show_progress(console) as progress:
        for side, path in paths.items():
            progress(f"profiling {path}")
            found[side] = profile(load_litert(path), threads=options.threads, runs=options.runs)
    if options.json:
        return print_json({side: x.to_json() for side, x in found.items()})
    _print_stages(found["file"].table(), lambda _, us: f"{us:,.0f}", title=f"{options.file}: us by stage and part")
    if options.against:
        _print_added(found, noise(found["against"], found["control"]), options.against)
    slowest = sorted(found["file"].rows, key=lambda row: -row.microseconds)[:SLOWEST]
    rows = ((row.layer or "-", row.operator, f"{row.microseconds:,.0f}", row.kernel) for row in slowest)
    print_table(("slowest", "operator", "us", "kernel"), rows)
    columns = ("us", "in operators", "not attributed", "a run", "a run with the profiler")
    figures = ((x.total_us, x.unattributed, x.run_us, x.profiled_us) for x in found.values())
    print_table(columns, ((side, *(f"{x:,.0f}" for x in row)) for side, row in zip(found, figures, strict=True)))
    for side, x in found.items():
        if x.others:
            print_line(f"{paths[side]}: not delegated to XNNPACK: {', '.join(x.others)}")


def _print_stages(table, text, *, title, caption=None):
    """Prints a row for each stage and a column for each part that is not zero everywhere: `text(part, us)`."""
    parts = [part for part in table["all"] if any(row[part] for row in table.values())]
    rows = [(stage, *(text(part, row[part]) for part in parts)) for stage, row in table.items()]
    print_table(("", *parts), rows, title=escape(title), caption=caption, padding=0)


def _print_added(found, noise, baseline):
    """Prints what the file takes in addition to the baseline, and what of it can be noise."""
    a, b = found["against"].table(), found["file"].table()
    stages, nothing = sorted(b | a, key="all".__eq__), dict.fromkeys(noise, 0.0)
    added = {
        stage: {part: b.get(stage, nothing)[part] - a.get(stage, nothing)[part] for part in noise} for stage in stages
    }

    def text(part, us):
        return f"{us:+,.0f}" if abs(us) > noise[part] else f"({us:+,.0f})"

    caption = "In parentheses: not larger than the differences between two profiles of the baseline."
    _print_stages(added, text, title=f"added to {baseline}: us by stage and part", caption=caption)
    if abs(difference := added["all"]["all"]) <= noise["all"]:
        print_line(
            f"The noise is larger than the difference of all operators, {difference:+,.0f} us:\n"
            f"two profiles of the baseline differ by {noise['all']:,.0f} us. se-keras benchmark measures it."
        )
