"""The command that evaluates models on labelled images."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from .arguments import (
    DATA,
    PROTOCOLS,
    Commands,
    add_command,
    add_corrupt_budget,
    add_override,
    one_of,
    read_normalization,
)
from .screen import print_json, print_line, print_table, show_progress

if TYPE_CHECKING:  # not imported for --help
    from se_keras.export.verification import Runnable
    from se_keras.training.data import Data


def add_evaluate(commands: Commands) -> None:
    """`se-keras evaluate MODEL ...`."""
    add = add_command(commands, "evaluate", evaluate, json_output=True)
    add("models", metavar="MODEL", nargs="+", type=Path, help=".keras and .tflite files, folders of SavedModels")
    add("--data", help=f"{DATA} (default: what the model was trained on)")
    add("--split", default="test", choices=("test", "train"), help="default: %(default)s")
    add("--protocol", help=f"{one_of(PROTOCOLS)} (default: 224, 299 or 320 for models of this size, else plain)")
    add("--normalize", nargs="+", metavar="VALUE", help="as for export; default: as the models were trained")
    add_override(add)
    add("--confusion", type=Path, metavar="FILE", help="write the confusion matrix: .png, .svg or .csv")
    add_corrupt_budget(add)


def evaluate(options: argparse.Namespace, console: Console) -> None:
    """Evaluate a model, or several as an ensemble, by the paper's protocols.

    Examples:
      se-keras evaluate runs/se/model.keras
      se-keras evaluate runs/a/model.keras digits_int8.tflite --confusion c.png
      se-keras evaluate model.keras --data imagenet/ --normalize se_resnet50
      se-keras evaluate a.keras b.keras --data imagenet/ --protocol multi_crop --json
    """
    from se_keras import storage
    from se_keras.evaluation import evaluate, protocol_for, write_confusion
    from se_keras.export.verification import runnable
    from se_keras.wording import counted

    if options.confusion:
        storage.check_writable(options.confusion)
    with show_progress(console) as progress:
        models, normalization = [runnable(path) for path in options.models], read_normalization(options.normalize)
        data = data_for(options, models, normalization)
        protocol = options.protocol or protocol_for(models, data)
        found = evaluate(
            models,
            getattr(data, options.split),
            data,
            protocol=protocol,
            corrupt_budget=options.corrupt_budget,
            normalization=normalization,
            override=options.override,
            progress=progress,
        )
        if options.confusion:
            write_confusion(options.confusion, found, data.classes)
    paper = _paper_error(models, data)
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
    print_table(
        columns,
        rows,
        title=title,
        caption=f"{counted(found.images, 'image')}, {counted(len(data.classes), 'class')}",
    )
    if found.skipped:
        print_line(f"skipped, because they cannot be decoded: {', '.join(found.skipped)}")
    if options.confusion:
        print_line(f"wrote {options.confusion}")


def data_for(options: argparse.Namespace, models: "Sequence[Runnable]", normalization: Any) -> "Data":
    """The data of --data, or those that the models were trained on, with the channels of the models."""
    from se_keras.evaluation import data_of
    from se_keras.export.verification import of_pixels
    from se_keras.training import sources
    from se_keras.training.data import sized

    source = options.data or data_of(models)
    if source in sources.DATA:
        data, (height, width) = sources.load(source), models[0].input_shape[1:3]
        return sized(data, (height, width)) if height and width else data
    mean, std = normalization or of_pixels(*models)
    channels = models[0].input_shape[-1] or len(mean)
    mean, std = (list(values) * (channels // len(values)) for values in (mean, std))
    return sources.load(source, mean=mean, std=std)


def _paper_error(models, data):
    """The paper's top-1 error of a single network on ImageNet, whose validation images have 1000 classes."""
    from se_keras.figures import PAPER

    known = PAPER.get(models[0].about.network) if len(models) == 1 else None
    return known.error.get("ImageNet") if known and len(data.classes) == 1000 else None
