"""MobileNet (v1), with and without SE: depthwise-separable blocks."""

from dataclasses import dataclass, replace

from keras import KerasTensor

from se_keras.blocks import NetworkSpec, conv_bn_relu, depthwise_bn, relu, with_se
from se_keras.recalibration import Hook, SEConfig, Site

# Howard et al. 2017, Table 1: output channels of the 13 blocks, by stage. From stage 2 on, the first block of a stage
# halves the size: stage n has a stride of 2 ** n.
CHANNELS = ((64,), (128, 128), (256, 256), (512,) * 6, (1024, 1024))


def separable(x: KerasTensor, channels: int, *, strides: int, se: Hook, name: str) -> KerasTensor:
    """Depthwise 3x3, then pointwise 1x1 (Howard et al. 2017, Figure 3)."""
    x = se("3x3", relu(depthwise_bn(x, 3, strides=strides, name=f"{name}_conv1"), name=f"{name}_conv1_relu"))
    return se("standard", conv_bn_relu(x, channels, 1, name=f"{name}_conv2"))


@dataclass(frozen=True, kw_only=True)
class MobileNetSpec(NetworkSpec):
    """A row of the family."""

    alpha: float = 1.0  # the width multiplier, for every number of channels
    sites: tuple[Site, ...] = ("standard", "3x3")
    source: str = "Howard et al. 2017, Table 1; arXiv:1709.01507, Table 3"

    @property
    def stages(self) -> range:
        """Stage numbers from 1: one stage for each size of the feature map."""
        return range(1, 1 + len(CHANNELS))


def build(spec: MobileNetSpec, images: KerasTensor) -> KerasTensor:
    """Features of `images`, `(batch, height, width, channels)`, at the end of the last block."""
    x = conv_bn_relu(images, int(32 * spec.alpha), 3, strides=2, name="conv1")
    for stage, block, se, name in spec.each_block(map(len, CHANNELS)):
        channels = int(CHANNELS[stage - 1][block - 1] * spec.alpha)
        x = separable(x, channels, strides=2 if block == 1 and stage > 1 else 1, se=se, name=name)
    return x


_mobilenet = MobileNetSpec()
SPECS = with_se(
    {
        "mobilenet": _mobilenet,
        "mobilenet_075": replace(_mobilenet, alpha=0.75),
        "mobilenet_050": replace(_mobilenet, alpha=0.5),
        "mobilenet_025": replace(_mobilenet, alpha=0.25),
    },
    SEConfig(),
)
