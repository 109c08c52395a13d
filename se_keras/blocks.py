"""Shared by all families: the fields of a row, the order of blocks, convolution with BatchNorm, the classifier."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from keras import KerasTensor, initializers, layers

from se_keras.normalization import IMAGENET, Normalization
from se_keras.recalibration import Hook, SEConfig, Site, recalibrator

Padding = Literal["symmetric", "none"]  # "none" as in the first layers of Inception
Kernel = int | tuple[int, int]  # (height, width) only with stride 1

EPSILON = 1e-5  # of BatchNorm, as in the released networks; the default of Keras is 1e-3
TOP = "predictions"
HEAD = (TOP, "fc1", "fc2")  # layers with weights after the features
# "We adopt the weight initialisation strategy of [He et al. 2015]", section 5: variance 2 / fan-in. Uniform, because
# drawing 28 million normal values takes longer than building the rest of the network.
HE = "he_uniform"


def conv(
    x: KerasTensor,
    channels: int,
    kernel: Kernel,
    *,
    strides: int = 1,
    groups: int = 1,
    padding: Padding = "symmetric",
    name: str,
) -> KerasTensor:
    """Convolution without bias."""
    x, keras_padding = _padded(x, kernel, strides, padding, name=name)
    layer = layers.Conv2D(
        channels, kernel, strides, keras_padding, groups=groups, use_bias=False, kernel_initializer=HE, name=name
    )
    return layer(x)


def conv_bn(x: KerasTensor, channels: int, kernel: int, *, strides: int = 1, groups: int = 1, name: str) -> KerasTensor:
    """Convolution without bias, then BatchNorm."""
    return batch_norm(conv(x, channels, kernel, strides=strides, groups=groups, name=name), name=f"{name}_bn")


def conv_bn_relu(
    x: KerasTensor,
    channels: int,
    kernel: Kernel,
    *,
    strides: int = 1,
    groups: int = 1,
    padding: Padding = "symmetric",
    epsilon: float = EPSILON,
    name: str,
) -> KerasTensor:
    """Convolution, BatchNorm, ReLU."""
    x = conv(x, channels, kernel, strides=strides, groups=groups, padding=padding, name=name)
    return relu(batch_norm(x, epsilon=epsilon, name=f"{name}_bn"), name=f"{name}_relu")


def depthwise_bn(x: KerasTensor, kernel: int, *, strides: int = 1, name: str) -> KerasTensor:
    """Depthwise convolution without bias, padded symmetrically, then BatchNorm."""
    x, keras_padding = _padded(x, kernel, strides, "symmetric", name=name)
    # Each output reads kernel x kernel values; the initializers of Keras count those of all channels.
    limit = math.sqrt(6 / kernel**2)
    uniform: Any = initializers.RandomUniform(-limit, limit)  # pyright takes the type of the default, str
    x = layers.DepthwiseConv2D(
        kernel, strides, keras_padding, use_bias=False, depthwise_initializer=uniform, name=name
    )(x)
    return batch_norm(x, name=f"{name}_bn")


def _padded(x, kernel, strides, padding, *, name):
    """The input of a convolution, padded where Keras cannot do it, and the padding argument for Keras."""
    if padding == "none":
        return x, "valid"
    if kernel == 1 or strides == 1:
        return x, "same"
    # Symmetric padding as in Caffe: TF "same" shifts strided convolutions by one pixel.
    return layers.ZeroPadding2D(kernel // 2, name=f"{name}_pad")(x), "valid"


def batch_norm(x: KerasTensor, *, epsilon: float = EPSILON, name: str) -> KerasTensor:
    """BatchNorm with the momentum of the released networks. The default of Keras is 0.99."""
    return layers.BatchNormalization(momentum=0.9, epsilon=epsilon, name=name)(x)


def relu(x: KerasTensor, *, name: str) -> KerasTensor:
    """ReLU as a separate layer."""
    return layers.ReLU(name=name)(x)


def add_relu(x: KerasTensor, shortcut: KerasTensor, *, name: str) -> KerasTensor:
    """The end of a residual block: sum, then ReLU."""
    return relu(layers.Add(name=f"{name}_add")([x, shortcut]), name=f"{name}_relu")


def max_pool_caffe(x: KerasTensor, *, name: str) -> KerasTensor:
    """3x3 max pooling with stride 2 that rounds sizes up, as Caffe does (torch: ceil_mode=True).

    `x` must not be negative (as after a ReLU), so that padding with zeros equals no padding.
    """
    return layers.MaxPooling2D(3, 2, name=name)(layers.ZeroPadding2D(((0, 1), (0, 1)), name=f"{name}_pad")(x))


def max_pool_torch(x: KerasTensor, *, name: str) -> KerasTensor:
    """3x3 max pooling with stride 2 and symmetric padding (torch: padding=1). `x` must not be negative."""
    return layers.MaxPooling2D(3, 2, name=name)(layers.ZeroPadding2D(1, name=f"{name}_pad")(x))


def classifier(x: KerasTensor, classes: int, *, activation: str | None, dropout: float) -> KerasTensor:
    """Global average pooling, dropout if its rate is not 0, and the fully connected layer `predictions`."""
    x = layers.GlobalAveragePooling2D(name="avg_pool")(x)
    if dropout:
        x = layers.Dropout(dropout, name="dropout")(x)
    return predictions(x, classes, activation=activation)


def predictions(x: KerasTensor, classes: int, *, activation: str | None) -> KerasTensor:
    """The last fully connected layer. Its outputs stay in float32 under mixed precision."""
    return layers.Dense(classes, kernel_initializer=HE, name=TOP, dtype="float32", activation=activation)(x)


@dataclass(frozen=True, kw_only=True)
class NetworkSpec:
    """The fields that a row of any family has.

    Args:
        head: The classifier: `head(features, classes, activation=..., dropout=...)`.
        dropout: Rate of the dropout in the classifier.
        classes: Default number of classes.
        input_shape: Default `(height, width, channels)`.
        minimum_size: The smallest height and width that the network accepts.
        sites: The sites where its blocks can be recalibrated.
        mean, std: Preprocessing computes (pixel - mean) / std in each channel (RGB, pixels in 0 to 255).
        recipe: Name of the recipe to train it with.
        se: Squeeze-and-excitation, or None.
        source: Where the network is published.
    """

    head: Callable[..., KerasTensor] = classifier
    dropout: float = 0.0
    classes: int = 1000
    input_shape: tuple[int, int, int] = (224, 224, 3)
    minimum_size: int = 32
    sites: tuple[Site, ...] = ("standard",)
    mean: tuple[float, ...] = IMAGENET.mean
    std: tuple[float, ...] = IMAGENET.std
    recipe: str = "paper_imagenet"
    se: SEConfig | None = None
    source: str

    @property
    def normalization(self) -> Normalization:
        """The normalization of pixels that the network was trained on."""
        return Normalization(self.mean, self.std)

    @property
    def stages(self) -> Sequence[int]:
        """The numbers of the stages, for `SEConfig.stages`."""
        raise NotImplementedError

    def each_block(self, counts: Iterable[int]) -> Iterator[tuple[int, int, Hook, str]]:
        """Yields stage, number (from 1), hook and name of each block; `counts` are the numbers of blocks by stage."""
        for stage, count in zip(self.stages, counts, strict=True):
            for block in range(1, count + 1):
                name = f"stage{stage}_block{block}"
                yield stage, block, recalibrator(self.se, stage=stage, name=name), name


Spec = TypeVar("Spec", bound=NetworkSpec)


def with_se(specs: dict[str, Spec], se: SEConfig) -> dict[str, Spec]:
    """The rows, and a variant of each with `se`, named `se_...`."""
    return specs | {f"se_{name}": replace(spec, se=se) for name, spec in specs.items()}
