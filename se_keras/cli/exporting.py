"""The command that exports a Keras model to a LiteRT file or a SavedModel."""

import argparse
from pathlib import Path

from rich.console import Console

from . import arguments
from .arguments import CALIBRATED, Commands, add_command, one_of, only_for
from .screen import print_json, print_line, show_progress


def add_export(commands: Commands) -> None:
    """`se-keras export MODEL -o OUTPUT`."""
    add = add_command(commands, "export", export, json_output=True)
    add("model", metavar="MODEL", type=Path, help="a .keras file")
    add("-o", "--output", type=Path, required=True, help="FILE.tflite, or the SavedModel's folder")
    add("--precision", default="float32", help=one_of(arguments.PRECISIONS, default="float32"))
    calibrated = f"for {' and '.join(CALIBRATED)}, and for --freeze-gates: {arguments.IMAGES}"
    add("--calibration", metavar="IMAGES", help=calibrated)
    frozen = "make constants of gates as long as this share of the images keeps its top-1 class, such as 0.995"
    add("--freeze-gates", type=arguments.BUDGET, metavar="SHARE", help=frozen)
    arguments.add_folder_options(add)
    for option in ("--input-type", "--output-type"):
        add(option, help=f"for int8: {one_of(arguments.TYPES, default='float32')}")
    kept = f"for {' and '.join(CALIBRATED)}: the layers that stay in float32, by name, such as '.*_se_.*'"
    add("--keep-float", metavar="REGEX", help=kept)
    gpu = "for int8 and dynamic: no strided 1x1 convolutions, which LiteRT's GPU delegate computes wrongly"
    add("--for-gpu", action="store_true", help=gpu)
    published = "export the model as it is; without this, BatchNorm is folded and the squeeze hoisted first"
    add("--as-published", action="store_true", help=published)
    add("--labels", metavar="FILE", help=arguments.LABELS)
    top = "number of classes that a SavedModel answers with (default: 5)"
    add("--top", type=arguments.POSITIVE, metavar="N", help=top)


def export(options: argparse.Namespace, console: Console) -> None:
    r"""Export a .keras file to LiteRT (-o FILE.tflite) or to a SavedModel (-o FOLDER).

    Examples:
      se-keras export runs/se/model.keras -o digits.tflite
      se-keras export runs/se/model.keras --precision int8 --calibration digits -o digits_int8.tflite
      se-keras export runs/se/model.keras --precision int8 --calibration images.npy -o digits_int8.tflite
      se-keras export runs/se/model.keras --precision int8 --calibration digits \
          --input-type uint8 -o camera.tflite
      se-keras export runs/se/model.keras --precision int8 --calibration digits --freeze-gates 0.99 -o fast.tflite
      se-keras export runs/se/model.keras --precision dynamic -o small.tflite
      se-keras export model.keras --precision int8 --calibration photos/ --normalize se_resnet50 -o model_int8.tflite
      se-keras export runs/se/model.keras -o models/digits
      se-keras export model.keras --labels names.txt --normalize 0 255 -o models/photos
    """
    from se_keras import storage
    from se_keras.export import freeze_gates, to_litert, to_savedmodel
    from se_keras.export.verification import load_keras, runnable
    from se_keras.runs import training_of
    from se_keras.wording import counted

    to_file, precision = options.output.suffix == ".tflite", options.precision
    _check_output(options, to_file)
    _check_calibration(options)
    with show_progress(console) as progress:
        progress(f"loading {options.model}")
        model = load_keras(options.model)
        known = runnable(model, training=training_of(options.model))
        normalization = arguments.read_normalization(options.normalize)
        if normalization is not None:
            known = known.normalized(normalization, override=options.override)
        labels = options.labels or known.about.labels
        only_for(options, "--top", "a model with labels: give --labels", "no labels", possible=labels)
        calibration = None
        if options.calibration:
            shape = model.inputs[0].shape[1:]
            calibration = arguments.read_images(options.calibration, options, shape, progress, known)
        if options.freeze_gates:
            model = freeze_gates(model, calibration, budget=options.freeze_gates, progress=progress)
        if to_file or not options.output.is_dir():
            storage.check_writable(options.output)
        progress(f"exporting {model.name}")
        description = {
            "lowering": not options.as_published,
            "labels": options.labels and arguments.read_labels(options.labels),
            "normalization": normalization,
            "training": known.about.training,
            "override": options.override,
        }
        if to_file:
            exported = to_litert(
                model,
                precision=precision,
                calibration=calibration if precision in CALIBRATED else None,
                input_type=options.input_type or "float32",
                output_type=options.output_type or "float32",
                keep_float=options.keep_float,
                for_gpu=options.for_gpu,
                progress=progress,
                **description,
            )
            exported.save(options.output)
            path = options.output
        else:
            exported = to_savedmodel(model, options.output, top=options.top or 5, **description)
            path = exported.path
    if options.json:
        return print_json({"path": str(path), **exported.manifest})
    if options.freeze_gates:
        print_line(f"frozen: {model.freezing}")
    if calibration is not None and precision in CALIBRATED:
        print_line(f"calibrated on {exported.manifest['calibration_images']} of {counted(len(calibration), 'image')}")
    _print_manifest(path, exported.manifest)


def _check_output(options, to_file):
    """Refuses a target and options that do not go together."""
    if not to_file and options.precision != "float32":
        rule = f"{options.precision} is for -o FILE.tflite: a SavedModel is float32"
        raise ValueError(f"{rule}. Received: {options.output}")
    suffix, received = options.output.suffix, f"-o {options.output}"
    if suffix.lower() == ".tflite" and not to_file:
        raise ValueError(f"A LiteRT file's name ends in .tflite, in small letters. Received: {received}")
    only_for(options, "--input-type --output-type --keep-float --for-gpu", "-o FILE.tflite", received, possible=to_file)
    only_for(options, "--top", "a SavedModel's folder", received, possible=not to_file)
    given = options.labels or options.normalize
    only_for(options, "--override", "--labels and --normalize", "neither", possible=given)


def _check_calibration(options):
    """Refuses images without a use, and uses without images."""
    if options.calibration and options.precision not in CALIBRATED and not options.freeze_gates:
        possible = f"--calibration is for --precision {' and '.join(CALIBRATED)}, and for --freeze-gates"
        raise ValueError(f"{possible}. Received: --precision {options.precision}")
    only_for(options, "--as-published", "gates that stay", "--freeze-gates", possible=not options.freeze_gates)
    if options.freeze_gates and not options.calibration:
        raise ValueError("--freeze-gates needs --calibration IMAGES, some hundreds. Received: no --calibration")
    only_for(options, "--limit", "--calibration FOLDER", "no --calibration", possible=options.calibration)


def _print_manifest(path, manifest):
    from se_keras.export.lowering import summary

    if lowered := manifest["lowering"]:
        print_line(f"lowered: {summary(lowered)}")
    top1, error = manifest["agreement"]["top1"], manifest["agreement"]["max_error"]
    agreement = f"top-1 agreement {top1:.1%}, max error {error:.0e} of the logits' range"
    print_line(f"wrote {path}: {agreement}, compared with the Keras model")
