"""One training image: from the bytes of a file to random crops, flips and other changes of its pixels.

All randomness is stateless: the caller derives each seed from the training's seed, the epoch and the image, so that a
resumed training and every worker see the same images.
"""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from se_keras.decoding import is_croppable, jpeg_part
from se_keras.images import as_pixels, evaluation_image
from se_keras.training.recipes import Augmentation


def training_image(
    content: tf.Tensor,
    *,
    size: tuple[int, int],
    channels: int,
    augmentation: Augmentation,
    seed: tf.Tensor,
    operations: Callable | None = None,
    mean: Any = 0.0,
) -> tf.Tensor:
    """An augmented training image of `size`, `(height, width)`: float32, in the value range of the content.

    Args:
        content: Bytes of a file, or pixels `(height, width, channels)`.
        seed: Two integers.
        operations: The function that `rand_augment` returns, if the augmentation includes it.
        mean: The value of a cutout square, one number or one for each channel.
    """
    if augmentation.crop == "scale_and_aspect":
        image = tf.image.resize(_random_part(content, channels, augmentation, fold_in(seed, 0)), size)
    else:
        image = evaluation_image(content, size=size, channels=channels)
    if augmentation.crop == "pad":
        border = augmentation.padding
        padded = tf.pad(image, [[border, border], [border, border], [0, 0]])
        image = tf.image.stateless_random_crop(padded, (*size, channels), seed=fold_in(seed, 1))
    if augmentation.flip:
        image = tf.image.stateless_random_flip_left_right(image, seed=fold_in(seed, 2))
    if operations is not None:
        image = operations(image, fold_in(seed, 3))
    if augmentation.cutout:
        image = tf.where(_square(size, augmentation.cutout, fold_in(seed, 4)), mean, image)
    return tf.ensure_shape(image, (*size, channels))


def mix_up(alpha: float) -> Callable:
    """`keras.layers.MixUp` without state: a function of images, labels as probabilities, and a seed.

    Call this outside of a dataset's functions, since layers create variables.
    """
    layer = keras.layers.MixUp(alpha=alpha, data_format="channels_last", dtype="float32")

    def mix(images, labels, seed):
        layer.generator = StatelessSeeds(seed)
        mixed = layer({"images": images, "labels": labels}, training=True)
        return tf.ensure_shape(mixed["images"], images.shape), tf.ensure_shape(mixed["labels"], labels.shape)

    return mix


def rand_augment(factor: float) -> Callable:
    """Two operations of `keras.layers.RandAugment` without state: a function of an image and a seed."""
    layer = keras.layers.RandAugment(
        value_range=(0, 255), num_ops=2, factor=factor, data_format="channels_last", dtype="float32"
    )
    parts = [part for part in vars(layer).values() if isinstance(part, keras.layers.Layer)]

    def augment(image, seed):
        seeds = StatelessSeeds(seed)
        for each in (layer, *parts):
            each.generator = seeds
        return layer(image, training=True)

    return augment


class StatelessSeeds(keras.random.SeedGenerator):
    """Seeds for Keras layers, all derived from one tensor, so a dataset that is read again has the same images."""

    def __init__(self, seed: tf.Tensor):
        self._seed, self._count = seed, 0

    def next(self, ordered: bool = True) -> tf.Tensor:
        """The next seed."""
        self._count += 1
        return tf.cast(fold_in(self._seed, self._count), "uint32")


def fold_in(seed: Any, number: Any) -> tf.Tensor:
    """A new seed from a seed, two integers, and a number."""
    return tf.random.experimental.stateless_fold_in(seed, number)  # pyright: ignore[reportAttributeAccessIssue]  stubs


def _square(size, side, seed):
    """Mask `(height, width, 1)` of a square of `side` pixels whose centre is anywhere in the image."""
    centre = tf.cast(tf.random.stateless_uniform((2,), seed) * tf.constant(size, "float32"), "int32")
    rows, columns = (
        (tf.range(extent) >= at - side // 2) & (tf.range(extent) < at - side // 2 + side)
        for extent, at in zip(size, tf.unstack(centre), strict=True)
    )
    return rows[:, None, None] & columns[None, :, None]


def _random_part(content, channels, augmentation, seed):
    """A part of an image, of random size and aspect ratio. Only this part of a JPEG file is decoded."""

    def part(shape):
        begin, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
            shape,
            tf.zeros((1, 0, 4)),
            seed=seed,
            aspect_ratio_range=augmentation.aspect,
            area_range=augmentation.area,
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        (top, left, _), (height, width, _) = tf.unstack(begin), tf.unstack(extent)
        return tf.stack([top, left, height, width])

    def of_pixels():
        pixels = as_pixels(content, channels)
        top, left, height, width = tf.unstack(part(tf.shape(pixels)))
        return pixels[top : top + height, left : left + width]

    if content.dtype != tf.string:
        return of_pixels()
    return tf.cond(is_croppable(content), lambda: jpeg_part(content, part, channels), of_pixels)
