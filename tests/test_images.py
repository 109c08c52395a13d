"""Folders of images: which files are read, in which order, and the values of the pixels."""

import re
import struct

import keras
import numpy as np
import pytest
import tensorflow as tf

from se_keras.export import load_images
from se_keras.images import calibration_images, scales_pixels

# Three rows of four pixels; no two pixels and no two channels are alike.
RGB = np.arange(36, dtype="uint8").reshape(3, 4, 3) * 7
GRAY = RGB[..., :1]


def png(pixels):
    return tf.io.encode_png(pixels).numpy()


def bmp(pixels):
    """24 bits a pixel, rows from below, blue first."""
    height, width, _ = pixels.shape
    rows = b"".join(row[:, ::-1].tobytes().ljust(-(-3 * width // 4) * 4, b"\0") for row in pixels[::-1])
    return (
        b"BM"
        + struct.pack("<IHHI", 54 + len(rows), 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, len(rows), 2835, 2835, 0, 0)
        + rows
    )


# Two frames of one pixel: the first has the first colour of the palette, (200, 100, 50), the second the other, black.
# A frame's data are 2-bit codes: clear 4, pixel, end 5, in three bits each from the lowest.
FRAMES = [struct.pack("<HHHHB", 0, 0, 1, 1, 0) + bytes([2, 2, 4 | i << 3 | (5 & 3) << 6, 5 >> 2, 0]) for i in (0, 1)]
HEADER = struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes([200, 100, 50, 0, 0, 0])
GIF = b"GIF89a" + HEADER + b"".join(b"," + frame for frame in FRAMES) + b";"


@pytest.fixture
def folder(tmp_path):
    """A function that fills a folder: `folder(name=content)`."""

    def fill(files):
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content)
        return tmp_path

    return fill


def read(path, **options):
    return load_images(path, **{"size": (3, 4), "channels": 3, **options})


# What is read


@pytest.mark.parametrize("name, encode", {"a.png": png, "a.bmp": bmp, "a.PNG": png}.items())
def test_image_of_the_size_is_read_pixel_by_pixel(folder, name, encode):
    images = read(folder({name: encode(RGB)}))
    assert images.dtype == "float32"
    np.testing.assert_array_equal(images, RGB[None])


def test_jpeg_is_read(folder):
    flat = np.full((16, 16, 3), (200, 100, 50), "uint8")
    images = read(folder({"a.jpg": tf.io.encode_jpeg(flat).numpy(), "b.JPEG": tf.io.encode_jpeg(flat).numpy()}))
    # A block of one colour has one coefficient in each channel, which is rounded in the conversion to YCbCr and back.
    np.testing.assert_allclose(images, np.broadcast_to((200.0, 100.0, 50.0), (2, 3, 4, 3)), atol=3)


def test_first_frame_of_an_animation_is_read(folder):
    images = read(folder({"a.gif": GIF}), size=(1, 1))
    np.testing.assert_array_equal(images, [[[[200, 100, 50]]]])


def test_images_come_in_the_order_of_their_paths(folder):
    shades = {"b.png": 30, "a/2.png": 10, "c/d/1.png": 50, "b.jpg.png": 20, "a/1.png": 0}
    path = folder({name: png(np.full((3, 4, 3), shade, "uint8")) for name, shade in shades.items()})
    # By parts of the path, as the folders are listed: a/1, a/2, b.jpg, b, c/d/1.
    assert read(path)[:, 0, 0, 0].tolist() == [0, 10, 20, 30, 50]


def test_other_files_and_hidden_ones_are_passed_over(folder):
    path = folder(
        {"a.png": png(RGB), "labels.txt": b"x", "._a.png": b"x", ".thumbnails/a.png": b"x", "b.png.bak": b"x"}
    )
    (path / "folder.png").mkdir()
    assert len(read(path)) == 1


@pytest.mark.parametrize("limit, kept", [(1, [0]), (2, [0, 5]), (3, [0, 3, 6]), (10, range(10)), (11, range(10))])
def test_limit_spreads_over_the_folder(folder, limit, kept):
    # Folders of classes come one after the other: the first few would be of one class.
    path = folder({f"{i}.png": png(np.full((3, 4, 3), i, "uint8")) for i in range(10)})
    assert read(path, limit=limit)[:, 0, 0, 0].tolist() == list(kept)


def test_progress_is_told_some_ten_times(folder):
    lines = []
    path = folder({f"{i:02d}.png": png(RGB) for i in range(25)})
    read(path, progress=lines.append)
    assert lines == [f"reading {path}: image {index} of 25" for index in range(1, 26, 3)]


# What the pixels become


def test_mean_and_std_of_each_channel(folder):
    path = folder({"a.png": png(RGB)})
    images = read(path, mean=(1.0, 2.0, 3.0), std=(2.0, 4.0, 8.0))
    assert images.dtype == "float32"
    np.testing.assert_allclose(images[0], (RGB - [1.0, 2.0, 3.0]) / [2.0, 4.0, 8.0], rtol=1e-6)
    np.testing.assert_allclose(read(path, std=255.0)[0], RGB / 255, rtol=1e-6)


def test_gray_is_repeated_for_a_model_of_colours(folder):
    np.testing.assert_array_equal(read(folder({"a.png": png(GRAY)}))[0], np.repeat(GRAY, 3, axis=-1))


def test_gray_stays_for_a_model_of_gray(folder):
    np.testing.assert_array_equal(read(folder({"a.png": png(GRAY)}), channels=1)[0], GRAY)


@pytest.mark.parametrize("name, encode", {"a.png": png, "a.bmp": bmp}.items())
def test_colours_become_their_luma_for_a_model_of_gray(folder, name, encode):
    luma = np.rint(RGB @ np.array([[0.299], [0.587], [0.114]]))  # ITU-R BT.601
    np.testing.assert_array_equal(read(folder({name: encode(RGB)}), channels=1)[0], luma)


@pytest.mark.parametrize("pixels", [RGB, GRAY], ids=["colours", "gray"])
def test_transparency_is_dropped(folder, pixels):
    opacity = np.full((3, 4, 1), 17, "uint8")
    images = read(folder({"a.png": png(np.concatenate([pixels, opacity], axis=-1))}), channels=pixels.shape[-1])
    np.testing.assert_array_equal(images[0], pixels)


def test_16_bit_png_is_brought_to_255(folder):
    images = read(folder({"a.png": png(RGB.astype("uint16") * 257)}))  # 255 * 257 = 65535
    np.testing.assert_array_equal(images[0], RGB)


def test_middle_at_the_models_proportions_is_taken(folder):
    wide = np.zeros((4, 12, 3), "uint8")
    wide[:, 4:8] = 100
    np.testing.assert_array_equal(read(folder({"a.png": png(wide)}), size=(4, 4)), np.full((1, 4, 4, 3), 100))


def test_images_are_scaled_with_all_their_pixels(folder):
    stripes = np.zeros((64, 64, 3), "uint8")
    stripes[:, ::2] = 200
    # Without antialiasing each pixel would be one of two stripes, or the mean of two neighbours by chance.
    images = read(folder({"a.png": png(stripes)}), size=(6, 6))
    np.testing.assert_allclose(images[:, :, 1:-1], 100, atol=5)  # the filter is cut off at the border


def test_images_of_any_size_make_one_array(folder):
    path = folder({"a.png": png(RGB), "b.png": png(np.zeros((90, 7, 3), "uint8")), "c.png": png(GRAY[:1, :1])})
    assert read(path, size=(8, 6)).shape == (3, 8, 6, 3)


# Refusals


@pytest.mark.parametrize(
    "files, received",
    [
        ({}, "Received: an empty folder"),
        ({"a.txt": b"x", "b/c.npy": b"x"}, "Received: 2 other files, such as 'a.txt'"),
        ({".a.png": png(RGB)}, "Received: an empty folder"),
    ],
    ids=["empty", "others", "hidden"],
)
def test_folder_without_images_is_refused(folder, files, received):
    path = folder(files)
    rule = f"'{path}' has no images (.bmp, .gif, .jpeg, .jpg, .png, .webp). {received}"
    with pytest.raises(ValueError, match=f"^{re.escape(rule)}$"):
        read(path)


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"^There is no folder of images '{tmp_path}/x'$"):
        read(tmp_path / "x")


def test_file_is_no_folder(folder):
    with pytest.raises(FileNotFoundError, match="There is no folder of images '.*a.png'"):
        read(folder({"a.png": png(RGB)}) / "a.png")


JPEG = tf.io.encode_jpeg(np.zeros((16, 16, 3), "uint8")).numpy()
DAMAGED = {
    "empty.png": b"",
    "text.jpg": b"hello",
    "cut.png": png(RGB)[:-20],
    "cut.jpeg": JPEG[: len(JPEG) // 2],
    "cut.bmp": bmp(RGB)[:70],
    "cut.gif": GIF[:25],
}


@pytest.mark.parametrize("name, content", DAMAGED.items(), ids=DAMAGED)
def test_damaged_image_is_named(folder, name, content):
    path = folder({"a.png": png(RGB), f"sub/{name}": content})
    with pytest.raises(ValueError, match=f"^'{path}/sub/{name}' cannot be decoded: it is damaged, or not a PNG, JPEG"):
        read(path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"channels": 2}, "A folder's images have 1 or 3 channels. Received: channels=2"),
        ({"channels": None}, "1 or 3 channels. Received: channels=None"),
        ({"size": (None, None)}, r"need a fixed size, \(height, width\). Received: size=\(None, None\)"),
        ({"size": (0, 4)}, r"Received: size=\(0, 4\)"),
        ({"limit": 0}, "limit must be an int of at least 1. Received: limit=0"),
        ({"limit": 1.5}, "Received: limit=1.5"),
        ({"std": 0.0}, r"std above zero. Received: normalization=\(0.0, 0.0\)"),
        ({"mean": (1.0, 2.0)}, r"one for each of 3 channels.* Received: normalization=\(\(1.0, 2.0\), 1.0\)"),
        ({"mean": float("nan")}, r"std above zero. Received: normalization=\(nan, 1.0\)"),
        ({"std": "x"}, r"normalization must be \(mean, std\).* Received: normalization=\(0.0, 'x'\)"),
    ],
)
def test_bad_arguments_are_refused(folder, options, message):
    with pytest.raises(TypeError if options.get("std") == "x" else ValueError, match=message):
        read(folder({"a.png": png(RGB)}), **options)


# Calibration


def test_folder_is_calibration_data_in_0_to_255(folder):
    path = folder({"a.png": png(RGB), "b.png": png(RGB // 2)})
    for source in (path, str(path)):
        np.testing.assert_array_equal(calibration_images(source, (3, 4, 3)), [RGB, RGB // 2])


def test_missing_folder_of_calibration_data_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"^There is no folder of images '{tmp_path}/x'$"):
        calibration_images(str(tmp_path / "x"), (3, 4, 3))


def network(*front):
    return keras.Sequential([keras.Input((4, 4, 3)), *front, keras.layers.Conv2D(2, 1)], name="net")


@pytest.mark.parametrize("layer", [keras.layers.Rescaling(1 / 255), keras.layers.Normalization(mean=0.5, variance=1.0)])
def test_model_that_scales_its_input_takes_pixels(layer):
    assert scales_pixels(network(layer))


def test_model_of_bytes_takes_pixels_whatever_scales_them():
    images = keras.Input((4, 4, 3), dtype="uint8")
    scaled = keras.ops.cast(images, "float32") / 255
    assert scales_pixels(keras.Model(images, keras.layers.Conv2D(2, 1)(scaled)))


def test_model_that_does_not_scale_its_input_takes_no_pixels():
    assert not scales_pixels(network(keras.layers.ReLU()))
