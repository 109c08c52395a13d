"""From images to the input of a network, and from its probabilities to the names of classes."""

from typing import Any

import keras
import numpy as np

from se_keras.catalogue import spec_of
from se_keras.errors import first_line


def preprocess_input(x: Any, network: str) -> Any:
    """Turns RGB images in 0 to 255 into the input of a network: (x - mean) / std of each channel.

    `create(..., include_preprocessing=True)` builds the same computation into the network.

    Args:
        x: Images `(..., height, width, channels)`: an array, or a tensor of the backend. They are not changed.
        network: A name of the catalogue, such as `"se_resnet50"`.

    Returns:
        float32: an array for an array, a tensor for a tensor.
    """
    spec = spec_of(network)
    shape: Any = getattr(x, "shape", None)
    try:
        fits = len(shape) >= 3 and shape[-1] == len(spec.mean)
    except (TypeError, ValueError):  # no shape, or one of unknown rank
        fits = False
    if not fits:
        received = type(x).__name__ if shape is None else shape
        raise ValueError(f"{network} takes images (..., height, width, {len(spec.mean)}). Received: {received}")
    return spec.normalization.apply(x)


def decode_predictions(p: Any, top: int = 5) -> list[list[tuple[str, str, float]]]:
    """The `top` most probable classes of each image: `[[(synset, name, probability), ...], ...]`.

    `p` has the probabilities of ImageNet's classes, `(samples, 1000)`. Keras downloads their names the first time, and
    OSError is raised if it cannot.
    """
    p = np.asarray(keras.ops.convert_to_numpy(p))
    if p.ndim != 2 or p.shape[1] != 1000:
        raise ValueError(f"decode_predictions takes probabilities (samples, 1000). Received: {p.shape}")
    if type(top) is not int or not 1 <= top <= 1000:
        raise ValueError(f"top must be an int from 1 to 1000. Received: top={top!r}")
    try:
        return keras.applications.imagenet_utils.decode_predictions(p, top=top)
    except Exception as error:  # keras.utils.get_file raises a plain Exception
        raise OSError(f"Keras' file of class names could not be downloaded: {first_line(error)}") from error


def imagenet_labels() -> list[str]:
    """The names of ImageNet's 1000 classes, in order. Raises OSError if Keras cannot download them the first time."""
    return [name for ((_, name, _),) in decode_predictions(np.eye(1000), top=1)]
