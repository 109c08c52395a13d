"""The programs of examples/ run as they stand, and do what they say."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from se_keras.export import to_litert
from se_keras.export.benchmark.arm import fetch
from se_keras.export.litert.conversion import PRECISIONS
from se_keras.training.data import digits
from se_keras.training.distribution import Cluster, cluster_from_environment
from se_keras.training.stopping import EXIT_SAVED

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"
TRAINED, NEW = range(5), range(5, 10)  # digits: what the trunk learned from, and what it is tuned to


def run(name, *arguments, folder):
    """What an example prints, as a user calls it, in a folder of its own."""
    command = [sys.executable, EXAMPLES / name, *map(str, arguments)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def numbers(text):
    """The decimal numbers in a text, in order."""
    return [float(number) for number in re.findall(r"\d+\.\d+", text)]


def load(name):
    """An example as a module."""
    specification = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_every_example_is_run_here():
    called = re.findall(r'^ +.*run\("(\w+\.py)"', Path(__file__).read_text(), re.MULTILINE)
    # These fetch a Python of their own, for MediaPipe, or time what is not installed here: docs/ has what they printed.
    elsewhere = {"mediapipe_check.py", "compare_runtimes.py"}
    assert set(called) | elsewhere == {path.name for path in EXAMPLES.glob("*.py")}


def test_graph_of_ones_own_is_trained_and_exported(tmp_path):
    printed = run("user_graph.py", folder=tmp_path)
    accuracy = float(re.search(r"^test accuracy (\S+)$", printed, re.MULTILINE)[1])
    # Half of what chance leaves: one in ten is right by chance.
    assert accuracy > 0.55
    # The squeeze is behind BatchNorm behind a 1x1 convolution.
    assert "1 of 1 squeeze hoisted, 1 layer folded into others" in printed
    assert {path.name for path in tmp_path.iterdir()} == {"user_graph_int8.tflite", "user_graph_int8.tflite.json"}


def test_four_files_of_a_network_are_compared(tmp_path):
    printed = run("quantization_aware.py", folder=tmp_path).splitlines()[1:]
    figures = {re.split("  +", line)[0]: numbers(line) for line in printed}
    assert len(figures) == 5
    # Of each: accuracy, agreement with float32, and share of zeros, in percent.
    assert figures["int8, quantization-aware"][0] >= figures["int8, post-training"][0]
    assert figures["int8, pruned, quantization-aware"][2] > 74
    assert list(tmp_path.iterdir()) == []


# Fine-tuning.


@pytest.fixture(scope="module")
def fine_tune():
    return load("fine_tune")


@pytest.fixture(scope="module")
def weights(fine_tune, tmp_path_factory):
    """A file of se_resnet11_digits that knows the digits 0 to 4."""
    keras.utils.set_random_seed(0)
    return fine_tune.pretrain(digits(), tmp_path_factory.mktemp("fine_tune") / "trunk.keras")


@pytest.fixture(scope="module")
def phases(fine_tune, weights):
    """Of each phase, the variables of the trunk behind it by their paths, and the accuracy on the held-out digits."""
    keras.utils.set_random_seed(0)
    train, test = (fine_tune.of_classes(split, NEW) for split in (digits().train, digits().test))
    model = fine_tune.with_new_head(weights, len(NEW))
    trunk = model.get_layer(fine_tune.NETWORK)

    def values():
        return {w.path: keras.ops.convert_to_numpy(w).copy() for w in trunk.weights}

    def accuracy():
        return float(np.mean(np.asarray(model.predict(test[0], verbose=0)).argmax(axis=1) == test[1]))

    found = {"before": (values(), accuracy())}
    for name, phase in (("frozen", fine_tune.FROZEN), ("unfrozen", fine_tune.UNFROZEN)):
        fine_tune.learn(model, train, test, **phase)
        found[name] = (values(), accuracy())
    return found


def moved(phases, first, second):
    """The paths of the variables that two moments do not share."""
    before, after = phases[first][0], phases[second][0]
    return {path for path in before if not np.array_equal(before[path], after[path])}


def test_trunk_is_the_files_network(phases, weights):
    saved = keras.saving.load_model(weights)
    expected = [w for layer in saved.layers if layer.name != "predictions" for w in layer.get_weights()]
    for ours, theirs in zip(phases["before"][0].values(), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_digits_of_the_new_head_are_not_the_trunks(fine_tune):
    for classes in (TRAINED, NEW):
        images, labels = fine_tune.of_classes(digits().test, classes)
        originals = digits().test.labels[np.isin(digits().test.labels, classes)]
        assert len(images) == len(labels) and set(labels) == set(range(5))
        np.testing.assert_array_equal(labels + classes.start, originals)


def test_nothing_of_a_frozen_trunk_moves(phases):
    assert moved(phases, "before", "frozen") == set()


def test_head_learns_on_a_frozen_trunk(phases):
    # Half of what chance leaves: one in five is right by chance, with a standard deviation of 0.03 over 180 digits.
    assert phases["before"][1] < 0.6 < phases["frozen"][1]


def test_every_weight_but_those_of_batchnorm_moves_once_unfrozen(phases):
    paths = phases["frozen"][0].keys()
    batchnorm = {path for path in paths if "_bn/" in path}
    assert batchnorm and moved(phases, "frozen", "unfrozen") == paths - batchnorm


def test_accuracy_does_not_collapse_once_unfrozen(phases):
    # Five digits of 180; a rate that is too high for the trunk loses several times that.
    assert phases["unfrozen"][1] > phases["frozen"][1] - 0.03


def test_fine_tuning_prints_the_accuracy_of_both_phases(weights, tmp_path):
    accuracies = numbers(run("fine_tune.py", weights, folder=tmp_path))
    assert len(accuracies) == 2 and all(0.6 < accuracy <= 1 for accuracy in accuracies)
    assert list(tmp_path.iterdir()) == []


# Channel pruning.


def test_rankings_of_channels_are_compared_at_the_same_multiply_adds(tmp_path):
    arguments = ("--seeds", 1, "--shares", 0.5, "--epochs", 1, "--fine-tuning", 1, "--json")
    records = json.loads(run("prune_channels.py", *arguments, folder=tmp_path))
    assert [record["ranking"] for record in records] == ["none", "excitation", "response", "magnitude", "random"]
    assert records[0]["macs"] == 1_061_024 and {record["macs"] for record in records[1:]} == {741_200}
    for record in records:
        # Half of what chance leaves, after two epochs in all: one in ten is right by chance.
        assert record["after"] > 55 and 0 <= record["before"] <= 100
    assert list(tmp_path.iterdir()) == []


# Detection.


def test_retinanet_learns_on_a_pyramid(tmp_path):
    pytest.importorskip("keras_hub", reason="keras-hub is not installed: pip install -e '.[detection]'")
    losses = numbers(run("retinanet.py", folder=tmp_path).splitlines()[-1])
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2]


# Precisions and the catalogue.


def test_every_precision_is_exported_and_agrees(trained_digits, tmp_path):
    printed = run("precisions.py", trained_digits / "model.keras", folder=tmp_path)
    rows = [line.split(" | ") for line in printed.splitlines()[2:]]
    assert [row[0].removeprefix("| ") for row in rows] == [*PRECISIONS, "int8, uint8 in and out", "int8, SE in float32"]
    # Top-1 agreement with Keras: the figures that are promised.
    assert all(float(row[3].rstrip("%")) >= 99 for row in rows)
    assert float(rows[PRECISIONS.index("int16x8")][3].rstrip("%")) >= 99.9 - 100 / 360  # one image


def test_networks_are_exported_one_by_one_and_go_on_where_they_were(tmp_path):
    run("export_catalogue.py", "records.jsonl", "resnet11_d", folder=tmp_path)
    records = (tmp_path / "records.jsonl").read_text()
    run("export_catalogue.py", "records.jsonl", "resnet11_d", folder=tmp_path)
    assert (tmp_path / "records.jsonl").read_text() == records
    table = run("export_catalogue.py", "records.jsonl", "--markdown", folder=tmp_path).splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == ["| resnet11_digits", "| se_resnet11_digits"]


# Arm, without Arm: what the comparison says, and what it says without Debian's tools.


@pytest.fixture(scope="module")
def on_arm():
    return load("on_arm")


@pytest.fixture(scope="module")
def int8_file(on_arm):
    """A small int8 file that ends with logits, and its outputs here for three images."""
    keras.utils.set_random_seed(0)
    images = keras.Input((8, 8, 1), name="images")
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(8, 3, activation="relu")(images))
    model = keras.Model(images, keras.layers.Dense(10, name="dense")(x))
    litert = to_litert(model, precision="int8", calibration=digits().train.images[:20])
    return litert.content, litert.runner()(digits().test.images[:3])["dense"]


def test_int8_outputs_are_whole_steps(on_arm, int8_file):
    content, outputs = int8_file
    in_steps = outputs / on_arm.output_step(content)
    # Float32 has 24 bits, the quotient at most 9 before the point.
    np.testing.assert_allclose(in_steps, np.round(in_steps), atol=1e-4)
    assert np.ptp(in_steps) > 100


@pytest.mark.parametrize(
    ("steps", "verdict"), [(0, "equal"), (1, "within one step"), (-1, "within one step"), (2, "DISAGREES")]
)
def test_int8_may_differ_by_one_step(on_arm, int8_file, steps, verdict):
    content, x86 = int8_file
    arm = x86.copy()
    arm[1, 2] += steps * on_arm.output_step(content)
    found = on_arm.compared("small", "int8", content, "max", x86, arm)
    assert (found.steps, found.verdict) == (abs(steps), verdict)


@pytest.mark.parametrize(
    ("difference", "verdict"), [(0, "equal"), (9e-6, "within 1e-05"), (1.1e-5, "DISAGREES"), (np.nan, "DISAGREES")]
)
def test_float32_may_differ_by_1e_5_of_the_range(on_arm, difference, verdict):
    found = on_arm.Comparison(
        network="any",
        precision="float32",
        bytes=1,
        cpu="max",
        difference=difference,
        steps=None,
        span=None,
    )
    assert found.verdict == verdict and found.agrees == (verdict != "DISAGREES")


def test_missing_tools_are_named_in_one_line(on_arm, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "argv", ["on_arm.py", str(tmp_path / "arm")])
    monkeypatch.setattr(on_arm.platform, "machine", lambda: "x86_64")
    with pytest.raises(SystemExit) as ended:
        on_arm.main()
    assert ended.value.code == 2
    said = "Python for Arm needs Debian's apt-get and dpkg. Missing: apt-get, dpkg, dpkg-deb\n"
    assert capsys.readouterr() == ("", said)
    assert not list(tmp_path.iterdir())


def test_a_trained_network_has_equal_outputs_on_arm(tmp_path):
    if missing := [tool for tool in ("apt-get", "dpkg", "dpkg-deb") if shutil.which(tool) is None]:
        pytest.skip(f"Python for Arm needs {', '.join(missing)}")
    try:
        fetch()
    except OSError as error:
        pytest.skip(f"there is no Python for Arm: {error}")
    printed = run("on_arm.py", "--networks", "se_resnet11_digits", folder=tmp_path).splitlines()
    rows = [re.split("  +", line) for line in printed if line.startswith("se_")]
    verdicts = {(name, precision): row[-1] for name, precision, *row in rows}
    assert verdicts == {("se_resnet11_digits", "float32"): "within 1e-05", ("se_resnet11_digits", "int8"): "equal"}


# An NPU, without one: what is compiled for it.


def test_pair_is_compiled_for_a_snapdragon(tmp_path):
    pytest.importorskip("onnxruntime_qnn", reason="pip install --no-deps onnxruntime-qnn")
    options = ("--network", "se_resnet11_digits", "--output", "compiled", "--json")
    files = json.loads(run("npu.py", *options, folder=tmp_path))["files"]
    assert len(files) == 8 and len(list((tmp_path / "compiled").iterdir())) == 8
    for baseline, network in zip(files[::2], files[1::2], strict=True):
        assert (baseline["network"], network["network"]) == ("resnet11_digits", "se_resnet11_digits")
        for one in (baseline, network):
            assert one["on_npu"] == one["operators"] > 10 and one["on_cpu"] == []
        # Weights are read once: those of SE are the difference.
        assert baseline["read_bytes"] < network["read_bytes"] < network["bytes"] + 2**16


@pytest.mark.parametrize(
    ("arguments", "origin", "error"),
    [
        ((), None, "Compiling for a Snapdragon needs Qualcomm's libraries: pip install --no-deps onnxruntime-qnn"),
        (("--network", "resnet50"), "folder/__init__.py", "resnet50 is a baseline: name a network with squeeze-and-.*"),
        (("--network", "resnet"), "folder/__init__.py", ".*resnet.*"),
        (("--size", "8"), "folder/__init__.py", ".*8.*"),
    ],
)
def test_what_cannot_be_compiled_for_an_npu_is_named_in_one_line(arguments, origin, error, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: origin and SimpleNamespace(origin=origin))
    npu = load("npu")
    monkeypatch.setattr(sys, "argv", ["npu.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        npu.main()
    assert ended.value.code == 2
    assert re.fullmatch(f"{error}\n", capsys.readouterr().err.removeprefix("exporting resnet50 published\n"))


def test_training_script_trains_and_goes_on(tmp_path):
    arguments = ("se_resnet11_digits", "runs/se", "--epochs", 2, "--batch-size", 64)
    first = run("train.py", *arguments, folder=tmp_path)
    assert re.search(r"^epoch 1 of 2: test accuracy \d+\.\d%\nepoch 2 of 2: ", first, re.MULTILINE)
    again = run("train.py", *arguments, folder=tmp_path)
    assert again.splitlines()[-1] == first.splitlines()[-1]
    assert again.count("epoch") == 1  # at once


def test_ray_trains_with_two_workers(tmp_path):
    pytest.importorskip("ray", reason='pip install -e ".[ray]"')
    printed = run("train_on_ray.py", tmp_path / "run", "--epochs", 1, folder=tmp_path)
    assert re.search(r"test accuracy \d+\.\d%, trained by 2 replicas$", printed.strip())


def test_pods_of_the_kubernetes_job_know_each_other(tmp_path, monkeypatch):
    import yaml

    service, job = yaml.safe_load_all((EXAMPLES / "train_on_kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == labels and pod["subdomain"] == service["metadata"]["name"]
    workers = int(next(entry["value"] for entry in container["env"] if entry["name"] == "WORKERS"))
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == workers == 2
    (rule,) = job["spec"]["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [EXIT_SAVED] and rule["onExitCodes"]["containerName"] == container["name"]
    # Its shell runs for real; what it starts tells the variable that it was given, and its arguments.
    (tmp_path / "se-keras").write_text('#!/bin/sh\necho "$TF_CONFIG"\necho "$@"\n')
    (tmp_path / "se-keras").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "WORKERS": str(workers), "INDEX": "1"}
    told = subprocess.run([*container["command"], *container["args"]], env=environment, capture_output=True, text=True)
    config, arguments = told.stdout.splitlines()
    monkeypatch.setenv("TF_CONFIG", config)
    names = tuple(f"{job['metadata']['name']}-{index}.{pod['subdomain']}:2222" for index in range(workers))
    assert cluster_from_environment() == Cluster(workers=names, index=1)
    assert arguments.startswith("train se_resnet50 --data /training/imagenet") and "multi-worker" in arguments
