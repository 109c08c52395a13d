"""ShuffleNet (v1), with and without SE: grouped 1x1 convolutions with a channel shuffle between them."""

from dataclasses import dataclass

from keras import KerasTensor, layers

from se_keras.blocks import NetworkSpec, add_relu, conv_bn, conv_bn_relu, depthwise_bn, max_pool_torch, relu, with_se
from se_keras.layers import ChannelShuffle
from se_keras.recalibration import SITES, Hook, SEConfig, Site

BLOCKS = (4, 8, 4)  # in stages 2 to 4: Zhang et al. 2018, Table 1
CHANNELS = {1: 144, 2: 200, 3: 240, 4: 272, 8: 384}  # of stage 2, by groups; each later stage doubles them


def shuffle_unit(
    x: KerasTensor, channels: int, *, strides: int, first_groups: int, groups: int, se: Hook, name: str
) -> KerasTensor:
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1 (Zhang et al. 2018, Figure 2b; Figure 2c with a stride)."""
    # A unit with a stride concatenates the branch and its pooled input: the branch has the remaining channels.
    branch_channels = channels - x.shape[-1] if strides > 1 else channels
    y = se("pre", x)
    y = conv_bn_relu(y, channels // 4, 1, groups=first_groups, name=f"{name}_conv1")
    y = ChannelShuffle(groups, name=f"{name}_shuffle")(y)
    y = se("3x3", depthwise_bn(y, 3, strides=strides, name=f"{name}_conv2"))
    y = se("standard", conv_bn(y, branch_channels, 1, groups=groups, name=f"{name}_conv3"))
    if strides == 1:
        return se("post", add_relu(y, se("identity", x), name=name))
    padded = layers.ZeroPadding2D(1, name=f"{name}_shortcut_pad")(x)
    shortcut = se("identity", layers.AveragePooling2D(3, strides, name=f"{name}_shortcut")(padded))
    return se("post", relu(layers.Concatenate(name=f"{name}_concat")([y, shortcut]), name=f"{name}_relu"))


@dataclass(frozen=True, kw_only=True)
class ShuffleNetSpec(NetworkSpec):
    """A row of the family.

    Args:
        groups: Groups of the 1x1 convolutions.
        width: Multiplier of every number of channels. The product is rounded up to a multiple of the groups; the
            paper does not say how to round.
    """

    groups: int
    width: float = 1.0
    sites: tuple[Site, ...] = SITES  # a shuffle unit is a residual block
    source: str = "Zhang et al. 2018, Table 1; arXiv:1709.01507, Table 3"

    @property
    def stages(self) -> range:
        """Stage numbers as in Zhang et al. 2018, Table 1."""
        return range(2, 2 + len(BLOCKS))


def build(spec: ShuffleNetSpec, images: KerasTensor) -> KerasTensor:
    """Features of `images`, `(batch, height, width, channels)`, at the end of the last stage."""
    # The branch of the first unit of stage 2 has channels - stem channels: the groups must divide both.
    stem = _rounded_up(24 * spec.width, of=spec.groups)
    x = max_pool_torch(conv_bn_relu(images, stem, 3, strides=2, name="conv1"), name="pool1")
    width = _rounded_up(CHANNELS[spec.groups] * spec.width, of=4 * spec.groups)
    for stage, block, se, name in spec.each_block(BLOCKS):
        x = shuffle_unit(
            x,
            width * 2 ** (stage - 2),
            strides=2 if block == 1 else 1,
            # "we do not apply group convolution on the first pointwise layer": its input has few channels.
            first_groups=1 if stage == 2 and block == 1 else spec.groups,
            groups=spec.groups,
            se=se,
            name=name,
        )
    return x


def _rounded_up(channels, *, of):
    """`channels`, rounded up to a multiple of `of`."""
    return -int(-channels // of) * of


SPECS = with_se(
    {f"shufflenet_g{groups}": ShuffleNetSpec(groups=groups) for groups in CHANNELS}
    | {f"shufflenet_g{groups}_050": ShuffleNetSpec(groups=groups, width=0.5) for groups in CHANNELS}
    | {f"shufflenet_g{groups}_025": ShuffleNetSpec(groups=groups, width=0.25) for groups in CHANNELS}
    | {
        "shufflenet_g3_150": ShuffleNetSpec(groups=3, width=1.5),
        "shufflenet_g3_200": ShuffleNetSpec(groups=3, width=2.0),
    },
    SEConfig(),
)
