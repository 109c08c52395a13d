"""The CIFAR networks, with and without SE: pre-activation and wide ResNets, and Shake-Shake."""

from collections.abc import Callable
from dataclasses import dataclass

from keras import KerasTensor, layers

from se_keras.blocks import NetworkSpec, add_relu, batch_norm, conv, conv_bn, conv_bn_relu, relu, with_se
from se_keras.layers import Mixture, ShakeShake
from se_keras.recalibration import SITES, Hook, SEConfig, Site

# Pre-activation blocks: BatchNorm and ReLU come before their convolution, and nothing comes after the sum.


def basic(x: KerasTensor, channels: int, *, strides: int, spec: "CifarSpec", se: Hook, name: str) -> KerasTensor:
    """Two 3x3 convolutions (He et al. 2016, Figure 1b). The site `3x3` is between them."""
    activated = bn_relu(x, name=f"{name}_conv1")
    y = conv(se("pre", activated), channels, 3, strides=strides, name=f"{name}_conv1")
    y = se("3x3", bn_relu(y, name=f"{name}_conv2"))
    y = se("standard", conv(y, channels, 3, name=f"{name}_conv2"))
    return add(y, project(x, activated, channels, strides=strides, name=name), se=se, name=name)


def bottleneck(x: KerasTensor, channels: int, *, strides: int, spec: "CifarSpec", se: Hook, name: str) -> KerasTensor:
    """1x1, 3x3, 1x1 with four times the channels (He et al. 2016, section 5)."""
    activated = bn_relu(x, name=f"{name}_conv1")
    y = conv(se("pre", activated), channels, 1, name=f"{name}_conv1")
    y = conv(bn_relu(y, name=f"{name}_conv2"), channels, 3, strides=strides, name=f"{name}_conv2")
    y = se("3x3", bn_relu(y, name=f"{name}_conv3"))
    y = se("standard", conv(y, 4 * channels, 1, name=f"{name}_conv3"))
    return add(y, project(x, activated, 4 * channels, strides=strides, name=name), se=se, name=name)


def bn_relu(x: KerasTensor, *, name: str) -> KerasTensor:
    """BatchNorm and ReLU before the convolution `name`, or after the last block."""
    return relu(batch_norm(x, name=f"{name}_bn"), name=f"{name}_relu")


def project(x: KerasTensor, activated: KerasTensor, channels: int, *, strides: int, name: str) -> KerasTensor:
    """The shortcut: `x` itself if the shape stays the same, else a 1x1 convolution of the activated input."""
    if strides == 1 and x.shape[-1] == channels:
        return x
    return conv(activated, channels, 1, strides=strides, name=f"{name}_shortcut")


def add(y: KerasTensor, shortcut: KerasTensor, *, se: Hook, name: str) -> KerasTensor:
    """The end of a block: the sum, without an activation."""
    return se("post", layers.Add(name=f"{name}_add")([y, se("identity", shortcut)]))


# Shake-Shake: two branches are mixed at random, then recalibrated together.


def shake_basic(x: KerasTensor, channels: int, *, strides: int, spec: "CifarSpec", se: Hook, name: str) -> KerasTensor:
    """Branches of ReLU, 3x3, ReLU, 3x3 (Gastaldi 2017, section 2.1)."""
    activated = relu(x, name=f"{name}_relu")

    def branch(y, *, name):
        y = conv_bn_relu(y, channels, 3, strides=strides, name=f"{name}_conv1")
        return conv_bn(y, channels, 3, name=f"{name}_conv2")

    y = shake(se("pre", activated), branch, spec=spec, se=se, name=name)
    return add(y, skip(x, activated, channels, strides=strides, name=name), se=se, name=name)


def shake_bottleneck(
    x: KerasTensor, channels: int, *, strides: int, spec: "CifarSpec", se: Hook, name: str
) -> KerasTensor:
    """Branches of 1x1, grouped 3x3, 1x1; ReLU after the sum (Gastaldi 2017, its released ResNeXt)."""

    def branch(y, *, name):
        width = channels * spec.cardinality
        y = conv_bn_relu(y, width, 1, name=f"{name}_conv1")
        y = conv_bn_relu(y, width, 3, strides=strides, groups=spec.cardinality, name=f"{name}_conv2")
        return conv_bn(y, 4 * channels, 1, name=f"{name}_conv3")

    y = shake(se("pre", x), branch, spec=spec, se=se, name=name)
    fits = x.shape[-1] == 4 * channels
    shortcut = x if fits else conv_bn(x, 4 * channels, 1, strides=strides, name=f"{name}_shortcut")
    return se("post", add_relu(y, se("identity", shortcut), name=name))


def shake(x: KerasTensor, branch: Callable[..., KerasTensor], *, spec: "CifarSpec", se: Hook, name: str) -> KerasTensor:
    """Two branches, mixed."""
    branches = [branch(x, name=f"{name}_branch{number}") for number in (1, 2)]
    return se("standard", ShakeShake(spec.forward, spec.backward, name=f"{name}_shake")(branches))


def skip(x: KerasTensor, activated: KerasTensor, channels: int, *, strides: int, name: str) -> KerasTensor:
    """The shortcut: `x` itself, or two concatenated 1x1 convolutions, one of them of the input shifted by one pixel."""
    if x.shape[-1] == channels:
        return x
    shifted = layers.Cropping2D(((0, 1), (0, 1)), name=f"{name}_shortcut2_crop")(activated)
    shifted = layers.ZeroPadding2D(((1, 0), (1, 0)), name=f"{name}_shortcut2_pad")(shifted)
    halves = [
        conv(half, channels // 2, 1, strides=strides, name=f"{name}_shortcut{number}")
        for number, half in enumerate((activated, shifted), start=1)
    ]
    return batch_norm(layers.Concatenate(name=f"{name}_shortcut_concat")(halves), name=f"{name}_shortcut_bn")


@dataclass(frozen=True, kw_only=True)
class CifarSpec(NetworkSpec):
    """A row of the family.

    Args:
        blocks: Number of blocks in each of the three stages.
        block: The function that builds a block.
        stem: The 3x3 convolution before stage 2: `conv`, `conv_bn` or `conv_bn_relu`.
        stem_channels: Channels of the stem.
        end: The layers after the last block; None after blocks that end in ReLU.
        width: Channels of stage 2 (before a bottleneck's factor of four); each later stage doubles them.
        cardinality: Groups of the 3x3 convolution in a Shake-Shake bottleneck, each with `width` channels.
        forward, backward: How Shake-Shake mixes the outputs of the branches, and their gradients.
    """

    blocks: int
    block: Callable[..., KerasTensor] = basic
    stem: Callable[..., KerasTensor] = conv
    stem_channels: int = 16
    end: Callable[..., KerasTensor] | None = bn_relu
    width: int = 16
    cardinality: int = 1
    forward: Mixture = "shake"
    backward: Mixture = "shake"
    classes: int = 10
    input_shape: tuple[int, int, int] = (32, 32, 3)
    minimum_size: int = 8
    mean: tuple[float, ...] = (125.3, 123.0, 113.9)  # of CIFAR-10, from the released code of the wide ResNets
    std: tuple[float, ...] = (63.0, 62.1, 66.7)
    recipe: str = "paper_cifar"
    sites: tuple[Site, ...] = SITES

    @property
    def stages(self) -> tuple[int, ...]:
        """Stage numbers as in He et al. 2015: conv1 is stage 1."""
        return (2, 3, 4)


def build(spec: CifarSpec, images: KerasTensor) -> KerasTensor:
    """Features of `images`, `(batch, height, width, channels)`, at the end of the last stage."""
    x = spec.stem(images, spec.stem_channels, 3, name="conv1")
    for stage, block, se, name in spec.each_block([spec.blocks] * 3):
        strides = 2 if block == 1 and stage > 2 else 1
        x = spec.block(x, spec.width * 2 ** (stage - 2), strides=strides, spec=spec, se=se, name=name)
    return spec.end(x, name="stage4_end") if spec.end else x


_preact = "He et al. 2016 (arXiv:1603.05027), Table 1; arXiv:1709.01507, Tables 4 and 5"
_shake = "Gastaldi 2017 (arXiv:1705.07485); arXiv:1709.01507, "
_block_sites: tuple[Site, ...] = ("standard", "pre", "post", "identity")  # not 3x3, which each branch would have
SPECS = with_se(
    {
        # Depth is 6 n + 2 with basic blocks, 9 n + 2 with bottlenecks.
        "resnet20": CifarSpec(blocks=3, source="He et al. 2015, Table 6, with pre-activation"),
        "resnet56": CifarSpec(blocks=9, source="He et al. 2015, Table 6, with pre-activation"),
        "resnet110": CifarSpec(blocks=18, source=_preact),
        "resnet164": CifarSpec(blocks=18, block=bottleneck, source=_preact),
        "wrn16_8": CifarSpec(
            blocks=2,
            width=128,
            source="Zagoruyko & Komodakis 2016 (arXiv:1605.07146), Table 1; arXiv:1709.01507, Tables 4 and 5",
        ),
        "shake_shake_26_2x96d": CifarSpec(
            blocks=4, block=shake_basic, stem=conv_bn, end=relu, width=96, sites=_block_sites, source=f"{_shake}Table 4"
        ),
        "shake_even_29_2x4x64d": CifarSpec(
            blocks=3,
            block=shake_bottleneck,
            stem=conv_bn_relu,
            stem_channels=64,
            end=None,
            width=64,
            cardinality=4,
            backward="even",
            sites=_block_sites,
            classes=100,
            source=f"{_shake}Table 5",
        ),
    },
    SEConfig(),
)
