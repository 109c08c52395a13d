"""Exports that are killed at any moment, or that race for one name: a reader sees one whole file or the other."""

import json
import subprocess
import sys

import pytest

from se_keras.export.litert.file import LiteRTModel, load_litert
from se_keras.export.serving import savedmodel

pytestmark = pytest.mark.sweep

KILLS, PAIRS, SEED = 30, 100, 1709
# One process forks another for each kill, so that TensorFlow is imported once. The child exports, and then saves two
# versions over each other again and again. That takes most of its time, so that most kills interrupt a write.
KILL = """
import os, random, signal, sys, time
import keras
from se_keras.export import to_litert, to_savedmodel

def export(folder):
    images = keras.Input((8, 8, 3), name="images")
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(256, 7, activation="relu")(images))
    versions = []
    for seed in range(2):
        keras.utils.set_random_seed(seed)
        model = keras.Model(images, keras.layers.Dense(2000)(x), name=f"version{seed}")
        model.set_weights([w + seed for w in model.get_weights()])
        to_litert(model).save(f"{folder}/model.tflite")
        versions.append(to_litert(model))
    open(f"{folder}/ready", "w").close()
    while True:
        for version in versions:
            version.save(f"{folder}/model.tflite")
        to_savedmodel(model, f"{folder}/served")

random.seed(int(sys.argv[3]))
for number in range(int(sys.argv[2])):
    folder = f"{sys.argv[1]}/{number}"
    os.mkdir(folder)
    child = os.fork()
    if not child:
        export(folder)
    # Every fourth child is killed at any moment, the others when they have begun to save.
    while number % 4 and not os.path.exists(f"{folder}/ready"):
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.2 if number % 2 else 3))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folders of the killed exports."""
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-c", KILL, str(folder), str(KILLS), str(SEED)]
    subprocess.run(command, check=True, capture_output=True)
    return [folder / str(number) for number in range(KILLS)]


def versions_in(served):
    """The folders that TF Serving would load."""
    return [path for path in served.iterdir() if path.name.isdecimal()] if served.exists() else []


def test_what_killed_exports_left_is_whole_or_absent(folders):
    files = [folder / "model.tflite" for folder in folders if (folder / "model.tflite").exists()]
    for file in files:
        model = load_litert(file)  # checks its SHA-256
        assert model.manifest["network"] in ("version0", "version1")
        assert model.manifest["network"].encode() in model.content and "sha256" in model.manifest
        assert model.runner().input_shape == (1, 8, 8, 3)
    served = [version for folder in folders for version in versions_in(folder / "served")]
    for version in served:
        savedmodel.load_savedmodel(version)
    left = {path.name for folder in folders for path in (*folder.iterdir(), *folder.glob("served/.*"))}
    left -= {"model.tflite", "model.tflite.json", "ready", "served"}
    assert all(name.startswith(".") and (".partial-" in name or name == ".model.tflite.lock") for name in left)
    print(f"{KILLS} kills: {len(files)} LiteRT files, {len(served)} SavedModels; unfinished: {sorted(left)}")
    assert len(files) >= KILLS / 2  # most kills met an export that had begun to write


def test_next_export_removes_what_a_killed_one_left(folders):
    for folder in folders:
        LiteRTModel(content=b"\0\0\0\0TFL3", manifest={}).save(folder / "model.tflite")
        if (folder / "served").exists():
            with savedmodel.storage.staged(folder / "served" / "1000000") as path:
                path.mkdir()
        assert {path.name for path in folder.iterdir()} <= {"model.tflite", "model.tflite.json", "ready", "served"}
        assert not [*folder.glob("served/.*")]


# Two processes save to one name at the same time, while the parent reads. Nothing is converted: the files are bytes.
RACE = """
import hashlib, json, os, random, sys, time
from se_keras.export.litert.file import LiteRTModel, load_litert

def version(name, size):
    content = b"\\0\\0\\0\\0TFL3" + name.encode() * size
    manifest = {"network": name, "precision": "float32", "sha256": hashlib.sha256(content).hexdigest()}
    return LiteRTModel(content=content, manifest=manifest)

random.seed(int(sys.argv[3]))
reads, absent, ends = {"a": 0, "b": 0, "old": 0}, 0, {"a": 0, "b": 0}
for number in range(int(sys.argv[2])):
    path, children = f"{sys.argv[1]}/{number}.tflite", []
    versions = {name: version(name, random.choice((10, 10**6))) for name in ("a", "b")}
    if number % 2:
        versions["old"] = version("old", 10)
        versions["old"].save(path)
    start = time.time() + 0.01
    for name in ("a", "b"):
        wait = random.uniform(0, 0.002)
        if not (child := os.fork()):
            while time.time() < start + wait:
                pass
            for _ in range(3):
                versions[name].save(path)
            os._exit(0)
        children.append(child)
    while children:
        for child in children[:]:
            pid, status = os.waitpid(child, os.WNOHANG)
            assert status == 0, status
            if pid:
                children.remove(child)
        try:
            found = load_litert(path)
        except FileNotFoundError:
            assert number % 2 == 0 and len(children) == 2
            absent += 1
            continue
        assert found == versions[found.manifest["network"]], (number, found.manifest)
        reads[found.manifest["network"]] += 1
    found = load_litert(path)
    assert found == versions[found.manifest["network"]]
    assert json.load(open(path + ".json")) == found.manifest
    ends[found.manifest["network"]] += 1
    assert sorted(os.listdir(sys.argv[1])) == [f"{number}.tflite", f"{number}.tflite.json"]
    os.unlink(path), os.unlink(path + ".json")
print(json.dumps({"reads": reads, "absent": absent, "ends": ends}))
"""


def test_two_saves_to_one_name_end_with_one_of_the_two_and_no_reader_sees_a_mixture(tmp_path):
    command = [sys.executable, "-c", RACE, str(tmp_path), str(PAIRS), str(SEED)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    found = json.loads(process.stdout)
    print(f"{PAIRS} racing pairs: they ended with {found['ends']}; read meanwhile: {found['reads']}")
    assert sum(found["ends"].values()) == PAIRS and min(found["ends"].values()) > 0
    assert min(found["reads"].values()) > 0


TRAIN = """
import sys
from se_keras_cli import main
sys.exit(main(["train", "se_resnet11_digits", "--epochs", "2", "-o", sys.argv[1]]))
"""


def test_one_of_two_trainings_in_a_folder_is_refused_and_the_other_one_ends(tmp_path):
    command = [sys.executable, "-c", TRAIN, str(tmp_path / "run")]
    pair = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ends = sorted((process.communicate(timeout=600), process.returncode) for process in pair)
    ends.sort(key=lambda end: end[1])
    assert [status for _, status in ends] == [0, 2]
    assert "One process at a time writes here" in ends[1][0][1] and "held by process " in ends[1][0][1]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["figures"]["loss"][1:]
    print("2 trainings in one folder: one ended, and one was refused")
