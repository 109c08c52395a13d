"""The record of a training, run.json, which lies next to the trained model."""

from pathlib import Path
from typing import Any, NotRequired, TypedDict

from se_keras.normalization import NormalizationRecord
from se_keras.records import read_json
from se_keras.typing import FilePath, Json

MODEL_FILE, RUN_FILE = "model.keras", "run.json"


class RunRecord(TypedDict):
    """The file run.json, as far as it is read."""

    network: str
    figures: dict[str, list[float]]
    data: NotRequired[str]
    classes: NotRequired[list[str]]
    normalization: NotRequired[NormalizationRecord | None]
    pixels: NotRequired[NormalizationRecord]
    source: NotRequired[str | None]
    recipe: NotRequired[dict[str, Any]]


def training_of(model_file: FilePath) -> Json | None:
    """How `fit` trained a model file, from the run.json in its folder; None if there is none, ValueError if damaged."""
    run = Path(model_file).with_name(RUN_FILE)
    if Path(model_file).name != MODEL_FILE or not run.is_file():
        return None
    return read_json(run, RunRecord, what="the record of a run")
