"""A lowered model as a tf_keras model, which tensorflow-model-optimization needs."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf
import tf_keras
from keras import activations, layers
from tf_keras import layers as legacy

from se_keras.graph import calls, endpoints
from se_keras.typing import Images, Outputs

from ..model import check_images, output_names, predict
from ..outputs import agreement

KERNELS = (legacy.Conv2D, legacy.DepthwiseConv2D, legacy.Dense)

Wrap = Callable[[Any, list[Any]], Any]  # from a layer and the layers that read its output to the layer to use instead

# Layers that are the same in Keras 3 and tf_keras, and their arguments. An activation becomes a separate layer, because
# integers are rounded before some activations and after others.
_SAME = {
    layers.Add: (),
    layers.AveragePooling2D: ("pool_size", "strides", "padding"),
    layers.Concatenate: ("axis",),
    layers.Conv2D: ("filters", "kernel_size", "strides", "padding", "dilation_rate", "groups", "use_bias"),
    layers.Dense: ("units", "use_bias"),
    layers.DepthwiseConv2D: ("kernel_size", "strides", "padding", "depth_multiplier", "dilation_rate", "use_bias"),
    layers.Flatten: (),
    layers.GlobalAveragePooling2D: ("keepdims",),
    layers.GlobalMaxPooling2D: ("keepdims",),
    layers.MaxPooling2D: ("pool_size", "strides", "padding"),
    layers.Multiply: (),
    layers.Permute: ("dims",),
    layers.ReLU: ("max_value", "negative_slope", "threshold"),
    layers.Reshape: ("target_shape",),
    layers.Softmax: ("axis",),
    layers.ZeroPadding2D: ("padding",),
}

_ACTIVATIONS = {
    activations.relu: legacy.ReLU,
    activations.relu6: partial(legacy.ReLU, 6),
    activations.sigmoid: partial(legacy.Activation, "sigmoid"),
    activations.softmax: legacy.Softmax,
    activations.tanh: partial(legacy.Activation, "tanh"),
}


def _unchanged(layer: Any, readers: list[Any]) -> Any:
    return layer


def transcribe(lowered: keras.Model, *, wrap: Wrap = _unchanged) -> tf_keras.Model:
    """Rebuilds a lowered model in tf_keras, with the same outputs, weights, and names of layers with weights.

    Layers without an integer kernel become several layers: an activation follows its kernel, and a scale and shift of
    channels (a `BatchNormalization` that was not folded, `Rescaling`, the division in `Average` and in `hard_sigmoid`)
    becomes a depthwise 1x1 convolution, which is not trained.

    Args:
        lowered: A functional model as `lower` makes it, with one input of a fixed size.
        wrap: Called with each tf_keras layer and a list of the layers that read its output, in which None stands for an
            output of the model. Returns the layer to use instead.

    Raises:
        ValueError: If layers have no counterpart or weights are not finite (the message names them), or if the outputs
            of the unwrapped model differ by more than 1e-5 of their range.
    """
    infinite = [layer.name for layer in lowered.layers if not all(np.isfinite(w).all() for w in layer.get_weights())]
    if infinite:
        raise ValueError(f"Weights must be finite. Received: NaN or infinity in {', '.join(infinite)}")
    unsupported = {call.operation.name: _kind(call.operation) for call in calls(lowered) if not _chain(call)}
    if unsupported:
        named = ", ".join(f"{name} ({kind})" for name, kind in unsupported.items())
        raise ValueError(f"Only layers with a counterpart in tf_keras can be trained there. Received: {named}")
    _require_equal(lowered, _assembled(lowered, _unchanged))
    return _assembled(lowered, wrap)


def name_of_taken(image: Any) -> str:
    """Name of the layer that takes an input, so that it can be rounded."""
    return f"{image.name}_taken"


def predict_tf_keras(tf_keras_model: Any, images: Images, *, names: Sequence[str]) -> Outputs:
    """Outputs of a tf_keras model in inference: `{name: array}`."""
    outputs = tf.nest.flatten(tf_keras_model.predict(images, batch_size=8, verbose=0))
    return dict(zip(names, outputs, strict=True))


def _assembled(lowered: keras.Model, wrap: Wrap) -> tf_keras.Model:
    graph, (inputs, outputs) = calls(lowered), endpoints(lowered)
    chains, readers = {}, defaultdict(list)
    for call in graph:
        chains.setdefault(call.operation, _chain(call))
        for x in call.input_tensors:
            readers[id(x)].append(chains[call.operation][0])
    for x in outputs:
        readers[id(x)].append(None)
    images = [tf_keras.Input(tuple(x.shape[1:]), name=x.name) for x in inputs]
    values = {}
    for x, image in zip(inputs, images, strict=True):  # the input is rounded too
        values[id(x)] = wrap(legacy.Activation("linear", name=name_of_taken(x)), readers[id(x)])(image)
    wrapped = {}  # a shared layer is wrapped once
    for call in graph:
        (output,), chain = call.output_tensors, chains[call.operation]
        arguments = [values[id(x)] for x in call.input_tensors]
        value = arguments if len(arguments) > 1 else arguments[0]
        for layer, read_by in zip(chain, [*([after] for after in chain[1:]), readers[id(output)]], strict=True):
            if layer not in wrapped:
                wrapped[layer] = wrap(layer, read_by)
            value = wrapped[layer](value)
        values[id(output)] = value
    return tf_keras.Model(images, [values[id(x)] for x in outputs], name=lowered.name)


def _chain(call: Any) -> list[Any]:
    """The sequence of tf_keras layers that computes the same as one call of a layer; empty if there is none."""
    operation, shape = call.operation, call.input_tensors[0].shape
    kind, name = type(operation), operation.name
    if getattr(operation, "data_format", "channels_last") != "channels_last" or len(call.output_tensors) != 1:
        return []
    if kind in _SAME:
        config = operation.get_config()
        layer = getattr(legacy, kind.__name__)(name=name, **{key: config[key] for key in _SAME[kind]})
        if not operation.weights:
            return [layer]
        activation = _activation(operation.activation, name, call.output_tensors[0].shape)
        return [_with_weights(layer, shape, operation.get_weights()), *activation] if activation is not None else []
    if kind is layers.Activation:
        activation = _activation(operation.activation, name, shape)
        return [legacy.Activation("linear", name=name)] if activation == [] else activation or []
    if kind is layers.Average:
        return [legacy.Add(name=name), *_per_channel(f"{name}_mean", 1 / len(call.input_tensors), 0, shape)]
    if kind is layers.Rescaling:
        return _per_channel(name, operation.scale, operation.offset, shape)
    if kind is layers.BatchNormalization and operation.axis in (-1, len(shape) - 1):
        scale = 1 / np.sqrt(np.asarray(operation.moving_variance) + operation.epsilon)
        scale = scale * np.asarray(operation.gamma) if operation.scale else scale
        shift = np.asarray(operation.beta) if operation.center else 0.0
        return _per_channel(name, scale, shift - np.asarray(operation.moving_mean) * scale, shape)
    return []


def _activation(function: Any, name: str, shape: Sequence[int | None]) -> list[Any] | None:
    """The layers that compute an activation of a tensor of `shape`; None if there are none."""
    if function is activations.linear:
        return []
    if function is activations.hard_sigmoid:  # relu6(x + 3) / 6; tf_keras has another function with this name
        shift, scale = _per_channel(f"{name}_shift", 1, 3, shape), _per_channel(f"{name}_sixth", 1 / 6, 0, shape)
        return [*shift, legacy.ReLU(6, name=f"{name}_relu6"), *scale] if shift else None
    if function not in _ACTIVATIONS:
        return None
    return [_ACTIVATIONS[function](name=f"{name}_{function.__name__}")]


def _per_channel(name: str, scale: Any, shift: Any, shape: Any) -> list[Any]:
    """x * scale + shift as a depthwise 1x1 convolution, whose integer kernels have a scale for each channel."""
    if len(shape) != 4:
        return []
    layer = legacy.DepthwiseConv2D(1, name=name, trainable=False)
    scale, shift = (np.broadcast_to(np.asarray(x, "float32"), shape[-1:]) for x in (scale, shift))
    return [_with_weights(layer, shape, [scale[None, None, :, None], shift])]


def _with_weights(layer: Any, shape: Sequence[int | None], weights: list[Any]) -> Any:
    layer.build(tuple(shape))
    layer.set_weights(weights)
    return layer


def _kind(operation: Any) -> str:
    """A layer without a counterpart, for a message."""
    activation: Any = getattr(operation, "activation", activations.linear)
    has_name = activation is not activations.linear and hasattr(activation, "__name__")
    return type(operation).__name__ + (f" with {activation.__name__}" if has_name else "")


def _require_equal(lowered: keras.Model, tf_keras_model: tf_keras.Model) -> None:
    images, names = check_images(lowered), output_names(lowered)
    result = agreement(predict(lowered, images), predict_tf_keras(tf_keras_model, images, names=names))
    # Both run the same operations in the same order. Keras fuses some of them differently, which changes about 1e-7.
    if result.max_error > 1e-5:
        raise ValueError(f"The tf_keras model disagrees with {lowered.name}: {result}")
