"""One image: from the bytes of a file to the pixels that a network is shown, in training by chance and in evaluation.

All chance is stateless: it comes from a seed that the caller derives from the training's seed, the epoch and the image,
so that a training that goes on, or another worker, sees the same.
"""

import keras
import tensorflow as tf

from se_keras.images import _pixels, evaluation_image


def training_image(content, *, size, channels, augmentation, seed, operations=None, mean=0.0):
    """An image as training shows it.

    Args:
        content: Bytes of a file, or pixels `(height, width, channels)`.
        size: `(height, width)` of the network.
        channels: Of the network.
        augmentation: An `Augmentation`.
        seed: Two integers, as a tensor.
        operations: What `rand_augment` has made, if the augmentation asks for it.
        mean: Of the pixels, or of those of each channel: what a square that is cut out shows.

    Returns:
        Pixels `(height, width, channels)`, float32, in the range that they came in.
    """
    if augmentation.crop == "scale_and_aspect":
        image = tf.image.resize(_random_part(content, channels, augmentation, _sub(seed, 0)), size)
    else:
        image = evaluation_image(content, size=size, channels=channels)
    if augmentation.crop == "pad":
        border = augmentation.padding
        padded = tf.pad(image, [[border, border], [border, border], [0, 0]])
        image = tf.image.stateless_random_crop(padded, (*size, channels), seed=_sub(seed, 1))
    if augmentation.flip:
        image = tf.image.stateless_random_flip_left_right(image, seed=_sub(seed, 2))
    if operations is not None:
        image = operations(image, _sub(seed, 3))
    if augmentation.cutout:
        image = tf.where(_square(size, augmentation.cutout, _sub(seed, 4)), mean, image)
    return tf.ensure_shape(image, (*size, channels))


def mix_up(alpha):
    """`keras.layers.MixUp` with stateless chance: a function of images, labels as probabilities, and a seed.

    `alpha` is that of the Beta distribution. Layers make variables: outside of a dataset's functions.
    """
    layer = keras.layers.MixUp(alpha=alpha, data_format="channels_last", dtype="float32")

    def mix(images, labels, seed):
        layer.generator = StatelessSeeds(seed)
        mixed = layer({"images": images, "labels": labels}, training=True)
        return tf.ensure_shape(mixed["images"], images.shape), tf.ensure_shape(mixed["labels"], labels.shape)

    return mix


def rand_augment(factor):
    """Two operations of `keras.layers.RandAugment` with stateless chance: a function of an image and a seed."""
    how = {"data_format": "channels_last", "dtype": "float32"}
    layer = keras.layers.RandAugment(value_range=(0, 255), num_ops=2, factor=factor, **how)
    parts = [part for part in vars(layer).values() if isinstance(part, keras.layers.Layer)]

    def augment(image, seed):
        seeds = StatelessSeeds(seed)
        for each in (layer, *parts):
            each.generator = seeds
        return layer(image, training=True)

    return augment


class StatelessSeeds(keras.random.SeedGenerator):
    """Seeds for Keras layers that all come from one seed, a tensor: a dataset that is read again gives the same."""

    def __init__(self, seed):
        self._seed, self._given = seed, 0

    def next(self, ordered=True):
        """The next seed."""
        self._given += 1
        return tf.cast(_sub(self._seed, self._given), "uint32")


def _square(size, side, seed):
    """Where a square of `side` pixels lies whose middle is anywhere in the image: `(height, width, 1)`."""
    middle = tf.cast(tf.random.stateless_uniform((2,), seed) * tf.constant(size, "float32"), "int32")
    rows, columns = (
        (tf.range(extent) >= at - side // 2) & (tf.range(extent) < at - side // 2 + side)
        for extent, at in zip(size, tf.unstack(middle), strict=True)
    )
    return rows[:, None, None] & columns[None, :, None]


def _random_part(content, channels, augmentation, seed):
    """A part of an image, of random size and proportions; of a JPEG file only the part is decoded."""

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
        return top, left, height, width

    def of_pixels():
        pixels = _pixels(content, channels)
        top, left, height, width = part(tf.shape(pixels))
        return pixels[top : top + height, left : left + width]

    def of_jpeg():
        window = tf.stack(part(tf.image.extract_jpeg_shape(content)))
        return tf.image.decode_and_crop_jpeg(content, window, channels=channels, dct_method="INTEGER_FAST")

    if content.dtype != tf.string:
        return of_pixels()
    return tf.cond(tf.io.is_jpeg(content), of_jpeg, of_pixels)


def _sub(seed, number):
    return tf.random.experimental.stateless_fold_in(seed, number)
