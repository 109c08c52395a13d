"""The command that evaluates models on labelled images."""

import argparse
from pathlib import Path

from rich.console import Console

from .arguments import DATA, PROTOCOLS, Commands, add_command, add_corrupt_budget, one_of, read_normalization
from .screen import print_json, print_line, print_table, show_progress


def add_evaluate(commands: Commands) -> None:
    """`se-keras evaluate MODEL ...`."""
    add = add_command(commands, "evaluate", evaluate, json_output=True)
    add("models", metavar="MODEL", nargs="+", type=Path, help=".keras and .tflite files, folders of SavedModels")
    add("--data", default="digits", help=f"{DATA} (default: digits)")
    add("--split", default="test", choices=("test", "train"), help="default: %(default)s")
    add("--protocol", help=f"{one_of(PROTOCOLS)} (default: plain for the digits, else 224)")
    add("--normalize", nargs="+", metavar="VALUE", help="as for export; default: as the models were trained")
    add("--confusion", type=Path, metavar="FILE", help="write the confusion matrix: .png, .svg or .csv")
    add_corrupt_budget(add)


def evaluate(options: argparse.Namespace, console: Console) -> None:
    """Evaluate a model, or several as an ensemble, by the paper's protocols.

    Examples:
      se-keras evaluate runs/se/model.keras
      se-keras evaluate runs/a/model.keras digits_int8.tflite --confusion c.png
      se-keras evaluate model.keras --data imagenet/ --protocol 224 --normalize se_resnet50
      se-keras evaluate a.keras b.keras --data imagenet/ --protocol multi_crop --json
    """
    from se_keras import storage
    from se_keras.evaluation import evaluate, write_confusion
    from se_keras.training import sources

    if options.confusion:
        storage.check_writable(options.confusion)
    with show_progress(console) as progress:
        trained = [_training_record(path) for path in options.models]
        data = sources.load(options.data, **_common_normalization(options, trained))
        _require_classes(options.models, trained, data)
        protocol = options.protocol or ("plain" if hasattr(data.test, "images") else "224")
        split, budget = getattr(data, options.split), options.corrupt_budget
        found = evaluate(options.models, split, data, protocol=protocol, corrupt_budget=budget, progress=progress)
        if options.confusion:
            write_confusion(options.confusion, found, data.classes)
    paper = _paper_error(trained, data)
    if options.json:
        report = {
            "models": list(map(str, options.models)),
            "data": data.name,
            "split": options.split,
            "protocol": protocol,
            "paper_top1_error": paper,
            **found.to_json(),
            "confusion": found.confusion.tolist() if len(data.classes) <= 100 else None,
        }
        return print_json(report)
    columns = ("", "accuracy", "95 % interval", "error", "paper's error")
    published = "" if paper is None else f"{paper:.2f}%"
    rows = (
        (name, f"{x.value:.2%}", f"{x.low:.2%}..{x.high:.2%}", f"{1 - x.value:.2%}", error)
        for name, x, error in (("top-1", found.top1, published), ("top-5", found.top5, ""))
    )
    title = f"{' + '.join(map(str, options.models))} on {data.name}, protocol {protocol}"
    print_table(columns, rows, title=title, caption=f"{found.images:,} images, {len(data.classes)} classes")
    if found.skipped:
        print_line(f"skipped, because they cannot be decoded: {', '.join(found.skipped)}")
    if options.confusion:
        print_line(f"wrote {options.confusion}")


def _training_record(path):
    """What is known of a model's training: `network`, `classes` and `normalization`, as far as its files have them."""
    from se_keras.runs import training_of

    if path.suffix == ".keras":
        return training_of(path) or {}
    if path.suffix != ".tflite" or not path.is_file():
        return {}
    from se_keras.export.litert.metadata import read

    if (about := read(path.read_bytes())) is None:
        return {}
    normalization = about.normalization and dict(zip(("mean", "std"), map(list, about.normalization), strict=True))
    return {"network": about.network, "classes": about.labels, "normalization": normalization}


def _common_normalization(options, trained):
    """`mean` and `std` for the data: those of --normalize, or those that all models were trained with."""
    if options.normalize:
        return dict(zip(("mean", "std"), read_normalization(options.normalize), strict=True))
    known = [x["normalization"] for x in trained if x.get("normalization")]
    if any(x != known[0] for x in known):
        raise ValueError(f"The models were trained on images of different scales. Received: {known[0]} and {known[1]}")
    return {name: tuple(values) for name, values in known[0].items()} if known else {}


def _require_classes(paths, trained, data):
    for path, about in zip(paths, trained, strict=True):
        classes = about.get("classes") or data.classes
        for number, (theirs, ours) in enumerate(zip(classes, data.classes, strict=False)):
            if theirs != ours:
                raise ValueError(f"{str(path)!r} calls class {number} {theirs!r}, and {data.name} calls it {ours!r}")


def _paper_error(trained, data):
    """The paper's top-1 error of a single network on ImageNet, whose validation images have 1000 classes."""
    from se_keras.figures import PAPER

    known = PAPER.get(trained[0].get("network")) if len(trained) == 1 else None
    return known.error.get("ImageNet") if known and len(data.classes) == 1000 else None
