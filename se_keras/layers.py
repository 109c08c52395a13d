"""Keras layers of the project: serializable, written in keras.ops alone, so that they run on every backend."""

import keras
from keras import ops

SQUEEZES = ("avg", "max", "none")
EXCITATIONS = ("sigmoid", "relu", "tanh", "hard_sigmoid")


@keras.saving.register_keras_serializable(package="se_keras")
class SqueezeExcite(keras.layers.Layer):
    """Rescales channels by sigmoid(W2 relu(W1 mean_hw(x))): eq. 2-4 of arXiv:1709.01507.

    Input and output: `(batch, height, width, channels)`; height and width may be dynamic. The weights are
    `reduce_kernel` (W1, `(channels, channels // ratio)`) and `expand_kernel` (W2, `(channels // ratio, channels)`),
    each with a bias unless `bias=False`.

    Args:
        ratio: The reduction ratio r of eq. 3: the bottleneck has `channels // ratio` units.
        squeeze: `"avg"`, `"max"` (Table 11) or `"none"` (NoSqueeze, section 7.1: the two fully connected layers
            become 1x1 convolutions at every position).
        excitation: The gate: `"sigmoid"`, `"relu"`, `"tanh"` (Table 12) or `"hard_sigmoid"`.
        bias: Whether the fully connected layers have biases. The released networks have them.

    Raises:
        ValueError: If an argument is not one of the above, or if `ratio` exceeds the input's channels.

    Example:

    ```python
    x = keras.layers.Conv2D(256, 1)(x)
    x = se_keras.SqueezeExcite(ratio=16)(x)
    ```
    """

    def __init__(self, ratio=16, squeeze="avg", excitation="sigmoid", bias=True, **kwargs):
        super().__init__(**kwargs)
        check_arguments(ratio, squeeze, excitation, bias)
        self.ratio = ratio
        self.squeeze = squeeze
        self.excitation = excitation
        self.bias = bias
        self.input_spec = keras.layers.InputSpec(ndim=4)
        self.supports_masking = False

    def build(self, input_shape):
        """Makes the weights; the number of channels must be known."""
        channels = input_shape[-1]
        if channels is None:
            raise ValueError(f"{self.name}: the number of channels must be known. Received: input shape={input_shape}")
        if self.ratio > channels:
            raise ValueError(
                f"{self.name}: ratio must be at most the number of channels, {channels}. Received: ratio={self.ratio}"
            )
        reduced = channels // self.ratio
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
