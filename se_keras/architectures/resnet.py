"""ResNet, ResNeXt and SENet-154, with and without SE: one block, one table."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from keras import KerasTensor

from se_keras.blocks import NetworkSpec, add_relu, conv_bn, conv_bn_relu, max_pool_caffe, max_pool_torch, with_se
from se_keras.recalibration import SITES, Hook, SEConfig, Site


def bottleneck(x: KerasTensor, channels: int, *, strides: int, spec: "ResNetSpec", se: Hook, name: str) -> KerasTensor:
    """1x1, 3x3, 1x1 with four times the channels (He et al. 2015, Figure 5; Xie et al. 2016, Figure 3c)."""
    width = channels * spec.width_per_group // 64 * spec.cardinality
    first_strides, inner_strides = (strides, 1) if spec.strides_at == "1x1" else (1, strides)
    y = se("pre", x)
    y = conv_bn_relu(y, width // spec.conv1_divisor, 1, strides=first_strides, name=f"{name}_conv1")
    y = conv_bn_relu(y, width, 3, strides=inner_strides, groups=spec.cardinality, name=f"{name}_conv2")
    y = se("3x3", y)
    y = se("standard", conv_bn(y, 4 * channels, 1, name=f"{name}_conv3"))
    shortcut = se("identity", project(x, 4 * channels, strides=strides, spec=spec, name=name))
    return se("post", add_relu(y, shortcut, name=name))


def basic(x: KerasTensor, channels: int, *, strides: int, spec: "ResNetSpec", se: Hook, name: str) -> KerasTensor:
    """Two 3x3 convolutions (He et al. 2015, Figure 2). The site `3x3` is after the first of them."""
    y = se("pre", x)
    y = se("3x3", conv_bn_relu(y, channels, 3, strides=strides, name=f"{name}_conv1"))
    y = se("standard", conv_bn(y, channels, 3, name=f"{name}_conv2"))
    shortcut = se("identity", project(x, channels, strides=strides, spec=spec, name=name))
    return se("post", add_relu(y, shortcut, name=name))


def project(x: KerasTensor, channels: int, *, strides: int, spec: "ResNetSpec", name: str) -> KerasTensor:
    """The shortcut: `x` itself if the shape stays the same, else a convolution (option B of He et al. 2015)."""
    if strides == 1 and x.shape[-1] == channels:
        return x
    kernel = spec.shortcut_kernel if strides > 1 else 1
    return conv_bn(x, channels, kernel, strides=strides, name=f"{name}_shortcut")


def stem_7x7(x: KerasTensor, spec: "ResNetSpec") -> KerasTensor:
    """7x7 with stride 2, then max pooling."""
    return spec.max_pool(conv_bn_relu(x, 64, 7, strides=2, name="conv1"), name="pool1")


def stem_3x3x3(x: KerasTensor, spec: "ResNetSpec") -> KerasTensor:
    """The stem of SENet-154: "the initial 7x7 convolution is replaced with three 3x3" (appendix), then max pooling."""
    x = conv_bn_relu(x, 64, 3, strides=2, name="conv1_1")
    x = conv_bn_relu(x, 64, 3, name="conv1_2")
    return spec.max_pool(conv_bn_relu(x, 128, 3, name="conv1_3"), name="pool1")


def stem_small(x: KerasTensor, spec: "ResNetSpec") -> KerasTensor:
    """One 3x3 convolution at full resolution, for images of a few pixels."""
    return conv_bn_relu(x, spec.width, 3, name="conv1")


@dataclass(frozen=True, kw_only=True)
class ResNetSpec(NetworkSpec):
    """A row of the family.

    Args:
        blocks: Number of blocks in stages 2, 3, ...
        block: `basic` or `bottleneck`.
        width: Channels of stage 2 (before the bottleneck's factor of four); each later stage doubles them.
        cardinality: Groups of the 3x3 convolution.
        width_per_group: Channels of a group in stage 2, at a width of 64.
        conv1_divisor: Divides the channels of the first 1x1 convolution.
        strides_at: Which convolution of a bottleneck has the stride: the first 1x1 (Caffe) or the 3x3.
        shortcut_kernel: Kernel size of the strided shortcuts.
        stem: Everything before stage 2.
        max_pool: The pooling at the end of the stem.
    """

    blocks: tuple[int, ...]
    block: Callable[..., KerasTensor] = bottleneck
    width: int = 64
    cardinality: int = 1
    width_per_group: int = 64
    conv1_divisor: int = 1
    strides_at: Literal["1x1", "3x3"] = "1x1"
    shortcut_kernel: int = 1
    stem: Callable[..., KerasTensor] = stem_7x7
    max_pool: Callable[..., KerasTensor] = max_pool_caffe
    sites: tuple[Site, ...] = SITES  # a residual block has all five sites of Figure 5
    source: str = "He et al. 2015, Table 1; arXiv:1709.01507, Table 1"

    @property
    def stages(self) -> range:
        """Stage numbers as in the paper: conv1 is stage 1."""
        return range(2, 2 + len(self.blocks))


def build(spec: ResNetSpec, images: KerasTensor) -> KerasTensor:
    """Features of `images`, `(batch, height, width, channels)`, at the end of the last stage."""
    x = spec.stem(images, spec)
    for stage, block, se, name in spec.each_block(spec.blocks):
        strides = 2 if block == 1 and stage > 2 else 1
        x = spec.block(x, spec.width * 2 ** (stage - 2), strides=strides, spec=spec, se=se, name=name)
    return x


SPECS = {
    "resnet18": ResNetSpec(blocks=(2, 2, 2, 2), block=basic),
    "resnet34": ResNetSpec(blocks=(3, 4, 6, 3), block=basic),
    "resnet50": ResNetSpec(blocks=(3, 4, 6, 3)),
    "resnet101": ResNetSpec(blocks=(3, 4, 23, 3)),
    "resnet152": ResNetSpec(blocks=(3, 8, 36, 3)),
}
_resnext = {"cardinality": 32, "width_per_group": 4, "strides_at": "3x3", "source": "Xie et al. 2016, Table 1"}
SPECS |= {
    "resnext50_32x4d": ResNetSpec(blocks=(3, 4, 6, 3), **_resnext),
    "resnext101_32x4d": ResNetSpec(blocks=(3, 4, 23, 3), **_resnext),
}
# "b": stride at the 3x3 and symmetric pooling, as in torchvision and timm.
_torch = {"strides_at": "3x3", "max_pool": max_pool_torch, "source": "torchvision, timm (v1.5)"}
SPECS |= {
    "resnet50b": replace(SPECS["resnet50"], **_torch),
    "resnet101b": replace(SPECS["resnet101"], **_torch),
    "resnet152b": replace(SPECS["resnet152"], **_torch),
    "resnext50b_32x4d": replace(SPECS["resnext50_32x4d"], **_torch),
    # For the 8x8 digits that scikit-learn contains: from training to export in seconds.
    "resnet11_digits": ResNetSpec(
        blocks=(1, 1, 1),
        width=16,
        stem=stem_small,
        classes=10,
        input_shape=(8, 8, 1),
        minimum_size=4,
        mean=(0.0,),
        std=(255.0,),
        recipe="digits",
        source="this project's own, for 8x8 digits",
    ),
}
SPECS = with_se(SPECS, SEConfig())
# The ILSVRC 2017 entry always has SE. Its baseline is create("senet154", se=None).
SPECS["senet154"] = ResNetSpec(
    blocks=(3, 8, 36, 3),
    cardinality=64,
    width_per_group=4,
    conv1_divisor=2,
    strides_at="3x3",
    shortcut_kernel=3,
    stem=stem_3x3x3,
    dropout=0.2,
    se=SEConfig(),
    source="arXiv:1709.01507, section 6.4 and appendix",
)
