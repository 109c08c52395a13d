"""Data: the digits, folders, the order of an epoch and its shares, packed TFRecords."""

import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
from sklearn.datasets import load_digits

from se_keras.evaluation import evaluate
from se_keras.export import load_images
from se_keras.training import shards, sources
from se_keras.training.data import Arrays, Data, EpochOrder, digits, folder


@pytest.fixture(scope="module")
def data():
    return digits()


# The digits


def test_digits_are_all_scans_of_scikit_learn_each_once(data):
    def rows(images, labels):
        return sorted((label, image.tobytes()) for image, label in zip(images, labels.tolist(), strict=True))

    scans = load_digits()
    expected = rows((scans.images[..., None] / 16).astype("float32"), scans.target)
    assert len(expected) == 1797
    # So the two splits are disjoint too: together they have no scan more often than the data set has.
    assert sorted(rows(data.train.images, data.train.labels) + rows(data.test.images, data.test.labels)) == expected


@pytest.mark.parametrize("split, samples", [("train", 1437), ("test", 360)])
def test_digits_are_float32_images_of_8x8_pixels_in_0_to_1(data, split, samples):
    images, labels = getattr(data, split).images, getattr(data, split).labels
    assert (images.shape, images.dtype) == ((samples, 8, 8, 1), "float32")
    assert (labels.shape, labels.dtype) == ((samples,), "int32")
    assert (images.min(), images.max()) == (0, 1)
    assert len(getattr(data, split)) == samples


def test_every_digit_gives_a_fifth_of_its_scans_to_the_test(data):
    train, test = (np.bincount(split.labels, minlength=10) for split in (data.train, data.test))
    # 360 of 1,797 cannot be an exact fifth of each class: at most one scan more or less.
    assert np.abs(test - (train + test) / 5).max() < 1


def test_digits_are_the_same_each_time(data):
    again = digits()
    for split in ("train", "test"):
        np.testing.assert_array_equal(getattr(again, split).images, getattr(data, split).images)
        np.testing.assert_array_equal(getattr(again, split).labels, getattr(data, split).labels)


def test_classes_of_the_digits_are_named_after_them(data):
    assert data.classes == tuple("0123456789")


# The order of an epoch

LABELS = np.repeat(np.arange(4), (40, 30, 20, 10))


def test_each_epoch_has_another_order_and_each_seed_too():
    orders = [
        tuple(EpochOrder(batch=10, seed=seed, epoch=epoch).indices(LABELS)) for seed in (0, 1) for epoch in (0, 1)
    ]
    assert len(set(orders)) == 4
    assert {tuple(sorted(order)) for order in orders} == {tuple(range(100))}


def test_incomplete_last_step_of_training_is_left_out():
    order = EpochOrder(batch=30, seed=0).indices(LABELS)
    assert len(order) == len(set(order)) == 90


@pytest.mark.parametrize("seed", [0, None])
def test_shares_make_up_the_steps_of_one_pass(seed):
    whole = EpochOrder(batch=12, seed=seed).indices(LABELS).reshape(-1, 12)
    shares = [EpochOrder(batch=4, part=part, parts=3, seed=seed).indices(LABELS).reshape(-1, 4) for part in range(3)]
    np.testing.assert_array_equal(np.concatenate(shares, axis=1), whole)


def test_pass_without_a_seed_has_each_image_once_and_is_filled_up():
    order = EpochOrder(batch=30, seed=None).indices(LABELS)
    np.testing.assert_array_equal(order, [*range(100), *[-1] * 20])


def test_pass_begins_behind_the_steps_that_are_done():
    order = EpochOrder(batch=10, part=1, parts=2, seed=3)
    np.testing.assert_array_equal(replace(order, start=2).indices(LABELS), order.indices(LABELS)[20:])


def test_balanced_pass_has_each_class_equally_often():
    order = EpochOrder(batch=20, seed=0, sampling="balanced").indices(LABELS)
    assert len(order) == 100
    np.testing.assert_array_equal(np.bincount(LABELS[order]), [25] * 4)
    # In each step too: four consecutive images are of four classes.
    assert all(len(set(LABELS[four])) == 4 for four in order.reshape(-1, 4))
    # Images of a small class repeat only when all of them were drawn.
    few = order[LABELS[order] == 3]
    assert sorted(np.bincount(few - 90)) == [2] * 5 + [3] * 5


def test_unknown_sampling_is_refused():
    with pytest.raises(ValueError, match=r"sampling must be one of .+ Received: sampling='weighted'"):
        EpochOrder(batch=1, sampling="weighted")


# Folders


def write_images(root, counts, suffix=".png", size=(9, 7)):
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = np.random.default_rng([number, len(name)]).integers(0, 255, (*size, 3))
            keras.utils.save_img(root / name / f"{number:02}{suffix}", pixels, scale=False)


def names(split):
    return [path.split("/")[-2] + "/" + path.split("/")[-1] for path in split.paths]


def test_folder_with_train_and_val_has_those(tmp_path):
    write_images(tmp_path / "train", {"ant": 3, "bee": 2})
    write_images(tmp_path / "val", {"ant": 1, "bee": 1})
    data = folder(tmp_path)
    assert data.classes == ("ant", "bee")
    assert names(data.train) == ["ant/00.png", "ant/01.png", "ant/02.png", "bee/00.png", "bee/01.png"]
    assert list(data.train.labels) == [0, 0, 0, 1, 1]
    assert names(data.test) == ["ant/00.png", "bee/00.png"]


def test_folder_of_classes_gives_a_fifth_of_each_to_the_test(tmp_path):
    write_images(tmp_path, {"ant": 10, "bee": 5, "cat": 2})
    data = folder(tmp_path)
    assert list(np.bincount(data.test.labels)) == [2, 1, 1]
    assert sorted(names(data.train) + names(data.test)) == sorted(
        f"{name}/{number:02}.png" for name, count in (("ant", 10), ("bee", 5), ("cat", 2)) for number in range(count)
    )
    assert names(folder(tmp_path).test) == names(data.test)


def test_folders_within_a_class_are_of_it_and_hidden_and_other_files_are_passed_over(tmp_path):
    write_images(tmp_path, {"ant/north": 2, "bee": 2, ".hidden": 2})
    (tmp_path / "ant" / ".thumb.png").write_bytes(b"")
    (tmp_path / "ant" / "notes.txt").write_text("ants")
    data = folder(tmp_path)
    assert data.classes == ("ant", "bee")
    assert len(data.train) + len(data.test) == 4


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", "__MACOSX", "@eaDir", ".AppleDouble"])
def test_folders_of_the_system_are_left_out_wherever_they_are(tmp_path, hidden):
    write_images(tmp_path, {"ant": 2, f"ant/{hidden}": 2, "bee": 2, hidden: 2})
    data = folder(tmp_path)
    assert data.classes == ("ant", "bee")
    assert len(data.train) + len(data.test) == len(load_images(tmp_path, size=(9, 7), channels=3)) == 4


def test_links_are_followed_but_not_in_circles(tmp_path):
    root = tmp_path / "root"
    write_images(root, {"ant": 2, "bee": 3})
    write_images(tmp_path, {"elsewhere/north": 4})
    (root / "cow").symlink_to(tmp_path / "elsewhere")
    (root / "ant" / "more").symlink_to(tmp_path / "elsewhere")
    (root / "ant" / "again").symlink_to(root / "ant")
    (root / "bee" / "all").symlink_to(root)
    (root / "bee" / "link.png").symlink_to(root / "bee" / "00.png")
    (root / "bee" / "broken.png").symlink_to(root / "none.png")
    (tmp_path / "elsewhere" / "north" / "back").symlink_to(tmp_path / "elsewhere")
    data = folder(root)
    assert np.bincount([*data.train.labels, *data.test.labels]).tolist() == [6, 4, 4]
    assert len(load_images(root, size=(9, 7), channels=3)) == 14


@pytest.mark.parametrize(
    "train, test", [("Train", "Val"), ("training", "validation"), ("train", "dev"), ("TRAIN", "TEST")]
)
def test_splits_have_many_names(tmp_path, train, test):
    write_images(tmp_path / train, {"ant": 3, "bee": 2})
    write_images(tmp_path / test, {"ant": 1, "bee": 1})
    data = folder(tmp_path)
    assert (data.classes, len(data.train), len(data.test)) == (("ant", "bee"), 5, 2)


@pytest.mark.parametrize("names", [("part1", "part2"), ("train", "unseen"), ("rest", "val")])
def test_classes_that_look_like_splits_are_warned_of(tmp_path, names):
    for name in names:
        write_images(tmp_path / name, {"ant": 2, "bee": 2})
    with pytest.warns(UserWarning, match=f"{names[0]}/.+ are read as classes, and look like splits"):
        assert folder(tmp_path).classes == names


def test_names_of_files_need_not_be_utf_8(tmp_path):
    write_images(tmp_path / "root", {"ant": 2, "bee": 2})
    name = os.fsencode(tmp_path / "root" / "ant") + b"/caf\xe9.png"
    os.rename(tmp_path / "root" / "ant" / "01.png", name)
    data = folder(tmp_path / "root")
    assert sum(bool(content) for split in (data.train, data.test) for _, content, _ in seen(split, batch=1)) == 4
    paths = [split.name_of(index) for split in (data.train, data.test) for index in range(len(split))]
    assert sum(path.endswith("ant/caf\\xe9.png") for path in paths) == 1
    shards.pack(data, tmp_path / "packed", shards=1)
    os.rename(tmp_path / "root" / "bee", os.fsencode(tmp_path / "root") + b"/b\xe9e")
    with pytest.raises(ValueError, match=r"name of a class must be UTF-8. Received: the folder '.+/b\\\\xe9e'"):
        folder(tmp_path / "root")


FOLDERS = {
    "no folder": (lambda root: root.rmdir(), FileNotFoundError, "There is no folder of images '.+'"),
    "empty": (lambda root: None, ValueError, "needs two folders or more, one for each class. Received: 0"),
    "one class": (lambda root: write_images(root, {"ant": 3}), ValueError, "one for each class. Received: 1"),
    "an empty class": (
        lambda root: (write_images(root, {"ant": 3}), (root / "bee").mkdir()),
        ValueError,
        r"Each class needs images \(.bmp.+\). Received: none in '.+/bee'",
    ),
    "a class of one": (
        lambda root: write_images(root, {"ant": 3, "bee": 1}),
        ValueError,
        "A class needs at least 2 images, one of them to evaluate on. Received: 1 in 'bee'",
    ),
    "other classes": (
        lambda root: (write_images(root / "train", {"a": 1, "b": 1}), write_images(root / "val", {"a": 1, "c": 1})),
        ValueError,
        r"train/ and val/ must have the same classes. Received: 'b' in one of them only",
    ),
}


@pytest.mark.parametrize("make, error, message", FOLDERS.values(), ids=FOLDERS)
def test_folder_that_cannot_be_learned_from_is_refused(tmp_path, make, error, message):
    (tmp_path / "root").mkdir()
    make(tmp_path / "root")
    with pytest.raises(error, match=message):
        folder(tmp_path / "root")


@pytest.mark.parametrize("label", [-1, 10])
def test_label_out_of_range_is_refused(data, label):
    labels = data.train.labels.copy()
    labels[5] = label
    with pytest.raises(ValueError, match=f"The labels of 10 classes are 0 to 9. Received: {label} in digits"):
        replace(data, train=Arrays(images=data.train.images, labels=labels))


# By name


def test_data_are_loaded_by_name(data, tmp_path):
    assert sources.load("digits").name == data.name == "digits"
    write_images(tmp_path / "insects", {"ant": 2, "bee": 2})
    assert sources.load(tmp_path / "insects").name == "insects"


def test_unknown_data_are_refused():
    with pytest.raises(
        ValueError, match="data must be 'digits', 'fashion_mnist', .+, 'tfds:NAME', or a folder .+ Received: 'mnist'"
    ):
        sources.load("mnist")


def test_tfds_without_its_package_says_what_to_install():
    if importlib.util.find_spec("tensorflow_datasets"):
        pytest.skip("tensorflow-datasets is installed")
    with pytest.raises(ImportError, match=r"tfds:mnist needs the package tensorflow-datasets: pip install"):
        sources.load("tfds:mnist")


# TFRecords


@pytest.fixture(scope="module")
def insects(tmp_path_factory):
    root = tmp_path_factory.mktemp("insects")
    write_images(root / "train", {"ant": 13, "bee": 11})
    write_images(root / "val", {"ant": 5, "bee": 4})
    return folder(root)


@pytest.fixture(scope="module")
def packed(insects, tmp_path_factory):
    """A folder of four shards for each split."""
    target = tmp_path_factory.mktemp("packed")
    shards.pack(insects, target, shards=4)
    return target


def seen(split, **how):
    return [(int(i), bytes(x), int(label)) for i, x, label in split.examples(EpochOrder(**how)).as_numpy_iterator()]


def files_of(split):
    return sorted((Path(path).read_bytes(), int(label)) for path, label in zip(split.paths, split.labels, strict=True))


@pytest.mark.parametrize("split", ["train", "test"])
def test_packed_images_are_those_of_the_folder(insects, packed, split):
    data = shards.read(packed, check=True)
    assert data.classes == insects.classes
    examples = seen(getattr(data, split), batch=1)
    assert sorted(x[1:] for x in examples) == files_of(getattr(insects, split))
    assert [x[0] for x in examples] != sorted(x[0] for x in examples)  # some shards at a time
    assert len({x[0] for x in examples}) == len(getattr(data, split)) == len(examples)


def test_shuffled_records_are_each_seen_once_and_go_on_where_they_were(packed):
    train = shards.read(packed).train
    first = seen(train, batch=4, seed=0)
    assert len({x[0] for x in first}) == 24
    assert first != seen(train, batch=4, seed=0, epoch=1)
    assert first == seen(train, batch=4, seed=0)
    assert first[12:] == seen(train, batch=4, seed=0, start=3)


def test_shares_of_records_that_files_do_not_divide_make_up_one_pass(packed):
    train = shards.read(packed).train
    whole = seen(train, batch=6, seed=0)
    shares = [seen(train, batch=2, part=part, parts=3, seed=0) for part in range(3)]
    assert [x for step in range(4) for share in shares for x in share[2 * step : 2 * step + 2]] == whole


def test_shares_of_whole_files_have_different_images(packed):
    train = shards.read(packed).train
    shares = [{x[0] for x in seen(train, batch=3, part=part, parts=2, seed=0)} for part in range(2)]
    assert shares[0].isdisjoint(shares[1])
    assert len(shares[0] | shares[1]) == 24


def test_held_out_records_are_each_seen_once_by_all_shares_together(packed):
    test = shards.read(packed).test
    shares = [[x[0] for x in seen(test, batch=2, part=part, parts=2)] for part in range(2)]
    assert len(shares[0]) == len(shares[1]) == 6
    assert sorted(shares[0] + shares[1]) == [-1] * 3 + list(range(9))


def test_packing_goes_on_where_it_was_interrupted(insects, packed, tmp_path, monkeypatch):
    written, write = [], shards._write_shard

    def counted(path, *arguments):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path.name)
        return write(path, *arguments)

    monkeypatch.setattr(shards, "_write_shard", counted)
    with pytest.raises(KeyboardInterrupt):
        shards.pack(insects, tmp_path, shards=4)
    assert not (tmp_path / shards.INDEX).exists()
    damaged = tmp_path / written[1]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    again = []
    monkeypatch.setattr(shards, "_write_shard", lambda path, *a: again.append(path.name) or write(path, *a))
    shards.pack(insects, tmp_path, shards=4)
    assert again == [
        written[1],
        "train-00003-of-00004.tfrecord",
        *[f"test-0000{n}-of-00004.tfrecord" for n in range(4)],
    ]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.name: path.read_bytes() for path in packed.iterdir()
    }


def test_packed_folder_is_not_packed_over(insects, packed):
    with pytest.raises(FileExistsError, match="exists: the data are packed. Take a new folder"):
        shards.pack(insects, packed, shards=4)


def test_unfinished_shards_of_other_data_are_not_gone_on_with(insects, tmp_path):
    (tmp_path / "packing.json").write_text(
        json.dumps({"name": "x", "source": "other", "shards": 4, "classes": [], "splits": {"train": [], "test": []}})
    )
    with pytest.raises(ValueError, match="holds unfinished shards of other data. Take a new folder"):
        shards.pack(insects, tmp_path, shards=4)


@pytest.mark.parametrize("count", [0, 10, 1.5])
def test_number_of_shards_that_cannot_be_filled_is_refused(insects, tmp_path, count):
    with pytest.raises(ValueError, match=r"The \d+ images of (train|test) fill 1 to \d+ shards. Received: "):
        shards.pack(insects, tmp_path, shards=count)


@pytest.fixture
def copied(packed, tmp_path):
    for path in packed.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_shard_that_was_cut_short_is_named(copied):
    path = copied / "train-00002-of-00004.tfrecord"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=f"The shard '{path}' was cut short or changed: .+ bytes instead of"):
        shards.read(copied)


def test_shard_that_is_missing_is_named(copied):
    (copied / "test-00000-of-00004.tfrecord").unlink()
    with pytest.raises(FileNotFoundError, match="The shard '.+test-00000-of-00004.tfrecord' is missing"):
        shards.read(copied)


def test_shard_with_a_flipped_bit_is_named_where_checksums_are_asked_for(copied):
    path = copied / "train-00001-of-00004.tfrecord"
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    shards.read(copied)
    with pytest.raises(ValueError, match=f"The shard '{path}' is damaged: its SHA-256 is not the index's"):
        shards.read(copied, check=True)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"splits": {"train": [{}]}}'])
def test_damaged_index_is_refused(copied, text):
    (copied / shards.INDEX).write_text(text)
    with pytest.raises(ValueError, match="index.json' is not an index of shards"):
        shards.read(copied)


def test_shard_with_a_flipped_bit_is_named_where_it_is_read(copied):
    path = copied / "test-00001-of-00004.tfrecord"
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    data = shards.read(copied)
    model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match=f"The shard '{path}' is damaged: its SHA-256 is not the index's"):
        evaluate(model, data.test, data)


def test_file_that_cannot_be_decoded_is_named_where_it_is_read(tmp_path):
    write_images(tmp_path / "val", {"ant": 2, "bee": 2})
    write_images(tmp_path / "train", {"ant": 1, "bee": 1})
    data = folder(tmp_path)
    Path(data.test.paths[1]).write_bytes(b"nonsense")
    model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match=f"^1 file cannot be decoded, .+: {data.test.paths[1]}"):
        evaluate(model, data.test, data)


def test_index_with_a_shard_elsewhere_is_refused(copied):
    index = json.loads((copied / shards.INDEX).read_text())
    index["splits"]["test"][0]["file"] = "../shard.tfrecord"
    (copied / shards.INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"is not an index of shards: no shard is '\.\./shard.tfrecord'"):
        shards.read(copied)


def test_records_cannot_be_balanced(packed):
    train = shards.read(packed).train
    with pytest.raises(ValueError, match="TFRecords are read in the order of their files: sampling must be 'shuffled'"):
        train.examples(EpochOrder(batch=1, seed=0, sampling="balanced"))


def test_data_of_records_knows_its_labels(packed):
    data = shards.read(packed)
    with pytest.raises(ValueError, match="The labels of 1 classes are 0 to 0. Received: 1"):
        Data(name="x", train=data.train, test=data.test, classes=("ant",), mean=(0.0,), std=(1.0,))
