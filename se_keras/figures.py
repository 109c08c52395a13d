"""What is published of each network, and its counts: the rows of the listing."""

import json
from dataclasses import asdict, dataclass
from importlib.resources import files

from se_keras.catalogue import family_of, spec_of
from se_keras.counting import Complexity
from se_keras.typing import Json
from se_keras.weights.released import IMAGENET


@dataclass(frozen=True, kw_only=True)
class Published:
    """The figures of a network in arXiv:1709.01507v4. None means that the paper does not state it.

    Args:
        error: Top-1 error in % by data set: validation images of ImageNet (224x224 centre crop unless the network has
            another input), or test images of CIFAR.
    """

    error: dict[str, float]
    gmacs: float | None = None  # "GFLOPs" in the paper, which are multiply-adds
    mparameters: float | None = None  # in millions


def _imagenet(error, gmacs=None, mparameters=None):
    return Published(error={"ImageNet": error}, gmacs=gmacs, mparameters=mparameters)


def _cifar(**error):
    return Published(error={name.replace("cifar", "CIFAR-"): value for name, value in error.items()})


PAPER = {
    # Table 2; top-1 of the re-implementations.
    "resnet50": _imagenet(24.80, 3.86),
    "se_resnet50": _imagenet(23.29, 3.87),
    "resnet101": _imagenet(23.17, 7.58),
    "se_resnet101": _imagenet(22.38, 7.60),
    "resnet152": _imagenet(22.42, 11.30),
    "se_resnet152": _imagenet(21.57, 11.32),
    "resnext50_32x4d": _imagenet(22.11, 4.24),
    "se_resnext50_32x4d": _imagenet(21.10, 4.25),
    "resnext101_32x4d": _imagenet(21.18, 7.99),
    "se_resnext101_32x4d": _imagenet(20.70, 8.00),
    "vgg16_bn": _imagenet(27.02, 15.47),
    "se_vgg16_bn": _imagenet(25.22, 15.48),
    "bn_inception": _imagenet(25.38, 2.03),
    "se_bn_inception": _imagenet(24.23, 2.04),
    "inception_resnet_v2": _imagenet(20.37, 11.75),
    "se_inception_resnet_v2": _imagenet(19.80, 11.76),
    # Table 3.
    "mobilenet": _imagenet(28.4, 0.569, 4.2),
    "se_mobilenet": _imagenet(25.3, 0.572, 4.7),
    "shufflenet_g3": _imagenet(32.6, 0.140, 1.8),
    "se_shufflenet_g3": _imagenet(31.0, 0.142, 2.4),
    # Tables 4 and 5.
    "resnet110": _cifar(cifar10=6.37, cifar100=26.88),
    "se_resnet110": _cifar(cifar10=5.21, cifar100=23.85),
    "resnet164": _cifar(cifar10=5.46, cifar100=24.33),
    "se_resnet164": _cifar(cifar10=4.39, cifar100=21.31),
    "wrn16_8": _cifar(cifar10=4.27, cifar100=20.43),
    "se_wrn16_8": _cifar(cifar10=3.88, cifar100=19.14),
    "shake_shake_26_2x96d": _cifar(cifar10=2.56),
    "se_shake_shake_26_2x96d": _cifar(cifar10=2.12),
    "shake_even_29_2x4x64d": _cifar(cifar100=15.85),
    "se_shake_even_29_2x4x64d": _cifar(cifar100=15.41),
    # Table 8.
    "senet154": _imagenet(18.68),
}


def listing() -> list[Json]:
    """One row for each network, as `row_of` makes it.

    They are the stored output of `se-keras list --counts --json`, because counting all networks takes a minute.
    """
    return json.loads((files("se_keras") / "networks.json").read_text())


def row_of(network: str, counts: Complexity) -> Json:
    """What is known of a network, for JSON: counts, input, preprocessing, released weights, figures of the paper."""
    spec, paper, weights = spec_of(network), PAPER.get(network), IMAGENET.get(network)
    return {
        "name": network,
        "family": family_of(network),
        "input_shape": spec.input_shape,
        "normalization": spec.normalization._asdict(),
        **{field: getattr(counts, field) for field in ("trainable", "statistics", "se_trainable", "macs", "se_macs")},
        "se": spec.se and asdict(spec.se),
        "weights": weights and asdict(weights),
        "paper": paper and asdict(paper),
        "source": spec.source,
    }
