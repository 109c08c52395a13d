"""TFRecords: image files packed into a few large files, which disks and networks read many times faster.

The records are `tf.train.Example`s with the keys of ImageNet's: `image/encoded`, `image/class/label`, `image/filename`.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
import tensorflow as tf

from se_keras import storage
from se_keras.normalization import IMAGENET
from se_keras.records import read_json
from se_keras.training.data import Data, EpochOrder, Files
from se_keras.typing import Array, FilePath, Json, OnMessage
from se_keras.wording import counted

INDEX, _UNFINISHED = "index.json", "packing.json"
SHUFFLED = 10_000  # images in the shuffle buffer; the order of the shards is shuffled too
_READ_AT_ONCE = 4  # shards
_KEYS = {
    "image/encoded": tf.io.FixedLenFeature([], tf.string),
    "image/class/label": tf.io.FixedLenFeature([], tf.int64),
}


class Shard(TypedDict):
    """A shard in the index."""

    file: str
    count: int
    bytes: int
    sha256: str
    labels: list[int]


class Splits(TypedDict):
    """The shards of each split."""

    train: list[Shard]
    test: list[Shard]


class Index(TypedDict):
    """The files index.json and packing.json."""

    name: str
    classes: list[str]
    splits: Splits
    source: NotRequired[str]
    shards: NotRequired[int]


@dataclass(frozen=True, kw_only=True, eq=False)
class Records:
    """A split of `Data` whose images are read one after the other, without random access.

    Args:
        count, files: Number of images, and of files.
        labels: Each label that occurs.
        read: From indices of files, in reading order, to a dataset of (index, bytes of the image, label).
        check: Raises ValueError if a file is damaged; it reads all of them.
    """

    count: int
    labels: Array
    read: Callable[[Array], tf.data.Dataset] = field(repr=False)
    files: int = 1
    check: Callable[[], object] = field(default=lambda: None, repr=False)

    def __len__(self) -> int:
        return self.count

    def examples(self, order: EpochOrder) -> tf.data.Dataset:
        """A dataset of (index, bytes of the image, label) in this order; index -1 pads the last step.

        Images are shuffled in a buffer. If the number of files is a multiple of the number of shares, each share reads
        its own files, and may repeat some images if they are fewer than another share's. Otherwise each share reads
        all files and skips the images of the others. Balanced sampling needs random access: it raises ValueError.
        """
        if order.sampling != "shuffled":
            raise ValueError(
                f"TFRecords are read in the order of their files: sampling must be 'shuffled', or take a folder of "
                f"images. Received: sampling={order.sampling!r}"
            )
        step = order.batch * order.parts
        if order.seed is None:
            padding = tf.data.Dataset.from_tensors((tf.constant(-1, "int64"), "", 0)).repeat(-self.count % step)
            dataset = self.read(np.arange(self.files)).concatenate(padding)
        else:
            seed = [int(x) for x in np.random.default_rng((order.seed, order.epoch)).integers(2**31, size=2)]
            files, steps = np.random.default_rng(seed).permutation(self.files), self.count // step
            has_own_files = order.parts > 1 and self.files % order.parts == 0
            dataset = self.read(files[order.part :: order.parts] if has_own_files else files)
            dataset = dataset.shuffle(SHUFFLED, seed=seed[0], reshuffle_each_iteration=False)
            if has_own_files:
                return dataset.repeat().take(steps * order.batch).skip(order.start * order.batch)
            dataset = dataset.take(steps * step)
        return dataset.skip(order.start * step).batch(order.batch).shard(order.parts, order.part).unbatch()

    def name_of(self, index: int) -> str:
        """The name of an image in messages."""
        return f"image {index}"


def pack(data: Data[Files], folder: FilePath, *, shards: int = 8, progress: OnMessage | None = None) -> Json:
    """Writes image files as TFRecords, `train-00000-of-00008.tfrecord` and so on, with an index.

    Each shard is written atomically, and an interrupted call resumes with the next one. The index, with the number of
    images, size and SHA-256 of each shard, is written last, and returned. The files' bytes are copied in random order,
    so that each shard has images of all classes.

    Args:
        shards: Number of shards of each split.
        progress: Called before each shard.

    Raises:
        ValueError: If there are fewer images than shards, or if `folder` holds shards of other data.
        OSError: If a file cannot be read or written; FileExistsError, if `folder` holds packed data; BlockingIOError,
            if another process packs there.
    """
    folder = Path(folder)
    if (folder / INDEX).exists():
        raise FileExistsError(f"{str(folder / INDEX)!r} exists: the data are packed. Take a new folder")
    splits = {"train": data.train, "test": data.test}
    for name, split in splits.items():
        if type(shards) is not int or not 1 <= shards <= len(split):
            count = counted(len(split), "image")
            raise ValueError(f"The {count} of {name} fill 1 to {len(split)} shards. Received: {shards!r}")
    index = {
        "schema": 1,
        "name": data.name,
        "classes": list(data.classes),
        "source": storage.sha256(os.fsencode("\n".join(path for split in splits.values() for path in split.paths))),
        "shards": shards,
        "splits": {name: [] for name in splits},
    }
    with storage.locked(folder / ".lock"):
        return _pack(data, splits, index, folder, progress)


def _pack(data, splits, index, folder, progress):
    shards = index["shards"]
    if (folder / _UNFINISHED).exists():
        unfinished = _read_index(folder / _UNFINISHED)
        if any(unfinished.get(key) != index[key] for key in ("source", "shards", "classes")):
            raise ValueError(f"{str(folder)!r} holds unfinished shards of other data. Take a new folder")
        index = unfinished
        storage.remove_partial(folder)
    for name, split in splits.items():
        order = np.random.default_rng(0).permutation(len(split))
        done = {entry["file"]: entry for entry in index["splits"][name] if _is_intact(folder / entry["file"], entry)}
        for number in range(shards):
            file = f"{name}-{number:05}-of-{shards:05}.tfrecord"
            if file not in done:
                if progress:
                    progress(f"packing {data.name}: {name}, shard {number + 1} of {shards}")
                done[file] = _write_shard(folder / file, split, order[number::shards])
            index["splits"][name] = [done[file] for file in sorted(done)]
            storage.write_json(folder / _UNFINISHED, index)
    storage.write_json(folder / INDEX, index)
    (folder / _UNFINISHED).unlink()
    return index


def read(
    folder: FilePath, *, mean: Sequence[float] = IMAGENET.mean, std: Sequence[float] = IMAGENET.std, check: bool = False
) -> Data[Records]:
    """Opens packed shards, and compares the size of each with the index.

    `mean` and `std` are as for `data.folder`. `check` also compares the checksums, which reads all shards.

    Raises:
        FileNotFoundError: If there is no index, or if a shard is missing.
        ValueError: If the index is damaged, or if a shard was cut short or changed.
    """
    folder = Path(folder)
    index = _read_index(folder / INDEX)
    train, test = (_records(folder, index["splits"][name], check) for name in ("train", "test"))
    classes = tuple(index["classes"])
    return Data(
        name=index["name"],
        train=train,
        test=test,
        classes=classes,
        mean=tuple(mean),
        std=tuple(std),
        source=str(folder.resolve()),
    )


def _records(folder, entries, check):
    paths, firsts = [], [0]
    for entry in entries:
        path, size = folder / entry["file"], entry["bytes"]
        if not path.is_file():
            raise FileNotFoundError(f"The shard {str(path)!r} is missing")
        if (found := path.stat().st_size) != size:
            raise ValueError(f"The shard {str(path)!r} was cut short or changed: {found} bytes instead of {size}")
        paths.append(str(path))
        firsts.append(firsts[-1] + entry["count"])

    def check_shards():
        for path, entry in zip(map(Path, paths), entries, strict=True):
            if not _is_intact(path, entry):
                raise ValueError(f"The shard {str(path)!r} is damaged: its SHA-256 is not the index's")

    if check:
        check_shards()

    def records_of(path, first):
        def parsed(index, record):
            features = tf.io.parse_single_example(record, _KEYS)
            return index, features["image/encoded"], tf.cast(features["image/class/label"], "int32")

        return tf.data.TFRecordDataset(path).enumerate(first).map(parsed)

    def read_files(order):
        files = tf.data.Dataset.from_tensor_slices((np.array(paths)[order], np.array(firsts)[order]))
        return files.interleave(
            records_of,  # pyright: ignore[reportArgumentType]  the stubs pass one argument
            cycle_length=_READ_AT_ONCE,
            block_length=1,
            num_parallel_calls=_READ_AT_ONCE,
            deterministic=True,
        )

    labels = np.unique([label for entry in entries for label in entry["labels"]])
    return Records(count=firsts[-1], labels=labels, read=read_files, files=len(paths), check=check_shards)


def _write_shard(path, split, indices):
    with storage.staged(path) as staged, contextlib.closing(tf.io.TFRecordWriter(str(staged))) as writer:
        for index in indices:
            source = Path(split.paths[index])
            writer.write(_example(source.read_bytes(), int(split.labels[index]), source.name))
    return {
        "file": path.name,
        "count": len(indices),
        "bytes": path.stat().st_size,
        "sha256": storage.file_sha256(path),
        "labels": sorted({int(split.labels[index]) for index in indices}),
    }


def _example(content, label, name):
    values = {
        "image/encoded": tf.train.Feature(bytes_list=tf.train.BytesList(value=[content])),
        "image/class/label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
        "image/filename": tf.train.Feature(bytes_list=tf.train.BytesList(value=[os.fsencode(name)])),
    }
    return tf.train.Example(features=tf.train.Features(feature=values)).SerializeToString(deterministic=True)


def _is_intact(path, entry):
    return path.is_file() and path.stat().st_size == entry["bytes"] and storage.file_sha256(path) == entry["sha256"]


def _read_index(path):
    """The index; also refuses shards that are not in its folder."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no index of shards {str(path)!r}")
    index = read_json(path, Index, what="an index of shards")
    for entry in (*index["splits"]["train"], *index["splits"]["test"]):
        if Path(entry["file"]).name != entry["file"] or min(entry["count"], entry["bytes"]) < 0:
            raise ValueError(f"{str(path)!r} is not an index of shards: no shard is {entry['file']!r}")
    return index
