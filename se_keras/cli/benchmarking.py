"""The commands that measure time: of LiteRT files, training input and training steps."""

import argparse
import json
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from .arguments import (
    BLOCKS,
    POSITIVE,
    PRECISIONS,
    SITES,
    THREADS,
    VARIANTS,
    Commands,
    add_command,
    input_shape,
    one_of,
    only_for,
)
from .screen import print_json, print_line, print_message, print_table, ratio_cells, show_progress
from .targets import add_targets, target_of

if TYPE_CHECKING:  # not imported for --help
    from se_keras.export.benchmark.measuring import Pair

SIZE = "height and width (default: the network's own)"
PAIRS = "number of paired measurements (default: %(default)s)"


def add_benchmark(commands: Commands) -> None:
    """`se-keras benchmark`."""
    add = add_command(commands, "benchmark", benchmark, json_output=True)
    network = "networks to compare with their baselines (default: se_resnet50)"
    add("--network", nargs="+", metavar="NAME", help=network)
    add("--files", type=Path, nargs=2, metavar=("A", "B"), help="two .tflite files instead: compare B with A")
    output = "save each result at once; run the same command again to measure the rest"
    add("-o", "--output", type=Path, metavar="FILE.json", help=output)
    add("--precision", nargs="+", help=f"{one_of(PRECISIONS)} (default: float32 int8)")
    form = "published is the network as it is; lowered has BatchNorm folded and the squeeze hoisted"
    add("--form", nargs="+", help=f"{one_of(VARIANTS)} (default: both): {form}")
    add("--site", help=f"where in a block SE is: {one_of(SITES)} (default: the network's own)")
    add("--stages", type=POSITIVE, nargs="+", metavar="N", help="the stages with SE: 2 to 5 of a ResNet")
    add("--size", type=POSITIVE, help=SIZE)
    add("--threads", type=THREADS, nargs="+", default=[1], metavar="N", help="default: 1")
    add_targets(commands.choices["benchmark"])


def benchmark(options: argparse.Namespace, console: Console) -> None:
    """Measure what squeeze-and-excitation costs, or compare two LiteRT files.

    Examples:
      se-keras benchmark
      se-keras benchmark --network se_resnet50 se_mobilenet --threads 1 2 -o results.json
      se-keras benchmark --precision int8 --form lowered --site 3x3
      se-keras benchmark --stages 3 4 5 --within 0.005
      se-keras benchmark --files plain.tflite se.tflite --profile -o results.json
      se-keras benchmark --adb --benchmark-model benchmark_model -o phone.json
    """
    from se_keras import storage
    from se_keras.export.benchmark import results
    from se_keras.wording import counted

    ours = "--network --precision --form --site --stages --size"
    only_for(options, ours, "networks of the catalogue", "--files, which are as they are", possible=not options.files)
    target = target_of(options)
    with show_progress(console) as progress:
        report = {"schema": 1, "environment": target.connect(progress), "overhead": [], "paper": results.PAPER}
        if options.output:
            storage.check_writable(options.output)
            if options.output.exists():
                report["overhead"] = _earlier_records(options.output, report)
                progress(
                    f"{options.output} has {counted(len(report['overhead']), 'result')}: only missing ones are measured"
                )
        for found in target.measure(_pairs(options, results.kept(report), progress), progress):
            record = json.loads(json.dumps(found.to_json()))  # as it is read from a file
            report["overhead"] = results.with_record(report["overhead"], record)
            if options.output:
                storage.write_json(options.output, report)
            if missing := found.device.missing:
                print_message(console, f"warning: measured {missing}. The same command measures the rest")
    if not report["overhead"]:
        raise ValueError("Nothing was measured")
    if options.json:
        return print_json(report)
    for records in _tables(report["overhead"]):
        print_overhead(report | {"overhead": records}, console)


def _earlier_records(path, report):
    """The records of an earlier run; ratios of two machines or versions do not belong in one table."""
    from se_keras.export.benchmark.report import read

    earlier = read(path)
    if more := set(earlier) - set(report):
        raise ValueError(f"The file has other entries than benchmark's, {', '.join(sorted(more))}: take a new one")
    for name, other in {"processor": "another processor", "versions": "other versions"}.items():
        if (found := earlier["environment"].get(name)) != report["environment"][name]:
            raise ValueError(f"The results there were measured with {other}: take a new file. Received: {found}")
    return earlier["overhead"]


def _pairs(options, kept, progress) -> Iterable["Pair"]:
    """Each pair that the options ask for and that is not among the records `kept`, exported when its turn comes."""
    from se_keras.catalogue import spec_of
    from se_keras.export.benchmark import overhead
    from se_keras.export.litert.file import load_litert

    if options.files:
        stems = [path.stem for path in options.files]
        names = stems if len(set(stems)) == 2 else list(map(str, options.files))
        return overhead.pairs_of_files(
            *map(load_litert, options.files), names=names, threads=options.threads, kept=kept
        )
    streams = []
    for network in options.network or ["se_resnet50"]:
        se, other = spec_of(network).se, {"site": options.site, "stages": options.stages and tuple(options.stages)}
        streams.append(
            overhead.pairs(
                network,
                precisions=options.precision or ["float32", "int8"],
                variants=options.form or VARIANTS,
                se=se and replace(se, **{field: value for field, value in other.items() if value}),
                input_shape=input_shape(network, options.size),
                threads=options.threads,
                kept=kept,
                for_gpu=options.accelerator == "webgpu",
                progress=progress,
            )
        )
    return chain.from_iterable(streams)


def _tables(records):
    """The records in groups that share a table: one device, network, configuration, input and number of threads."""
    tables = {}
    for record in records:
        same, device = ("network", "baseline", "threads", "input_shape", "se"), record.get("environment") or {}
        key = *(str(record.get(name)) for name in same), *(device.get(name) for name in ("processor", "id", "runtime"))
        tables.setdefault(key, []).append(record)
    return tables.values()


def print_overhead(report: dict[str, Any], console: Console) -> None:
    """Prints a row of the paper's figures, a row for each pair, and warnings of what they do not show."""
    from se_keras.export.benchmark.results import device_of
    from se_keras.export.benchmark.sentences import amount, doubts, is_counted, is_of_files, placement
    from se_keras.wording import counted

    first = report["overhead"][0]
    environment = device_of(first, report)
    size, threads = "x".join(map(str, first["input_shape"][1:3])), counted(first["threads"], "thread")
    caption = f"{environment['processor']}, {environment['runtime']}."
    if environment.get("matrix_units"):
        units = ", ".join(environment["matrix_units"])
        caption += f" Matrix units ({units}) speed up int8 convolutions, not SE's multiplication: SE costs more here."
    title = escape(f"{first['network']}{placement(first['se'])} compared with {first['baseline']} at {size}, {threads}")
    named = [(f"{x['precision']} {x['form']}", x) for x in report["overhead"]]
    rows: list[tuple[str, ...]] = [
        (name, *(amount(x, side) for side in "ab"), *_ratio_cells(x["comparison"], x["is_real"])) for name, x in named
    ]
    a, b = escape(first["baseline"]), escape(first["network"])
    if not is_of_files(first):
        a, b = "plain", "SE"
    if is_counted(first):
        _print_comparisons(a, b, rows, title=f"{title}, in million instructions", caption=caption)
        return _print_kinds(named)
    if not is_of_files(first):
        rows.insert(0, ("paper, ResNet-50", *_paper_cells(report["paper"])))
    _print_comparisons(f"{a} ms", f"{b} ms", rows, title=title, caption=caption)
    if found := [f"{name}: {doubt}" for name, record in named for doubt in doubts(record)]:
        for line in (*found, "the machine may have been too busy: measure again when nothing else runs"):
            print_message(console, f"warning: {line}")


def _print_kinds(named):
    """Prints which instructions a network executes more than its baseline, for records that count them."""
    from se_keras.export.benchmark.sentences import added_by_kind

    added = {name: {kind: f"{100 * x:+.2f}" for kind, x in added_by_kind(record).items()} for name, record in named}
    kinds = [kind for kind in next(iter(added.values())) if any(float(by.get(kind, 0)) for by in added.values())]
    rows = [(name, *(by.get(kind, "") for kind in kinds)) for name, by in added.items()]
    title = "added instructions by kind, in % of the baseline's"
    print_table(("", *kinds), rows, pad_edge=False, title=title)


def _ratio_cells(comparison, is_real):
    return *ratio_cells(comparison["ratio"]), ratio_cells(comparison["null"])[1], "yes" if is_real else "no"


def _paper_cells(paper):
    return str(paper["resnet50_ms"]), str(paper["se_resnet50_ms"]), f"{paper['ratio']:.3f}", "", "", ""


def _print_comparisons(a, b, rows, **options):
    columns = ("", a, b, "ratio", "95 % interval", "A/A control", "real?")
    print_table(columns, rows, pad_edge=False, **options)


def add_report(commands: Commands) -> None:
    """`se-keras report RESULTS.json ...`."""
    add = add_command(commands, "report", report)
    add("results", type=Path, nargs="+", metavar="RESULTS.json", help="from benchmark -o or --json")
    add("-o", "--output", type=Path, metavar="FILE.html")
    add("--markdown", action="store_true", help="print a table for a README instead")


def report(options: argparse.Namespace, console: Console) -> None:
    """Show results of benchmark as one page of HTML, or as a Markdown table.

    Examples:
      se-keras report results.json -o report.html
      se-keras report phone.json server.json --markdown
    """
    from se_keras import storage
    from se_keras.export.benchmark.report import as_html, as_markdown, read

    if options.markdown == (options.output is not None):
        received = "both" if options.markdown else "neither"
        raise ValueError(f"-o FILE.html writes the report, --markdown prints a table. Received: {received}")
    results = [read(path) for path in options.results]
    if options.markdown:
        return print_line(as_markdown(results))
    storage.write_bytes(options.output, as_html(results).encode())
    print_line(f"wrote {options.output}")


def add_benchmark_input(commands: Commands) -> None:
    """`se-keras benchmark-input FOLDER`."""
    add = add_command(commands, "benchmark-input", benchmark_input, json_output=True)
    add("images", metavar="FOLDER", nargs="?", type=Path, help="folder of images (default: made of photographs)")
    add("--batch-size", type=POSITIVE, default=64, help="default: %(default)s")
    add("--size", type=POSITIVE, default=224, help="height and width (default: %(default)s)")
    add("--blocks", type=BLOCKS, default=10, help=PAIRS)
    epoch = "images to read while the memory is watched (default: %(default)s)"
    add("--epoch", type=POSITIVE, default=20_000, metavar="N", help=epoch)


def benchmark_input(options: argparse.Namespace, console: Console) -> None:
    """Measure how fast training images are read, compared with Keras' own input.

    Examples:
      se-keras benchmark-input
      se-keras benchmark-input imagenet/ --batch-size 128 --json
    """
    from se_keras.training.throughput import input_speed, photographs

    batch, size, blocks = options.batch_size, options.size, options.blocks
    with show_progress(console) as progress, tempfile.TemporaryDirectory() as scratch:
        path = options.images
        if path is None:
            progress("making 400 JPEG files of scikit-learn's photographs")
            photographs(path := Path(scratch) / "photographs")
        found = input_speed(path, batch=batch, size=size, blocks=blocks, images=options.epoch, progress=progress)
    if options.json:
        return print_json(found.to_json())
    title = f"JPEG files to batches of {batch} at {size}x{size}, cropped, scaled, mirrored"
    speeds = {"keras.utils.image_dataset_from_directory": found.keras, "se_keras": found.ours}
    print_table(("", "images/s"), ((name, f"{speed:,.0f}") for name, speed in speeds.items()), title=title)
    ratio, memory = found.comparison.ratio, ", ".join(f"{x:,.0f}" for x in found.megabytes)
    print_line(
        f"{1 / ratio.median:.2f} times as fast as Keras [{1 / ratio.high:.2f}, {1 / ratio.low:.2f}]; memory over "
        f"{found.images:,} images: {memory} MB"
    )


def add_benchmark_training(commands: Commands) -> None:
    """`se-keras benchmark-training`."""
    add = add_command(commands, "benchmark-training", benchmark_training, json_output=True)
    add("--network", default="se_resnet50", help="default: %(default)s")
    add("--batch-size", type=POSITIVE, default=8, help="default: %(default)s")
    add("--size", type=POSITIVE, help=SIZE)
    add("--blocks", type=BLOCKS, default=10, help=PAIRS)


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
    times = (f"{milliseconds:,.0f}" for milliseconds in (found.a_ms, found.b_ms))
    title = f"A training step of {network} compared with {report['baseline']}, {batch} images"
    rows = (
        ("paper, 256 images, 8 GPUs", *_paper_cells(PAPER_STEP)),
        ("here", *times, *_ratio_cells(report["comparison"], found.is_significant)),
    )
    _print_comparisons("plain ms", "SE ms", rows, title=title, caption=report["environment"]["processor"])
