"""BN-Inception and Inception-ResNet-v2, with and without SE: parallel branches of convolutions."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from keras import KerasTensor, layers

from se_keras.blocks import EPSILON, HE, Kernel, NetworkSpec, Padding, conv_bn_relu, max_pool_caffe, relu, with_se
from se_keras.recalibration import Hook, SEConfig

Convolutions = tuple[tuple[int, Kernel], ...]  # (channels, kernel) of each


def branch(
    x: KerasTensor,
    *convolutions: tuple[int, Kernel],
    strides: int = 1,
    padding: Padding = "symmetric",
    epsilon: float = EPSILON,
    name: str,
) -> KerasTensor:
    """A sequence of convolutions. Strides and padding are those of the last one."""
    *first, (channels, kernel) = convolutions
    for number, convolution in enumerate(first, start=1):
        x = conv_bn_relu(x, *convolution, epsilon=epsilon, name=f"{name}_conv{number}")
    name = f"{name}_conv{len(convolutions)}"
    return conv_bn_relu(x, channels, kernel, strides=strides, padding=padding, epsilon=epsilon, name=name)


def concatenate(branches: list[KerasTensor], *, name: str) -> KerasTensor:
    """The end of a module."""
    return layers.Concatenate(name=f"{name}_concat")(branches)


# BN-Inception.


def module(
    x: KerasTensor,
    one: int,
    three_reduce: int,
    three: int,
    double_reduce: int,
    double: int,
    pool: Callable[..., KerasTensor],
    projection: int,
    *,
    se: Hook,
    name: str,
) -> KerasTensor:
    """1x1; 1x1 and 3x3; 1x1 and two 3x3; pooling and 1x1 (Ioffe & Szegedy 2015, appendix)."""
    branches = [
        branch(x, (one, 1), name=f"{name}_branch1"),
        branch(x, (three_reduce, 1), (three, 3), name=f"{name}_branch2"),
        branch(x, (double_reduce, 1), (double, 3), (double, 3), name=f"{name}_branch3"),
        branch(pool(x, name=f"{name}_pool"), (projection, 1), name=f"{name}_branch4"),
    ]
    return se("standard", concatenate(branches, name=name))


def reduction(
    x: KerasTensor, three_reduce: int, three: int, double_reduce: int, double: int, *, se: Hook, name: str
) -> KerasTensor:
    """The module that halves the size. It has no 1x1 branch and no projection after the pooling."""
    branches = [
        branch(x, (three_reduce, 1), (three, 3), strides=2, name=f"{name}_branch1"),
        branch(x, (double_reduce, 1), (double, 3), (double, 3), strides=2, name=f"{name}_branch2"),
        halving_pool(x, name=f"{name}_pool"),
    ]
    return se("standard", concatenate(branches, name=name))


def halving_pool(x: KerasTensor, *, name: str) -> KerasTensor:
    """3x3 max pooling with stride 2: as in Caffe for even sizes; for odd sizes, with the windows of the branches."""
    return layers.MaxPooling2D(3, 2, padding="same", name=name)(x)


def average_pool(x: KerasTensor, *, name: str) -> KerasTensor:
    """3x3 average pooling with stride 1. The zeros of the padding count, as in Caffe."""
    return layers.AveragePooling2D(3, 1, name=name)(layers.ZeroPadding2D(1, name=f"{name}_pad")(x))


def max_pool(x: KerasTensor, *, name: str) -> KerasTensor:
    """3x3 max pooling with stride 1."""
    return layers.MaxPooling2D(3, 1, padding="same", name=name)(x)


def stem_bn_inception(images: KerasTensor) -> KerasTensor:
    """7x7 with stride 2, pooling, 1x1 and 3x3, pooling."""
    x = max_pool_caffe(conv_bn_relu(images, 64, 7, strides=2, name="conv1"), name="pool1")
    return max_pool_caffe(branch(x, (64, 1), (192, 3), name="conv2"), name="pool2")


# The modules of each stage, 3a to 5b. The numbers are the columns of the paper's table.
BN_INCEPTION = {
    3: (
        (module, 64, 64, 64, 64, 96, average_pool, 32),
        (module, 64, 64, 96, 64, 96, average_pool, 64),
        (reduction, 128, 160, 64, 96),
    ),
    4: (
        (module, 224, 64, 96, 96, 128, average_pool, 128),
        (module, 192, 96, 128, 96, 128, average_pool, 128),
        (module, 160, 128, 160, 128, 160, average_pool, 128),
        (module, 96, 128, 192, 160, 192, average_pool, 128),
        (reduction, 128, 192, 192, 256),
    ),
    5: (
        (module, 352, 192, 320, 160, 224, average_pool, 128),
        (module, 352, 192, 320, 192, 224, max_pool, 128),
    ),
}


# Inception-ResNet-v2. Its BatchNorm has the epsilon of the released weights.

_branch = partial(branch, epsilon=1e-3)
_conv = partial(conv_bn_relu, epsilon=1e-3)


def residual(
    x: KerasTensor, branches: tuple[Convolutions, ...], scale: float, *, last: bool = False, se: Hook, name: str
) -> KerasTensor:
    """Branches, a linear 1x1 as wide as the input, a scaled sum (Szegedy et al. 2016, Figures 16, 17, 19, 20)."""
    y = se("pre", x)
    y = concatenate([_branch(y, *b, name=f"{name}_branch{n}") for n, b in enumerate(branches, 1)], name=name)
    y = se("standard", layers.Conv2D(x.shape[-1], 1, kernel_initializer=HE, name=f"{name}_conv")(y))
    y = layers.Add(name=f"{name}_add")([se("identity", x), layers.Rescaling(scale, name=f"{name}_scale")(y)])
    return se("post", y if last else relu(y, name=f"{name}_relu"))


def mixed_5b(x: KerasTensor, *, se: Hook, name: str) -> KerasTensor:
    """The module after the stem. It has no shortcut, and is not recalibrated."""
    pooled = layers.AveragePooling2D(3, 1, padding="same", name=f"{name}_pool")(x)
    branches = [
        _branch(x, (96, 1), name=f"{name}_branch1"),
        _branch(x, (48, 1), (64, 5), name=f"{name}_branch2"),
        _branch(x, (64, 1), (96, 3), (96, 3), name=f"{name}_branch3"),
        _branch(pooled, (64, 1), name=f"{name}_branch4"),
    ]
    return concatenate(branches, name=name)


def valid_reduction(x: KerasTensor, *branches: Convolutions, se: Hook, name: str) -> KerasTensor:
    """Branches with stride 2, and the pooled input (Szegedy et al. 2016, Figures 7 and 18)."""
    made = [_branch(x, *b, strides=2, padding="none", name=f"{name}_branch{n}") for n, b in enumerate(branches, 1)]
    return concatenate([*made, layers.MaxPooling2D(3, 2, name=f"{name}_pool")(x)], name=name)


def widening(x: KerasTensor, *, se: Hook, name: str) -> KerasTensor:
    """The 1x1 convolution before the classifier."""
    return _conv(x, 1536, 1, name=f"{name}_conv")


def stem_inception_resnet(images: KerasTensor) -> KerasTensor:
    """Convolutions and pooling, most without padding. They reduce 299x299 to 35x35."""
    x = _conv(images, 32, 3, strides=2, padding="none", name="conv1")
    x = _conv(x, 32, 3, padding="none", name="conv2")
    x = layers.MaxPooling2D(3, 2, name="pool1")(_conv(x, 64, 3, name="conv3"))
    x = _conv(_conv(x, 80, 1, name="conv4"), 192, 3, padding="none", name="conv5")
    return layers.MaxPooling2D(3, 2, name="pool2")(x)


_block35 = (residual, (((32, 1),), ((32, 1), (32, 3)), ((32, 1), (48, 3), (64, 3))), 0.17)
_block17 = (residual, (((192, 1),), ((128, 1), (160, (1, 7)), (192, (7, 1)))), 0.10)
_block8 = (residual, (((192, 1),), ((192, 1), (224, (1, 3)), (256, (3, 1)))), 0.20)
INCEPTION_RESNET_V2 = {
    3: ((mixed_5b,), *[_block35] * 10),
    4: ((valid_reduction, ((384, 3),), ((256, 1), (256, 3), (384, 3))), *[_block17] * 20),
    5: (
        (valid_reduction, ((256, 1), (384, 3)), ((256, 1), (288, 3)), ((256, 1), (288, 3), (320, 3))),
        *[_block8] * 9,
        (partial(residual, last=True), _block8[1], 1.0),
        (widening,),
    ),
}


@dataclass(frozen=True, kw_only=True)
class InceptionSpec(NetworkSpec):
    """A row of the family.

    Args:
        stem: Everything before stage 3.
        modules: The modules of each stage: the function that builds a module, and its arguments.
    """

    stem: Callable[[KerasTensor], KerasTensor]
    modules: dict[int, tuple[tuple[Any, ...], ...]]

    @property
    def stages(self) -> tuple[int, ...]:
        """Stage numbers as in the names of BN-Inception's modules, 3a to 5b: one for each size of the feature map."""
        return tuple(self.modules)


def build(spec: InceptionSpec, images: KerasTensor) -> KerasTensor:
    """Features of `images`, `(batch, height, width, channels)`, at the end of the last module."""
    x = spec.stem(images)
    for stage, block, se, name in spec.each_block(map(len, spec.modules.values())):
        build_module, *arguments = spec.modules[stage][block - 1]
        x = build_module(x, *arguments, se=se, name=name)
    return x


SPECS = with_se(
    {
        "bn_inception": InceptionSpec(
            stem=stem_bn_inception,
            modules=BN_INCEPTION,  # SE on each of the ten
            source="Ioffe & Szegedy 2015, Figure 5; arXiv:1709.01507, Table 2",
        ),
        "inception_resnet_v2": InceptionSpec(
            stem=stem_inception_resnet,
            modules=INCEPTION_RESNET_V2,  # SE on each residual branch
            sites=("standard", "pre", "post", "identity"),
            input_shape=(299, 299, 3),
            minimum_size=75,
            mean=(127.5, 127.5, 127.5),
            std=(127.5, 127.5, 127.5),
            source="Szegedy et al. 2016, as released in TF-Slim; arXiv:1709.01507, Table 2",
        ),
    },
    SEConfig(),
)
