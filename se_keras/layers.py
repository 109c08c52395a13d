"""The custom Keras layers. They are serializable and use only keras.ops, so they run on every backend."""

from typing import Any, Literal, get_args

import keras

from se_keras.errors import require_choice

Squeeze = Literal["avg", "max", "none"]
Excitation = Literal["sigmoid", "relu", "tanh", "hard_sigmoid"]
Mixture = Literal["shake", "even"]
SQUEEZES: tuple[Squeeze, ...] = get_args(Squeeze)
EXCITATIONS: tuple[Excitation, ...] = get_args(Excitation)
MIXTURES: tuple[Mixture, ...] = get_args(Mixture)
ops: Any = keras.ops  # not typed: its inferred return types are unions over all backends, None included


@keras.saving.register_keras_serializable(package="se_keras")
class SqueezeExcite(keras.layers.Layer):
    """Rescales channels by sigmoid(W2 relu(W1 mean_hw(x))): eq. 2-4 of arXiv:1709.01507.

    Input and output: `(batch, height, width, channels)`; height and width may be dynamic. The weights are
    `reduce_kernel` (W1, `(channels, units)`) and `expand_kernel` (W2, `(units, channels)`), and a bias for each unless
    `bias=False`.

    Args:
        ratio: The reduction ratio r of eq. 3: the bottleneck has `channels // ratio` units, at least one.
        squeeze: The pooling: `"avg"`, `"max"` (Table 11) or `"none"` (NoSqueeze, section 7.1: the two fully connected
            layers become 1x1 convolutions at every position).
        excitation: The activation of the gate (Table 12; `"hard_sigmoid"` is not in the paper).
        bias: Whether the fully connected layers have biases. The released networks have them.
        units: Number of units of the bottleneck, in place of `ratio`. Channel pruning sets it: a layer that loses
            channels keeps its bottleneck.
        data_format: `"channels_last"`. Default: `keras.config.image_data_format()`, which must be this one.

    Example: `x = se_keras.SqueezeExcite(ratio=16)(keras.layers.Conv2D(256, 1)(x))`.
    """

    def __init__(
        self,
        ratio: int = 16,
        squeeze: Squeeze = "avg",
        excitation: Excitation = "sigmoid",
        bias: bool = True,
        units: int | None = None,
        data_format: str | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.data_format = checked_format(self, data_format)
        check_arguments(ratio, squeeze, excitation, bias)
        if units is not None and (type(units) is not int or units < 1):
            raise ValueError(f"units must be an int of at least 1, or None. Received: units={units!r}")
        self.ratio, self.squeeze, self.excitation, self.bias, self.units = ratio, squeeze, excitation, bias, units
        self.input_spec = keras.layers.InputSpec(ndim=4)
        self.supports_masking = False

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Creates the weights. The number of channels must be known."""
        channels = input_shape[-1]
        if channels is None:
            raise ValueError(f"{self.name}: the number of channels must be known. Received: input shape={input_shape}")
        if self.units is None and self.ratio > channels:
            raise ValueError(
                f"{self.name}: ratio must be at most the number of channels, {channels}. Received: ratio={self.ratio}"
            )
        reduced = self.units or channels // self.ratio
        self.reduce_kernel = self.add_weight((channels, reduced), initializer="he_uniform", name="reduce_kernel")
        self.expand_kernel = self.add_weight((reduced, channels), initializer="he_uniform", name="expand_kernel")
        if self.bias:
            self.reduce_bias = self.add_weight((reduced,), initializer="zeros", name="reduce_bias")
            self.expand_bias = self.add_weight((channels,), initializer="zeros", name="expand_bias")

    def call(self, inputs: keras.KerasTensor) -> keras.KerasTensor:
        """Multiplies each channel of `inputs` by its gate."""
        return inputs * self.gate(inputs)  # pyright: ignore[reportReturnType]: typed as a union, like `ops`

    def gate(self, inputs: keras.KerasTensor) -> keras.KerasTensor:
        """The gates of `inputs`: `(batch, 1, 1, channels)`, or one for each position without a squeeze."""
        gate = ops.matmul(self.hidden(inputs), self.expand_kernel)
        return getattr(keras.activations, self.excitation)(gate + self.expand_bias if self.bias else gate)

    def hidden(self, inputs: keras.KerasTensor) -> keras.KerasTensor:
        """The units of the bottleneck: `(batch, 1, 1, units)`, or those of each position without a squeeze."""
        hidden = ops.matmul(self._squeezed(inputs), self.reduce_kernel)
        return ops.relu(hidden + self.reduce_bias if self.bias else hidden)

    def _squeezed(self, inputs):
        if self.squeeze == "none":
            return inputs
        if self.squeeze == "max":
            return ops.max(inputs, axis=(1, 2), keepdims=True)
        # The sum over 112 x 112 positions can exceed the range of float16 (65504): average in float32.
        mean = ops.mean(ops.cast(inputs, "float32"), axis=(1, 2), keepdims=True)
        return ops.cast(mean, self.compute_dtype)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """The shape of the input."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """The arguments of the layer."""
        names = ("ratio", "squeeze", "excitation", "bias", "units", "data_format")
        return super().get_config() | {name: getattr(self, name) for name in names}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SqueezeExcite":
        """The layer of these arguments. Saved layers are channels-last, whatever the default of the process is."""
        return super().from_config({"data_format": "channels_last"} | config)


@keras.saving.register_keras_serializable(package="se_keras")
class ChannelShuffle(keras.layers.Layer):
    """Distributes the channels of each group over all groups: Zhang et al. 2018 (arXiv:1707.01083), Figure 1c.

    Input and output: `(batch, height, width, channels)`. Channel `i * groups + g` of the output is channel
    `g * (channels // groups) + i` of the input. `groups`, of the convolution before it, must divide the channels.
    `data_format` is as in `SqueezeExcite`.
    """

    def __init__(self, groups: int, data_format: str | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.data_format = checked_format(self, data_format)
        if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
            raise ValueError(f"groups must be an int of at least 1. Received: groups={groups!r}")
        self.groups = groups
        self.input_spec = keras.layers.InputSpec(ndim=4)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Checks the number of channels. There are no weights."""
        channels = input_shape[-1]
        if channels is None or channels % self.groups:
            raise ValueError(
                f"{self.name}: {self.groups} groups must divide the number of channels. Received: {channels} channels"
            )

    def call(self, inputs: keras.KerasTensor) -> keras.KerasTensor:
        """Reorders the channels."""
        _, height, width, channels = ops.shape(inputs)
        grouped = ops.reshape(inputs, (-1, height, width, self.groups, channels // self.groups))
        return ops.reshape(ops.transpose(grouped, (0, 1, 2, 4, 3)), (-1, height, width, channels))

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """The shape of the input."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """The arguments of the layer."""
        return super().get_config() | {"groups": self.groups, "data_format": self.data_format}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ChannelShuffle":
        """The layer of these arguments. Saved layers are channels-last, whatever the default of the process is."""
        return super().from_config({"data_format": "channels_last"} | config)


@keras.saving.register_keras_serializable(package="se_keras")
class ShakeShake(keras.layers.Layer):
    """Mixes two branches into `a x + (1 - a) y` with a random a: Gastaldi 2017 (arXiv:1705.07485), eq. 2.

    Inputs: two tensors of one shape, `(batch, ...)`. In training, each image draws a from a uniform distribution over
    0 to 1, and a second, independent a for the gradients. In inference the output is the mean of both branches.

    Args:
        forward: How the output is mixed: `"shake"` draws a, `"even"` sets a = 1/2.
        backward: How the gradients are mixed.
        seed: Seed of the random numbers.
    """

    def __init__(self, forward: Mixture = "shake", backward: Mixture = "shake", seed: int | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        for argument, value in (("forward", forward), ("backward", backward)):
            if value not in MIXTURES:
                raise ValueError(f"{argument} must be one of {MIXTURES}. Received: {argument}={value!r}")
        # Not named `forward`: under the torch backend a layer is a torch.nn.Module, whose method `forward` is its call.
        self.forward_mixture, self.backward_mixture, self.seed = forward, backward, seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape: list[tuple[int | None, ...]]) -> None:
        """Checks the shapes. There are no weights."""
        are_shapes = all(isinstance(shape, (tuple, list)) for shape in input_shape)  # not the sizes of one tensor
        if not are_shapes or len(input_shape) != 2 or tuple(input_shape[0]) != tuple(input_shape[1]):
            raise ValueError(f"{self.name} mixes two tensors of one shape. Received: shapes={input_shape}")

    def call(self, inputs: list[keras.KerasTensor], training: bool | None = False) -> keras.KerasTensor:
        """The mixture of both branches."""
        if not training:
            return self._mix(inputs, "even")
        forward, backward = self._mix(inputs, self.forward_mixture), self._mix(inputs, self.backward_mixture)
        # The value is that of `forward`, the gradient that of `backward`.
        return backward + ops.stop_gradient(forward - backward)

    def _mix(self, inputs, mixture) -> Any:
        x, y = inputs
        if mixture == "even":
            return (x + y) / 2
        shape = (ops.shape(x)[0], *[1] * (len(x.shape) - 1))
        share = keras.random.uniform(shape, dtype=x.dtype, seed=self.seed_generator)
        return share * x + (1 - share) * y

    def compute_output_shape(self, input_shape: list[tuple[int | None, ...]]) -> tuple[int | None, ...]:
        """The shape of either input."""
        return tuple(input_shape[0])

    def get_config(self) -> dict[str, Any]:
        """The arguments of the layer."""
        own = {"forward": self.forward_mixture, "backward": self.backward_mixture, "seed": self.seed}
        return super().get_config() | own


def checked_format(layer: keras.layers.Layer, data_format: str | None) -> str:
    """The data format of a layer: Keras' default, if it is None. Raises ValueError unless it is channels-last."""
    found = data_format or keras.config.image_data_format()
    if found != "channels_last":
        kind, source = type(layer).__name__, "" if data_format else " from keras.config.image_data_format()"
        raise ValueError(f"{kind} must have data_format='channels_last'. Received: data_format={found!r}{source}")
    return found


def check_arguments(ratio: int, squeeze: str, excitation: str, bias: bool) -> None:
    """Raises ValueError or TypeError unless these are valid arguments of `SqueezeExcite`."""
    if isinstance(ratio, bool) or not isinstance(ratio, int):
        raise TypeError(f"ratio must be an int. Received: ratio={ratio!r}")
    if ratio < 1:
        raise ValueError(f"ratio must be at least 1. Received: ratio={ratio}")
    require_choice("squeeze", squeeze, SQUEEZES)
    require_choice("excitation", excitation, EXCITATIONS)
    if not isinstance(bias, bool):
        raise TypeError(f"bias must be True or False. Received: bias={bias!r}")
