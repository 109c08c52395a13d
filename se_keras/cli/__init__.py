"""The console command se-keras: arguments in, one library call, output.

Installed as the package `se_keras_cli`, beside se_keras, and imports it in the commands alone: Python would import
se_keras, Keras and TensorFlow first if this were a part of it, and `se-keras --help` would take seconds.
"""

import argparse
import os
import signal
import sys
import warnings
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.markup import escape

if __name__ != "se_keras_cli":
    raise ImportError(f"This package is se_keras_cli: the command se-keras. Received: {__name__}")

from se_keras_cli.screen import (
    USER_ERRORS,
    Output,
    answer,
    native_logs_hidden,
    new_table,
    print_json,
    progress_on,
    say,
)

IMAGES = "'digits', a .npy file (N, height, width, channels), or a folder of PNG, JPEG, BMP and GIF images"
NORMALIZE = (
    "MEAN STD, each a number or one a channel (123.7,116.3,103.5), or the NETWORK of the catalogue that has them: "
    "a folder's pixels become (pixel - MEAN) / STD; default: 0 to 255, as in the files"
)
LIMIT = 500
LAYER_TOLERANCE = 1e-3
PAPER_COLUMNS = "G MACs, million parameters, and top-1 error on ImageNet, or on CIFAR-10/CIFAR-100"
EXIT_DISAGREEMENT, EXIT_ERROR, EXIT_INTERRUPTED = 1, 2, 130


def main(arguments=None):
    """Runs the command; returns its exit status: 0, 2 for what the user can mend, 130 after Ctrl-C.

    And 1 where `verify` finds that two models disagree by more than they may.
    """
    options = _parser().parse_args(arguments)
    console = Console(stderr=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` interrupts as Ctrl-C does
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", module="se_keras")
    warnings.showwarning = lambda message, *_: say(console, f"se-keras: warning: {message}")
    try:
        with native_logs_hidden():
            status = options.command(options, console)
        sys.stdout.flush()
        return status or 0
    except KeyboardInterrupt as interrupt:
        say(console, f"se-keras: interrupted. {interrupt}".rstrip())
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `se-keras list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except USER_ERRORS as error:
        if options.traceback:
            raise
        line = " ".join(str(error).split()) or type(error).__name__
        say(console, f"se-keras: error: {line}")
        return EXIT_ERROR


def _parser():
    parser = argparse.ArgumentParser(
        prog="se-keras",
        description="Squeeze-and-Excitation networks for Keras 3, from training to the phone and the server.",
        epilog="Examples:\n  se-keras quickstart\n  se-keras show se_resnet50\n  se-keras COMMAND --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"se-keras {version('se-keras')}")
    parser.set_defaults(traceback=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add_images_options(sub):
        sub.add_argument("--normalize", nargs="+", metavar="VALUE", help=NORMALIZE)
        sub.add_argument("--limit", type=int, metavar="N", help=f"a folder's images to use (default: {LIMIT})")

    def add(name, command, summary, *examples, json_output=False):
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog="Examples:\n" + "\n".join(f"  se-keras {example}" for example in examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(command=command)
        sub.add_argument("--traceback", action="store_true", help="show where in the code an error came from")
        if json_output:
            sub.add_argument("--json", action="store_true", help="print JSON, for programs")
        return sub

    sub = add("list", _list, "List the networks with their counts, the paper's figures beside them.", "list",
              "list resnet50 mobile", "list --markdown", "list --counts --json", json_output=True)  # fmt: skip
    sub.add_argument("part", nargs="*", metavar="PART", help="only networks with one of these in their names")
    sub.add_argument("--counts", action="store_true", help="count anew: builds each network (a minute for all)")
    sub.add_argument("--markdown", action="store_true", help="print a Markdown table")

    sub = add("show", _show, "Show one network: its row, parameters and multiply-adds.", "show se_resnet50",
              "show senet154 --layers", "show se_resnet50 --size 320 --json", json_output=True)  # fmt: skip
    sub.add_argument("network", metavar="NAME")
    sub.add_argument("--size", type=int, help="height and width to count at (default: the network's own)")
    sub.add_argument("--layers", action="store_true", help="layer by layer")

    sub = add("train", _train, "Train a network; the same command goes on where an interrupted one was.",
              "train se_resnet11_digits -o runs/se", "train resnet11_digits --epochs 30 -o runs/plain")  # fmt: skip
    sub.add_argument("network", metavar="NAME")
    sub.add_argument("--data", default="digits", help="data set (default: %(default)s, the only one so far)")
    sub.add_argument("-o", "--output", type=Path, required=True, help="folder of the run")
    sub.add_argument("--epochs", type=int, help="passes over the data (default: the recipe's)")
    sub.add_argument("--batch-size", type=int, help="images in a step (default: the recipe's)")
    sub.add_argument("--learning-rate", type=float, help="the first one (default: the recipe's)")
    sub.add_argument("--seed", type=int, help="of the weights and the order of the images (default: the recipe's)")

    sub = add("export", _export, "Export a .keras file to LiteRT (-o FILE.tflite) or to a SavedModel (-o FOLDER).",
              "export runs/se/model.keras -o digits.tflite",
              "export runs/se/model.keras --precision int8 --calibration digits -o digits_int8.tflite",
              "export runs/se/model.keras --precision int8 --calibration images.npy -o digits_int8.tflite",
              "export runs/se/model.keras --precision int8 --calibration digits --labels digits --normalize 0 255 "
              "--input-type uint8 -o camera.tflite",
              "export runs/se/model.keras --precision dynamic -o small.tflite",
              "export model.keras --precision int8 --calibration photos/ --normalize se_resnet50 -o model_int8.tflite",
              "export runs/se/model.keras -o served/digits", json_output=True)  # fmt: skip
    sub.add_argument("model", metavar="MODEL", type=Path, help="a .keras file")
    sub.add_argument("-o", "--output", type=Path, required=True, help="FILE.tflite, or the SavedModel's folder")
    sub.add_argument("--precision", default="float32", help="float32 (default), float16, dynamic, int8, or int16x8")
    sub.add_argument("--calibration", metavar="IMAGES", help=f"for int8 and int16x8: {IMAGES}")
    add_images_options(sub)
    sub.add_argument("--input-type", default="float32", help="for int8: float32 (default), int8, or uint8")
    sub.add_argument("--output-type", default="float32", help="for int8: float32 (default), int8, or uint8")
    sub.add_argument("--keep-float", metavar="REGEX", help="layers that stay in float32, such as '.*_se_.*'")
    sub.add_argument("--as-published", action="store_true", help="do not lower the model first")
    sub.add_argument("--labels", help="for FILE.tflite: 'digits', or a text file with the name of a class a line")

    sub = add("inspect", _inspect, "Show what is in a LiteRT file, and check it: its checksum and its golden output.",
              "inspect digits_int8.tflite", "inspect digits_int8.tflite --json", json_output=True)  # fmt: skip
    sub.add_argument("file", metavar="FILE", type=Path, help="a .tflite file, its manifest FILE.json beside it or not")

    sub = add("verify", _verify, "Compare two models' outputs on the same images, and two Keras models' layers.",
              "verify model.keras model.tflite",
              "verify model.keras served/digits --images images.npy --tolerance 1e-3",
              "verify model.keras model.tflite --images photos/ --normalize se_resnet50",
              "verify model.keras other.keras --layers", json_output=True)  # fmt: skip
    sub.add_argument("a", metavar="A", type=Path, help="a .keras file, a .tflite file, or a SavedModel's folder")
    sub.add_argument("b", metavar="B", type=Path, help="likewise; its errors are shares of the range of A's outputs")
    sub.add_argument("--images", metavar="IMAGES", help=f"{IMAGES}; default: noise")
    add_images_options(sub)
    sub.add_argument("--layers", action="store_true", help="two .keras files layer by layer")
    sub.add_argument("--tolerance", type=float, metavar="X", help="exit with status 1 where max error is beyond X")

    sub = add("benchmark", _benchmark, "Measure what squeeze-and-excitation costs, or compare two LiteRT files.",
              "benchmark", "benchmark --network se_resnext50_32x4d --precision int8 --threads 2",
              "benchmark --precision int8 --form lowered --site 3x3", "benchmark --stages 3 4 5",
              "benchmark --files plain.tflite se.tflite --json", json_output=True)  # fmt: skip
    sub.add_argument("--network", default="se_resnet50", help="measured beside its baseline (default: %(default)s)")
    sub.add_argument("--files", type=Path, nargs=2, metavar=("A", "B"), help="two .tflite files instead: B over A")
    sub.add_argument(
        "--precision", nargs="+", default=["float32", "int8"], help="those of export; default: float32 int8"
    )
    sub.add_argument(
        "--form", nargs="+", default=["published", "lowered"], help="published, lowered, or both (default)"
    )
    sub.add_argument("--site", help="where in a block SE stands: standard, pre, 3x3, post or identity")
    sub.add_argument("--stages", type=int, nargs="+", metavar="N", help="the stages with SE: 2 to 5 of a ResNet")
    sub.add_argument("--size", type=int, help="height and width (default: the network's own)")
    sub.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    sub.add_argument(
        "--blocks", type=int, default=30, help="paired measurements, one ratio each (default: %(default)s)"
    )
    sub.add_argument("--allow-undelegated", action="store_true", help="report though operators fell off XNNPACK")

    sub = add("quickstart", _quickstart, "Train on real digits, export, verify, and measure what SE costs (5 minutes).",
              "quickstart", "quickstart -o /tmp/first --json", json_output=True)  # fmt: skip
    sub.add_argument(
        "-o", "--output", type=Path, default=Path("se_keras_quickstart"), help="folder (default: %(default)s)"
    )
    return parser


def _list(options, console):
    from se_keras.figures import listing

    with progress_on(console) as progress:
        rows = _counted(options.part, progress) if options.counts else listing()
        rows = sorted((row for row in rows if _is_meant(row["name"], options.part)), key=_beside_baseline)
    if not rows:
        raise ValueError(f"No network's name has {' or '.join(map(repr, options.part))} in it: se-keras list shows all")
    if options.json:
        return print_json(rows)
    titles = ("network", "size", "parameters", "of SE", "G MACs", "paper", "error %")
    cells = [_list_cells(row) for row in rows]
    if options.markdown:
        lines = [titles, ["---"] + ["---:"] * 4 + ["---"] * 2, *cells]
        return answer("\n".join(f"| {' | '.join(line)} |" for line in lines))
    table = new_table(*titles, caption=f"Paper: {PAPER_COLUMNS}.", padding=0)
    for column, justify in zip(table.columns, ["left"] + ["right"] * 4 + ["left"] * 2, strict=True):
        column.no_wrap, column.justify = True, justify
    for line in cells:
        table.add_row(*line)
    Output().print(table)


def _is_meant(name, parts):
    return not parts or any(part in name for part in parts)


def _beside_baseline(row):
    """Sorts an SE network behind its baseline."""
    return row["name"].removeprefix("se_"), row["name"].startswith("se_")


def _counted(parts, progress):
    import keras

    from se_keras import complexity, create, names
    from se_keras.catalogue import spec_of
    from se_keras.figures import PAPER

    for name in names():
        if _is_meant(name, parts):
            progress(f"counting {name}")
            with keras.StatelessScope(initialize_variables=False):  # counts need shapes, not values
                counts = complexity(create(name))
            keras.utils.clear_session()
            spec, paper = spec_of(name), PAPER.get(name)
            row = {"name": name, "input_shape": spec.input_shape, **_totals(counts)}
            yield row | {"paper": paper and asdict(paper), "source": spec.source}


def _list_cells(row):
    """One network as text, the paper's figures in the last two columns."""
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


def _show(options, console):
    from se_keras import complexity, create
    from se_keras.catalogue import spec_of

    spec = spec_of(options.network)
    size = options.size
    if size is not None and size < spec.minimum_size:
        raise ValueError(f"{options.network} takes images of at least {spec.minimum_size}. Received: --size {size}")
    shape = spec.input_shape if size is None else (size, size, spec.input_shape[-1])
    with progress_on(console) as progress:
        progress(f"building {options.network}")
        counts = complexity(create(options.network, input_shape=shape))
    if options.json:
        layers = [asdict(layer) for layer in counts.layers]
        return print_json({"name": options.network, "input_shape": shape, **_totals(counts), "source": spec.source,
                            "se": spec.se and asdict(spec.se), "layers": layers})  # fmt: skip
    out = Output()
    out.print(f"[bold]{options.network}[/bold]: {spec.source}")
    table = new_table(show_header=False)
    for title, value in {
        "input": "x".join(map(str, shape)),
        "parameters": f"{counts.trainable:,} trained, {counts.statistics:,} BatchNorm statistics",
        "of which SE": f"{counts.se_trainable:,} ({counts.se_trainable / counts.trainable:.1%})",
        "multiply-adds": f"{counts.macs / 1e9:.4f} G, of which SE {counts.se_macs / 1e9:.4f} G",
        "squeeze-and-excitation": "none: a baseline" if spec.se is None else ", ".join(
            f"{field} {value}" for field, value in asdict(spec.se).items()),
    }.items():  # fmt: skip
        table.add_row(title, value)
    out.print(table)
    if options.layers:
        table = new_table("layer", "type", "output", "parameters", "multiply-adds")
        for layer in counts.layers:
            output = "x".join(map(str, layer.output_shape))
            table.add_row(layer.name, layer.type, output, f"{layer.trainable:,}", f"{layer.macs:,}")
        out.print(table)


def _train(options, console):
    import keras

    from se_keras import create
    from se_keras.training import data, recipe
    from se_keras.training.fit import MODEL_FILE, fit

    dataset = data.load(options.data)
    fields = ("epochs", "batch_size", "learning_rate", "seed")
    given = {field: getattr(options, field) for field in fields if getattr(options, field) is not None}
    chosen = replace(recipe.DIGITS, **given)
    keras.utils.set_random_seed(chosen.seed)
    model = create(options.network, classes=len(dataset.classes), input_shape=dataset.train.images.shape[1:])
    file, finished = options.output / MODEL_FILE, 0

    with progress_on(console) as progress:

        def told(done, figures):
            nonlocal finished
            finished = done
            now = f", test accuracy {figures['val_accuracy'][-1]:.1%}" if done else ""
            progress(f"training {options.network}: epoch {done} of {chosen.epochs}{now}")

        try:
            _, figures = fit(model, chosen, dataset, options.output, progress=told)
        except KeyboardInterrupt:
            kept = f"{file} holds epoch {finished} of {chosen.epochs}" if finished else "No epoch was finished"
            raise KeyboardInterrupt(f"{kept}; the same command goes on") from None
    answer(f"{file}: test accuracy {figures['val_accuracy'][-1]:.1%} after {chosen.epochs} epochs")


def _export(options, console):
    from se_keras import storage
    from se_keras.export import images, to_litert, to_savedmodel
    from se_keras.export.verify import load_keras
    from se_keras.training.fit import training_of

    to_file = options.output.suffix == ".tflite"
    if not to_file and options.precision != "float32":
        raise ValueError(
            f"{options.precision} is for -o FILE.tflite: a SavedModel is float32. Received: {options.output}"
        )
    if options.calibration and options.precision not in ("int8", "int16x8"):
        raise ValueError(
            f"--calibration is for --precision int8 and int16x8. Received: --precision {options.precision}"
        )
    if not to_file and (options.labels or options.normalize):
        raise ValueError(f"--labels and --normalize are for -o FILE.tflite. Received: {options.output}")
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
        if to_file:
            exported = to_litert(
                model,
                precision=options.precision,
                calibration=calibration,
                input_type=options.input_type,
                output_type=options.output_type,
                keep_float=options.keep_float,
                lowering=lowering,
                labels=options.labels and _labels(options.labels),
                normalization=options.normalize and _normalization(options.normalize),
                training=training_of(options.model),
                progress=progress,
            )
            exported.save(options.output)
        else:
            exported = to_savedmodel(model, options.output, lowering=lowering)
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


def _verify(options, console):
    from se_keras.export import verify
    from se_keras.export.verify import images_shape, runnable

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


def _inspect(options, console):
    from se_keras.export.inspection import inspect

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


def _benchmark(options, console):
    from se_keras.catalogue import spec_of
    from se_keras.export import litert
    from se_keras.export.overhead import PAPER, environment, measure, overheads

    measuring = {
        "threads": options.threads,
        "blocks": options.blocks,
        "allow_undelegated": options.allow_undelegated,
    }
    with progress_on(console) as progress:
        if options.files:
            a, b = map(litert.load, options.files)
            progress(f"timing {options.files[1]} beside {options.files[0]}")
            results = [measure(a, b, form="as given", **measuring)]
        else:
            spec = spec_of(options.network)
            shape = options.size and (options.size, options.size, spec.input_shape[-1])
            placed = {"site": options.site, "stages": options.stages and tuple(options.stages)}
            se = spec.se and replace(spec.se, **{field: value for field, value in placed.items() if value})
            chosen = {"precisions": options.precision, "forms": options.form, "se": se, "input_shape": shape}
            results = list(overheads(options.network, **chosen, progress=progress, **measuring))
    report = {
        "schema": 1,
        "environment": environment(),
        "overhead": [result.to_json() for result in results],
        "paper": PAPER,
    }
    if options.json:
        return print_json(report)
    _print_overhead(report)


def _quickstart(options, console):
    from se_keras import storage
    from se_keras.quickstart import quickstart

    storage.check_writable(options.output / "report.json")
    with progress_on(console) as progress:
        report = quickstart(options.output, progress=progress)
    if options.json:
        return print_json(report)
    table = new_table("", "test accuracy", "size", "top-1 as Keras", "max error", title="Trained on the digits")
    for name, run in report["training"].items():
        table.add_row(name, f"{run['test_accuracy']:.1%}", f"{run['parameters'] / 1e3:,.0f}k weights", "", "")
    for name, made in report["exports"].items():
        accuracy = f"{made['test_accuracy']:.1%}" if "test_accuracy" in made else ""
        top1, error = made["agreement"]["top1"], made["agreement"]["max_error"]
        table.add_row(name, accuracy, f"{made['bytes'] / 1e3:,.0f} kB", f"{top1:.1%}", f"{error:.0e}")
    Output().print(table)
    _print_overhead(report)
    answer(f"All is in {options.output}, the figures in {options.output / 'report.json'} ({report['seconds']:.0f} s)")


def _print_overhead(report):
    """One row for each pair, the paper's figure above them."""
    records, paper, environment = report["overhead"], report["paper"], report["environment"]
    first = records[0]
    size = "x".join(map(str, first["input_shape"][1:3]))
    threads = f"{first['threads']} thread{'s' * (first['threads'] > 1)}"
    caption = f"{environment['processor']}, {environment['runtime']}."
    if environment["matrix_units"]:
        units = ", ".join(environment["matrix_units"])
        caption += (
            f" Matrix units ({units}) speed up int8 convolutions, not SE's multiplication: its share is larger here."
        )
    se = first["se"] or {}
    placed = f", site {se['site']}" * (se.get("site", "standard") != "standard")
    if se.get("stages", "all") != "all":
        placed += f", stages {' '.join(map(str, se['stages']))}"
    title = escape(f"{first['network']}{placed} beside {first['baseline']} at {size}, {threads}")
    table = new_table("", "plain ms", "SE ms", "ratio", "95 % interval", "A/A null", title=title, caption=caption)
    paper_ms = (str(paper["resnet50_ms"]), str(paper["se_resnet50_ms"]))
    table.add_row("paper, ResNet-50", *paper_ms, f"{paper['ratio']:.3f}", "", "")
    for record in records:
        measured = record["comparison"]
        ratio, null = measured["ratio"], measured["null"]
        table.add_row(
            f"{record['precision']} {record['form']}",
            f"{measured['a_ms']:.1f}",
            f"{measured['b_ms']:.1f}",
            f"{ratio['median']:.3f}",
            f"{ratio['low']:.3f}..{ratio['high']:.3f}",
            f"{null['low']:.3f}..{null['high']:.3f}",
        )
    Output().print(table)


def _labels(given):
    from se_keras.training.data import DATA

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

        mean, std = _normalization(options.normalize)
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


def _normalization(given):
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


def _totals(counts):
    return {field: getattr(counts, field) for field in ("trainable", "statistics", "se_trainable", "macs", "se_macs")}
