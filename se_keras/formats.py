"""The formats of image files: height and width by their headers, and their pixels as RGB, in TensorFlow's operators.

Each function takes the content of a file of its format, a scalar string, and fails with one of these texts. Sides are
`[height, width]`, int64; pixels `(height, width, 3)`, uint8.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

UNREADABLE = "it is damaged, or not a PNG, JPEG, BMP, GIF or WebP image"
OTHER_BMP = "it is a BMP image with a compression, of 16 bits a pixel, or of OS/2: save it as PNG"
OTHER_JPEG = "it is a CMYK JPEG image without the Adobe marker, which says how its values are meant: save it as RGB"

_MOST_BLOCKS = 64  # of a GIF or WebP file before its first frame: comments, color profiles


def outlined(spec: tf.TensorSpec = tf.TensorSpec([], tf.string)) -> Callable:  # noqa: B008  a constant
    """Decorates a function of a tensor that is traced once for all graphs, and called by them.

    Branches that are not taken cost time where they are part of a graph: 0.15 of 0.2 ms for a small JPEG file.
    """
    return tf.function(autograph=False, input_signature=[spec], experimental_attributes={"_noinline": True})


def part(content: Any, begin: Any, count: Any) -> Any:
    """Bytes of a file, as a string; fewer at its end.

    It never fails: the message would quote the whole file, which is no text.
    """
    begin = tf.minimum(tf.cast(begin, "int64"), tf.cast(tf.strings.length(content), "int64"))
    return tf.strings.substr(content, begin, tf.cast(count, "int64"))


def _bytes(content, begin, count) -> Any:
    """Values 0 to 255 as int64."""
    return tf.cast(tf.io.decode_raw(part(content, begin, count), tf.uint8), "int64")


def _number(content, begin, count, *, big_endian=False) -> Any:
    """An unsigned number of some bytes, int64."""
    values = tf.ensure_shape(_bytes(content, begin, count), (count,))
    powers = [256**power for power in range(count)]
    return tf.reduce_sum(values * (powers[::-1] if big_endian else powers))


def _string(values) -> Any:
    """The string of values 0 to 255."""
    return tf.strings.reduce_join(tf.gather(tf.constant([bytes([value]) for value in range(256)]), values))


def require(condition: Any, text: str = UNREADABLE) -> Any:
    """An operation that fails with a text."""
    return tf.debugging.Assert(condition, [text])


# JPEG and PNG


def jpeg_shape(content: Any) -> Any:
    """Height, width and components."""
    return tf.image.extract_jpeg_shape(content, "int64")


def _jpeg(content):
    def has_marker():
        return tf.strings.regex_full_match(content, rb"(?s)\C*Adobe\C*")

    is_readable = tf.cond(jpeg_shape(content)[2] == 4, has_marker, lambda: True)
    with tf.control_dependencies([require(is_readable, OTHER_JPEG)]):
        return tf.io.decode_jpeg(content, channels=3, dct_method="INTEGER_ACCURATE")


def _png(content):
    return tf.io.decode_png(content, channels=3)


# GIF: https://www.w3.org/Graphics/GIF/spec-gif89a.txt


def _gif_size(content):
    """Height and width of the whole, which the first frame may exceed, as in Pillow."""
    frame = _first_frame(content)
    return tf.maximum(frame.whole, frame.corner + frame.size)


def _gif(content):
    """The first frame, on the whole image.

    Of the file, the first frame is kept alone, since TensorFlow decodes all of them, into as much memory; without its
    place, which TensorFlow takes for a part of another frame; and without its transparent colour, which would be black.
    """
    frame = _first_frame(content)
    height, width = tf.unstack(frame.size)
    whole = tf.maximum(frame.whole, frame.corner + frame.size)
    flags = tf.cond(frame.control > 0, lambda: _number(content, frame.control, 1), lambda: tf.constant(0, "int64"))
    color = tf.cond(flags % 2 > 0, lambda: _number(content, frame.control + 3, 1), lambda: tf.constant(0, "int64"))
    still = tf.strings.join(
        [
            part(content, 0, 6),
            part(content, frame.begin + 5, 4),  # width and height of the frame
            part(content, 10, frame.colors - 10),
            b"," + bytes(4),
            part(content, frame.begin + 5, frame.end - frame.begin - 5),
            b";",
        ]
    )
    pixels = tf.io.decode_gif(still)[0]
    with tf.control_dependencies([require(tf.reduce_all(tf.shape(pixels, tf.int64)[:2] == frame.size))]):
        pixels = tf.identity(pixels)

    def placed():
        fill = tf.cast(_bytes(content, frame.palette + 3 * color, 3), "uint8")
        (top, left), (bottom, right) = tf.unstack(frame.corner), tf.unstack(whole - frame.corner - frame.size)
        around = [[top, bottom], [left, right], [0, 0]]
        inside = tf.pad(tf.ones((height, width, 1), "bool"), around)
        return tf.where(inside, tf.pad(pixels, around), fill)

    return tf.cond(tf.reduce_all(whole == frame.size), lambda: pixels, placed)


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """Where the first frame of a GIF file is, int64: `size`, `corner` and `whole` are (height, width) or (y, x).

    Its descriptor is from `begin`, and its data to `end`. `colors` is the end of the colours of the whole file,
    `palette` the beginning of the frame's, `control` the flags of its control block, 0 without one.
    """

    begin: Any
    end: Any
    size: Any
    corner: Any
    whole: Any
    colors: Any
    palette: Any
    control: Any


def _first_frame(content):
    raw = tf.io.decode_raw(content, tf.uint8)

    def at(position):
        return tf.cast(raw[position], "int64")

    def colors(flags):
        return tf.where(flags >= 128, 3 * tf.bitwise.left_shift(tf.constant(2, "int64"), flags % 8), 0)

    def is_extension(position, control):
        return at(position) == ord("!")

    def after_extension(position, control):
        control = tf.where(at(position + 1) == 0xF9, position + 3, control)
        return _after_blocks(raw, position + 2), control

    begin = 13 + colors(at(10))
    start = (begin, tf.constant(0, "int64"))
    frame, control = tf.while_loop(is_extension, after_extension, start, maximum_iterations=_MOST_BLOCKS)
    with tf.control_dependencies([require(at(frame) == ord(","))]):
        flags = at(frame + 9)
    data = frame + 10 + colors(flags)
    x, y, width, height = (_number(content, frame + 1 + 2 * i, 2) for i in range(4))
    return _Frame(
        begin=frame,
        end=_after_blocks(raw, data + 1),
        size=tf.stack([height, width]),
        corner=tf.stack([y, x]),
        whole=tf.stack([_number(content, 8, 2), _number(content, 6, 2)]),
        colors=begin,
        palette=tf.where(flags >= 128, frame + 10, 13),
        control=control,
    )


def _after_blocks(raw, begin):
    """The position after a chain of blocks, each of them a byte with its length, and as many bytes; the last is empty.

    A loop over the blocks would take seconds for a large file: in each round here, all positions jump twice as far.
    """
    count = tf.size(raw)
    places = tf.range(count)
    following = tf.where(raw == 0, places, tf.minimum(places + 1 + tf.cast(raw, "int32"), count))
    following = tf.concat([following, [count]], 0)  # the position after the file stays there

    def has_jumped(position, following):
        return tf.not_equal(tf.gather(following, position), position)

    def jumped(position, following):
        return tf.gather(following, position), tf.gather(following, following)

    end, _ = tf.while_loop(has_jumped, jumped, (tf.cast(begin, "int32"), following))
    with tf.control_dependencies([require(end < count)]):
        return tf.cast(end, "int64") + 1


# BMP: https://learn.microsoft.com/windows/win32/gdi/bitmap-header-types


def _bmp_size(content) -> Any:
    """Height and width; a negative height is that of an image from top to bottom."""
    with tf.control_dependencies([require(_number(content, 14, 4) >= 40, OTHER_BMP)]):
        width, height = (_number(content, begin, 4) for begin in (18, 22))
    return tf.stack([tf.minimum(height, 2**32 - height), width])


def _bmp(content):
    """The pixels of 1, 4, 8, 24 or 32 bits; TensorFlow's own operator takes the indices of a palette for gray."""
    offset, header, compression = (_number(content, begin, 4) for begin in (10, 14, 30))
    bits = _number(content, 28, 2)
    height, width = tf.unstack(_bmp_size(content))
    masks = part(content, 54, 12) == bytes.fromhex("0000ff00 00ff0000 ff000000")
    is_known = tf.reduce_any(bits == [1, 4, 8, 24, 32]) & (compression == 0) | (bits == 32) & (compression == 3) & masks
    with tf.control_dependencies([require(is_known, OTHER_BMP)]):
        content, bits = tf.identity(content), tf.identity(bits)  # nothing else fails before
    stride = (width * bits + 31) // 32 * 4
    rows: Any = tf.io.decode_raw(part(content, offset, height * stride), tf.uint8)
    rows = tf.reshape(rows, [height, stride])
    rows = tf.cond(_number(content, 22, 4) < 2**31, lambda: rows[::-1], lambda: rows)

    def direct():
        count = bits // 8
        pixels: Any = tf.reshape(rows[:, : width * count], [height, width, count])
        return pixels[..., 2::-1]

    def indexed():
        used = _number(content, 46, 4)
        used = tf.where((used == 0) | (used > 256), 2**bits, used)
        palette = tf.reshape(tf.io.decode_raw(part(content, 14 + header, 4 * used), tf.uint8), [-1, 4])
        shifts = tf.cast(tf.range(8 - bits, -1, -bits), "uint8")  # of the values in a byte, the first is the highest
        values = tf.bitwise.right_shift(rows[:, :, None], shifts) & tf.cast(2**bits - 1, "uint8")
        indices = tf.reshape(values, [height, stride * 8 // bits])[:, :width]
        return tf.gather(palette[:, 2::-1], tf.cast(indices, "int32"))

    return tf.cond(bits >= 24, direct, indexed)


# WebP: https://developers.google.com/speed/webp/docs/riff_container

_EXTENDED, _LOSSLESS, _LOSSY = b"VP8X", b"VP8L", b"VP8 "
_ANIMATED, _TRANSPARENT = 0x02, 0x10


def _webp_size(content):
    kind = part(content, 12, 4)

    def lossless():  # 14 bits each, less one
        value = _number(content, 21, 4)
        return tf.stack([value // 2**14, value]) % 2**14 + 1

    def lossy():
        with tf.control_dependencies([require(kind == _LOSSY)]):
            return tf.stack([_number(content, 28, 2), _number(content, 26, 2)]) % 2**14

    return tf.case(
        [
            (kind == _EXTENDED, lambda: tf.stack([_number(content, 27, 3), _number(content, 24, 3)]) + 1),
            (kind == _LOSSLESS, lossless),
        ],
        default=lossy,
    )


def _webp(content):
    is_extended = part(content, 12, 4) == _EXTENDED
    flags = _number(content, 20, 1)
    is_animated = is_extended & (flags // _ANIMATED % 2 > 0)

    def still():
        return tf.io.decode_image(content)[0, ..., :3]  # RGB or RGBA, as the file has it

    def animation():
        return tf.io.decode_image(_first_of_animation(content, flags), channels=4)[0, ..., :3]

    return tf.cond(is_animated, animation, still)


def _first_of_animation(content, flags):
    """An animation of the first frame alone, which says that it has transparency.

    TensorFlow decodes an animation into RGBA, all frames of it. Where the file says that it has no transparency, the
    memory is that of RGB, or of one frame if `expand_animations` is False: both are overwritten.
    """

    def end_of(position):
        length = _number(content, position + 4, 4)
        return position + 8 + length + length % 2

    def is_before(position, blocks):
        return (part(content, position, 4) != b"ANMF") & (blocks < _MOST_BLOCKS)

    first, _ = tf.while_loop(is_before, lambda at, blocks: (end_of(at), blocks + 1), (tf.constant(12, "int64"), 0))
    end = end_of(first)
    length = tf.cast(tf.strings.length(content), "int64")
    is_whole = (part(content, first, 4) == b"ANMF") & (end <= length)
    with tf.control_dependencies([require(is_whole)]):
        flags = tf.bitwise.bitwise_or(flags, _TRANSPARENT)
    size = tf.bitwise.right_shift(end - 8, tf.constant([0, 8, 16, 24], "int64")) % 256
    parts = [b"RIFF", _string(size), b"WEBPVP8X", part(content, 16, 4), _string(flags[None])]
    return tf.strings.join([*parts, part(content, 21, end - 21)])


@dataclass(frozen=True, kw_only=True)
class Format:
    """The first bytes of a file, by position; from the file to its height and width, and to its pixels in RGB."""

    magic: dict[int, bytes]
    size: Callable[[Any], Any]
    rgb: Callable[[Any], Any]


FORMATS = {
    "JPEG": Format(magic={0: b"\xff\xd8\xff"}, size=lambda content: jpeg_shape(content)[:2], rgb=_jpeg),
    "PNG": Format(
        magic={0: b"\x89PNG\r\n\x1a\n"},
        size=lambda content: tf.stack([_number(content, begin, 4, big_endian=True) for begin in (20, 16)]),
        rgb=_png,
    ),
    "GIF": Format(magic={0: b"GIF8"}, size=outlined()(_gif_size), rgb=outlined()(_gif)),
    "BMP": Format(magic={0: b"BM"}, size=outlined()(_bmp_size), rgb=outlined()(_bmp)),
    "WebP": Format(magic={0: b"RIFF", 8: b"WEBP"}, size=outlined()(_webp_size), rgb=outlined()(_webp)),
}
