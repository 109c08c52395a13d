"""From images to what a network was trained on, and from its probabilities to names."""

import keras

from se_keras.catalogue import spec_of
from se_keras.errors import first_line


def preprocess_input(x, network):
    """Turns RGB images in 0 to 255 into the input of a network: (x - mean) / std of each channel.

    `create(..., include_preprocessing=True)` puts the same into the network itself.

    Args:
        x: Images `(..., height, width, channels)`: an array, or a tensor of the backend. It stays as it is.
        network: A name of the catalogue, such as `"se_resnet50"`.

    Returns:
        float32 of the same shape; an array for an array.

    Raises:
        ValueError: If there is no such network, or if it takes images with another number of channels.
    """
    spec = spec_of(network)
    shape = getattr(x, "shape", None)
    try:
        fits = len(shape) >= 3 and shape[-1] == len(spec.mean)
    except (TypeError, ValueError):  # no shape at all, or one of unknown rank
        fits = False
    if not fits:
        came = type(x).__name__ if shape is None else shape
        raise ValueError(f"{network} takes images (..., height, width, {len(spec.mean)}). Received: {came}")
    return spec.normalization.apply(x)


def decode_predictions(p, top=5):
    """The most probable classes of ImageNet for each image: `[[(synset, name, probability), ...], ...]`.

    The names are in Keras' own file, which Keras fetches the first time.

    Args:
        p: Probabilities `(samples, 1000)`.
        top: How many classes for each.

    Raises:
        ValueError: If `p` is of another shape.
        OSError: If the file of names cannot be fetched.
    """
    p = keras.ops.convert_to_numpy(p)
    if p.ndim != 2 or p.shape[1] != 1000:
        raise ValueError(f"decode_predictions takes probabilities (samples, 1000). Received: {p.shape}")
    if type(top) is not int or not 1 <= top <= 1000:
        raise ValueError(f"top must be an int from 1 to 1000. Received: top={top!r}")
    try:
        return keras.applications.imagenet_utils.decode_predictions(p, top=top)
    except Exception as error:  # a bare Exception is what keras.utils.get_file raises
        raise OSError(f"Keras' file of class names could not be fetched: {first_line(error)}") from error
