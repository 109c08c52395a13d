"""Every network by name: `create` builds one, `names` lists them. Handles the keywords of keras.applications."""

import difflib
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any, Literal

import keras

from se_keras.architectures import cifar, inception, mobilenet, resnet, shufflenet, vgg
from se_keras.blocks import HEAD, TOP, NetworkSpec
from se_keras.errors import require_choice
from se_keras.recalibration import SEConfig, check_fits
from se_keras.typing import FilePath
from se_keras.weights.porting import load_weights
from se_keras.weights.released import IMAGENET, imagenet

FAMILIES = (resnet, vgg, inception, mobilenet, shufflenet, cifar)
AsPublished = Literal["as published"]
AS_PUBLISHED: AsPublished = "as published"
Pooling = Literal["avg", "max"]


def _merge(families):
    rows: dict[str, tuple[ModuleType, NetworkSpec]] = {}
    for family in families:
        for name, spec in family.SPECS.items():
            if name in rows:
                raise ValueError(f"Two rows are named {name!r}: in {rows[name][0].__name__} and {family.__name__}")
            rows[name] = (family, spec)
    return rows


_ROWS = _merge(FAMILIES)


def names(pattern: str = "*", *, family: str | None = None, pretrained: bool = False) -> list[str]:
    """The names that `create` accepts: baselines, and their variants with squeeze-and-excitation.

    Args:
        pattern: The names that it matches, such as `"se_resnet*"`; `*` stands for any text, `?` for one character.
        family: One of `"resnet"`, `"vgg"`, `"inception"`, `"mobilenet"`, `"shufflenet"` and `"cifar"`. Default: all.
        pretrained: Whether to give only those with `weights="imagenet"`.

    Raises:
        ValueError: If there is no such family.
    """
    if family is not None:
        require_choice("family", family, sorted({family_of(name) for name in _ROWS}))
    return [
        name
        for name in sorted(_ROWS)
        if fnmatchcase(name, pattern) and family in (None, family_of(name)) and (name in IMAGENET or not pretrained)
    ]


def family_of(network: str) -> str:
    """The family of a network, named after its file in `architectures`."""
    return _row(network)[0].__name__.rpartition(".")[2]


def spec_of(network: str) -> NetworkSpec:
    """The row of a network: a frozen dataclass of its family."""
    return _row(network)[1]


def create(
    network: str,
    /,
    *,
    se: SEConfig | None | AsPublished = AS_PUBLISHED,
    include_top: bool = True,
    weights: FilePath | None = None,
    input_tensor: keras.KerasTensor | None = None,
    input_shape: Sequence[int | None] | None = None,
    pooling: Pooling | None = None,
    classes: int | None = None,
    classifier_activation: str | None = "softmax",
    include_preprocessing: bool = False,
    name: str | None = None,
) -> keras.Model:
    """Builds a network of the catalogue as a functional Keras model.

    Args:
        network: One of `names()`, such as `"se_resnet50"`.
        se: An `SEConfig` to use instead of the published one. `None` builds the plain baseline.
        include_top: Whether to include the classifier.
        weights: `None` for random weights (He et al. 2015), which is the default here and not in `keras.applications`;
            `"imagenet"` for the released ones, which are downloaded the first time; or a file with weights of the same
            network. A file is `.weights.h5` or `.keras` (of Keras), or has the names of timm or pytorchcv:
            `.safetensors`, or `.pth`, `.pt`, `.pth.tar`, `.bin` or `.ckpt` of torch, of which the weights alone are
            read. Without the top, the classifier in it is ignored. If other `classes` or channels are asked for than
            published, and the file has the published number, its classifier is left out or its first kernel adapted. A
            warning says so. Released weights take other `classes`, too.
        input_tensor: A Keras tensor to use as the images.
        input_shape: `(height, width, channels)`; height and width may be `None`. Default: the published shape; without
            the top, height and width are `None`.
        pooling: The output without the top: `None` for the feature map, `"avg"` or `"max"` for a vector.
        classes: By default the published number, such as 1000 for ImageNet.
        classifier_activation: `None` gives logits.
        include_preprocessing: Whether the model normalizes its input itself. It then takes RGB images in 0 to 255.
        name: By default `network`.

    Raises:
        ValueError, TypeError: If an argument is not valid, or if the weights do not fit.
        OSError: If the file of weights does not exist, or cannot be downloaded.
    """
    family, spec = _row(network)
    if se != AS_PUBLISHED:
        check_fits(se, network=network, sites=spec.sites, stages=spec.stages)
        spec = replace(spec, se=se)
    if keras.config.image_data_format() != "channels_last":
        raise ValueError(f"se_keras builds channels-last networks. Received: {keras.config.image_data_format()=!r}")
    if pooling not in (None, "avg", "max"):
        raise ValueError(f"pooling must be None, 'avg' or 'max'. Received: pooling={pooling!r}")
    classes = spec.classes if classes is None else classes
    if include_top and (isinstance(classes, bool) or not isinstance(classes, int) or classes < 1):
        raise ValueError(f"classes must be a positive int. Received: classes={classes!r}")

    x = images = _images(input_tensor, input_shape, include_top, spec)
    if isinstance(weights, str) and weights == "imagenet":
        _check_released(network, spec, images.shape[1:])
        weights = imagenet(network, build=lambda: create(network))

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
        own = [layer for layer in model.layers if layer not in before]
        # Asked for another number of classes or channels than the published one, whose weights most files have.
        numbers = {TOP: (spec.classes, classes)}
        numbers[next(x.name for x in own if x.weights)] = (spec.input_shape[-1], images.shape[-1])
        adapt = {name: published for name, (published, asked) in numbers.items() if published != asked}
        load_weights(own, weights, ignore=() if include_top else HEAD, adapt=adapt)
    return model


def _images(input_tensor, input_shape, include_top, spec) -> Any:
    """The images: a new `keras.Input`, or the checked `input_tensor`."""
    if input_tensor is None:
        return keras.Input(_input_shape(input_shape, include_top, spec), name="images")
    if not keras.utils.is_keras_tensor(input_tensor):
        raise TypeError(f"input_tensor must be a Keras tensor, as keras.Input returns. Received: {type(input_tensor)}")
    _input_shape(input_tensor.shape[1:], include_top, spec)
    return input_tensor


def _check_released(network, spec, shape):
    """Raises ValueError before a download if the released weights cannot fit."""
    row = spec_of(network)
    if network not in IMAGENET:
        return
    if spec != row:
        raise ValueError(
            f"weights='imagenet' was trained with the published squeeze-and-excitation of {network}: se must be left "
            f"out, or be {row.se}. Received: se={spec.se}"
        )
    if shape[-1] != row.input_shape[-1]:
        raise ValueError(
            f"weights='imagenet' takes images with {row.input_shape[-1]} channels. Received: input_shape={tuple(shape)}"
        )


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


def baseline_name(network: str) -> str:
    """The name of the baseline of a network: resnet50 for se_resnet50."""
    return network.removeprefix("se_") if network.startswith("se_") else f"{network}_without_se"
