"""The algebra of lowering: values that a graph computes, and equations that make them cheaper.

A value is a tensor of the new graph, or a layer that is not in it yet. The layer is added when its tensor is first
used. Until then, a rewrite may change the layer or merge it into another one. Each rewrite is one equation:

- `fold`: a scale and a shift of an affine map (BatchNorm, Rescaling) make an affine map.
- `fold_gated`: a scale of a gated affine map goes into the affine map.
- `hoist_mean`: the mean over height and width commutes with a pointwise affine map.
- `compose`: two consecutive pointwise affine maps are one.
- `average`: average pooling is a depthwise convolution.
- `unshuffle`: a convolution of shuffled channels is one of the original channels, with shuffled weights.
- `absorb`: a convolution takes in a scale of each channel of its input, and without padding a shift too.
- `scale_rectified`: a scale that is not negative commutes with a ReLU.
- `largest`: the largest value that a unit can have for any image, if the weights alone bound it.
- `rectify`: a ReLU of a concatenation is a concatenation of ReLUs.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from keras import layers

from se_keras.layers import ops
from se_keras.normalization import Normalization
from se_keras.typing import Array, Json

from .copies import without_training

_LAST = "channels_last"  # whatever the default of the process is


@dataclass(frozen=True, eq=False)
class Emitted:
    """A tensor of the new graph."""

    tensor: Any


@dataclass(frozen=True, eq=False)
class Affine:
    """y = W x + b: a layer that is not in the new graph yet.

    Args:
        x: The input.
        kernel: W, in the layout of the layer.
        bias: b, one value for each output channel.
        kind: Conv2D, DepthwiseConv2D or Dense.
        config: The other arguments of the layer.
    """

    x: "Value"
    kernel: Array
    bias: Array
    kind: type[layers.Layer]
    config: Json

    @cached_property
    def tensor(self) -> Any:
        """The output of the layer, which is added to the new graph."""
        layer = self.kind.from_config({**self.config, "use_bias": True, "dtype": "float32"})
        y = layer(self.x.tensor)
        layer.set_weights([self.kernel, self.bias])
        return y

    @property
    def is_pointwise(self) -> bool:
        """Whether each position of y depends only on the same position of x."""
        one = (1, 1)
        return self.kind is layers.Dense or (
            self.kind is layers.Conv2D and self.config["kernel_size"] == one and self.config["strides"] == one
        )

    @property
    def is_channelwise(self) -> bool:
        """Whether y = s x + t, with a scale and a shift of each channel."""
        return self.kind is layers.DepthwiseConv2D and self.kernel.shape[:2] + self.kernel.shape[3:] == (1, 1, 1)

    @property
    def matrix(self) -> Array:
        """W of a pointwise map, `(inputs, outputs)`; block-diagonal if the convolution is grouped."""
        blocks = np.split(self.kernel.reshape(self.kernel.shape[-2:]), self.config.get("groups", 1), axis=1)
        zero = np.zeros_like(blocks[0])
        return np.block([[block if i == j else zero for j, block in enumerate(blocks)] for i in range(len(blocks))])


@dataclass(frozen=True, eq=False)
class Gated:
    """y = x g: the product at the end of a SqueezeExcite."""

    x: "Value"
    gate: "Value"
    name: str

    @cached_property
    def tensor(self) -> Any:
        """The product."""
        return layers.Multiply(name=self.name, dtype="float32")([self.x.tensor, self.gate.tensor])


@dataclass(frozen=True, eq=False)
class Shuffled:
    """y: the channels of x, interleaved over groups. Channel c of y is channel `order[c]` of x."""

    x: "Value"
    groups: int
    channels: int
    name: str

    @property
    def order(self) -> Array:
        """Where each channel comes from: the first of each group, then the second of each group, and so on."""
        return np.arange(self.channels).reshape(self.groups, -1).T.ravel()

    @cached_property
    def tensor(self) -> Any:
        """The shuffled tensor: by layers if the size is fixed, by an index if it is free."""
        x, name = self.x.tensor, self.name
        _, height, width, channels = x.shape
        if None in (height, width):
            return ops.take(x, self.order.tolist(), axis=-1)
        grouped = (height * width, self.groups, channels // self.groups)
        x = layers.Reshape(grouped, name=f"{name}_apart", dtype="float32")(x)
        x = layers.Permute((1, 3, 2), name=f"{name}_turned", dtype="float32")(x)
        return layers.Reshape((height, width, channels), name=name, dtype="float32")(x)


@dataclass(frozen=True, eq=False)
class Concatenated:
    """Concatenated values, by a layer that is not in the new graph yet."""

    parts: tuple["Value", ...]
    layer: layers.Concatenate

    @cached_property
    def tensor(self) -> Any:
        """The concatenation."""
        return self.layer([part.tensor for part in self.parts])


@dataclass(frozen=True, eq=False)
class Rectified:
    """y = max(x, 0), by a layer that is not in the new graph yet."""

    x: "Value"
    layer: layers.Layer

    @cached_property
    def tensor(self) -> Any:
        """The rectified tensor."""
        return self.layer(self.x.tensor)


Value = Emitted | Affine | Gated | Shuffled | Concatenated | Rectified


def own_affine(value: Gated | Rectified, shared: Collection[Value]) -> Affine | None:
    """Its x, if that is affine and nothing else uses it. `shared` are the values that several layers use."""
    x = value.x
    return x if isinstance(x, Affine) and x not in shared and not is_emitted(x) else None


def is_emitted(value: Value) -> bool:
    """Whether the tensor of a value is in the new graph. A layer that was merged into another one is never emitted."""
    return "tensor" in vars(value)


def fold(affine: Affine, scale: Array, shift: Array | float) -> Affine:
    """s (W x + b) + t = (s W) x + (s b + t), for a scale s and a shift t of each output channel."""
    # A depthwise kernel has its output channels in its last two axes, every other kernel in its last one.
    scale = np.broadcast_to(scale, affine.bias.shape)
    per_channel = scale.reshape(affine.kernel.shape[-2:]) if affine.kind is layers.DepthwiseConv2D else scale
    return replace(affine, kernel=affine.kernel * per_channel, bias=affine.bias * scale + shift)


def fold_gated(affine: Affine, gated: Gated, scale: Array) -> Gated:
    """s ((W x + b) g) = (s (W x + b)) g, if only the product uses W x + b, as after `hoist_mean`."""
    return replace(gated, x=fold(affine, scale, 0.0))


def scale_rectified(rectified: Rectified, affine: Affine, scale: Array) -> Rectified:
    """s max(W x + b, 0) = max(s (W x + b), 0) for s >= 0, if only the ReLU uses W x + b."""
    return replace(rectified, x=fold(affine, scale, 0.0))


def largest(value: Value, matrix: Array, bias: Array, *, squeeze: str) -> Array:
    """An upper bound of M s + c for the squeeze s of any image, by unit: infinite where the weights do not bound it.

    For s >= 0, a unit whose weights are all at most 0 is at most c. If x = W y + b with y >= 0, the same holds for the
    mean or a position of x, with the weights W M and the bias b M + c: a padded border adds nothing. It does not hold
    for the maximum.
    """
    if isinstance(value, Affine) and squeeze != "max" and value.kind is layers.Conv2D and not _is_grouped(value):
        value, matrix, bias = value.x, (value.kernel @ matrix).reshape(-1, len(bias)), value.bias @ matrix + bias
    weights = matrix if isinstance(value, Rectified) else np.abs(matrix)
    return np.where((weights <= 0).all(axis=0), bias, np.inf)


def _is_grouped(affine):
    return affine.config.get("groups", 1) > 1


def scaled(x: Value, scale: Array, *, name: str) -> Affine:
    """s x, with a scale of each channel, as a depthwise convolution of one position, which `absorb` can take in."""
    config = {"kernel_size": (1, 1), "strides": (1, 1), "padding": "valid", "name": name}
    kernel = np.asarray(scale, "float64").reshape(1, 1, -1, 1)
    return Affine(x, kernel, np.zeros(kernel.shape[2]), layers.DepthwiseConv2D, without_training(config))


def hoist_mean(value: Value, *, name: str) -> Value:
    """mean(W x + b) = W mean(x) + b: the mean over height and width moves before a pointwise affine map.

    The mean then reads x instead of y: a quarter of the elements in a bottleneck. Only the multiplication still reads
    y, and can be done in place. Where there is an `obstacle`, the mean stays.
    """
    pool = layers.GlobalAveragePooling2D(_LAST, keepdims=True, name=name, dtype="float32")
    if isinstance(value, Affine) and obstacle(value) is None:
        return fully_connected(Emitted(pool(value.x.tensor)), value.matrix, value.bias, name=f"{name}_affine")
    return Emitted(pool(value.tensor))


def obstacle(value: Value) -> str | None:
    """Why the mean of a value is not hoisted: what its SqueezeExcite is; None if it is hoisted."""
    if not isinstance(value, Affine) or not value.is_pointwise:
        return "not directly after a 1x1 convolution of stride 1"
    inputs, outputs = value.matrix.shape
    return "after a convolution with fewer outputs than inputs" if inputs > outputs else None


def normalized(x: Value, normalization: Normalization, *, channels: int, name: str) -> Affine:
    """(x - mean) / std = x / std - mean / std, of each channel, as a depthwise convolution of one position."""
    mean, std = (np.broadcast_to(values, channels) for values in normalization)
    return replace(scaled(x, 1 / std, name=name), bias=-mean / std)


def absorb(convolution: Affine, first: Affine) -> Affine:
    """W (s x + t) + b = (W s) x + (b + sum of W t): a convolution takes in a scale and a shift of its input.

    Only without padding, which adds zeros after the shift and not before it, or without a shift.
    """
    scale, shift = first.kernel.reshape(-1, 1), first.bias
    bias = convolution.bias + np.einsum("hwio,i->o", convolution.kernel, shift)
    return replace(convolution, x=first.x, kernel=convolution.kernel * scale, bias=bias)


def compose(first: Affine, second: Affine) -> Affine:
    """V (W x + b) + c = (V W) x + (V b + c): two consecutive pointwise affine maps are one."""
    kernel = (first.matrix @ second.matrix)[None, None]
    return replace(second, x=first.x, kernel=kernel, bias=first.bias @ second.matrix + second.bias)


def fully_connected(x: Value, matrix: Array, bias: Array, *, name: str, activation: str = "linear") -> Affine:
    """act(x W + b) at each position, as a 1x1 convolution, for which every runtime has a fast kernel."""
    config = {"filters": matrix.shape[1], "kernel_size": (1, 1), "strides": (1, 1)}
    config |= {"data_format": _LAST, "activation": activation}
    return Affine(x, matrix[None, None], bias, layers.Conv2D, without_training(config | {"name": name}))


def max_squeeze(x: Any, *, name: str) -> Any:
    """The maximum over height and width, as pooling with one window, which XNNPACK computes in int8 too."""
    _, height, width, _ = x.shape
    if None in (height, width):
        return layers.GlobalMaxPooling2D(_LAST, keepdims=True, name=name, dtype="float32")(x)
    return layers.MaxPooling2D((height, width), data_format=_LAST, name=name, dtype="float32")(x)


def average(value: Value, pool: layers.AveragePooling2D, *, name: str) -> Affine:
    """mean over k positions of x = sum of x / k: average pooling is a depthwise convolution with 1 / k everywhere.

    Only without padding: at a padded border, the mean is over fewer positions. In int8, XNNPACK has a kernel for the
    convolution, but none for the pooling.
    """
    channels = value.tensor.shape[-1]
    kernel = np.full((*pool.pool_size, channels, 1), 1 / np.prod(pool.pool_size))
    config = {"kernel_size": pool.pool_size, "strides": pool.strides, "padding": "valid"}
    config |= {"data_format": _LAST, "name": name}
    return Affine(value, kernel, np.zeros(channels), layers.DepthwiseConv2D, without_training(config))


def unshuffle(convolution: Affine, shuffled: Shuffled) -> Affine | Shuffled:
    """sum_c W_c x_order(c) = sum_d W_inverse(d) x_d: a convolution absorbs the shuffle of its input.

    A convolution that reads all channels absorbs it into its weights. A depthwise convolution computes the channels in
    the order of x, and the shuffle moves after it, where there may be fewer positions. A grouped convolution needs the
    channels of each group next to each other: the shuffle stays.
    """
    groups, inverse = convolution.config.get("groups", 1), np.argsort(shuffled.order)
    if convolution.kind is layers.DepthwiseConv2D and convolution.kernel.shape[-1] == 1:
        kernel, bias = convolution.kernel[:, :, inverse], convolution.bias[inverse]
        return replace(shuffled, x=replace(convolution, x=shuffled.x, kernel=kernel, bias=bias))
    if convolution.kind is layers.DepthwiseConv2D or groups > 1:
        return convolution
    return replace(convolution, x=shuffled.x, kernel=np.take(convolution.kernel, inverse, axis=-2))


def rectify(concatenated: Concatenated, *, name: str) -> Concatenated:
    """max([x, y], 0) = [max(x, 0), max(y, 0)]: each part is rectified by the layer that computes it.

    XNNPACK has no int8 kernel for a ReLU that is not part of another layer.
    """
    rectified = [
        Emitted(layers.ReLU(name=f"{name}_{number}", dtype="float32")(part.tensor))
        for number, part in enumerate(concatenated.parts, start=1)
    ]
    return replace(concatenated, parts=tuple(rectified))
