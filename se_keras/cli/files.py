"""What the command does with models and files: export, verify, inspect."""

from dataclasses import asdict
from pathlib import Path

from rich.markup import escape

from .screen import Output, answer, new_table, print_json, progress_on, say

LIMIT = 500
LAYER_TOLERANCE = 1e-3
EXIT_DISAGREEMENT = 1


def export(options, console):
    """`se-keras export`."""
    from se_keras import images, storage
    from se_keras.export import to_litert, to_savedmodel
    from se_keras.export.verification import load_keras
    from se_keras.training.loop import training_of

    to_file = options.output.suffix == ".tflite"
    if not to_file and options.precision != "float32":
        raise ValueError(
            f"{options.precision} is for -o FILE.tflite: a SavedModel is float32. Received: {options.output}"
        )
    if options.calibration and options.precision not in ("int8", "int16x8"):
        raise ValueError(
            f"--calibration is for --precision int8 and int16x8. Received: --precision {options.precision}"
        )
    lowering = not options.as_published
    with progress_on(console) as progress:
        progress(f"loading {options.model}")
        model = load_keras(options.model)
        calibration = None
        if options.calibration:
            if Path(options.calibration).is_dir() and not options.normalize:
                images.require_pixels(model)
            calibration = _images(options.calibration, options, model.inputs[0].shape[1:], progress)
        storage.check_writable(options.output)
        progress(f"exporting {model.name}")
        about = {
            "labels": options.labels and _labels(options.labels),
            "normalization": options.normalize and normalization_of(options.normalize),
        }
        if to_file:
            exported = to_litert(
                model,
                precision=options.precision,
                calibration=calibration,
                input_type=options.input_type,
                output_type=options.output_type,
                keep_float=options.keep_float,
                lowering=lowering,
                training=training_of(options.model),
                progress=progress,
                **about,
            )
            exported.save(options.output)
        else:
            exported = to_savedmodel(model, options.output, lowering=lowering, top=options.top, **about)
    path = options.output if to_file else exported.path
    if options.json:
        return print_json({"path": str(path), **exported.manifest})
    if calibration is not None:
        answer(f"calibrated on {exported.manifest['calibration_images']} of {len(calibration)} images")
    done = exported.manifest["lowering"]
    if done:
        squeezes = done["hoisted"] + done["unhoisted"]
        answer(f"lowered: {done['hoisted']} of {squeezes} squeezes hoisted, {done['folded']} layers folded")
    answer(f"wrote {path}: {_agreement(exported.manifest['agreement'])} with the Keras model")


def verify(options, console):
    """`se-keras verify`; status 1 where two models disagree by more than they may."""
    from se_keras.export import verify
    from se_keras.export.verification import images_shape, runnable

    if options.normalize and not Path(options.images or "").is_dir():
        raise ValueError(f"--normalize is for a folder of images. Received: {options.images or 'noise'}")
    if options.tolerance is not None and not options.tolerance >= 0:
        raise ValueError(f"--tolerance is a share of the range, at least 0. Received: {options.tolerance}")
    with progress_on(console) as progress:
        sides = []
        for path in (options.a, options.b):
            progress(f"loading {path}")
            sides.append(runnable(path))
        if options.layers and None in [side.model for side in sides]:
            raise ValueError(f"--layers is for two .keras files. Received: {options.a} and {options.b}")
        images = options.images and _images(options.images, options, images_shape(*sides), progress, split="test")
        progress(f"comparing {options.b} with {options.a}")
        found = verify(*sides, images)
    far = options.tolerance is not None and found.agreement.max_error > options.tolerance
    tolerance = LAYER_TOLERANCE if options.tolerance is None else options.tolerance
    beyond = found.first_beyond(tolerance)
    if options.json:
        layers = [{"name": name, **asdict(result)} for name, result in found.layers]
        print_json({"a": str(options.a), "b": str(options.b), "images": options.images or "noise",
                    "agreement": asdict(found.agreement), "layers": layers, "first_beyond": beyond})  # fmt: skip
    else:
        _print_verification(found, options)
        if beyond:
            answer(f"first layer beyond {tolerance:g} of its range: {beyond}")
    if far:
        error = f"max error {found.agreement.max_error:.1e} of the range is beyond {options.tolerance:g}"
        say(console, f"se-keras: {options.b} disagrees with {options.a}: {error}")
        return EXIT_DISAGREEMENT


def _print_verification(found, options):
    rows = [("outputs", found.agreement)]
    if options.layers:
        rows = [*found.layers, *rows]
    answer(f"{options.b} beside {options.a}, on {options.images or 'noise'}")
    table = new_table("", "max error", "mean error", "cosine", "top-1", "images")
    for name, result in rows:
        errors = (f"{result.max_error:.1e}", f"{result.mean_error:.1e}", f"{result.cosine:.6f}")
        table.add_row(name, *errors, f"{result.top1:.1%}", str(result.samples))
    Output().print(table)


def inspect(options, console):
    """`se-keras inspect`."""
    from se_keras.export.litert.inspection import inspect

    with progress_on(console) as progress:
        progress(f"loading {options.file}")
        found = inspect(options.file)
    if options.json:
        print_json(found.to_json())
    else:
        _print_inspection(options.file, found)
    if found.golden and not found.golden.agrees:
        raise ValueError(f"{str(options.file)!r} does not compute here what its manifest says: {_golden(found.golden)}")


def _print_inspection(file, found):
    """One row for each thing that a file says or is."""
    about, manifest = found.metadata, found.manifest
    rows = {"network": f"{about.network}, {about.precision}" if about else "not told: no metadata"}
    for kind, tensors in {"input": found.inputs, "output": found.outputs}.items():
        for x in tensors:
            steps = f", (value - {x.zero_point}) * {x.scale:.6g}" if x.scale is not None else ""
            rows[f"{kind} {x.name}"] = f"{'x'.join(map(str, x.shape))} {x.dtype}{steps}"
    rows["normalization"], rows["labels"], rows["training"] = "not told", "not told", "not told"
    if about and about.normalization:
        mean, std = (", ".join(f"{value:.6g}" for value in values) for values in about.normalization)
        rows["normalization"] = f"(pixel - [{mean}]) / [{std}], pixels in 0..255"
    if about and about.labels:
        shown = about.labels if len(about.labels) <= 10 else (*about.labels[:3], "...", about.labels[-1])
        rows["labels"] = f"{len(about.labels)}: {', '.join(shown)}"
    if about and about.training:
        rows["training"] = ", ".join(f"{name} {value}" for name, value in _last_figures(about.training))
    fallen = f"not on XNNPACK: {', '.join(found.undelegated)}" if found.undelegated else "all on XNNPACK"
    rows["operators"] = f"{sum(found.operators.values())}, {fallen}"
    rows[""] = ", ".join(f"{name}:{count}" for name, count in found.operators.items())
    weights = ", ".join(f"{dtype} {size:,}" for dtype, size in found.weights.items())
    rows["weights"] = f"{weights} bytes; {found.tensors} tensors in all"
    rows["size"] = f"{found.bytes:,} bytes"
    rows["checksum"] = {
        "manifest": "as the manifest says",
        "metadata": "as the metadata say; there is no manifest beside the file",
        None: "not compared: there is no manifest beside the file",
    }[found.checked]
    if manifest:
        rows["golden output"] = _golden(found.golden) if found.golden else "none in the manifest"
        rows["made with"] = ", ".join(f"{name} {number}" for name, number in manifest.get("versions", {}).items())
    out = Output()
    out.print(f"[bold]{escape(str(file))}[/bold]\nSHA-256 {found.sha256}", soft_wrap=True, highlight=False)
    table = new_table(show_header=False)
    for title, value in rows.items():
        table.add_row(escape(title), escape(value))
    out.print(table)


def _golden(check):
    return f"max error {check.error:.1e} of the largest value, at most {check.tolerance:g}"


def _last_figures(entries):
    """What a training manifest says, `(name, value)`: of figures of each epoch the last."""
    for name, value in entries.items():
        if isinstance(value, dict):
            yield from _last_figures(value)
        elif isinstance(value, list):
            if value:
                yield name, f"{value[-1]:.4g}" if isinstance(value[-1], float) else value[-1]
        else:
            yield name, value


def _labels(given):
    from se_keras.training.sources import DATA

    if given in DATA:
        return DATA[given]().classes
    if not Path(given).is_file():
        raise FileNotFoundError(f"There is no file of labels {given!r}: give 'digits' or a text file, a class a line")
    try:
        return Path(given).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{given!r} is not a text file of labels: {error}") from None


def _images(given, options, shape, progress, *, split="train"):
    """The images that were asked for, brought to a model's shape where they come from a folder."""
    import numpy as np

    if Path(given).is_dir():
        from se_keras.export import load_images

        mean, std = normalization_of(options.normalize)
        return load_images(given, size=shape[:2], channels=shape[2], mean=mean, std=std,
                           limit=LIMIT if options.limit is None else options.limit, progress=progress)  # fmt: skip
    if options.limit is not None:
        raise ValueError(f"--limit is for a folder of images. Received: {given}")
    if given == "digits":
        from se_keras.training.data import digits

        return getattr(digits(), split).images
    if not Path(given).is_file():
        raise FileNotFoundError(f"There are no images {given!r}: give 'digits', a .npy file or a folder of images")
    try:
        with open(given, "rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{given!r} is not a .npy file of images: {error}") from error


def normalization_of(given):
    """MEAN and STD, as numbers or by the name of a network."""
    if not given:
        return 0.0, 1.0
    if len(given) == 1:
        from se_keras.catalogue import spec_of

        spec = spec_of(given[0])
        return spec.mean, spec.std
    try:
        mean, std = ([float(number) for number in values.split(",")] for values in given)
    except ValueError:
        raise ValueError(f"--normalize takes MEAN STD, or a network. Received: {' '.join(given)}") from None
    return mean, std


def _agreement(record):
    return f"top-1 agreement {record['top1']:.1%}, max error {record['max_error']:.0e} of the logits' range"
