"""Data to train on, and in which order: the digits of scikit-learn, and folders of images."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow as tf

from se_keras.training.recipes import SAMPLINGS

IMAGENET = {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}  # of each channel, 0 to 255, RGB
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")  # of what is tried; the content says what it is
TRAIN, HELD_OUT = ("train",), ("val", "valid", "validation", "test")
HELD_OUT_SHARE = 0.2  # of each class, where a folder has no images of its own to be judged by


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One pass over a split, or one worker's share of it.

    The images of a step stand together: of `batch * parts` in a row, part 0 takes the first `batch`, part 1 the next.
    So two workers see together what one process with two replicas sees.

    Args:
        batch: Images of a step that the share has.
        part: Which share.
        parts: Number of shares.
        seed: Of the order; None for the split's own, all of it once, filled up to whole steps by -1 in place of an
            image.
        epoch: Number of the pass: each has another order. An incomplete last step is left out.
        sampling: `"shuffled"`, each image once; or `"balanced"`, each class equally often (arXiv:1512.05830, 4.1).
        start: Steps to leave out.

    Raises:
        ValueError: If there is no such sampling.
    """

    batch: int
    part: int = 0
    parts: int = 1
    seed: int | None = None
    epoch: int = 0
    sampling: str = "shuffled"
    start: int = 0

    def __post_init__(self):
        if self.sampling not in SAMPLINGS:
            raise ValueError(f"sampling must be one of {SAMPLINGS}. Received: sampling={self.sampling!r}")

    def order(self, labels):
        """The images of the share, one after the other, by their number in the split."""
        count, step = len(labels), self.batch * self.parts
        if self.seed is None:
            order = np.full(-(-count // step) * step, -1)
            order[:count] = np.arange(count)
        else:
            chance = np.random.default_rng((self.seed, self.epoch))
            whole = chance.permutation(count) if self.sampling == "shuffled" else _balanced(labels, chance)
            order = whole[: count // step * step]
        return order.reshape(-1, self.parts, self.batch)[self.start :, self.part].reshape(-1)


def _balanced(labels, chance):
    """As many images as there are, each class equally often, in a random order; few images of a class come again."""
    by_class = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    rounds = -(-len(labels) // len(by_class))
    columns = []
    for images in by_class:
        turns = [chance.permutation(images) for _ in range(-(-rounds // len(images)))]
        columns.append(np.concatenate(turns)[:rounds])
    drawn = np.stack(columns, axis=1)  # a row has one image of each class
    return np.concatenate([chance.permutation(row) for row in drawn])[: len(labels)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Arrays:
    """Images `(samples, height, width, channels)` in memory, and their labels `(samples,)`."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self):
        return len(self.images)

    def examples(self, a_pass):
        """A dataset of number, pixels and label, as a `Pass` has them; number -1 stands for none."""
        images, labels = tf.constant(self.images), tf.constant(self.labels, "int32")

        def read(index):
            return index, tf.gather(images, tf.maximum(index, 0)), tf.gather(labels, tf.maximum(index, 0))

        return tf.data.Dataset.from_tensor_slices(a_pass.order(self.labels)).map(read)


@dataclass(frozen=True, kw_only=True, eq=False)
class Files:
    """Image files, and their labels `(samples,)`."""

    paths: tuple[str, ...]
    labels: np.ndarray

    def __len__(self):
        return len(self.paths)

    def examples(self, a_pass):
        """A dataset of number, bytes and label, as a `Pass` has them; number -1 stands for none."""
        paths, labels = tf.constant(self.paths), tf.constant(self.labels, "int32")

        def read(index):
            content = tf.io.read_file(tf.gather(paths, tf.maximum(index, 0)))
            return index, content, tf.gather(labels, tf.maximum(index, 0))

        order = tf.data.Dataset.from_tensor_slices(a_pass.order(self.labels))
        return order.map(read, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)

    def name_of(self, index):
        """What a message calls an image."""
        return self.paths[index]


@dataclass(frozen=True, kw_only=True, eq=False)
class Data:
    """A data set: what to learn from, what to be judged by, and the names of the classes.

    Args:
        name: What it is called in a run's record.
        train: A split, such as `Arrays` or `Files`: a length, `labels`, and `examples(a_pass)`.
        test: Likewise.
        classes: Names, in the order of the labels.
        mean: Of each channel: pixels become (pixel - mean) / std.
        std: Likewise.

    Raises:
        ValueError: If a label is none of a class.
    """

    name: str
    train: object
    test: object
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self):
        for split in (self.train, self.test):
            beyond = [int(label) for label in np.unique(split.labels) if not 0 <= label < len(self.classes)]
            if beyond:
                raise ValueError(
                    f"The labels of {len(self.classes)} classes are 0 to {len(self.classes) - 1}. "
                    f"Received: {beyond[0]} in {self.name}"
                )


class Corrupt:
    """Files that could not be decoded, and were left out, up to a budget.

    Args:
        budget: How many may be.
    """

    def __init__(self, budget=0):
        self.budget = budget
        self.paths = []

    def add(self, path):
        """Takes note of one, and ends the pass where there are too many.

        Raises:
            ValueError: If there are more than the budget allows.
        """
        if path not in self.paths:
            self.paths.append(path)
        self.check()

    def check(self):
        """Raises ValueError if there were too many."""
        if len(self.paths) > self.budget:
            listed = ", ".join(self.paths[:20]) + (", ..." if len(self.paths) > 20 else "")
            raise ValueError(
                f"{len(self.paths)} files cannot be decoded, and at most {self.budget} may be left out "
                f"(--corrupt-budget): {listed}"
            )


def digits():
    """1,797 scans of handwritten digits, 8x8 pixels in 0..1; every class gives a fifth of its scans to the test.

    Source: https://archive.ics.uci.edu/dataset/80, as shipped with scikit-learn.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans = load_digits()
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
    )


def folder(path, *, mean=IMAGENET["mean"], std=IMAGENET["std"], seed=0):
    """Image files in a folder for each class, `train/CLASS/...` and `val/CLASS/...`, or `CLASS/...` alone.

    Of the second kind, a fifth of each class is held out. Classes are in the order of their names; what is in folders
    within a class is of that class; hidden files, and files of other kinds than images, are passed over.

    Args:
        path: The folder. Its images are judged by those in `val`, `valid`, `validation` or `test`.
        mean: Of each channel, of pixels in 0 to 255: what they are normalized by; as many as channels to read, 1 or 3.
        std: Likewise.
        seed: Of what is held out.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If there are fewer than two classes, if one has no images, or if the two parts differ in classes.
    """
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder of images {str(path)!r}")
    held_out = next((root / name for name in HELD_OUT if (root / name).is_dir()), None)
    common = {"name": root.resolve().name, "mean": tuple(mean), "std": tuple(std)}
    if (root / TRAIN[0]).is_dir() and held_out:
        train, classes = _files(root / TRAIN[0])
        test, others = _files(held_out)
        if classes != others:
            missing = sorted(set(classes) ^ set(others))
            raise ValueError(
                f"train/ and {held_out.name}/ have the same classes. Received: {missing[0]!r} in one alone"
            )
        return Data(train=train, test=test, classes=classes, **common)
    files, classes = _files(root)
    held = np.zeros(len(files), bool)
    for label in range(len(classes)):
        images = np.random.default_rng((seed, label)).permutation(np.flatnonzero(files.labels == label))
        if len(images) < 2:
            raise ValueError(f"A class has at least 2 images, one to be judged by. Received: 1 in {classes[label]!r}")
        held[images[: max(1, round(HELD_OUT_SHARE * len(images)))]] = True

    def part(which):
        paths = tuple(path for path, chosen in zip(files.paths, which, strict=True) if chosen)
        return Files(paths=paths, labels=files.labels[which])

    return Data(train=part(~held), test=part(held), classes=classes, **common)


def _files(root):
    """The images in a folder of class folders, and the names of the classes."""
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(folders) < 2:
        raise ValueError(f"{str(root)!r} needs two folders or more, one for each class. Received: {len(folders)}")
    paths, labels = [], []
    for label, folder_ in enumerate(folders):
        found = sorted(
            str(path)
            for path in folder_.rglob("*")
            if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
        )
        if not found:
            raise ValueError(f"Each class has images ({', '.join(SUFFIXES)}). Received: none in {str(folder_)!r}")
        paths += found
        labels += [label] * len(found)
    return Files(paths=tuple(paths), labels=np.array(labels, "int32")), tuple(path.name for path in folders)
