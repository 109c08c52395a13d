"""Every reader of files, on 200 damaged files of each kind: it reads them or refuses them, in bounded time and memory.

They are read in child processes, by the command where a command reads them: no signal, no traceback, no time-out.
"""

import functools
import io
import json
import os
import shutil
import tempfile
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
from campaign import MUTATIONS, mutated, run_campaign

pytestmark = [pytest.mark.sweep, pytest.mark.xdist_group("campaign")]
FOLDER = "SE_KERAS_TEST_FOLDER"  # where the readers find the good files


def command(*arguments):
    """Runs the command in this process; what it refuses in one line is a ValueError, and its traceback is a fault."""
    from se_keras_cli import main

    if status := main(list(map(str, arguments))):
        raise ValueError(f"status {status}")


def good(name):
    return Path(os.environ[FOLDER], name)


# Damage behind checksums, which damage of the bytes alone does not get past


def in_archive(content, number, rng):
    """A zip archive of which one file is damaged, with right checksums; every other one is damaged as bytes are."""
    if number % 2:
        return mutated(content, number, rng)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    name = list(files)[rng.integers(len(files))]
    change = changed_json if name.endswith(".json") else mutated
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for each, text in files.items():
            archive.writestr(each, change(text, number // 2, rng) if each == name else text)
    return file.getvalue()


VALUES = (None, True, -1, 0, 10**30, 1e308, float("nan"), "", "x" * 99, [], {}, [[]], {"x": 1}, [None] * 9)


def changed_json(content, number, rng):
    """JSON of another shape: a value is replaced or left out; every other one is damaged as bytes are."""
    if number % 2:
        return mutated(content, number, rng)
    value = json.loads(content)
    if number % 40 == 0:
        return b'{"a":' * 100_000
    places, level = [], [value]
    while level:
        places += [(x, key) for x in level for key in (x if isinstance(x, dict) else range(len(x)))]
        level = [x for y in level for x in (y.values() if isinstance(y, dict) else y) if isinstance(x, (dict, list))]
    holder, key = places[rng.integers(len(places))]
    if rng.random() < 0.2:
        del holder[key]
    else:
        holder[key] = VALUES[rng.integers(len(VALUES))]
    return json.dumps(value).encode()


def in_metadata(content, number, rng):
    """A .tflite file whose metadata are damaged, and whose model is not."""
    start = content.index(b"M001") - 4 if number % 2 else content.rindex(b"PK\3\4")
    end = start + 600
    return content[:start] + mutated(content[start:end], number, rng)[: end - start] + content[end:]


# Readers


def read_tflite(path):
    command("inspect", path)
    command("verify", path, path)


def read_keras(path):
    command("verify", path, path)


@functools.cache
def layers():
    return keras.saving.load_model(good("model.keras")).layers


def read_h5(path):
    from se_keras.weights import load_weights

    load_weights(layers(), path)


def read_state_dict(path):
    from se_keras.weights import read_state_dict

    read_state_dict(path)


def read_checkpoint(path):
    from se_keras.training import checkpoint

    checkpoint.position(path)
    checkpoint.load_checkpoint(path)


def read_shard(path):
    """As an evaluation reads it; the index has the size of the damaged shard, as if it had been written so."""
    from se_keras.evaluation import _read
    from se_keras.training import shards
    from se_keras.training.data import EpochOrder, SkippedFiles

    with tempfile.TemporaryDirectory() as folder:
        index = json.loads(good("shards/index.json").read_text())
        for entries in index["splits"].values():
            for entry in entries:
                shutil.copy(path, Path(folder, entry["file"]))
                entry["bytes"] = path.stat().st_size
        Path(folder, "index.json").write_text(json.dumps(index))
        data, skipped = shards.read(folder), SkippedFiles(100)
        list(_read(data.test.examples(EpochOrder(batch=2)).as_numpy_iterator(), data.test, skipped))


def in_copy(path, source, name):
    """A copy of a folder of good files with the damaged one in it."""
    folder = tempfile.TemporaryDirectory()
    shutil.copytree(good(source), folder.name, dirs_exist_ok=True)
    shutil.copy(path, Path(folder.name, name))
    return folder


def read_run(path):
    from se_keras.runs import training_of

    with in_copy(path, "run", "run.json") as folder:
        training_of(Path(folder, "model.keras"))
        command("curves", folder, "-o", Path(folder, "curves.svg"))


def read_index(path):
    from se_keras.training import shards

    with in_copy(path, "shards", "index.json") as folder:
        data = shards.read(folder, check=True)
        list(data.test.read(np.arange(data.test.files)))


def read_file_manifest(path):
    with in_copy(path, "file", "small.tflite.json") as folder:
        command("inspect", Path(folder, "small.tflite"))


def read_folder_manifest(path):
    from se_keras.export.serving.savedmodel import load_savedmodel

    with in_copy(path, "served", "1/assets.extra/manifest.json") as folder:
        load_savedmodel(folder)


def read_results(path):
    command("report", path, "--markdown")
    command("report", path, "-o", path.with_suffix(".html"))


def read_answer(path):
    """The answers of a server: of its state, and of its signatures."""
    from se_keras.export.serving import client
    from se_keras.records import parse_json

    content = path.read_bytes()
    client._metadata(parse_json(content, client.Status | dict, refusal="x"))


JSON_FILES = {
    read_run: "run/run.json",
    read_index: "shards/index.json",
    read_file_manifest: "file/small.tflite.json",
    read_folder_manifest: "served/1/assets.extra/manifest.json",
    read_results: "results.json",
    read_answer: "answer.json",
}


def read_json_file(path):
    """The kinds in turn: the campaign makes four damaged files of each seed."""
    name = path.stem.removeprefix("seed")
    number = int(name) if name != path.stem else int(name) // 4 % len(JSON_FILES)
    list(JSON_FILES)[number](path)


# The campaigns


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of good files of each kind."""
    from se_keras.export import to_litert, to_savedmodel
    from se_keras.export.litert.metadata import detach
    from se_keras.training import checkpoint, shards
    from se_keras.training.data import folder as folder_of

    root, old = tmp_path_factory.mktemp("good"), Path(__file__).parent / "golden" / "from_0_1"
    keras.utils.set_random_seed(0)
    images = keras.Input((8, 8, 3), name="images")
    x = keras.layers.BatchNormalization()(keras.layers.Conv2D(4, 3, name="conv1")(images))
    x = keras.layers.Dense(2, activation="softmax")(keras.layers.GlobalAveragePooling2D()(x))
    model = keras.Model(images, x, name="small")
    model.save(root / "model.keras")
    model.save_weights(root / "model.weights.h5")
    described = to_litert(model, labels=["ant", "bee"], normalization=(127.5, 127.5))
    (root / "file").mkdir()
    described.save(root / "file" / "small.tflite")
    (root / "plain.tflite").write_bytes(detach(described.content))
    to_savedmodel(model, root / "served", labels=["ant", "bee"], normalization=(127.5, 127.5))
    for name in ("train/ant/1.png", "train/bee/1.png", "val/ant/1.png", "val/bee/1.png"):
        (root / "pictures" / name).parent.mkdir(parents=True)
        keras.utils.save_img(root / "pictures" / name, np.full((8, 8, 3), len(name) * 9, "uint8"), scale=False)
    shards.pack(folder_of(root / "pictures"), root / "shards", shards=1)
    shutil.copytree(old / "run", root / "run")
    shutil.copy(old / "results.json", root / "results.json")
    state = {"conv1.weight": np.ones((4, 3, 3, 3), "float32"), "bn1.bias": np.zeros(4, "float32")}
    about = {"epoch": 1, "step": 0, "sums": [0.0, 0.0, 0.0], "figures": {"loss": [0.5]}}
    checkpoint.save_checkpoint(root / "checkpoint.safetensors", state, about)
    tensor = {"dtype": "DT_FLOAT", "tensor_shape": {"dim": [{"size": "-1"}, {"size": "10"}]}}
    signatures = {"serving_default": {"inputs": {"images": tensor}, "outputs": {"probabilities": tensor}}}
    answer = {"model_spec": {"version": "1"}, "metadata": {"signature_def": {"signature_def": signatures}}}
    states = [{"state": "AVAILABLE", "status": {"error_message": ""}}]
    (root / "answer.json").write_text(json.dumps(answer | {"model_version_status": states}))
    try:
        import torch
    except ImportError:
        return root
    tensors = {name: torch.from_numpy(x) for name, x in state.items()}
    torch.save({"state_dict": tensors}, root / "model.pth")
    torch.save(tensors, root / "old.pth", _use_new_zipfile_serialization=False)
    return root


def require_none(found):
    assert found.faults == [], "\n".join(found.faults)


@pytest.mark.parametrize(
    "kind, names, read, suffix, mutate",
    [
        ("tflite", ["plain.tflite", "file/small.tflite"], read_tflite, ".tflite", mutated),
        ("metadata", ["file/small.tflite"], read_tflite, ".tflite", in_metadata),
        ("keras", ["model.keras"], read_keras, ".keras", in_archive),
        ("h5", ["model.weights.h5"], read_h5, ".weights.h5", mutated),
        ("safetensors", ["checkpoint.safetensors"], read_state_dict, ".safetensors", mutated),
        ("checkpoint", ["checkpoint.safetensors"], read_checkpoint, ".safetensors", mutated),
        ("pth", ["model.pth"], read_state_dict, ".pth", in_archive),
        ("old pth", ["old.pth"], read_state_dict, ".pth", mutated),
        ("TFRecord", ["shards/test-00000-of-00001.tfrecord"], read_shard, ".tfrecord", mutated),
    ],
    ids=lambda x: x if isinstance(x, str) and not x.startswith(".") else "",
)
def test_damaged_files_are_read_or_refused(files, kind, names, read, suffix, mutate, monkeypatch):
    if not all((files / name).is_file() for name in names):
        pytest.skip("only torch writes its files")
    monkeypatch.setenv(FOLDER, str(files))
    seeds = [(files / name).read_bytes() for name in names]
    require_none(run_campaign(kind, seeds, read, suffix=suffix, mutate=mutate, seconds=60))


def test_damaged_json_is_read_or_refused(files, monkeypatch):
    monkeypatch.setenv(FOLDER, str(files))
    seeds = [(files / name).read_bytes() for name in JSON_FILES.values()]
    count = MUTATIONS * len(seeds)
    require_none(run_campaign("JSON", seeds, read_json_file, suffix=".json", mutate=changed_json, count=count))
