"""What the command measures: the cost of squeeze-and-excitation, and all of the line at once."""

from dataclasses import replace

from rich.markup import escape

from se_keras_cli.screen import Output, answer, new_table, print_json, progress_on


def benchmark(options, console):
    """`se-keras benchmark`."""
    from se_keras.catalogue import spec_of
    from se_keras.export import litert
    from se_keras.export.overhead import PAPER, environment, measure, overheads

    measuring = {
        "threads": options.threads,
        "blocks": options.blocks,
        "allow_undelegated": options.allow_undelegated,
    }
    with progress_on(console) as progress:
        if options.files:
            a, b = map(litert.load, options.files)
            progress(f"timing {options.files[1]} beside {options.files[0]}")
            results = [measure(a, b, form="as given", **measuring)]
        else:
            spec = spec_of(options.network)
            shape = options.size and (options.size, options.size, spec.input_shape[-1])
            placed = {"site": options.site, "stages": options.stages and tuple(options.stages)}
            se = spec.se and replace(spec.se, **{field: value for field, value in placed.items() if value})
            chosen = {"precisions": options.precision, "forms": options.form, "se": se, "input_shape": shape}
            results = list(overheads(options.network, **chosen, progress=progress, **measuring))
    report = {
        "schema": 1,
        "environment": environment(),
        "overhead": [result.to_json() for result in results],
        "paper": PAPER,
    }
    if options.json:
        return print_json(report)
    _print_overhead(report)


def quickstart(options, console):
    """`se-keras quickstart`."""
    from se_keras import storage
    from se_keras.quickstart import quickstart

    storage.check_writable(options.output / "report.json")
    with progress_on(console) as progress:
        report = quickstart(options.output, progress=progress)
    if options.json:
        return print_json(report)
    table = new_table("", "test accuracy", "size", "top-1 as Keras", "max error", title="Trained on the digits")
    for name, run in report["training"].items():
        table.add_row(name, f"{run['test_accuracy']:.1%}", f"{run['parameters'] / 1e3:,.0f}k weights", "", "")
    for name, made in report["exports"].items():
        accuracy = f"{made['test_accuracy']:.1%}" if "test_accuracy" in made else ""
        top1, error = made["agreement"]["top1"], made["agreement"]["max_error"]
        table.add_row(name, accuracy, f"{made['bytes'] / 1e3:,.0f} kB", f"{top1:.1%}", f"{error:.0e}")
    Output().print(table)
    _print_overhead(report)
    answer(f"All is in {options.output}, the figures in {options.output / 'report.json'} ({report['seconds']:.0f} s)")


def _print_overhead(report):
    """One row for each pair, the paper's figure above them."""
    records, paper, environment = report["overhead"], report["paper"], report["environment"]
    first = records[0]
    size = "x".join(map(str, first["input_shape"][1:3]))
    threads = f"{first['threads']} thread{'s' * (first['threads'] > 1)}"
    caption = f"{environment['processor']}, {environment['runtime']}."
    if environment["matrix_units"]:
        units = ", ".join(environment["matrix_units"])
        caption += (
            f" Matrix units ({units}) speed up int8 convolutions, not SE's multiplication: its share is larger here."
        )
    title = escape(f"{first['network']}{_placed(first['se'])} beside {first['baseline']} at {size}, {threads}")
    table = new_table("", "plain ms", "SE ms", "ratio", "95 % interval", "A/A null", title=title, caption=caption)
    paper_ms = (str(paper["resnet50_ms"]), str(paper["se_resnet50_ms"]))
    table.add_row("paper, ResNet-50", *paper_ms, f"{paper['ratio']:.3f}", "", "")
    for record in records:
        measured = record["comparison"]
        ratio, null = measured["ratio"], measured["null"]
        table.add_row(
            f"{record['precision']} {record['form']}",
            f"{measured['a_ms']:.1f}",
            f"{measured['b_ms']:.1f}",
            f"{ratio['median']:.3f}",
            f"{ratio['low']:.3f}..{ratio['high']:.3f}",
            f"{null['low']:.3f}..{null['high']:.3f}",
        )
    Output().print(table)


def _placed(se):
    """Where squeeze-and-excitation stands, if it is not as published; nothing for files that were given."""
    if se is None:
        return ""
    site = "" if se["site"] == "standard" else f", site {se['site']}"
    return site if se["stages"] == "all" else f"{site}, stages {' '.join(map(str, se['stages']))}"
