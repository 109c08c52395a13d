"""Predictions for photos: the most probable classes of image files, by a model of any kind."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from se_keras.decoding import reason
from se_keras.errors import translated
from se_keras.export.description import agreed
from se_keras.export.litert.file import LiteRTModel
from se_keras.export.serving.savedmodel import SavedModel
from se_keras.export.verification import Runnable, of_pixels, runnable
from se_keras.folders import printable
from se_keras.images import evaluation_image, image_files
from se_keras.normalization import Normalization
from se_keras.typing import Array, FilePath, Images
from se_keras.wording import counted

AnyModel = keras.Model | LiteRTModel | SavedModel | Runnable | FilePath
_ANY_SIZE = 224  # of images for a model that takes any


class Score(NamedTuple):
    """The probability of a class, with its name, or its number as text if the model's files have no names."""

    name: str
    probability: float
    index: int


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The most probable classes of one photo.

    Args:
        photo: The path of the file, `-` for bytes.
        scores: The most probable class first. Empty if the file cannot be read.
        error: Why it cannot be read, or None.
    """

    photo: str
    scores: tuple[Score, ...] = ()
    error: str | None = None


def predict(
    model: AnyModel,
    photo: FilePath | bytes | Array,
    *,
    top: int = 5,
    labels: Sequence[str] | None = None,
    normalization: Any = None,
    override: bool = False,
) -> list[Score]:
    """The most probable classes of a photo.

    Args:
        model: A Keras model, a `LiteRTModel` or a `SavedModel`; or the path of a .keras file, a .tflite file or a
            SavedModel's folder. Its files say the names of the classes and the normalization.
        photo: The path of a JPEG, PNG, BMP, GIF or WebP file, the bytes of one, or pixels in 0 to 255,
            `(height, width, channels)`. Its central crop is used, as for evaluation.
        top: Number of classes.
        labels: Names of the classes, if the files of the model have none. Else they are numbers.
        normalization: `(mean, std)` of pixels in 0 to 255, if the files of the model do not say it.
        override: Whether labels and a normalization are taken that contradict the files of the model.

    Raises:
        OSError: If there is no such file.
        ValueError: If the photo cannot be decoded, if the normalization is not known, or if the model does not
            classify images.

    Example:

    ```python
    for name, probability, _ in se_keras.predict("model.tflite", "photo.jpg"):
        print(f"{probability:.1%} {name}")
    ```
    """
    classifier = classifier_of(model, top=top, labels=labels, normalization=normalization, override=override)
    return classifier(Path(photo).read_bytes() if isinstance(photo, (str, os.PathLike)) else photo)


def predict_files(classifier: "Classifier", photos: Iterable[FilePath | bytes]) -> Iterator[Prediction]:
    """The most probable classes of each photo, in their order: a path, or the bytes of a file.

    The image files of a folder are taken in the order of their paths. A file that does not exist, or that cannot be
    decoded, has an error, and the others are answered.
    """
    contents = [content for photo in photos for content in ([photo] if isinstance(photo, bytes) else _files(photo))]
    return (_prediction(classifier, content) for content in contents)


def _files(photo):
    path = Path(photo)
    return image_files(path) if path.is_dir() else [path]


def _prediction(classifier, photo):
    name = "-" if isinstance(photo, bytes) else printable(photo)
    try:
        scores = classifier(photo if isinstance(photo, bytes) else photo.read_bytes())
    except OSError as error:
        return Prediction(photo=name, error=error.strerror)
    except PhotoError as error:
        return Prediction(photo=name, error=str(error))
    return Prediction(photo=name, scores=tuple(scores))


class PhotoError(ValueError):
    """A photo cannot be decoded, or does not fit the model."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Classifier:
    """A model that names the classes of a photo: a function from its content to its scores.

    Args:
        model: The model, which can be run.
        labels: Names of the classes; None if they are not known.
        top: Number of classes in an answer.
        probabilities: From pixels `(samples, height, width, channels)` to probabilities `(samples, classes)`.
    """

    model: Runnable
    labels: Sequence[str] | None
    top: int
    probabilities: Callable[[Images], Array]

    def __call__(self, photo: bytes | Array) -> list[Score]:
        """The scores of the content of an image file, or of pixels. Raises PhotoError if it cannot be decoded."""
        height, width, channels = (size or _ANY_SIZE for size in self.model.input_shape[1:])
        content = tf.constant(photo) if isinstance(photo, bytes) else np.asarray(photo)
        if not isinstance(photo, bytes) and (content.ndim != 3 or content.shape[-1] != channels):
            raise PhotoError(f"Pixels are (height, width, {channels}). Received: {content.shape}")
        try:
            image = evaluation_image(content, size=(height, width), channels=channels)
        except tf.errors.OpError as error:
            raise PhotoError(f"The photo cannot be decoded: {reason(error)}") from None
        (row,) = self.probabilities(image.numpy()[None])
        if self.labels is not None and len(self.labels) != len(row):
            received = counted(len(self.labels), "label")
            raise ValueError(f"{self.model.name} has {counted(len(row), 'class')}. Received: {received}")
        best = np.argsort(-row, kind="stable")[: self.top]
        names: list[str] = list(self.labels or map(str, range(len(row))))
        return [Score(names[i], float(row[i]), int(i)) for i in best]


def classifier_of(
    model: AnyModel,
    *,
    top: int = 5,
    labels: Sequence[str] | None = None,
    normalization: Any = None,
    override: bool = False,
) -> Classifier:
    """The classifier of a model; the arguments are those of `predict`."""
    if type(top) is not int or top < 1:
        raise ValueError(f"top must be an int of at least 1. Received: top={top!r}")
    loaded = runnable(model)
    if len(loaded.input_shape) != 4 or loaded.input_shape[-1] not in (1, 3):
        rule = "Photos are for models that take (height, width, 1 or 3 channels)"
        raise ValueError(f"{rule}. Received: {loaded.name} of {loaded.input_shape[1:]}")
    if normalization is not None:
        loaded = loaded.normalized(normalization, override=override)
    known = loaded.about.labels
    if labels is not None:
        known = agreed(f"labels of {loaded.name}", tuple(labels), known, override=override)
    probabilities = class_probabilities(loaded, of_pixels(loaded))
    return Classifier(model=loaded, labels=known, top=top, probabilities=probabilities)


def class_probabilities(
    model: Runnable, normalization: Normalization, *, classes: int | None = None
) -> Callable[[Images], Array]:
    """From pixels to probabilities `(samples, classes)`, float64.

    Outputs that are no probabilities are taken for logits.

    Raises:
        ValueError: When called, if the model has not one output of `classes` (default: two or more), or if it is not
            finite.
    """
    network = model.model
    traced: Any = None if network is None else tf.function(lambda images: network(images, training=False))

    def probabilities(pixels: Images) -> Array:
        images = normalization.apply(pixels)
        if traced:
            with translated(f"{model.name} cannot be run"):
                outputs = tf.nest.flatten(traced(images))
        else:
            outputs = model.run(images).values()
        values, *others = (np.asarray(x, "float64") for x in outputs)
        # One value is the probability of a class against the rest, of which a softmax would make 1.
        count = classes or max(values.shape[-1], 2)
        if others or values.shape != (len(images), count):
            rule = f"A model must have one output of {classes or 'two or more'} classes"
            shapes = [x.shape[1:] for x in (values, *others)]
            raise ValueError(f"{rule}. Received: {model.name} with outputs {shapes}")
        if not np.isfinite(values).all():
            raise ValueError(f"The outputs of {model.name} are not finite")
        if values.min() >= 0 and np.allclose(values.sum(axis=1), 1, atol=0.05):  # int8 rounds each to 1/256
            return values
        exponents = np.exp(values - values.max(axis=1, keepdims=True))
        return exponents / exponents.sum(axis=1, keepdims=True)

    return probabilities
