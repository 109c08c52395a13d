"""The command that names what is on photos."""

import argparse
import gc
import sys
from dataclasses import asdict
from pathlib import Path

from rich.bar import Bar
from rich.console import Console

from . import arguments
from .arguments import Commands, add_command
from .screen import EXIT_UNREAD, print_json, print_line, print_message, print_table, show_progress

_BAR = 40  # characters


def add_predict(commands: Commands) -> None:
    """`se-keras predict PHOTO ... --model MODEL`."""
    add = add_command(commands, "predict", predict, json_output=True)
    photos = "image files, folders of them, or - for a file on standard input"
    add("photos", metavar="PHOTO", nargs="+", help=photos)
    add("--model", type=Path, help="a .keras or .tflite file, or a SavedModel's folder")
    add("--network", metavar="NAME", help="a network with released weights instead, which are downloaded once")
    add("--top", type=arguments.POSITIVE, default=5, metavar="N", help="number of classes (default: %(default)s)")
    add("--labels", metavar="FILE", help=arguments.LABELS)
    add("--normalize", nargs="+", metavar="VALUE", help=arguments.NORMALIZE)
    arguments.add_override(add)


def predict(options: argparse.Namespace, console: Console) -> int | None:
    """Name what is on photos: the most probable classes of each, with their probabilities.

    Examples:
      se-keras predict photo.jpg --model model_int8.tflite
      se-keras predict photos/ --model runs/se/model.keras --top 1 --json
      se-keras predict cat.jpg --network se_resnet50
      se-keras predict - --model served/model --json
    """
    if (options.model is None) == (options.network is None):
        raise ValueError("Give one of --model FILE and --network NAME, whose released weights are downloaded")
    given = options.labels or options.normalize
    arguments.only_for(options, "--labels --normalize --override", "--model", "--network", possible=options.model)
    arguments.only_for(options, "--override", "--labels and --normalize", "neither", possible=given)
    contents = [sys.stdin.buffer.read() if photo == "-" else photo for photo in options.photos]
    with show_progress(console) as progress:
        progress(f"loading {options.model or options.network}")
        gc.disable()  # one of four seconds, in importing TensorFlow and at the end, and nothing is found
        from se_keras.prediction import classifier_of, predict_files

        gc.freeze()
        gc.enable()
        model, labels = _model_and_labels(options, console)
        normalization = arguments.read_normalization(options.normalize)
        classifier = classifier_of(
            model, top=options.top, labels=labels, normalization=normalization, override=options.override
        )
        found = predict_files(classifier, contents)
        if options.json:
            found = list(found)
    if classifier.labels is None:
        names = f"{classifier.model.name} has no names of classes: they are numbers, or --labels FILE"
        print_message(console, f"note: {names}")
    if options.json:
        print_json([asdict(prediction) | {"scores": _as_json(prediction.scores)} for prediction in found])
    failed = []
    for prediction in found:
        if prediction.error:
            failed.append(prediction.photo)
            print_message(console, f"error: {prediction.photo!r} has no answer. {prediction.error}")
        elif not options.json:
            print_line(prediction.photo)
            print_table((), _rows(prediction.scores, classifier.labels is not None), box=None, padding=(0, 2))
    return EXIT_UNREAD if failed else None


def _model_and_labels(options, console):
    """The model, and the names of its classes if its files do not have them."""
    if options.network is None:
        return options.model, options.labels and arguments.read_labels(options.labels)
    from se_keras import create
    from se_keras.preprocessing import imagenet_labels

    model = create(options.network, weights="imagenet")
    try:
        return model, imagenet_labels()
    except OSError as error:
        print_message(console, f"warning: {error}")
        return model, None


def _as_json(scores):
    return [score._asdict() for score in scores]


def _rows(scores, has_names):
    """A row of the chart for each class."""
    for score in scores:
        name = score.name if has_names else f"class {score.name}"
        yield name, Bar(1, 0, score.probability, width=_BAR), f"{score.probability:.1%}"
