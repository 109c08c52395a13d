"""What the command measures: the cost of squeeze-and-excitation, and all of the line at once."""

import json
from dataclasses import replace
from functools import partial

from rich.markup import escape

from .screen import Output, answer, new_table, print_json, progress_on, say


def benchmark(options, console):
    """`se-keras benchmark`."""
    from se_keras import storage
    from se_keras.catalogue import spec_of
    from se_keras.environment import environment as host_environment
    from se_keras.export.benchmark import overhead, results
    from se_keras.export.benchmark.report import read
    from se_keras.export.benchmark.targets import adb as android
    from se_keras.export.litert.file import load_litert
    from se_keras.timing import check_plan

    if options.profile and (options.files or options.adb):
        raise ValueError("--profile is for --network on this machine: se-keras profile A --against B profiles files")
    if options.adb and options.benchmark_model is None:
        raise ValueError("--adb needs --benchmark-model PATH, LiteRT's binary for the phone: docs/phone.md")
    check_plan(options.blocks, 1)
    with progress_on(console) as progress:
        plan = {
            "blocks": options.blocks,
            "within": options.within,
            "seconds": options.seconds,
            "allow_undelegated": options.allow_undelegated,
        }
        if options.adb:
            phone = {"benchmark_model": options.benchmark_model, "serial": options.serial, "rest": options.rest}
            measure = partial(android.measure, **plan, **phone, progress=progress)
            android.require_binary(options.benchmark_model)  # before a minute of exporting
            environment = android.environment(options.serial)
        else:
            measure, environment = partial(overhead.measure, **plan), host_environment()
        report = {"schema": 1, "environment": environment, "overhead": [], "paper": results.PAPER}
        if options.output:
            storage.check_writable(options.output)
            if options.output.exists():
                report["overhead"] = _kept(read(options.output), report)
                progress(f"{options.output} has {len(report['overhead'])} results: what is whole there is kept")
        how = {"threads": options.threads, "kept": tuple(report["overhead"]), "measure": measure, "progress": progress}

        def measured():
            if options.files:
                stems = [path.stem for path in options.files]
                names = stems if len(set(stems)) == 2 else list(map(str, options.files))
                yield from overhead.overheads_of_files(*map(load_litert, options.files), names=names, **how)
            for network in () if options.files else options.network:
                spec = spec_of(network)
                shape = options.size and (options.size, options.size, spec.input_shape[-1])
                placed = {"site": options.site, "stages": options.stages and tuple(options.stages)}
                se = spec.se and replace(spec.se, **{field: value for field, value in placed.items() if value})
                chosen = {"precisions": options.precision, "forms": options.form, "se": se, "input_shape": shape}
                yield from overhead.overheads(network, **chosen, **how, profiled=options.profile)

        for found in measured():
            record = json.loads(json.dumps(found.to_json()))  # as a file has it
            others = [x for x in report["overhead"] if results.cell(x) != results.cell(record) or not x.get("missing")]
            report["overhead"] = [*others, record]  # in the place of one that was cut short
            if options.output:
                storage.write_json(options.output, report)
            if found.missing:
                say(console, f"se-keras: warning: measured {found.missing}. The same command measures the rest")
                break
    if options.json:
        return print_json(report)
    for records in _tables(report["overhead"]):
        _print_overhead(report | {"overhead": records})


def _kept(earlier, report):
    """The records of an earlier run on the same machine and versions.

    Raises:
        ValueError: If it was another, for ratios of two machines do not stand in one table; or if the file is more than
            what this command writes.
    """
    if more := set(earlier) - set(report):
        raise ValueError(f"The file has more than results of benchmark, {', '.join(sorted(more))}: take a new one")
    for name, other in {"processor": "another processor", "versions": "other versions"}.items():
        if (found := earlier["environment"].get(name)) != report["environment"][name]:
            raise ValueError(f"The results there were measured with {other}: take a new file. "
                             f"Received: {found}")  # fmt: skip
    return earlier["overhead"]


def _tables(records):
    """The records that belong in one table: of one network, placed alike, with the same threads and input."""
    tables = {}
    for record in records:
        key = (
            record["network"],
            record["baseline"],
            record["threads"],
            tuple(record["input_shape"]),
            str(record["se"]),
        )
        tables.setdefault(key, []).append(record)
    return tables.values()


def report(options, console):
    """`se-keras report`."""
    from se_keras import storage
    from se_keras.export.benchmark.report import as_html, as_markdown, read

    results = [read(path) for path in options.results]
    if options.markdown:
        return answer(as_markdown(results))
    if options.output is None:
        raise ValueError("-o FILE.html says where the report goes, or --markdown prints a table. Received: neither")
    storage.write_bytes(options.output, as_html(results).encode())
    answer(f"wrote {options.output}")


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
    of_files = first["se"] is None
    sides = (escape(first["baseline"]), escape(first["network"])) if of_files else ("plain", "SE")
    table = new_table(
        "", *(f"{side} ms" for side in sides), "ratio", "95 % interval", "A/A null", title=title, caption=caption
    )
    if not of_files:
        paper_ms = (str(paper["resnet50_ms"]), str(paper["se_resnet50_ms"]))
        table.add_row("paper, ResNet-50", *paper_ms, f"{paper['ratio']:.3f}", "", "")
    for record in records:
        measured = record["comparison"]
        ratio, null = measured["ratio"], measured["null"]
        table.add_row(
            f"{record['precision']} {record['form']}",
            f"{measured['a_ms']:.3g}",
            f"{measured['b_ms']:.3g}",
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
