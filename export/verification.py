"""Comparison of two models: any two of a Keras model, a LiteRT file and a SavedModel."""

import os
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import keras
import numpy as np

from se_keras.errors import require_choice, translated
from se_keras.graph import calls, functional, gives_probabilities, producer
from se_keras.images import calibration_images
from se_keras.normalization import Normalization
from se_keras.runs import training_of
from se_keras.typing import Array, FilePath, Images, ImageShape, Json, Outputs
from se_keras.weights.files import check_keras

from .description import Metadata, agreed
from .litert import metadata
from .litert.file import LiteRTModel, LiteRTRunner, load_litert
from .litert.gpu import GPURunner
from .lowering import lower
from .model import check_images, default_normalization, predict, require_one_input
from .outputs import FREE_SIZE, LEAST_PROBABILITY, Agreement, agreement, in_batches, integer_range, noise
from .serving.savedmodel import SavedModel, load_savedmodel

Accelerator = Literal["cpu", "gpu"]
ACCELERATORS: tuple[Accelerator, ...] = get_args(Accelerator)
_LAYER_SAMPLES = 4  # the outputs of all layers of a large network take some 100 MB for each image


@dataclass(frozen=True, kw_only=True)
class Verification:
    """How well model B agrees with model A.

    Args:
        agreement: Agreement of their outputs.
        layers: `(name, Agreement)` of each pair of layers with the same output, in A's order and by A's names, on the
            first images. Empty unless both are Keras models.
        gpu: Name of the GPU that B ran on, as LiteRT gives it; None if it ran on the CPU.
    """

    agreement: Agreement
    layers: tuple[tuple[str, Agreement], ...]
    gpu: str | None = None

    def first_above(self, tolerance: float = 1e-3) -> str | None:
        """Name of the first layer whose largest error is above a share of its range; None if there is none."""
        return next((name for name, result in self.layers if result.max_error > tolerance), None)


@dataclass(frozen=True, kw_only=True, eq=False)
class Runnable:
    """A model of any kind that can be run.

    Args:
        name: The name in messages.
        run: Function from images to outputs, `{name: array}`.
        input_shape: Batch first. A free size is None.
        about: What its files say: labels, normalization and training, from the run.json next to a .keras file, the
            metadata of a .tflite file, or the manifest of a SavedModel.
        default: The normalization that is assumed of a model whose files do not say any.
        model: The functional Keras model, if it is one.
        is_quantized: Whether an output is quantized, as in integer files.
    """

    name: str
    run: Callable[[Array], Outputs]
    input_shape: tuple[int | None, ...]
    about: Metadata
    default: Normalization | None = None
    model: keras.Model | None = None
    is_quantized: bool = False
    input_dtype: Any = "float32"  # of the images, which a quantized input stands for

    @property
    def normalization(self) -> Normalization | None:
        """The normalization of pixels in 0 to 255; None if it is unknown."""
        return self.about.normalization or self.default

    def normalized(self, given: Any, *, override: bool = False) -> "Runnable":
        """The model with a given normalization. Raises ValueError if its files say another one, unless `override`."""
        checked = Normalization.of(given, channels=self.input_shape[-1] or 1)
        known = agreed(f"normalization of {self.name}", checked, self.about.normalization, override=override)
        return replace(self, about=replace(self.about, normalization=known))


def verify(
    a: Any,
    b: Any,
    inputs: Any = None,
    *,
    normalization: Any = None,
    override: bool = False,
    accelerator: Accelerator = "cpu",
) -> Verification:
    """Compares the outputs of two models on the same images, and their layers if both are Keras models.

    A model and its lowered model are compared at each layer that has a counterpart, whatever its name: for example, a
    BatchNormalization with the convolution that it was folded into. Single outputs are compared whatever their names,
    and as logits if one of them is called `probabilities`, unless one is quantized: steps of 1/256 have no logits.

    Args:
        a: The reference: a Keras model, a `LiteRTModel` or a `SavedModel`, or the path of a .keras file, a .tflite file
            or a SavedModel's folder. For TF Serving's `base_path`, the highest version is used. Errors are shares of
            the range of the reference's outputs.
        b: The model to compare with it.
        inputs: Images as A takes them: an array `(samples, height, width, channels)`, or an iterable of images or
            batches, such as a `tf.data.Dataset`; or a folder of image files, whose pixels are normalized if A or B is
            known to need it, and else stay 0 to 255. Default: noise. If B has another normalization, because it takes
            pixels, both get the same pixels.
        normalization: `(mean, std)` of pixels in 0 to 255, if the files of A do not say it.
        override: Whether a normalization is taken that contradicts the files of A.
        accelerator: Where B runs, which is a LiteRT file unless this is `"cpu"`: `"gpu"` is LiteRT's GPU delegate. Give
            the same file as A to compare the GPU with the CPU.

    Warns:
        UserWarning: If most probabilities of A are 0, which hides every difference.

    Raises:
        OSError: If there is no such file or folder, or no GPU.
        ValueError: If a file is damaged or of another kind, if the GPU delegate cannot compute it, if the models do not
            take the same images, if the images are not finite or have another shape, or if the outputs differ in name
            or shape.
        TypeError: If `a` or `b` is neither a model nor a path.

    Example:

    ```python
    print(se_keras.export.verify("model.keras", "model.tflite", images).agreement)
    ```
    """
    a, b = runnable(a), accelerated(runnable(b), accelerator)
    if normalization is not None:
        a = a.normalized(normalization, override=override)
    shape = images_shape(a, b)
    images = _noise_for(a, b, shape) if inputs is None else calibration_images(inputs, shape, what="Verification")
    if isinstance(inputs, (str, os.PathLike)) and (known := a.normalization or b.normalization):
        images = known.apply(images)
    images, same = _as_both_take(a, b, images)
    expected, actual = a.run(images), b.run(same)
    as_logits = len(expected) == len(actual) == 1 and "probabilities" in {*expected, *actual}
    as_logits = as_logits and not (a.is_quantized or b.is_quantized)
    if len(expected) == len(actual) == 1:  # compared whatever their names
        expected, actual = ({"output": values} for side in (expected, actual) for values in side.values())
    result = agreement(expected, actual, as_logits=as_logits)
    if as_logits and np.mean(expected["output"] < LEAST_PROBABILITY) > 0.5:
        warnings.warn(
            f"Most probabilities of {a.name} are 0, which hides differences: are the images scaled as it needs?",
            stacklevel=2,
        )
    layers = ()
    if a.model is not None and b.model is not None:
        layers = _layers(a.model, b.model, images[:_LAYER_SAMPLES])
    gpu = b.run.gpu if isinstance(b.run, GPURunner) else None
    return Verification(agreement=result, layers=layers, gpu=gpu)


def accelerated(model: Runnable, accelerator: Accelerator) -> Runnable:
    """The model on another part of this machine.

    Raises:
        ValueError: If there is no such accelerator, or if it does not run this kind of model.
    """
    require_choice("accelerator", accelerator, ACCELERATORS)
    if accelerator == "cpu":
        return model
    if not isinstance(model.run, LiteRTRunner):
        raise ValueError(f"{accelerator=} runs LiteRT files. Received: {model.name}")
    return replace(model, name=f"{model.name} on the GPU", run=GPURunner(model.run.content))


def of_pixels(*models: Runnable) -> Normalization:
    """The normalization of the first model whose files say one; raises ValueError if none does."""
    known = next((model.normalization for model in models if model.normalization), None)
    if known is None:
        rule = "The pixels of image files are 0 to 255: normalization (--normalize MEAN STD) says what becomes of them"
        raise ValueError(f"{rule}. Received: {' and '.join(x.name for x in models)}, whose files do not say it")
    return known


def _as_both_take(a: Runnable, b: Runnable, images: Images) -> tuple[Images, Images]:
    """The images of A, and the same as B takes them. If B's normalization is another one, both are of whole pixels."""
    one, other = a.normalization, b.normalization
    if one is None or other is None or one.agrees(other):
        return images, images
    pixels = np.clip(np.rint(one.undo(images)), 0, 255)
    return one.apply(pixels), other.apply(pixels)


def runnable(source: Any, *, training: Json | None = None) -> Runnable:
    """A model or file, as `verify` takes it, that can be run, and what is known of it.

    `training` is the content of the run.json of a model in memory.
    """
    if isinstance(source, Runnable):
        return source
    if training is not None and isinstance(source, keras.Model):
        found = _keras(source, None)
        return replace(found, about=replace(found.about, training=training).completed())
    name = str(source) if isinstance(source, (str, os.PathLike)) else None
    if name is not None:
        source = _load(Path(source))
    for kind, ready in _KINDS.items():
        if isinstance(source, kind):
            return ready(source, name)
    raise TypeError(f"Give a Keras model, a LiteRTModel, a SavedModel or a path. Received: {type(source).__name__}")


def images_shape(a: Runnable, b: Runnable) -> ImageShape:
    """`(height, width, channels)` of the images that both models take; None where both leave the size free.

    Raises:
        ValueError: If they do not take the same images.
    """
    one, other = a.input_shape[1:], b.input_shape[1:]
    sizes = list(zip(one, other, strict=False))
    if len(one) != len(other) or any(None not in pair and pair[0] != pair[1] for pair in sizes):
        raise ValueError(f"The models must take the same images. Received: {a.name} of {one} and {b.name} of {other}")
    return tuple(first or second for first, second in sizes)


def load_keras(path: FilePath) -> keras.Model:
    """Reads a .keras file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or not a Keras model.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no model file {str(path)!r}")
    with translated(f"{str(path)!r} is not a Keras model that can be loaded"):
        check_keras(path)
        return keras.saving.load_model(path)  # pyright: ignore[reportReturnType]  # inferred as any object


_FILES = {".keras": load_keras, ".tflite": load_litert}


def _load(path: Path) -> Any:
    if path.suffix in _FILES:
        return _FILES[path.suffix](path)
    if path.is_dir():
        return load_savedmodel(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no file or folder {str(path)!r}")
    raise ValueError(f"Give a .keras file, a .tflite file or a SavedModel's folder. Received: {str(path)!r}")


def _keras(model: keras.Model, name: str | None) -> Runnable:
    model = functional(model)
    require_one_input(model)
    return Runnable(
        name=name or model.name,
        run=lambda images: predict(model, images),
        input_shape=tuple(model.inputs[0].shape),
        about=Metadata(network=model.name, precision="float32", training=name and training_of(name)).completed(),
        default=default_normalization(model),
        model=model,
    )


def _litert(file: LiteRTModel, name: str | None) -> Runnable:
    runner = file.runner()
    return Runnable(
        name=name or file.manifest["network"],
        run=runner,
        input_shape=runner.input_shape,
        about=(
            metadata.read(file.content) or Metadata(network=file.manifest["network"], precision="unknown")
        ).completed(),
        is_quantized=runner.has_quantized_outputs,
        input_dtype=runner.input_dtype if runner.takes_integers else "float32",
    )


def _savedmodel(saved: SavedModel, name: str | None) -> Runnable:
    runner = saved.runner()
    return Runnable(
        name=name or str(saved.path),
        run=runner,
        input_shape=runner.input_shape,
        about=saved.about,
        input_dtype=runner.input_dtype,
    )


_KINDS = {keras.Model: _keras, LiteRTModel: _litert, SavedModel: _savedmodel}


def _noise_for(a: Runnable, b: Runnable, shape: ImageShape) -> Images:
    """Noise, scaled for the first Keras model of the two, if there is one."""
    fixed = tuple(size or FREE_SIZE for size in shape)
    model = a.model or b.model
    dtype = b.input_dtype if integer_range(a.input_dtype) is None else a.input_dtype
    return check_images(model, shape=fixed) if model else noise(fixed, dtype=dtype)


def _layers(a: keras.Model, b: keras.Model, images: Images) -> tuple[tuple[str, Agreement], ...]:
    """Agreement of each pair of layers with the same output."""
    tensors, others = _tensors(a), _tensors(b)
    pairs = {name: other for name, other in _counterparts(a, b).items() if name in tensors and other in others}
    if not pairs:
        return ()
    expected = _outputs(a, {name: tensors[name] for name in pairs}, images)
    actual = _outputs(b, {name: others[other] for name, other in pairs.items()}, images)
    return tuple(
        (name, agreement({"y": x}, {"y": y}, as_logits=gives_probabilities(producer(tensors[name]))))
        for name, x, y in ((name, expected[name], actual[name]) for name in pairs)
        if x.shape == y.shape
    )


def _tensors(model: keras.Model) -> dict[str, Any]:
    """The output of each layer that is called once and has one output, by name and in order."""
    graph = calls(model)
    times = Counter(call.operation.name for call in graph)
    once = [call for call in graph if times[call.operation.name] == 1 and len(call.output_tensors) == 1]
    return {call.operation.name: call.output_tensors[0] for call in once}


def _outputs(model: keras.Model, tensors: dict[str, Any], images: Images) -> Outputs:
    """The values of tensors of a model, `{name: array}`."""
    inner: Any = keras.Model(model.inputs[0], tensors)
    return in_batches(lambda batch: inner(batch, training=False), images)


def _counterparts(a: keras.Model, b: keras.Model) -> dict[str, str]:
    """The layers of two models with the same output, `{name in a: name in b}`, in order.

    If one model is the lowered model of the other, names are not compared: a convolution of a lowered model includes
    its BatchNormalization. A lowered model that was loaded from a file is recognized by its layers.
    """
    if _names(a) != _names(b):
        for model, other in ((a, b), (b, a)):
            shape = tuple(other.inputs[0].shape[1:])
            try:
                lowered = lower(model, input_shape=None if None in shape else shape)
            except (TypeError, ValueError):  # `model` cannot be lowered, so `other` is not its lowered model
                continue
            if _names(lowered) == _names(other):
                found = lowered.lowering.counterparts
                return found if model is a else {other: name for name, other in found.items()}
    return {name: name for name in _tensors(a)}


def _names(model: keras.Model) -> Counter[str]:
    return Counter(call.operation.name for call in calls(model))
