"""Whether two models give the same: any two of a Keras model, a LiteRT file and a SavedModel."""

import os
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np

from se_keras.errors import first_line
from se_keras.graph import calls, functional, gives_probabilities, producer
from se_keras.images import calibration_images

from .litert.file import LiteRTModel, load_litert
from .lowering import lower
from .model import check_images, predict, require_one_input
from .outputs import LEAST_PROBABILITY, Agreement, agreement, in_batches, noise
from .serving.savedmodel import SavedModel, load_savedmodel

_FREE_SIZE = 64  # of noise, where neither side has a size of its own
_LAYER_SAMPLES = 4  # all layers of a large network at once take some 100 MB an image


@dataclass(frozen=True, kw_only=True)
class Verification:
    """How well B follows A.

    Args:
        agreement: Of their outputs.
        layers: `(name, Agreement)` of the layers that should give the same, in A's order and by A's names, on the first
            images; empty unless both are Keras models.
    """

    agreement: Agreement
    layers: tuple[tuple[str, Agreement], ...]

    def first_above(self, tolerance=1e-3):
        """Name of the first layer whose largest error is beyond a share of its range; None if there is none."""
        return next((name for name, result in self.layers if result.max_error > tolerance), None)


@dataclass(frozen=True, kw_only=True, eq=False)
class Runnable:
    """A model of any kind, ready to run.

    Args:
        name: What messages call it.
        run: From images to outputs, `{name: array}`.
        input_shape: Of its input, batch first; None where it is free.
        model: The functional Keras model, if it is one.
        is_quantized: Whether an output is quantized, as those of integer files are.
    """

    name: str
    run: Callable
    input_shape: tuple
    model: keras.Model | None = None
    is_quantized: bool = False


def verify(a, b, inputs=None):
    """Compares the outputs of two models on the same images, and their layers where both are Keras models.

    A model and what `lower` makes of it are compared at each layer that both have, whatever its name there: a
    BatchNormalization beside the convolution that it went into. Single outputs are compared whatever they are called;
    as logits where one is called `probabilities`, unless one is quantized: steps of 1/256 have no logits.

    Args:
        a: A Keras model, a `LiteRTModel`, a `SavedModel`; or a path to a .keras file, a .tflite file or a SavedModel's
            folder (TF Serving's `base_path` stands for its highest version). Errors are shares of its range.
        b: The same: what is judged.
        inputs: Images as the models take them: an array `(samples, height, width, channels)`, an iterable of images or
            batches (a `tf.data.Dataset` too), or a folder, whose pixels stay 0 to 255. Default: noise that the models
            bear.

    Returns:
        A `Verification`.

    Warns:
        UserWarning: If most of A's probabilities are 0: then they hide every difference.

    Raises:
        OSError: If there is no such file or folder.
        ValueError: If a file is damaged or of another kind; if the models do not take the same images; if the images
            have another shape or are not finite; or if the outputs differ in name or shape.
        TypeError: If `a` or `b` is none of these.

    Example:

    ```python
    print(se_keras.export.verify("model.keras", "model.tflite", images).agreement)
    ```
    """
    a, b = runnable(a), runnable(b)
    shape = images_shape(a, b)
    images = _noise_for(a, b, shape) if inputs is None else calibration_images(inputs, shape, what="Verification")
    expected, actual = a.run(images), b.run(images)
    as_logits = len(expected) == len(actual) == 1 and "probabilities" in {*expected, *actual}
    as_logits = as_logits and not (a.is_quantized or b.is_quantized)
    if len(expected) == len(actual) == 1:  # compared whatever they are called
        expected, actual = ({"output": values} for side in (expected, actual) for values in side.values())
    result = agreement(expected, actual, as_logits=as_logits)
    if as_logits and np.mean(expected["output"] < LEAST_PROBABILITY) > 0.5:
        warnings.warn(
            f"Most probabilities of {a.name} are 0, which hides differences: are the images scaled as it takes them?",
            stacklevel=2,
        )
    compared = a.model is not None and b.model is not None
    layers = _layers(a.model, b.model, images[:_LAYER_SAMPLES]) if compared else ()
    return Verification(agreement=result, layers=layers)


def runnable(source):
    """A model or file, as `verify` takes it, ready to run."""
    if isinstance(source, Runnable):
        return source
    name = str(source) if isinstance(source, (str, os.PathLike)) else None
    if name is not None:
        source = _load(Path(source))
    for kind, ready in _KINDS.items():
        if isinstance(source, kind):
            return ready(source, name)
    raise TypeError(f"A Keras model, a LiteRTModel, a SavedModel or a path. Received: {type(source).__name__}")


def images_shape(a, b):
    """`(height, width, channels)` of the images that both of two `Runnable`s take, None where both leave it free.

    Raises:
        ValueError: If there are none.
    """
    one, other = a.input_shape[1:], b.input_shape[1:]
    if len(one) != len(other) or any(None not in sizes and sizes[0] != sizes[1] for sizes in zip(one, other)):  # noqa: B905
        raise ValueError(f"Two models that take the same images. Received: {a.name} of {one} and {b.name} of {other}")
    return tuple(first or second for first, second in zip(one, other, strict=True))


def load_keras(path):
    """Reads a .keras file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or no Keras model.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no model file {str(path)!r}")
    try:
        return keras.saving.load_model(path)
    except Exception as error:  # zipfile, h5py and Keras raise their own kinds for what is cut or foreign
        raise ValueError(f"{str(path)!r} is not a Keras model that can be loaded: {first_line(error)}") from error


_FILES = {".keras": load_keras, ".tflite": load_litert}


def _load(path):
    if path.suffix in _FILES:
        return _FILES[path.suffix](path)
    if path.is_dir():
        return load_savedmodel(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no file or folder {str(path)!r}")
    raise ValueError(f"A .keras file, a .tflite file or a SavedModel's folder. Received: {str(path)!r}")


def _keras(model, name):
    model = functional(model)
    require_one_input(model)
    return Runnable(
        name=name or model.name,
        run=lambda images: predict(model, images),
        input_shape=tuple(model.inputs[0].shape),
        model=model,
    )


def _litert(file, name):
    runner = file.runner()
    return Runnable(
        name=name or file.manifest["network"],
        run=runner,
        input_shape=runner.input_shape,
        is_quantized=runner.has_quantized_outputs,
    )


def _savedmodel(saved, name):
    runner = saved.runner()
    return Runnable(name=name or str(saved.path), run=runner, input_shape=runner.input_shape)


_KINDS = {keras.Model: _keras, LiteRTModel: _litert, SavedModel: _savedmodel}


def _noise_for(a, b, shape):
    """Noise that a Keras model among the two bears; plain noise where there is none."""
    shape = tuple(size or _FREE_SIZE for size in shape)
    model = a.model or b.model
    return check_images(model, shape=shape) if model else noise(shape)


def _layers(a, b, images):
    """Agreement of the layers that should give the same."""
    ours, theirs = _tensors(a), _tensors(b)
    pairs = [(name, ours[name], theirs[twin]) for name, twin in _twins(a, b).items()
             if name in ours and twin in theirs]  # fmt: skip
    if not pairs:
        return ()
    names, *sides = zip(*pairs, strict=True)

    def values(model, tensors):
        inner = keras.Model(model.inputs[0], list(tensors))
        return in_batches(lambda batch: dict(enumerate(map(np.asarray, inner(batch, training=False)))), images)

    expected, actual = (values(model, tensors) for model, tensors in zip((a, b), sides, strict=True))
    rows = []
    for index, name in enumerate(names):
        if expected[index].shape == actual[index].shape:
            as_logits = gives_probabilities(producer(sides[0][index]))
            result = agreement({"y": expected[index]}, {"y": actual[index]}, as_logits=as_logits)
            rows.append((name, result))
    return tuple(rows)


def _tensors(model):
    """The tensor that each layer gives, by its name, in order: of layers that are called once and give one."""
    graph = calls(model)
    times = Counter(call.operation.name for call in graph)
    return {call.operation.name: call.output_tensors[0] for call in graph
            if times[call.operation.name] == 1 and len(call.output_tensors) == 1}  # fmt: skip


def _twins(a, b):
    """The layers of two models that should give the same, by name and in order: `{of a: of b}`.

    Lowering leaves names where they do not say so: the convolution of a lowered model has taken its BatchNormalization
    in. Models that come from the disk do not tell that they were lowered; their layers do.
    """
    if _names(a) != _names(b):
        for model, other, turned in ((a, b, False), (b, a, True)):
            shape = tuple(other.inputs[0].shape[1:])
            try:
                lowered = lower(model, input_shape=None if None in shape else shape)
            except (TypeError, ValueError):  # layers that are not Keras' own: then it was not lowered either
                continue
            if _names(lowered) == _names(other):
                found = lowered.lowering.counterparts
                return {other: name for name, other in found.items()} if turned else found
    return {name: name for name in _tensors(a)}


def _names(model):
    return Counter(call.operation.name for call in calls(model))
