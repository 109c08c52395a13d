"""Calibration images: gathered from what users have, and checked against what the network was trained on."""

import os
import warnings

import keras
import numpy as np

from se_keras.graph import calls, structures
from se_keras.images import load_images


def calibration_images(calibration, shape, *, what="Calibration"):
    """Gathers calibration data into one float32 array `(samples, *shape)`.

    Args:
        calibration: An array of images, or an iterable of images or batches (a `tf.data.Dataset` too); of tuples such
            as `(images, labels)` the first is taken. Or a folder of images, whose pixels stay 0 to 255.
        shape: `(height, width, channels)` of the model's input; None is what the first image has.
        what: What they are for, at the start of messages.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If there are none, if they have another shape, or if a value is not finite.
        TypeError: If they are no numbers.
    """
    shape = tuple(shape)
    if isinstance(calibration, (str, os.PathLike)):
        calibration = load_images(calibration, size=shape[:2], channels=shape[2])
    if hasattr(calibration, "shape"):
        calibration = [calibration]
    batches = []
    for item in calibration:
        try:
            batch = np.asarray(item[0] if isinstance(item, tuple) else item, dtype="float32")
        except (TypeError, ValueError):
            raise TypeError(f"{what} data must be arrays of numbers. Received: {type(item).__name__}") from None
        if _fits(batch.shape, shape):
            batch = batch[None]
        if not _fits(batch.shape[1:], shape):
            raise ValueError(f"{what} images must be {shape}. Received: {batch.shape}")
        shape = batch.shape[1:]
        batches.append(batch)
    images = np.concatenate(batches) if batches else np.zeros(0, "float32")
    if not len(images):
        raise ValueError(f"{what} needs at least one image of {shape}. Received: none")
    bad = np.flatnonzero(~np.isfinite(images).reshape(len(images), -1).all(axis=1))
    if len(bad):
        found = f"NaN or infinity in {len(bad)} of {len(images)} images, the first in image {bad[0]}"
        raise ValueError(f"{what} images must be finite. Received: {found}")
    return images


def _fits(found, shape):
    return len(found) == len(shape) and all(side in (None, size) for size, side in zip(found, shape, strict=True))


def warn_of_other_range(model, images):
    """Warns if the images have another range than those that the model was trained on.

    The first BatchNormalization tells: its moving variance is that of what training images gave it. A model without
    one, or one that was not trained, tells nothing.

    Args:
        model: A functional Keras model.
        images: `(samples, height, width, channels)`.

    Warns:
        UserWarning: If values are more than eight times as large or as small as in training.
    """
    batchnorm = next(
        (x.operation for x in calls(model) if isinstance(x.operation, keras.layers.BatchNormalization)), None
    )
    if batchnorm is None:
        return
    trained = keras.ops.convert_to_numpy(batchnorm.moving_variance)
    if np.all(trained == 1):  # as Keras starts
        return
    seen = keras.Model(structures(model)[0], batchnorm.input)(images[:32], training=False)
    variance = keras.ops.convert_to_numpy(keras.ops.var(seen, axis=tuple(range(len(seen.shape) - 1))))
    alive = trained > 1e-6
    factor = float(np.sqrt(np.median(variance[alive] / trained[alive]))) if alive.any() else 1.0
    if not 1 / _OTHER_RANGE < factor < _OTHER_RANGE:
        low, high = float(images.min()), float(images.max())
        warnings.warn(
            f"The images have values in {low:g}..{high:g}. {model.name} was trained on values about "
            f"{max(factor, 1 / factor):.0f} times as {'small' if factor > 1 else 'large'}: "
            f"{low / factor:.2g}..{high / factor:.2g}",
            stacklevel=3,
        )


_OTHER_RANGE = 8  # 0..255 for 0..1 is 255, and for standard normal values about 60; other data sets are within 3
