"""The networks as functions with the signature of keras.applications: `SEResNet50(weights=None, classes=10)`."""

from collections.abc import Callable, Sequence

import keras

from se_keras.catalogue import AS_PUBLISHED, AsPublished, Pooling, create, spec_of
from se_keras.recalibration import SEConfig
from se_keras.typing import FilePath


def application(function: str, network: str) -> Callable[..., keras.Model]:
    """A function of this name that builds `network`: the signature of keras.applications, with more keywords."""

    def build(
        include_top: bool = True,
        weights: FilePath | None = None,
        input_tensor: keras.KerasTensor | None = None,
        input_shape: Sequence[int | None] | None = None,
        pooling: Pooling | None = None,
        classes: int | None = 1000,
        classifier_activation: str | None = "softmax",
        name: str | None = None,
        *,
        se: SEConfig | None | AsPublished = AS_PUBLISHED,
        include_preprocessing: bool = False,
    ) -> keras.Model:
        return create(
            network,
            se=se,
            include_preprocessing=include_preprocessing,
            include_top=include_top,
            weights=weights,
            input_tensor=input_tensor,
            input_shape=input_shape,
            pooling=pooling,
            classes=classes,
            classifier_activation=classifier_activation,
            name=name,
        )

    build.__name__ = build.__qualname__ = function
    build.__doc__ = f"""Builds `{network}`: {spec_of(network).source}.

    The arguments are those of `se_keras.create`, in the order of keras.applications.
    """
    return build


ResNet18 = application("ResNet18", "resnet18")
ResNet34 = application("ResNet34", "resnet34")
ResNet50 = application("ResNet50", "resnet50")
ResNet101 = application("ResNet101", "resnet101")
ResNet152 = application("ResNet152", "resnet152")
ResNeXt50 = application("ResNeXt50", "resnext50_32x4d")
ResNeXt101 = application("ResNeXt101", "resnext101_32x4d")
SEResNet18 = application("SEResNet18", "se_resnet18")
SEResNet34 = application("SEResNet34", "se_resnet34")
SEResNet50 = application("SEResNet50", "se_resnet50")
SEResNet101 = application("SEResNet101", "se_resnet101")
SEResNet152 = application("SEResNet152", "se_resnet152")
SEResNeXt50 = application("SEResNeXt50", "se_resnext50_32x4d")
SEResNeXt101 = application("SEResNeXt101", "se_resnext101_32x4d")
SENet154 = application("SENet154", "senet154")
VGG16 = application("VGG16", "vgg16_bn")
BNInception = application("BNInception", "bn_inception")
InceptionResNetV2 = application("InceptionResNetV2", "inception_resnet_v2")
MobileNet = application("MobileNet", "mobilenet")
ShuffleNet = application("ShuffleNet", "shufflenet_g3")
SEVGG16 = application("SEVGG16", "se_vgg16_bn")
SEBNInception = application("SEBNInception", "se_bn_inception")
SEInceptionResNetV2 = application("SEInceptionResNetV2", "se_inception_resnet_v2")
SEMobileNet = application("SEMobileNet", "se_mobilenet")
SEShuffleNet = application("SEShuffleNet", "se_shufflenet_g3")
