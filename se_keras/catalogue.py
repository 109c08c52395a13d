"""Every network by name: `create` builds one, `names` lists them. Owns each keyword of keras.applications."""

import difflib
from dataclasses import replace

import keras

from se_keras.architectures import cifar, inception, mobilenet, resnet, shufflenet, vgg
from se_keras.blocks import HEAD
from se_keras.recalibration import check_fits
from se_keras.weights.porting import load_weights
from se_keras.weights.released import IMAGENET, imagenet

FAMILIES = (resnet, vgg, inception, mobilenet, shufflenet, cifar)
AS_PUBLISHED = "as published"


def _merge(families):
    rows = {}
    for family in families:
        for name, spec in family.SPECS.items():
            if name in rows:
                raise ValueError(f"Two rows are named {name!r}: in {rows[name][0].__name__} and {family.__name__}")
            rows[name] = (family, spec)
    return rows


_ROWS = _merge(FAMILIES)


def names():
    """The names that `create` accepts: baselines, and their twins with squeeze-and-excitation."""
    return sorted(_ROWS)


def spec_of(network):
    """The row behind a name, a frozen dataclass of its family.

    Raises:
        ValueError: If there is no such network; the message has the nearest names.
    """
    return _row(network)[1]


def create(
    network,
    /,
    *,
    se=AS_PUBLISHED,
    include_top=True,
    weights=None,
    input_tensor=None,
    input_shape=None,
    pooling=None,
    classes=None,
    classifier_activation="softmax",
    include_preprocessing=False,
    name=None,
):
    """Builds a network of the catalogue as a functional Keras model.

    Args:
        network: One of `names()`, such as `"se_resnet50"`.
        se: An `SEConfig` in place of the row's own; `None` gives the plain baseline.
        include_top: Whether the classifier stands at the end.
        weights: `None` for random ones (He et al. 2015); `"imagenet"` for the released ones, fetched the first time;
            or a file of the same network, whose classifier does not matter without the top: `.weights.h5` or `.keras`
            as Keras saves it, `.safetensors` or `.pth` as timm and pytorchcv do.
        input_tensor: A Keras tensor to use as the images.
        input_shape: `(height, width, channels)`; height and width may be `None`. Default: the row's own, and free
            height and width without the top.
        pooling: Without the top: `None` for the feature map, `"avg"` or `"max"` for a vector.
        classes: Number of classes of the classifier. Default: the row's own, 1000 for ImageNet's networks.
        classifier_activation: Its activation; `None` gives logits.
        include_preprocessing: Whether the network itself turns RGB images in 0 to 255 into what it was trained on.
        name: Of the model; default: the network's.

    Returns:
        A `keras.Model` from `(batch, height, width, channels)`, channels last, to `(batch, classes)`.

    Raises:
        ValueError, TypeError: If an argument is not one of the above, or if the weights do not fit.
        OSError: If there is no such file of weights, or if they cannot be fetched.
    """
    family, spec = _row(network)
    if se != AS_PUBLISHED:
        check_fits(se, network=network, sites=spec.sites, stages=spec.stages)
        spec = replace(spec, se=se)
    if keras.config.image_data_format() != "channels_last":
        raise ValueError("se_keras builds channels-last networks. Received: keras.config.image_data_format()="
                         f"{keras.config.image_data_format()!r}")  # fmt: skip
    if pooling not in (None, "avg", "max"):
        raise ValueError(f"pooling must be None, 'avg' or 'max'. Received: pooling={pooling!r}")
    classes = spec.classes if classes is None else classes
    if include_top and (isinstance(classes, bool) or not isinstance(classes, int) or classes < 1):
        raise ValueError(f"classes must be a positive int. Received: classes={classes!r}")

    if input_tensor is None:
        images = keras.Input(_input_shape(input_shape, include_top, spec), name="images")
    elif keras.utils.is_keras_tensor(input_tensor):
        _input_shape(input_tensor.shape[1:], include_top, spec)
        images = input_tensor
    else:
        raise TypeError(f"input_tensor must be a Keras tensor, as keras.Input returns. Received: {type(input_tensor)}")
    if isinstance(weights, str) and weights == "imagenet":
        _check_released(network, spec, images.shape[1:], classes if include_top else None)
        weights = imagenet(network, build=lambda: create(network))

    x = images
    if include_preprocessing:
        if x.shape[-1] != len(spec.mean):
            raise ValueError(f"{network} preprocesses {len(spec.mean)} channels. Received: input_shape={x.shape[1:]}")
        x = spec.normalization.as_layer("preprocessing")(x)
    x = family.build(spec, x)
    if include_top:
        x = spec.head(x, classes, activation=classifier_activation, dropout=spec.dropout)
    elif pooling == "avg":
        x = keras.layers.GlobalAveragePooling2D(name="avg_pool")(x)
    elif pooling == "max":
        x = keras.layers.GlobalMaxPooling2D(name="max_pool")(x)
    inputs = keras.utils.get_source_inputs(images)
    model = keras.Model(inputs[0] if len(inputs) == 1 else inputs, x, name=name or network)
    if weights is not None:
        before = set(keras.Model(inputs, images).layers)
        load_weights(
            [layer for layer in model.layers if layer not in before], weights, ignore=() if include_top else HEAD
        )
    return model


def _check_released(network, spec, shape, classes):
    """Raises ValueError where released weights cannot fit, before any are fetched; `classes` is None without a top."""
    row = spec_of(network)
    if network not in IMAGENET:
        return
    if classes not in (None, row.classes):
        raise ValueError(f"weights='imagenet' has a classifier of {row.classes} classes: classes must be "
                         f"{row.classes}, or include_top False. Received: classes={classes}")  # fmt: skip
    if spec != row:
        raise ValueError(f"weights='imagenet' was trained as {network} is published: se must be left out, or be the "
                         f"row's own. Received: se={spec.se}")  # fmt: skip
    if shape[-1] != row.input_shape[-1]:
        raise ValueError(f"weights='imagenet' takes images of {row.input_shape[-1]} channels. "
                         f"Received: input_shape={tuple(shape)}")  # fmt: skip


def _row(network):
    if not isinstance(network, str):
        raise TypeError(f"The name of a network must be a string. Received: {network!r}")
    if network in _ROWS:
        return _ROWS[network]
    wanted = network.lower()

    def distance(name):
        return not name.startswith(wanted), -difflib.SequenceMatcher(None, wanted, name).ratio(), name

    nearest = ", ".join(sorted(_ROWS, key=distance)[:5])
    raise ValueError(f"There is no network {network!r} among the {len(_ROWS)}. The nearest: {nearest}")


def _input_shape(shape, include_top, spec):
    if shape is None:
        return spec.input_shape if include_top else (None, None, spec.input_shape[-1])
    rule = f"input_shape must be (height, width, channels), height and width None or at least {spec.minimum_size}"
    try:
        height, width, channels = shape
    except (TypeError, ValueError):
        raise ValueError(f"{rule}. Received: input_shape={shape!r}") from None
    sizes_fit = all(size is None or isinstance(size, int) and size >= spec.minimum_size for size in (height, width))
    if not sizes_fit or not isinstance(channels, int) or channels < 1:
        raise ValueError(f"{rule}. Received: input_shape={tuple(shape)}")
    return tuple(shape)


def baseline_name(network):
    """What the baseline of a network is called: se_resnet50's is resnet50."""
    return network.removeprefix("se_") if network.startswith("se_") else f"{network}_without_se"
