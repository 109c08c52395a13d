"""The commands about the networks of the catalogue: list them, and show one."""

import argparse
from dataclasses import asdict

from rich.console import Console

from .arguments import Commands, add_command, input_shape
from .screen import Output, new_table, print_json, print_line, print_table, show_progress

PAPER_COLUMNS = "G MACs, million parameters, and top-1 error on ImageNet, or on CIFAR-10/CIFAR-100"


def add_list(commands: Commands) -> None:
    """`se-keras list PART ...`."""
    parser = add_command(commands, "list", list_networks, json_output=True)
    parser.add_argument("part", nargs="*", metavar="PART", help="only networks with one of these in their names")
    parser.add_argument("--counts", action="store_true", help="count again: builds each network (a minute for all)")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")


def list_networks(options: argparse.Namespace, console: Console) -> None:
    """List the networks with their counts and the paper's figures.

    Examples:
      se-keras list
      se-keras list resnet50 mobile
      se-keras list --markdown
      se-keras list --counts --json
    """
    from se_keras.figures import listing

    with show_progress(console) as progress:
        rows = _counted(options.part, progress) if options.counts else listing()
        rows = sorted((row for row in rows if _matches(row["name"], options.part)), key=_after_baseline)
    if not rows:
        raise ValueError(f"No network's name has {' or '.join(map(repr, options.part))} in it: se-keras list shows all")
    if options.json:
        return print_json(rows)
    titles = ("network", "size", "parameters", "of SE", "G MACs", "paper", "error %")
    cells = [_list_cells(row) for row in rows]
    if options.markdown:
        lines = [titles, ["---"] + ["---:"] * 4 + ["---"] * 2, *cells]
        return print_line("\n".join(f"| {' | '.join(line)} |" for line in lines))
    table = new_table(*titles, caption=f"Paper: {PAPER_COLUMNS}.", padding=0)
    for number, column in enumerate(table.columns):
        column.no_wrap = True
        column.justify = "right" if 1 <= number <= 4 else "left"
    for line in cells:
        table.add_row(*line)
    print_table(table)


def _matches(name, parts):
    return not parts or any(part in name for part in parts)


def _after_baseline(row):
    """The key that sorts an SE network after its baseline."""
    return row["name"].removeprefix("se_"), row["name"].startswith("se_")


def _counted(parts, progress):
    import keras

    from se_keras import complexity, create, names
    from se_keras.catalogue import spec_of
    from se_keras.figures import PAPER

    for name in names():
        if _matches(name, parts):
            progress(f"counting {name}")
            with keras.StatelessScope(initialize_variables=False):  # counts need shapes, not values
                counts = complexity(create(name))
            keras.utils.clear_session()
            spec, paper = spec_of(name), PAPER.get(name)
            row = {"name": name, "input_shape": spec.input_shape, **_totals(counts)}
            yield row | {"paper": paper and asdict(paper), "source": spec.source}


def _list_cells(row):
    """The cells of one network; the paper's figures are in the last two."""
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


def add_show(commands: Commands) -> None:
    """`se-keras show NAME`."""
    parser = add_command(commands, "show", show, json_output=True)
    parser.add_argument("network", metavar="NAME")
    parser.add_argument("--size", type=int, help="height and width to count at (default: the network's own)")
    parser.add_argument("--layers", action="store_true", help="layer by layer")


def show(options: argparse.Namespace, console: Console) -> None:
    """Show one network: its source, parameters and multiply-adds.

    Examples:
      se-keras show se_resnet50
      se-keras show senet154 --layers
      se-keras show se_resnet50 --size 320 --json
    """
    from se_keras import complexity, create
    from se_keras.catalogue import spec_of

    spec, size = spec_of(options.network), options.size
    if size is not None and size < spec.minimum_size:
        raise ValueError(f"{options.network} takes images of at least {spec.minimum_size}. Received: --size {size}")
    shape = input_shape(options.network, size) or spec.input_shape
    with show_progress(console) as progress:
        progress(f"building {options.network}")
        counts = complexity(create(options.network, input_shape=shape))
    se = spec.se and asdict(spec.se)
    if options.json:
        layers = [asdict(layer) for layer in counts.layers]
        about = {"name": options.network, "input_shape": shape, **_totals(counts), "source": spec.source}
        return print_json(about | {"se": se, "layers": layers})
    Output().print(f"[bold]{options.network}[/bold]: {spec.source}")
    table = new_table(show_header=False)
    table.add_row("input", "x".join(map(str, shape)))
    table.add_row("parameters", f"{counts.trainable:,} trained, {counts.statistics:,} BatchNorm statistics")
    table.add_row("of which SE", f"{counts.se_trainable:,} ({counts.se_trainable / counts.trainable:.1%})")
    table.add_row("multiply-adds", f"{counts.macs / 1e9:.4f} G, of which SE {counts.se_macs / 1e9:.4f} G")
    config = ", ".join(f"{field} {value}" for field, value in se.items()) if se else "none: a baseline"
    table.add_row("squeeze-and-excitation", config)
    print_table(table)
    if options.layers:
        table = new_table("layer", "type", "output", "parameters", "multiply-adds")
        for layer in counts.layers:
            output = "x".join(map(str, layer.output_shape))
            table.add_row(layer.name, layer.type, output, f"{layer.trainable:,}", f"{layer.macs:,}")
        print_table(table)


def _totals(counts):
    return {field: getattr(counts, field) for field in ("trainable", "statistics", "se_trainable", "macs", "se_macs")}
