"""An export that is killed at any moment leaves no partial file, and no manifest of another file."""

import json
import subprocess
import sys

import pytest

from se_keras.export.litert.file import load_litert
from se_keras.export.serving import savedmodel

pytestmark = pytest.mark.slow

KILLS = 20
# One process forks another for each kill, so that TensorFlow is imported once. The child exports, and then saves two
# versions over each other again and again. That takes most of its time, so that most kills interrupt a write.
SCRIPT = """
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

random.seed(0)
for number in range(int(sys.argv[2])):
    folder = f"{sys.argv[1]}/{number}"
    os.mkdir(folder)
    child = os.fork()
    if not child:
        export(folder)
    # Every fourth child is killed at any moment, the others when they have begun to save.
    while number % 4 and not os.path.exists(f"{folder}/ready"):
        time.sleep(0.01)
    time.sleep(random.uniform(0, 2 if number % 4 == 0 else 0.2))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The files that each killed export left."""
    folder = tmp_path_factory.mktemp("killed")
    subprocess.run([sys.executable, "-c", SCRIPT, str(folder), str(KILLS)], check=True, capture_output=True)
    return [folder / str(number) for number in range(KILLS)]


@pytest.mark.parametrize("number", range(KILLS))
def test_what_a_killed_export_left_is_whole_or_absent(number, folders):
    target = folders[number] / "model.tflite"
    if target.exists():
        assert load_litert(target).manifest["network"] in ("version0", "version1")  # checks its SHA-256
        assert load_litert(target).runner().input_shape == (1, 8, 8, 3)
    else:
        assert not target.with_name("model.tflite.json").exists()
    served = folders[number] / "served"
    versions = [path for path in served.iterdir() if path.name.isdecimal()] if served.exists() else []
    for version in versions:  # which TF Serving would load
        savedmodel.load_savedmodel(version)


def test_most_kills_met_an_export_that_had_begun_to_write(folders):
    assert sum((folder / "model.tflite").exists() for folder in folders) >= KILLS / 2


def test_what_is_left_behind_has_a_name_that_is_nobodys(folders):
    expected = {"model.tflite", "model.tflite.json", "ready", "served"}
    left = {path.name for folder in folders for path in folder.iterdir()} - expected
    assert all(name.startswith(".") and ".partial-" in name for name in left)


def test_manifest_beside_a_file_is_its_own(folders):
    for folder in folders:
        manifest = folder / "model.tflite.json"
        if manifest.exists():
            network = json.loads(manifest.read_text())["network"]
            assert network.encode() in (folder / "model.tflite").read_bytes()
