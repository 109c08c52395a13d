"""The record of a training, run.json, which lies next to the trained model."""

import json
from pathlib import Path

from se_keras.errors import first_line
from se_keras.typing import FilePath, Json

MODEL_FILE, RUN_FILE = "model.keras", "run.json"


def training_of(model_file: FilePath) -> Json | None:
    """How `fit` trained a model file, from the run.json in its folder; None if there is none, ValueError if damaged."""
    run = Path(model_file).with_name(RUN_FILE)
    if Path(model_file).name != MODEL_FILE or not run.is_file():
        return None
    try:
        return json.loads(run.read_text())
    except ValueError as error:
        raise ValueError(f"{str(run)!r} is no record of a run: {first_line(error)}") from None
