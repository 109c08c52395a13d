"""VGG with BatchNorm, with and without SE: 3x3 convolutions, then three fully connected layers."""

from dataclasses import dataclass

from keras import KerasTensor, layers

from se_keras.blocks import HE, NetworkSpec, conv_bn_relu, predictions, with_se
from se_keras.recalibration import SEConfig

CHANNELS = (64, 128, 256, 512, 512)  # of stages 1 to 5: Simonyan & Zisserman 2014, Table 1


def fully_connected(x: KerasTensor, classes: int, *, activation: str | None, dropout: float) -> KerasTensor:
    """The classifier of VGG: two layers of 4096 units after the flattened feature map (7x7 at the default size)."""
    if None in x.shape[1:]:
        raise ValueError(f"VGG's classifier needs a fixed input_shape. Received: a feature map of {x.shape[1:]}")
    x = layers.Flatten(name="flatten")(x)
    for name in ("fc1", "fc2"):
        x = layers.Dense(4096, activation="relu", kernel_initializer=HE, name=name)(x)
        x = layers.Dropout(dropout, name=f"{name}_dropout")(x)
    return predictions(x, classes, activation=activation)


@dataclass(frozen=True, kw_only=True)
class VGGSpec(NetworkSpec):
    """A row of the family. A block is a convolution with BatchNorm and ReLU."""

    blocks: tuple[int, ...]  # in stages 1 to 5

    @property
    def stages(self) -> range:
        """Stage numbers as in the names of VGG's layers: conv1_1 is in stage 1."""
        return range(1, 1 + len(self.blocks))


def build(spec: VGGSpec, images: KerasTensor) -> KerasTensor:
    """Features of `images`, `(batch, height, width, channels)`, after the last pooling."""
    x = images
    for stage, block, se, name in spec.each_block(spec.blocks):
        x = se("standard", conv_bn_relu(x, CHANNELS[stage - 1], 3, name=f"{name}_conv"))
        if block == spec.blocks[stage - 1]:  # the last one of its stage
            x = layers.MaxPooling2D(2, name=f"pool{stage}")(x)
    return x


_vgg = {"head": fully_connected, "dropout": 0.5, "source": "Simonyan & Zisserman 2014, Table 1, with BatchNorm"}
SPECS = with_se(
    {
        "vgg11_bn": VGGSpec(blocks=(1, 1, 2, 2, 2), **_vgg),
        "vgg13_bn": VGGSpec(blocks=(2, 2, 2, 2, 2), **_vgg),
        "vgg16_bn": VGGSpec(blocks=(2, 2, 3, 3, 3), **_vgg),
        "vgg19_bn": VGGSpec(blocks=(2, 2, 4, 4, 4), **_vgg),
    },
    SEConfig(),  # after each ReLU
)
