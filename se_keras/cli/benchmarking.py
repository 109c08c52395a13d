"""The commands that measure time: of LiteRT files, operators, training input and training steps."""

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from .arguments import PRECISIONS, SITES, VARIANTS, Commands, add_command, input_shape, one_of
from .screen import new_table, print_json, print_line, print_message, print_table, ratio_cells, show_progress

SLOWEST = 10  # operators that `profile` shows
SIZE = "height and width (default: the network's own)"
BLOCKS = "paired measurements (default: %(default)s)"


def add_benchmark(commands: Commands) -> None:
    """`se-keras benchmark`."""
    parser = add_command(commands, "benchmark", benchmark, json_output=True)
    network = "networks to compare with their baselines (default: se_resnet50)"
    parser.add_argument("--network", nargs="+", default=["se_resnet50"], metavar="NAME", help=network)
    files = "two .tflite files instead: B relative to A"
    parser.add_argument("--files", type=Path, nargs=2, metavar=("A", "B"), help=files)
    output = "keep each result as it is measured; the same command measures what is missing"
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.json", help=output)
    precision = f"{one_of(PRECISIONS)} (default: float32 int8)"
    parser.add_argument("--precision", nargs="+", default=["float32", "int8"], help=precision)
    parser.add_argument("--form", nargs="+", default=[*VARIANTS], help=f"{one_of(VARIANTS)} (default: both)")
    parser.add_argument("--site", help=f"where in a block SE is: {one_of(SITES)} (default: the network's own)")
    parser.add_argument("--stages", type=int, nargs="+", metavar="N", help="the stages with SE: 2 to 5 of a ResNet")
    parser.add_argument("--size", type=int, help=SIZE)
    parser.add_argument("--threads", type=int, nargs="+", default=[1], metavar="N", help="default: 1")
    parser.add_argument("--blocks", type=int, default=30, help=BLOCKS)
    parser.add_argument("--within", type=float, metavar="X", help="stop when the interval is this narrow, such as 0.01")
    parser.add_argument("--seconds", type=float, metavar="S", help="stop a comparison after this time")
    parser.add_argument("--profile", action="store_true", help="profile the files too, for the report")
    undelegated = "measure even if operators are not delegated to XNNPACK"
    parser.add_argument("--allow-undelegated", action="store_true", help=undelegated)
    _add_phone(parser)


def _add_phone(parser):
    parser.add_argument("--adb", action="store_true", help="measure on a phone: docs/phone.md")
    parser.add_argument("--serial", metavar="S", help="serial number of the phone, if there are several")
    binary = "LiteRT's binary for the phone, or device:/path of one on it"
    parser.add_argument("--benchmark-model", metavar="PATH", help=binary)
    rest = "seconds for the phone to cool down between blocks (default: 5)"
    parser.add_argument("--rest", type=float, default=5.0, metavar="S", help=rest)


def benchmark(options: argparse.Namespace, console: Console) -> None:
    """Measure what squeeze-and-excitation costs, or compare two LiteRT files.

    Examples:
      se-keras benchmark
      se-keras benchmark --network se_resnet50 se_mobilenet --threads 1 2 -o results.json
      se-keras benchmark --precision int8 --form lowered --site 3x3
      se-keras benchmark --stages 3 4 5 --within 0.005
      se-keras benchmark --files plain.tflite se.tflite --json
      se-keras benchmark --adb --benchmark-model benchmark_model -o phone.json
    """
    from se_keras import storage
    from se_keras.export.benchmark import results
    from se_keras.timing import check_plan

    if options.profile and (options.files or options.adb):
        raise ValueError("--profile is for --network on this machine: se-keras profile A --against B profiles files")
    if options.adb and options.benchmark_model is None:
        raise ValueError("--adb needs --benchmark-model PATH, LiteRT's binary for the phone: docs/phone.md")
    check_plan(options.blocks, 1)
    with show_progress(console) as progress:
        measure, environment = _device(options, progress)
        report = {"schema": 1, "environment": environment, "overhead": [], "paper": results.PAPER}
        if options.output:
            storage.check_writable(options.output)
            if options.output.exists():
                report["overhead"] = _earlier(options.output, report)
                progress(f"{options.output} has {len(report['overhead'])} results: only what is missing is measured")
        for found in _measured(options, tuple(report["overhead"]), measure, progress):
            record = json.loads(json.dumps(found.to_json()))  # as a file has it
            cell = results.Cell.of(record)
            others = [x for x in report["overhead"] if results.Cell.of(x) != cell or not x.get("missing")]
            report["overhead"] = [*others, record]  # replaces a partial one
            if options.output:
                storage.write_json(options.output, report)
            if missing := found.device.missing:
                print_message(console, f"warning: measured {missing}. The same command measures the rest")
                break
    if options.json:
        return print_json(report)
    for records in _tables(report["overhead"]):
        print_overhead(report | {"overhead": records})


def _device(options, progress):
    """What measures a pair of files, on this machine or on a phone, and the environment of that device."""
    from se_keras.environment import environment
    from se_keras.export.benchmark.targets import adb, host

    plan = {
        "blocks": options.blocks,
        "within": options.within,
        "seconds": options.seconds,
        "allow_undelegated": options.allow_undelegated,
    }
    if not options.adb:
        return partial(host.measure, **plan), environment()
    adb.require_binary(options.benchmark_model)  # before a minute of exporting
    phone = {"benchmark_model": options.benchmark_model, "serial": options.serial, "rest": options.rest}
    return partial(adb.measure, **plan, **phone, progress=progress), adb.environment(options.serial)


def _earlier(path, report):
    """The records of an earlier run on the same machine and versions.

    Raises:
        ValueError: If the machine or the versions are others, because ratios of two machines do not belong in one
            table; or if the file has more than this command writes.
    """
    from se_keras.export.benchmark.report import read

    earlier = read(path)
    if more := set(earlier) - set(report):
        raise ValueError(f"The file has more than results of benchmark, {', '.join(sorted(more))}: take a new one")
    for name, other in {"processor": "another processor", "versions": "other versions"}.items():
        if (found := earlier["environment"].get(name)) != report["environment"][name]:
            raise ValueError(f"The results there were measured with {other}: take a new file. Received: {found}")
    return earlier["overhead"]


def _measured(options, kept, measure, progress) -> Iterator[Any]:
    """Yields each `Overhead` that the options ask for and that is not among the records `kept`."""
    from se_keras.catalogue import spec_of
    from se_keras.export.benchmark import overhead
    from se_keras.export.litert.file import load_litert

    if options.files:
        stems = [path.stem for path in options.files]
        names = stems if len(set(stems)) == 2 else list(map(str, options.files))
        a, b = map(load_litert, options.files)
        yield from overhead.overheads_of_files(
            a, b, names=names, threads=options.threads, kept=kept, measure=measure, progress=progress
        )
        return
    for network in options.network:
        se = spec_of(network).se
        if se and options.site:
            se = replace(se, site=options.site)
        if se and options.stages:
            se = replace(se, stages=tuple(options.stages))
        yield from overhead.overheads(
            network,
            precisions=options.precision,
            variants=options.form,
            se=se,
            input_shape=input_shape(network, options.size),
            threads=options.threads,
            kept=kept,
            profiled=options.profile,
            measure=measure,
            progress=progress,
        )


def _tables(records):
    """The records in groups that share a table: one network, configuration, input and number of threads each."""
    tables = {}
    for record in records:
        names = record["network"], record["baseline"]
        key = *names, record["threads"], tuple(record["input_shape"]), str(record["se"])
        tables.setdefault(key, []).append(record)
    return tables.values()


def print_overhead(report: dict[str, Any]) -> None:
    """Prints one row for each pair, after the paper's."""
    from se_keras.export.benchmark.results import placement, thread_count

    records, paper, environment = report["overhead"], report["paper"], report["environment"]
    first = records[0]
    size = "x".join(map(str, first["input_shape"][1:3]))
    threads = thread_count(first["threads"])
    caption = f"{environment['processor']}, {environment['runtime']}."
    if environment["matrix_units"]:
        units = ", ".join(environment["matrix_units"])
        caption += f" Matrix units ({units}) speed up int8 convolutions, not SE's multiplication: SE costs more here."
    title = escape(f"{first['network']}{placement(first['se'])} compared with {first['baseline']} at {size}, {threads}")
    of_files = first["se"] is None
    sides = (escape(first["baseline"]), escape(first["network"])) if of_files else ("plain", "SE")
    table = _comparison_table(*sides, title=title, caption=caption)
    if not of_files:
        paper_ms = (str(paper["resnet50_ms"]), str(paper["se_resnet50_ms"]))
        table.add_row("paper, ResNet-50", *paper_ms, f"{paper['ratio']:.3f}", "", "")
    for record in records:
        table.add_row(f"{record['precision']} {record['form']}", *_comparison_cells(record["comparison"], ".3g"))
    print_table(table)


def _comparison_table(a, b, **options):
    return new_table("", f"{a} ms", f"{b} ms", "ratio", "95 % interval", "A/A control", **options)


def _comparison_cells(comparison, milliseconds):
    _, control = ratio_cells(comparison["null"])
    times = (f"{comparison[side]:{milliseconds}}" for side in ("a_ms", "b_ms"))
    return *times, *ratio_cells(comparison["ratio"]), control


def add_profile(commands: Commands) -> None:
    """`se-keras profile FILE`."""
    parser = add_command(commands, "profile", profile, json_output=True)
    parser.add_argument("file", metavar="FILE", type=Path, help="a .tflite file")
    parser.add_argument("--against", metavar="BASELINE", type=Path, help="a file to compare it with")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--runs", type=int, default=50, help="default: %(default)s")


def profile(options: argparse.Namespace, console: Console) -> None:
    """Show where a LiteRT file spends its time, and what SE added to another.

    Examples:
      se-keras profile se_resnet50_int8.tflite
      se-keras profile se.tflite --against plain.tflite --threads 2
    """
    from se_keras.export.benchmark.profiler import PARTS, profile
    from se_keras.export.litert.file import load_litert

    paths = {"file": options.file} | ({"against": options.against} if options.against else {})
    found = {}
    with show_progress(console) as progress:
        for side, path in paths.items():
            progress(f"profiling {path}")
            found[side] = profile(load_litert(path), threads=options.threads, runs=options.runs)
    if options.json:
        return print_json({side: x.to_json() for side, x in found.items()})
    names = " compared with ".join(map(str, paths.values()))
    table = new_table("", *PARTS, "all", title=escape(f"{names}, us by stage and part"))
    sums = [x.by("stage", "part") for x in found.values()]
    for stage in dict.fromkeys(row.stage for x in found.values() for row in x.rows):
        table.add_row(
            stage or "outside", *_profile_cells([[x.get((stage, part), 0.0) for part in PARTS] for x in sums])
        )
    totals = [[sum(row.microseconds for row in x.rows if row.part == part) for part in PARTS] for x in found.values()]
    table.add_row("all", *_profile_cells(totals))
    print_table(table)
    slowest = new_table("slowest", "operator", "us", "kernel")
    for row in sorted(found["file"].rows, key=lambda row: -row.microseconds)[:SLOWEST]:
        slowest.add_row(row.layer or "-", row.operator, f"{row.microseconds:,.0f}", row.kernel)
    print_table(slowest)
    for side, x in found.items():
        undelegated = f"; not delegated to XNNPACK: {', '.join(x.others)}" if x.others else ""
        print_line(
            f"{paths[side]}: {x.total_us:,.0f} us in operators, of which {x.unattributed:,.0f} belong to none "
            f"of the file; a run takes {x.run_us:,.0f} us, {x.profiled_us:,.0f} with the profiler{undelegated}"
        )


def _profile_cells(sides):
    """The values and their sum, of one file or as its difference from another one, with a sign."""
    rows = [[*values, sum(values)] for values in sides]
    if len(rows) == 1:
        return [f"{value:,.0f}" for value in rows[0]]
    return [f"{a:,.0f} ({a - b:+,.0f})" for a, b in zip(*rows, strict=True)]


def add_report(commands: Commands) -> None:
    """`se-keras report RESULTS.json ...`."""
    parser = add_command(commands, "report", report)
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS.json", help="from benchmark -o or --json")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.html")
    parser.add_argument("--markdown", action="store_true", help="print a table for a README instead")


def report(options: argparse.Namespace, console: Console) -> None:
    """Show results of benchmark as one page of HTML, or as a Markdown table.

    Examples:
      se-keras report results.json -o report.html
      se-keras report phone.json server.json --markdown
    """
    from se_keras import storage
    from se_keras.export.benchmark.report import as_html, as_markdown, read

    results = [read(path) for path in options.results]
    if options.markdown:
        return print_line(as_markdown(results))
    if options.output is None:
        raise ValueError("-o FILE.html writes the report, --markdown prints a table. Received: neither")
    storage.write_bytes(options.output, as_html(results).encode())
    print_line(f"wrote {options.output}")


def add_benchmark_input(commands: Commands) -> None:
    """`se-keras benchmark-input FOLDER`."""
    parser = add_command(commands, "benchmark-input", benchmark_input, json_output=True)
    images = "folder of images (default: made of photographs)"
    parser.add_argument("images", metavar="FOLDER", nargs="?", type=Path, help=images)
    parser.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--size", type=int, default=224, help="height and width (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=10, help=BLOCKS)
    epoch = "images to read while the memory is watched (default: %(default)s)"
    parser.add_argument("--epoch", type=int, default=20_000, metavar="N", help=epoch)


def benchmark_input(options: argparse.Namespace, console: Console) -> None:
    """Measure how fast training images are read, compared with Keras' own input.

    Examples:
      se-keras benchmark-input
      se-keras benchmark-input imagenet/ --batch-size 128 --json
    """
    from se_keras.training.throughput import input_speed, photographs

    size = options.size
    with show_progress(console) as progress, tempfile.TemporaryDirectory() as scratch:
        path = options.images
        if path is None:
            progress("making 400 JPEG files of scikit-learn's photographs")
            photographs(path := Path(scratch) / "photographs")
        found = input_speed(
            path,
            batch=options.batch_size,
            size=size,
            blocks=options.blocks,
            images=options.epoch,
            progress=progress,
        )
    if options.json:
        return print_json(found.to_json())
    title = f"JPEG files to batches of {options.batch_size} at {size}x{size}, cropped, scaled, mirrored"
    table = new_table("", "images/s", title=title)
    table.add_row("keras.utils.image_dataset_from_directory", f"{found.keras:,.0f}")
    table.add_row("se_keras", f"{found.ours:,.0f}")
    print_table(table)
    ratio, memory = found.comparison.ratio, ", ".join(f"{x:,.0f}" for x in found.megabytes)
    print_line(
        f"{1 / ratio.median:.2f} times as fast as Keras [{1 / ratio.high:.2f}, {1 / ratio.low:.2f}]; memory over "
        f"{found.images:,} images: {memory} MB"
    )


def add_benchmark_training(commands: Commands) -> None:
    """`se-keras benchmark-training`."""
    parser = add_command(commands, "benchmark-training", benchmark_training, json_output=True)
    parser.add_argument("--network", default="se_resnet50", help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--size", type=int, help=SIZE)
    parser.add_argument("--blocks", type=int, default=10, help=BLOCKS)


def benchmark_training(options: argparse.Namespace, console: Console) -> None:
    """Measure a training step with squeeze-and-excitation, compared with one without.

    Examples:
      se-keras benchmark-training
      se-keras benchmark-training --network se_resnet50 --size 112 --batch-size 16
    """
    from se_keras.catalogue import baseline_name
    from se_keras.environment import environment
    from se_keras.training.throughput import PAPER_STEP, step_time

    network, batch = options.network, options.batch_size
    with show_progress(console) as progress:
        found = step_time(network, batch=batch, size=options.size, blocks=options.blocks, progress=progress)
    report = {
        "network": network,
        "baseline": baseline_name(network),
        "batch": batch,
        "comparison": found.to_json(),
        "paper": PAPER_STEP,
        "environment": environment(),
    }
    if options.json:
        return print_json(report)
    title = f"A training step of {network} compared with {report['baseline']}, {batch} images"
    table = _comparison_table("plain", "SE", title=title, caption=report["environment"]["processor"])
    times = (str(PAPER_STEP["resnet50_ms"]), str(PAPER_STEP["se_resnet50_ms"]))
    table.add_row("paper, 256 images, 8 GPUs", *times, f"{PAPER_STEP['ratio']:.3f}", "", "")
    table.add_row("here", *_comparison_cells(report["comparison"], ",.0f"))
    print_table(table)
