"""Fine-tuning for export, by tensorflow-model-optimization: quantization-aware training, pruning, clustering.

The library trains tf_keras models alone. So each way begins with a twin in tf_keras of the lowered network, which is
compiled and fitted as any model of tf_keras, and ends with Keras 3 or a file:

    quantize_aware -> fit -> to_litert        an int8 file
    prunable       -> fit -> stripped         a Keras 3 model, many of whose weights are zero
    clustered      -> fit -> stripped         a Keras 3 model, few of whose weights differ

A pruned network in int8 is the first way behind the second, with `keep_zeros=True`.
"""

import re
import tempfile
from dataclasses import asdict

import keras
import tensorflow as tf
import tf_keras
from tf_keras import layers

from se_keras.graph import calls, functional, input_shape_of, parts
from se_keras.images import calibration_images

from ..description import describe
from ..litert.conversion import LOW_COSINE, compared_file, without_clamps
from ..litert.file import LiteRTRunner
from ..litert.flatbuffer import with_float_softmax, with_types
from ..litert.quantization import widened, with_wide_ranges
from ..lowering import lower
from ..model import (
    SIGNATURE,
    class_count,
    ends_in_softmax,
    input_names,
    output_names,
    require_one_input,
)
from ..outputs import agreement
from .library import tfmot
from .quantizers import _BOUNDED, _UNROUNDED, CalibratedQuantizer, KernelQuantizer, RoundingConfig, _is_fused
from .tf_keras_model import KERNELS, predict_tf_keras, transcribe


def quantize_aware(model, calibration, *, input_shape=None, keep_zeros=False):
    """A trainable twin of a network that computes as its int8 file will: weights and activations are rounded.

    It starts where post-training quantization ends: ranges of activations are those of the calibration images, and
    follow those of the training images from there on; ranges of weights are always their own.

    ```python
    twin = qat.quantize_aware(model, images[:100])
    twin.compile(tf_keras.optimizers.Adam(1e-4), "sparse_categorical_crossentropy")
    twin.fit(dataset, epochs=3, callbacks=[qat.KeepBest(images, labels)])  # any tf.data.Dataset
    qat.to_litert(twin, model, held_out=held_out).save("network.tflite")
    ```

    Args:
        model: A functional Keras 3 model with one input, trained.
        calibration: Images as the network will see them, as for `to_litert`.
        input_shape: `(height, width, channels)`; needed where the model leaves a size free.
        keep_zeros: Whether weights that are zero stay so: a pruned network remains as sparse as it is.

    Returns:
        A `tf_keras.Model`, not compiled.

    Raises:
        TypeError: If the model is not functional.
        ValueError: If there are layers that cannot be trained so or weights that are not finite, the message names
            them; or if calibration images are missing, of another shape, or not finite.
    """
    lowered = _lowered(model, input_shape)
    images = calibration_images(calibration, lowered.inputs[0].shape[1:])
    activations = CalibratedQuantizer()

    def rounded(layer, readers):
        is_depthwise = isinstance(layer, layers.DepthwiseConv2D)
        kernel = KernelQuantizer(is_depthwise, keep_zeros) if isinstance(layer, KERNELS) else None
        output = None if isinstance(layer, _UNROUNDED) or _is_fused(layer, readers) else activations
        if isinstance(layer, layers.Activation) and layer.activation in _BOUNDED:
            output = _BOUNDED[layer.activation]
        if not kernel and not output:
            return layer
        return tfmot.quantization.keras.QuantizeWrapperV2(layer, RoundingConfig(kernel, output))

    twin = transcribe(lowered, wrap=rounded)
    activations.is_calibrating = True
    for start in range(0, len(images), 8):
        twin(images[start : start + 8], training=True)
    activations.is_calibrating = False
    return twin


class KeepBest(tf_keras.callbacks.Callback):
    """Ends a `fit` with the weights of its best epoch, by the loss on held-out images; the start counts as one.

    So fine-tuning never makes a network worse than it was, on these images.

    ```python
    twin.fit(dataset, epochs=5, callbacks=[qat.KeepBest(images, labels)])
    ```

    Args:
        images: Held out from training: images of the test would no longer judge the network.
        labels: As the loss of the twin takes them.
    """

    def __init__(self, images, labels):
        super().__init__()
        self._held_out = images, labels
        self._best = None

    def on_train_begin(self, logs=None):
        """Judges what training begins with."""
        self._best = None
        self._judge()

    def on_epoch_end(self, epoch, logs=None):
        """Judges the epoch."""
        self._judge()

    def on_train_end(self, logs=None):
        """Goes back to the best."""
        self.model.set_weights(self._best[1])

    def _judge(self):
        loss = self.model.evaluate(*self._held_out, verbose=0)
        loss = loss[0] if isinstance(loss, list) else loss
        if self._best is None or loss < self._best[0]:
            self._best = loss, self.model.get_weights()


def to_litert(
    twin,
    model,
    *,
    held_out,
    input_type="float32",
    output_type="float32",
    labels=None,
    normalization=None,
    training=None,
):
    """Converts a fine-tuned twin to an int8 LiteRT file and compares it with the twin and with the model.

    The file is as the one that `se_keras.export.to_litert` makes by post-training quantization: the same signature,
    float32 images in and float32 probabilities out, a softmax in float32, integers in between. Ranges that are too
    narrow for integer kernels, as behind dead units, are widened in the twin.

    Args:
        twin: What `quantize_aware(model, ...)` gave, fitted.
        model: The model that it was made of.
        held_out: Images to compare on, `(samples, height, width, channels)`, that the twin was not fitted to.
        input_type, output_type, labels, normalization, training: As in `se_keras.export.to_litert`; but the steps of an
            integer input are those that the twin was trained with.

    Returns:
        A `LiteRTModel`. Its manifest's `agreement` is with `model`, as in every file's; `agreement_with_twin` says how
        much the conversion itself changed.

    Raises:
        ValueError: If the twin was not made of this model, or if the file disagrees with the twin.
    """
    model, shape = functional(model), tuple(twin.input_shape[1:])
    lowered, names = lower(model, input_shape=shape), output_names(model)
    _require_twin(twin, lowered)
    images = calibration_images(held_out, shape)
    about = describe(
        network=model.name,
        precision="int8",
        channels=shape[-1],
        classes=class_count(model),
        labels=labels,
        normalization=normalization,
        training=training,
    )
    content = without_clamps(_converted(twin, input_names(model)[0], names), images)
    result = agreement(
        predict_tf_keras(twin, images, names=names), LiteRTRunner(content)(images), as_logits=ends_in_softmax(model)
    )
    # Rounding differs by a step here and there.
    if result.cosine < LOW_COSINE:
        raise ValueError(f"The int8 file disagrees with the twin that was trained: {result}")
    file, _ = compared_file(
        with_types(content, input_type=input_type, output_type=output_type),
        model=model,
        about=about,
        lowering=lowered.lowering,
        images=images,
        held_out=True,
        agreement_with_twin=asdict(result),
        quantization_aware=True,
    )
    return file


def prunable(model, *, sparsity, steps, input_shape=None):
    """A trainable twin of a network whose smallest weights become zero while it is fitted.

    The share of zeros in each kernel but the depthwise ones grows along a cubic (arXiv:1710.01878, eq. 1) from none to
    `sparsity` in the first `steps` steps of training, and stays there.

    Args:
        model: A functional Keras 3 model with one input, trained.
        sparsity: The share of zeros at the end.
        steps: Number of training steps, of a batch each, until then. Half of those of the whole fit are a good start.
        input_shape: `(height, width, channels)`; needed where the model leaves a size free.

    Returns:
        A `tf_keras.Model`, not compiled. `stripped` gives back what it has learned.

    Raises:
        TypeError: If the model is not functional.
        ValueError: If an argument is out of its range, or as for `quantize_aware`.
    """
    if not 0 < sparsity < 1:
        raise ValueError(f"sparsity must be a share between 0 and 1. Received: {sparsity=}")
    _require_count("steps", steps, least=1)
    every = max(1, steps // 100)
    schedule = tfmot.sparsity.keras.PolynomialDecay(0.0, sparsity, steps % every, steps, frequency=every)

    def pruned(layer, readers):
        if not _is_compressible(layer):
            return layer
        return tfmot.sparsity.keras.prune_low_magnitude(layer, schedule)

    twin = transcribe(_lowered(model, input_shape), wrap=pruned)
    for layer in twin.layers:
        if hasattr(layer, "pruning_step"):
            layer.pruning_step.assign(0)  # it counts by itself; -1 would have it wait for the library's callback
    return twin


def clustered(model, *, clusters, input_shape=None):
    """A trainable twin of a network in which each kernel but the depthwise ones has few different weights.

    Args:
        model: A functional Keras 3 model with one input, trained.
        clusters: The largest number of different values in a kernel. Kernels with no more weights stay as they are.
        input_shape: `(height, width, channels)`; needed where the model leaves a size free.

    Returns:
        A `tf_keras.Model`, not compiled. `stripped` gives back what it has learned.

    Raises:
        TypeError: If the model is not functional.
        ValueError: If an argument is out of its range, or as for `quantize_aware`.
    """
    _require_count("clusters", clusters, least=2)

    def few_valued(layer, readers):
        if not _is_compressible(layer) or layer.kernel.shape.num_elements() <= clusters:
            return layer
        return tfmot.clustering.keras.cluster_weights(layer, clusters)

    return transcribe(_lowered(model, input_shape), wrap=few_valued)


def stripped(twin, model):
    """What a `prunable` or `clustered` twin has learned, as a Keras 3 model for every export.

    Args:
        twin: The twin, fitted.
        model: The model that it was made of.

    Returns:
        The lowered `model` with the twin's weights.

    Raises:
        ValueError: If the twin was not made of this model.
    """
    lowered = lower(model, input_shape=tuple(twin.input_shape[1:]))
    _require_twin(twin, lowered)
    for layer in twin.layers:
        if hasattr(layer, "pruning_obj"):
            layer.pruning_obj.weight_mask_op()  # the last step of training moved zeros
    plain = tfmot.clustering.keras.strip_clustering(tfmot.sparsity.keras.strip_pruning(twin))
    learned = {layer.name: layer.get_weights() for layer in plain.layers if layer.trainable and layer.weights}
    for name, weights in learned.items():
        lowered.get_layer(name).set_weights(weights)
    return lowered


def scope():
    """The context in which tf_keras loads a twin of `quantize_aware` that was saved as .h5, to train on later."""
    return tfmot.quantization.keras.quantize_scope()


# Where integers are rounded.


# From the twin to the file.


def _converted(twin, input_name, output_names):
    """The file, ranges too narrow for integer kernels widened in the twin."""
    ranges = {}
    for layer in twin.layers:
        output = getattr(getattr(layer, "quantize_config", None), "output", None)
        if isinstance(output, CalibratedQuantizer):
            ranges[layer.name] = output.ranges[layer.name]

    def widen(narrow):
        for tensor, scale in narrow.items():
            for name in ranges.keys() & set(re.split("[/;]", tensor)):
                low, high = ranges[name]["min_var"], ranges[name]["max_var"]
                wider = widened({"min": low.numpy(), "max": high.numpy()}, 255 * scale)
                low.assign(wider["min"])
                high.assign(wider["max"])

    return with_float_softmax(with_wide_ranges(lambda: _once_converted(twin, input_name, output_names), widen))


def _once_converted(twin, input_name, output_names):
    """By way of a SavedModel, for the names of the signature."""
    images = tf.TensorSpec((1, *twin.input_shape[1:]), tf.float32, name=input_name)

    @tf.function(input_signature=[images])
    def serve(images):
        return dict(zip(output_names, tf.nest.flatten(twin(images, training=False)), strict=True))

    module = tf.Module()
    module.variables_read = twin.variables  # the twin itself would have each of its layers traced
    with tempfile.TemporaryDirectory() as folder:
        tf.saved_model.save(module, folder, signatures={SIGNATURE: serve})
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        converter.optimizations = [tf.lite.Optimize.DEFAULT]  # or the rounded weights would be written as floats
        return converter.convert()


# Arguments.


def _lowered(model, input_shape):
    shape = input_shape_of(functional(model), input_shape)
    if None in shape:
        raise ValueError(f"Training for export has a fixed size: give input_shape. Received: a model of {shape}")
    require_one_input(model)
    held = (part for call in calls(model) for part in parts(call.operation))
    functions = [part.name for part in held if isinstance(part, keras.layers.Lambda)]
    if functions:
        raise ValueError(
            f"A Lambda layer holds any Python: it cannot be trained here. Received: {', '.join(functions)}"
        )
    return lower(model, input_shape=shape)


def _require_twin(twin, lowered):
    inside = (getattr(layer, "layer", layer) for layer in twin.layers)
    learned = {layer.name for layer in inside if isinstance(layer, KERNELS) and layer.trainable}
    differing = learned ^ {layer.name for layer in lowered.layers if type(layer).__name__ in _KERNEL_LAYERS}
    if differing:
        raise ValueError(f"The twin was not made of {lowered.name}. They differ in {', '.join(sorted(differing))}")


_KERNEL_LAYERS = tuple(kind.__name__ for kind in KERNELS)


def _is_compressible(layer):
    return isinstance(layer, (layers.Conv2D, layers.Dense)) and layer.trainable


def _require_count(name, count, *, least):
    if type(count) is not int or count < least:
        raise ValueError(f"{name} must be an int of at least {least}. Received: {name}={count!r}")
