"""Pieces of every family: the fields of a row, convolution with BatchNorm, padding, the classifier. Nothing of one."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from keras import initializers, layers

from se_keras.normalization import IMAGENET, Normalization
from se_keras.recalibration import SEConfig

EPSILON = 1e-5  # of BatchNorm, as in the released networks; Keras' own is 1e-3
TOP = "predictions"
HEAD = (TOP, "fc1", "fc2")  # layers with weights behind the features
# "We adopt the weight initialisation strategy of [He et al. 2015]", section 5: variance 2 / fan-in. Uniform, because
# drawing 28 million normal values takes longer than building the rest of the network.
HE = "he_uniform"


def conv(x, channels, kernel, *, strides=1, groups=1, padding="symmetric", name):
    """Convolution without bias.

    `kernel` is a number, or `(height, width)` at stride 1; `padding` is `"symmetric"`, or `"none"` as in the first
    layers of Inception.
    """
    x, keras_padding = _padded(x, kernel, strides, padding, name=name)
    how = {"strides": strides, "padding": keras_padding, "groups": groups}
    return layers.Conv2D(channels, kernel, **how, use_bias=False, kernel_initializer=HE, name=name)(x)


def conv_bn(x, channels, kernel, *, epsilon=EPSILON, name, **how):
    """Convolution without bias, then BatchNorm."""
    return batch_norm(conv(x, channels, kernel, name=name, **how), epsilon=epsilon, name=f"{name}_bn")


def conv_bn_relu(x, channels, kernel, *, name, **how):
    """Convolution, BatchNorm, ReLU."""
    return relu(conv_bn(x, channels, kernel, name=name, **how), name=f"{name}_relu")


def depthwise_bn(x, kernel, *, strides=1, name):
    """Depthwise convolution without bias, padded symmetrically, then BatchNorm."""
    x, keras_padding = _padded(x, kernel, strides, "symmetric", name=name)
    # Each output reads kernel x kernel values; Keras' own initializers count those of all channels.
    limit = math.sqrt(6 / kernel**2)
    initializer = initializers.RandomUniform(-limit, limit)
    how = {"strides": strides, "padding": keras_padding}
    x = layers.DepthwiseConv2D(kernel, **how, use_bias=False, depthwise_initializer=initializer, name=name)(x)
    return batch_norm(x, name=f"{name}_bn")


def _padded(x, kernel, strides, padding, *, name):
    """The input of a convolution, and the padding that is left to Keras."""
    if padding == "none":
        return x, "valid"
    if kernel == 1 or strides == 1:
        return x, "same"
    # Symmetric padding as in Caffe: TF "same" shifts strided convolutions by one pixel.
    return layers.ZeroPadding2D(kernel // 2, name=f"{name}_pad")(x), "valid"


def batch_norm(x, *, epsilon=EPSILON, name):
    """BatchNorm with the momentum of the released networks; Keras' own is 0.99."""
    return layers.BatchNormalization(momentum=0.9, epsilon=epsilon, name=name)(x)


def relu(x, *, name):
    """ReLU as a layer of its own."""
    return layers.ReLU(name=name)(x)


def add_relu(x, shortcut, *, name):
    """The end of a residual block: sum, then ReLU."""
    return relu(layers.Add(name=f"{name}_add")([x, shortcut]), name=f"{name}_relu")


def max_pool_caffe(x, *, name):
    """3x3 max pooling with stride 2 that rounds sizes up, as Caffe does (torch: ceil_mode=True).

    `x` must not be negative (behind a ReLU), so that padding with zeros equals no padding.
    """
    return layers.MaxPooling2D(3, 2, name=name)(layers.ZeroPadding2D(((0, 1), (0, 1)), name=f"{name}_pad")(x))


def max_pool_torch(x, *, name):
    """3x3 max pooling with stride 2 and symmetric padding (torch: padding=1). `x` must not be negative."""
    return layers.MaxPooling2D(3, 2, name=name)(layers.ZeroPadding2D(1, name=f"{name}_pad")(x))


def classifier(x, classes, *, activation, dropout):
    """Global average pooling, dropout if any, and the fully connected layer `predictions`."""
    x = layers.GlobalAveragePooling2D(name="avg_pool")(x)
    if dropout:
        x = layers.Dropout(dropout, name="dropout")(x)
    return predictions(x, classes, activation=activation)


def predictions(x, classes, *, activation):
    """The last fully connected layer. Logits and probabilities stay in float32 under mixed precision."""
    return layers.Dense(classes, kernel_initializer=HE, name=TOP, dtype="float32", activation=activation)(x)


@dataclass(frozen=True, kw_only=True)
class NetworkSpec:
    """What a row of any family has.

    Args:
        head: The classifier: `head(features, classes, activation=..., dropout=...)`.
        dropout: Rate in the classifier.
        classes: Default number of classes.
        input_shape: Default image, and its channels.
        minimum_size: The smallest height and width it accepts.
        sites: Where its blocks can be recalibrated.
        mean: Of each channel of the training images in 0 to 255, in RGB order: what preprocessing subtracts.
        std: Likewise: what it divides by.
        se: Squeeze-and-excitation, or None.
        source: Where the row is published.
    """

    head: Callable = classifier
    dropout: float = 0.0
    classes: int = 1000
    input_shape: tuple[int, int, int] = (224, 224, 3)
    minimum_size: int = 32
    sites: tuple[str, ...] = ("standard",)
    mean: tuple[float, ...] = IMAGENET.mean
    std: tuple[float, ...] = IMAGENET.std
    se: SEConfig | None = None
    source: str

    @property
    def normalization(self) -> Normalization:
        """How the network takes pixels."""
        return Normalization(self.mean, self.std)


def with_se(specs, se):
    """The rows, and beside each its twin with `se`, named `se_...`."""
    return specs | {f"se_{name}": replace(spec, se=se) for name, spec in specs.items()}
