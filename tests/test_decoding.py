"""Image files of all formats: the pixels of Pillow in every reader, limits before decoding, and damaged files."""

import io
import re
import struct
from dataclasses import replace
from functools import cache
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from campaign import run_campaign
from PIL import Image

from se_keras.decoding import MOST_PIXELS, decode, pixels_in, reason
from se_keras.evaluation import evaluate
from se_keras.export import load_images
from se_keras.export.serving import signatures
from se_keras.formats import OTHER_BMP, OTHER_JPEG, UNREADABLE
from se_keras.images import evaluation_image
from se_keras.normalization import Normalization
from se_keras.training.augmentation import training_image
from se_keras.training.data import Data, EpochOrder, Files, SkippedFiles
from se_keras.training.pipeline import batches
from se_keras.training.recipes import Augmentation

SIDE = 16
TOO_LARGE = "it has more than 89,478,485 pixels, or none: scale it down"
WHOLE = Augmentation(crop="scale_and_aspect", area=(1.0, 1.0), aspect=(1.0, 1.0))  # of the image, by the random crop


def picture():
    """Blocks of colours with some noise, not symmetric in any way."""
    rng = np.random.default_rng(0)
    blocks = np.kron(rng.integers(20, 235, (4, 4, 3)), np.ones((SIDE // 4, SIDE // 4, 1)))
    return Image.fromarray((blocks + rng.integers(-15, 15, blocks.shape)).astype("uint8"))


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def bmp(bits, rows, *, header=40, compression=0, palette=b"", top_down=False, size=(SIDE, SIDE)):
    """A BMP file with these rows, from the lowest."""
    height, width = size
    offset = 14 + header + len(palette)
    about = struct.pack(
        "<IiiHHIIiiII", header, width, -height if top_down else height, 1, bits, compression, 0, 0, 0, 0, 0
    )
    about = about if header == 40 else struct.pack("<IHHHH", header, width, height, 1, bits)
    return b"BM" + struct.pack("<IHHI", offset + len(rows), 0, 0, offset) + about + palette + rows


def without_segment(jpeg, marker):
    """A JPEG file without its segment of this marker."""
    at = jpeg.index(marker)
    return jpeg[:at] + jpeg[at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big") :]


@cache
def files():
    """Files by name. What a format cannot hold is not here: Pillow does not write it."""
    rgb = picture()
    gray, palette = rgb.convert("L"), rgb.quantize(200)
    opacity = Image.fromarray(np.arange(SIDE**2, dtype="uint8").reshape(SIDE, SIDE))
    rgba, la = Image.merge("RGBA", (*rgb.split(), opacity)), Image.merge("LA", (gray, opacity))
    gray16 = Image.fromarray(np.asarray(gray).astype("uint16") * 250)
    mirrored, turned = rgb.transpose(Image.Transpose.FLIP_LEFT_RIGHT), Image.Exif()
    turned[0x0112] = 6  # the orientation: a quarter turn
    modes = {"rgb": rgb, "gray": gray, "palette": palette, "palette4": rgb.quantize(13), "bit": gray.convert("1"),
             "rgba": rgba, "la": la, "cmyk": rgb.convert("CMYK"), "16": gray16}  # fmt: skip
    held = {
        "jpeg": ("rgb", "gray", "cmyk"),
        "png": ("rgb", "gray", "palette", "palette4", "bit", "rgba", "la", "16"),
        "gif": ("rgb", "gray", "palette", "palette4", "bit", "rgba", "la"),
        "bmp": ("rgb", "gray", "palette", "palette4", "bit", "rgba"),
        "webp": ("rgb", "gray", "palette", "rgba", "la"),
    }
    made = {f"{mode}.{kind}": encoded(modes[mode], kind) for kind, names in held.items() for mode in names}
    made |= {f"exif.{kind}": encoded(rgb, kind, exif=turned) for kind in ("jpeg", "png", "webp")}
    made |= {
        f"animated.{kind}": encoded(rgb, kind, save_all=True, append_images=[mirrored], duration=100)
        for kind in ("gif", "png", "webp")
    }
    rows = np.asarray(rgb)[..., ::-1].tobytes()
    nibbles, colors = bytes(range(SIDE * SIDE // 2)), bytes(range(50, 114))
    return made | {
        "progressive.jpeg": encoded(rgb, "jpeg", progressive=True),
        "subsampled.jpeg": encoded(rgb, "jpeg", subsampling=2),
        "lossless.webp": encoded(rgba, "webp", lossless=True, exact=True),
        "animated_rgba.webp": encoded(rgba, "webp", save_all=True, append_images=[mirrored.convert("RGBA")]),
        "comment.gif": encoded(rgb, "gif", comment=b"x" * 1000),
        "16rgb.png": tf.io.encode_png(np.asarray(rgb).astype("uint16") * 250).numpy(),
        "top_down.bmp": bmp(24, rows, top_down=True),
        "nibbles.bmp": bmp(4, nibbles, palette=colors),
    }


def gif(*, whole=(SIDE, SIDE), size=(SIDE, SIDE), corner=(0, 0), transparent=None):
    """A GIF file of four colours, uncompressed, whose frame is a part of the whole."""
    colors = bytes([10, 20, 30, 200, 100, 50, 5, 250, 9, 77, 78, 79])
    control = b"" if transparent is None else b"!\xf9\x04" + bytes([1, 0, 0, transparent, 0])
    codes = [code for number in range(size[0] * size[1]) for code in (4, number % 4)] + [5]  # clear before each pixel
    bits = "".join(f"{code:03b}"[::-1] for code in codes)
    data = bytes(int(bits[at : at + 8][::-1], 2) for at in range(0, len(bits), 8))
    blocks = b"".join(bytes([len(data[at : at + 255])]) + data[at : at + 255] for at in range(0, len(data), 255))
    head = b"GIF89a" + struct.pack("<HHBBB", whole[1], whole[0], 0x81, 1, 0) + colors + control
    return head + b"," + struct.pack("<HHHHB", corner[1], corner[0], size[1], size[0], 0) + b"\x02" + blocks + b"\0;"


def of_pillow(content, channels):
    """What Pillow reads. It cuts 16 bits of gray off at 255: here the high byte is taken, as it does of 16 bits RGB."""
    image = Image.open(io.BytesIO(content))
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype("uint8"))
    rgb = image.convert("RGB")
    return np.asarray(rgb) if channels == 3 else np.asarray(rgb.convert("L"))[..., None]


# Every reader


def data_of(paths, channels):
    split = Files(paths=tuple(map(str, paths)), labels=np.arange(len(paths), dtype="int32"))
    classes = tuple(str(number) for number in range(len(paths)))
    return Data(name="x", train=split, test=split, classes=classes, mean=(0.0,) * channels, std=(1.0,) * channels)


def by_training(paths, channels, augmentation=WHOLE):
    data, order = data_of(paths, channels), EpochOrder(batch=len(paths), seed=0)
    skipped = SkippedFiles(budget=len(paths))
    made = batches(data.train, data, size=(SIDE, SIDE), order=order, augmentation=augmentation, skipped=skipped)
    ((images, _, weights),) = made
    back = np.argsort(order.indices(data.train.labels))
    return images.numpy()[back], weights.numpy()[back]


def by_evaluation(paths, channels):
    seen = []

    class Recorder(keras.layers.Layer):
        def call(self, images):
            tf.py_function(lambda x: seen.append(x.numpy()), [images], [])
            return tf.zeros((tf.shape(images)[0], len(paths)))

        def compute_output_shape(self, shape):
            return (shape[0], len(paths))

    images = keras.Input((SIDE, SIDE, channels))
    data = data_of(paths, channels)
    evaluate(keras.Model(images, Recorder()(images)), data.test, data)
    return np.concatenate(seen)[: len(paths)]


def by_serving(paths, channels, folder):
    """The pixels are the scores, whose names are their positions."""
    count = SIDE * SIDE * channels
    labels = folder / "labels.txt"
    labels.write_text("\n".join(map(str, range(count))))
    shape, normalization = (SIDE, SIDE, channels), Normalization((0.0,), (1.0,))
    classify, _ = signatures.classify(
        lambda images: tf.reshape(images, (-1, count)),
        shape=shape,
        labels=labels,
        normalization=normalization,
        top=count,
    )
    answer = tf.function(classify)(tf.constant([Path(path).read_bytes() for path in paths]))
    positions, scores = answer["classes"].numpy(), answer["scores"].numpy()
    is_answered = positions[:, 0] != b""
    positions[~is_answered] = b"0"
    images = np.zeros_like(scores)
    np.put_along_axis(images, positions.astype(int), scores, axis=1)
    return images.reshape(-1, SIDE, SIDE, channels), is_answered


@pytest.fixture(scope="module", params=[1, 3])
def everywhere(request, tmp_path_factory):
    """The channels; what each reader reads, `{reader: {name: pixels}}`; and whether it reads the files to refuse."""
    folder, channels = tmp_path_factory.mktemp("files"), request.param
    for part, contents in {"good": files(), "refused": {name: make() for name, (make, _) in REFUSED.items()}}.items():
        (folder / part).mkdir()
        for name, content in contents.items():
            (folder / part / name).write_bytes(content)
    good, refused = (sorted((folder / part).iterdir()) for part in ("good", "refused"))
    trained, weights = by_training(good + refused, channels)
    served, is_answered = by_serving(good + refused, channels, folder)
    found = {
        "training": trained,
        "calibration": load_images(folder / "good", size=(SIDE, SIDE), channels=channels),
        "evaluation": by_evaluation(good, channels),
        "image_bytes": served,
    }
    pixels = {reader: dict(zip((path.name for path in good), images, strict=False)) for reader, images in found.items()}
    return channels, pixels, {"training": weights[len(good) :], "image_bytes": is_answered[len(good) :]}


@pytest.mark.parametrize("reader", ["training", "calibration", "evaluation", "image_bytes"])
def test_pixels_of_every_format_are_those_of_pillow_in_every_reader(everywhere, reader):
    channels, found, _ = everywhere
    for name, content in files().items():
        # Exactly: the decoders are the same, libjpeg with its accurate transform, libpng, libwebp.
        np.testing.assert_array_equal(found[reader][name], of_pillow(content, channels), err_msg=name)


def test_photos_are_scaled_alike_by_every_reader(tmp_path):
    gradient = np.add.outer(np.arange(60) * 2, np.arange(90)).astype("uint8")
    path = tmp_path / "a.png"
    path.write_bytes(encoded(Image.fromarray(gradient), "png"))
    calibrated = load_images(tmp_path, size=(SIDE, SIDE), channels=3)
    # The shorter side is 18, of which 16 are cropped: every 3.33rd pixel, averaged.
    assert calibrated[0, 8, 8, 0] == pytest.approx(gradient[30:33, 45:48].mean(), abs=3)
    others = by_training([path], 3, Augmentation())[0], by_evaluation([path], 3), by_serving([path], 3, tmp_path)[0]
    for images in others:
        np.testing.assert_array_equal(images, calibrated)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"transparent": 2}, {"size": (4, 5), "corner": (3, 2)}, {"size": (4, 5), "corner": (3, 2), "transparent": 2},
     {"size": (20, 5)}, {"whole": (3, 3)}],
    ids=str,
)  # fmt: skip
def test_first_frame_of_a_gif_lies_where_pillow_has_it(options, channels):
    content = gif(**options)
    np.testing.assert_array_equal(decode(tf.constant(content), channels), of_pillow(content, channels))


def test_animation_that_says_it_has_no_transparency_is_read():
    # TensorFlow's decoder writes RGBA into the memory of RGB for such a file.
    content = bytearray(files()["animated.webp"])
    content[20] &= ~0x10
    np.testing.assert_array_equal(decode(tf.constant(bytes(content))), of_pillow(bytes(content), 3))


@pytest.mark.slow
@pytest.mark.parametrize("name", files())
def test_header_says_how_many_pixels_there_are(name):
    assert pixels_in(tf.constant(files()[name])) == SIDE**2


def test_other_channels_are_refused():
    with pytest.raises(ValueError, match="The pixels of files have 1 or 3 channels. Received: channels=4"):
        decode(tf.constant(files()["rgba.png"]), channels=4)


# What is refused


def with_size(name, width, height):
    """A file whose header declares another size."""
    content, kind = bytearray(files()[name]), name.rpartition(".")[2]
    if kind == "jpeg":
        struct.pack_into(">HH", content, re.search(rb"\xff[\xc0\xc2]", bytes(content)).start() + 5, height, width)
    elif content[12:16] == b"VP8X":
        content[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    elif content[12:16] == b"VP8L":
        content[21:25] = ((width - 1) | (height - 1) << 14 | (content[24] & 0xF0) << 24).to_bytes(4, "little")
    else:
        at, layout = {"png": (16, ">II"), "gif": (6, "<HH"), "bmp": (18, "<ii"), "webp": (26, "<HH")}[kind]
        struct.pack_into(layout, content, at, width, height)
    return bytes(content)


FLAT = bytes(SIDE * SIDE * 2)
REFUSED = {
    "11000.jpeg": (lambda: with_size("rgb.jpeg", 11000, 11000), TOO_LARGE),
    "11000_progressive.jpeg": (lambda: with_size("progressive.jpeg", 11000, 11000), TOO_LARGE),
    "11000_cmyk.jpeg": (lambda: with_size("cmyk.jpeg", 11000, 11000), TOO_LARGE),
    "20000.png": (lambda: with_size("rgb.png", 20000, 20000), TOO_LARGE),
    "2e31.png": (lambda: with_size("rgb.png", 2**31 - 1, 2**31 - 1), TOO_LARGE),
    "65535.gif": (lambda: with_size("rgb.gif", 65535, 65535), TOO_LARGE),
    "frame.gif": (lambda: gif().replace(b"," + bytes(4) + b"\x10\0\x10\0", b"," + bytes(4) + b"\xff" * 4), TOO_LARGE),
    "20000.bmp": (lambda: with_size("rgb.bmp", 20000, -20000), TOO_LARGE),
    "2e31.bmp": (lambda: with_size("palette.bmp", -(2**31), -(2**31)), TOO_LARGE),
    "none.bmp": (lambda: with_size("rgb.bmp", 0, 5), TOO_LARGE),
    "16000.webp": (lambda: with_size("rgb.webp", 16000, 16000), TOO_LARGE),
    "16000_lossless.webp": (lambda: with_size("lossless.webp", 16000, 16000), TOO_LARGE),
    "16000_animated.webp": (lambda: with_size("animated.webp", 16000, 16000), TOO_LARGE),
    "16.bmp": (lambda: bmp(16, FLAT), OTHER_BMP),
    "run_length.bmp": (lambda: bmp(8, FLAT, compression=1, palette=bytes(1024)), OTHER_BMP),
    "masks.bmp": (lambda: bmp(32, FLAT * 2, compression=3, palette=b"\xff\0\0\0" * 3), OTHER_BMP),
    "os2.bmp": (lambda: bmp(24, bytes(SIDE * SIDE * 3), header=12), OTHER_BMP),
    "cmyk.jpeg": (lambda: without_segment(files()["cmyk.jpeg"], b"\xff\xee"), OTHER_JPEG),
    "a.tiff": (lambda: encoded(picture(), "tiff"), UNREADABLE),
    "a.jp2": (lambda: b"\x00\x00\x00\x0cjP  \r\n\x87\n", UNREADABLE),
    "a.jxl": (lambda: b"\xff\x0a" + bytes(20), UNREADABLE),
    "webp.webp": (lambda: b"RIFF\x04\0\0\0WEBP", UNREADABLE),
    "endless.gif": (lambda: gif()[:25] + b"!\xff\x00" * 100 + gif()[25:], UNREADABLE),
}


@pytest.mark.parametrize("name", REFUSED)
def test_file_that_is_not_read_is_refused_with_the_reason(name):
    make, text = REFUSED[name]
    content = tf.constant(make())
    for read in (
        decode,
        lambda x: decode(x, channels=1),
        lambda x: evaluation_image(x, size=(8, 8), channels=3),
        lambda x: training_image(x, size=(8, 8), channels=3, augmentation=WHOLE, seed=tf.constant([0, 1])),
    ):
        with pytest.raises(tf.errors.OpError) as raised:
            read(content)
        assert reason(raised.value) == text


def test_refused_files_are_named_in_every_reader(everywhere, tmp_path):
    for read in everywhere[2].values():
        assert len(read) == len(REFUSED) and not read.any()
    path = tmp_path / "a.png"
    path.write_bytes(REFUSED["20000.png"][0]())
    with pytest.raises(ValueError, match=re.escape(f"'{path}' cannot be decoded: {TOO_LARGE}")):
        load_images(tmp_path, size=(8, 8), channels=3)
    with pytest.raises(ValueError, match=re.escape(f"{path}; of the first, {TOO_LARGE}")):
        SkippedFiles().add(str(path))


def test_pixels_of_a_request_are_limited_and_large_files_are_answered(tmp_path, monkeypatch):
    monkeypatch.setattr(signatures, "AT_ONCE", SIDE**2 - 1)
    monkeypatch.setattr(signatures, "MOST_PIXELS", 2 * SIDE**2)
    paths = [tmp_path / name for name in ("a.png", "b.jpeg", "c.bmp")]
    for path in paths:
        path.write_bytes(files()[f"rgb.{path.suffix[1:]}"])
    images, is_answered = by_serving(paths, 3, tmp_path)
    assert is_answered.tolist() == [True, True, False]
    np.testing.assert_array_equal(images[1], of_pillow(files()["rgb.jpeg"], 3))


def test_image_of_one_row_takes_no_memory_for_what_is_cut_off():
    # Scaled to 256 rows, it would be 100 GB.
    wide = np.zeros((1, 2**17, 3), "uint8")
    wide[:, 2**16 - 2 : 2**16 + 2] = 200
    found = evaluation_image(tf.constant(wide), size=(224, 224), channels=3)
    assert found.shape == (224, 224, 3)
    np.testing.assert_allclose(found, 200, rtol=1e-6)


# Damaged files


def read_everywhere(path):
    """Reads a file by all readers. What they raise for a file that cannot be decoded becomes ValueError."""
    content = tf.constant(path.read_bytes())
    images, is_answered = _serve(tf.stack([content, tf.constant(files()["rgb.png"])]))
    assert images.shape == (2, 8, 8, 3) and bool(is_answered[1, 0])
    try:
        for channels in (1, 3):
            evaluation_image(content, size=(8, 8), channels=channels)
        random = replace(WHOLE, area=(0.1, 1.0))
        training_image(content, size=(8, 8), channels=3, augmentation=random, seed=tf.constant([0, 1]))
    except tf.errors.OpError as error:
        raise ValueError(reason(error)) from None


@tf.function
def _serve(contents):
    return signatures._images(contents, (8, 8, 3))


@pytest.mark.sweep
@pytest.mark.parametrize("kind", ["jpeg", "png", "gif", "bmp", "webp"])
def test_damaged_files_end_no_process_and_take_no_memory(kind):
    seeds = [content for name, content in files().items() if name.endswith(kind)]
    found = run_campaign(kind, seeds, read_everywhere, megabytes=1024)
    assert found.faults == []
    assert found.refused > 20


def large(number):
    """Real images at the limit, and beyond it."""
    side = int(MOST_PIXELS**0.5)
    return [
        lambda: encoded(Image.new("RGB", (side, side), (9, 99, 199)), "jpeg"),
        lambda: encoded(Image.new("RGB", (side, side), (9, 99, 199)), "png", compress_level=1),
        lambda: encoded(Image.new("1", (20000, 20000)), "png"),
        lambda: encoded(Image.new("P", (side, side)), "gif"),
        lambda: with_size("rgb.jpeg", 11000, 11000),
        lambda: encoded(Image.new("L", (1, 65000)), "png"),
    ][number]()  # fmt: skip


@pytest.mark.sweep
def test_large_files_are_read_in_bounded_memory_or_refused():
    seeds = [files()["rgb.png"]]
    # 89 million pixels are 256 MB; with the file's rows, the luma and what resizing takes, up to five times that.
    limits = {"seconds": 60, "megabytes": 1280}
    found = run_campaign("large", seeds, read_everywhere, count=6, mutate=lambda _, n, __: large(n), **limits)
    assert found.faults == []
    assert (found.read, found.refused) == (4, 2)
