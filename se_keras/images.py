"""Images as networks take them: of files and folders, for evaluation, serving and calibration."""

import itertools
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from se_keras.decoding import decode, reason
from se_keras.folders import SUFFIXES, files_in, is_image, printable
from se_keras.graph import calls, functional
from se_keras.normalization import Normalization
from se_keras.typing import FilePath, Images, ImageShape, OnMessage
from se_keras.wording import counted

RESIZE = 256 / 224  # of the shorter side to the crop's: section 5.1 of arXiv:1709.01507
MOST_SAMPLES = 2048  # of calibration data that may have no end: a GiB at 224x224, several times what ranges need
_SCALING = (keras.layers.Rescaling, keras.layers.Normalization)


def load_images(
    folder: FilePath,
    *,
    size: Sequence[int],
    channels: int,
    mean: float | Sequence[float] = 0.0,
    std: float | Sequence[float] = 1.0,
    limit: int | None = None,
    progress: OnMessage | None = None,
) -> Images:
    """Reads the images of a folder and its subfolders, in the order of their paths.

    They are those of evaluation and serving: see `evaluation_image` and `decode`. Of an animation the first frame is
    read. Transparency is dropped, and the orientation that a camera records is not applied.

    Args:
        folder: Its files with names in .bmp, .gif, .jpeg, .jpg, .png or .webp are read, except hidden ones. Links are
            followed.
        size: `(height, width)`.
        channels: 3 for RGB, 1 for gray. Other images are converted.
        mean: Subtracted from the pixels (0 to 255): a number, or one for each channel.
        std: The divisor after that. The defaults keep 0 to 255.
        limit: Maximum number of images, spread evenly over the folder. Default: all.
        progress: Called about ten times with a line of text.

    Raises:
        FileNotFoundError, ValueError: If the folder does not exist or has no images, or if an image cannot be decoded.
    """
    folder = Path(folder)
    if type(channels) is not int or channels not in (1, 3):
        raise ValueError(f"A folder's images have 1 or 3 channels. Received: channels={channels!r}")
    if len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise ValueError(f"Images need a fixed size, (height, width). Received: size={tuple(size)}")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ValueError(f"limit must be an int of at least 1. Received: limit={limit!r}")
    normalization = Normalization.of((mean, std), channels=channels)
    files = image_files(folder)
    if limit is not None and limit < len(files):
        files = [files[index * len(files) // limit] for index in range(limit)]
    images = np.empty((len(files), *size, channels), "float32")
    for index, file in enumerate(files):
        if progress and index % -(-len(files) // 10) == 0:
            progress(f"reading {folder}: image {index + 1} of {len(files)}")
        try:
            images[index] = evaluation_image(tf.constant(file.read_bytes()), size=size, channels=channels)
        except tf.errors.OpError as error:
            raise ValueError(f"{printable(file)!r} cannot be decoded: {reason(error)}") from None
    return normalization.apply(images)


def scales_pixels(model: keras.Model) -> bool:
    """Whether a model takes pixels of 0 to 255: as bytes, or by a first layer such as `keras.layers.Rescaling`."""
    graph = functional(model)
    if graph.inputs[0].dtype == "uint8":
        return True
    inputs = {id(x) for x in graph.inputs}
    readers = [call.operation for call in calls(graph) if any(id(x) in inputs for x in call.input_tensors)]
    return any(isinstance(reader, _SCALING) for reader in readers)


def image_files(folder: Path) -> list[Path]:
    """The image files of a folder and its subfolders. Raises FileNotFoundError or ValueError if there are none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder of images {str(folder)!r}")
    found = files_in(folder)
    files = [path for path in found if is_image(path)]
    if not files:
        what = f"{counted(len(found), 'other file')}, such as {found[0].name!r}" if found else "an empty folder"
        raise ValueError(f"{str(folder)!r} has no images ({', '.join(SUFFIXES)}). Received: {what}")
    return files


def as_pixels(content: Any, channels: int) -> Any:
    """Decodes the bytes of an image file; pixels are returned unchanged."""
    return decode(content, channels) if content.dtype == tf.string else content


def evaluation_image(content: Any, *, size: Sequence[int], channels: int, resize: float | None = None) -> Any:
    """The central crop of an image: its shorter side is scaled to `resize`, and `size` is cropped from the middle.

    Without `resize`, the shorter side is scaled to 256/224 of the crop; an image of exactly `size` is returned as it
    is. Scaling is bilinear and antialiased, as in Pillow and torchvision.
    """
    image = as_pixels(content, channels)
    ratio = RESIZE if resize is None else resize / min(size)

    def middle():
        shape = tf.cast(tf.shape(image)[:2], "float32")
        scale = tf.reduce_max(tf.constant(size, "float32") * tf.constant(ratio, "float32") / shape)
        scaled = tf.maximum(tf.cast(tf.round(shape * scale), "int64"), tf.constant(size, "int64"))
        return _scaled_middle(image, scaled, size)

    if resize is None:
        fits = tf.reduce_all(tf.shape(image)[:2] == size)
        return tf.ensure_shape(tf.cond(fits, lambda: tf.cast(image, "float32"), middle), (*size, channels))
    return tf.ensure_shape(middle(), (*size, channels))


def _scaled_middle(image, scaled, size):
    """The middle, of `size`, of an image that is scaled to `scaled`, int64, without the rest: that may be gigabytes."""
    shape, corner = tf.shape(image, tf.int64)[:2], (scaled - size) // 2
    scale = tf.cast(scaled, "float64") / tf.cast(shape, "float64")
    reach = tf.maximum(1 / scale, 1) + 1  # of the filter, in pixels of the image
    begin = tf.cast(tf.floor(tf.cast(corner, "float64") / scale - reach), "int64")
    end = tf.cast(tf.math.ceil(tf.cast(corner + size, "float64") / scale + reach), "int64")
    begin, end = tf.maximum(begin, 0), tf.minimum(end, shape)
    part = tf.raw_ops.ScaleAndTranslate(
        images=image[None, begin[0] : end[0], begin[1] : end[1]],
        size=size,
        scale=tf.cast(scale, "float32"),
        translation=tf.cast(tf.cast(begin, "float64") * scale - tf.cast(corner, "float64"), "float32"),
        kernel_type="triangle",  # as tf.image.resize(antialias=True)
        antialias=True,
    )
    return part[0]


def calibration_images(calibration: Any, shape: ImageShape, *, what: str = "Calibration") -> Images:
    """Collects images in one float32 array `(samples, *shape)`.

    Args:
        calibration: An array of images, an iterable of images or batches, such as a `tf.data.Dataset`, a function that
            returns one, such as a converter's `representative_dataset`, or a folder of images, whose pixels stay 0 to
            255. Of `(images, labels)`, the first is used, and of a dict the only entry of this shape. Of data without
            a length, which may have no end, at most `MOST_SAMPLES` images are read; a warning says so.
        shape: `(height, width, channels)` of the model's input. Where it has None, all images must have the size of the
            first.
        what: The purpose of the images, for messages.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError, TypeError: If there are no images, or if they are not finite numbers in this shape.
    """
    shape = tuple(shape)
    if isinstance(calibration, (str, os.PathLike)):
        free: Any = shape  # load_images refuses a free size
        calibration = load_images(calibration, size=free[:2], channels=free[2])
    images = np.zeros((0, *(size or 0 for size in shape)), "float32")
    if batches := list(_batches(calibration, shape, what)):
        images = np.concatenate(batches)
    if not len(images):
        raise ValueError(f"{what} needs at least one image of {shape}. Received: none")
    bad = np.flatnonzero(~np.isfinite(images).reshape(len(images), -1).all(axis=1))
    if len(bad):
        found = f"NaN or infinity in {len(bad)} of {counted(len(images), 'image')}, the first in image {bad[0]}"
        raise ValueError(f"{what} images must be finite. Received: {found}")
    return images


def _batches(calibration, shape, what) -> Iterator[Images]:
    """The images of an array or an iterable, `(samples, *shape)` each time."""
    if callable(calibration) and not hasattr(calibration, "shape"):
        calibration = calibration()
    calibration = _images_in(calibration, shape)
    if hasattr(calibration, "shape"):
        yield _batch(calibration, shape, what)
        return
    try:
        calibration, most = itertools.islice(calibration, len(calibration)), float("inf")
    except TypeError:  # a generator, or a data set that is repeated for ever
        most = MOST_SAMPLES
    count = 0
    for item in calibration:
        batch = _batch(_images_in(item[0] if isinstance(item, tuple) else item, shape), shape, what)
        shape = batch.shape[1:]
        if count + len(batch) > most:
            rule = f"of data without a length, which may have no end, at most {most:,} are"
            warnings.warn(f"{what} read {most:,} images: {rule}", stacklevel=4)
            yield batch[: MOST_SAMPLES - count]
            return
        count += len(batch)
        yield batch


def _images_in(data, shape):
    """The images of `[images]`, of `(images, labels)` and of a dict; other data as they are."""

    def fits(value):
        found = np.shape(value) if hasattr(value, "shape") else ()
        return _fits(found, shape) or _fits(found[1:], shape)

    if isinstance(data, dict):
        entries = [value for value in data.values() if fits(value)]
        return entries[0] if len(entries) == 1 else data
    if isinstance(data, (list, tuple)) and data and fits(data[0]) and not any(fits(value) for value in data[1:]):
        return data[0]
    return data


def _batch(images, shape, what):
    try:
        batch = np.asarray(images, dtype="float32")
    except (TypeError, ValueError):
        raise TypeError(f"{what} data must be arrays of numbers. Received: {type(images).__name__}") from None
    if _fits(batch.shape, shape):
        batch = batch[None]
    if not _fits(batch.shape[1:], shape):
        raise ValueError(f"{what} images must be {shape}. Received: {batch.shape}")
    return batch


def _fits(found, shape):
    return len(found) == len(shape) and all(side in (None, size) for size, side in zip(found, shape, strict=True))
