"""The command that runs everything once: train, export, verify, measure."""

import argparse
import shlex
from pathlib import Path

from rich.console import Console

from .arguments import Commands, add_command
from .benchmarking import print_overhead
from .screen import print_json, print_line, print_table, show_progress


def add_quickstart(commands: Commands) -> None:
    """`se-keras quickstart`."""
    add = add_command(commands, "quickstart", quickstart, json_output=True)
    add("-o", "--output", type=Path, default=Path("se_keras_quickstart"), help="folder (default: %(default)s)")


def quickstart(options: argparse.Namespace, console: Console) -> None:
    """Train on real digits, export, verify, and measure what SE costs (two to seven minutes).

    Examples:
      se-keras quickstart
      se-keras quickstart -o /tmp/first --json
    """
    from se_keras import storage
    from se_keras.quickstart import quickstart

    file = options.output / "report.json"
    storage.check_writable(file)
    with show_progress(console) as progress:
        report = quickstart(options.output, progress=progress)
    if options.json:
        return print_json(report)
    rows = [
        (name, f"{run['test_accuracy']:.1%}", f"{run['parameters'] / 1e3:,.0f}k weights", "", "")
        for name, run in report["training"].items()
    ]
    for name, made in report["exports"].items():
        accuracy = f"{made['test_accuracy']:.1%}" if "test_accuracy" in made else ""
        top1, error = made["agreement"]["top1"], made["agreement"]["max_error"]
        rows.append((name, accuracy, f"{made['bytes'] / 1e3:,.0f} kB", f"{top1:.1%}", f"{error:.0e}"))
    print_table(("", "test accuracy", "size", "top-1 as Keras", "max error"), rows, title="Trained on the digits")
    print_overhead(report, console)
    page = options.output / "report.html"
    print_line(
        f"Everything is in {options.output} ({report['seconds']:.0f} s): look at {page}; the figures are in {file}"
    )
    print_line(f"Next: se-keras inspect {shlex.quote(str(options.output / 'digits_int8.tflite'))}")
