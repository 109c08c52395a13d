"""Reading of image files: folders of images, images for evaluation, and images for calibration."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from se_keras.graph import calls, functional
from se_keras.normalization import Normalization
from se_keras.typing import FilePath, Images, ImageShape, OnMessage

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png")
RESIZE = 256 / 224  # resized shorter side / side of the crop: section 5.1 of arXiv:1709.01507
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

    Each image is cropped in the middle to the aspect ratio of `size`, and then scaled to `size`. Only the first frame
    of an animation is read. Transparency is dropped. The EXIF orientation is not applied.

    Args:
        folder: Files that end in .bmp, .gif, .jpeg, .jpg or .png are read, except hidden files.
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


def scales_pixels(model: keras.Model) -> bool:
    """Whether a first layer of a model scales pixels of 0 to 255, as `keras.layers.Rescaling(1 / 255)` does."""
    graph = functional(model)
    inputs = {id(x) for x in graph.inputs}
    readers = [call.operation for call in calls(graph) if any(id(x) in inputs for x in call.input_tensors)]
    return any(isinstance(reader, _SCALING) for reader in readers)


def _files(folder):
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder of images {str(folder)!r}")
    found = [path for path in folder.rglob("*") if path.is_file() and not _is_hidden(path.relative_to(folder))]
    files = sorted(path for path in found if path.suffix.lower() in SUFFIXES)
    if not files:
        what = f"{len(found)} other files, such as {min(found).name!r}" if found else "an empty folder"
        raise ValueError(f"{str(folder)!r} has no images ({', '.join(SUFFIXES)}). Received: {what}")
    return files


def _is_hidden(path):
    return any(part.startswith(".") for part in path.parts)  # thumbnails, and macOS's files


def _decoded(path):
    """Pixels `(height, width, 1 to 4)`, uint8."""
    try:
        return tf.io.decode_image(path.read_bytes(), expand_animations=False).numpy()
    except tf.errors.OpError:
        reason = "it is damaged, or not a PNG, JPEG, BMP or GIF image"
        raise ValueError(f"{str(path)!r} cannot be decoded: {reason}") from None


def _with_channels(pixels, channels):
    """Gray or RGB as float32. The last of 2 or 4 channels is transparency, and is dropped."""
    pixels = pixels[..., : (1 if pixels.shape[-1] < 3 else 3)].astype("float32")
    if pixels.shape[-1] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=-1)
    return pixels @ np.array([[0.299], [0.587], [0.114]], "float32")  # ITU-R BT.601, as in JPEG


def decode(content: Any, channels: int = 3) -> Any:
    """Pixels `(height, width, channels)`, uint8, of a JPEG, PNG, GIF (its first frame), BMP or WebP file.

    The format is recognized by the content. Gray is converted to RGB or RGB to gray, and transparency is dropped.
    """
    image = tf.io.decode_image(content, channels=channels, expand_animations=False)
    return tf.ensure_shape(image, (None, None, channels))


def as_pixels(content: Any, channels: int) -> Any:
    """Decodes the bytes of an image file; pixels are returned unchanged."""
    return decode(content, channels) if content.dtype == tf.string else content


def evaluation_image(content: Any, *, size: Sequence[int], channels: int, resize: float | None = None) -> Any:
    """The central crop of an image: its shorter side is scaled to `resize`, and `size` is cropped from the middle.

    Without `resize`, the shorter side is scaled to 256/224 of the crop; an image of exactly `size` is returned as it
    is. Scaling is bilinear and antialiased, as in Pillow and torchvision.
    """
    image = tf.cast(as_pixels(content, channels), "float32")
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


def calibration_images(calibration: Any, shape: ImageShape, *, what: str = "Calibration") -> Images:
    """Collects images in one float32 array `(samples, *shape)`.

    Args:
        calibration: An array of images, an iterable of images or batches, such as a `tf.data.Dataset`, or a folder of
            images, whose pixels stay 0 to 255. From tuples such as `(images, labels)`, the first element is used.
        shape: `(height, width, channels)` of the model's input; None stands for the size of the first image.
        what: The purpose of the images, for messages.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError, TypeError: If there are no images, or if they are not finite numbers in this shape.
    """
    shape = tuple(shape)
    if isinstance(calibration, (str, os.PathLike)):
        free: Any = shape  # load_images refuses a free size
        calibration = load_images(calibration, size=free[:2], channels=free[2])
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
