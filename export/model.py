"""What all exports of a model share: names of inputs and outputs, the graph, images to compare on."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from se_keras.catalogue import names, spec_of
from se_keras.errors import translated
from se_keras.graph import calls, gives_probabilities, producer, structures
from se_keras.images import scales_pixels
from se_keras.layers import ops
from se_keras.normalization import Normalization
from se_keras.typing import Array, FilePath, Images, Json, Outputs

from .outputs import FREE_SIZE, Agreement, agreement, as_integers, in_batches, integer_range, logit_range, noise

SIGNATURE = "serving_default"
# Logits can be compared by their probabilities if their range is between these. At the lower limit, float32 resolves
# differences of 1e-3 to 1e-5 of the range. At the upper limit, probabilities come near 1e-30, the smallest compared.
_LOGIT_RANGE = (0.01, 60)
# Pixels 0..255 are 255 times as large as 0..1, and about 60 times as large as standard normal values. Two data sets
# with the same scaling differ by less than 3.
_OTHER_RANGE = 8


def trace(
    model: keras.Model,
    folder: FilePath,
    *,
    names: Sequence[str] | None = None,
    batch_shape: tuple[int | None, ...] | None = None,
    more: Mapping[str, tuple[Callable[..., Any], Any]] | None = None,
    tracked: Iterable[Any] = (),
) -> None:
    """Writes a functional model as a plain SavedModel with the signature `serving_default`.

    Args:
        model: The model.
        folder: Folder of the SavedModel.
        names: Names of the outputs, which lowering may have changed. Default: the model's.
        batch_shape: Shape of a single input. Default: the model's own shape, at any batch size.
        more: Further signatures: `{name: (function, specification of its input)}`.
        tracked: Resources of these signatures, such as tables.

    Raises:
        ValueError: If a weight is not finite.
    """
    names = names or output_names(model)
    broken = [layer.name for layer in model.layers if not all(np.isfinite(w).all() for w in layer.get_weights())]
    if broken:
        raise ValueError(f"The weights of {model.name} are not finite: {', '.join(broken)}")

    def serve(*images: Any) -> dict[str, Any]:
        outputs = model(keras.tree.pack_sequence_as(structures(model)[0], list(images)), training=False)
        return dict(zip(names, keras.tree.flatten(outputs), strict=True))

    archive: Any = keras.export.ExportArchive()
    archive.track(model)
    specs = [
        tf.TensorSpec(batch_shape or (None, *x.shape[1:]), x.dtype, name=name)
        for x, name in zip(model.inputs, input_names(model), strict=True)
    ]
    archive.add_endpoint(SIGNATURE, serve, input_signature=specs)
    for table in tracked:
        archive.track(table)
    for name, (function, spec) in (more or {}).items():
        archive.add_endpoint(name, function, input_signature=[spec])
    archive.write_out(str(folder), verbose=False)


def input_names(model: keras.Model) -> list[str]:
    """Names of the inputs."""
    return [x.name for x in model.inputs]


def output_names(model: keras.Model) -> list[str]:
    """Names of the outputs: the keys, if they are a dict; `probabilities` for a single one after a softmax."""
    paths = [path for path, _ in keras.tree.flatten_with_path(structures(model)[1])]
    if all(len(path) == 1 and isinstance(path[0], str) for path in paths):
        return [path[0] for path in paths]
    if ends_in_softmax(model):
        return ["probabilities"]
    names = list(model.output_names)  # of the last layers; a layer that gives several outputs repeats its name
    return [f"{name}_{n}" if (n := names[:i].count(name)) else name for i, name in enumerate(names)]


def ends_in_softmax(model: keras.Model) -> bool:
    """Whether a model has one output, which comes from a softmax."""
    return len(model.outputs) == 1 and gives_probabilities(producer(model.outputs[0]))


def class_count(model: keras.Model) -> int | None:
    """Number of classes; None for a model whose output is not a single vector."""
    shapes = [x.shape for x in model.outputs]
    return shapes[0][-1] if len(shapes) == 1 and len(shapes[0]) == 2 else None


def signature_of(model: keras.Model, *, batch_shape: tuple[int | None, ...] | None = None) -> Json:
    """Names, shapes and types of a model's input and outputs, for the manifest. A free size is None."""
    images = keras.KerasTensor(batch_shape or (None, *model.inputs[0].shape[1:]), dtype=model.inputs[0].dtype)
    outputs = keras.tree.flatten(model.compute_output_spec(images))

    def describe(names: list[str], tensors: list[Any]) -> Json:
        return {name: {"shape": list(x.shape), "dtype": str(x.dtype)} for name, x in zip(names, tensors, strict=True)}

    return {"inputs": describe(input_names(model), [images]), "outputs": describe(output_names(model), outputs)}


def check_images(model: keras.Model, *, shape: Sequence[int] | None = None, samples: int = 4) -> Images:
    """Noise to compare a model and its export on, scaled so that differences of the outputs show errors of the export.

    A trained network takes standard normal noise. An untrained one has not normalized its activations yet. If values
    are large, the gates of a deep network saturate, and a rounding error of 1e-6 grows to 1. In a network without
    shortcuts, each gate halves small values, until all probabilities are equal. Up to 8 scales are tried. A network
    that takes integers scales them itself, so that its noise is uniform integers.

    Args:
        model: A Keras model with one input.
        shape: `(height, width, channels)`. Default: the model's, with 64 for free sizes.
        samples: Number of images.
    """
    shape = shape or [size or FREE_SIZE for size in model.inputs[0].shape[1:]]
    dtype = model.inputs[0].dtype
    if integer_range(dtype):
        return noise(shape, samples=samples, dtype=dtype)
    normal = noise(shape, samples=samples)
    exponent, images, as_logits = 0, normal, ends_in_softmax(model)
    for _ in range(8):
        outputs, nudged = predict(model, images[:1]), predict(model, images[:1] * np.float32(1 + 1e-6))
        finite = all(np.isfinite(x).all() for x in outputs.values())
        logits = (logit_range(*outputs.values()) if finite else np.inf) if as_logits else None
        stable = finite and agreement(outputs, nudged, as_logits=as_logits).max_error < 1e-5
        if stable and (logits is None or _LOGIT_RANGE[0] < logits < _LOGIT_RANGE[1]):
            return images
        exponent += 1 if logits is not None and logits <= _LOGIT_RANGE[0] else -1
        images = normal * np.float32(10.0**exponent)
    return normal


def predict(model: keras.Model, images: Array) -> Outputs:
    """Outputs of a Keras model in inference: `{name: array}`. Images for an input of integers are rounded to them."""
    names = output_names(model)

    def run(batch: Array) -> Outputs:
        with translated(f"{model.name} cannot be run"):
            outputs = keras.tree.flatten(model(batch, training=False))
        return dict(zip(names, map(ops.convert_to_numpy, outputs), strict=True))

    return in_batches(run, as_integers(images, model.inputs[0].dtype), size=model.inputs[0].shape[0])


def trained_precision(model: keras.Model, reference: keras.Model, images: Images) -> Json:
    """An entry of the manifest: how far a model that computes in another float type is from its float32 model.

    Args:
        model: The model.
        reference: Its float32 model. If this is the model itself, there is no entry.
        images: `(samples, height, width, channels)`, to compare on. If the model overflows on them, the entry is None.
    """
    if reference is model:
        return {}
    outputs = predict(model, images)
    if not all(np.isfinite(x).all() for x in outputs.values()):
        return {"trained_precision": None}
    result = agreement(predict(reference, images), outputs, as_logits=ends_in_softmax(model))
    return {"trained_precision": asdict(result)}


def default_normalization(model: keras.Model) -> Normalization | None:
    """The normalization of pixels in 0 to 255 for a model without a record of its training; None if it is unknown.

    A model whose first layer scales pixels takes them as they are. A network of the catalogue with the published number
    of classes, such as one with released weights, takes what its row says.
    """
    if scales_pixels(model):
        return Normalization((0.0,), (1.0,))
    shape = model.inputs[0].shape
    if model.name not in names() or model.inputs[0].name != "images" or len(shape) != 4:
        return None
    row = spec_of(model.name)
    is_published = shape[-1] == row.input_shape[-1] and class_count(model) == row.classes
    return Normalization.of(row.normalization, channels=shape[-1]) if is_published else None


def require_one_input(model: keras.Model) -> None:
    """Raises ValueError if a model has several inputs."""
    if len(model.inputs) != 1:
        raise ValueError(f"Only models with one input can be exported. Received: {model.name} with {len(model.inputs)}")


def require_equal(result: Agreement, what: str) -> None:
    """Raises ValueError if a float32 export does not compute the same as its model."""
    # Sums in another order differ by about 1e-6; a wrong graph or a lost weight changes them by more than 1e-2.
    if result.max_error > 1e-3:
        raise ValueError(f"The {what} disagrees with the Keras model: {result}. Nothing was written")


def warn_of_other_range(model: keras.Model, images: Images, *, stacklevel: int) -> None:
    """Warns if the images have another range than the images that the model was trained on.

    The moving variance of the first BatchNormalization shows the range of the training images. A model without such a
    layer, or an untrained model, is not checked.

    Args:
        model: A functional Keras model.
        images: `(samples, height, width, channels)`.
        stacklevel: Stack level of the warning.

    Warns:
        UserWarning: If values are more than eight times as large or as small as in training.
    """
    batchnorm = next(
        (x.operation for x in calls(model) if isinstance(x.operation, keras.layers.BatchNormalization)), None
    )
    if batchnorm is None:
        return
    trained = ops.convert_to_numpy(batchnorm.moving_variance)
    if np.all(trained == 1):  # Keras' initial value
        return
    inputs = keras.Model(structures(model)[0], batchnorm.input)(images[:32], training=False)
    variance = ops.convert_to_numpy(ops.var(inputs, axis=tuple(range(len(inputs.shape) - 1))))
    alive = trained > 1e-6
    factor = float(np.sqrt(np.median(variance[alive] / trained[alive]))) if alive.any() else 1.0
    if not 1 / _OTHER_RANGE < factor < _OTHER_RANGE:
        low, high = float(images.min()), float(images.max())
        warnings.warn(
            f"The images have values in {low:g}..{high:g}. {model.name} was trained on values about "
            f"{max(factor, 1 / factor):.0f} times as {'small' if factor > 1 else 'large'}: "
            f"{low / factor:.2g}..{high / factor:.2g}",
            stacklevel=stacklevel,
        )
