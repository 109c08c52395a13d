"""Data to train on: splits of images and their order in an epoch, the digits of scikit-learn, folders of images."""

import itertools
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import tensorflow as tf

from se_keras.decoding import decode, reason
from se_keras.folders import SUFFIXES, files_in, is_image, printable, subfolders
from se_keras.normalization import IMAGENET, Normalization
from se_keras.training.recipes import SAMPLINGS, Sampling
from se_keras.typing import Array, FilePath
from se_keras.wording import counted

TRAIN = ("train", "training")  # names of the folders of splits, in any case; the first that there is
HELD_OUT = ("val", "valid", "validation", "test", "dev", "testing", "eval", "evaluation")
HELD_OUT_SHARE = 0.2  # of each class, where a folder has no held-out images of its own


@dataclass(frozen=True, kw_only=True)
class EpochOrder:
    """The order of the images in one epoch, or in one worker's share of it.

    A step has `batch * parts` images. Part 0 reads the first `batch` of them, part 1 the next, and so on: two workers
    together see the same images as one process with two replicas.

    Args:
        batch: Number of images of the share in a step.
        part, parts: Index of the share, and number of shares.
        seed: Seed of the random order. None keeps the order of the split, and pads the last step with index -1.
        epoch: Index of the epoch. Each epoch has its own random order; an incomplete last step is dropped.
        sampling: `"shuffled"`, each image once; or `"balanced"`, each class equally often (arXiv:1512.05830, 4.1).
        start: Steps to skip.
    """

    batch: int
    part: int = 0
    parts: int = 1
    seed: int | None = None
    epoch: int = 0
    sampling: Sampling = "shuffled"
    start: int = 0

    def __post_init__(self):
        if self.sampling not in SAMPLINGS:
            raise ValueError(f"sampling must be one of {SAMPLINGS}. Received: sampling={self.sampling!r}")

    def indices(self, labels: Array) -> Array:
        """The indices of the share's images in a split with these labels, in order."""
        count, step = len(labels), self.batch * self.parts
        if self.seed is None:
            indices = np.full(-(-count // step) * step, -1)
            indices[:count] = np.arange(count)
        else:
            rng = np.random.default_rng((self.seed, self.epoch))
            indices = rng.permutation(count) if self.sampling == "shuffled" else _balanced(labels, rng)
            indices = indices[: count // step * step]
        return indices.reshape(-1, self.parts, self.batch)[self.start :, self.part].reshape(-1)


def _balanced(labels, rng):
    """Indices in random order, as many as images, each class equally often: images of small classes repeat."""
    by_class = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    rounds = -(-len(labels) // len(by_class))
    turns = ([rng.permutation(images) for _ in range(-(-rounds // len(images)))] for images in by_class)
    drawn = np.stack([np.concatenate(x)[:rounds] for x in turns], axis=1)  # each row has one image of each class
    return np.concatenate([rng.permutation(row) for row in drawn])[: len(labels)]


class Split(Protocol):
    """Labelled images, to train or to evaluate on."""

    @property
    def labels(self) -> Array:
        """Each label that occurs, at least once."""
        ...

    def __len__(self) -> int: ...

    def examples(self, order: EpochOrder) -> tf.data.Dataset:
        """A dataset of (index, pixels or bytes of a file, label) in this order; index -1 pads the last step."""
        ...

    def name_of(self, index: int) -> str:
        """The name of an image in messages."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Arrays:
    """Images `(samples, height, width, channels)` in memory, and their labels `(samples,)`."""

    images: Array
    labels: Array

    def __len__(self) -> int:
        return len(self.images)

    def examples(self, order: EpochOrder) -> tf.data.Dataset:
        """A dataset of (index, pixels, label) in this order; index -1 pads the last step."""
        images, labels = tf.constant(self.images), tf.constant(self.labels, "int32")

        def read(index):
            return index, tf.gather(images, tf.maximum(index, 0)), tf.gather(labels, tf.maximum(index, 0))

        return tf.data.Dataset.from_tensor_slices(order.indices(self.labels)).map(read)

    def name_of(self, index: int) -> str:
        """The name of an image in messages."""
        return f"image {index}"

    def take(self, indices: Array) -> "Arrays":
        """The images with these indices."""
        return Arrays(images=self.images[indices], labels=self.labels[indices])

    def sized(self, size: tuple[int, int]) -> "Arrays":
        """The images of `size`, `(height, width)`: larger ones get a black border, smaller ones are scaled."""
        height, width = self.images.shape[1:3]
        if size == (height, width):
            return self
        if size[0] >= height and size[1] >= width:
            border = [((new - old) // 2, (new - old + 1) // 2) for new, old in zip(size, (height, width), strict=True)]
            return Arrays(images=np.pad(self.images, [(0, 0), *border, (0, 0)]), labels=self.labels)
        parts = (
            tf.image.resize(part, size, antialias=True) for part in np.array_split(self.images, len(self) // 1000 + 1)
        )
        return Arrays(images=np.concatenate([np.asarray(part) for part in parts]), labels=self.labels)


@dataclass(frozen=True, kw_only=True, eq=False)
class Files:
    """Image files, and their labels `(samples,)`."""

    paths: tuple[str, ...]
    labels: Array

    def __len__(self) -> int:
        return len(self.paths)

    def examples(self, order: EpochOrder) -> tf.data.Dataset:
        """A dataset of (index, bytes of the file, label) in this order; index -1 fills the last step up."""
        paths, labels = tf.constant([os.fsencode(path) for path in self.paths]), tf.constant(self.labels, "int32")

        def read(index):
            content = tf.io.read_file(tf.gather(paths, tf.maximum(index, 0)))
            return index, content, tf.gather(labels, tf.maximum(index, 0))

        indices = tf.data.Dataset.from_tensor_slices(order.indices(self.labels))
        return indices.map(read, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)

    def name_of(self, index: int) -> str:
        """The path of an image, as text."""
        return printable(self.paths[index])

    def take(self, indices: Array) -> "Files":
        """The images with these indices."""
        return Files(paths=tuple(self.paths[index] for index in indices), labels=self.labels[indices])


AnySplit = TypeVar("AnySplit", bound=Split, covariant=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class Data(Generic[AnySplit]):
    """A data set: images to train on, images to evaluate on, and the names of the classes.

    Args:
        name: The name in run.json and in messages.
        train: Split to train on, such as `Arrays` or `Files`.
        test: Split to evaluate on.
        classes: Names in the order of the labels; a label of none of them raises ValueError.
        mean: Of each channel: images are normalized to (pixel - mean) / std.
        std: Of each channel.
        white: The largest pixel. Default: 1 for arrays of floats without a larger value, else 255.
        source: Where `load` finds the data again: a path or a name, if there is one.
    """

    name: str
    train: AnySplit
    test: AnySplit
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    white: float | None = None
    source: str | None = None

    def __post_init__(self):
        for split in (self.train, self.test):
            invalid = [int(label) for label in np.unique(split.labels) if not 0 <= label < len(self.classes)]
            if invalid:
                raise ValueError(
                    f"The labels of {len(self.classes)} classes are 0 to {len(self.classes) - 1}. "
                    f"Received: {invalid[0]} in {self.name}"
                )
        if self.white is None:
            images = getattr(self.train, "images", None)
            in_0_to_1 = images is not None and images.dtype.kind == "f" and bool(images.max(initial=0) <= 1)
            object.__setattr__(self, "white", 1.0 if in_0_to_1 else 255.0)

    @property
    def normalization(self) -> Normalization:
        """The normalization of the images in training."""
        return Normalization(self.mean, self.std)

    @property
    def normalization_of_pixels(self) -> Normalization:
        """The same for pixels in 0 to 255, as image files have them."""
        return self.normalization.scaled(255 / (self.white or 255))


def limited(data: Data, count: int) -> Data:
    """The same data with `count` images to train on: the same ones each time. Images to evaluate on stay all.

    Raises:
        ValueError: If there are fewer images, or if they are records that are read one after the other.
    """
    if not hasattr(data.train, "take"):
        raise ValueError(f"limit is for data in memory and for image files. Received: {data.name}")
    if not 0 < count <= len(data.train):
        raise ValueError(f"limit must be 1 to {len(data.train)}, the images to train on. Received: limit={count}")
    chosen = np.sort(np.random.default_rng(0).permutation(len(data.train))[:count])
    return replace(data, train=data.train.take(chosen))


def sized(data: Data, size: tuple[int, int]) -> Data:
    """The same data with images of `size`, `(height, width)`, if they are in memory; files are scaled when read."""
    if not isinstance(data.train, Arrays):
        return data
    return replace(data, train=data.train.sized(size), test=data.test.sized(size))


class SkippedFiles:
    """Files that were skipped because they cannot be decoded: at most `budget`."""

    def __init__(self, budget: int = 0):
        self.budget = budget
        self.paths: list[str] = []

    def add(self, path: str) -> None:
        """Adds a file, unless it is there already, and checks the budget."""
        if path not in self.paths:
            self.paths.append(path)
        self.check()

    def check(self) -> None:
        """Raises ValueError if there are more files than the budget allows."""
        if len(self.paths) > self.budget:
            listed = ", ".join(self.paths[:20]) + (", ..." if len(self.paths) > 20 else "")
            raise ValueError(
                f"{counted(len(self.paths), 'file')} cannot be decoded, and at most {self.budget} may be skipped "
                f"(--corrupt-budget): {listed}{_why(self.paths[0])}"
            )


def _why(path):
    """The end of a message: why a file cannot be decoded, if there is such a file."""
    try:
        decode(tf.constant(Path(path).read_bytes()))
    except tf.errors.OpError as error:
        return f"; of the first, {reason(error)}"
    except OSError:
        pass
    return ""


def digits() -> Data[Arrays]:
    """1,797 scans of handwritten digits, 8x8 pixels in 0..1; a fifth of each class is held out.

    Source: https://archive.ics.uci.edu/dataset/80, as shipped with scikit-learn.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans: Any = load_digits()  # a Bunch, but for return_X_y=True
    images = (scans.images[..., None] / 16).astype("float32")
    labels = scans.target.astype("int32")
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    return Data(
        name="digits",
        train=Arrays(images=images[train], labels=labels[train]),
        test=Arrays(images=images[test], labels=labels[test]),
        classes=tuple(map(str, scans.target_names)),
        mean=(0.0,),
        std=(1.0,),
        source="digits",
    )


def folder(
    path: FilePath, *, mean: Sequence[float] = IMAGENET.mean, std: Sequence[float] = IMAGENET.std, seed: int = 0
) -> Data[Files]:
    """Image files in a folder for each class: `train/CLASS/...` and `val/CLASS/...`, or `CLASS/...` alone.

    The first folder may be called `training` too, and that of held-out images is the first of `val`, `valid`,
    `validation`, `test`, `dev`, `testing`, `eval` and `evaluation`, in upper or lower case. Of `CLASS/...` alone, a
    fifth of each class is held out; a warning says so if the classes look like splits. Classes are sorted by name, and
    have the images of their subfolders too. Hidden and other files are ignored, and links are followed.

    Args:
        mean: For each channel of pixels in 0 to 255: 3 values to read RGB, 1 to read gray.
        std: Likewise.
        seed: Seed of the choice of held-out images.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If there are fewer than two classes, if a class has no images, or if the parts differ in classes.
    """
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder of images {str(path)!r}")
    named = {path.name.casefold(): path for path in subfolders(root)[::-1]}
    train_folder, test_folder = (next((named[x] for x in names if x in named), None) for names in (TRAIN, HELD_OUT))
    if train_folder and test_folder:
        train, classes = _files(train_folder)
        test, others = _files(test_folder)
        if classes != others:
            missing = sorted(set(classes) ^ set(others))
            raise ValueError(
                f"{train_folder.name}/ and {test_folder.name}/ must have the same classes. "
                f"Received: {missing[0]!r} in one of them only"
            )
    else:
        _warn_of_splits(subfolders(root))
        files, classes = _files(root)
        train, test = _divided(files, classes, seed)
    root = root.resolve()
    return Data(
        name=root.name, train=train, test=test, classes=classes, mean=tuple(mean), std=tuple(std), source=str(root)
    )


def _divided(files, classes, seed):
    """Files to train on, and a fifth of each class, one image at least, to evaluate on."""
    held_out = np.zeros(len(files), bool)
    for label, name in enumerate(classes):
        images = np.random.default_rng((seed, label)).permutation(np.flatnonzero(files.labels == label))
        if len(images) < 2:
            raise ValueError(f"A class needs at least 2 images, one of them to evaluate on. Received: 1 in {name!r}")
        held_out[images[: max(1, round(HELD_OUT_SHARE * len(images)))]] = True
    return tuple(
        Files(paths=tuple(itertools.compress(files.paths, chosen)), labels=files.labels[chosen])
        for chosen in (~held_out, held_out)
    )


def _warn_of_splits(folders):
    """Warns if folders that are taken for classes look like splits: by a name, or because all hold the same folders."""
    inner = [tuple(x.name for x in subfolders(path)) for path in folders]
    names = [path.name for path, held in zip(folders, inner, strict=True) if len(held) > 1]
    if {name.casefold() for name in names} & {*TRAIN, *HELD_OUT} or (len(names) > 1 and len({*inner}) == 1):
        shown = ", ".join(f"{name}/" for name in names[:5])
        warnings.warn(
            f"{shown} are read as classes, and look like splits, since they hold folders themselves. "
            f"Splits are called train/ and val/, or the like",
            stacklevel=3,
        )


def _files(root):
    """The images in a folder of class folders, and the names of the classes."""
    folders = subfolders(root)
    if len(folders) < 2:
        raise ValueError(f"{str(root)!r} needs two folders or more, one for each class. Received: {len(folders)}")
    paths, labels = [], []
    for label, folder_ in enumerate(folders):
        if printable(folder_.name) != folder_.name:
            raise ValueError(f"The name of a class must be UTF-8. Received: the folder {printable(folder_)!r}")
        found = sorted(str(path) for path in files_in(folder_, within=root) if is_image(path))
        if not found:
            raise ValueError(f"Each class needs images ({', '.join(SUFFIXES)}). Received: none in {str(folder_)!r}")
        paths += found
        labels += [label] * len(found)
    return Files(paths=tuple(paths), labels=np.array(labels, "int32")), tuple(path.name for path in folders)
