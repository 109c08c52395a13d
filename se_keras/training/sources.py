"""Data by name: the digits, a folder of images, packed TFRecords, a data set of TensorFlow Datasets."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf

from se_keras.errors import needs_extra
from se_keras.normalization import IMAGENET
from se_keras.training import shards
from se_keras.training.data import HELD_OUT, Data, digits, folder
from se_keras.typing import FilePath

DATA = {"digits": digits}


def load(name: FilePath, *, mean: Sequence[float] = IMAGENET.mean, std: Sequence[float] = IMAGENET.std) -> Data:
    """Loads a data set: `"digits"`, `"tfds:NAME"`, or the path of a folder of images or of packed TFRecords.

    `mean` and `std` have a value for each channel of pixels in 0 to 255; the digits have their own.

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
    raise ValueError(f"data must be 'digits', 'tfds:NAME', or a folder of images or TFRecords. Received: {str(name)!r}")


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
