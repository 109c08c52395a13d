"""From the content of an image file to pixels, in TensorFlow's operators: eagerly, in tf.data, and in a SavedModel.

The first bytes say what a file is; its header says how many pixels it has, before any are decoded. Pixels are those of
Pillow's `Image.open(file).convert("RGB")`, or `"L"`: of an animation the first frame; transparency is dropped; the
orientation that a camera records (EXIF) is not applied; of 16 bits the high byte is read.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from se_keras.formats import FORMATS, OTHER_BMP, OTHER_JPEG, UNREADABLE, jpeg_shape, outlined, part, require

# A file of some hundred bytes can declare gigabytes of pixels. Pillow warns from here on: a quarter of a GiB as RGB.
MOST_PIXELS = 2**30 // 12
TOO_LARGE = f"it has more than {MOST_PIXELS:,} pixels, or none: scale it down"
_REASONS = (TOO_LARGE, OTHER_BMP, OTHER_JPEG)

_LUMA = (19595, 38470, 7471)  # 2^16 times 0.299, 0.587, 0.114, as in Pillow: ITU-R BT.601
_LUMA_AT_ONCE = 2**24  # pixels


def decode(content: Any, channels: int = 3) -> Any:
    """Pixels `(height, width, channels)`, uint8, of a JPEG, PNG, GIF, BMP or WebP file.

    Args:
        content: The bytes of the file, a scalar string.
        channels: 3 for RGB, 1 for gray. Other images are converted.

    Raises:
        ValueError: If the channels are neither.
        tf.errors.OpError: If the file cannot be decoded, or has more than `MOST_PIXELS`; see `reason`.
    """
    if channels not in (1, 3):
        raise ValueError(f"The pixels of files have 1 or 3 channels. Received: channels={channels!r}")
    rgb = _rgb(content)
    return rgb if channels == 3 else gray(rgb)


def reason(error: BaseException) -> str:
    """Why a file cannot be decoded, by the error of `decode`."""
    return next((text for text in _REASONS if text in str(error)), UNREADABLE)


def pixels_in(content: Any) -> Any:
    """The number of pixels that the header of a file declares, an int64 scalar. Nothing is decoded."""
    return _pixels_in(content)


@outlined(tf.TensorSpec((None, None, 3), tf.uint8))
def gray(rgb: Any) -> Any:
    """The luma `(height, width, 1)` of RGB pixels, uint8."""

    def luma(pixels):
        red, green, blue = tf.unstack(tf.cast(pixels, "int32"), axis=-1)
        weighted = red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2] + 2**15
        return tf.cast(tf.bitwise.right_shift(weighted, 16), "uint8")[..., None]

    def by_row():  # int32 takes four times the memory
        return tf.map_fn(luma, rgb, fn_output_signature=tf.uint8, parallel_iterations=1)

    is_large = tf.size(rgb, tf.int64) > 3 * _LUMA_AT_ONCE
    return tf.ensure_shape(tf.cond(is_large, by_row, lambda: luma(rgb)), (None, None, 1))


def is_croppable(content: Any) -> Any:
    """Whether `jpeg_part` can decode a part of a file: of a JPEG file, but not of one in CMYK."""
    is_jpeg = _has_magic(content, FORMATS["JPEG"].magic)
    return tf.cond(is_jpeg, lambda: jpeg_shape(content)[2] != 4, lambda: False)


def jpeg_part(content: Any, window_of: Callable[[Any], Any], channels: int) -> Any:
    """The pixels of a part of a JPEG file, which alone is decoded: as those of `decode`, but for its border.

    `window_of` is from the shape of the whole, int32, to `(top, left, height, width)` of the part.
    """
    shape = tf.image.extract_jpeg_shape(content)
    with tf.control_dependencies([_require_size(tf.cast(shape[:2], "int64"))]):
        window = tf.identity(window_of(shape))
    pixels = tf.image.decode_and_crop_jpeg(content, window, channels=3, dct_method="INTEGER_ACCURATE")
    return pixels if channels == 3 else gray(pixels)


def _rgb(content):
    def checked(format_):
        with tf.control_dependencies([_require_size(format_.size(content))]):
            return format_.rgb(tf.identity(content))

    return tf.ensure_shape(_by_format(content, checked), (None, None, 3))


@outlined()
def _pixels_in(content):
    return tf.reduce_prod(_by_format(content, lambda format_: format_.size(content)))


def _has_magic(content, magic):
    """Whether a file has these bytes at these positions."""
    head = tf.strings.join([part(content, 0, 16), bytes(16)])
    return tf.reduce_all([part(head, at, len(value)) == value for at, value in magic.items()])


def _require_size(sides):
    """Fails if a height and a width, int64, are too large, or zero."""
    height, width = tf.unstack(sides)
    return require((height > 0) & (width > 0) & (height <= MOST_PIXELS // tf.maximum(width, 1)), TOO_LARGE)


def _by_format(content, function_of):
    """What `function_of` gives for a file's format. It fails for other files."""

    def branch(format_):
        return lambda: function_of(format_)

    def other():
        with tf.control_dependencies([require(tf.strings.length(content) < 0)]):
            return branch(FORMATS["PNG"])()

    cases = [(_has_magic(content, format_.magic), branch(format_)) for format_ in FORMATS.values()]
    return tf.case(cases, default=other)
