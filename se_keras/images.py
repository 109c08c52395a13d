"""Folders of images: to calibrate on, and to compare networks on."""

import os
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from se_keras.graph import calls, functional
from se_keras.normalization import Normalization

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png")
_SCALING = (keras.layers.Rescaling, keras.layers.Normalization)


def load_images(folder, *, size, channels, mean=0.0, std=1.0, limit=None, progress=None):
    """Reads the images of a folder, and of the folders in it, in the order of their names.

    Of each image the middle at the proportions of `size` is taken, and scaled to it; of an animation the first frame.
    Transparency is dropped. Images stay turned as they are stored: what a camera notes on that is not read.

    Args:
        folder: Files whose names end in .bmp, .gif, .jpeg, .jpg or .png are read; others, and hidden ones, are not.
        size: `(height, width)` to bring them to.
        channels: 3 for RGB, 1 for gray; images of the other kind are turned into it.
        mean: What is subtracted from the pixels, which are 0 to 255: one number, or one for each channel.
        std: What they are divided by then. The default leaves 0 to 255.
        limit: At most so many images, spread evenly over the folder; default: all.
        progress: Called with what is done now, as a string, some ten times.

    Returns:
        float32 of `(samples, height, width, channels)`: (pixel - mean) / std.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If an argument is not one of the above, if the folder has no images, or if one cannot be decoded.
    """
    folder = Path(folder)
    if type(channels) is not int or channels not in (1, 3):
        raise ValueError(f"A folder's images have 1 or 3 channels. Received: channels={channels!r}")
    if len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise ValueError(f"Images need a fixed size, (height, width). Received: size={tuple(size)}")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ValueError(f"limit must be an int of at least 1. Received: limit={limit!r}")
    normalization = Normalization.of((mean, std), channels=channels)
    files = _files(folder)
    if limit is not None and limit < len(files):
        files = [files[index * len(files) // limit] for index in range(limit)]
    images = np.empty((len(files), *size, channels), "float32")
    for index, file in enumerate(files):
        if progress and index % -(-len(files) // 10) == 0:
            progress(f"reading {folder}: image {index + 1} of {len(files)}")
        pixels = _with_channels(_decoded(file), channels)
        images[index] = keras.ops.image.resize(
            pixels, size, antialias=True, crop_to_aspect_ratio=True, data_format="channels_last"
        )
    return normalization.apply(images)


def require_pixels(model):
    """Raises ValueError if a model does not scale pixels of 0 to 255 itself, by the first layer behind its input."""
    graph = functional(model)
    inputs = {id(x) for x in graph.inputs}
    readers = [call.operation for call in calls(graph) if any(id(x) in inputs for x in call.input_tensors)]
    if not any(isinstance(reader, _SCALING) for reader in readers):
        raise ValueError(
            f"A folder's pixels are 0 to 255, and {model.name} has no layer that scales them: say how, with "
            "--normalize or with mean and std of load_images"
        )


def _files(folder):
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder of images {str(folder)!r}")
    found = [path for path in folder.rglob("*") if path.is_file() and not _is_hidden(path.relative_to(folder))]
    files = sorted(path for path in found if path.suffix.lower() in SUFFIXES)
    if not files:
        what = f"{len(found)} of other kinds, such as {min(found).name!r}" if found else "an empty one"
        raise ValueError(f"{str(folder)!r} is no folder of images ({', '.join(SUFFIXES)}). Received: {what}")
    return files


def _is_hidden(path):
    return any(part.startswith(".") for part in path.parts)  # thumbnails, and the notes of macOS


def _decoded(path):
    """Pixels `(height, width, 1 to 4)`, uint8."""
    try:
        return tf.io.decode_image(path.read_bytes(), expand_animations=False).numpy()
    except tf.errors.OpError:
        raise ValueError(
            f"{str(path)!r} cannot be decoded: it is damaged, or not a PNG, JPEG, BMP or GIF image"
        ) from None


def _with_channels(pixels, channels):
    """Gray or RGB as float32, without the last of 2 or 4 channels: the transparency."""
    pixels = pixels[..., : (1 if pixels.shape[-1] < 3 else 3)].astype("float32")
    if pixels.shape[-1] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=-1)
    return pixels @ np.array([[0.299], [0.587], [0.114]], "float32")  # ITU-R BT.601, as JPEG has it


RESIZE = 256 / 224  # of the shorter side over the crop's: section 5.1 of arXiv:1709.01507


def decode(content, channels=3):
    """Pixels `(height, width, channels)`, uint8, of a JPEG, PNG, GIF (its first frame), BMP or WebP file.

    What the file is, its content says. Gray becomes RGB and the other way round; transparency is dropped.
    """
    image = tf.io.decode_image(content, channels=channels, expand_animations=False)
    return tf.ensure_shape(image, (None, None, channels))


def evaluation_image(content, *, size, channels, resize=None):
    """The middle of an image: its shorter side is scaled to `resize`, and `size` cut out of it.

    An image that has the network's size already stays as it is, unless `resize` is given; its default is 256/224 of
    the crop. Scaled bilinearly and antialiased, as Pillow and torchvision do.
    """
    image = tf.cast(_pixels(content, channels), "float32")
    height, width = size
    ratio = RESIZE if resize is None else resize / min(size)

    def middle():
        shape = tf.cast(tf.shape(image)[:2], "float32")
        scale = tf.reduce_max([height, width] * tf.constant(ratio, "float32") / shape)
        scaled = tf.maximum(tf.cast(tf.round(shape * scale), "int32"), [height, width])
        top, left = tf.unstack((scaled - [height, width]) // 2)
        return tf.image.resize(image, scaled, antialias=True)[top : top + height, left : left + width]

    if resize is None:
        fits = tf.reduce_all(tf.shape(image)[:2] == [height, width])
        return tf.ensure_shape(tf.cond(fits, lambda: image, middle), (*size, channels))
    return tf.ensure_shape(middle(), (*size, channels))


def _pixels(content, channels):
    return decode(content, channels) if content.dtype == tf.string else content


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
