"""The command that says what the gates of a model do."""

import argparse
from pathlib import Path

from rich.console import Console

from .arguments import DATA, POSITIVE, Commands, add_command, add_override, read_normalization
from .screen import print_json, print_line, print_table, show_progress

LIMIT = 1000


def add_gates(commands: Commands) -> None:
    """`se-keras gates MODEL`."""
    add = add_command(commands, "gates", gates, json_output=True)
    add("model", metavar="MODEL", type=Path, help="a .keras file")
    add("--data", help=f"{DATA} (default: what the model was trained on)")
    add("--limit", type=POSITIVE, default=LIMIT, metavar="N", help="use at most N test images (default: %(default)s)")
    add("--normalize", nargs="+", metavar="VALUE", help="as for export; default: as the model was trained")
    add_override(add)
    add("-o", "--output", type=Path, metavar="FILE", help="draw the gates by class: .png, .svg or .pdf")


def gates(options: argparse.Namespace, console: Console) -> None:
    """Say what each squeeze-and-excitation gate of a model does on images, and which do nothing.

    Examples:
      se-keras gates runs/se/model.keras
      se-keras gates runs/se/model.keras -o gates.png
      se-keras gates model.keras --data photos/ --normalize se_resnet50 --json
    """
    from se_keras import drawing, storage
    from se_keras.evaluation import labelled_images
    from se_keras.export.gates import draw_gates, measure_gates
    from se_keras.export.verification import load_keras, runnable
    from se_keras.runs import training_of

    from .evaluating import data_for

    if options.output:
        storage.check_writable(drawing.picture_file(options.output, "Gates"))
    with show_progress(console) as progress:
        progress(f"loading {options.model}")
        model, normalization = load_keras(options.model), read_normalization(options.normalize)
        known = runnable(model, training=training_of(options.model))
        if normalization is not None:
            known = known.normalized(normalization, override=options.override)
        data = data_for(options, [known], normalization)
        images, labels = labelled_images(known, data.test, data, limit=options.limit)
        progress(f"measuring gates on {len(images):,} images")
        found = measure_gates(model, images, labels)
        if options.output:
            draw_gates(options.output, found, data.classes)
    if options.json:
        return print_json({"model": str(options.model), "data": data.name, "gates": [gate.to_json() for gate in found]})
    columns = ("", "mean", "between images", "between classes", "dead units", "same for all", "saturated")
    rows = (
        (
            gate.layer,
            f"{gate.mean.mean():.3f}",
            f"{gate.between_images:.4f}",
            f"{gate.between_classes:.4f}",
            f"{gate.dead_units} of {gate.units}",
            f"{gate.constant_channels} of {len(gate.mean)}",
            f"{gate.saturated:.1%}",
        )
        for gate in found
    )
    print_table(columns, rows, title=f"The gates of {model.name} on {len(images):,} images of {data.name}")
    for advice in filter(None, (gate.advice for gate in found)):
        print_line(advice)
    if options.output:
        print_line(f"wrote {options.output}")
