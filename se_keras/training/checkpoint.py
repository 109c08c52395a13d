"""The state of a training in one file, written atomically: any process of the same run can resume from it."""

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import keras
import numpy as np
import safetensors
import safetensors.numpy

from se_keras import storage
from se_keras.errors import first_line
from se_keras.records import parse_json
from se_keras.typing import Array, FilePath, Json

FILE = "checkpoint.safetensors"


class About(TypedDict):
    """The description in a checkpoint, as far as a training reads it."""

    epoch: int
    step: int
    sums: list[float]
    figures: dict[str, list[float]]


def state_of(model: keras.Model, optimizer: keras.Optimizer) -> dict[str, Array]:
    """The values that training changes, by name: weights, seeds, the optimizer's variables and averaged weights.

    Under a strategy with several workers, all workers must call this at the same time.
    """
    return {name: np.asarray(keras.ops.convert_to_numpy(x)) for name, x in _variables(model, optimizer).items()}


def restore(path: FilePath, tensors: Mapping[str, Array], model: keras.Model, optimizer: keras.Optimizer) -> None:
    """Assigns values read from `path` to a model and its optimizer. ValueError, and no change, if they do not fit."""
    variables = _variables(model, optimizer)
    shapes = {name: tuple(variable.shape) for name, variable in variables.items()}
    found = {name: values.shape for name, values in tensors.items()}
    if shapes != found:
        names = sorted(name for name in shapes | found if shapes.get(name) != found.get(name))
        first = "; ".join(f"{x}: {found.get(x, 'none')} instead of {shapes.get(x, 'none')}" for x in names[:3])
        raise ValueError(
            f"{str(path)!r} is of another network or optimizer than {model.name}: {len(names)} values differ, {first}"
        )
    for name, variable in variables.items():
        variable.assign(tensors[name])


def save_checkpoint(path: FilePath, tensors: Mapping[str, Array], about: Json) -> None:
    """Writes a checkpoint atomically: the values of `state_of`, and a description."""
    text = json.dumps(about)
    metadata = {"about": text, "sha256": _checksum(tensors, text)}
    storage.write_bytes(path, safetensors.numpy.save(dict(tensors), metadata=metadata))


def load_checkpoint(path: FilePath) -> tuple[dict[str, Array], Json]:
    """Reads the values and the description of a checkpoint; ValueError if it is damaged, or not of se_keras."""
    with _open(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        metadata = file.metadata() or {}
    if metadata.get("sha256") != _checksum(tensors, metadata.get("about", "")):
        raise ValueError(f"{str(path)!r} is damaged, or not a checkpoint of se_keras: its checksum does not match")
    return tensors, _about(path, metadata)


def position(path: Path) -> tuple[int, int] | None:
    """Finished epochs, and finished steps of the next epoch, from the header; None without a file."""
    if not path.is_file():
        return None
    with _open(path) as file:
        about = _about(path, file.metadata() or {})
    return about["epoch"], about["step"]


def _about(path, metadata):
    return parse_json(metadata.get("about", ""), About, refusal=f"{str(path)!r} is not a checkpoint of se_keras")


@contextlib.contextmanager
def _open(path):
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as a checkpoint: {first_line(error)}") from None


def _variables(model, optimizer):
    """Named by position and kind only, because Keras numbers unnamed layers and optimizers anew in each process."""
    return {
        f"{owner}/{position}/{re.split('[/_]', variable.path)[-1]}": variable
        for owner, variables in (("model", model.variables), ("optimizer", optimizer.variables))
        for position, variable in enumerate(variables)
    }


def _checksum(tensors, about):
    digest = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        digest.update(name.encode() + np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()
