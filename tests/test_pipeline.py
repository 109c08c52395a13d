"""From files to batches: content decides the format, seeds decide the changes, no image is lost or repeated."""

import io
import socket
import threading
from dataclasses import replace

import keras
import numpy as np
import pytest
import tensorflow as tf

from se_keras.images import RESIZE, decode, evaluation_image
from se_keras.normalization import IMAGENET
from se_keras.training import pipeline
from se_keras.training.augmentation import training_image
from se_keras.training.data import Arrays, Data, EpochOrder, SkippedFiles, digits, folder
from se_keras.training.pipeline import batches, held_out
from se_keras.training.recipes import Augmentation

CROPS = Augmentation(crop="scale_and_aspect", flip=True)


def picture(number=0, size=(30, 40)):
    """A smooth picture, which JPEG keeps well."""
    rng = np.random.default_rng(number)
    small = rng.uniform(20, 235, (3, 4, 3)).astype("float32")
    return np.asarray(keras.ops.image.resize(small, size, interpolation="bicubic")).clip(0, 255).astype("uint8")


def encoded(pixels, kind):
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **({"quality": 95} if kind in ("JPEG", "WEBP") else {}))
    return file.getvalue()


# Decoding

LOSSLESS = ("PNG", "BMP")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "WEBP"])
def test_content_says_what_a_file_is(kind):
    pixels = picture()
    found = decode(tf.constant(encoded(pixels, kind))).numpy()
    assert found.dtype == "uint8" and found.shape == pixels.shape
    difference = np.abs(found.astype(int) - pixels).mean()
    # GIF has 256 colours; JPEG and WebP lose a few values of 255.
    assert difference == 0 if kind in LOSSLESS else difference < 8


def test_first_frame_of_an_animation_is_taken():
    from PIL import Image

    frames = [Image.fromarray(np.full((8, 8, 3), value, "uint8")) for value in (0, 255)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode(tf.constant(file.getvalue())), np.zeros((8, 8, 3)))


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA"])
def test_gray_and_transparent_files_become_rgb(mode):
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture()).convert(mode).save(file, "PNG")
    assert decode(tf.constant(file.getvalue())).shape == (30, 40, 3)


def test_color_becomes_gray_for_a_network_of_one_channel():
    assert decode(tf.constant(encoded(picture(), "JPEG")), channels=1).shape == (30, 40, 1)


# Evaluation


def test_middle_of_an_image_is_evaluated():
    pixels = np.zeros((64, 128, 3), "uint8")
    pixels[:, 56:72] = 255  # a bar in the middle, 16 of 128 wide
    found = evaluation_image(tf.constant(pixels), size=(56, 56), channels=3).numpy()
    bar = found[28, :, 0] > 127
    # The shorter side, 64, is 56 * 256/224 already: nothing is scaled.
    assert 56 * RESIZE == 64
    np.testing.assert_array_equal(np.flatnonzero(bar), range(20, 36))


def test_evaluation_scales_as_pillow_does():
    from PIL import Image

    pixels = picture(size=(300, 400))
    expected = Image.fromarray(pixels).resize((171, 128), Image.BILINEAR)
    expected = np.asarray(expected)[8:120, 29:141]
    found = evaluation_image(tf.constant(pixels), size=(112, 112), channels=3).numpy()
    assert np.abs(found - expected).mean() < 1  # Pillow rounds to integers twice


def test_image_of_the_networks_size_stays_as_it_is():
    pixels = picture(size=(32, 32))
    np.testing.assert_array_equal(evaluation_image(tf.constant(pixels), size=(32, 32), channels=3), pixels)


# Training


def some(augmentation, content, size=(16, 16), count=200):
    seeds = tf.stack([tf.range(count), tf.ones(count, "int32")], axis=1)
    return np.stack(
        [training_image(content, size=size, channels=3, augmentation=augmentation, seed=seed) for seed in seeds]
    )


def test_crop_is_a_part_of_random_size_and_place():
    # Each pixel is its row and its column.
    rows, columns = np.meshgrid(np.arange(100.0), np.arange(100.0), indexing="ij")
    pixels = np.stack([rows, columns, rows * 0], axis=-1).astype("float32")
    crops = some(replace(CROPS, flip=False), tf.constant(pixels))
    extent = [np.ptp(crops[..., axis], axis=(1, 2)) / 100 for axis in (0, 1)]
    area, aspect = extent[0] * extent[1], extent[1] / extent[0]
    # Of 16 samples in a row, the ends are half a step within the crop.
    assert area.min() < 0.2 and area.max() > 0.8
    assert 0.6 < aspect.min() < 0.85 and 1.2 < aspect.max() < 1.6
    assert len({tuple(crop[0, 0]) for crop in crops}) > 150


def test_part_of_a_jpeg_file_is_the_part_of_its_pixels():
    content = tf.constant(encoded(picture(size=(60, 80)), "JPEG"))
    of_file, of_pixels = (
        training_image(x, size=(16, 16), channels=3, augmentation=CROPS, seed=tf.constant([3, 4]))
        for x in (content, decode(content))
    )
    assert np.abs(of_file - of_pixels).mean() < 2  # another inverse transform of the coefficients


def test_every_other_image_is_mirrored():
    pixels = picture(size=(16, 16)).astype("float32")
    seen = some(Augmentation(flip=True), tf.constant(pixels))
    mirrored = (seen == pixels[:, ::-1]).all(axis=(1, 2, 3))
    assert (mirrored | (seen == pixels).all(axis=(1, 2, 3))).all()
    assert 60 < mirrored.sum() < 140  # of 200, five standard deviations


def test_padded_crop_moves_the_image_by_at_most_the_padding():
    pixels = np.full((16, 16, 3), 9.0, "float32")
    seen = some(Augmentation(crop="pad", padding=2), tf.constant(pixels))
    borders = (seen[..., 0] == 0).any(axis=2).sum(axis=1)  # rows with a zero: all, where a column is one
    assert seen[:, 2:-2, 2:-2].min() == 9
    assert set(borders) > {0}


def test_square_of_the_mean_is_cut_out_anywhere_and_ends_at_the_border():
    pixels = tf.constant(np.full((16, 12, 3), 9.0, "float32"))
    images = [
        training_image(
            pixels,
            size=(16, 12),
            channels=3,
            augmentation=Augmentation(cutout=6),
            seed=tf.constant([number, 1]),
            mean=tf.constant([1.0, 2.0, 3.0]),
        )
        for number in range(400)
    ]
    seen = np.stack(images)
    out = (seen != 9).all(axis=-1)
    np.testing.assert_array_equal(seen[out], np.broadcast_to([1, 2, 3], seen[out].shape))
    np.testing.assert_array_equal(seen[~out], np.full(seen[~out].shape, 9))
    sides = np.stack([out.any(axis=2).sum(axis=1), out.any(axis=1).sum(axis=1)], axis=1)  # of one whole rectangle
    np.testing.assert_array_equal(out.sum(axis=(1, 2)), sides.prod(axis=1))
    # The middle is in the image: at a border half of the square is.
    assert sides.min() == 3 and sides.max() == 6
    assert out.mean(axis=0).min() > 0.02  # nowhere never


# Batches


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Forty JPEG files in two classes, with the suffix of another format."""
    root = tmp_path_factory.mktemp("photographs")
    for number in range(40):
        path = root / f"class{number % 2}" / f"{number:02}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(picture(number), "JPEG"))
    return folder(root)


def training(data, augmentation=CROPS, skipped=None, service=None, *, batch=8, seed=0, **order):
    made = batches(
        data.train,
        data,
        size=(16, 16),
        order=EpochOrder(batch=batch, seed=seed, **order),
        augmentation=augmentation,
        skipped=skipped,
        service=service,
    )
    return [tuple(np.asarray(x) for x in batch) for batch in made]


def assert_same(some, others):
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        for x, y in zip(one, other, strict=True):
            np.testing.assert_array_equal(x, y)


EVERYTHING = replace(CROPS, rand_augment=0.5, mixup=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("augmentation", [CROPS, EVERYTHING], ids=["crops", "everything"])
def test_batches_are_those_of_the_seed_wherever_they_begin(photographs, augmentation):
    whole = training(photographs, augmentation)
    assert [x.shape for x in whole[0]] == [(8, 16, 16, 3), (8, 2), (8,)]
    assert_same(training(photographs, augmentation), whole)
    assert_same(training(photographs, augmentation, start=2), whole[2:])
    assert not np.array_equal(training(photographs, augmentation, epoch=1)[0][0], whole[0][0])


def test_shares_see_together_what_one_process_sees(photographs):
    whole = training(photographs)
    shares = [training(photographs, batch=4, part=part, parts=2) for part in range(2)]
    assert_same([tuple(map(np.concatenate, zip(*step, strict=True))) for step in zip(*shares, strict=True)], whole)


def test_pixels_are_normalized(photographs):
    raw = replace(photographs, mean=(0.0,) * 3, std=(1.0,) * 3)
    expected = [(images - np.array(IMAGENET.mean)) / np.array(IMAGENET.std) for images, _, _ in training(raw)]
    np.testing.assert_allclose([x[0] for x in training(photographs)], expected, atol=1e-5)


def test_mixed_labels_are_probabilities(photographs):
    labels = np.concatenate([x[1] for x in training(photographs, replace(CROPS, mixup=0.2))])
    np.testing.assert_allclose(labels.sum(axis=1), 1, rtol=1e-6)
    assert ((labels > 0.01) & (labels < 0.99)).any()


def test_labels_go_with_their_images():
    # Each image is its label.
    labels = np.arange(50) % 10
    images = np.broadcast_to(labels[:, None, None, None], (50, 4, 4, 1)).astype("float32")
    split = Arrays(images=images, labels=labels)
    data = Data(name="x", train=split, test=split, classes=tuple("0123456789"), mean=(0.0,), std=(1.0,))
    made = batches(split, data, size=(4, 4), order=EpochOrder(batch=5, seed=1), augmentation=Augmentation(flip=True))
    for x, y, _ in made:
        np.testing.assert_array_equal(x[:, 0, 0, 0], np.argmax(y, axis=1))


@pytest.mark.parametrize("batch, parts", [(7, 1), (4, 2), (64, 3)])
def test_each_held_out_image_is_judged_once_by_all_shares_together(batch, parts):
    data = digits()
    few = Arrays(images=data.test.images[:50], labels=data.test.labels[:50])
    orders = [EpochOrder(batch=batch, part=part, parts=parts) for part in range(parts)]
    shares = [list(held_out(few, data, size=(8, 8), order=order)) for order in orders]
    assert len({len(share) for share in shares}) == 1
    counted = [(x.numpy().tobytes(), int(y)) for share in shares for images, labels, weights in share
               for x, y, w in zip(images, labels, weights, strict=True) if w == 1]  # fmt: skip
    assert sorted(counted) == sorted((x.tobytes(), int(y)) for x, y in zip(few.images, few.labels, strict=True))
    assert {float(w) for share in shares for _, _, weights in share for w in weights} <= {0.0, 1.0}


# Files that cannot be decoded


@pytest.fixture
def damaged(photographs, tmp_path):
    """The photographs, three of which are cut, empty, or text."""
    paths = []
    for number, path in enumerate(photographs.train.paths):
        content = open(path, "rb").read() if number not in (3, 9, 20) else {3: b"\x89PNG", 9: b"", 20: b"text"}[number]
        paths.append(str(tmp_path / f"{number:02}.jpg"))
        open(paths[-1], "wb").write(content)
    return replace(photographs, train=replace(photographs.train, paths=tuple(paths)))


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_file_that_cannot_be_decoded_is_a_black_image_without_weight(photographs, damaged):
    skipped = SkippedFiles(budget=3)
    order = EpochOrder(batch=8, seed=0).indices(photographs.train.labels).reshape(-1, 8)
    for numbers, whole, (images, labels, weights) in zip(
        order, training(photographs), training(damaged, skipped=skipped), strict=True
    ):
        missing = np.isin(numbers, (3, 9, 20))
        np.testing.assert_array_equal(weights, ~missing)
        np.testing.assert_array_equal(labels, whole[1])
        np.testing.assert_array_equal(images[~missing], whole[0][~missing])
    assert sorted(path[-6:] for path in skipped.paths) == ["03.jpg", "09.jpg", "20.jpg"]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_batch_of_files_none_of_which_can_be_decoded_has_no_weight(damaged, tmp_path):
    (tmp_path / "no.jpg").write_bytes(b"no")
    none = replace(damaged, train=replace(damaged.train, paths=(str(tmp_path / "no.jpg"),) * len(damaged.train)))
    for images, _, weights in training(none, skipped=SkippedFiles(budget=1)):
        assert not weights.any() and images.shape == (8, 16, 16, 3)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_budget_that_is_spent_ends_the_pass(damaged):
    skipped = SkippedFiles(budget=1)
    with pytest.raises(tf.errors.OpError):
        training(damaged, skipped=skipped)
    with pytest.raises(ValueError, match=r"[23] files cannot be decoded, and at most 1 may be skipped"):
        skipped.check()


# A service


def test_tf_data_service_gives_the_same_images(photographs):
    dispatcher = tf.data.experimental.service.DispatchServer()
    address = dispatcher.target.removeprefix("grpc://")
    worker = tf.data.experimental.service.WorkerServer(
        tf.data.experimental.service.WorkerConfig(dispatcher_address=address)
    )
    served = training(photographs, service=dispatcher.target)
    assert_same(served, training(photographs))
    del worker


def test_service_that_cannot_be_reached_is_refused_at_once(photographs):
    with socket.create_server(("localhost", 0)) as server:
        address = f"grpc://localhost:{server.getsockname()[1]}"
    with pytest.raises(ConnectionError, match=f"No tf.data service can be reached at {address}: .+ refused"):
        training(photographs, service=address)


def test_program_that_is_no_service_is_refused_after_a_while(photographs, monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(tf.data.experimental.service, "distribute", lambda *_: released.wait())
    monkeypatch.setattr(pipeline, "_REGISTERED", 0.05)
    with socket.create_server(("localhost", 0)) as server:
        address = f"grpc://localhost:{server.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=f"{address} has not answered as a tf.data service for 0.05 s"):
            training(photographs, service=address)
    released.set()


def test_service_that_fails_is_an_error_with_its_message(photographs, monkeypatch):
    def fail(*_):
        raise tf.errors.InternalError(None, None, "out of workers")

    monkeypatch.setattr(tf.data.experimental.service, "distribute", fail)
    with socket.create_server(("localhost", 0)) as server:
        address = f"grpc://localhost:{server.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=f"The tf.data service at {address} fails: out of workers"):
            training(photographs, service=address)


@pytest.mark.parametrize("service", ["localhost:5000", "http://localhost:5000", "grpc://localhost", "grpc://a:x"])
def test_address_of_a_service_has_protocol_host_and_port(photographs, service):
    with pytest.raises(ValueError, match=f"service must be an address such as grpc://host:5000. .+={service!r}"):
        training(photographs, service=service)
