"""The console command se-keras: arguments in, one library call, output.

Installed as the package `se_keras_cli`, beside se_keras, and imports it in the commands alone: Python would import
se_keras, Keras and TensorFlow first if this were a part of it, and `se-keras --help` would take seconds.
"""

import argparse
import os
import signal
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

if __name__ != "se_keras_cli":
    raise ImportError(f"This package is se_keras_cli: the command se-keras. Received: {__name__}")

from . import evaluating, files, measuring, networks, profiling, serving, training
from .screen import USER_ERRORS, native_logs_hidden, say

IMAGES = "'digits', a .npy file (N, height, width, channels), or a folder of PNG, JPEG, BMP and GIF images"
NORMALIZE = (
    "MEAN STD, each a number or one a channel (123.7,116.3,103.5), or the NETWORK of the catalogue that has them: "
    "a folder's pixels become (pixel - MEAN) / STD; default: 0 to 255, as in the files"
)
EXIT_ERROR, EXIT_INTERRUPTED = 2, 130


def main(arguments=None):
    """Runs the command; returns its exit status: 0, 2 for what the user can mend, 130 after Ctrl-C.

    And 1 where `verify` finds that two models disagree by more than they may, or `serve-check` a server and a model.
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
        sub.add_argument("--limit", type=int, metavar="N", help=f"a folder's images to use (default: {files.LIMIT})")

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

    sub = add("list", networks.list_networks, "List the networks with their counts, the paper's figures beside them.",
              "list", "list resnet50 mobile", "list --markdown", "list --counts --json", json_output=True)  # fmt: skip
    sub.add_argument("part", nargs="*", metavar="PART", help="only networks with one of these in their names")
    sub.add_argument("--counts", action="store_true", help="count anew: builds each network (a minute for all)")
    sub.add_argument("--markdown", action="store_true", help="print a Markdown table")

    sub = add("show", networks.show, "Show one network: its row, parameters and multiply-adds.", "show se_resnet50",
              "show senet154 --layers", "show se_resnet50 --size 320 --json", json_output=True)  # fmt: skip
    sub.add_argument("network", metavar="NAME")
    sub.add_argument("--size", type=int, help="height and width to count at (default: the network's own)")
    sub.add_argument("--layers", action="store_true", help="layer by layer")

    sub = add("train", training.train, "Train a network; the same command goes on where an interrupted one was.",
              "train se_resnet11_digits -o runs/se", "train resnet11_digits --epochs 30 -o runs/plain",
              "train se_resnet50 --data imagenet/ --recipe paper_imagenet --dry-run",
              "train se_resnet50 --data imagenet/ --recipe paper_imagenet --strategy mirrored "
              "--precision mixed_float16 -o runs/se50",
              "train se_resnet50 --data shards/ --strategy multi-worker --workers a:2222,b:2222 --index 0 -o runs/two",
              json_output=True)  # fmt: skip
    sub.add_argument("network", metavar="NAME")
    sub.add_argument("--data", default="digits", help="'digits' (default), a folder with a folder for each class "
                     "(in train/ and val/, or alone), packed TFRecords, or tfds:NAME")  # fmt: skip
    sub.add_argument("-o", "--output", type=Path, help="folder of the run")
    sub.add_argument("--recipe", help="digits, paper_imagenet, paper_mobile, paper_cifar, senet154, ablation, "
                     "places365, modern, ... (default: digits for the digits, else paper_imagenet)")  # fmt: skip
    sub.add_argument("--dry-run", action="store_true", help="print the recipe in full, with its sources, and end")
    sub.add_argument("--epochs", type=int, help="passes over the data (default: the recipe's)")
    sub.add_argument("--batch-size", type=int, help="images in a step; the learning rate goes along in proportion")
    sub.add_argument("--learning-rate", type=float, help="the first one (default: the recipe's, for the batch)")
    sub.add_argument("--sampling", help="shuffled, or balanced: each class equally often (default: the recipe's)")
    sub.add_argument("--seed", type=int, help="of the weights and the order of the images (default: the recipe's)")
    sub.add_argument("--size", type=int, help="height and width of the images (default: the network's own)")
    sub.add_argument("--weights", help="to start from: imagenet, or a file (default: random ones)")
    sub.add_argument("--strategy", default="none", help="none (default), mirrored, multi-worker, or tpu")
    sub.add_argument("--workers", metavar="HOST:PORT,...", help="in place of TF_CONFIG; the first of them writes")
    sub.add_argument("--index", type=int, help="which of them this is, from 0")
    sub.add_argument(
        "--wait", type=float, default=600, metavar="S", help="seconds for all workers to come (default: 600)"
    )
    sub.add_argument("--tpu", help="name or address (default: the local one)")
    sub.add_argument("--precision", default="float32", choices=("float32", "mixed_float16", "mixed_bfloat16"),
                     help="of the layers; weights stay in float32")  # fmt: skip
    sub.add_argument("--jit-compile", action="store_true", help="compile forward and backward pass with XLA")
    sub.add_argument(
        "--steps-per-execution", type=int, default=1, metavar="N", help="steps between two looks at signals"
    )
    sub.add_argument(
        "--accumulate", type=int, default=1, metavar="N", help="parts to compute a batch in, for less memory"
    )
    sub.add_argument("--checkpoint-steps", type=int, metavar="N", help="save every N steps too, not after epochs alone")
    sub.add_argument(
        "--corrupt-budget", type=int, default=0, metavar="N", help="files that may be undecodable, left out"
    )
    sub.add_argument("--cache", action="store_true", help="keep the test images in memory")
    sub.add_argument(
        "--service", metavar="ADDRESS", help="a tf.data service that prepares the images, grpc://host:port"
    )

    sub = add("evaluate", evaluating.evaluate, "Judge a model, or several as an ensemble, by the paper's protocols.",
              "evaluate runs/se/model.keras", "evaluate runs/a/model.keras digits_int8.tflite --confusion c.png",
              "evaluate model.keras --data imagenet/ --protocol 224 --normalize se_resnet50",
              "evaluate a.keras b.keras --data imagenet/ --protocol multi_crop --json", json_output=True)  # fmt: skip
    sub.add_argument(
        "models", metavar="MODEL", nargs="+", type=Path, help=".keras and .tflite files, folders of SavedModels"
    )
    sub.add_argument("--data", default="digits", help="'digits' (default), a folder, packed TFRecords, or tfds:NAME")
    sub.add_argument("--split", default="test", choices=("test", "train"), help="default: %(default)s")
    sub.add_argument("--protocol", help="plain, 224, 299, 320, ten_crop, multi_scale, or multi_crop (default: plain "
                     "for the digits, else 224)")  # fmt: skip
    sub.add_argument(
        "--normalize", nargs="+", metavar="VALUE", help="as of export; default: as the models were trained"
    )
    sub.add_argument("--confusion", type=Path, metavar="FILE", help="write the confusion matrix: .png, .svg or .csv")
    sub.add_argument(
        "--corrupt-budget", type=int, default=0, metavar="N", help="files that may be undecodable, left out"
    )

    sub = add("curves", training.curves, "Draw the curves of runs: SE beside its baseline, training and validation.",
              "curves runs/plain runs/se -o curves.png")  # fmt: skip
    sub.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folders of runs")
    sub.add_argument("-o", "--output", type=Path, required=True, help="a .png, .svg or .pdf file")

    sub = add("pack", training.pack, "Pack a folder of images as TFRecords, for disks and networks to read fast.",
              "pack imagenet/ --shards 1024 -o shards/", json_output=True)  # fmt: skip
    sub.add_argument("images", metavar="FOLDER", type=Path, help="with a folder for each class")
    sub.add_argument("-o", "--output", type=Path, required=True, help="folder of the shards")
    sub.add_argument("--shards", type=int, default=8, metavar="N", help="of each split (default: %(default)s)")

    sub = add("export", files.export, "Export a .keras file to LiteRT (-o FILE.tflite) or to a SavedModel (-o FOLDER).",
              "export runs/se/model.keras -o digits.tflite",
              "export runs/se/model.keras --precision int8 --calibration digits -o digits_int8.tflite",
              "export runs/se/model.keras --precision int8 --calibration images.npy -o digits_int8.tflite",
              "export runs/se/model.keras --precision int8 --calibration digits --labels digits --normalize 0 255 "
              "--input-type uint8 -o camera.tflite",
              "export runs/se/model.keras --precision dynamic -o small.tflite",
              "export model.keras --precision int8 --calibration photos/ --normalize se_resnet50 -o model_int8.tflite",
              "export runs/se/model.keras --labels digits --normalize 0 255 -o models/digits",
              json_output=True)  # fmt: skip
    sub.add_argument("model", metavar="MODEL", type=Path, help="a .keras file")
    sub.add_argument("-o", "--output", type=Path, required=True, help="FILE.tflite, or the SavedModel's folder")
    sub.add_argument("--precision", default="float32", help="float32 (default), float16, dynamic, int8, or int16x8")
    sub.add_argument("--calibration", metavar="IMAGES", help=f"for int8 and int16x8: {IMAGES}")
    add_images_options(sub)
    sub.add_argument("--input-type", default="float32", help="for int8: float32 (default), int8, or uint8")
    sub.add_argument("--output-type", default="float32", help="for int8: float32 (default), int8, or uint8")
    sub.add_argument("--keep-float", metavar="REGEX", help="layers that stay in float32, such as '.*_se_.*'")
    sub.add_argument("--as-published", action="store_true", help="do not lower the model first")
    sub.add_argument("--labels", help="'digits', or a text file with the name of a class a line")
    sub.add_argument(
        "--top", type=int, default=5, metavar="N", help="classes that a SavedModel tells of an image file (default: 5)"
    )

    sub = add("inspect", files.inspect, "Show what is in a LiteRT file; check its checksum and its golden output.",
              "inspect digits_int8.tflite", "inspect digits_int8.tflite --json", json_output=True)  # fmt: skip
    sub.add_argument("file", metavar="FILE", type=Path, help="a .tflite file, its manifest FILE.json beside it or not")

    sub = add("verify", files.verify, "Compare two models' outputs on the same images, and two Keras models' layers.",
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

    sub = add("benchmark", measuring.benchmark,
              "Measure what squeeze-and-excitation costs, or compare two LiteRT files.", "benchmark",
              "benchmark --network se_resnet50 se_mobilenet --threads 1 2 -o results.json",
              "benchmark --precision int8 --form lowered --site 3x3", "benchmark --stages 3 4 5 --within 0.005",
              "benchmark --files plain.tflite se.tflite --json",
              "benchmark --adb --benchmark-model benchmark_model -o phone.json", json_output=True)  # fmt: skip
    sub.add_argument("--network", nargs="+", default=["se_resnet50"], metavar="NAME",
                     help="measured beside its baseline (default: se_resnet50)")  # fmt: skip
    sub.add_argument("--files", type=Path, nargs=2, metavar=("A", "B"), help="two .tflite files instead: B over A")
    sub.add_argument("-o", "--output", type=Path, metavar="FILE.json",
                     help="keep each result as it is measured; the same command measures what is missing")  # fmt: skip
    sub.add_argument(
        "--precision", nargs="+", default=["float32", "int8"], help="those of export; default: float32 int8"
    )
    sub.add_argument(
        "--form", nargs="+", default=["published", "lowered"], help="published, lowered, or both (default)"
    )
    sub.add_argument("--site", help="where in a block SE stands: standard, pre, 3x3, post or identity")
    sub.add_argument("--stages", type=int, nargs="+", metavar="N", help="the stages with SE: 2 to 5 of a ResNet")
    sub.add_argument("--size", type=int, help="height and width (default: the network's own)")
    sub.add_argument("--threads", type=int, nargs="+", default=[1], metavar="N", help="default: 1")
    sub.add_argument(
        "--blocks", type=int, default=30, help="paired measurements, one ratio each (default: %(default)s)"
    )
    sub.add_argument("--within", type=float, metavar="X", help="stop earlier when the interval is so narrow: 0.01")
    sub.add_argument("--seconds", type=float, metavar="S", help="stop a comparison earlier when so many have passed")
    sub.add_argument("--profile", action="store_true", help="profile the files too, for the report")
    sub.add_argument("--allow-undelegated", action="store_true", help="report though operators fell off XNNPACK")
    sub.add_argument("--adb", action="store_true", help="measure on a phone: docs/phone.md")
    sub.add_argument("--serial", metavar="S", help="of the phone, where there are several")
    sub.add_argument("--benchmark-model", metavar="PATH", help="LiteRT's binary for the phone, or device:/path on it")
    sub.add_argument(
        "--rest", type=float, default=5.0, metavar="S", help="seconds for the phone to cool down between blocks"
    )

    sub = add("profile", profiling.profile, "Show where a LiteRT file spends its time, and what SE added to another.",
              "profile se_resnet50_int8.tflite", "profile se.tflite --against plain.tflite --threads 2",
              json_output=True)  # fmt: skip
    sub.add_argument("file", metavar="FILE", type=Path, help="a .tflite file")
    sub.add_argument("--against", metavar="BASELINE", type=Path, help="another one: what is added to it")
    sub.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    sub.add_argument("--runs", type=int, default=50, help="default: %(default)s")

    sub = add("report", measuring.report, "Show results of benchmark as one page of HTML, or as a Markdown table.",
              "report results.json -o report.html", "report phone.json server.json --markdown")  # fmt: skip
    sub.add_argument("results", type=Path, nargs="+", metavar="RESULTS.json", help="what benchmark -o or --json wrote")
    sub.add_argument("-o", "--output", type=Path, metavar="FILE.html")
    sub.add_argument("--markdown", action="store_true", help="print a table for a README instead")

    sub = add("benchmark-input", evaluating.benchmark_input,
              "Measure how fast training images come, beside Keras' own input.", "benchmark-input",
              "benchmark-input imagenet/ --batch-size 128 --json", json_output=True)  # fmt: skip
    sub.add_argument("images", metavar="FOLDER", nargs="?", type=Path, help="of images (default: made of photographs)")
    sub.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    sub.add_argument("--size", type=int, default=224, help="height and width (default: %(default)s)")
    sub.add_argument("--blocks", type=int, default=10, help="paired measurements (default: %(default)s)")
    sub.add_argument("--epoch", type=int, default=20_000, metavar="N", help="images to watch the memory over")

    sub = add("benchmark-training", evaluating.benchmark_training,
              "Measure a training step with squeeze-and-excitation beside one without.", "benchmark-training",
              "benchmark-training --network se_resnet50 --size 112 --batch-size 16", json_output=True)  # fmt: skip
    sub.add_argument("--network", default="se_resnet50", help="default: %(default)s")
    sub.add_argument("--batch-size", type=int, default=8, help="default: %(default)s")
    sub.add_argument("--size", type=int, help="height and width (default: the network's own)")
    sub.add_argument("--blocks", type=int, default=10, help="paired measurements (default: %(default)s)")

    sub = add("serve-config", serving.serve_config,
              "Write what TF Serving takes beside the models of a folder: models.config, monitoring.config.",
              "serve-config models/", "serve-config models/ --root /srv/models --replace")  # fmt: skip
    sub.add_argument("folder", metavar="FOLDER", type=Path, help="with a folder for each model: MODEL/VERSION/")
    sub.add_argument("--root", default="/models", help="the folder where the server runs (default: %(default)s)")
    sub.add_argument("--replace", action="store_true", help="replace files with another content")

    sub = add("serve-check", serving.serve_check,
              "Send TF Serving the golden inputs of a model's manifest, and compare what comes back.",
              "serve-check http://localhost:8501 --manifest models/digits",
              "serve-check http://localhost:8501 --grpc localhost:8500 --manifest models/digits --model digits --json",
              json_output=True)  # fmt: skip
    sub.add_argument("url", metavar="URL", nargs="?", help="of the REST API: http://HOST:8501")
    sub.add_argument("--grpc", metavar="HOST:PORT", help="of the gRPC API: HOST:8500; needs se-keras[serving]")
    sub.add_argument("--manifest", metavar="DIR", type=Path, required=True,
                     help="folder of the model (its highest version) or of a version, by `export`")  # fmt: skip
    sub.add_argument("--model", metavar="NAME", help="on the server (default: the name of the model's folder)")
    sub.add_argument("--timeout", type=float, default=30, metavar="S", help="seconds for an answer (default: 30)")

    sub = add("benchmark-serving", serving.benchmark_serving,
              "Measure what a SavedModel bears: images a second and p99 under load, as published beside lowered.",
              "benchmark-serving", "benchmark-serving --network se_resnext50_32x4d --callers 1 16 --json",
              json_output=True)  # fmt: skip
    sub.add_argument("--network", default="se_resnet50", help="and its baseline (default: %(default)s)")
    sub.add_argument("--callers", type=int, nargs="+", default=[1, 4, 16], help="at once (default: 1 4 16)")
    sub.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="images in a request (default: 1 8 32)")
    sub.add_argument("--size", type=int, help="height and width (default: the network's own)")
    sub.add_argument("--threads", type=int, default=os.cpu_count(), help="default: as many as there are processors")
    sub.add_argument("--blocks", type=int, default=10, help="measurements of each load (default: %(default)s)")
    sub.add_argument("--seconds", type=float, default=2, metavar="S", help="of a measurement (default: %(default)s)")

    sub = add("quickstart", measuring.quickstart,
              "Train on real digits, export, verify, and measure what SE costs (5 minutes).", "quickstart",
              "quickstart -o /tmp/first --json", json_output=True)  # fmt: skip
    sub.add_argument(
        "-o", "--output", type=Path, default=Path("se_keras_quickstart"), help="folder (default: %(default)s)"
    )
    return parser
