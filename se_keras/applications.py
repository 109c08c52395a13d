"""The networks as functions with the signature of keras.applications: `SEResNet50(weights=None, classes=10)`."""

from se_keras.catalogue import AS_PUBLISHED, create, spec_of


def application(network):
    """Returns a function that builds `network`; it takes the keywords of keras.applications, and `se`."""

    def build(
        include_top=True,
        weights=None,
        input_tensor=None,
        input_shape=None,
        pooling=None,
        classes=1000,
        classifier_activation="softmax",
        name=None,
        *,
        se=AS_PUBLISHED,
    ):
        return create(
            network,
            se=se,
            include_top=include_top,
            weights=weights,
            input_tensor=input_tensor,
            input_shape=input_shape,
            pooling=pooling,
            classes=classes,
            classifier_activation=classifier_activation,
            name=name,
        )

    build.__name__ = build.__qualname__ = network
    build.__doc__ = f"""Builds `{network}`: {spec_of(network).source}.

    The arguments are those of `se_keras.create`, in the order of keras.applications.
    """
    return build


ResNet18 = application("resnet18")
ResNet34 = application("resnet34")
ResNet50 = application("resnet50")
ResNet101 = application("resnet101")
ResNet152 = application("resnet152")
ResNeXt50 = application("resnext50_32x4d")
ResNeXt101 = application("resnext101_32x4d")
SEResNet18 = application("se_resnet18")
SEResNet34 = application("se_resnet34")
SEResNet50 = application("se_resnet50")
SEResNet101 = application("se_resnet101")
SEResNet152 = application("se_resnet152")
SEResNeXt50 = application("se_resnext50_32x4d")
SEResNeXt101 = application("se_resnext101_32x4d")
SENet154 = application("senet154")
