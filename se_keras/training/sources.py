"""Data by name: data sets that everybody has, a folder of images, TFRecords, a data set of TensorFlow Datasets."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf

from se_keras.errors import needs_extra
from se_keras.normalization import IMAGENET, Normalization
from se_keras.training import shards
from se_keras.training.data import HELD_OUT, Arrays, Data, digits, folder
from se_keras.training.datasets import cifar10, cifar100, fashion_mnist
from se_keras.typing import Array, FilePath

DATA = {"digits": digits, "fashion_mnist": fashion_mnist, "cifar10": cifar10, "cifar100": cifar100}


def load(name: FilePath, *, mean: Sequence[float] = IMAGENET.mean, std: Sequence[float] = IMAGENET.std) -> Data:
    """Loads a data set: one of `DATA`, `"tfds:NAME"`, or the path of a folder of images or of packed TFRecords.

    `mean` and `std` have a value for each channel of pixels in 0 to 255; the data sets of `DATA` have their own.

    Raises:
        ValueError, OSError: If there is no such data set, or for the reasons of `folder` and `shards.read`.
        ImportError: If a package that the data set needs is missing.
    """
    if name in DATA:
        return DATA[str(name)]()
    if str(name).startswith("tfds:"):
        return tfds(str(name).removeprefix("tfds:"), mean, std)
    if (Path(name) / shards.INDEX).is_file():
        return shards.read(name, mean=mean, std=std)
    if Path(name).is_dir():
        return folder(name, mean=mean, std=std)
    named = ", ".join(map(repr, DATA))
    raise ValueError(f"data must be {named}, 'tfds:NAME', or a folder of images or TFRecords. Received: {str(name)!r}")


def images(
    name: str, *, split: str, shape: Sequence[int], normalization: Normalization, limit: int | None = None
) -> Array:
    """Images of a data set of `DATA` as a model takes them, float32 `(samples, *shape)`.

    Args:
        split: `"train"` or `"test"`.
        shape: `(height, width, channels)` of the model.
        normalization: Of pixels in 0 to 255, as the model was trained.
        limit: The first images; None for all.

    Raises:
        ValueError: If the images have another number of channels.
    """
    data = DATA[name]()
    found: Arrays = getattr(data, split)
    found = found.take(np.arange(len(found))[:limit])
    if found.images.shape[-1] != shape[-1]:
        raise ValueError(f"{name} has images of {found.images.shape[-1]} channel(s). Received: a model of {shape[-1]}")
    pixels = found.sized((shape[0], shape[1])).images
    return normalization.scaled((data.white or 255) / 255).apply(pixels)


def tfds(name: str, mean: Sequence[float], std: Sequence[float]) -> Data[shards.Records]:
    """A data set of TensorFlow Datasets with the features `image` and `label`; the first use downloads it.

    Its images are read one after the other, as TFRecords are. Its split `validation` or `test` is held out.

    Raises:
        ImportError: If the package tensorflow-datasets is missing.
        ValueError: If there is no such data set, or if it has other features or splits.
    """
    with needs_extra("tfds", f"tfds:{name}"):
        import tensorflow_datasets  # pyright: ignore[reportMissingImports]  optional
    try:
        builder = tensorflow_datasets.builder(name)
    except tensorflow_datasets.core.DatasetNotFoundError:
        raise ValueError(f"TensorFlow Datasets has no data set {name!r}") from None
    features = builder.info.features
    if not {"image", "label"} <= features.keys():
        raise ValueError(
            f"A data set must have the features image and label. Received: {name} with {', '.join(features)}"
        )
    builder.download_and_prepare()  # after this its splits are known
    splits = builder.info.splits
    held_out = next((split for split in HELD_OUT if split in splits), None)
    if "train" not in splits or held_out is None:
        raise ValueError(
            f"A data set must have the splits train and one of {HELD_OUT}. Received: {name} with {', '.join(splits)}"
        )

    skip = {"image": tensorflow_datasets.decode.SkipDecoding()}

    def records(split):
        def read(_):
            files = builder.as_dataset(split=split, decoders=skip, shuffle_files=False)
            return files.enumerate().map(lambda i, x: (i, x["image"], tf.cast(x["label"], "int32")))

        count = splits[split].num_examples
        return shards.Records(count=count, labels=np.arange(features["label"].num_classes), read=read)

    return Data(
        name=f"tfds:{name}",
        train=records("train"),
        test=records(held_out),
        classes=tuple(features["label"].names),
        mean=tuple(mean),
        std=tuple(std),
        source=f"tfds:{name}",
    )
