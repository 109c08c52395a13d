"""The command se-keras: what it prints and where, how it refuses, and that an interrupted run is resumed."""

import argparse
import contextlib
import errno
import functools
import hashlib
import json
import logging
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from rich.console import Console

import se_keras
import se_keras_cli
from se_keras import catalogue, evaluation, recalibration
from se_keras.export import to_litert
from se_keras.export.benchmark import overhead, profiler
from se_keras.export.benchmark.results import PAPER
from se_keras.export.benchmark.targets import browser
from se_keras.export.litert import conversion, flatbuffer, metadata, quantization
from se_keras.export.litert.file import load_litert
from se_keras.export.litert.metadata import detach
from se_keras.runs import MODEL_FILE, RUN_FILE
from se_keras.training import checkpoint, distribution, recipes, record, sources
from se_keras.training import data as datasets
from se_keras.training.loop import fit
from se_keras.training.recipes import DIGITS
from se_keras.training.stopping import EXIT_SAVED
from se_keras.weights.released import IMAGENET
from se_keras_cli import screen
from se_keras_cli.benchmarking import print_overhead

ROOT = Path(__file__).parents[1]

COMMANDS = (
    "list",
    "show",
    "train",
    "curves",
    "pack",
    "evaluate",
    "export",
    "predict",
    "inspect",
    "verify",
    "gates",
    "benchmark",
    "profile",
    "report",
    "benchmark-input",
    "benchmark-training",
    "serve-config",
    "serve-check",
    "benchmark-serving",
    "quickstart",
)
SCRIPT = Path(sys.executable).with_name("se-keras")
# What is done now, a line each on stderr: not part of an answer, nor of a refusal.
PROGRESS = (
    "counting ",
    "building ",
    "training ",
    "loading ",
    "reading ",
    "exporting ",
    "converting ",
    "calibrating ",
    "comparing ",
    "timing ",
    "profiling ",
    "evaluating",
    "packing ",
    "making ",
    "measuring ",
    "freezing ",
)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a command left: its exit status, stdout, and stderr without the lines of progress."""

    status: int
    out: str
    err: str
    progress: list


@pytest.fixture
def cli(capfd, monkeypatch):
    """`cli(*arguments)`: the command in this process."""
    monkeypatch.setenv("COLUMNS", "200")  # no line of a table is cut

    def call(*arguments):
        try:
            status = se_keras_cli.main([str(argument) for argument in arguments])
        except SystemExit as exit:  # argparse's
            status = exit.code
        out, err = capfd.readouterr()
        lines = err.splitlines(keepends=True)
        are_progress = [line.startswith(PROGRESS) for line in lines]
        return Result(
            status=status,
            out=out,
            err="".join(line for line, is_progress in zip(lines, are_progress, strict=True) if not is_progress),
            progress=[line.rstrip("\n") for line, is_progress in zip(lines, are_progress, strict=True) if is_progress],
        )

    # The command has a process of its own, and sets what is the process's: here it is put back.
    handler, level = signal.getsignal(signal.SIGTERM), logging.getLogger("tensorflow").level
    with warnings.catch_warnings():
        yield call
    signal.signal(signal.SIGTERM, handler)
    logging.getLogger("tensorflow").setLevel(level)


@pytest.fixture(scope="module")
def few():
    """256 digits to train on and 40 to evaluate on."""
    digits = datasets.digits()
    return replace(
        digits,
        train=datasets.Arrays(images=digits.train.images[:256], labels=digits.train.labels[:256]),
        test=datasets.Arrays(images=digits.test.images[:40], labels=digits.test.labels[:40]),
    )


@pytest.fixture
def few_digits(few, monkeypatch):
    monkeypatch.setitem(sources.DATA, "digits", lambda: few)


def plain(size):
    """A network without SE, converted in a second."""
    images = keras.Input((size, size, 1), name="images")
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3, activation="relu")(images))
    return keras.Model(images, keras.layers.Dense(10)(x), name="plain")


@pytest.fixture(scope="module")
def files(few, tmp_path_factory):
    """A folder of good files and bad ones."""
    folder = tmp_path_factory.mktemp("files")
    keras.utils.set_random_seed(0)
    model, _ = fit(se_keras.create("se_resnet11_digits", classes=10), replace(DIGITS, epochs=3), few, folder / "run")
    (folder / "model.keras").write_bytes((folder / "run" / "model.keras").read_bytes())
    to_litert(model).save(folder / "se.tflite")
    to_litert(plain(8)).save(folder / "plain.tflite")
    to_litert(plain(12)).save(folder / "larger.tflite")

    intact, litert = (folder / "model.keras").read_bytes(), (folder / "se.tflite").read_bytes()
    (folder / "truncated.keras").write_bytes(intact[: len(intact) // 2])
    (folder / "text.keras").write_text("weights\n")
    (folder / "empty.keras").touch()
    (folder / "truncated.tflite").write_bytes(litert[: len(litert) // 2])
    (folder / "text.tflite").write_text("weights\n")
    flipped = bytearray(litert)
    flipped[len(litert) // 2] ^= 1
    (folder / "flipped.tflite").write_bytes(flipped)
    (folder / "flipped.tflite.json").write_bytes((folder / "se.tflite.json").read_bytes())

    np.save(folder / "images.npy", few.train.images[:50])
    np.save(folder / "larger.npy", np.zeros((5, 9, 9, 1), "float32"))
    np.save(folder / "nan.npy", np.full((5, 8, 8, 1), np.nan, "float32"))
    np.save(folder / "blank.npy", np.zeros((10, 8, 8, 1), "float32"))
    np.save(folder / "none.npy", np.zeros((0, 8, 8, 1), "float32"))
    np.save(folder / "words.npy", np.array(["seven", "eight"]))
    np.save(folder / "pickled.npy", np.array([{}], dtype=object))
    np.savez(folder / "arrays.npz", images=few.train.images[:5])
    (folder / "foreign_zip.keras").write_bytes((folder / "arrays.npz").read_bytes())
    (folder / "truncated_zip.npy").write_bytes((folder / "arrays.npz").read_bytes()[:200])
    (folder / "truncated.npy").write_bytes((folder / "images.npy").read_bytes()[:500])
    (folder / "text.npy").write_text("seven\n")
    (folder / "empty.npy").touch()
    (folder / "folder.tflite").mkdir()

    model.layers[-1].bias.assign_add(np.eye(10)[3])
    model.save(folder / "biased.keras")
    gray = keras.Input((8, 8, 1))
    keras.Model(gray, keras.layers.Dense(10)(keras.layers.Flatten()(gray)), name="own").save(folder / "own.keras")
    for name in ("scans/1.png", "scans/more/2.png", "damaged/1.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.rint(few.test.images[int(name[-5])] * 255).astype("uint8")
        (folder / name).write_bytes(tf.io.encode_png(pixels).numpy())
    (folder / "damaged" / "2.png").write_bytes(b"PNG")
    (folder / "nothing").mkdir()
    (folder / "nothing" / "labels.txt").touch()
    return folder


@pytest.fixture(scope="module")
def labelled_file(files):
    """A file with labels, of which one has brackets, a normalization for each channel, and a training."""
    images = keras.Input((8, 8, 3), name="images")
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3, activation="relu")(images))
    model = keras.Model(images, keras.layers.Dense(20, activation="softmax")(x), name="labelled")
    to_litert(
        model,
        labels=["a [red] one", *(f"number {i}" for i in range(1, 20))],
        normalization=((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
        training={"data": "photographs", "recipe": {"epochs": 3}, "figures": {"loss": [0.5, 0.25]}},
    ).save(files / "labelled.tflite")
    return files / "labelled.tflite"


@pytest.fixture
def converted(files, monkeypatch):
    """Replaces each conversion by an existing LiteRT file; a list of the arguments of each call."""
    calls = []

    def to_litert(model, **arguments):
        calls.append(arguments)
        return load_litert(files / "se.tflite")

    monkeypatch.setattr("se_keras.export.to_litert", to_litert)
    return calls


def written(folder):
    """The files under a folder, hidden ones too."""
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()]


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run(*arguments, **options):
    """The installed command, in a process of its own."""
    return subprocess.run([SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=300, **options)


# Help


def examples_of(text):
    examples = text.partition("Examples:\n")[2].replace("\\\n", "")
    return [line.strip() for line in examples.splitlines() if line.strip()]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_examples_of_it(cli, command):
    result = cli(command, "--help")
    assert (result.status, result.err) == (0, "")
    examples = examples_of(result.out)
    assert examples and all(example.startswith(f"se-keras {command}") for example in examples)


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_in_the_help_are_commands_that_it_takes(cli, command):
    for example in examples_of(cli(command, "--help").out):
        se_keras_cli._parser().parse_args(shlex.split(example)[1:])


def test_help_names_every_command(cli):
    result = cli("--help")
    assert (result.status, result.err) == (0, "")
    assert all(re.search(rf"^ +{command}( |$)", result.out, re.MULTILINE) for command in COMMANDS)


def test_help_comes_without_importing_keras():
    script = f"""
import contextlib, io, sys, se_keras_cli
for arguments in ["--help"], ["--version"], *([command, "--help"] for command in {COMMANDS}):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        se_keras_cli.main(arguments)
print(sorted({{"keras", "tensorflow", "se_keras", "numpy", "sklearn"}} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "[]", "")


LIBRARY_CHOICES = {
    "precision": conversion.PRECISIONS,
    "input_type": flatbuffer.TYPES,
    "output_type": flatbuffer.TYPES,
    "form": overhead.VARIANTS,
    "site": recalibration.SITES,
    "accelerator": browser.ACCELERATORS,
    "protocol": evaluation.PROTOCOLS,
    "recipe": recipes.RECIPES,
    "sampling": recipes.SAMPLINGS,
    "strategy": distribution.STRATEGIES,
}


@pytest.mark.parametrize("option", LIBRARY_CHOICES)
def test_help_of_every_command_names_the_choices_of_the_library(option):
    (commands,) = (x for x in se_keras_cli._parser()._actions if isinstance(x, argparse._SubParsersAction))
    actions = [action for command in commands.choices.values() for action in command._actions]
    texts = [action.help for action in actions if action.dest == option and not action.choices]
    assert texts
    for text in texts:
        found = re.search(r"((?:[\w-]+, )+)or ([\w-]+)", text.replace(" (default)", ""))
        assert (*found[1].split(", ")[:-1], found[2]) == tuple(LIBRARY_CHOICES[option])


def test_data_sets_of_the_command_are_those_of_the_library():
    assert tuple(sources.DATA) == se_keras_cli.arguments.DATA_SETS


def test_families_of_the_command_are_those_of_the_library():
    assert set(se_keras_cli.arguments.FAMILIES) == {catalogue.family_of(name) for name in se_keras.names()}


def test_export_asks_for_calibration_where_the_library_does():
    assert se_keras_cli.arguments.CALIBRATED == quantization.CALIBRATED


def test_installed_command_has_help():
    result = run("--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: se-keras")


def test_version_is_the_packages(cli):
    installed = [f"{name} {version(package)}" for name, package in se_keras_cli.RUNS_ON.items()]
    assert cli("--version").out == f"se-keras {se_keras.__version__} ({', '.join(installed)})\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "COMMAND"),
        (["lst"], "lst"),
        (["show"], "NAME"),
        (["train"], "NAME"),
        (["show", "se_resnet50", "--size", "large"], "--size"),
        (["list", "--colour"], "--colour"),
    ],
)
def test_arguments_that_do_not_parse_are_told_with_the_usage(cli, arguments, message):
    result = cli(*arguments)
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("usage: se-keras")
    assert message in result.err.splitlines()[-1]


def numeric_options():
    """`(command, option, type)` of each option whose value is a number."""
    (commands,) = (action for action in se_keras_cli._parser()._actions if action.choices)
    for name, parser in commands.choices.items():
        for action in parser._actions:
            if action.type not in (None, Path):
                yield name, action.option_strings[0], action.type


@pytest.mark.parametrize("text", ["-1", "nan", "x", "99999999999999999999", "1" * 5000, "-inf", ""])
def test_numbers_that_no_option_takes_are_refused_by_all(text):
    accepted = []
    for command, option, kind in numeric_options():
        with contextlib.suppress(argparse.ArgumentTypeError):
            accepted.append((command, option, kind(text)))
    floats = ("--learning-rate", "--tolerance", "--within")  # which may be as large as a float is
    assert all(option in floats and text.startswith("99") for _, option, _ in accepted)


def test_every_number_is_checked_while_the_arguments_are_read():
    kinds = {kind for _, _, kind in numeric_options()}
    assert kinds <= {x for x in vars(se_keras_cli.arguments).values() if callable(x)} - {int, float}
    assert len(list(numeric_options())) > 30


@pytest.mark.parametrize(
    "arguments, message",
    {
        "train se_resnet11_digits --epochs 99999999999999999999": "--epochs: must be an int of 1 to 2147483647.",
        "train se_resnet11_digits --batch-size 0": "--batch-size: must be an int of 1 to 2147483647. Received: '0'",
        "export a.keras -o b.tflite --freeze-gates 2": "--freeze-gates: must be above 0 and at most 1. Received: '2'",
        "export a.keras -o b.tflite --freeze-gates 0": "--freeze-gates: must be above 0 and at most 1. Received: '0'",
        "train se_resnet11_digits --learning-rate nan": "--learning-rate: must be a finite number above 0.",
        "show resnet50 --size 0": "--size: must be an int of 1 to 2147483647. Received: '0'",
        "benchmark --threads 0": "--threads: must be an int of 1 to 1024. Received: '0'",
        "benchmark --blocks 1": "--blocks: must be an int of 2 to 2147483647: at least 2 blocks",
        "benchmark --within -0.1": "--within: must be a finite number above 0. Received: '-0.1'",
        "benchmark --rest inf": "--rest: must be 0 to 1000000000 seconds. Received: 'inf'",
        "serve-check --timeout 0": "--timeout: must be above 0 and at most 1000000000 seconds. Received: '0'",
        "verify a b --tolerance nan": "--tolerance: must be a finite number of at least 0. Received: 'nan'",
    }.items(),
)
def test_number_out_of_its_range_is_refused_with_the_range(cli, arguments, message):
    result = cli(*shlex.split(arguments))
    assert (result.status, result.out) == (2, "")
    assert f"error: argument {message}" in result.err.splitlines()[-1]


# list and show


def test_list_has_every_network(cli):
    result = cli("list")
    assert (result.status, result.err) == (0, "")
    assert all(re.search(rf"\b{name}\b", result.out) for name in se_keras.names())


def test_list_as_json_has_every_network(cli):
    result = cli("list", "--json")
    assert (result.status, result.err) == (0, "")
    assert sorted(row["name"] for row in json.loads(result.out)) == se_keras.names()


def test_list_shows_a_network_behind_its_baseline(cli):
    names = [row["name"] for row in json.loads(cli("list", "resnet50", "--json").out)]
    assert names == ["resnet50", "se_resnet50", "resnet50b", "se_resnet50b"]


def test_list_shows_our_counts_and_the_papers_figures(cli):
    (line,) = [line for line in cli("list", "mobilenet").out.splitlines() if line.split()[:1] == ["se_mobilenet"]]
    # Table 3 of the paper, and the counts derived from the papers' tables: tests/golden/published.json.
    assert line.split() == "se_mobilenet 224 4,718,044 10.3% 0.5692 0.572 4.7M 25.3".split()


def test_list_of_a_part_that_no_name_has_is_refused(cli):
    result = cli("list", "resnet51")
    assert (result.status, result.out) == (2, "")
    rule = "NAME is a part of a name, or a quoted pattern such as 'se_resnet*'; se-keras list shows all"
    assert result.err == f"se-keras: error: No network is found. {rule}. Received: 'resnet51'\n"


LISTED = {
    ("se_resnet*",): lambda name: name.startswith("se_resnet"),
    ("*_025", "senet"): lambda name: name.endswith("_025") or name == "senet154",
    ("--pretrained",): lambda name: name in IMAGENET,
    ("--family", "vgg"): lambda name: "vgg" in name,
    ("se_*50*", "--pretrained", "--family", "resnet"): lambda name: (
        name.startswith("se_") and "50" in name and name in IMAGENET
    ),
}


@pytest.mark.parametrize("arguments, is_listed", LISTED.items(), ids=map(" ".join, LISTED))
def test_list_has_the_networks_of_a_pattern_a_family_or_with_weights(arguments, is_listed, cli):
    found = {row["name"] for row in json.loads(cli("list", "--json", *arguments).out)}
    assert found == {name for name in se_keras.names() if is_listed(name)} != set()


@pytest.mark.parametrize("command", [["list"], ["show", "se_resnet50"], ["--version"]], ids=" ".join)
def test_networks_are_shown_without_an_import_of_tensorflow(command):
    script = f"import sys, se_keras_cli\ntry:\n    se_keras_cli.main({command})\nexcept SystemExit:\n    pass\n"
    script += "assert 'tensorflow' not in sys.modules and 'keras' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def completions(line):
    """What the shell offers after a line, by argcomplete's protocol."""
    options = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    script = "import os, sys; os.dup2(1, 8); sys.argv = ['se-keras']; import se_keras_cli; se_keras_cli.main()"
    result = subprocess.run([sys.executable, "-c", script], env=os.environ | options, capture_output=True, text=True)
    return set(result.stdout.split())


def test_shell_completes_commands_and_networks():
    assert completions("se-keras pre") == {"predict"}
    assert completions("se-keras show se_resnet18") == {"se_resnet18"}
    assert completions("se-keras train --str") == {"--strategy"}


def test_shipped_listing_is_what_list_prints(cli):
    # In the same order and format, so that CONTRIBUTING.md's `--counts --json > networks.json` changes new rows alone.
    assert cli("list", "--json").out == (ROOT / "se_keras" / "networks.json").read_text()


@pytest.mark.slow
def test_listing_is_what_counting_anew_gives(cli):
    # The whole file would take a minute; tests/test_networks.py counts every network.
    parts = ("resnet11", "mobilenet_025", "shake_even")
    assert cli("list", "--json", *parts).out == cli("list", "--json", "--counts", *parts).out


def test_network_tables_are_what_list_prints(cli):
    printed = cli("list", "--markdown").out.splitlines()
    assert (ROOT / "docs" / "results" / "networks.md").read_text().splitlines()[-len(printed) :] == printed


def test_show_prints_parameters_and_multiply_adds(cli):
    result = cli("show", "se_resnet50")
    assert (result.status, result.err) == (0, "")
    # The released network's parameters and multiply-adds: tests/golden/published.json.
    assert "28,088,024 trained" in result.out
    assert "3.8605 G" in result.out


def test_show_counts_at_another_size(cli):
    at_8, at_16 = (json.loads(cli("show", "se_resnet11_digits", "--size", size, "--json").out) for size in (8, 16))
    assert (at_8["input_shape"], at_16["input_shape"]) == ([8, 8, 1], [16, 16, 1])
    assert at_16["trainable"] == at_8["trainable"]
    # Convolutions take four times as many; SE and the classifier, which see one position, as many as before.
    assert 3 * at_8["macs"] < at_16["macs"] < 4 * at_8["macs"]
    assert at_16["se_macs"] == at_8["se_macs"]


def test_show_prints_layers(cli):
    assert "stage4_block1_se" in cli("show", "se_resnet11_digits", "--layers").out


def test_show_says_that_a_baseline_has_no_se(cli):
    assert "a baseline" in cli("show", "resnet11_digits").out
    assert json.loads(cli("show", "resnet11_digits", "--json").out)["se"] is None


def test_installed_command_prints_json_alone_on_stdout_and_progress_alone_on_stderr():
    result = run("show", "se_resnet11_digits", "--layers", "--json")
    assert result.returncode == 0
    assert json.loads(result.stdout)["name"] == "se_resnet11_digits"
    assert result.stderr == "counting se_resnet11_digits\n"


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["list"], ["list", "--json"]], ids=" ".join)
def test_reader_that_leaves_early_is_no_error(arguments):
    with subprocess.Popen([SCRIPT, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()  # before the command has anything to print, as `head` may
        err = process.stderr.read()
    assert (process.returncode, err) == (0, "")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_full_disk_under_stdout_is_an_error_of_one_line():
    with open("/dev/full", "w") as full:
        command = [SCRIPT, "list", "--json"]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (2, "se-keras: error: [Errno 28] No space left on device\n")


# train

RUN_FILES = {MODEL_FILE, RUN_FILE, checkpoint.FILE, record.CSV, *record.CURVES}


def run_files(folder):
    """The files of a run but for TensorBoard's."""
    return {path.name for path in folder.iterdir() if path.is_file()}


def test_train_leaves_the_run_and_the_same_command_returns_at_once(cli, tmp_path, few_digits, monkeypatch):
    command = ["train", "se_resnet11_digits", "--epochs", 2, "--batch-size", 16, "-o", tmp_path / "run"]
    first = cli(*command)
    assert (first.status, first.err) == (0, "")
    curves = rf"curves: {tmp_path}/run/curves\.png, or tensorboard --logdir {tmp_path}/run.*\n"
    answer = rf"{tmp_path}/run/model\.keras: test accuracy \d+\.\d% after 2 epochs\n{curves}"
    assert re.fullmatch(answer, first.out), first.out
    assert [line.partition(",")[0] for line in first.progress] == [
        f"training se_resnet11_digits: {epoch} of 2 epochs done" for epoch in (0, 1, 2)
    ]
    assert run_files(tmp_path / "run") == RUN_FILES

    monkeypatch.setattr("se_keras.training.step.Trainer.train", lambda *_, **__: pytest.fail("trained again"))
    again = cli(*command)
    assert (again.status, again.out, again.err) == (0, first.out, "")
    assert again.progress == first.progress[-1:]


def test_train_takes_the_recipe_from_its_options(cli):
    options = {"epochs": 1, "batch-size": 16, "learning-rate": 0.01, "seed": 3, "sampling": "balanced"}
    arguments = [argument for option, value in options.items() for argument in (f"--{option}", value)]
    plan = json.loads(cli("train", "resnet11_digits", *arguments, "--dry-run", "--json").out)
    expected = replace(DIGITS, epochs=1, batch_size=16, learning_rate=0.01, seed=3, sampling="balanced")
    assert plan["recipe"] == json.loads(json.dumps(asdict(expected)))
    assert (plan["steps_per_epoch"], plan["training_images"]) == (1437 // 16, 1437)


def test_dry_run_prints_the_recipe_in_full_with_its_source(cli, tmp_path):
    command = "train resnet11_digits --recipe paper_imagenet --batch-size 64 --dry-run -o"
    result = cli(*command.split(), tmp_path / "run")
    assert result.status == 0
    for text in ("0.0375 from epoch 1", "0.00375 from epoch 31", "scale_and_aspect", "arXiv:1709.01507"):
        assert text in result.out
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "number, status, message", [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, EXIT_SAVED, "stopped by SIGTERM")]
)
def test_interrupted_training_says_what_is_kept_and_the_same_command_finishes(cli, tmp_path, number, status, message):
    command = ["train", "se_resnet11_digits", "--epochs", "6", "--batch-size", "128", "-o", str(tmp_path / "run")]
    # A shell that starts the tests in the background ignores SIGINT, and child processes inherit that.
    program = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, SCRIPT, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        before = []
        for line in process.stderr:
            before.append(line)
            if "1 of 6 epochs done" in line:
                process.send_signal(number)
                break
        out, err = process.communicate(timeout=120)
    assert process.returncode == status, (before, err)
    assert out == ""
    kept = re.escape(str(tmp_path / "run" / checkpoint.FILE))
    *progress, last = err.splitlines()
    assert all(line.startswith("training ") for line in progress)  # an epoch may end before the signal is handled
    where = r"epoch [1-5]( and \d+ steps? of the next)? of 6"
    assert re.fullmatch(rf"se-keras: {message}\. '{kept}' holds {where}; the same command resumes", last), last

    resumed_from = int(re.search("holds epoch ([1-5])", last)[1])
    result = cli(*command)
    assert (result.status, result.err) == (0, "")
    assert "after 6 epochs" in result.out
    assert 6 - resumed_from <= len(result.progress) <= 1 + 6 - resumed_from
    assert run_files(tmp_path / "run") == RUN_FILES


@pytest.mark.slow
def test_runs_are_drawn_together(cli, files, tmp_path):
    result = cli("curves", files / "run", files / "run", "-o", tmp_path / "curves.svg")
    assert (result.status, result.out) == (
        0,
        f"wrote {tmp_path}/curves.svg: se_resnet11_digits, se_resnet11_digits ({files}/run)\n",
    )
    assert "se_resnet11_digits, validation" in (tmp_path / "curves.svg").read_text()


@pytest.mark.slow
def test_folder_is_packed_and_trained_on(cli, tmp_path):
    for number in range(20):
        path = tmp_path / "photographs" / f"class{number % 2}" / f"{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        keras.utils.save_img(path, np.random.default_rng(number).integers(0, 255, (40, 40, 3)), scale=False)
    packed = cli("pack", tmp_path / "photographs", "--shards", 2, "-o", tmp_path / "shards")
    assert packed.status == 0
    assert packed.out.startswith("train: 16 images in 2 shards")
    command = "train mobilenet_025 --size 32 --epochs 1 --batch-size 8 --data"
    trained = cli(*command.split(), tmp_path / "shards", "-o", tmp_path / "run")
    assert trained.status == 0 and trained.err.startswith("se-keras: warning: An epoch has 2 steps: 16 training images")
    options = ["--data", tmp_path / "photographs", "--protocol", "ten_crop", "--json"]
    evaluated = cli("evaluate", tmp_path / "run" / "model.keras", *options)
    assert json.loads(evaluated.out)["images"] == 4


# evaluate


@pytest.mark.slow
def test_evaluate_prints_shares_with_their_intervals_and_writes_the_confusion(cli, files, few_digits, tmp_path):
    result = cli("evaluate", files / "run" / "model.keras", files / "se.tflite", "--confusion", tmp_path / "c.csv")
    assert (result.status, result.err) == (0, "")
    assert "top-1" in result.out and "40 images, 10 classes" in result.out
    rows = (tmp_path / "c.csv").read_text().splitlines()
    assert rows[0] == ',"0","1","2","3","4","5","6","7","8","9"'
    assert sum(int(cell) for row in rows[1:] for cell in row.split(",")[1:]) == 40


# export


def test_export_writes_a_litert_file_and_its_manifest(cli, files, tmp_path):
    result = cli("export", files / "model.keras", "-o", tmp_path / "digits.tflite")
    assert (result.status, result.err) == (0, "")
    assert f"wrote {tmp_path}/digits.tflite: top-1 agreement 100.0%" in result.out
    assert sorted(written(tmp_path)) == ["digits.tflite", "digits.tflite.json"]
    assert load_litert(tmp_path / "digits.tflite").manifest["precision"] == "float32"


def test_export_prints_its_manifest_as_json_alone(cli, files, tmp_path, converted):
    result = cli("export", files / "model.keras", "-o", tmp_path / "digits.tflite", "--json")
    assert (result.status, result.err) == (0, "")
    printed = json.loads(result.out)
    assert printed.pop("path") == str(tmp_path / "digits.tflite")
    assert printed == json.loads((tmp_path / "digits.tflite.json").read_text())
    assert printed["sha256"] == sha256(tmp_path / "digits.tflite")


@pytest.mark.slow
def test_export_tells_the_file_its_labels_normalization_and_training(cli, files, tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(f"digit {i}" for i in range(10)))
    for labels, expected in {"digits": "0", tmp_path / "names.txt": "digit 0"}.items():
        options = ["--labels", labels, "--normalize", "0", "255", "-o", tmp_path / "digits.tflite"]
        override = [] if labels == "digits" else ["--override"]  # the run has other names
        result = cli("export", files / "run" / "model.keras", *options, *override)
        assert (result.status, result.err) == (0, "")
        about = metadata.read((tmp_path / "digits.tflite").read_bytes())
        assert (about.labels[0], len(about.labels)) == (expected, 10)
        assert about.normalization == ((0.0,), (255.0,))
        assert about.training == json.loads((files / "run" / "run.json").read_text())


def test_export_in_int8_calibrates_on_a_file_of_images(cli, files, tmp_path):
    options = ["--precision", "int8", "--calibration", files / "images.npy", "--json"]
    result = cli("export", files / "model.keras", *options, "-o", tmp_path / "digits.tflite")
    assert (result.status, result.err) == (0, "")
    printed = json.loads(result.out)
    assert printed["precision"] == "int8"
    # A byte in place of four for each weight.
    assert printed["bytes"] < (files / "se.tflite").stat().st_size / 2
    assert printed["agreement"]["top1"] >= 0.9


def test_export_in_int8_calibrates_on_the_digits_to_train_on(cli, files, tmp_path, converted):
    options = ["--precision", "int8", "--calibration", "digits"]
    assert cli("export", files / "model.keras", *options, "-o", tmp_path / "digits.tflite").status == 0
    (arguments,) = converted
    assert arguments["precision"] == "int8"
    np.testing.assert_array_equal(arguments["calibration"], datasets.digits().train.images)


@pytest.mark.slow
def test_export_in_int8_warns_in_one_line_where_calibration_did_not_show_what_the_network_sees(
    cli, files, few, tmp_path, monkeypatch
):
    np.save(tmp_path / "dim.npy", few.train.images[:20] * 0.3)
    monkeypatch.setattr("se_keras.export.to_litert", functools.partial(to_litert, held_out=few.test.images))
    options = ["--precision", "int8", "--calibration", tmp_path / "dim.npy"]
    result = cli("export", files / "model.keras", *options, "-o", tmp_path / "digits.tflite")
    assert result.status == 0
    assert re.fullmatch(r"se-keras: warning: The int8 file is far from the Keras model: .+\n", result.err), result.err


def test_export_in_int8_calibrates_on_a_folder_of_images(cli, files, few, tmp_path, converted):
    options = ["--precision", "int8", "--calibration", files / "scans", "--normalize", 0, 255]
    result = cli("export", files / "model.keras", *options, "-o", tmp_path / "digits.tflite")
    assert (result.status, result.err) == (0, "")
    assert [line for line in result.progress if line.startswith("reading")] == [
        f"reading {files}/scans: image {index} of 2" for index in (1, 2)
    ]
    # The scans have 17 shades: a 255th is near each.
    np.testing.assert_allclose(converted[0]["calibration"], few.test.images[1:3], atol=0.5 / 255 + 1e-6)


def test_export_calibrates_on_a_folder_as_a_network_of_the_catalogue_takes_it(cli, files, tmp_path, converted):
    options = ["--precision", "int8", "--calibration", files / "scans", "--normalize", "se_resnet11_digits"]
    options += ["--limit", 1]
    assert cli("export", files / "model.keras", *options, "-o", tmp_path / "digits.tflite").status == 0
    assert converted[0]["calibration"].shape == (1, 8, 8, 1) and converted[0]["calibration"].max() == 1


@pytest.mark.parametrize("options, lowering", [([], True), (["--as-published"], False)], ids=["default", "published"])
def test_export_lowers_unless_as_published(cli, files, tmp_path, converted, options, lowering):
    assert cli("export", files / "model.keras", *options, "-o", tmp_path / "digits.tflite").status == 0
    assert [arguments["lowering"] for arguments in converted] == [lowering]


@pytest.mark.slow
def test_export_to_a_folder_writes_the_next_version_of_a_savedmodel(cli, files, tmp_path):
    result = cli("export", files / "model.keras", "-o", tmp_path / "served", "--json")
    assert (result.status, result.err) == (0, "")
    assert json.loads(result.out)["path"] == str(tmp_path / "served" / "1")
    result = cli("export", files / "model.keras", "-o", tmp_path / "served")
    assert f"wrote {tmp_path}/served/2: " in result.out
    assert {path.name for path in (tmp_path / "served").iterdir()} == {"1", "2"}


@pytest.mark.slow
def test_export_to_a_folder_takes_image_files_where_it_is_told_their_classes(cli, files, tmp_path):
    options = ["--labels", "digits", "--normalize", "0", "255", "--top", "2"]
    result = cli("export", files / "model.keras", *options, "-o", tmp_path / "served", "--json")
    assert (result.status, result.err) == (0, "")
    outputs = json.loads(result.out)["signatures"]["image_bytes"]["outputs"]
    assert {name: x["shape"] for name, x in outputs.items()} == {"classes": [None, 2], "scores": [None, 2]}
    assert (tmp_path / "served" / "1" / "assets" / "labels.txt").read_text().split("\n") == [*"0123456789"]


@pytest.mark.parametrize("folder", ["runs[b]", "runs[", "a[red]b"])
def test_brackets_in_a_path_are_printed_as_they_are(cli, files, tmp_path, folder):
    # "runs[/b].keras" is a closing tag to rich, for which nothing was open.
    model = tmp_path / folder / ("b].keras" if folder == "runs[" else "model.keras")
    model.parent.mkdir()
    model.write_bytes((files / "text.keras").read_bytes())
    result = cli("export", model, "-o", tmp_path / "digits.tflite")
    assert result.progress == [f"loading {model}"]
    assert result.err.startswith(f"se-keras: error: '{model}' is not a Keras model")


# verify


def test_verify_prints_how_far_a_file_is_from_its_network(cli, files):
    result = cli("verify", files / "model.keras", files / "se.tflite", "--images", "digits", "--tolerance", "1e-3")
    assert (result.status, result.err) == (0, "")
    assert result.progress == [
        f"loading {files}/model.keras",
        f"loading {files}/se.tflite",
        f"comparing {files}/se.tflite with {files}/model.keras",
    ]
    first, *_, row = [line for line in result.out.splitlines() if line.strip()]
    assert first == f"{files}/se.tflite compared with {files}/model.keras, on digits"
    assert re.fullmatch(r" outputs +\d\.\de-\d\d +\d\.\de-\d\d +1\.000000 +100\.0% +360 *", row), row


def test_verify_on_a_folder_of_images(cli, files):
    options = ["--images", files / "scans", "--normalize", "0", "255", "--json"]
    result = cli("verify", files / "se.tflite", files / "model.keras", *options)
    assert (result.status, result.err) == (0, "")
    printed = json.loads(result.out)
    assert printed["agreement"]["samples"] == 2 and printed["agreement"]["max_error"] < 1e-5
    assert (printed["images"], printed["layers"]) == (str(files / "scans"), [])


def test_verify_beyond_the_tolerance_has_status_1_and_says_where(cli, files):
    command = ["verify", files / "model.keras", files / "biased.keras"]
    result = cli(*command, "--tolerance", "1e-3", "--layers")
    assert result.status == 1
    assert re.fullmatch(
        rf"se-keras: {files}/biased\.keras disagrees with {files}/model\.keras: max error \d\.\de-\d\d of the range "
        r"exceeds 0\.001\n",
        result.err,
    ), result.err
    assert "first layer whose error exceeds 0.001 of its range: predictions\n" in result.out
    assert re.search(r"^ stage2_block1_se +0\.0e\+00 ", result.out, re.MULTILINE)
    result = cli(*command, "--json")
    assert result.status == 0  # no tolerance was given
    printed = json.loads(result.out)
    assert printed["images"] == "noise" and printed["first_beyond"] == "predictions"
    assert {"name", "max_error", "mean_error", "cosine", "top1", "samples"} == set(printed["layers"][0])


def test_verify_warns_in_one_line_of_images_that_hide_differences(cli, files, tmp_path):
    np.save(tmp_path / "loud.npy", np.random.default_rng(0).normal(size=(4, 8, 8, 1)) * 1e5)
    result = cli("verify", files / "model.keras", files / "se.tflite", "--images", tmp_path / "loud.npy")
    assert result.status == 0
    assert re.fullmatch(r"se-keras: warning: Most probabilities of .*model\.keras are 0, .+\n", result.err), result.err


# inspect


def test_inspect_says_what_a_file_is(cli, labelled_file):
    result = cli("inspect", labelled_file)
    assert (result.status, result.err) == (0, "")
    for line in (
        str(labelled_file),
        f"SHA-256 {sha256(labelled_file)}",
        "labelled, float32",
        "1x8x8x3 float32",
        "1x20 float32",
        "(pixel - [123.675, 116.28, 103.53]) / [58.395, 57.12, 57.375], pixels in 0..255",
        "20: a [red] one, number 1, number 2, ..., number 19",
        "data photographs, epochs 3, loss 0.25",
        "all delegated to XNNPACK",
        "CONV_2D:1",
        "equals that of the manifest",
        "max error 0.0e+00 of the largest value, at most 0.0001",
        "tensorflow ",
    ):
        assert line in result.out, line


def test_inspect_fits_80_columns_but_for_the_path(cli, labelled_file, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = cli("inspect", labelled_file)
    assert max(map(len, result.out.splitlines()[1:])) <= 80
    assert f"SHA-256 {sha256(labelled_file)}\n" in result.out


def test_inspect_prints_json_alone(cli, labelled_file):
    result = cli("inspect", labelled_file, "--json")
    assert (result.status, result.err) == (0, "")
    printed = json.loads(result.out)
    assert printed["sha256"] == sha256(labelled_file)
    assert printed["golden"]["agrees"] is True
    assert printed["metadata"]["labels"][0] == "a [red] one"


@pytest.mark.parametrize("options", [[], ["--json"]], ids=" ".join)
def test_inspect_without_a_manifest_says_so(cli, files, tmp_path, options):
    (tmp_path / "se.tflite").write_bytes((files / "se.tflite").read_bytes())
    result = cli("inspect", tmp_path / "se.tflite", *options)
    assert (result.status, result.err) == (0, "")
    if options:
        printed = json.loads(result.out)
        assert (printed["checked"], printed["manifest"], printed["golden"]) == ("metadata", None, None)
    else:
        assert "equals that of the metadata; the file has no manifest" in result.out


@pytest.mark.parametrize("options", [[], ["--json"]], ids=" ".join)
def test_inspect_fails_where_the_golden_output_is_another(cli, files, tmp_path, options):
    manifest = json.loads((files / "se.tflite.json").read_text())
    manifest["golden"]["outputs"]["probabilities"]["values"][0] += 1
    (tmp_path / "se.tflite").write_bytes((files / "se.tflite").read_bytes())
    (tmp_path / "se.tflite.json").write_text(json.dumps(manifest))
    result = cli("inspect", tmp_path / "se.tflite", *options)
    assert result.status == 2
    assert result.err.startswith(
        f"se-keras: error: '{tmp_path}/se.tflite' does not compute the reference output of its manifest here: max error"
    )
    assert "SHA-256" in result.out or json.loads(result.out)["golden"]["agrees"] is False


# benchmark


def test_benchmark_of_two_files_prints_a_table(cli, files):
    result = cli("benchmark", "--files", files / "plain.tflite", files / "se.tflite", "--blocks", 2)
    assert result.status == 0
    # Two blocks of a busy machine may not show what the larger file takes.
    assert all(line.startswith("se-keras: warning: ") for line in result.err.splitlines())
    assert result.progress == ["timing se compared with plain"]
    parts = (
        "se compared with plain at 8x8",
        "plain ms",
        "se ms",
        "1 thread",
        "ratio",
        "A/A control",
        "real?",
        "float32",
    )
    for part in parts:
        assert part in result.out
    assert "paper" not in result.out


def test_benchmark_names_foreign_files_as_they_are(cli, files, tmp_path):
    for name in ("net[a].tflite", "net[b].tflite"):
        (tmp_path / name).write_bytes(detach((files / "plain.tflite").read_bytes()))
    result = cli("benchmark", "--files", tmp_path / "net[a].tflite", tmp_path / "net[b].tflite", "--blocks", 2)
    assert result.status == 0
    assert "net[b] compared with net[a]" in result.out


def test_benchmark_of_two_files_prints_json(cli, files):
    result = cli("benchmark", "--files", files / "plain.tflite", files / "se.tflite", "--blocks", 2, "--json")
    assert (result.status, result.err) == (0, "")
    report = json.loads(result.out)
    (record,) = report["overhead"]
    assert (record["baseline"], record["network"]) == ("plain", "se")
    assert (record["threads"], record["input_shape"]) == (1, [1, 8, 8, 1])
    assert record["sha256"] == [sha256(files / "plain.tflite"), sha256(files / "se.tflite")]
    comparison = record["comparison"]
    assert comparison["blocks"] == 2
    for ratio in (comparison["ratio"], comparison["null"]):
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert report["environment"]["processor"]
    assert report["environment"]["versions"]["ai-edge-litert"]
    assert report["paper"]["ratio"] == pytest.approx(1.018, abs=1e-3)


RATIO = {"median": 1.02, "low": 1.01, "high": 1.03}
QUIET, NOISY = ({"median": 1.0, "low": 2 - high, "high": high} for high in (1.002, 1.05))


@pytest.mark.parametrize(
    "control, drift, real, warnings",
    [
        (QUIET, 1.02, "yes", []),
        (QUIET, None, "yes", []),  # of version 0.1.0
        (
            NOISY,
            1.02,
            "no",
            ["+2.0 % [+1.0 % to +3.0 %], is not larger than the noise: two copies of a differ by -5.0 %"],
        ),
        (QUIET, 1.5, "yes", ["the time of a changed by 50% while it was measured"]),
    ],
)
def test_table_says_whether_a_difference_is_real_and_warns_of_a_busy_machine(capfd, control, drift, real, warnings):
    comparison = {"ratio": RATIO, "null": control, "a_ms": 10.0, "b_ms": 10.2, "drift": drift}
    pair = {"baseline": "a", "network": "b", "precision": "int8", "form": "lowered", "threads": 1, "se": None}
    made = pair | {"input_shape": [1, 8, 8, 1], "comparison": comparison, "is_real": real == "yes"}
    report = {"environment": {"processor": "x", "runtime": "y", "matrix_units": []}, "paper": PAPER, "overhead": [made]}
    print_overhead(report, Console(stderr=True, width=300))
    out, err = capfd.readouterr()
    assert re.search(rf"int8 lowered .* {real} *\n", out) and max(map(len, out.splitlines())) <= 80
    lines = err.splitlines()
    assert all(line.startswith("se-keras: warning: ") for line in lines)
    assert len(lines) == 2 * len(warnings)
    for text in warnings:
        assert "int8 lowered: " in lines[0] and text in lines[0]
        assert "the machine may have been too busy: measure again when nothing else runs" in lines[1]


def test_benchmark_profiles_files_for_the_report(cli, files, tmp_path, monkeypatch):
    monkeypatch.setattr(profiler, "profile", lambda file, threads: made_profile({"stage2_block1_conv1": 1000.0}))
    command = ["benchmark", "--files", files / "plain.tflite", files / "se.tflite", "--blocks", 2, "--profile"]
    assert cli(*command, "-o", tmp_path / "r.json").status == 0
    (record,) = json.loads((tmp_path / "r.json").read_text())["overhead"]
    assert record["profiles"] == [{"stage2": {"convolution": 1000.0}}] * 2
    assert cli("report", tmp_path / "r.json", "-o", tmp_path / "r.html").status == 0
    body = (tmp_path / "r.html").read_text().partition("<body>")[2].partition("<script")[0]
    assert "Where the time goes" in body and "<b>1 ms</b>" in body and "paper" not in body


def test_benchmark_of_two_files_keeps_what_it_has_measured(cli, files, tmp_path):
    command = ["benchmark", "--files", files / "plain.tflite", files / "se.tflite", "--blocks", 2]
    for threads in ([1], [1, 2], [1, 2]):
        result = cli(*command, "--threads", *threads, "-o", tmp_path / "r.json")
        assert result.status == 0
    assert result.progress == []
    assert [x["threads"] for x in json.loads((tmp_path / "r.json").read_text())["overhead"]] == [1, 2]


@pytest.mark.slow
def test_benchmark_of_a_network_measures_it_beside_its_baseline(cli):
    options = ["--precision", "float32", "--form", "lowered", "--size", 12, "--blocks", 2, "--threads", 2, "--json"]
    result = cli("benchmark", "--network", "se_resnet11_digits", *options)
    assert (result.status, result.err) == (0, "")
    (record,) = json.loads(result.out)["overhead"]
    assert (record["baseline"], record["network"]) == ("resnet11_digits", "se_resnet11_digits")
    assert (record["precision"], record["form"], record["threads"]) == ("float32", "lowered", 2)
    assert record["input_shape"] == [1, 12, 12, 1]
    assert record["undelegated"] == []


@pytest.mark.slow
def test_benchmark_keeps_its_results_and_report_shows_them(cli, tmp_path):
    command = ["benchmark", "--network", "se_resnet11_digits", "--precision", "float32", "--form", "lowered"]
    command += ["--blocks", 2, "-o", tmp_path / "results.json"]
    assert cli(*command).status == 0
    kept = (tmp_path / "results.json").read_bytes()
    again = cli(*command)
    assert (again.status, again.progress) == (0, [])
    assert (tmp_path / "results.json").read_bytes() == kept
    assert cli("report", tmp_path / "results.json", "-o", tmp_path / "report.html").status == 0
    assert "se_resnet11_digits" in (tmp_path / "report.html").read_text()
    assert (
        "| se_resnet11_digits at 8x8 | resnet11_digits | float32 | lowered | 1 |"
        in cli("report", tmp_path / "results.json", "--markdown").out
    )
    another = json.loads(kept)
    another["environment"]["processor"] = "another"
    (tmp_path / "results.json").write_text(json.dumps(another))
    assert "measured with another processor: take a new file. Received: another" in cli(*command).err
    (tmp_path / "results.json").write_text(json.dumps(json.loads(kept) | {"training": {}}))
    assert "The file has other entries than benchmark's, training: take a new one" in cli(*command).err
    another["environment"] = json.loads(kept)["environment"] | {"versions": None}
    (tmp_path / "results.json").write_text(json.dumps(another))
    assert "measured with other versions: take a new file. Received: None" in cli(*command).err


# profile


def made_profile(times):
    """A profile of `{layer: microseconds}`; layers of SE are multiplications, others convolutions."""
    rows = (
        profiler._row("MUL" if "_se" in layer else "CONV_2D", layer, "kernel", microseconds)
        for layer, microseconds in times.items()
    )
    return profiler.Profile(rows=tuple(rows), unattributed=3.0, run_us=9e3, profiled_us=9100.0, others=())


PLAIN = {f"stage{stage}_block1_conv1": 10_000.0 for stage in (2, 3, 4, 5)} | {"conv1": 5_000.0}
AGAIN = PLAIN | {"stage2_block1_conv1": 10_600.0}
SE = {f"stage{stage}_block1_se_scale": 250.0 for stage in (2, 3, 4, 5)} | PLAIN | {"stage3_block1_conv1": 9_700.0}


@pytest.fixture
def profiled(monkeypatch):
    """`profiled(first, ...)`: the profiles of the files that are profiled, in order."""

    def set_(*times):
        found = map(made_profile, times)
        monkeypatch.setattr(profiler, "profile", lambda *_, **__: next(found))

    monkeypatch.setenv("COLUMNS", "80")
    return set_


def test_profile_against_a_baseline_fits_a_terminal_and_marks_what_is_noise(cli, files, profiled, monkeypatch):
    profiled(PLAIN, SE, AGAIN)
    monkeypatch.setenv("COLUMNS", "80")
    out = cli("profile", files / "se.tflite", "--against", files / "plain.tflite").out
    assert max(map(len, out.splitlines())) <= 80
    added = out[out.index("added to ") : out.index("slowest")]
    assert re.search(r"stage2 +\(\+0\) +\+250 +\(\+250\)\s", added)  # SE's parts are not in the baseline: no noise
    assert re.search(r"stage3 +\(-300\) +\+250 +\(-50\)\s", added)
    assert re.search(r"all +\(-300\) +\+1,000 +\+700\s", added)
    assert "The noise is larger" not in out


def test_profile_says_when_the_noise_is_larger_than_the_difference(cli, files, profiled):
    profiled(PLAIN, SE, {name: 1.05 * us for name, us in PLAIN.items()})
    result = cli("profile", files / "se.tflite", "--against", files / "plain.tflite")
    said = "difference of all operators, +700 us:\ntwo profiles of the baseline differ by 2,250 us."
    assert f"The noise is larger than the {said}" in result.out
    assert max(map(len, result.out.splitlines())) <= 80


def test_profile_of_one_file_has_no_columns_of_zeros(cli, files, profiled):
    profiled(PLAIN)
    out = cli("profile", files / "plain.tflite").out
    assert re.search(r"^ +convolution +all *$", out, re.MULTILINE) and "added to" not in out
    assert re.search(r"outside +5,000 +5,000 *$", out, re.MULTILINE)


def test_profile_as_json_has_each_side_and_the_control(cli, files, profiled):
    profiled(PLAIN, SE, AGAIN)
    found = json.loads(cli("profile", files / "se.tflite", "--against", files / "plain.tflite", "--json").out)
    assert {side: round(x["told_us"]) for side, x in found.items()} == {
        "against": 45_003,
        "file": 45_703,
        "control": 45_603,
    }


def test_json_has_null_for_what_is_no_number(capsys):
    screen.print_json({"error": math.inf, "rows": [math.nan, 1.5]})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"error": None, "rows": [None, 1.5]}


def test_missing_optional_package_is_an_error_of_one_line(cli, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    result = cli("train", "se_resnet20", "--data", "tfds:mnist", "-o", tmp_path / "run")
    text = 'se-keras: error: tfds:mnist needs the package tensorflow-datasets: pip install "se-keras[tfds]"'
    assert (result.status, result.err.splitlines()[-1]) == (2, text)


def test_file_of_labels_may_begin_with_a_byte_order_mark(cli, files, converted, tmp_path):
    (tmp_path / "labels.txt").write_bytes("\n".join(map(str, range(10))).encode("utf-8-sig"))
    cli("export", files / "model.keras", "--labels", tmp_path / "labels.txt", "-o", tmp_path / "x.tflite")
    assert converted[0]["labels"] == list(map(str, range(10)))


# Refusals: one line, exit status 2, nothing written

INT8 = "--precision int8 --calibration"
BENCHMARK = "benchmark --network se_resnet11_digits --precision float32 --form lowered --blocks 2"
REFUSALS = {
    "show se_resnet51": "There is no network 'se_resnet51' among the",
    "show resnet50 --size 3": r"resnet50 takes images of at least 32\b.*Received: .*\b3",
    "train se_resnet11_digit -o {new}/run": "There is no network 'se_resnet11_digit' among the .+: se_resnet11_digits",
    "train se_resnet50 -o {new}/run": r"at least 32\..*\(8, 8, 1\)",
    "train se_resnet11_digits --data mnist -o {new}/run": "data must be 'digits', .+ Received: 'mnist'",
    "train se_resnet11_digits": "-o FOLDER is needed: the folder of the run",
    "train se_resnet11_digits --recipe fast -o {new}/run": "recipe must be one of digits, .+ Received: 'fast'",
    "train se_resnet11_digits --strategy horovod -o {new}/run": "strategy must be one of .+ Received: 'horovod'",
    "train se_resnet11_digits --workers a:1 -o {new}/run": "--workers and --index go together, with --strategy multi",
    "train se_resnet11_digits --batch-size 2000 -o {new}/run": "at most the 1437 training images.+batch_size=2000",
    "curves {new} -o {new}/c.png": "There is no run in '{new}'",
    "curves {files}/run -o {new}/c.gif": "Curves are drawn as .png, .svg or .pdf. Received: '{new}/c.gif'",
    "pack {new} -o {new}/x": "'{new}' needs two folders or more",
    "evaluate {files}/run/model.keras --protocol 225": "protocol must be one of plain, 224, .+ Received: '225'",
    "evaluate {files}/run/model.keras --protocol 224": "'224' .+ need images of 224x224. Received: .+ takes 8x8",
    "evaluate {files}/truncated.keras": "'{files}/truncated.keras' is not a Keras model",
    "evaluate {files}/run/model.keras --confusion {new}/c.gif": "is written as .csv, .png or .svg. Received",
    "benchmark-training --network resnet50": "resnet50 is a baseline",
    "benchmark --adb --profile": "--profile is for this machine. Received: --adb",
    "benchmark --ssh=-oProxyCommand=x": "A host must be user@host, without blanks, and without a dash first. Rec",
    "benchmark --ssh pi@board --serial 7": "--serial is for --adb. Received: --ssh",
    "benchmark --setup": "--setup is for --ssh. Received: this machine",
    "benchmark --adb": "--adb needs --benchmark-model, LiteRT's binary for the phone: a PATH, or fetch to get it",
    "report {new}/r.json -o {new}/r.html": "There is no file of results '{new}/r.json'",
    "report {files}/run/run.json -o {new}/r.html": "is not a file of results of se-keras benchmark: it lacks ",
    "benchmark --network resnet50 -o {new}/r.json": "resnet50 is a baseline",
    "benchmark-input {new}": "'{new}' needs two folders or more",
    "train resnet11_digits -o {files}/run": "now 'resnet11_digits'; training_images 256, now 1437; epochs 3, now ",
    "export {new}/model.keras -o {new}/x.tflite": "There is no model file '{new}/model.keras'",
    "export {new} -o {new}/x.tflite": "There is no model file '{new}'",
    "export {files}/truncated.keras -o {new}/x.tflite": "'{files}/truncated.keras' is not a Keras model",
    "export {files}/text.keras -o {new}/x.tflite": "'{files}/text.keras' is not a Keras model",
    "export {files}/empty.keras -o {new}/x.tflite": "'{files}/empty.keras' is not a Keras model",
    "export {files}/foreign_zip.keras -o {new}/x.tflite": "'{files}/foreign_zip.keras' is not a Keras model",
    "export {files}/se.tflite -o {new}/x.tflite": "'{files}/se.tflite' is not a Keras model",
    "export {files}/model.keras -o {files}/se.tflite/x.tflite": "(File exists|Not a directory): '{files}/se.tflite",
    "export {files}/model.keras -o {files}/folder.tflite": "'{files}/folder.tflite' exists and is not a plain file",
    "export {files}/model.keras -o {files}/text.npy": "A SavedModel needs a folder.* '{files}/text.npy",
    "export {files}/model.keras -o {files}/text.npy/served": "(File exists|Not a directory): '{files}/text.npy",
    "export {files}/model.keras -o /proc/x/x.tflite": "'/proc/x",
    "export {files}/model.keras -o /proc/x.tflite": "'/proc/",
    "export {files}/model.keras --precision int8 -o {new}/x.tflite": "int8.* needs calibration images",
    "export {files}/model.keras --precision int4 -o {new}/x.tflite": r"'dynamic', 'int8'.* Received: .*int4",
    "export {files}/model.keras --precision int8 -o {new}/served": "int8 .* a SavedModel is float32",
    f"export {{files}}/model.keras {INT8} digits -o {{new}}/served": "int8 .* a SavedModel is float32",
    "export {files}/model.keras --calibration digits -o {new}/x.tflite": "--calibration is for --precision int8 and",
    **{
        f"export {{files}}/model.keras {option} -o {{new}}/served": f"{option.split()[0]} is for -o FILE.tflite"
        for option in ("--input-type int8", "--output-type uint8", "--keep-float .*_se")
    },
    "export {files}/model.keras --freeze-gates 0.9 -o {new}/x.tflite": "--freeze-gates needs --calibration IMAGES",
    "export {files}/model.keras --freeze-gates 0.9 --as-published --calibration digits -o {new}/x.tflite":
        "--as-published is for gates that stay. Received: --freeze-gates",
    "gates {files}/run/model.keras -o {new}/g.gif": "Gates are drawn as .png, .svg or .pdf. Received: '{new}/g.gif'",
    "gates {files}/run/model.keras --data {new}": "needs two folders or more",
    "export {files}/model.keras --top 3 -o {new}/served": "--top is for a model with labels",
    "export {files}/model.keras --labels digits --normalize 0 255 --top 3 -o {new}/x.tflite": "--top is for a Saved",
    "export {files}/model.keras --limit 9 -o {new}/x.tflite": "--limit is for --calibration FOLDER",
    "export {files}/model.keras -o {new}/x.TFLITE": "name ends in .tflite, in small letters. .+/x.TFLITE",
    "list --markdown --json": "--markdown is for a table. Received: --json",
    "train se_resnet11_digits --tpu x -o {new}/run": "--tpu is for --strategy tpu. Received: --strategy none",
    "train se_resnet11_digits --wait 9 -o {new}/run": "--wait is for --strategy multi-worker. Received",
    "report {files}/run/run.json --markdown -o {new}/r.html": "--markdown prints a table. Received: both",
    "benchmark --rest 9": "--rest is for --adb and --ssh. Received: this machine",
    "benchmark --headless": "--headless is for --browser. Received: this machine",
    "benchmark --browser --open --headless": "is opened with a window or without one. Received: --open and --headless",
    "benchmark --files {files}/plain.tflite {files}/se.tflite --form lowered": "--form is for networks .+ --files",
    "export {files}/model.keras --input-type uint8 -o {new}/x.tflite": "input_type='uint8' is for precision='int8'",
    "export {files}/model.keras --precision int8 --calibration digits --keep-float x -o {new}/x.tflite": "no layer of",
    f"export {{files}}/model.keras {INT8} {{new}}/x.npy -o {{new}}/x.tflite": "There are no images '{new}/x.npy'",
    f"export {{files}}/model.keras {INT8} {{files}}/larger.npy -o {{new}}/x.tflite":
        r"must be \(8, 8, 1\). Received: \(5, 9, 9, 1\)",
    f"export {{files}}/model.keras {INT8} {{files}}/nan.npy -o {{new}}/x.tflite": "must be finite. Received: NaN",
    f"export {{files}}/model.keras {INT8} {{files}}/none.npy -o {{new}}/x.tflite": "at least one image",
    f"export {{files}}/model.keras {INT8} {{files}}/blank.npy -o {{new}}/x.tflite": "(?i)calibrat",
    f"export {{files}}/model.keras {INT8} {{files}}/words.npy -o {{new}}/x.tflite": "must be arrays of numbers",
    **{
        f"export {{files}}/model.keras {INT8} {{files}}/{name}.npy -o {{new}}/x.tflite":
            f"'{{files}}/{name}.npy' is not a .npy file"
        for name in ("text", "empty", "pickled", "truncated", "truncated_zip")
    },
    f"export {{files}}/model.keras {INT8} {{files}}/arrays.npz -o {{new}}/x.tflite":
        "'{files}/arrays.npz' is not a .npy",
    f"export {{files}}/own.keras {INT8} {{files}}/scans -o {{new}}/x.tflite":
        r"pixels of image files are 0 to 255: normalization \(--normalize MEAN STD\) says .+ Received: own, whose",
    f"export {{files}}/model.keras {INT8} {{files}}/scans --normalize 0 -o {{new}}/x.tflite": "no network '0'",
    f"export {{files}}/model.keras {INT8} {{files}}/scans --normalize 0 1 2 -o {{new}}/x.tflite":
        "--normalize takes MEAN STD, or a network. Received: 0 1 2",
    f"export {{files}}/model.keras {INT8} {{files}}/scans --normalize x 1 -o {{new}}/x.tflite": "Received: x 1",
    f"export {{files}}/model.keras {INT8} {{files}}/scans --normalize 0 1,2 -o {{new}}/x.tflite":
        "one for each of 1 channels",
    f"export {{files}}/model.keras {INT8} {{files}}/nothing --normalize 0 1 -o {{new}}/x.tflite":
        "'{files}/nothing' has no images .* Received: 1 other file, such as 'labels.txt'",
    f"export {{files}}/model.keras {INT8} {{files}}/damaged --normalize 0 1 -o {{new}}/x.tflite":
        "'{files}/damaged/2.png' cannot be decoded",
    f"export {{files}}/model.keras {INT8} digits --limit 9 -o {{new}}/x.tflite":
        "--limit is for a folder of images. Received: digits",
    "verify {files}/model.keras {files}/se.tflite --images digits --normalize 0 1":
        "--normalize is for a folder of images. Received: digits",
    "verify {files}/model.keras {files}/se.tflite --normalize 0 1": "--normalize is for a folder .+ no --images",
    "verify {files}/model.keras {files}/se.tflite --limit 9": "--limit is for a folder of images. .+ no --images",
    "verify {files}/model.keras {new}/x.tflite": "There is no LiteRT file '{new}/x.tflite'",
    "evaluate {files}/text.tflite": "'{files}/text.tflite' is not a LiteRT file",
    "evaluate {files}/truncated.tflite": "'{files}/truncated.tflite': ",
    "verify {files}/model.keras {new}/x": "There is no file or folder '{new}/x'",
    "verify {files}/model.keras {files}/text.npy": "a .keras file, a .tflite file or a SavedModel's folder. Received: ",
    "verify {files}/model.keras {files}/nothing": "There is no SavedModel in '{files}/nothing'",
    "verify {files}/truncated.keras {files}/se.tflite": "'{files}/truncated.keras' is not a Keras model",
    "verify {files}/model.keras {files}/truncated.tflite": "{files}/truncated.tflite",
    "verify {files}/model.keras {files}/larger.tflite":
        r"take the same images. Received: {files}/model.keras of \(8, 8, 1\) and .* of \(12, 12, 1\)",
    "verify {files}/model.keras {files}/se.tflite --layers": "--layers is for two .keras files. Received: ",
    "verify {files}/model.keras {files}/se.tflite --images {files}/nan.npy": "Verification images must be finite",
    "verify {files}/model.keras {files}/se.tflite --images {files}/larger.npy":
        r"Verification images must be \(8, 8, 1\). Received: \(5, 9, 9, 1\)",
    "export {files}/model.keras --labels {new}/x.txt -o {new}/x.tflite": "There is no file of labels '{new}/x.txt'",
    "export {files}/model.keras --labels {files}/images.npy -o {new}/x.tflite": "is not a text file of labels",
    "export {files}/model.keras --labels {files}/text.npy -o {new}/x.tflite": "10 classes. Received: 1 label",
    "export {files}/model.keras --normalize 0 0 -o {new}/x.tflite": "normalization must be .* std above zero",
    "export {files}/model.keras --normalize 0,0 1,1 -o {new}/x.tflite": "one for each of 1 channels",
    "export {files}/run/model.keras --override -o {new}/x.tflite": "--override is for --labels and --normalize",
    "verify {files}/model.keras {files}/se.tflite --override": "--override is for --normalize",
    "export {files}/model.keras --normalize 0 255 -o {new}/served": "both of them. Received: normalization alone",
    "export {files}/model.keras --labels {files}/text.npy --normalize 0 255 -o {new}/served":
        "10 classes. Received: 1 label",
    "export {files}/model.keras --labels {new}/x.txt --normalize 0 255 -o {new}/served":
        "There is no file of labels '{new}/x.txt'",
    "serve-check --manifest {files}/nothing": "There is no SavedModel in '{files}/nothing'",
    "serve-config {new}/x": "There is no folder of models '{new}/x'",
    "serve-config {files}": "has MODEL/VERSION/saved_model.pb in it. Received: '{files}' without",
    "benchmark-serving --network resnet50": "resnet50 is a baseline",
    "inspect {new}/x.tflite": "no LiteRT file '{new}/x.tflite'",
    "inspect {files}/folder.tflite": "no LiteRT file '{files}/folder.tflite'",
    "inspect {files}/text.tflite": "'{files}/text.tflite' is not a LiteRT file",
    "inspect {files}/truncated.tflite": "'{files}/truncated.tflite'",
    "inspect {files}/flipped.tflite": "'{files}/flipped.tflite' .*SHA-256 is not its manifest's",
    "benchmark --network resnet50": "resnet50 is a baseline: name a network with squeeze-and-excitation",
    "benchmark --network se_resnet51": "There is no network 'se_resnet51' among the",
    "benchmark --site 5x5": "site must be one of .* Received: site='5x5'",
    f"{BENCHMARK} --stages 7": "has the stages .* Received: ",
    f"{BENCHMARK} --size 3": r"at least 4\..*\(3, 3, 1\)",
    "benchmark --files {files}/plain.tflite {new}/x.tflite": "no LiteRT file '{new}/x.tflite'",
    "benchmark --files {files}/truncated.tflite {files}/se.tflite": "{files}/truncated.tflite",
    "benchmark --files {files}/plain.tflite {files}/text.tflite": "'{files}/text.tflite' is not a LiteRT file",
    "benchmark --files {files}/plain.tflite {files}/flipped.tflite": "'{files}/flipped.tflite' .*SHA-256",
    "benchmark --files {files}/plain.tflite {files}/larger.tflite":
        r"same input. Received: \(1, 8, 8, 1\) and \(1, 12, 12, 1\)",
}  # fmt: skip


@pytest.mark.parametrize("command, message", REFUSALS.items(), ids=REFUSALS)
def test_bad_input_is_refused_in_one_line_with_nothing_written(cli, files, tmp_path, command, message):
    before = {name: sha256(files / name) for name in written(files)}
    message = message.replace("{files}", re.escape(str(files))).replace("{new}", re.escape(str(tmp_path)))
    result = cli(*(argument.format(files=files, new=tmp_path) for argument in shlex.split(command)))
    assert (result.status, result.out) == (2, "")
    # The lines of progress that may precede it are not in `err`.
    assert re.fullmatch(r"se-keras: error: .+\n", result.err), result.err
    assert re.search(message, result.err), result.err
    assert written(tmp_path) == []
    assert {name: sha256(files / name) for name in written(files)} == before


@pytest.mark.parametrize(
    "arguments, message",
    {
        "--form lowred": "variant must be .*'lowered'.* Received: .*lowred",
        "--precision int4": "precision must be .*'int8'.* Received: .*int4",
    }.items(),
)
def test_benchmark_refuses_before_it_exports(cli, arguments, message):
    result = cli(*shlex.split(BENCHMARK), *shlex.split(arguments))
    assert (result.status, result.out) == (2, "")
    assert re.fullmatch(r"se-keras: error: .+\n", result.err) and re.search(message, result.err), result.err
    # The exports of SE-ResNet-50 take a minute.
    assert result.progress == []


@contextlib.contextmanager
def full_at_fsync(number):
    """The disk is full at call `number` of os.fsync."""
    original, calls = os.fsync, 0

    def fsync(descriptor):
        nonlocal calls
        calls += 1
        if calls == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield


@contextlib.contextmanager
def full_at_half_a_file():
    write_bytes = Path.write_bytes

    def half(path, content):
        write_bytes(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        yield


FULL = "se-keras: error: [Errno 28] No space left on device"


@pytest.mark.slow
@pytest.mark.parametrize("full", [lambda: full_at_fsync(1), full_at_half_a_file], ids=["fsync", "write"])
@pytest.mark.parametrize("output", ["digits.tflite", "served"])
def test_full_disk_leaves_nothing_of_an_export(cli, files, tmp_path, converted, full, output):
    with full():
        result = cli("export", files / "model.keras", "-o", tmp_path / output)
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith(FULL) and result.err.count("\n") == 1
    assert written(tmp_path) == []


def test_full_disk_at_the_manifest_leaves_no_litert_file_without_one(cli, files, tmp_path, converted):
    with full_at_fsync(2):  # the file's own, then the manifest's
        result = cli("export", files / "model.keras", "-o", tmp_path / "digits.tflite")
    assert (result.status, result.out, result.err) == (2, "", f"{FULL}\n")
    assert written(tmp_path) == []


def test_full_disk_at_the_manifest_leaves_the_export_that_was_there(cli, files, tmp_path, converted):
    load_litert(files / "plain.tflite").save(tmp_path / "digits.tflite")
    with full_at_fsync(2):
        result = cli("export", files / "model.keras", "-o", tmp_path / "digits.tflite")
    assert (result.status, result.err) == (2, f"{FULL}\n")
    # `load` refuses a file that is not its manifest's.
    assert load_litert(tmp_path / "digits.tflite").manifest["network"] == "plain"


def test_quickstart_refuses_a_folder_that_cannot_be_written_before_it_trains(cli, tmp_path):
    (tmp_path / "file").touch()
    result = cli("quickstart", "-o", tmp_path / "file")
    assert (result.status, result.out, result.progress) == (2, "", [])
    assert re.fullmatch(rf"se-keras: error: .+{re.escape(str(tmp_path / 'file'))}.*\n", result.err)


# What is the process's


def command_that(does, monkeypatch):
    """Puts `does()` in place of `se-keras list`."""
    monkeypatch.setattr(se_keras_cli.networks, "list_networks", lambda options, console: does())


def test_error_of_the_program_itself_is_not_swallowed(cli, monkeypatch):
    def fails():
        raise RuntimeError("a bug")

    command_that(fails, monkeypatch)
    with pytest.raises(RuntimeError, match="a bug"):
        cli("list")


def test_installed_command_shows_the_traceback_of_an_error_of_the_program_itself():
    script = "import se_keras_cli\ndef fails(options, console): raise RuntimeError('a bug')\n"
    script += "se_keras_cli.networks.list_networks = fails\nse_keras_cli.main(['list'])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "Traceback" in result.stderr and result.stderr.endswith("RuntimeError: a bug\n")


def test_traceback_of_a_refusal_is_shown_on_demand(cli):
    with pytest.raises(ValueError, match="There is no network"):
        cli("show", "se_resnet51", "--traceback")


@pytest.mark.parametrize(
    "error, shown",
    [(None, False), (ValueError("told"), False), (KeyboardInterrupt(), False), (RuntimeError("a bug"), True)],
    ids=["success", "refusal", "interruption", "bug"],
)
def test_notes_of_native_code_are_shown_with_a_bug_alone(cli, capfd, monkeypatch, error, shown):
    def notes():
        os.write(2, b"a note of native code\n")
        if error:
            raise error

    command_that(notes, monkeypatch)
    if isinstance(error, RuntimeError):
        with pytest.raises(RuntimeError):
            cli("list")
        err = capfd.readouterr().err
    else:
        err = cli("list").err
    assert ("a note of native code" in err) == shown


@pytest.mark.parametrize("error", [None, ValueError("told"), KeyboardInterrupt()], ids=repr)
def test_stderr_is_as_before_once_the_command_has_ended(cli, capfd, monkeypatch, error):
    def does():
        if error:
            raise error

    command_that(does, monkeypatch)
    before = sys.stderr
    cli("list")
    assert sys.stderr is before
    os.write(2, b"a later note\n")
    print("a later line", file=sys.stderr, flush=True)
    assert capfd.readouterr().err == "a later note\na later line\n"


def test_interruption_names_a_path_with_brackets_as_it_is(cli, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt("runs[b]/model.keras holds epoch 1 of 2")

    command_that(interrupted, monkeypatch)
    assert cli("list").err == "se-keras: interrupted. runs[b]/model.keras holds epoch 1 of 2\n"


def test_warning_of_se_keras_is_one_line_as_it_is(cli, monkeypatch):
    command_that(lambda: warnings.warn_explicit("runs[b] is odd", UserWarning, "x.py", 1, "se_keras.x"), monkeypatch)
    result = cli("list")
    assert (result.status, result.err) == (0, "se-keras: warning: runs[b] is odd\n")


def test_warning_of_a_library_is_not_shown(cli, monkeypatch):
    command_that(lambda: warnings.warn_explicit("is deprecated", DeprecationWarning, "x.py", 1, "keras.x"), monkeypatch)
    assert cli("list").err == ""
