"""Fine-tuning for export with tensorflow-model-optimization: quantization-aware training, pruning, clustering.

The library trains only tf_keras models. So the lowered network is rebuilt in tf_keras, then compiled and fitted like
any tf_keras model, and converted back to Keras 3 or to a file:

    quantize_aware -> fit -> to_litert        an int8 file
    prunable       -> fit -> stripped         a Keras 3 model with many weights that are zero
    clustered      -> fit -> stripped         a Keras 3 model with few different weights

To quantize a pruned network, call `quantize_aware` with the `stripped` model and `keep_zeros=True`.

The first function of each line takes a trained functional Keras 3 model with one input, and `input_shape`, `(height,
width, channels)`, which is required if the model's size is free. It returns a tf_keras model that is not compiled. It
raises TypeError if the model is not functional, and ValueError if an argument is out of range, if layers cannot be
trained in this way, or if weights are not finite (the message names the layers).
"""

import re
import tempfile
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

import keras
import tensorflow as tf
import tf_keras
from tf_keras import layers

from se_keras.graph import calls, functional, input_shape_of, parts
from se_keras.images import calibration_images
from se_keras.typing import Array, Json

from ..description import describe
from ..litert.conversion import LOW_COSINE, compared_file, converted_by, type_of_input, without_clamps
from ..litert.file import LiteRTModel, LiteRTRunner
from ..litert.flatbuffer import (
    TYPES,
    InferenceType,
    OutputTypes,
    with_float_softmax,
    with_types,
    without_cast,
)
from ..litert.ranges import widened, with_wide_ranges
from ..lowering import in_float32, lower
from ..model import (
    SIGNATURE,
    class_count,
    ends_in_softmax,
    output_names,
    require_one_input,
    trained_precision,
)
from ..outputs import agreement, as_integers, integer_range
from .library import tfmot
from .quantizers import BOUNDED, UNROUNDED, CalibratedQuantizer, KernelQuantizer, RoundingConfig, fixed, is_fused
from .tf_keras_model import KERNELS, name_of_taken, predict_tf_keras, transcribe


def quantize_aware(
    model: keras.Model, calibration: Any, *, input_shape: Sequence[int] | None = None, keep_zeros: bool = False
) -> tf_keras.Model:
    """A tf_keras model for training, in which weights and activations are rounded as in the int8 file.

    Training starts from the result of post-training quantization: the ranges of activations are those of the
    calibration images. Then they follow the training images. The ranges of weights are always those of the current
    weights.

    ```python
    tf_keras_model = qat.quantize_aware(model, images[:100])
    tf_keras_model.compile(tf_keras.optimizers.Adam(1e-4), "sparse_categorical_crossentropy")
    tf_keras_model.fit(dataset, epochs=3, callbacks=[qat.KeepBest(images, labels)])  # any tf.data.Dataset
    qat.to_litert(tf_keras_model, model, held_out=held_out).save("network.tflite")
    ```

    Args:
        calibration: Typical images, as for `to_litert`; finite, in the shape of the model's input.
        keep_zeros: Whether weights that are zero stay zero, so that a pruned network stays sparse.
    """
    lowered = _lowered(model, input_shape)
    dtype = lowered.inputs[0].dtype
    images = as_integers(calibration_images(calibration, lowered.inputs[0].shape[1:]), dtype)
    activations = CalibratedQuantizer()
    limits = integer_range(dtype) if dtype in TYPES else None

    def rounded(layer: Any, readers: list[Any]) -> Any:
        is_depthwise = isinstance(layer, layers.DepthwiseConv2D)
        kernel = KernelQuantizer(is_depthwise, keep_zeros) if isinstance(layer, KERNELS) else None
        output = None if isinstance(layer, UNROUNDED) or is_fused(layer, readers) else activations
        if isinstance(layer, layers.Activation) and layer.activation in BOUNDED:
            output = BOUNDED[layer.activation]
        if limits and output and layer.name == name_of_taken(lowered.inputs[0]):
            output = fixed(*limits)  # the integers themselves
        if not kernel and not output:
            return layer
        return tfmot.quantization.keras.QuantizeWrapperV2(layer, RoundingConfig(kernel, output))

    tf_keras_model = transcribe(lowered, wrap=rounded)
    activations.is_calibrating = True
    for start in range(0, len(images), 8):
        tf_keras_model(images[start : start + 8], training=True)
    activations.is_calibrating = False
    return tf_keras_model


class KeepBest(tf_keras.callbacks.Callback):
    """At the end of `fit`, restores the weights with the lowest loss on held-out images, of all epochs or the initial.

    So fine-tuning never increases the loss on these images.

    ```python
    tf_keras_model.fit(dataset, epochs=5, callbacks=[qat.KeepBest(images, labels)])
    ```

    Args:
        images: Neither training images nor test images, because the weights are selected by them.
        labels: Labels in the format of the model's loss.
    """

    model: Any  # set by tf_keras

    def __init__(self, images: Array, labels: Array):
        super().__init__()
        self._held_out = images, labels
        self._best: Any = None  # loss and weights

    def on_train_begin(self, logs: Json | None = None) -> None:
        """Evaluates the initial weights."""
        self._best = None
        self._evaluate()

    def on_epoch_end(self, epoch: int, logs: Json | None = None) -> None:
        """Evaluates the weights of the epoch."""
        self._evaluate()

    def on_train_end(self, logs: Json | None = None) -> None:
        """Restores the best weights."""
        self.model.set_weights(self._best[1])

    def _evaluate(self) -> None:
        loss = self.model.evaluate(*self._held_out, verbose=0)
        loss = loss[0] if isinstance(loss, list) else loss
        if self._best is None or loss < self._best[0]:
            self._best = loss, self.model.get_weights()


def to_litert(
    tf_keras_model: Any,
    model: keras.Model,
    *,
    held_out: Any,
    input_type: InferenceType = "float32",
    output_type: OutputTypes = "float32",
    labels: Iterable[str] | None = None,
    normalization: Any = None,
    training: Json | None = None,
) -> LiteRTModel:
    """Converts a fine-tuned tf_keras model to an int8 LiteRT file, and compares the file with this model and `model`.

    The file is like one by post-training quantization, `se_keras.export.to_litert`: the same signature, float32 images
    and probabilities, a softmax in float32, and integers between them. Ranges that are too narrow for integer kernels,
    as after dead units, are widened in `tf_keras_model`.

    Args:
        tf_keras_model: The result of `quantize_aware(model, ...)`, fitted.
        model: The model that `tf_keras_model` was made from.
        held_out: Images to compare on, `(samples, height, width, channels)`, which were not used for training.
        input_type: As in `se_keras.export.to_litert`, but the steps of integers are those of the training.
        output_type: As in `se_keras.export.to_litert`.
        labels: Likewise.
        normalization: Likewise.
        training: Likewise.

    Returns:
        The file. In its manifest, `agreement` compares it with `model`, as in all files, and `agreement_with_twin` with
        `tf_keras_model`: the error of the conversion alone.

    Raises:
        ValueError: If `tf_keras_model` was not made from `model`, or if the file disagrees with it.
    """
    model, shape = functional(model), tuple(tf_keras_model.input_shape[1:])
    lowered, names = lower(model, input_shape=shape), output_names(model)
    _require_made_from(tf_keras_model, lowered)
    images = as_integers(calibration_images(held_out, shape), model.inputs[0].dtype)
    input_type = type_of_input(model, input_type)
    about = describe(
        network=model.name,
        precision="int8",
        channels=shape[-1],
        classes=class_count(model),
        labels=labels,
        normalization=normalization,
        training=training,
    )
    content = without_clamps(_converted(tf_keras_model, model.inputs[0], names), images)
    expected = predict_tf_keras(tf_keras_model, images, names=names)
    result = agreement(expected, LiteRTRunner(content)(images), as_logits=ends_in_softmax(model))
    # A few values are rounded to the neighbouring step.
    if result.cosine < LOW_COSINE:
        raise ValueError(f"The int8 file disagrees with the tf_keras model that was trained: {result}")
    reference = in_float32(model)
    file, _ = compared_file(
        with_types(content, input_type=input_type, output_type=output_type),
        model=reference,
        about=about,
        lowering=lowered.lowering,
        images=images,
        held_out=True,
        agreement_with_twin=asdict(result),
        quantization_aware=True,
        **trained_precision(model, reference, images),
    )
    return file


def prunable(
    model: keras.Model, *, sparsity: float, steps: int, input_shape: Sequence[int] | None = None
) -> tf_keras.Model:
    """A tf_keras model for training, whose smallest weights become zero during `fit`.

    In all kernels except depthwise ones, the share of zeros grows from 0 to `sparsity` in the first `steps` steps of
    training, by a cubic function (arXiv:1710.01878, eq. 1), and then stays constant.

    Args:
        sparsity: The final share of zeros.
        steps: Number of training steps (batches) until then. Half of all steps are a good start.
    """
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity must be a share between 0 and 1. Received: {sparsity=}")
    _require_count("steps", steps, least=1)
    every = max(1, steps // 100)
    schedule: Any = tfmot.sparsity.keras.PolynomialDecay(0.0, sparsity, steps % every, steps, frequency=every)

    def pruned(layer: Any, readers: list[Any]) -> Any:
        if not _is_compressible(layer):
            return layer
        return tfmot.sparsity.keras.prune_low_magnitude(layer, schedule)

    tf_keras_model = transcribe(_lowered(model, input_shape), wrap=pruned)
    for layer in tf_keras_model.layers:
        if hasattr(layer, "pruning_step"):
            layer.pruning_step.assign(0)  # it counts by itself; at -1 it would wait for the library's callback
    return tf_keras_model


def clustered(model: keras.Model, *, clusters: int, input_shape: Sequence[int] | None = None) -> tf_keras.Model:
    """A tf_keras model for training, with at most `clusters` different weights in each kernel except depthwise ones.

    Kernels with fewer weights are not changed.
    """
    _require_count("clusters", clusters, least=2)

    def few_valued(layer: Any, readers: list[Any]) -> Any:
        if not _is_compressible(layer) or layer.kernel.shape.num_elements() <= clusters:
            return layer
        return tfmot.clustering.keras.cluster_weights(layer, clusters)

    return transcribe(_lowered(model, input_shape), wrap=few_valued)


def stripped(tf_keras_model: Any, model: keras.Model) -> keras.Model:
    """A Keras 3 model with the weights of a fitted `prunable` or `clustered` model, for every export.

    Args:
        tf_keras_model: The fitted model.
        model: The model that `tf_keras_model` was made from.

    Returns:
        The lowered `model` with the new weights.

    Raises:
        ValueError: If `tf_keras_model` was not made from `model`.
    """
    lowered = lower(model, input_shape=tuple(tf_keras_model.input_shape[1:]))
    _require_made_from(tf_keras_model, lowered)
    for layer in tf_keras_model.layers:
        if hasattr(layer, "pruning_obj"):
            layer.pruning_obj.weight_mask_op()  # the last step of training changed zeros
    plain: Any = tfmot.clustering.keras.strip_clustering(tfmot.sparsity.keras.strip_pruning(tf_keras_model))
    learned = {layer.name: layer.get_weights() for layer in plain.layers if layer.trainable and layer.weights}
    for name, weights in learned.items():
        lowered.get_layer(name).set_weights(weights)
    return lowered


def scope() -> AbstractContextManager[Any]:
    """The context in which tf_keras loads a model of `quantize_aware` that was saved as .h5, to continue training."""
    return tfmot.quantization.keras.quantize_scope()


def _converted(tf_keras_model: Any, image: Any, output_names: list[str]) -> bytes:
    """The file. Ranges too narrow for integer kernels are widened in `tf_keras_model`."""
    ranges = {}
    for layer in tf_keras_model.layers:
        output = getattr(getattr(layer, "quantize_config", None), "output", None)
        if isinstance(output, CalibratedQuantizer):
            ranges[layer.name] = output.ranges[layer.name]

    def widen(narrow: dict[str, float]) -> None:
        for tensor, scale in narrow.items():
            for name in ranges.keys() & set(re.split("[/;]", tensor)):
                low, high = ranges[name]["min_var"], ranges[name]["max_var"]
                wider = widened({"min": low.numpy(), "max": high.numpy()}, 255 * scale)
                low.assign(wider["min"])
                high.assign(wider["max"])

    def convert(in_float: Collection[str]) -> bytes:
        return _convert(tf_keras_model, image, output_names)

    content = with_wide_ranges(convert, widen, may_stay_float=False)
    return without_cast(with_float_softmax(content))


def _convert(tf_keras_model: Any, image: Any, output_names: list[str]) -> bytes:
    """Converts through a SavedModel, which sets the names of the signature; `image` is the Keras 3 model's input."""
    dtype = "float32" if integer_range(image.dtype) is None else image.dtype
    images = tf.TensorSpec((1, *tf_keras_model.input_shape[1:]), dtype, name=image.name)

    @tf.function(input_signature=[images])
    def serve(images: Any) -> dict[str, Any]:
        outputs = tf_keras_model(tf.cast(images, "float32"), training=False)
        return dict(zip(output_names, tf.nest.flatten(outputs), strict=True))

    module: Any = tf.Module()
    module.variables_read = tf_keras_model.variables  # with the model itself, each of its layers would be traced
    with tempfile.TemporaryDirectory() as folder:
        tf.saved_model.save(module, folder, signatures={SIGNATURE: serve})
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        converter.optimizations = [tf.lite.Optimize.DEFAULT]  # otherwise the rounded weights are written as floats
        return converted_by(converter, tf_keras_model.name)


def _lowered(model: keras.Model, input_shape: Sequence[int] | None) -> keras.Model:
    shape = input_shape_of(functional(model), input_shape)
    if None in shape:
        raise ValueError(f"Training for export needs a fixed size: give input_shape. Received: a model of {shape}")
    require_one_input(model)
    all_parts = (part for call in calls(model) for part in parts(call.operation))
    functions = [part.name for part in all_parts if isinstance(part, keras.layers.Lambda)]
    if functions:
        raise ValueError(f"Lambda layers have no counterpart in tf_keras. Received: {', '.join(functions)}")
    return lower(model, input_shape=input_shape)


def _require_made_from(tf_keras_model: Any, lowered: keras.Model) -> None:
    """Raises ValueError if the layers with kernels are not the same."""
    unwrapped = (getattr(layer, "layer", layer) for layer in tf_keras_model.layers)
    names = {layer.name for layer in unwrapped if isinstance(layer, KERNELS) and layer.trainable}
    kinds = [kind.__name__ for kind in KERNELS]
    differing = names ^ {layer.name for layer in lowered.layers if type(layer).__name__ in kinds}
    if differing:
        names_of_both = ", ".join(sorted(differing))
        raise ValueError(f"The tf_keras model was not made from {lowered.name}. They differ in {names_of_both}")


def _is_compressible(layer: Any) -> bool:
    return isinstance(layer, (layers.Conv2D, layers.Dense)) and layer.trainable


def _require_count(name: str, count: Any, *, least: int) -> None:
    if type(count) is not int or count < least:
        raise ValueError(f"{name} must be an int of at least {least}. Received: {name}={count!r}")
