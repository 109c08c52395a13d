"""All that a training is, in one file: whole or absent, and the same whoever reads it on."""

import contextlib
import hashlib
import json
import re

import keras
import numpy as np
import safetensors
import safetensors.numpy

from se_keras import storage
from se_keras.errors import first_line

FILE = "checkpoint.safetensors"


def state_of(model, optimizer):
    """The values that training changes, by name: weights, states of random numbers, the optimizer's and its averages.

    Where a strategy has several workers, each of them must ask at the same time.
    """
    return {name: keras.ops.convert_to_numpy(variable) for name, variable in _variables(model, optimizer).items()}


def restore(path, tensors, model, optimizer):
    """Gives a model and its built optimizer the values that `load_checkpoint` has read from `path`.

    Raises:
        ValueError: If they are of another network or optimizer; then nothing was changed.
    """
    variables = _variables(model, optimizer)
    shapes = {name: tuple(variable.shape) for name, variable in variables.items()}
    found = {name: values.shape for name, values in tensors.items()}
    if shapes != found:
        names = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
        told = "; ".join(f"{name}: {found.get(name, 'none')} beside {shapes.get(name, 'none')}" for name in names[:3])
        raise ValueError(
            f"{str(path)!r} is of another network or optimizer than {model.name}: {len(names)} values differ, {told}"
        )
    for name, variable in variables.items():
        variable.assign(tensors[name])


def save_checkpoint(path, tensors, about):
    """Writes a checkpoint whole or not at all: the values of `state_of`, and `about`, a dict for JSON."""
    about = json.dumps(about)
    metadata = {"about": about, "sha256": _sha256(tensors, about)}
    storage.write_bytes(path, safetensors.numpy.save(tensors, metadata=metadata))


def load_checkpoint(path):
    """Reads a checkpoint: the values, and what it says of itself.

    Raises:
        ValueError: If it is damaged, or none of this project's.
    """
    with _open(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        metadata = file.metadata() or {}
    if metadata.get("sha256") != _sha256(tensors, metadata.get("about", "")):
        raise ValueError(f"{str(path)!r} is damaged, or no checkpoint of se_keras: its checksum is another")
    return tensors, json.loads(metadata["about"])


def position(path):
    """Epochs that are done, and steps of the next, by the head of a checkpoint; None where there is none."""
    if not path.is_file():
        return None
    with _open(path) as file:
        about = json.loads(file.metadata()["about"])
    return about["epoch"], about["step"]


@contextlib.contextmanager
def _open(path):
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{str(path)!r} is no checkpoint that can be read: {first_line(error)}") from None


def _variables(model, optimizer):
    """By place and kind alone: Keras numbers what has no name, layers and optimizers, as they come in a process."""
    return {
        f"{owner}/{place}/{re.split('[/_]', variable.path)[-1]}": variable
        for owner, variables in (("model", model.variables), ("optimizer", optimizer.variables))
        for place, variable in enumerate(variables)
    }


def _sha256(tensors, about):
    digest = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        digest.update(name.encode() + np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()
