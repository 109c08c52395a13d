"""What the command does with TF Serving: the server's files, whether it answers right, and what a model bears."""

from functools import partial

from rich.markup import escape

from .screen import Output, answer, new_table, print_json, progress_on, say

EXIT_DISAGREEMENT = 1


def serve_config(options, console):
    """`se-keras serve-config`."""
    from se_keras.export.serving import client as serving

    names = serving.write_server_files(options.folder, root=options.root, replace=options.replace)
    answer(f"wrote {options.folder / serving.MODELS} for {', '.join(names)}, and {options.folder / serving.MONITORING}")


def serve_check(options, console):
    """`se-keras serve-check`; status 1 where the server computes something else."""
    from se_keras.export.serving import client as serving
    from se_keras.export.serving import savedmodel

    with progress_on(console) as progress:
        saved = savedmodel.load_savedmodel(options.manifest)
        name = options.model or saved.path.resolve().parent.name
        servers = [server for server in (options.url, options.grpc) if server]
        progress(f"asking {' and '.join(servers)} for {name}")
        answers = serving.check(
            saved.manifest, model=name, rest=options.url, grpc=options.grpc, timeout=options.timeout
        )
    if options.json:
        print_json({"model": name, "answers": [{**vars(x), "agrees": x.agrees} for x in answers]})
    else:
        table = new_table("", "signature", "version", "max error", "at most")
        for x in answers:
            table.add_row(x.protocol, x.signature, str(x.version), f"{x.error:.1e}", f"{x.tolerance:g}")
        Output().print(table)
    far = [x for x in answers if not x.agrees]
    if far:
        errors = ", ".join(f"{x.protocol} {x.signature} by {x.error:.1e}" for x in far)
        say(console, f"se-keras: {name} does not compute what {saved.path} does: {errors} of the largest value")
        return EXIT_DISAGREEMENT


def benchmark_serving(options, console):
    """`se-keras benchmark-serving`."""
    from se_keras.catalogue import spec_of
    from se_keras.environment import environment
    from se_keras.export.benchmark.load import serving_load
    from se_keras.export.benchmark.overhead import overheads
    from se_keras.export.benchmark.results import PAPER
    from se_keras.export.benchmark.targets.host import measure
    from se_keras.export.litert.file import check_threads

    shape = options.size and (options.size, options.size, spec_of(options.network).input_shape[-1])
    check_threads(options.threads)
    with progress_on(console) as progress:
        loaded = serving_load(
            options.network, callers=options.callers, batches=options.batches, seconds=options.seconds,
            blocks=options.blocks, threads=options.threads, input_shape=shape, progress=progress,
        )  # fmt: skip
        litert = list(
            overheads(
                options.network, precisions=["float32"], input_shape=shape, threads=(options.threads,),
                measure=partial(measure, blocks=options.blocks), progress=progress,
            )
        )  # fmt: skip
    report = {
        "schema": 1,
        "environment": environment(),
        "serving": loaded.to_json(),
        "litert": [result.to_json() for result in litert],
        "paper": PAPER,
    }
    if options.json:
        return print_json(report)
    _print_load(report)


def _print_load(report):
    """The load, a row for each number of callers and batch; then what squeeze-and-excitation costs."""
    served = report["serving"]
    loads = {(x["network"], x["form"], x["callers"], x["batch"]): x for x in served["loads"]}
    size = "x".join(map(str, served["input_shape"][:2]))
    title = escape(f"{served['network']} at {size} as a SavedModel, as published and lowered")
    caption = f"{report['environment']['processor']}, TensorFlow {report['environment']['versions']['tensorflow']}"
    columns = ("images", "images/s", "lowered", "gain", "95 % interval", "p99 ms", "lowered")
    table = new_table("callers", *columns, title=title, caption=caption)
    for callers, batch, gain in served["gains"]:
        published, lowered = (loads[served["network"], form, callers, batch] for form in ("published", "lowered"))
        table.add_row(
            str(callers),
            str(batch),
            f"{published['images_per_second']:.1f}",
            f"{lowered['images_per_second']:.1f}",
            f"{gain['median']:.3f}",
            f"{gain['low']:.3f}..{gain['high']:.3f}",
            f"{published['p99_ms']:.0f}",
            f"{lowered['p99_ms']:.0f}",
        )
    Output().print(table)
    title = escape(f"{served['network']} beside {served['baseline']}, one image at a time")
    table = new_table("", "ratio", "95 % interval", title=title)
    for form, ratio in served["overheads"].items():
        table.add_row(f"SavedModel {form}", f"{ratio['median']:.3f}", f"{ratio['low']:.3f}..{ratio['high']:.3f}")
    for record in report["litert"]:
        ratio = record["comparison"]["ratio"]
        interval = f"{ratio['low']:.3f}..{ratio['high']:.3f}"
        table.add_row(f"LiteRT {record['precision']} {record['form']}", f"{ratio['median']:.3f}", interval)
    table.add_row("paper, ResNet-50", f"{report['paper']['ratio']:.3f}", "")
    Output().print(table)
