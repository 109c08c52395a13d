"""The commands about the networks of the catalogue: list them, and show one."""

import argparse
from dataclasses import asdict

from rich.console import Console
from rich.table import Column

from .arguments import POSITIVE, Commands, add_command, input_shape, only_for
from .screen import Output, print_json, print_line, print_table, show_progress

PAPER_COLUMNS = "G MACs, million parameters, and top-1 error on ImageNet, or on CIFAR-10/CIFAR-100"


def add_list(commands: Commands) -> None:
    """`se-keras list PART ...`."""
    add = add_command(commands, "list", list_networks, json_output=True)
    add("part", nargs="*", metavar="PART", help="only networks with one of these in their names")
    add("--counts", action="store_true", help="count again: builds each network (a minute for all)")
    add("--markdown", action="store_true", help="print a Markdown table")


def list_networks(options: argparse.Namespace, console: Console) -> None:
    """List the networks with their counts and the paper's figures.

    Examples:
      se-keras list
      se-keras list resnet50 mobile
      se-keras list --markdown
      se-keras list --counts --json
    """
    from se_keras import names
    from se_keras.figures import listing

    only_for(options, "--markdown", "a table", "--json", possible=not options.json)
    parts = options.part or [""]
    found = [name for name in names() if any(part in name for part in parts)]
    if not found:
        raise ValueError(f"No network's name has {' or '.join(map(repr, parts))} in it: se-keras list shows all")
    with show_progress(console) as progress:
        rows = _counted(found, progress) if options.counts else [row for row in listing() if row["name"] in found]
    # An SE network comes after its baseline.
    rows.sort(key=lambda row: (row["name"].removeprefix("se_"), row["name"].startswith("se_")))
    if options.json:
        return print_json(rows)
    titles = ("network", "size", "parameters", "of SE", "G MACs", "paper", "error %")
    cells = [_list_cells(row) for row in rows]
    if options.markdown:
        lines = [titles, ["---"] + ["---:"] * 4 + ["---"] * 2, *cells]
        return print_line("\n".join(f"| {' | '.join(line)} |" for line in lines))
    columns = [Column(title, no_wrap=True) for title in titles]
    for column in columns[1:5]:
        column.justify = "right"
    print_table(columns, cells, caption=f"Paper: {PAPER_COLUMNS}.", padding=0)


def _counted(names, progress):
    import keras

    from se_keras import complexity, create
    from se_keras.catalogue import spec_of
    from se_keras.figures import PAPER

    rows = []
    for name in names:
        progress(f"counting {name}")
        with keras.StatelessScope(initialize_variables=False):  # counts need shapes, not values
            counts = complexity(create(name))
        keras.utils.clear_session()
        spec, paper = spec_of(name), PAPER.get(name)
        row = {"name": name, "input_shape": spec.input_shape, **_totals(counts)}
        rows.append(row | {"paper": paper and asdict(paper), "source": spec.source})
    return rows


def _list_cells(row):
    """The cells of one network; the paper's figures are in the last two."""
    gmacs, millions, errors = "", "", []
    if paper := row["paper"]:
        gmacs = f"{paper['gmacs']:.{2 if paper['gmacs'] >= 1 else 3}f}" if paper["gmacs"] else ""
        millions = f"{paper['mparameters']}M" if paper["mparameters"] else ""
        data_sets = ("ImageNet",) if "ImageNet" in paper["error"] else ("CIFAR-10", "CIFAR-100")
        digits = 1 if millions else 2  # as in the paper's tables
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
    add = add_command(commands, "show", show, json_output=True)
    add("network", metavar="NAME")
    add("--size", type=POSITIVE, help="height and width to count at (default: the network's own)")
    add("--layers", action="store_true", help="layer by layer")


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
    rows = {
        "input": "x".join(map(str, shape)),
        "parameters": f"{counts.trainable:,} trained, {counts.statistics:,} BatchNorm statistics",
        "of which SE": f"{counts.se_trainable:,} ({counts.se_trainable / counts.trainable:.1%})",
        "multiply-adds": f"{counts.macs / 1e9:.4f} G, of which SE {counts.se_macs / 1e9:.4f} G",
        "squeeze-and-excitation": ", ".join(f"{field} {x}" for field, x in se.items()) if se else "none: a baseline",
    }
    print_table((), rows.items())
    if options.layers:
        columns = ("layer", "type", "output", "parameters", "multiply-adds")
        layers = ((x, "x".join(map(str, x.output_shape))) for x in counts.layers)
        print_table(columns, ((x.name, x.type, output, f"{x.trainable:,}", f"{x.macs:,}") for x, output in layers))


def _totals(counts):
    return {field: getattr(counts, field) for field in ("trainable", "statistics", "se_trainable", "macs", "se_macs")}
