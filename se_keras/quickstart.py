"""The quick start: train on the digits, export, check that the exports agree, and measure what SE costs."""

import gc
import time
from pathlib import Path

import keras
import numpy as np

from se_keras import storage
from se_keras.catalogue import baseline_name, create
from se_keras.export.benchmark.overhead import pairs
from se_keras.export.benchmark.report import as_html
from se_keras.export.benchmark.results import PAPER
from se_keras.export.benchmark.targets.host import Host
from se_keras.export.litert.conversion import to_litert
from se_keras.export.serving.conversion import to_savedmodel
from se_keras.runs import MODEL_FILE, training_of
from se_keras.training.data import digits
from se_keras.training.loop import fit
from se_keras.training.recipes import DIGITS, Recipe
from se_keras.typing import FilePath, Json, OnMessage
from se_keras.wording import counted

TRAINED = "se_resnet11_digits"
MEASURED = "se_resnet50"
PRECISIONS = ("float32", "int8")


def quickstart(
    folder: FilePath,
    *,
    recipe: Recipe = DIGITS,
    measured: str = MEASURED,
    blocks: int = 20,
    progress: OnMessage = print,
) -> Json:
    """Trains a small SE network and its baseline, exports the network, and measures what SE costs in SE-ResNet-50.

    Args:
        folder: Receives a run of each network (`model.keras`, `run.json`), `digits.tflite` and `digits_int8.tflite`
            with their manifests, `savedmodel/<version>`, `report.json` and the page `report.html`. An unfinished
            training in it is resumed.
        recipe: Recipe of both networks.
        measured: The network whose overhead is measured, at its own input size, with one thread.

    Raises:
        ValueError: If an export does not agree with its network, or if operators are not delegated to XNNPACK.
    """
    folder, started = Path(folder), time.monotonic()
    keras.utils.set_random_seed(recipe.seed)
    host = Host(blocks=blocks)
    report = {"schema": 1, "environment": host.connect(progress), "training": {}, "exports": {}, "overhead": []}
    report["paper"] = PAPER
    for network in (baseline_name(TRAINED), TRAINED):
        model, report["training"][network] = _train(network, recipe, folder, progress)
    progress(f"exporting {TRAINED} to LiteRT and to a SavedModel")
    report["exports"] = _export(model, folder)
    del model
    gc.collect()
    for overhead in host.measure(pairs(measured, precisions=PRECISIONS, progress=progress), progress):
        report["overhead"].append(overhead.to_json())
    report["seconds"] = round(time.monotonic() - started, 1)
    storage.write_json(folder / "report.json", report)
    storage.write_bytes(folder / "report.html", as_html([report]).encode())
    return report


def _train(network, recipe, folder, progress):
    """The trained network, and its entry in the report."""
    data = digits()

    def show(now):
        if now.step == 0:
            accuracy = f", test accuracy {now.figures['val_accuracy'][-1]:.1%}" if now.figures else ""
            progress(f"training {network} on digits: {now.epoch} of {counted(now.epochs, 'epoch')} done{accuracy}")

    model, figures = fit(create(network, classes=10), recipe, data, folder / network, progress=show)
    return model, {
        "file": f"{network}/{MODEL_FILE}",
        "images": len(data.train),
        "test_images": len(data.test),
        "epochs": recipe.epochs,
        "test_accuracy": figures["val_accuracy"][-1],
        "parameters": model.count_params(),
    }


def _export(model, folder):
    """The entries of the exports in the report."""
    data, training = digits(), training_of(folder / TRAINED / MODEL_FILE)
    test, scale = data.test.images, (0, 255)  # the digits' pixels are in 0..1
    float32 = to_litert(model, held_out=test, labels=data.classes, normalization=scale, training=training)
    int8 = to_litert(model, precision="int8", calibration=data.train.images, held_out=test, converted=float32)
    entries = {}
    for name, litert in (("digits.tflite", float32), ("digits_int8.tflite", int8)):
        litert.save(folder / name)
        predicted = litert.runner()(test)["probabilities"].argmax(axis=1)
        entries[name] = {
            "bytes": len(litert.content),
            "agreement": litert.manifest["agreement"],
            "test_accuracy": float(np.mean(predicted == data.test.labels)),
        }
    served = to_savedmodel(model, folder / "savedmodel", held_out=test)
    size = sum(file.stat().st_size for file in served.path.rglob("*") if file.is_file())
    name = str(served.path.relative_to(folder))
    return entries | {name: {"bytes": size, "agreement": served.manifest["agreement"]}}
