"""TFRecords: image files packed into a few large ones, which disks and networks read many times as fast.

The records are `tf.train.Example`s with the keys of ImageNet's: `image/encoded`, `image/class/label`, `image/filename`.
"""

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tensorflow as tf

from se_keras import storage
from se_keras.errors import first_line
from se_keras.training.data import IMAGENET, Data

INDEX, _UNFINISHED = "index.json", "packing.json"
SHUFFLED = 10_000  # images that are mixed at a time; the order of the shards is mixed as a whole
_READ_AT_ONCE = 4
_KEYS = {
    "image/encoded": tf.io.FixedLenFeature([], tf.string),
    "image/class/label": tf.io.FixedLenFeature([], tf.int64),
    "image/filename": tf.io.FixedLenFeature([], tf.string, ""),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Records:
    """Images that are read one after the other, not in any order: a split of `Data`.

    Args:
        count: Number of images.
        labels: The labels that there are.
        read: A dataset of number, bytes and label: of all records, or of a part of the files,
            `read(order of the files)`.
        files: Number of files.
    """

    count: int
    labels: np.ndarray
    read: object = field(repr=False)
    files: int = 1

    def __len__(self):
        return self.count

    def examples(self, a_pass):
        """A dataset of number, bytes and label, as a `Pass` has them; number -1 stands for none.

        Some thousand images are mixed at a time. Where the shares can have files of their own, each reads those alone,
        and may see an image twice in place of one of another file; else each reads all, and leaves out the others'.

        Raises:
            ValueError: If the pass is to be balanced: for that, images have to be read in any order.
        """
        if a_pass.sampling != "shuffled":
            raise ValueError(
                f"TFRecords are read in the order of their files: sampling must be 'shuffled', or take a folder of "
                f"images. Received: sampling={a_pass.sampling!r}"
            )
        step = a_pass.batch * a_pass.parts
        if a_pass.seed is None:
            fill = -self.count % step
            none = tf.data.Dataset.from_tensors((tf.constant(-1, "int64"), "", 0)).repeat(fill)
            dataset = self.read(np.arange(self.files)).concatenate(none)
        else:
            seed = [int(x) for x in np.random.default_rng((a_pass.seed, a_pass.epoch)).integers(2**31, size=2)]
            order = np.random.default_rng(seed).permutation(self.files)
            steps = self.count // step
            if a_pass.parts > 1 and self.files % a_pass.parts == 0:
                own = self.read(order[a_pass.part :: a_pass.parts])
                shuffled = own.shuffle(SHUFFLED, seed=seed[0], reshuffle_each_iteration=False).repeat()
                return shuffled.take(steps * a_pass.batch).skip(a_pass.start * a_pass.batch)
            dataset = self.read(order).shuffle(SHUFFLED, seed=seed[0], reshuffle_each_iteration=False)
            dataset = dataset.take(steps * step)
        numbered = dataset.skip(a_pass.start * step).enumerate()
        return numbered.filter(lambda i, _: i // a_pass.batch % a_pass.parts == a_pass.part).map(lambda _, x: x)

    def name_of(self, index):
        """What a message calls an image."""
        return f"image {index}"


def pack(data, folder, *, shards=8, progress=None):
    """Writes the files of a `Data` as TFRecords, `train-00000-of-00008.tfrecord` and so on, with an index.

    Shards are written whole, and an interrupted call goes on with the next one; the index, with the number, size and
    SHA-256 of each, comes last. Images are copied as they are, in a random order, so that a shard has all classes.

    Args:
        data: A `Data` of `Files`.
        folder: Where to.
        shards: Of each split.
        progress: Called with what is done next, as a string.

    Returns:
        The index, a dict.

    Raises:
        ValueError: If there are fewer images than shards, or if `folder` holds the shards of other data.
        OSError: If a file cannot be read, or the folder not written.
    """
    folder = Path(folder)
    if (folder / INDEX).exists():
        raise FileExistsError(f"{str(folder / INDEX)!r} exists: the data are packed. Take a new folder")
    splits = {"train": data.train, "test": data.test}
    for name, split in splits.items():
        if type(shards) is not int or not 1 <= shards <= len(split):
            raise ValueError(f"The {len(split)} images of {name} fill 1 to {len(split)} shards. Received: {shards!r}")
    source = storage.sha256("\n".join(f"{p}" for split in splits.values() for p in split.paths).encode())
    index = {"schema": 1, "name": data.name, "classes": list(data.classes), "source": source, "shards": shards,
             "splits": {name: [] for name in splits}}  # fmt: skip
    if (folder / _UNFINISHED).exists():
        begun = _read_json(folder / _UNFINISHED)
        if any(begun.get(key) != index[key] for key in ("source", "shards", "classes")):
            raise ValueError(f"{str(folder)!r} holds unfinished shards of other data. Take a new folder")
        index = begun
        storage.remove_partial(folder)
    for name, split in splits.items():
        order = np.random.default_rng(0).permutation(len(split))
        whole = {entry["file"]: entry for entry in index["splits"][name] if _is_whole(folder / entry["file"], entry)}
        for number in range(shards):
            file = f"{name}-{number:05}-of-{shards:05}.tfrecord"
            if file not in whole:
                if progress:
                    progress(f"packing {data.name}: {name}, shard {number + 1} of {shards}")
                whole[file] = _write_shard(folder / file, split, order[number::shards])
            index["splits"][name] = [whole[file] for file in sorted(whole)]
            storage.write_json(folder / _UNFINISHED, index)
    storage.write_json(folder / INDEX, index)
    (folder / _UNFINISHED).unlink()
    return index


def read(folder, *, mean=IMAGENET["mean"], std=IMAGENET["std"], check=False):
    """Opens what `pack` has written, as a `Data`; the size of each shard is compared with the index.

    Args:
        folder: Of the shards.
        mean, std: As of `data.folder`.
        check: Whether to compare checksums too, which reads all of them.

    Raises:
        FileNotFoundError: If there is no index, or a shard is missing.
        ValueError: If the index is damaged, or if a shard was cut short or changed.
    """
    folder = Path(folder)
    index = _read_json(folder / INDEX)
    try:
        splits = {name: _records(folder, index["splits"][name], check) for name in ("train", "test")}
        return Data(name=index["name"], **splits, classes=tuple(index["classes"]), mean=tuple(mean), std=tuple(std))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{str(folder / INDEX)!r} is no index of shards: {first_line(error)}") from None


def _records(folder, entries, check):
    paths, firsts, first = [], [], 0
    for entry in entries:
        path = folder / entry["file"]
        if not path.is_file():
            raise FileNotFoundError(f"The shard {str(path)!r} is missing")
        if path.stat().st_size != entry["bytes"]:
            raise ValueError(f"The shard {str(path)!r} was cut short or changed: {path.stat().st_size} bytes instead "
                             f"of {entry['bytes']}")  # fmt: skip
        if check and not _is_whole(path, entry):
            raise ValueError(f"The shard {str(path)!r} is damaged: its SHA-256 is not the index's")
        paths.append(str(path))
        firsts.append(first)
        first += entry["count"]

    def read_files(order):
        def of_file(path, start):
            numbered = tf.data.TFRecordDataset(path).enumerate(start)
            return numbered.map(lambda number, record: (number, *_parsed(record)))

        files = tf.data.Dataset.from_tensor_slices(
            (tf.gather(paths, order), tf.gather(tf.cast(firsts, "int64"), order))
        )
        how = {"cycle_length": _READ_AT_ONCE, "block_length": 1, "num_parallel_calls": _READ_AT_ONCE}
        return files.interleave(of_file, deterministic=True, **how)

    labels = np.unique([label for entry in entries for label in entry["labels"]])
    return Records(count=first, labels=labels, read=read_files, files=len(paths))


def _parsed(record):
    features = tf.io.parse_single_example(record, _KEYS)
    return features["image/encoded"], tf.cast(features["image/class/label"], "int32")


def _write_shard(path, split, numbers):
    with storage.staged(path) as staged, contextlib.closing(tf.io.TFRecordWriter(str(staged))) as writer:
        for number in numbers:
            source = Path(split.paths[number])
            writer.write(_example(source.read_bytes(), int(split.labels[number]), source.name))
    return {
        "file": path.name,
        "count": len(numbers),
        "bytes": path.stat().st_size,
        "sha256": storage.file_sha256(path),
        "labels": sorted({int(split.labels[number]) for number in numbers}),
    }


def _example(content, label, name):
    values = {
        "image/encoded": tf.train.Feature(bytes_list=tf.train.BytesList(value=[content])),
        "image/class/label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
        "image/filename": tf.train.Feature(bytes_list=tf.train.BytesList(value=[name.encode()])),
    }
    return tf.train.Example(features=tf.train.Features(feature=values)).SerializeToString(deterministic=True)


def _is_whole(path, entry):
    return path.is_file() and path.stat().st_size == entry["bytes"] and storage.file_sha256(path) == entry["sha256"]


def _read_json(path):
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no index of shards {str(path)!r}") from None
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no index of shards: {first_line(error)}") from None
