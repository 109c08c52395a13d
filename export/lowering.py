"""Lowering: a trained functional model becomes an equal one of stock Keras layers that is cheaper to run.

The graph is walked once, in order. What is met is not put into the new graph at once but kept as a value, because what
follows may change it: BatchNorm scales the W of an `Affine` value, y = W x + b, and a squeeze does not need y at all.
Whoever needs the tensor itself asks for it. Each rewrite is a small function of such values:

- `fold`: a scale and a shift behind an affine map (BatchNorm, Rescaling) make an affine map.
- `fold_behind_gate`: a scale behind the gate of an affine map, likewise.
- `hoist_mean`: the mean over height and width commutes with a pointwise affine map.
- `compose`: two pointwise affine maps in a row are one.
- `average`: average pooling is a depthwise convolution.
- `unshuffle`: a convolution of shuffled channels is one of the channels as they were, with shuffled weights.
- `rectify`: what rectifies a concatenation rectifies its parts.
"""

import inspect
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property

import keras
import numpy as np
from keras import layers

from se_keras.errors import first_line
from se_keras.graph import calls, endpoints, input_shape_of, parts, producer, structures
from se_keras.layers import ChannelShuffle, ShakeShake, SqueezeExcite

# Layers that pass their input through in inference.
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
OURS = (SqueezeExcite, ChannelShuffle, ShakeShake)


@dataclass(frozen=True, kw_only=True)
class Lowering:
    """What `lower` did.

    Args:
        hoisted: Names of the SqueezeExcite layers whose squeeze reads the input of the convolution in front of them,
            and whose first fully connected layer took that convolution in.
        unhoisted: Those whose squeeze stands where it was: no affine 1x1 convolution in front of it.
        folded: Names of the BatchNormalization and Rescaling layers that went into the layer in front of them.
        dropped: Names of the layers that do nothing in inference.
        counterparts: `{layer of the model: layer of the lowered model with the same output}`, by name, in order.
    """

    hoisted: tuple[str, ...]
    unhoisted: tuple[str, ...]
    folded: tuple[str, ...]
    dropped: tuple[str, ...]
    counterparts: dict[str, str] = field(default_factory=dict, repr=False)

    def counts(self) -> dict[str, int]:
        """How many layers of each kind, for the manifest."""
        kinds = ("hoisted", "unhoisted", "folded", "dropped")
        return {kind: len(getattr(self, kind)) for kind in kinds}

    def __str__(self) -> str:
        return (
            f"{len(self.hoisted)} of {len(self.hoisted) + len(self.unhoisted)} squeezes hoisted, "
            f"{len(self.folded)} layers folded into others, {len(self.dropped)} dropped"
        )


def lower(model, *, input_shape=None):
    """Turns a functional model into an equal one of stock Keras layers: folded, its squeezes hoisted where they can be.

    Args:
        model: Any functional or Sequential Keras model; models inside it are inlined, their layers' names prefixed.
        input_shape: `(height, width, channels)` to fix in the new model, which has one input then. Default: `model`'s.

    Returns:
        A new float32 `keras.Model` for inference, with the same inputs and outputs to about 1e-6 of their range. It
        loads without se_keras. Its attribute `lowering` is a `Lowering`: what was done. `model` stays as it was.

    Raises:
        TypeError: If `model` is not functional.
        ValueError: If it has layers that are neither Keras' own nor of se_keras, the message names them; or if it does
            not take `input_shape`.

    Example:

    ```python
    lowered = se_keras.export.lower(model)
    print(lowered.lowering)  # 16 of 16 squeezes hoisted, 53 layers folded into others, 0 dropped
    ```
    """
    unsupported = sorted(_unsupported(model))
    if unsupported:
        raise ValueError(f"lower takes float layers of Keras' own and of se_keras. Received: {', '.join(unsupported)}")
    if input_shape is not None:
        input_shape = input_shape_of(model, input_shape)
    walk = _Walk()
    inputs = {id(x): _like(x, input_shape) for x in endpoints(model)[0]}
    taken, given = structures(model)
    try:
        values = walk.model(model, {key: Emitted(x) for key, x in inputs.items()})
        outputs = keras.tree.map_structure(lambda x: values[id(x)].tensor, given)
    except ValueError as error:
        if input_shape is None:
            raise
        raise ValueError(f"{model.name} does not take {input_shape=}: {first_line(error)}") from error
    lowered = keras.Model(keras.tree.map_structure(lambda x: inputs[id(x)], taken), outputs, name=model.name)
    lowered.lowering = Lowering(
        **{kind: tuple(found) for kind, found in walk.log.items()},
        counterparts={name: producer(y.tensor).name for name, y in walk.outputs if _is_emitted(y)},
    )
    return lowered


@dataclass(frozen=True, eq=False)
class Emitted:
    """A tensor of the new graph."""

    tensor: keras.KerasTensor


@dataclass(frozen=True, eq=False)
class Affine:
    """y = W x + b: a layer that is not in the new graph yet.

    Args:
        x: The value that it reads.
        kernel: W, as its kind of layer has it.
        bias: b, one for each output channel.
        kind: Conv2D, DepthwiseConv2D or Dense.
        config: The other arguments of the layer.
    """

    x: "Value"
    kernel: np.ndarray
    bias: np.ndarray
    kind: type
    config: dict

    @cached_property
    def tensor(self):
        """The output of the layer, which the first to ask for it puts into the new graph."""
        layer = self.kind.from_config({**self.config, "use_bias": True, "dtype": "float32"})
        y = layer(self.x.tensor)
        layer.set_weights([self.kernel, self.bias])
        return y

    @property
    def is_pointwise(self):
        """Whether each position of y reads one position of x: its own."""
        one = (1, 1)
        return self.kind is layers.Dense or (
            self.kind is layers.Conv2D and self.config["kernel_size"] == one and self.config["strides"] == one
        )

    @property
    def matrix(self):
        """W of a pointwise map, `(inputs, outputs)`; a grouped convolution's is block-diagonal."""
        kernel = self.kernel.reshape(self.kernel.shape[-2:])
        groups = self.config.get("groups", 1)
        blocks = np.split(kernel, groups, axis=1)
        rows = [[block if row == column else np.zeros_like(block) for column, block in enumerate(blocks)]
                for row in range(groups)]  # fmt: skip
        return np.block(rows)


@dataclass(frozen=True, eq=False)
class Gated:
    """y = x g: the product with which a SqueezeExcite ends."""

    x: "Value"
    gate: "Value"
    name: str

    def reads_alone(self, shared):
        """Whether x is affine and has no other reader: none in the model, and no squeeze."""
        return isinstance(self.x, Affine) and self.x not in shared and not _is_emitted(self.x)

    @cached_property
    def tensor(self):
        """The product."""
        return layers.Multiply(name=self.name, dtype="float32")([self.x.tensor, self.gate.tensor])


@dataclass(frozen=True, eq=False)
class Shuffled:
    """Channels of x spread over groups: channel c of y is channel `order[c]` of x."""

    x: "Value"
    groups: int
    channels: int
    name: str

    @property
    def order(self):
        """Where each channel comes from: the first of each group, then the second of each, and so on."""
        return np.arange(self.channels).reshape(self.groups, -1).T.ravel()

    @cached_property
    def tensor(self):
        """By layers of a fixed size, or by an index where the size is free."""
        x, name = self.x.tensor, self.name
        _, height, width, channels = x.shape
        if None in (height, width):
            return keras.ops.take(x, self.order.tolist(), axis=-1)
        grouped = (height * width, self.groups, channels // self.groups)
        apart = layers.Reshape(grouped, name=f"{name}_apart", dtype="float32")(x)
        turned = layers.Permute((1, 3, 2), name=f"{name}_turned", dtype="float32")(apart)
        return layers.Reshape((height, width, channels), name=name, dtype="float32")(turned)


@dataclass(frozen=True, eq=False)
class Concatenated:
    """Values side by side, by a layer that is not in the new graph yet."""

    parts: tuple["Value", ...]
    layer: layers.Concatenate

    @cached_property
    def tensor(self):
        """The concatenation."""
        return self.layer([part.tensor for part in self.parts])


Value = Emitted | Affine | Gated | Shuffled | Concatenated


def _is_emitted(value):
    """Whether a value's tensor is in the new graph: nobody asks for what a rewrite took in."""
    return "tensor" in vars(value)


def fold(affine, scale, shift):
    """s (W x + b) + t = (s W) x + (s b + t), for a scale s and a shift t of each output channel."""
    # A depthwise kernel has its output channels in its last two axes, every other in its last one.
    scale = np.broadcast_to(scale, affine.bias.shape)
    per_channel = scale.reshape(affine.kernel.shape[-2:]) if affine.kind is layers.DepthwiseConv2D else scale
    return replace(affine, kernel=affine.kernel * per_channel, bias=affine.bias * scale + shift)


def fold_behind_gate(gated, scale):
    """s ((W x + b) g) = (s (W x + b)) g: where the squeeze is hoisted, nothing but the product reads W x + b."""
    return replace(gated, x=fold(gated.x, scale, 0.0))


def hoist_mean(value, *, name):
    """mean(W x + b) = W mean(x) + b: the mean over height and width, taken in front of a pointwise affine map.

    It reads x instead of y, a quarter of the elements in a bottleneck, and leaves y with a single reader, so that the
    multiplication can be done in place. Where x is the wider of the two, or the map is not pointwise, the mean stays.
    """
    pool = layers.GlobalAveragePooling2D(keepdims=True, name=name, dtype="float32")
    if isinstance(value, Affine) and value.is_pointwise:
        matrix = value.matrix
        if matrix.shape[0] <= matrix.shape[1]:
            return fully_connected(Emitted(pool(value.x.tensor)), matrix, value.bias, name=f"{name}_affine")
    return Emitted(pool(value.tensor))


def compose(first, second):
    """V (W x + b) + c = (V W) x + (V b + c): two pointwise affine maps in a row are one."""
    kernel = (first.matrix @ second.matrix)[None, None]
    return replace(second, x=first.x, kernel=kernel, bias=first.bias @ second.matrix + second.bias)


def fully_connected(x, matrix, bias, *, name, activation="linear"):
    """act(x W + b) at every position: a 1x1 convolution, the form that every runtime has a fast kernel for."""
    config = {"filters": matrix.shape[1], "kernel_size": (1, 1), "strides": (1, 1), "activation": activation}
    return Affine(x, matrix[None, None], bias, layers.Conv2D, _without_training(config | {"name": name}))


def max_squeeze(x, *, name):
    """The maximum over height and width: pooling with a window of the whole map, which XNNPACK has in int8 too."""
    _, height, width, _ = x.shape
    if None in (height, width):
        return layers.GlobalMaxPooling2D(keepdims=True, name=name, dtype="float32")(x)
    return layers.MaxPooling2D((height, width), name=name, dtype="float32")(x)


def average(value, pool, *, name):
    """mean over k positions of x = sum of x / k: average pooling is a depthwise convolution with 1 / k everywhere.

    Only without padding: the mean at a padded border has fewer positions. In int8 XNNPACK has a kernel for the
    convolution and none for the pooling.
    """
    channels = value.tensor.shape[-1]
    kernel = np.full((*pool.pool_size, channels, 1), 1 / np.prod(pool.pool_size))
    config = {"kernel_size": pool.pool_size, "strides": pool.strides, "padding": "valid", "name": name}
    return Affine(value, kernel, np.zeros(channels), layers.DepthwiseConv2D, _without_training(config))


def unshuffle(convolution):
    """sum_c W_c x_order(c) = sum_d W_inverse(d) x_d: the shuffle moves into the weights of a convolution.

    One that reads all channels has taken it in. A depthwise one gives its own channels in the order of x: what was
    shuffled in front of it is shuffled behind it, where there may be fewer positions. A grouped one needs the
    channels of a group side by side, and keeps the shuffle in front.
    """
    shuffled, groups = convolution.x, convolution.config.get("groups", 1)
    inverse = np.argsort(shuffled.order)
    if convolution.kind is layers.DepthwiseConv2D and convolution.kernel.shape[-1] == 1:
        kernel, bias = convolution.kernel[:, :, inverse], convolution.bias[inverse]
        return replace(shuffled, x=replace(convolution, x=shuffled.x, kernel=kernel, bias=bias))
    if convolution.kind is layers.DepthwiseConv2D or groups > 1:
        return convolution
    return replace(convolution, x=shuffled.x, kernel=np.take(convolution.kernel, inverse, axis=-2))


def rectify(concatenated, *, name):
    """max([x, y], 0) = [max(x, 0), max(y, 0)]: each part is rectified by the layer that it comes from.

    A ReLU of its own has no int8 kernel in XNNPACK.
    """
    rectified = [
        Emitted(layers.ReLU(name=f"{name}_{number}", dtype="float32")(part.tensor))
        for number, part in enumerate(concatenated.parts, start=1)
    ]
    return replace(concatenated, parts=tuple(rectified))


class _Walk:
    """One pass over a graph: from values of its inputs to values of its outputs."""

    def __init__(self):
        self.log = {"hoisted": [], "unhoisted": [], "folded": [], "dropped": []}
        self.outputs = []  # (name, value) of each layer of the outermost model that has one output
        self._names = Counter()
        self._copies = {}
        self._shared = set()  # values with several readers, under whatever names they pass

    def model(self, model, values, prefix=""):
        """Adds the values of all tensors of `model` to those of its inputs: `{id(tensor): value}`."""
        graph, outputs = calls(model), endpoints(model)[1]
        readers = Counter(id(x) for call in graph for x in call.input_tensors) + Counter(map(id, outputs))
        for call in graph:
            self._shared |= {values[id(x)] for x in call.input_tensors if readers[id(x)] > 1}
            results = self._call(call, values, prefix + call.operation.name)
            values |= {id(x): result for x, result in zip(call.output_tensors, results, strict=True)}
            if not prefix and len(results) == 1:
                self.outputs.append((call.operation.name, results[0]))
        return values

    def _call(self, call, values, name):
        """The values of one call's outputs."""
        operation, inputs = call.operation, [values[id(x)] for x in call.input_tensors]
        if isinstance(operation, keras.Model):
            return self._inlined(operation, inputs, name)
        rewrite = _REWRITES.get(type(operation))
        if rewrite and not call.arguments.kwargs.get("training"):
            if (value := rewrite(self, operation, call, inputs, name)) is not None:
                return [value]
        tensors = {id(x): value.tensor for x, value in zip(call.input_tensors, inputs, strict=True)}
        args, kwargs = call.arguments.fill_in(tensors)
        return [Emitted(x) for x in keras.tree.flatten(self._copy(operation, name)(*args, **kwargs))]

    def _inlined(self, model, inputs, name):
        """The values of the outputs of a model inside the model."""
        taken, given = endpoints(model)
        values = self.model(model, {id(x): value for x, value in zip(taken, inputs, strict=True)}, prefix=f"{name}_")
        results = [values[id(x)] for x in given]
        self._shared |= {result for result, times in Counter(results).items() if times > 1}
        return results

    # A row of the table below each: the value of a layer's output, or None if the layer is copied as it is.

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
        affine = Affine(
            x, kernel, bias, type(layer), _without_training(layer.get_config() | {"name": self._name(name)})
        )
        return unshuffle(affine) if isinstance(x, Shuffled) and x not in self._shared else affine

    def _average_pooling(self, layer, call, inputs, name):
        # TensorFlow's depthwise convolution has no strides that differ.
        if _is_plain(layer) and layer.padding == "valid" and layer.strides[0] == layer.strides[1]:
            return average(inputs[0], layer, name=self._name(name))

    def _concatenate(self, layer, call, inputs, name):
        return Concatenated(tuple(inputs), self._copy(layer, name))

    def _relu(self, layer, call, inputs, name):
        (x,) = inputs
        if isinstance(x, Concatenated) and x not in self._shared and _is_relu(layer):
            return rectify(x, name=self._name(name))

    def _batch_norm(self, layer, call, inputs, name):
        (x,) = inputs
        if x in self._shared or not _reads_last_axis(layer, call):
            return None
        scale, shift = _scale_and_shift(layer)
        folded = None
        if isinstance(x, Affine):
            folded = fold(x, scale, shift)
        elif isinstance(x, Shuffled) and isinstance(x.x, Affine) and x.x not in self._shared:
            inverse = np.argsort(x.order)
            folded = replace(x, x=fold(x.x, scale[inverse], shift[inverse]))
        self.log["folded"] += [name] * (folded is not None)
        return folded

    def _rescaling(self, layer, call, inputs, name):
        (x,) = inputs
        scale, shift = np.asarray(layer.scale, "float64"), np.asarray(layer.offset, "float64")
        folded = None
        if isinstance(x, Affine) and x not in self._shared:
            folded = fold(x, scale, shift)
        elif isinstance(x, Gated) and x not in self._shared and x.reads_alone(self._shared) and not np.any(shift):
            folded = fold_behind_gate(x, scale)
        self.log["folded"] += [name] * (folded is not None)
        return folded

    def _channel_shuffle(self, layer, call, inputs, name):
        channels = call.input_tensors[0].shape[-1]
        return inputs[0] if layer.groups == 1 else Shuffled(inputs[0], layer.groups, channels, self._name(name))

    def _shake_shake(self, layer, call, inputs, name):
        mean = layers.Average(name=self._name(name), dtype="float32")
        return Emitted(mean([x.tensor for x in inputs]))

    def _squeeze_excite(self, layer, call, inputs, name):
        """x * gate(x): a squeeze, two 1x1 convolutions and a multiplication."""
        (x,), name = inputs, self._name(name)
        squeezed = x
        if layer.squeeze == "avg":
            squeezed = hoist_mean(x, name=f"{name}_squeeze")
        elif layer.squeeze == "max":
            squeezed = Emitted(max_squeeze(x.tensor, name=f"{name}_squeeze"))
        w1, w2 = _values(layer.reduce_kernel), _values(layer.expand_kernel)
        b1, b2 = np.zeros(w1.shape[1]), np.zeros(w2.shape[1])
        if layer.bias:
            b1, b2 = _values(layer.reduce_bias), _values(layer.expand_bias)
        reduce = fully_connected(squeezed, w1, b1, name=f"{name}_reduce", activation="relu")
        hoisted = layer.squeeze == "avg" and isinstance(squeezed, Affine)
        if hoisted:
            reduce = compose(squeezed, reduce)
        self.log["hoisted" if hoisted else "unhoisted"].append(name)
        expand = fully_connected(reduce, w2, b2, name=f"{name}_expand", activation=layer.excitation)
        return Gated(x, expand, f"{name}_scale")

    def _copy(self, operation, name):
        """A copy of any other layer or operation with the same weights; one for all calls of a shared layer."""
        if operation not in self._copies:
            config = operation.get_config() | {"name": self._name(name)}
            if isinstance(operation, layers.Layer) and operation.compute_dtype in ("float16", "bfloat16"):
                config["dtype"] = "float32"
            copy = type(operation).from_config(config)
            if isinstance(operation, layers.Layer) and operation.weights:
                copy.build_from_config(operation.get_build_config())
                copy.set_weights(operation.get_weights())
                if isinstance(operation, layers.Normalization):
                    copy.finalize_state()  # it computes with what it derived from its weights
            self._copies[operation] = copy
        return self._copies[operation]

    def _name(self, name):
        """`name`, numbered where it was given before: inlined models and shared layers repeat names."""
        self._names[name] += 1
        return name if self._names[name] == 1 else f"{name}_{self._names[name]}"


# How each type of layer is rewritten; all others are copied.
_REWRITES = {
    **dict.fromkeys(_IDENTITIES, _Walk._identity),
    layers.Conv2D: _Walk._affine,
    layers.DepthwiseConv2D: _Walk._affine,
    layers.Dense: _Walk._affine,
    layers.AveragePooling2D: _Walk._average_pooling,
    layers.Concatenate: _Walk._concatenate,
    layers.ReLU: _Walk._relu,
    layers.Activation: _Walk._relu,
    layers.BatchNormalization: _Walk._batch_norm,
    layers.Rescaling: _Walk._rescaling,
    ChannelShuffle: _Walk._channel_shuffle,
    ShakeShake: _Walk._shake_shake,
    SqueezeExcite: _Walk._squeeze_excite,
}


def _is_plain(layer):
    """Whether a layer is channels-last and without an activation."""
    channels_last = getattr(layer, "data_format", "channels_last") == "channels_last"
    return channels_last and getattr(layer, "activation", keras.activations.linear) is keras.activations.linear


def _is_relu(layer):
    if type(layer) is layers.ReLU:
        return layer.max_value is None and not layer.negative_slope and not layer.threshold
    return type(layer) is layers.Activation and layer.activation is keras.activations.relu


def _scale_and_shift(batchnorm):
    """s = gamma / sqrt(variance + epsilon) and t = beta - s mean: s y + t is what a BatchNorm computes of y."""
    scale = 1 / np.sqrt(_values(batchnorm.moving_variance) + batchnorm.epsilon)
    scale = scale * _values(batchnorm.gamma) if batchnorm.scale else scale
    shift = _values(batchnorm.beta) if batchnorm.center else 0.0
    return scale, shift - scale * _values(batchnorm.moving_mean)


def _reads_last_axis(batchnorm, call):
    return batchnorm.axis in (-1, len(call.input_tensors[0].shape) - 1)


def _without_training(config):
    """Arguments without what only training needs; zeros to start from, because the weights follow."""
    training = ("_regularizer", "_constraint")
    return {
        key: "zeros" if key.endswith("_initializer") else None if key.endswith(training) else value
        for key, value in config.items()
    }


def _values(weight):
    """In float64, so that folding rounds once, at the end."""
    return keras.ops.convert_to_numpy(weight).astype("float64")


def _like(x, input_shape):
    dtype = "float32" if x.dtype in ("float16", "bfloat16") else x.dtype
    shape = x.shape if input_shape is None else (x.shape[0], *input_shape)
    return keras.Input(batch_shape=shape, dtype=dtype, name=x.name)


def _unsupported(model):
    """What has no stock counterpart in float32, by name and reason."""
    for call in calls(model):
        operation = call.operation
        if isinstance(operation, keras.Model):
            yield from _unsupported(operation)
        elif type(operation) is ShakeShake and call.arguments.kwargs.get("training"):
            yield f"{operation.name} (training=True)"
        elif type(operation) not in OURS:
            what = {type(part) for part in parts(operation)} | {getattr(operation, "activation", None)}
            foreign = {f.__name__ for f in what if inspect.isfunction(f) or inspect.isclass(f) if not _is_stock(f)}
            if mode := getattr(operation, "quantization_mode", None):
                foreign.add(f"quantized to {mode}")
            yield from (f"{operation.name} ({reason})" for reason in foreign)


def _is_stock(what):
    return what.__module__.split(".")[0] == "keras"
