"""Where integers are rounded."""

import tensorflow as tf
import tf_keras
from tf_keras import layers

from .library import tfmot
from .tf_keras_model import KERNELS

_PACKAGE = "se_keras"


_BITS = {"num_bits": 8, "per_axis": False, "symmetric": False, "narrow_range": False}


# These choose or move values, which are integers already; softmax computes in float32.
_UNROUNDED = (
    layers.Flatten,
    layers.GlobalMaxPooling2D,
    layers.MaxPooling2D,
    layers.Permute,
    layers.Reshape,
    layers.Softmax,
    layers.ZeroPadding2D,
)


# The ranges that LiteRT prescribes: 256 steps from 0 up to 1, or from -1 up to 1.
_BOUNDED = {
    tf_keras.activations.sigmoid: tfmot.quantization.keras.quantizers.FixedQuantizer(8, 0.0, 255 / 256, False),
    tf_keras.activations.tanh: tfmot.quantization.keras.quantizers.FixedQuantizer(8, -1.0, 127 / 128, False),
}


def _is_fused(layer, readers):
    """Whether an output never is a tensor of its own: a ReLU is part of the kernel, a concatenation has one range."""
    (reader,) = readers if len(readers) == 1 else (None,)
    fusing = isinstance(layer, (*KERNELS, layers.Add)) and isinstance(reader, layers.ReLU)
    return fusing or isinstance(reader, layers.Concatenate)


@tf_keras.utils.register_keras_serializable(_PACKAGE)
class KernelQuantizer(tfmot.quantization.keras.quantizers.Quantizer):
    """Rounds a kernel to int8 in the symmetric range that it has: one a channel, or one for a fully connected layer.

    Unlike the library's, it has no state, so that the range is never that of the step before; and it has a range for
    each channel of a depthwise kernel too.

    Args:
        is_depthwise: Whether its channels are its last two axes.
        keep_zeros: Whether weights that are zero when the layer is built stay zero.
    """

    def __init__(self, is_depthwise=False, keep_zeros=False):
        self.is_depthwise = is_depthwise
        self.keep_zeros = keep_zeros

    def build(self, tensor_shape, name, layer):
        """The mask, if zeros are kept."""
        if not self.keep_zeros:
            return {}
        mask = layer.add_weight(f"{name}_mask", shape=tensor_shape, trainable=False, initializer="ones")
        mask.assign(tf.cast(getattr(layer.layer, _kernel_name(layer.layer)) != 0, mask.dtype))
        return {"mask": mask}

    def __call__(self, inputs, training, weights, **kwargs):
        """The kernel as its integers have it."""
        kernel = inputs * weights["mask"] if self.keep_zeros else inputs
        size = tf.stop_gradient(tf.abs(kernel))
        # A channel of zeros has a range too, one in which its bias is no more integers than there are.
        least = tf.maximum(tf.reduce_max(size) * 1e-4, 1e-6)
        if len(kernel.shape) == 2:  # the converter takes one range for a fully connected layer
            extent = tf.maximum(tf.reduce_max(size), least)
            return tf.quantization.fake_quant_with_min_max_vars(kernel, -extent, extent, narrow_range=True)
        if self.is_depthwise:
            kernel, size = (tf.reshape(x, (*x.shape[:2], 1, -1)) for x in (kernel, size))
        extent = tf.maximum(tf.reduce_max(size, axis=(0, 1, 2)), least)
        rounded = tf.quantization.fake_quant_with_min_max_vars_per_channel(kernel, -extent, extent, narrow_range=True)
        return tf.reshape(rounded, inputs.shape)

    def get_config(self):
        """Arguments."""
        return {"is_depthwise": self.is_depthwise, "keep_zeros": self.keep_zeros}


@tf_keras.utils.register_keras_serializable(_PACKAGE)
class CalibratedQuantizer(tfmot.quantization.keras.quantizers.AllValuesQuantizer):
    """Rounds activations to int8 in a range that is first that of all calibration images, then follows training.

    The library's own start at -6 and 6, whatever the network, and take thousands of steps to leave there.
    """

    def __init__(self):
        super().__init__(**_BITS)
        self.is_calibrating = False
        self.ranges = {}
        self._following = tfmot.quantization.keras.quantizers.MovingAverageQuantizer(**_BITS)

    def build(self, tensor_shape, name, layer):
        """The two ends of the range, from 0 on."""
        self.ranges[layer.name] = super().build(tensor_shape, name, layer)
        return self.ranges[layer.name]

    def __call__(self, inputs, training, weights, **kwargs):
        """The activations as their integers have them; as they are, while calibrating."""
        if self.is_calibrating:
            super().__call__(inputs, True, weights)
            return inputs
        return self._following(inputs, training, weights)

    def get_config(self):
        """No arguments."""
        return {}


@tf_keras.utils.register_keras_serializable(_PACKAGE)
class RoundingConfig(tfmot.quantization.keras.QuantizeConfig):
    """Which tensors of a layer are rounded, in the form that the library's wrapper asks for.

    Args:
        kernel: Quantizer of the kernel, or None.
        output: Quantizer of the output, or None.
    """

    def __init__(self, kernel, output):
        self.kernel = kernel
        self.output = output

    def get_weights_and_quantizers(self, layer):
        """The kernel, if it is rounded."""
        return [(getattr(layer, _kernel_name(layer)), self.kernel)] if self.kernel else []

    def set_quantize_weights(self, layer, quantize_weights):
        """Has the layer compute with the rounded kernel."""
        for kernel in quantize_weights:
            setattr(layer, _kernel_name(layer), kernel)

    def get_activations_and_quantizers(self, layer):
        """None: activations are layers of their own."""
        return []

    def set_quantize_activations(self, layer, quantize_activations):
        """Nothing to set."""
        return

    def get_output_quantizers(self, layer):
        """That of the output, if it is rounded."""
        return [self.output] if self.output else []

    def get_config(self):
        """Arguments, serialized."""
        serialize = tf_keras.utils.legacy.serialize_keras_object
        return {"kernel": serialize(self.kernel), "output": serialize(self.output)}

    @classmethod
    def from_config(cls, config):
        """From `get_config()`."""
        with tfmot.quantization.keras.quantize_scope():
            read = tf_keras.utils.legacy.deserialize_keras_object
            return cls(**{name: value and read(value) for name, value in config.items()})


def _kernel_name(layer):
    return "depthwise_kernel" if isinstance(layer, layers.DepthwiseConv2D) else "kernel"
