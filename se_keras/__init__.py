"""Squeeze-and-Excitation networks (arXiv:1709.01507) for Keras 3, from training to the phone and the server."""

from typing import TYPE_CHECKING, Any

from se_keras.applications import (
    SENet154,
    SEResNet50,
    SEResNet101,
    SEResNet152,
    SEResNeXt50,
    SEResNeXt101,
)
from se_keras.catalogue import create, names
from se_keras.counting import complexity
from se_keras.layers import SqueezeExcite
from se_keras.preprocessing import decode_predictions, preprocess_input
from se_keras.pyramids import pyramid
from se_keras.recalibration import SEConfig
from se_keras.version import __version__

if TYPE_CHECKING:
    from se_keras.prediction import predict

__all__ = [
    "SEConfig",
    "SENet154",
    "SEResNet50",
    "SEResNet101",
    "SEResNet152",
    "SEResNeXt50",
    "SEResNeXt101",
    "SqueezeExcite",
    "__version__",
    "complexity",
    "create",
    "decode_predictions",
    "names",
    "predict",
    "preprocess_input",
    "pyramid",
]


def __getattr__(name: str) -> Any:
    """`predict` is imported when it is used, because it imports the exports too."""
    if name != "predict":
        rule = "create(NAME) builds each network of names()"
        raise AttributeError(f"module 'se_keras' has no attribute {name!r}: {rule}")
    from se_keras.prediction import predict

    return predict
