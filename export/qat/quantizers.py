"""The rounding of tensors to integers in quantization-aware training."""

from typing import Any

import tensorflow as tf
import tf_keras
from tf_keras import layers

from se_keras.typing import Json

from .library import tfmot
from .tf_keras_model import KERNELS

_PACKAGE = "se_keras"
_BITS = {"num_bits": 8, "per_axis": False, "symmetric": False, "narrow_range": False}
# These layers select or move values, which are integers already. Softmax computes in float32.
UNROUNDED = (
    layers.Flatten,
    layers.GlobalMaxPooling2D,
    layers.MaxPooling2D,
    layers.Permute,
    layers.Reshape,
    layers.Softmax,
    layers.ZeroPadding2D,
)


def fixed(low: float, high: float) -> Any:
    """Rounds to 256 steps from `low` to `high`."""
    return tfmot.quantization.keras.quantizers.FixedQuantizer(8, low, high, False)


# The ranges that LiteRT requires: 256 steps from 0 to below 1, or from -1 to below 1.
BOUNDED: dict[Any, Any] = {
    tf_keras.activations.sigmoid: fixed(0.0, 255 / 256),
    tf_keras.activations.tanh: fixed(-1.0, 127 / 128),
}


def is_fused(layer: Any, readers: list[Any]) -> bool:
    """Whether an output is not rounded separately: a ReLU is part of the kernel, and a concatenation has one range."""
    (reader,) = readers if len(readers) == 1 else (None,)
    fusing = isinstance(layer, (*KERNELS, layers.Add)) and isinstance(reader, layers.ReLU)
    return fusing or isinstance(reader, layers.Concatenate)


@tf_keras.utils.register_keras_serializable(_PACKAGE)
class KernelQuantizer(tfmot.quantization.keras.quantizers.Quantizer):
    """Rounds a kernel to int8 in its symmetric range: one for each channel, or one for a fully connected layer.

    Unlike the library's quantizers, it has no state, so the range never lags a step behind. A depthwise
    kernel has a range for each channel too.

    Args:
        is_depthwise: Whether the last two axes are the channels.
        keep_zeros: Whether weights that are zero when the layer is built stay zero.
    """

    def __init__(self, is_depthwise: bool = False, keep_zeros: bool = False):
        self.is_depthwise = is_depthwise
        self.keep_zeros = keep_zeros

    def build(self, tensor_shape: Any, name: str, layer: Any) -> dict[str, Any]:
        """Creates the mask, if zeros are kept."""
        if not self.keep_zeros:
            return {}
        mask = layer.add_weight(f"{name}_mask", shape=tensor_shape, trainable=False, initializer="ones")
        mask.assign(tf.cast(getattr(layer.layer, _kernel_name(layer.layer)) != 0, mask.dtype))
        return {"mask": mask}

    def __call__(self, inputs: Any, training: bool, weights: dict[str, Any], **kwargs: Any) -> Any:
        """The rounded kernel."""
        kernel = inputs * weights["mask"] if self.keep_zeros else inputs
        size = tf.stop_gradient(tf.abs(kernel))
        # A channel of zeros has a range too. It must be so large that its bias fits in int32.
        least = tf.maximum(tf.reduce_max(size) * 1e-4, 1e-6)
        if len(kernel.shape) == 2:  # the converter needs one range for a fully connected layer
            extent = tf.maximum(tf.reduce_max(size), least)
            return tf.quantization.fake_quant_with_min_max_vars(kernel, -extent, extent, narrow_range=True)
        if self.is_depthwise:
            kernel, size = (tf.reshape(x, (*x.shape[:2], 1, -1)) for x in (kernel, size))
        extent = tf.maximum(tf.reduce_max(size, axis=(0, 1, 2)), least)
        rounded = tf.quantization.fake_quant_with_min_max_vars_per_channel(kernel, -extent, extent, narrow_range=True)
        return tf.reshape(rounded, inputs.shape)

    def get_config(self) -> Json:
        """The arguments."""
        return {"is_depthwise": self.is_depthwise, "keep_zeros": self.keep_zeros}


@tf_keras.utils.register_keras_serializable(_PACKAGE)
class CalibratedQuantizer(tfmot.quantization.keras.quantizers.AllValuesQuantizer):
    """Rounds activations to int8. The range starts with all calibration images, and then follows training.

    The library's quantizers start at -6 and 6 for every network, and take thousands of steps to adapt.
    """

    def __init__(self):
        super().__init__(**_BITS)
        self.is_calibrating = False
        self.ranges = {}
        self._following = tfmot.quantization.keras.quantizers.MovingAverageQuantizer(**_BITS)

    def build(self, tensor_shape: Any, name: str, layer: Any) -> dict[str, Any]:
        """Creates the two ends of the range, which start at 0."""
        self.ranges[layer.name] = super().build(tensor_shape, name, layer)
        return self.ranges[layer.name]

    def __call__(self, inputs: Any, training: bool, weights: dict[str, Any], **kwargs: Any) -> Any:
        """The rounded activations; during calibration the activations themselves."""
        if self.is_calibrating:
            super().__call__(inputs, True, weights)
            return inputs
        return self._following(inputs, training, weights)

    def get_config(self) -> Json:
        """No arguments."""
        return {}


@tf_keras.utils.register_keras_serializable(_PACKAGE)
class RoundingConfig(tfmot.quantization.keras.QuantizeConfig):
    """Which tensors of a layer are rounded, as the library's wrapper needs it.

    Args:
        kernel: Quantizer of the kernel, or None.
        output: Quantizer of the output, or None.
    """

    def __init__(self, kernel: Any, output: Any):
        self.kernel = kernel
        self.output = output

    def get_weights_and_quantizers(self, layer: Any) -> list[Any]:
        """The kernel, if it is rounded."""
        return [(getattr(layer, _kernel_name(layer)), self.kernel)] if self.kernel else []

    def set_quantize_weights(self, layer: Any, quantize_weights: list[Any]) -> None:
        """Makes the layer compute with the rounded kernel."""
        for kernel in quantize_weights:
            setattr(layer, _kernel_name(layer), kernel)

    def get_activations_and_quantizers(self, layer: Any) -> list[Any]:
        """Empty: activations are separate layers."""
        return []

    def set_quantize_activations(self, layer: Any, quantize_activations: list[Any]) -> None:
        """Does nothing: activations are separate layers."""

    def get_output_quantizers(self, layer: Any) -> list[Any]:
        """The quantizer of the output, if it is rounded."""
        return [self.output] if self.output else []

    def get_config(self) -> Json:
        """The arguments, serialized."""
        serialize = tf_keras.utils.legacy.serialize_keras_object
        return {"kernel": serialize(self.kernel), "output": serialize(self.output)}

    @classmethod
    def from_config(cls, config: Json) -> "RoundingConfig":
        """Creates it from `get_config()`."""
        with tfmot.quantization.keras.quantize_scope():
            read = tf_keras.utils.legacy.deserialize_keras_object
            return cls(**{name: value and read(value) for name, value in config.items()})


def _kernel_name(layer: Any) -> str:
    return "depthwise_kernel" if isinstance(layer, layers.DepthwiseConv2D) else "kernel"
