"""The commands about TF Serving: its configuration, a check of its answers, and a stress test of SavedModels."""

import argparse
import os
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from .arguments import BLOCKS, POSITIVE, THREADS, TIMEOUT, Commands, add_command, input_shape
from .screen import EXIT_DISAGREEMENT, print_json, print_line, print_message, print_table, ratio_cells, show_progress


def add_serve_config(commands: Commands) -> None:
    """`se-keras serve-config FOLDER`."""
    add = add_command(commands, "serve-config", serve_config)
    add("folder", metavar="FOLDER", type=Path, help="with a folder for each model: MODEL/VERSION/")
    add("--root", default="/models", help="the folder on the server (default: %(default)s)")
    add("--replace", action="store_true", help="replace files that differ")


def serve_config(options: argparse.Namespace, console: Console) -> None:
    """Write TF Serving's files for a folder of models: models.config, monitoring.config.

    Examples:
      se-keras serve-config models/
      se-keras serve-config models/ --root /srv/models --replace
    """
    from se_keras.export.serving import client

    names = client.write_server_files(options.folder, root=options.root, replace=options.replace)
    models, monitoring = options.folder / client.MODELS, options.folder / client.MONITORING
    print_line(f"wrote {models} for {', '.join(names)}, and {monitoring}")


def add_serve_check(commands: Commands) -> None:
    """`se-keras serve-check URL --manifest DIR`."""
    add = add_command(commands, "serve-check", serve_check, json_output=True)
    add("url", metavar="URL", nargs="?", help="address of the REST API: http://HOST:8501")
    add("--grpc", metavar="HOST:PORT", help="the gRPC API: HOST:8500; needs se-keras[serving]")
    manifest = "folder of an exported model (its highest version) or of one version"
    add("--manifest", metavar="DIR", type=Path, required=True, help=manifest)
    add("--model", metavar="NAME", help="its name on the server (default: the name of its folder)")
    add("--timeout", type=TIMEOUT, default=30, metavar="S", help="seconds for an answer (default: 30)")


def serve_check(options: argparse.Namespace, console: Console) -> int | None:
    r"""Send TF Serving the reference inputs of a model's manifest, and compare its answers.

    Examples:
      se-keras serve-check http://localhost:8501 --manifest models/digits
      se-keras serve-check http://localhost:8501 --grpc localhost:8500 \
          --manifest models/digits --model digits --json
    """
    from se_keras.export.serving import client, savedmodel

    with show_progress(console) as progress:
        saved = savedmodel.load_savedmodel(options.manifest)
        name = options.model or saved.path.resolve().parent.name
        servers = [server for server in (options.url, options.grpc) if server]
        progress(f"asking {' and '.join(servers)} for {name}")
        answers = client.check(saved.manifest, model=name, rest=options.url, grpc=options.grpc, timeout=options.timeout)
    if options.json:
        print_json({"model": name, "answers": [{**vars(x), "agrees": x.agrees} for x in answers]})
    else:
        rows = ((x.protocol, x.signature, str(x.version), f"{x.error:.1e}", f"{x.tolerance:g}") for x in answers)
        print_table(("", "signature", "version", "max error", "at most"), rows)
    if errors := ", ".join(f"{x.protocol} {x.signature} by {x.error:.1e}" for x in answers if not x.agrees):
        print_message(console, f"{name} does not compute what {saved.path} does: {errors} of the largest value")
        return EXIT_DISAGREEMENT


def add_benchmark_serving(commands: Commands) -> None:
    """`se-keras benchmark-serving`."""
    add = add_command(commands, "benchmark-serving", benchmark_serving, json_output=True)
    add("--network", default="se_resnet50", help="compared with its baseline (default: %(default)s)")
    callers = "threads that send requests at once (default: 1 4 16)"
    add("--callers", type=POSITIVE, nargs="+", default=[1, 4, 16], help=callers)
    add("--batches", type=POSITIVE, nargs="+", default=[1, 8, 32], help="images in a request (default: 1 8 32)")
    add("--size", type=POSITIVE, help="height and width (default: the network's own)")
    add("--threads", type=THREADS, default=os.cpu_count(), help="default: one for each processor")
    add("--blocks", type=BLOCKS, default=10, help="measurements of each load (default: %(default)s)")
    add("--seconds", type=TIMEOUT, default=2, metavar="S", help="per measurement (default: %(default)s)")


def benchmark_serving(options: argparse.Namespace, console: Console) -> None:
    """Measure images/s and p99 of a SavedModel under load, published and lowered.

    Examples:
      se-keras benchmark-serving
      se-keras benchmark-serving --network se_resnext50_32x4d --callers 1 16 --json
    """
    from se_keras.environment import environment
    from se_keras.export.benchmark.load import serving_load
    from se_keras.export.benchmark.overhead import pairs
    from se_keras.export.benchmark.results import PAPER
    from se_keras.export.benchmark.targets.host import Host

    shape = input_shape(options.network, options.size)
    with show_progress(console) as progress:
        load = serving_load(
            options.network,
            callers=options.callers,
            batches=options.batches,
            seconds=options.seconds,
            blocks=options.blocks,
            threads=options.threads,
            input_shape=shape,
            progress=progress,
        )
        exported = pairs(
            options.network,
            precisions=["float32"],
            input_shape=shape,
            threads=(options.threads,),
            progress=progress,
        )
        litert = Host(blocks=options.blocks).measure(exported, progress)
        report = {
            "schema": 1,
            "environment": environment(),
            "serving": load.to_json(),
            "litert": [result.to_json() for result in litert],
            "paper": PAPER,
        }
    if options.json:
        return print_json(report)
    _print_load(report)
    _print_serving_overhead(report)


def _print_load(report):
    """One row for each number of callers and batch size."""
    served, environment = report["serving"], report["environment"]
    loads = {(x["network"], x["form"], x["callers"], x["batch"]): x for x in served["loads"]}
    size = "x".join(map(str, served["input_shape"][:2]))
    title = escape(f"{served['network']} at {size} as a SavedModel, published and lowered")
    caption = f"{environment['processor']}, TensorFlow {environment['versions']['tensorflow']}"
    columns = ("callers", "images", "images/s", "lowered", "gain", "95 % interval", "p99 ms", "lowered")
    rows = []
    for callers, batch, gain in served["gains"]:
        pair = [loads[served["network"], form, callers, batch] for form in ("published", "lowered")]
        rates, waits = (f"{x['images_per_second']:.1f}" for x in pair), (f"{x['p99_ms']:.0f}" for x in pair)
        rows.append((str(callers), str(batch), *rates, *ratio_cells(gain), *waits))
    print_table(columns, rows, title=title, caption=caption)


def _print_serving_overhead(report):
    """What squeeze-and-excitation costs in a SavedModel and in a LiteRT file."""
    served = report["serving"]
    title = escape(f"{served['network']} compared with {served['baseline']}, one image at a time")
    rows = [(f"SavedModel {form}", *ratio_cells(ratio)) for form, ratio in served["overheads"].items()]
    rows += [(f"LiteRT {x['precision']} {x['form']}", *ratio_cells(x["comparison"]["ratio"])) for x in report["litert"]]
    rows.append(("paper, ResNet-50", f"{report['paper']['ratio']:.3f}", ""))
    print_table(("", "ratio", "95 % interval"), rows, title=title)
