"""The whole line on real input: train on the digits, export, check that all agree, measure what SE costs."""

import gc
import time
from functools import partial
from pathlib import Path

import keras
import numpy as np

from se_keras import storage
from se_keras.catalogue import baseline_name, create
from se_keras.environment import environment
from se_keras.export.benchmark.overhead import overheads
from se_keras.export.benchmark.results import PAPER
from se_keras.export.benchmark.targets.host import measure
from se_keras.export.litert.conversion import to_litert
from se_keras.export.serving.savedmodel import to_savedmodel
from se_keras.training import data as datasets
from se_keras.training.loop import MODEL_FILE, fit, training_of
from se_keras.training.recipes import DIGITS

TRAINED = "se_resnet11_digits"
MEASURED = "se_resnet50"
PRECISIONS = ("float32", "int8")


def quickstart(folder, *, recipe=DIGITS, measured=MEASURED, blocks=20, progress=print):
    """Trains a small SE network and its baseline, exports the first, and measures SE's cost on SE-ResNet-50.

    Leaves in `folder`: a run of each network (`model.keras`, `run.json`), `digits.tflite` and `digits_int8.tflite` with
    their manifests, `savedmodel/<version>`, and `report.json` with everything that was found.

    Args:
        folder: Where to; an interrupted training there goes on where it was.
        recipe: A `Recipe` to train with.
        measured: The network whose overhead is measured, at its own input size, with one thread.
        blocks: Of the comparison.
        progress: Called with what is done next, as a string.

    Returns:
        The report, as in `report.json`.

    Raises:
        OSError: If the folder cannot be written.
        ValueError: If an export disagrees with its network, or if operators fall off XNNPACK.
    """
    folder, started = Path(folder), time.monotonic()
    digits = datasets.digits()
    keras.utils.set_random_seed(recipe.seed)
    report = {"schema": 1, "environment": environment(), "training": {}, "exports": {}, "overhead": [], "paper": PAPER}

    for network in (baseline_name(TRAINED), TRAINED):

        def told(now, network=network):
            if now.step == 0:
                accuracy = f", test accuracy {now.figures['val_accuracy'][-1]:.1%}" if now.figures else ""
                progress(f"training {network} on digits: epoch {now.epoch} of {now.epochs}{accuracy}")

        model, figures = fit(create(network, classes=10), recipe, digits, folder / network, progress=told)
        report["training"][network] = {
            "file": f"{network}/{MODEL_FILE}",
            "images": len(digits.train),
            "test_images": len(digits.test),
            "epochs": recipe.epochs,
            "test_accuracy": figures["val_accuracy"][-1],
            "parameters": model.count_params(),
        }

    progress(f"exporting {TRAINED} to LiteRT and to a SavedModel")
    float32 = to_litert(
        model,
        held_out=digits.test.images,
        labels=digits.classes,
        normalization=(0, 255),  # the digits' pixels are in 0..1
        training=training_of(folder / TRAINED / MODEL_FILE),
    )
    int8 = to_litert(
        model, precision="int8", calibration=digits.train.images, held_out=digits.test.images, converted=float32
    )
    float32.save(folder / "digits.tflite")
    int8.save(folder / "digits_int8.tflite")
    served = to_savedmodel(model, folder / "savedmodel", held_out=digits.test.images)
    for file, manifest in {
        "digits.tflite": float32.manifest,
        "digits_int8.tflite": int8.manifest,
        str(served.path.relative_to(folder)): served.manifest,
    }.items():
        report["exports"][file] = {"bytes": _size(folder / file), "agreement": manifest["agreement"]}
    for file, litert in {"digits.tflite": float32, "digits_int8.tflite": int8}.items():
        predicted = litert.runner()(digits.test.images)["probabilities"].argmax(axis=1)
        report["exports"][file]["test_accuracy"] = float(np.mean(predicted == digits.test.labels))

    del model
    gc.collect()
    measuring = partial(measure, blocks=blocks)
    for overhead in overheads(measured, precisions=PRECISIONS, measure=measuring, progress=progress):
        report["overhead"].append(overhead.to_json())
    report["seconds"] = round(time.monotonic() - started, 1)
    storage.write_json(folder / "report.json", report)
    return report


def _size(path):
    return (
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size
    )
