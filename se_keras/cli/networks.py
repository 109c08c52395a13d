"""The commands about the networks of the catalogue: list them, and show one.

The rows that are shipped are read without an import of se_keras, which takes seconds.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import Any

from rich.console import Console
from rich.table import Column

from .arguments import (
    FAMILIES,
    POSITIVE,
    Commands,
    add_command,
    input_shape,
    only_for,
    shipped_networks,
)
from .screen import Output, print_json, print_line, print_table, show_progress

PAPER_COLUMNS = "G MACs, million parameters, and top-1 error on ImageNet, or on CIFAR-10/CIFAR-100"


def add_list(commands: Commands) -> None:
    """`se-keras list NAME ...`."""
    add = add_command(commands, "list", list_networks, json_output=True)
    add("network", nargs="*", metavar="NAME", help="a part of names, or a pattern such as 'se_resnet*'")
    add("--family", choices=FAMILIES, help="only networks of one family")
    add("--pretrained", action="store_true", help="only networks with released weights")
    add("--counts", action="store_true", help="count again: builds each network (a minute for all)")
    add("--markdown", action="store_true", help="print a Markdown table")


def list_networks(options: argparse.Namespace, console: Console) -> None:
    """List the networks with their counts and the paper's figures.

    Examples:
      se-keras list
      se-keras list resnet50 mobile
      se-keras list 'se_resnet*' --pretrained
      se-keras list --family cifar --markdown
      se-keras list --counts --json
    """
    only_for(options, "--markdown", "a table", "--json", possible=not options.json)
    rows = [row for row in shipped_networks() if _is_wanted(row, options)]
    if not rows:
        given = " or ".join(map(repr, options.network)) or "all names"
        limits = f" --family {options.family}" * bool(options.family) + " --pretrained" * options.pretrained
        rule = "NAME is a part of a name, or a quoted pattern such as 'se_resnet*'; se-keras list shows all"
        raise ValueError(f"No network is found. {rule}. Received: {given}{limits}")
    if options.counts:
        with show_progress(console) as progress:
            rows = [_counted(row["name"], row["input_shape"], progress)[0] for row in rows]
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


def _is_wanted(row, options):
    name = row["name"]
    matches = (
        fnmatchcase(name, given) if set(given) & set("*?[") else given in name for given in options.network or "*"
    )
    return any(matches) and options.family in (None, row["family"]) and (row["weights"] or not options.pretrained)


def _counted(network: str, shape: Any, progress: Callable[[str], object]) -> tuple[dict[str, Any], Any]:
    """The row of a network for images of this shape, and its counts, of which no values are computed."""
    import keras

    from se_keras import complexity, create
    from se_keras.figures import row_of

    progress(f"counting {network}")
    with keras.StatelessScope(initialize_variables=False):
        counts = complexity(create(network, input_shape=shape))
    keras.utils.clear_session()
    return row_of(network, counts) | {"input_shape": shape}, counts


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
    add("network", metavar="NAME", help="a name that se-keras list prints")
    add("--size", type=POSITIVE, help="height and width to count at (default: the network's own)")
    add("--layers", action="store_true", help="layer by layer")


def show(options: argparse.Namespace, console: Console) -> None:
    """Show one network: its source, input, counts, and released weights.

    Examples:
      se-keras show se_resnet50
      se-keras show senet154 --layers
      se-keras show se_resnet50 --size 320 --json
    """
    row, layers = next((row for row in shipped_networks() if row["name"] == options.network), None), ()
    if row is None or options.size or options.layers:
        from se_keras.catalogue import spec_of

        spec, size = spec_of(options.network), options.size
        if size is not None and size < spec.minimum_size:
            raise ValueError(f"{options.network} takes images of at least {spec.minimum_size}. Received: --size {size}")
        with show_progress(console) as progress:
            shape = input_shape(options.network, size) or spec.input_shape
            row, counts = _counted(options.network, shape, progress)
        layers = counts.layers if options.layers else ()
    if options.json:
        return print_json(row | ({"layers": [asdict(layer) for layer in layers]} if layers else {}))
    Output().print(f"[bold]{options.network}[/bold]: {row['source']}")
    print_table((), _show_rows(row).items())
    if layers:
        columns = ("layer", "type", "output", "parameters", "multiply-adds")
        shapes = ((x, "x".join(map(str, x.output_shape))) for x in layers)
        print_table(columns, ((x.name, x.type, output, f"{x.trainable:,}", f"{x.macs:,}") for x, output in shapes))


def _show_rows(row):
    """What `show` prints of a network, by title."""
    se, paper, weights = row["se"], row["paper"], row["weights"]
    mean, std = (", ".join(f"{value:g}" for value in row["normalization"][key]) for key in ("mean", "std"))
    shown = {
        "input": "x".join(map(str, row["input_shape"])),
        "preprocessing": f"(pixel - ({mean})) / ({std}), {'gray' if row['input_shape'][-1] == 1 else 'RGB'}, 0 to 255",
        "parameters": f"{row['trainable']:,} trained, {row['statistics']:,} BatchNorm statistics",
        "of which SE": f"{row['se_trainable']:,} ({row['se_trainable'] / row['trainable']:.1%})",
        "multiply-adds": f"{row['macs'] / 1e9:.4f} G, of which SE {row['se_macs'] / 1e9:.4f} G",
        "squeeze-and-excitation": ", ".join(f"{field} {x}" for field, x in se.items()) if se else "none: a baseline",
    }
    if paper:
        shown["paper"] = ", ".join(f"{error:.2f} % top-1 error on {data}" for data, error in paper["error"].items())
    if not weights:
        return shown | {"released weights": "none"}
    top1 = f"{weights['top1']:.2f} % at 224x224 (timm's table)" if weights["top1"] else "not stated for 224x224"
    about = {"weights from": weights["source"], "repository": weights["repo"], "license": weights["license"]}
    return shown | {"released weights": 'weights="imagenet", 1000 classes', **about, "top-1 accuracy": top1}
