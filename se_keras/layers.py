"""Keras layers of the project: serializable, written in keras.ops alone, so that they run on every backend."""

import keras
from keras import ops

SQUEEZES = ("avg", "max", "none")
EXCITATIONS = ("sigmoid", "relu", "tanh", "hard_sigmoid")


@keras.saving.register_keras_serializable(package="se_keras")
class SqueezeExcite(keras.layers.Layer):
    """Rescales channels by sigmoid(W2 relu(W1 mean_hw(x))): eq. 2-4 of arXiv:1709.01507.

    Input and output: `(batch, height, width, channels)`; height and width may be dynamic. The weights are
    `reduce_kernel` (W1, `(channels, units)`) and `expand_kernel` (W2, `(units, channels)`), each with a bias unless
    `bias=False`.

    Args:
        ratio: The reduction ratio r of eq. 3: the bottleneck has `channels // ratio` units.
        squeeze: `"avg"`, `"max"` (Table 11) or `"none"` (NoSqueeze, section 7.1: the two fully connected layers
            become 1x1 convolutions at every position).
        excitation: The gate: `"sigmoid"`, `"relu"`, `"tanh"` (Table 12) or `"hard_sigmoid"`.
        bias: Whether the fully connected layers have biases. The released networks have them.
        units: Units of the bottleneck where `ratio` is not to decide: a gate that loses channels keeps its bottleneck.

    Raises:
        ValueError: If an argument is not one of the above, or if `ratio` decides and exceeds the input's channels.

    Example:

    ```python
    x = keras.layers.Conv2D(256, 1)(x)
    x = se_keras.SqueezeExcite(ratio=16)(x)
    ```
    """

    def __init__(self, ratio=16, squeeze="avg", excitation="sigmoid", bias=True, units=None, **kwargs):
        super().__init__(**kwargs)
        check_arguments(ratio, squeeze, excitation, bias)
        if units is not None and (type(units) is not int or units < 1):
            raise ValueError(f"units must be an int of at least 1, or None. Received: units={units!r}")
        self.ratio = ratio
        self.squeeze = squeeze
        self.excitation = excitation
        self.bias = bias
        self.units = units
        self.input_spec = keras.layers.InputSpec(ndim=4)
        self.supports_masking = False

    def build(self, input_shape):
        """Makes the weights; the number of channels must be known."""
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

    def call(self, inputs):
        """Rescales each channel of `inputs` by its gate."""
        return inputs * self.gate(inputs)

    def gate(self, inputs):
        """The excitation of `inputs`: `(batch, 1, 1, channels)`, or one gate per position without a squeeze."""
        hidden = ops.matmul(self._squeezed(inputs), self.reduce_kernel)
        hidden = ops.relu(hidden + self.reduce_bias if self.bias else hidden)
        gate = ops.matmul(hidden, self.expand_kernel)
        return getattr(keras.activations, self.excitation)(gate + self.expand_bias if self.bias else gate)

    def _squeezed(self, inputs):
        if self.squeeze == "none":
            return inputs
        if self.squeeze == "max":
            return ops.max(inputs, axis=(1, 2), keepdims=True)
        # The sum over 112 x 112 positions leaves float16's range (65504): average in float32.
        mean = ops.mean(ops.cast(inputs, "float32"), axis=(1, 2), keepdims=True)
        return ops.cast(mean, self.compute_dtype)

    def compute_output_shape(self, input_shape):
        """The input's own."""
        return input_shape

    def get_config(self):
        """The arguments of the layer."""
        return super().get_config() | {
            "ratio": self.ratio,
            "squeeze": self.squeeze,
            "excitation": self.excitation,
            "bias": self.bias,
            "units": self.units,
        }


@keras.saving.register_keras_serializable(package="se_keras")
class ChannelShuffle(keras.layers.Layer):
    """Spreads the channels of each group over all groups: Zhang et al. 2018 (arXiv:1707.01083), Figure 1c.

    Input and output: `(batch, height, width, channels)`. Channel `i * groups + g` of the output is channel
    `g * (channels // groups) + i` of the input.

    Args:
        groups: Number of groups of the convolution in front.

    Raises:
        ValueError: If `groups` is below 1, or does not divide the input's channels.
    """

    def __init__(self, groups, **kwargs):
        super().__init__(**kwargs)
        if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
            raise ValueError(f"groups must be an int of at least 1. Received: groups={groups!r}")
        self.groups = groups
        self.input_spec = keras.layers.InputSpec(ndim=4)

    def build(self, input_shape):
        """Checks the number of channels; there are no weights."""
        channels = input_shape[-1]
        if channels is None or channels % self.groups:
            raise ValueError(
                f"{self.name}: {self.groups} groups must divide the number of channels. Received: {channels} channels"
            )

    def call(self, inputs):
        """Reorders the channels."""
        _, height, width, channels = ops.shape(inputs)
        grouped = ops.reshape(inputs, (-1, height, width, self.groups, channels // self.groups))
        return ops.reshape(ops.transpose(grouped, (0, 1, 2, 4, 3)), (-1, height, width, channels))

    def compute_output_shape(self, input_shape):
        """The input's own."""
        return input_shape

    def get_config(self):
        """The arguments of the layer."""
        return super().get_config() | {"groups": self.groups}


MIXTURES = ("shake", "even")


@keras.saving.register_keras_serializable(package="se_keras")
class ShakeShake(keras.layers.Layer):
    """Mixes two branches, `a x + (1 - a) y`, in training by chance: Gastaldi 2017 (arXiv:1705.07485), eq. 2.

    Inputs: two tensors of one shape, `(batch, ...)`. In training, each image draws its a uniformly from 0 to 1, once
    for the output and once more, independently, for the gradients. In inference the output is their mean.

    Args:
        forward: `"shake"`, or `"even"` for a = 1/2 in the output.
        backward: The same for the gradients.
        seed: Of the draws.

    Raises:
        ValueError: If an argument is not one of these, or if the inputs are not two of one shape.
    """

    def __init__(self, forward="shake", backward="shake", seed=None, **kwargs):
        super().__init__(**kwargs)
        for argument, value in (("forward", forward), ("backward", backward)):
            if value not in MIXTURES:
                raise ValueError(f"{argument} must be one of {MIXTURES}. Received: {argument}={value!r}")
        # Not `forward`: under the torch backend a layer is a torch.nn.Module, which is called by that name.
        self.forward_mixture = forward
        self.backward_mixture = backward
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape):
        """Checks the shapes; there are no weights."""
        several = all(isinstance(shape, (tuple, list)) for shape in input_shape)  # not the sizes of a single one
        if not several or len(input_shape) != 2 or tuple(input_shape[0]) != tuple(input_shape[1]):
            raise ValueError(f"{self.name} mixes two tensors of one shape. Received: shapes={input_shape}")

    def call(self, inputs, training=False):
        """The mixture."""
        if not training:
            return (inputs[0] + inputs[1]) / 2
        seen, felt = self._mix(inputs, self.forward_mixture), self._mix(inputs, self.backward_mixture)
        # The value of the first and the gradient of the second.
        return felt + ops.stop_gradient(seen - felt)

    def _mix(self, inputs, mixture):
        x, y = inputs
        if mixture == "even":
            return (x + y) / 2
        shape = (ops.shape(x)[0], *[1] * (len(x.shape) - 1))
        share = keras.random.uniform(shape, dtype=x.dtype, seed=self.seed_generator)
        return share * x + (1 - share) * y

    def compute_output_shape(self, input_shape):
        """That of either input."""
        return tuple(input_shape[0])

    def get_config(self):
        """The arguments of the layer."""
        return super().get_config() | {
            "forward": self.forward_mixture,
            "backward": self.backward_mixture,
            "seed": self.seed,
        }


def check_arguments(ratio, squeeze, excitation, bias):
    """Raises ValueError or TypeError unless these are arguments of `SqueezeExcite`."""
    if isinstance(ratio, bool) or not isinstance(ratio, int):
        raise TypeError(f"ratio must be an int. Received: ratio={ratio!r}")
    if ratio < 1:
        raise ValueError(f"ratio must be at least 1. Received: ratio={ratio}")
    if squeeze not in SQUEEZES:
        raise ValueError(f"squeeze must be one of {SQUEEZES}. Received: squeeze={squeeze!r}")
    if excitation not in EXCITATIONS:
        raise ValueError(f"excitation must be one of {EXCITATIONS}. Received: excitation={excitation!r}")
    if not isinstance(bias, bool):
        raise TypeError(f"bias must be True or False. Received: bias={bias!r}")
