"""Photographs that everybody has: Fashion-MNIST and CIFAR, cached by Keras, of the system, or fetched."""

import contextlib
import gzip
import hashlib
import os
import sys
import zlib
from pathlib import Path

import keras
import numpy as np

from se_keras.errors import first_line
from se_keras.training.data import Arrays, Data
from se_keras.typing import Array

FASHION_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
_FASHION_ORIGIN = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/"
# SHA-256 of the content, because the files of Debian and of the authors are compressed in different ways.
_FASHION_FILES = {
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR100_CLASSES = tuple(  # "fine" labels, sorted
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle "
    "caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant "
    "flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man "
    "maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree "
    "plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper "
    "snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train "
    "trout tulip turtle wardrobe whale willow_tree wolf woman worm".split()
)


def fashion_mnist() -> Data[Arrays]:
    """Fashion-MNIST: 60,000 and 10,000 gray photographs of clothes, 28x28 pixels in 0 to 255, ten classes.

    They are read from Keras' cache or from Debian's package, or else fetched into the cache. Their content is checked.
    Source: arXiv:1708.07747, MIT License.

    Raises:
        OSError: If the files are not here and cannot be fetched.
        ValueError: If a file is damaged.
    """
    train_images, train_labels, images, labels = (_fashion(name, sha256) for name, sha256 in _FASHION_FILES.items())
    return _data("fashion_mnist", (train_images, train_labels), (images, labels), FASHION_CLASSES)


def cifar10() -> Data[Arrays]:
    """CIFAR-10: 50,000 and 10,000 photographs, 32x32 RGB pixels in 0 to 255, ten classes.

    Keras caches and checks them. Source: Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html.

    Raises:
        OSError: If they are not in the cache and cannot be fetched.
    """
    with _fetching("cifar10"):
        return _data("cifar10", *keras.datasets.cifar10.load_data(), CIFAR10_CLASSES)


def cifar100() -> Data[Arrays]:
    """CIFAR-100: as CIFAR-10, with a hundred classes."""
    with _fetching("cifar100"):
        return _data("cifar100", *keras.datasets.cifar100.load_data(), CIFAR100_CLASSES)


def _data(name, train, test, classes):
    splits = [
        Arrays(images=images, labels=np.asarray(labels).reshape(-1).astype("int32")) for images, labels in (train, test)
    ]
    images = splits[0].images
    counts = [np.bincount(images[..., channel].reshape(-1), minlength=256) for channel in range(images.shape[-1])]
    values = np.arange(256)
    mean = tuple(float(np.average(values, weights=count)) for count in counts)
    std = tuple(
        float(np.average((values - middle) ** 2, weights=count) ** 0.5)
        for middle, count in zip(mean, counts, strict=True)
    )
    return Data(name=name, train=splits[0], test=splits[1], classes=classes, mean=mean, std=std, source=name)


def _fashion(name: str, sha256: str) -> Array:
    """The images `(samples, 28, 28, 1)` or labels `(samples,)` of a file in the IDX format."""
    cached = _cache() / "fashion-mnist" / name
    path = next((path for path in (cached, FASHION_FOLDER / name) if path.is_file()), None)
    if path is None:
        with _fetching("fashion_mnist", f", install Debian's package dataset-fashion-mnist, or put {name} there"):
            path = Path(keras.utils.get_file(name, _FASHION_ORIGIN + name, cache_subdir="datasets/fashion-mnist"))
    try:
        content = gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error):
        content = b""
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise ValueError(
            f"{str(path)!r} is damaged: delete it. Its content must have the SHA-256 {sha256}. Received: {found}"
        )
    if "labels" in name:
        return np.frombuffer(content, "uint8", offset=8)
    return np.frombuffer(content, "uint8", offset=16).reshape(-1, 28, 28, 1)


def _cache():
    """Keras' folder of data sets."""
    return Path(os.environ.get("KERAS_HOME") or "~/.keras").expanduser() / "datasets"


@contextlib.contextmanager
def _fetching(name, other=""):
    """Prints Keras' progress as an error, so that standard output is a command's own; one error for all causes."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except Exception as error:  # Keras raises this class itself
        raise OSError(
            f"{name} is not in {str(_cache())!r} and cannot be fetched: use a network once{other}. "
            f"Received: {first_line(error)}"
        ) from None
