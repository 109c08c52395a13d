"""Lowering: a trained functional model becomes an equal one of stock Keras layers that is cheaper to run.

The graph is walked once, in order. A convolution or fully connected layer is not emitted where it is met but kept as an
`Affine` value, y = W x + b, because what follows may change it: BatchNorm scales W, and a squeeze does not need y at
all. Whoever needs y itself has it emitted. Each rewrite is a small function of such values:

- `fold_batchnorm`: BatchNorm behind an affine map is an affine map.
- `hoist_mean`: the mean over height and width commutes with a pointwise affine map.
- `compose`: two pointwise affine maps in a row are one.
"""

import inspect
from collections import Counter
from dataclasses import dataclass, field, replace

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
_AFFINE_LAYERS = (layers.Conv2D, layers.DepthwiseConv2D, layers.Dense)


@dataclass(frozen=True, kw_only=True)
class Lowering:
    """What `lower` did.

    Args:
        hoisted: Names of the SqueezeExcite layers whose squeeze reads the input of the convolution in front of them,
            and whose first fully connected layer took that convolution in.
        unhoisted: Those whose squeeze stands where it was: no affine 1x1 convolution in front of it.
        folded: Names of the BatchNormalization layers that went into the layer in front of them.
        dropped: Names of the layers that do nothing in inference.
    """

    hoisted: tuple[str, ...]
    unhoisted: tuple[str, ...]
    folded: tuple[str, ...]
    dropped: tuple[str, ...]

    def __str__(self):
        return (
            f"{len(self.hoisted)} of {len(self.hoisted) + len(self.unhoisted)} squeezes hoisted, "
            f"{len(self.folded)} BatchNormalization layers folded, {len(self.dropped)} layers dropped"
        )


def lower(model, *, input_shape=None):
    """Turns a functional model into an equal one of stock Keras layers: folded, its squeezes hoisted where they can be.

    Args:
        model: Any functional or Sequential Keras model; models inside it are inlined, their layers' names prefixed.
        input_shape: `(height, width, channels)` to fix in the new model, which has one input then. Default: `model`'s.

    Returns:
        A new float32 `keras.Model` for inference, with the same inputs and outputs to about 1e-6 of their range. It
        loads without se_keras. Its attribute `lowering` is a `Lowering`: what was done; `twins` is `{layer of model:
        layer of the new model that gives the same}`, by name and in order. `model` stays as it was.

    Raises:
        TypeError: If `model` is not functional.
        ValueError: If it has layers that are neither Keras' own nor of se_keras, the message names them; or if it does
            not take `input_shape`.

    Example:

    ```python
    lowered = se_keras.export.lower(model)
    print(lowered.lowering)  # 16 of 16 squeezes hoisted, 53 BatchNormalization layers folded, 0 layers dropped
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
        outputs = keras.tree.map_structure(lambda x: values[id(x)].emit(), given)
    except ValueError as error:
        if input_shape is None:
            raise
        raise ValueError(f"{model.name} does not take {input_shape=}: {first_line(error)}") from error
    lowered = keras.Model(keras.tree.map_structure(lambda x: inputs[id(x)], taken), outputs, name=model.name)
    lowered.lowering = Lowering(**{kind: tuple(found) for kind, found in walk.log.items()})
    lowered.twins = {name: producer(y.tensor).name for name, y in walk.given if y.tensor is not None}
    return lowered


@dataclass(frozen=True, eq=False)
class Emitted:
    """A tensor of the new graph."""

    tensor: keras.KerasTensor

    def emit(self):
        """The tensor itself."""
        return self.tensor


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

    x: "Emitted | Affine"
    kernel: np.ndarray
    bias: np.ndarray
    kind: type
    config: dict
    _emitted: list = field(default_factory=list, init=False)

    def emit(self):
        """Puts the layer into the new graph, once, and returns its output."""
        if not self._emitted:
            layer = self.kind.from_config({**self.config, "use_bias": True, "dtype": "float32"})
            self._emitted.append(layer(self.x.emit()))
            layer.set_weights([self.kernel, self.bias])
        return self._emitted[0]

    @property
    def tensor(self):
        """y in the new graph; None where nothing reads it, because what follows was folded into the layer."""
        return self._emitted[0] if self._emitted else None

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


def fold_batchnorm(affine, batchnorm):
    """s (W x + b - m) + t = (s W) x + s (b - m) + t, with s = gamma / sqrt(variance + epsilon) and t = beta."""
    scale = 1 / np.sqrt(_values(batchnorm.moving_variance) + batchnorm.epsilon)
    scale = scale * _values(batchnorm.gamma) if batchnorm.scale else scale
    shift = _values(batchnorm.beta) if batchnorm.center else 0.0
    bias = scale * (affine.bias - _values(batchnorm.moving_mean)) + shift
    # A depthwise kernel has its output channels in its last two axes, every other in its last one.
    per_channel = scale.reshape(affine.kernel.shape[-2:]) if affine.kind is layers.DepthwiseConv2D else scale
    return replace(affine, kernel=affine.kernel * per_channel, bias=bias)


def hoist_mean(value, *, name):
    """mean(W x + b) = W mean(x) + b: the mean over height and width, taken in front of a pointwise affine map.

    It reads x instead of y, a quarter of the elements in a bottleneck, and leaves y with a single reader, so that the
    multiplication can be done in place. Where x is the wider of the two, or the map is not pointwise, the mean stays.
    """
    pool = layers.GlobalAveragePooling2D(keepdims=True, name=name, dtype="float32")
    if isinstance(value, Affine) and value.is_pointwise:
        matrix = value.matrix
        if matrix.shape[0] <= matrix.shape[1]:
            return fully_connected(Emitted(pool(value.x.emit())), matrix, value.bias, name=f"{name}_affine")
    return Emitted(pool(value.emit()))


def compose(first, second):
    """V (W x + b) + c = (V W) x + (V b + c): two pointwise affine maps in a row are one."""
    kernel = (first.matrix @ second.matrix)[None, None]
    return replace(second, x=first.x, kernel=kernel, bias=first.bias @ second.matrix + second.bias)


def fully_connected(x, matrix, bias, *, name, activation="linear"):
    """act(x W + b) at every position: a 1x1 convolution, the form that every runtime has a fast kernel for."""
    config = {"filters": matrix.shape[1], "kernel_size": (1, 1), "strides": (1, 1), "activation": activation}
    return Affine(x, matrix[None, None], bias, layers.Conv2D, _without_training(config | {"name": name}))


def shuffle(x, groups, *, name):
    """The channels of `x` spread over groups, by layers of a fixed size, or by an index where the size is free."""
    _, height, width, channels = x.shape
    if None in (height, width):
        order = np.arange(channels).reshape(groups, -1).T.ravel()
        return keras.ops.take(x, order.tolist(), axis=-1)
    apart = layers.Reshape((height * width, groups, channels // groups), name=f"{name}_apart", dtype="float32")(x)
    turned = layers.Permute((1, 3, 2), name=f"{name}_turned", dtype="float32")(apart)
    return layers.Reshape((height, width, channels), name=name, dtype="float32")(turned)


class _Walk:
    """One pass over a graph: from values of its inputs to values of its outputs."""

    def __init__(self):
        self.log = {"hoisted": [], "unhoisted": [], "folded": [], "dropped": []}
        self.given = []  # the value that each layer of the outermost model gives, by the layer's name
        self._names = Counter()
        self._copies = {}
        self._shared = set()  # values with several readers, whatever names they pass under

    def model(self, model, values, prefix=""):
        """Adds the values of all tensors of `model` to those of its inputs: `{id(tensor): value}`."""
        graph, outputs = calls(model), endpoints(model)[1]
        readers = Counter(id(x) for call in graph for x in call.input_tensors) + Counter(map(id, outputs))
        for call in graph:
            self._shared |= {values[id(x)] for x in call.input_tensors if readers[id(x)] > 1}
            results = self._call(call, values, prefix)
            values |= {id(x): result for x, result in zip(call.output_tensors, results, strict=True)}
            if not prefix and len(results) == 1:
                self.given.append((call.operation.name, results[0]))
        return values

    def _call(self, call, values, prefix):
        """The values of one call's outputs."""
        operation, name = call.operation, prefix + call.operation.name
        value = values[id(call.input_tensors[0])]
        if isinstance(operation, keras.Model):
            inputs, outputs = endpoints(operation)
            inner = {id(x): values[id(y)] for x, y in zip(inputs, call.input_tensors, strict=True)}
            inner = self.model(operation, inner, prefix=f"{name}_")
            given = [inner[id(x)] for x in outputs]
            self._shared |= {result for result, times in Counter(given).items() if times > 1}
            return given
        if isinstance(operation, SqueezeExcite):
            return [self._squeeze_excite(value, operation, name)]
        if isinstance(operation, ChannelShuffle):
            return [Emitted(shuffle(value.emit(), operation.groups, name=self._name(name)))]
        if isinstance(operation, ShakeShake):
            mean = layers.Average(name=self._name(name), dtype="float32")
            return [Emitted(mean([values[id(x)].emit() for x in call.input_tensors]))]
        if isinstance(operation, layers.Layer) and not call.arguments.kwargs.get("training"):
            if isinstance(operation, _IDENTITIES):
                self.log["dropped"].append(name)
                return [value]
            if type(operation) in _AFFINE_LAYERS and _is_plain(operation):
                return [self._affine(value, operation, name)]
            if isinstance(operation, layers.BatchNormalization) and isinstance(value, Affine):
                # A second reader of the convolution would have it computed twice.
                if value not in self._shared and _reads_last_axis(operation, call):
                    self.log["folded"].append(name)
                    return [fold_batchnorm(value, operation)]
        args, kwargs = call.arguments.fill_in({id(x): values[id(x)].emit() for x in call.input_tensors})
        return [Emitted(x) for x in keras.tree.flatten(self._copy(operation, name)(*args, **kwargs))]

    def _affine(self, value, layer, name):
        kernel = _values(layer.kernel)
        outputs = kernel.shape[-2:] if isinstance(layer, layers.DepthwiseConv2D) else kernel.shape[-1:]
        bias = _values(layer.bias) if layer.use_bias else np.zeros(int(np.prod(outputs)))
        config = _without_training(layer.get_config() | {"name": self._name(name)})
        return Affine(value, kernel, bias, type(layer), config)

    def _squeeze_excite(self, value, layer, name):
        """x * gate(x): a squeeze, two 1x1 convolutions and a multiplication."""
        name = self._name(name)
        squeezed = value
        if layer.squeeze == "avg":
            squeezed = hoist_mean(value, name=f"{name}_squeeze")
        elif layer.squeeze == "max":
            pool = layers.GlobalMaxPooling2D(keepdims=True, name=f"{name}_squeeze", dtype="float32")
            squeezed = Emitted(pool(value.emit()))
        reduce_bias, expand_bias = (
            (_values(layer.reduce_bias), _values(layer.expand_bias)) if layer.bias else (np.zeros(1), np.zeros(1))
        )
        w1, w2 = _values(layer.reduce_kernel), _values(layer.expand_kernel)
        reduce = fully_connected(
            squeezed, w1, np.broadcast_to(reduce_bias, w1.shape[1:]), name=f"{name}_reduce", activation="relu"
        )
        hoisted = layer.squeeze == "avg" and isinstance(squeezed, Affine)
        if hoisted:
            reduce = compose(squeezed, reduce)
        self.log["hoisted" if hoisted else "unhoisted"].append(name)
        expand = fully_connected(
            reduce, w2, np.broadcast_to(expand_bias, w2.shape[1:]), name=f"{name}_expand", activation=layer.excitation
        )
        multiply = layers.Multiply(name=f"{name}_scale", dtype="float32")
        return Emitted(multiply([value.emit(), expand.emit()]))

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


def _is_plain(layer):
    """Whether a layer is affine and channels-last."""
    channels_last = getattr(layer, "data_format", "channels_last") == "channels_last"
    return channels_last and layer.activation is keras.activations.linear


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
