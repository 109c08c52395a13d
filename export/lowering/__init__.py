"""Lowering: from a trained functional model to an equal model of stock Keras layers that is cheaper to run.

The layers are visited once, in order. `_REWRITES` has the function that rewrites each type of layer, by the equations
in algebra.py; all other layers are copied.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import keras
import numpy as np
from keras import layers

from se_keras.errors import first_line
from se_keras.graph import calls, endpoints, input_shape_of, parts, producer, structures
from se_keras.layers import ChannelShuffle, ShakeShake, SqueezeExcite, ops
from se_keras.normalization import Normalization
from se_keras.typing import Array, Json
from se_keras.wording import counted

from . import algebra, copies
from .algebra import Affine, Concatenated, Emitted, Gated, Rectified, Shuffled, Value

# Layers that return their input in inference.
_IDENTITIES = (
    layers.ActivityRegularization,
    layers.AlphaDropout,
    layers.Dropout,
    layers.GaussianDropout,
    layers.GaussianNoise,
    layers.Identity,
    layers.SpatialDropout1D,
    layers.SpatialDropout2D,
    layers.SpatialDropout3D,
)
_CLOSED = "no unit of its bottleneck can open"  # for any image
_OURS = (SqueezeExcite, ChannelShuffle, ShakeShake)


@dataclass(frozen=True, kw_only=True)
class Lowering:
    """What `lower` did.

    Args:
        hoisted: Names of the SqueezeExcite layers whose squeeze was moved before the previous convolution. A copy of
            this convolution was then composed with their first fully connected layer.
        unhoisted: Names of the other SqueezeExcite layers.
        folded: Names of the BatchNormalization and Rescaling layers that were folded into the previous layer.
        dropped: Names of the layers that do nothing in inference.
        reasons: For each name in `unhoisted`, why: `"not directly after a 1x1 convolution of stride 1"`.
        constant: Names of the SqueezeExcite layers whose gate is the same for every image, by their weights alone, and
            why. They became a scale of each channel, which is a part of another layer where that is equal.
        counterparts: `{layer of the model: layer of the lowered model with the same output}`, by name, in order.
    """

    hoisted: tuple[str, ...]
    unhoisted: tuple[str, ...]
    folded: tuple[str, ...]
    dropped: tuple[str, ...]
    reasons: dict[str, str] = field(default_factory=dict, repr=False)
    constant: dict[str, str] = field(default_factory=dict, repr=False)
    counterparts: dict[str, str] = field(default_factory=dict, repr=False)

    def counts(self) -> Json:
        """How many layers of each kind and, by reason, how many squeezes were not hoisted, for the manifest."""
        kinds = ("hoisted", "unhoisted", "constant", "folded", "dropped")
        return {kind: len(getattr(self, kind)) for kind in kinds} | {"reasons": dict(Counter(self.reasons.values()))}

    def __str__(self) -> str:
        return summary(self.counts())


def summary(counts: Json) -> str:
    """The counts of a `Lowering` in words. Manifests before version 0.2.0 have no reasons, later ones no constants."""
    squeezes = counted(counts["hoisted"] + counts["unhoisted"], "squeeze")
    reasons = ", ".join(f"{number} {reason}" for reason, number in counts.get("reasons", {}).items())
    constant = f"{counted(counts['constant'], 'gate')} constant, " if counts.get("constant") else ""
    return (
        f"{counts['hoisted']} of {squeezes} hoisted{reasons and f' ({reasons})'}, {constant}"
        f"{counted(counts['folded'], 'layer')} folded into others, {counts['dropped']} dropped"
    )


def lower(
    model: keras.Model, *, input_shape: Sequence[int] | None = None, normalization: Normalization | None = None
) -> keras.Model:
    """Rewrites a functional model as an equal, cheaper one of stock Keras layers: folds layers, and hoists squeezes.

    Args:
        model: Any functional or Sequential Keras model. Models inside it are inlined, and the names of their layers get
            the name of their model as a prefix.
        input_shape: `(height, width, channels)` of the new model, which then has one input. Default: `model`'s.
        normalization: Becomes a part of the new model, which then takes pixels: of its first convolution if that does
            not pad, else a layer of its own, `normalized_pixels`.

    Returns:
        A new float32 `keras.Model` for inference, with the same inputs and outputs to about 1e-6 of their range. It
        loads without se_keras, and contains the functions of your own, such as those of `Lambda` layers, as they are.
        Weights of LoRA are added to those that they adapt. Its attribute `lowering` is a `Lowering`. `model` is not
        changed.

    Raises:
        TypeError: If `model` is not functional.
        ValueError: If a layer is neither from Keras nor from se_keras, is quantized, or cannot be copied, or if the
            model does not take `input_shape`.

    Example:

    ```python
    lowered = se_keras.export.lower(model)
    print(lowered.lowering)  # 16 of 16 squeezes hoisted, 53 layers folded into others, 0 dropped
    ```
    """
    unsupported = sorted(_unsupported(model))
    if unsupported:
        raise ValueError(f"lower takes float layers of Keras and of se_keras. Received: {', '.join(unsupported)}")
    shape = None if input_shape is None else input_shape_of(model, input_shape)
    rewriter = _Rewriter(_REWRITES)
    try:
        lowered = rewriter.rewritten(model, shape, normalization)
    except ValueError as error:
        if shape is None:
            raise
        raise ValueError(f"{model.name} does not take input_shape={shape}: {first_line(error)}") from error
    lowered.lowering = Lowering(
        **{kind: tuple(found) for kind, found in rewriter.log.items()},
        unhoisted=tuple(rewriter.reasons),
        reasons=rewriter.reasons,
        constant=rewriter.constant,
        counterparts={name: producer(y.tensor).name for name, y in rewriter.outputs if algebra.is_emitted(y)},
    )
    return lowered


def in_float32(model: keras.Model) -> keras.Model:
    """The model that computes in float32 with the weights of a functional model: this model itself, if it does.

    Raises:
        TypeError: If a model inside is not functional.
        ValueError: If a layer cannot be copied.
    """
    return model if copies.computes_in_float32(model) else _Rewriter({}).rewritten(model)


class _Rewriter:
    """Rewrites a graph: from the values of its inputs to the values of its outputs.

    Args:
        rewrites: How each type of layer is rewritten. All others are copied.
    """

    def __init__(self, rewrites: Mapping[type, Callable[..., Value | None]]):
        self._rewrites = rewrites
        self.log: dict[str, list[str]] = {"hoisted": [], "folded": [], "dropped": []}
        self.reasons: dict[str, str] = {}  # why a squeeze is not hoisted, by the name of its layer
        self.constant: dict[str, str] = {}  # why a gate is the same for every image, by the name of its layer
        self.outputs: list[tuple[str, Value]] = []  # by layer, of the outermost model's layers with one output
        self._names = Counter()
        self._copies = {}
        self._shared: set[Value] = set()  # values that are used several times, by layers or as outputs

    def rewritten(
        self,
        model: keras.Model,
        shape: tuple[int | None, ...] | None = None,
        normalization: Normalization | None = None,
    ) -> keras.Model:
        """The new model: with an input of this shape, which is normalized in the model, if they are not None."""
        inputs = {id(x): _like(x, shape) for x in endpoints(model)[0]}
        input_structure, output_structure = structures(model)
        values = self.add(model, {key: _first(x, normalization) for key, x in inputs.items()})
        outputs = keras.tree.map_structure(lambda x: values[id(x)].tensor, output_structure)
        return keras.Model(keras.tree.map_structure(lambda x: inputs[id(x)], input_structure), outputs, name=model.name)

    def add(self, model: keras.Model, values: dict[int, Value], prefix: str = "") -> dict[int, Value]:
        """Adds the values of all tensors of `model` to `values` of its inputs, `{id(tensor): value}`."""
        graph, outputs = calls(model), endpoints(model)[1]
        readers = Counter(id(x) for call in graph for x in call.input_tensors) + Counter(map(id, outputs))
        for call in graph:
            self._shared |= {values[id(x)] for x in call.input_tensors if readers[id(x)] > 1}
            results = self._call(call, values, prefix + call.operation.name)
            values |= {id(x): result for x, result in zip(call.output_tensors, results, strict=True)}
            if not prefix and len(results) == 1:
                self.outputs.append((call.operation.name, results[0]))
        return values

    def _call(self, call: Any, values: dict[int, Value], name: str) -> list[Value]:
        """The values of the outputs of one call of a layer."""
        operation, inputs = call.operation, [values[id(x)] for x in call.input_tensors]
        if isinstance(operation, keras.Model):
            return self._inlined(operation, inputs, name)
        rewrite = self._rewrites.get(type(operation))
        if rewrite and not call.arguments.kwargs.get("training"):
            if (value := rewrite(self, operation, call, inputs, name)) is not None:
                return [value]
        tensors = {id(x): value.tensor for x, value in zip(call.input_tensors, inputs, strict=True)}
        args, kwargs = call.arguments.fill_in(tensors)
        return [Emitted(x) for x in keras.tree.flatten(self._copy(operation, name)(*args, **kwargs))]

    def _inlined(self, model: keras.Model, inputs: list[Value], name: str) -> list[Value]:
        """The values of the outputs of a model inside the model."""
        tensors, outputs = endpoints(model)
        values = self.add(model, {id(x): value for x, value in zip(tensors, inputs, strict=True)}, prefix=f"{name}_")
        results = [values[id(x)] for x in outputs]
        self._shared |= {result for result, times in Counter(results).items() if times > 1}
        return results

    # The functions of `_REWRITES`: the value of a layer's output, or None if the layer is copied.

    def _identity(self, layer, call, inputs, name):
        self.log["dropped"].append(name)
        return inputs[0]

    def _affine(self, layer, call, inputs, name):
        (x,) = inputs
        if not _is_plain(layer):
            return None
        kernel = _values(layer.kernel)
        outputs = kernel.shape[-2:] if isinstance(layer, layers.DepthwiseConv2D) else kernel.shape[-1:]
        bias = _values(layer.bias) if layer.use_bias else np.zeros(int(np.prod(outputs)))
        config = copies.without_training(copies.arguments_of(layer)) | {"name": self._name(name)}
        affine = Affine(x, kernel, bias, type(layer), config)
        if isinstance(x, Affine) and x.is_channelwise and x not in self._shared and _is_absorbing(layer, x):
            return algebra.absorb(affine, x)
        return algebra.unshuffle(affine, x) if isinstance(x, Shuffled) and x not in self._shared else affine

    def _average_pooling(self, layer, call, inputs, name):
        # TensorFlow's depthwise convolution needs equal strides.
        if _is_plain(layer) and layer.padding == "valid" and layer.strides[0] == layer.strides[1]:
            return algebra.average(inputs[0], layer, name=self._name(name))

    def _concatenate(self, layer, call, inputs, name):
        return Concatenated(tuple(inputs), self._copy(layer, name))

    def _relu(self, layer, call, inputs, name):
        (x,) = inputs
        if not _is_relu(layer):
            return None
        if isinstance(x, Concatenated) and x not in self._shared:
            return algebra.rectify(x, name=self._name(name))
        return Rectified(x, self._copy(layer, name))

    def _batch_norm(self, layer, call, inputs, name):
        (x,) = inputs
        if x in self._shared or not _reads_last_axis(layer, call):
            return None
        scale, shift = _scale_and_shift(layer)
        folded = None
        if isinstance(x, Affine):
            folded = algebra.fold(x, scale, shift)
        elif isinstance(x, Shuffled) and isinstance(x.x, Affine) and x.x not in self._shared:
            inverse = np.argsort(x.order)
            folded = replace(x, x=algebra.fold(x.x, scale[inverse], shift[inverse]))
        self.log["folded"] += [name] * (folded is not None)
        return folded

    def _rescaling(self, layer, call, inputs, name):
        (x,) = inputs
        scale, shift = np.asarray(layer.scale, "float64"), np.asarray(layer.offset, "float64")
        if np.any(shift):
            folded = algebra.fold(x, scale, shift) if isinstance(x, Affine) and x not in self._shared else None
        else:
            folded = self._scaled(x, scale)
        self.log["folded"] += [name] * (folded is not None)
        if folded is None and scale.ndim == 1 and not np.any(shift):
            return self._constant(x, scale, self._name(name))
        return folded

    def _constant(self, x: Value, scale: Array, name: str) -> Value:
        """The value of s x, for a scale of each channel: a layer of its own, if it does not go into another one."""
        folded = self._scaled(x, scale)
        return algebra.scaled(x, scale, name=name) if folded is None else folded

    def _scaled(self, x: Value, scale: Array) -> Value | None:
        """The value of s x, if the scale goes into what computes x and nothing else reads that."""
        if x in self._shared:
            return None
        if isinstance(x, Affine):
            return algebra.fold(x, scale, 0.0)
        if not isinstance(x, (Gated, Rectified)):
            return None
        affine = algebra.own_affine(x, self._shared)
        if isinstance(x, Gated):
            return affine and algebra.fold_gated(affine, x, scale)
        return affine and algebra.scale_rectified(x, affine, scale) if (scale >= 0).all() else None

    def _channel_shuffle(self, layer, call, inputs, name):
        channels = call.input_tensors[0].shape[-1]
        return inputs[0] if layer.groups == 1 else Shuffled(inputs[0], layer.groups, channels, self._name(name))

    def _shake_shake(self, layer, call, inputs, name):
        mean = layers.Average(name=self._name(name), dtype="float32")
        return Emitted(mean([x.tensor for x in inputs]))

    def _squeeze_excite(self, layer, call, inputs, name):
        """x * gate(x): a squeeze, two 1x1 convolutions and a multiplication; a scale where the gate is constant."""
        (x,), name = inputs, self._name(name)
        w1, w2 = _values(layer.reduce_kernel), _values(layer.expand_kernel)
        b1, b2 = np.zeros(w1.shape[1]), np.zeros(w2.shape[1])
        if layer.bias:
            b1, b2 = _values(layer.reduce_bias), _values(layer.expand_bias)
        w2 = np.where(algebra.largest(x, w1, b1, squeeze=layer.squeeze)[:, None] <= 0, 0.0, w2)
        if not w2.any():
            self.constant[name] = "its second layer is zero" if not _values(layer.expand_kernel).any() else _CLOSED
            return self._constant(x, _activated(b2, layer.excitation), f"{name}_scale")
        squeezed = x
        if layer.squeeze == "avg":
            squeezed = algebra.hoist_mean(x, name=f"{name}_squeeze")
        elif layer.squeeze == "max":
            squeezed = Emitted(algebra.max_squeeze(x.tensor, name=f"{name}_squeeze"))
        reduce = algebra.fully_connected(squeezed, w1, b1, name=f"{name}_reduce", activation="relu")
        reason = algebra.obstacle(x) if layer.squeeze == "avg" else f"with squeeze={layer.squeeze!r}"
        if isinstance(squeezed, Affine) and reason is None:
            reduce = algebra.compose(squeezed, reduce)
            self.log["hoisted"].append(name)
        else:
            self.reasons[name] = str(reason)
        expand = algebra.fully_connected(reduce, w2, b2, name=f"{name}_expand", activation=layer.excitation)
        return Gated(x, expand, f"{name}_scale")

    def _copy(self, operation, name):
        """A copy of a layer or operation: one for all calls of a shared layer."""
        if operation not in self._copies:
            self._copies[operation] = copies.copied(operation, name=self._name(name))
        return self._copies[operation]

    def _name(self, name):
        """`name`, with a number if it is taken: inlined models and shared layers repeat names."""
        self._names[name] += 1
        return name if self._names[name] == 1 else f"{name}_{self._names[name]}"


# How each type of layer is rewritten. All others are copied.
_REWRITES: dict[type, Callable[..., Value | None]] = {
    **dict.fromkeys(_IDENTITIES, _Rewriter._identity),
    layers.Conv2D: _Rewriter._affine,
    layers.DepthwiseConv2D: _Rewriter._affine,
    layers.Dense: _Rewriter._affine,
    layers.AveragePooling2D: _Rewriter._average_pooling,
    layers.Concatenate: _Rewriter._concatenate,
    layers.ReLU: _Rewriter._relu,
    layers.Activation: _Rewriter._relu,
    layers.BatchNormalization: _Rewriter._batch_norm,
    layers.Rescaling: _Rewriter._rescaling,
    ChannelShuffle: _Rewriter._channel_shuffle,
    ShakeShake: _Rewriter._shake_shake,
    SqueezeExcite: _Rewriter._squeeze_excite,
}


def _is_plain(layer):
    """Whether a layer is channels-last and has no activation."""
    channels_last = getattr(layer, "data_format", "channels_last") == "channels_last"
    return channels_last and getattr(layer, "activation", keras.activations.linear) is keras.activations.linear


def _is_relu(layer):
    if type(layer) is layers.ReLU:
        return layer.max_value is None and not layer.negative_slope and not layer.threshold
    return type(layer) is layers.Activation and layer.activation is keras.activations.relu


def _scale_and_shift(batchnorm):
    """s = gamma / sqrt(variance + epsilon) and t = beta - s mean: a BatchNorm computes s y + t."""
    scale = 1 / np.sqrt(_values(batchnorm.moving_variance) + batchnorm.epsilon)
    scale = scale * _values(batchnorm.gamma) if batchnorm.scale else scale
    shift = _values(batchnorm.beta) if batchnorm.center else 0.0
    return scale, shift - scale * _values(batchnorm.moving_mean)


def _reads_last_axis(batchnorm, call):
    return batchnorm.axis in (-1, len(call.input_tensors[0].shape) - 1)


def _values(weight):
    """In float64, so that folding rounds only once, at the end."""
    return ops.convert_to_numpy(weight).astype("float64")


def _activated(values, activation):
    """The values after an activation, in float64."""
    return ops.convert_to_numpy(getattr(keras.activations, activation)(ops.convert_to_tensor(values, "float64")))


def _first(x, normalization):
    """The value of an input: its tensor, or the tensor normalized."""
    if normalization is None:
        return Emitted(x)
    return algebra.normalized(Emitted(x), normalization, channels=x.shape[-1], name="normalized_pixels")


def _is_absorbing(layer, first):
    return type(layer) is layers.Conv2D and layer.groups == 1 and (layer.padding == "valid" or not first.bias.any())


def _like(x, input_shape):
    dtype = "float32" if x.dtype in ("float16", "bfloat16") else x.dtype
    shape = x.shape if input_shape is None else (x.shape[0], *input_shape)
    return keras.Input(batch_shape=shape, dtype=dtype, name=x.name)


def _unsupported(model):
    """The layers without a float32 counterpart in Keras, with the reason."""
    for call in calls(model):
        operation = call.operation
        if isinstance(operation, keras.Model):
            yield from _unsupported(operation)
        elif type(operation) is ShakeShake and call.arguments.kwargs.get("training"):
            yield f"{operation.name} (training=True)"
        elif type(operation) not in _OURS:
            foreign = {type(part).__name__ for part in parts(operation) if not _is_stock(type(part))}
            if mode := getattr(operation, "quantization_mode", None):
                foreign.add(f"quantized to {mode}")
            yield from (f"{operation.name} ({reason})" for reason in foreign)


def _is_stock(definition: type) -> bool:
    return definition.__module__.split(".")[0] == "keras"
