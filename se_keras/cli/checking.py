"""The commands that check models: what is in a LiteRT file, and whether two models compute the same."""

import argparse
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from .arguments import (
    ACCELERATORS,
    DATA_SETS,
    IMAGES,
    SHARE,
    Commands,
    add_command,
    add_folder_options,
    only_for,
    read_images,
    read_normalization,
)
from .screen import EXIT_DISAGREEMENT, Output, print_json, print_line, print_message, print_table, show_progress

LAYER_TOLERANCE = 1e-3
UNKNOWN = "not stated"


def add_inspect(commands: Commands) -> None:
    """`se-keras inspect FILE`."""
    add = add_command(commands, "inspect", inspect, json_output=True)
    add("file", metavar="FILE", type=Path, help="a .tflite file; FILE.json is its manifest, if any")


def inspect(options: argparse.Namespace, console: Console) -> None:
    """Show what is in a LiteRT file; compare its checksum, and its outputs for fixed images, with its manifest.

    Examples:
      se-keras inspect digits_int8.tflite
      se-keras inspect digits_int8.tflite --json
    """
    from se_keras.export.litert.inspection import inspect
    from se_keras.wording import counted

    with show_progress(console) as progress:
        progress(f"loading {options.file}")
        found = inspect(options.file)
    if options.json:
        print_json(found.to_json())
    else:
        _print_inspection(options.file, found)
    if found.wrong_on_gpu:
        count = counted(len(found.wrong_on_gpu), "strided 1x1 convolution")
        rule = f"warning: LiteRT's GPU delegate computes {count} of this file wrongly (docs/guides/gpu.md)"
        print_message(console, f"{rule}: export it again. The first: {found.wrong_on_gpu[0]}")
    if found.reference and not found.reference.agrees:
        error = _reference_error(found.reference)
        raise ValueError(f"{str(options.file)!r} does not compute the reference output of its manifest here: {error}")


def _print_inspection(file, found):
    """One row for each fact about a file."""
    rows = _metadata_rows(found)
    undelegated = ", ".join(found.undelegated)
    delegation = f"not delegated to XNNPACK: {undelegated}" if undelegated else "all delegated to XNNPACK"
    rows["operators"] = f"{sum(found.operators.values())}, {delegation}"
    rows[""] = ", ".join(f"{name}:{count}" for name, count in found.operators.items())
    weights = ", ".join(f"{dtype} {size:,}" for dtype, size in found.weights.items())
    rows["weights"] = f"{weights} bytes; {found.tensors} tensors in total"
    rows["size"] = f"{found.bytes:,} bytes"
    rows["checksum"] = {
        "manifest": "equals that of the manifest",
        "metadata": "equals that of the metadata; the file has no manifest",
        None: "not compared: the file has no manifest",
    }[found.checked]
    if found.manifest:
        rows["reference output"] = _reference_error(found.reference) if found.reference else "none in the manifest"
        versions = found.manifest.get("versions", {})
        rows["made with"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    Output().print(f"[bold]{escape(str(file))}[/bold]\nSHA-256 {found.sha256}", soft_wrap=True, highlight=False)
    print_table((), ((escape(title), escape(value)) for title, value in rows.items()))


def _metadata_rows(found):
    """Facts about the use of a file, from its metadata and tensors."""
    about = found.metadata
    rows = {"network": f"{about.network}, {about.precision}" if about else f"{UNKNOWN}: no metadata"}
    for kind, tensors in {"input": found.inputs, "output": found.outputs}.items():
        for x in tensors:
            scale = f", (value - {x.zero_point}) * {x.scale:.6g}" if x.scale is not None else ""
            shape = "x".join("?" if size is None else str(size) for size in x.shape)
            rows[f"{kind} {x.name}"] = f"{shape} {x.dtype}{scale}"
    rows |= dict.fromkeys(("normalization", "labels", "training"), UNKNOWN)
    about = about and about.completed()
    if about and about.normalization:
        mean, std = (", ".join(f"{value:.6g}" for value in values) for values in about.normalization)
        rows["normalization"] = f"(pixel - [{mean}]) / [{std}], pixels in 0..255"
    if about and about.labels:
        shown = about.labels if len(about.labels) <= 10 else (*about.labels[:3], "...", about.labels[-1])
        rows["labels"] = f"{len(about.labels)}: {', '.join(shown)}"
    if about and about.training:
        rows["training"] = ", ".join(f"{name} {value}" for name, value in _entries(about.training))
    return rows


def _reference_error(check):
    return f"max error {check.error:.1e} of the largest value, at most {check.tolerance:g}"


_IN_OTHER_ROWS = ("classes", "normalization", "pixels")


def _entries(record):
    """The entries of a training record as `(name, text)`; of the figures those of the last epoch."""
    for name, value in record.items():
        if name == "figures" and isinstance(value, dict):
            yield from ((x, f"{y[-1]:.4g}") for x, y in value.items() if isinstance(y, list) and y)
        elif isinstance(value, dict) and name not in _IN_OTHER_ROWS:
            yield from _entries(value)
        elif isinstance(value, list) and name not in _IN_OTHER_ROWS:
            yield name, f"[{', '.join(map(str, value[:4]))}{', ...' if len(value) > 4 else ''}]"
        elif name not in _IN_OTHER_ROWS:
            yield name, value


def add_verify(commands: Commands) -> None:
    """`se-keras verify A B`."""
    add = add_command(commands, "verify", verify, json_output=True)
    add("a", metavar="A", type=Path, help="a .keras file, a .tflite file, or a SavedModel's folder")
    add("b", metavar="B", type=Path, nargs="?", help="the same; errors are relative to the range of A's outputs")
    add("--images", metavar="IMAGES", help=f"{IMAGES}; default: noise")
    add_folder_options(add)
    add("--layers", action="store_true", help="compare two .keras files layer by layer")
    add("--accelerator", choices=ACCELERATORS, help="where B, a .tflite file, runs; B is A if it is not given")
    add("--tolerance", type=SHARE, metavar="X", help="exit with status 1 if the max error exceeds X")


def verify(options: argparse.Namespace, console: Console) -> int | None:
    """Compare two models' outputs on the same images, and two Keras models' layers.

    Examples:
      se-keras verify model.keras model.tflite
      se-keras verify model.keras served/digits --images images.npy --tolerance 1e-3
      se-keras verify runs/se/model.keras model.tflite --images photos/
      se-keras verify model.keras other.keras --layers
      se-keras verify model.tflite --accelerator gpu
    """
    from se_keras.export import verify
    from se_keras.export.verification import accelerated, images_shape, runnable

    if options.b is None and options.accelerator is None:
        raise ValueError("verify compares two models, or one with itself on --accelerator. Received: A alone")
    options.b = options.b or options.a

    from_folder = options.images is not None and Path(options.images).is_dir()
    received = "no --images" if options.images is None else options.images
    of_pixels = from_folder or (options.images in DATA_SETS and options.images != "digits")
    only_for(options, "--normalize --limit", "a folder of images", received, possible=of_pixels)
    only_for(options, "--override", "--normalize", "no --normalize", possible=options.normalize)
    with show_progress(console) as progress:
        progress(f"loading {options.a}")
        a = runnable(options.a)
        progress(f"loading {options.b}")
        b = accelerated(runnable(options.b), options.accelerator or "cpu")
        if options.layers and None in (a.model, b.model):
            raise ValueError(f"--layers is for two .keras files. Received: {options.a} and {options.b}")
        if given := read_normalization(options.normalize):
            a = a.normalized(given, override=options.override)
        if from_folder and not (a.normalization or b.normalization):
            print_message(console, "the files do not say a normalization (--normalize): pixels stay 0 to 255")
            a = a.normalized((0, 1))
        shape = images_shape(a, b)
        images = options.images and read_images(options.images, options, shape, progress, a, b, split="test")
        progress(f"comparing {options.b} with {options.a}")
        found = verify(a, b, images)
    tolerance = LAYER_TOLERANCE if options.tolerance is None else options.tolerance
    layer = found.first_above(tolerance)
    if options.json:
        report = {
            "a": str(options.a),
            "b": str(options.b),
            "images": options.images or "noise",
            "gpu": found.gpu,
            "agreement": asdict(found.agreement),
            "layers": [{"name": name, **asdict(result)} for name, result in found.layers],
            "first_beyond": layer,
        }
        print_json(report)
    else:
        _print_verification(found, options)
        if layer:
            print_line(f"first layer whose error exceeds {tolerance:g} of its range: {layer}")
    error = found.agreement.max_error
    if options.tolerance is not None and error > options.tolerance:
        excess = f"max error {error:.1e} of the range exceeds {options.tolerance:g}"
        print_message(console, f"{options.b} disagrees with {options.a}: {excess}")
        return EXIT_DISAGREEMENT


def _print_verification(found, options):
    place = f" on the GPU, {found.gpu}," if found.gpu else ""
    print_line(f"{options.b}{place} compared with {options.a}, on {options.images or 'noise'}")
    results = [*(found.layers if options.layers else ()), ("outputs", found.agreement)]
    rows = (
        (name, f"{x.max_error:.1e}", f"{x.mean_error:.1e}", f"{x.cosine:.6f}", f"{x.top1:.1%}", str(x.samples))
        for name, x in results
    )
    print_table(("", "max error", "mean error", "cosine", "top-1", "images"), rows)
