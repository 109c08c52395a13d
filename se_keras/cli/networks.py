"""What the command does with networks: list them, and show one."""

from dataclasses import asdict

from .screen import Output, answer, new_table, print_json, progress_on

PAPER_COLUMNS = "G MACs, million parameters, and top-1 error on ImageNet, or on CIFAR-10/CIFAR-100"


def list_networks(options, console):
    """`se-keras list`."""
    from se_keras.figures import listing

    with progress_on(console) as progress:
        rows = _counted(options.part, progress) if options.counts else listing()
        rows = sorted((row for row in rows if _is_meant(row["name"], options.part)), key=_beside_baseline)
    if not rows:
        raise ValueError(f"No network's name has {' or '.join(map(repr, options.part))} in it: se-keras list shows all")
    if options.json:
        return print_json(rows)
    titles = ("network", "size", "parameters", "of SE", "G MACs", "paper", "error %")
    cells = [_list_cells(row) for row in rows]
    if options.markdown:
        lines = [titles, ["---"] + ["---:"] * 4 + ["---"] * 2, *cells]
        return answer("\n".join(f"| {' | '.join(line)} |" for line in lines))
    table = new_table(*titles, caption=f"Paper: {PAPER_COLUMNS}.", padding=0)
    for column, justify in zip(table.columns, ["left"] + ["right"] * 4 + ["left"] * 2, strict=True):
        column.no_wrap, column.justify = True, justify
    for line in cells:
        table.add_row(*line)
    Output().print(table)


def _is_meant(name, parts):
    return not parts or any(part in name for part in parts)


def _beside_baseline(row):
    """Sorts an SE network behind its baseline."""
    return row["name"].removeprefix("se_"), row["name"].startswith("se_")


def _counted(parts, progress):
    import keras

    from se_keras import complexity, create, names
    from se_keras.catalogue import spec_of
    from se_keras.figures import PAPER

    for name in names():
        if _is_meant(name, parts):
            progress(f"counting {name}")
            with keras.StatelessScope(initialize_variables=False):  # counts need shapes, not values
                counts = complexity(create(name))
            keras.utils.clear_session()
            spec, paper = spec_of(name), PAPER.get(name)
            row = {"name": name, "input_shape": spec.input_shape, **_totals(counts)}
            yield row | {"paper": paper and asdict(paper), "source": spec.source}


def _list_cells(row):
    """One network as text, the paper's figures in the last two columns."""
    gmacs, millions, errors = "", "", []
    if paper := row["paper"]:
        gmacs = f"{paper['gmacs']:.{2 if paper['gmacs'] >= 1 else 3}f}" if paper["gmacs"] else ""
        millions = f"{paper['mparameters']}M" if paper["mparameters"] else ""
        data_sets = ("ImageNet",) if "ImageNet" in paper["error"] else ("CIFAR-10", "CIFAR-100")
        digits = 1 if millions else 2  # as the paper's tables have them
        errors = [f"{paper['error'][data]:.{digits}f}" if data in paper["error"] else "-" for data in data_sets]
    return [
        row["name"],
        str(row["input_shape"][0]),
        f"{row['trainable']:,}",
        f"{row['se_trainable'] / row['trainable']:.1%}" if row["se_trainable"] else "",
        f"{row['macs'] / 1e9:.4f}",
        f"{gmacs} {millions}".strip(),
        "/".join(errors),
    ]


def show(options, console):
    """`se-keras show`."""
    from se_keras import complexity, create
    from se_keras.catalogue import spec_of

    spec = spec_of(options.network)
    size = options.size
    if size is not None and size < spec.minimum_size:
        raise ValueError(f"{options.network} takes images of at least {spec.minimum_size}. Received: --size {size}")
    shape = spec.input_shape if size is None else (size, size, spec.input_shape[-1])
    with progress_on(console) as progress:
        progress(f"building {options.network}")
        counts = complexity(create(options.network, input_shape=shape))
    if options.json:
        layers = [asdict(layer) for layer in counts.layers]
        return print_json({"name": options.network, "input_shape": shape, **_totals(counts), "source": spec.source,
                            "se": spec.se and asdict(spec.se), "layers": layers})  # fmt: skip
    out = Output()
    out.print(f"[bold]{options.network}[/bold]: {spec.source}")
    table = new_table(show_header=False)
    for title, value in {
        "input": "x".join(map(str, shape)),
        "parameters": f"{counts.trainable:,} trained, {counts.statistics:,} BatchNorm statistics",
        "of which SE": f"{counts.se_trainable:,} ({counts.se_trainable / counts.trainable:.1%})",
        "multiply-adds": f"{counts.macs / 1e9:.4f} G, of which SE {counts.se_macs / 1e9:.4f} G",
        "squeeze-and-excitation": "none: a baseline" if spec.se is None else ", ".join(
            f"{field} {value}" for field, value in asdict(spec.se).items()),
    }.items():  # fmt: skip
        table.add_row(title, value)
    out.print(table)
    if options.layers:
        table = new_table("layer", "type", "output", "parameters", "multiply-adds")
        for layer in counts.layers:
            output = "x".join(map(str, layer.output_shape))
            table.add_row(layer.name, layer.type, output, f"{layer.trainable:,}", f"{layer.macs:,}")
        out.print(table)


def _totals(counts):
    return {field: getattr(counts, field) for field in ("trainable", "statistics", "se_trainable", "macs", "se_macs")}
