"""Accuracy of Keras models, LiteRT files, SavedModels and ensembles of them, by the paper's protocols."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from se_keras import storage
from se_keras.decoding import MOST_PIXELS
from se_keras.errors import require_type
from se_keras.export.description import agreed
from se_keras.export.verification import runnable
from se_keras.images import as_pixels, evaluation_image
from se_keras.prediction import AnyModel, class_probabilities
from se_keras.training.data import Arrays, Data, EpochOrder, Files, SkippedFiles, Split
from se_keras.training.pipeline import PREFETCHED, read_batches, read_errors
from se_keras.training.sources import DATA
from se_keras.training.step import TOP
from se_keras.typing import Array, FilePath, Images, Json, OnMessage
from se_keras.wording import counted

_VIEWS_AT_ONCE = 64  # in one call of a model
_SINGLE_CROP = "arXiv:1709.01507, section 5.1"
_SCALES = (256 / 224, 288 / 224, 320 / 224, 352 / 224)

Size = tuple[int, int]  # height and width
ProtocolName = Literal["plain", "224", "299", "320", "ten_crop", "multi_scale", "multi_crop"]


def centre(image: Any, size: Size, scale: float) -> tf.Tensor:
    """The centre crop: `(1, height, width, channels)`."""
    return evaluation_image(image, size=size, channels=image.shape[-1], resize=scale * min(size))[None]


def unscaled(image: Any, size: Size, scale: float) -> tf.Tensor:
    """The image itself if it has the network's size, else its centre crop."""
    return evaluation_image(image, size=size, channels=image.shape[-1])[None]


def mirrored_centre(image: tf.Tensor, size: Size, scale: float) -> tf.Tensor:
    """The centre crop and its mirror image."""
    return _with_mirrored(centre(image, size, scale))


def ten(image: tf.Tensor, size: Size, scale: float) -> tf.Tensor:
    """Four corners, the centre, and their mirror images: section 3.1 of Krizhevsky et al. 2012."""
    return _with_mirrored(tf.stack(_corners_and_centre(_scaled(image, size, scale), size)))


def thirty_six(image: tf.Tensor, size: Size, scale: float) -> tf.Tensor:
    """Three squares along the longer side, each as ten crops and resized with its mirror image: arXiv:1409.4842, 7."""
    scaled = _scaled(image, size, scale)
    side = tf.reduce_min(tf.shape(scaled)[:2])
    views = []
    for position in (0.0, 0.5, 1.0):
        offset = tf.cast(tf.round(position * tf.cast(tf.shape(scaled)[:2] - side, "float32")), "int32")
        square = scaled[offset[0] : offset[0] + side, offset[1] : offset[1] + side]
        views += [*_corners_and_centre(square, size), tf.image.resize(square, size, antialias=True)]
    return _with_mirrored(tf.stack(views))


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The views of an image over which a network's probabilities are averaged.

    Args:
        views: From pixels, the network's size and a scale to views `(number, height, width, channels)`.
        size: Height and width that the network must have; None for any.
        scales: Shorter sides of the image, as multiples of the network's size; the views at all scales are averaged.
        source: Where the protocol is published.
    """

    views: Callable[[tf.Tensor, Size, float], tf.Tensor]
    size: int | None = None
    scales: tuple[float, ...] = (256 / 224,)
    source: str


PROTOCOLS: dict[ProtocolName, Protocol] = {
    "plain": Protocol(views=unscaled, source="images that have the network's size already, such as CIFAR's"),
    "224": Protocol(views=centre, size=224, source=f"{_SINGLE_CROP}: 224 of a shorter side of 256"),
    "299": Protocol(
        views=centre, size=299, scales=(352 / 299,), source=f"{_SINGLE_CROP}: 299 of a shorter side of 352"
    ),
    "320": Protocol(
        views=centre,
        size=320,
        source="arXiv:1709.01507, Table 8: a crop of 320; the shorter side is not stated: here 320 * 256 / 224 = 366",
    ),
    "ten_crop": Protocol(views=ten, source="Krizhevsky et al. 2012, section 3.1: 224 of a shorter side of 256"),
    "multi_scale": Protocol(
        views=mirrored_centre,
        scales=_SCALES,
        source="the ILSVRC entry fused several scales and crops (arXiv:1709.01507, section 5.1), without "
        "stating which: here the middle and its mirror image at the four scales of arXiv:1409.4842",
    ),
    "multi_crop": Protocol(
        views=thirty_six, scales=_SCALES, source="arXiv:1409.4842, section 7: 144 crops at four scales; see multi_scale"
    ),
}


def protocol_for(models: Sequence[AnyModel], data: Data) -> ProtocolName:
    """The usual protocol for models of this size: 224, 299 or 320, else plain."""
    height = next((size for size in (runnable(model).input_shape[1] for model in models) if size), None)
    if height is None:  # models of any size
        return "plain" if hasattr(data.test, "images") else "224"
    sizes: dict[int | None, ProtocolName] = {224: "224", 299: "299", 320: "320"}
    return sizes.get(height, "plain")


def data_of(models: Sequence[AnyModel]) -> str:
    """The data that the first model with a record of its training was trained on, as `training.load` takes them.

    Raises:
        ValueError: If no model has such a record, or if it has no path.
    """
    loaded = [runnable(model) for model in models]
    for about in (model.about for model in loaded):
        record = about.training or {}
        if source := record.get("source") or (record.get("data") in DATA and record["data"]):
            return source
        if about.network.endswith("_digits"):  # rows of the catalogue for these data
            return "digits"
    names = ", ".join(model.name for model in loaded)
    raise ValueError(
        f"data (--data) are needed, because the models' files do not say where theirs are. Received: {names}"
    )


@dataclass(frozen=True, kw_only=True)
class Share:
    """A share of the images, with the 95 % interval of Wilson's score (1927)."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, count: int, total: int) -> "Share":
        """The share `count / total`."""
        z, p = 1.959964, count / total
        centre, width = p + z * z / (2 * total), z * math.sqrt(p * (1 - p) / total + z * z / (4 * total**2))
        low, high = ((centre + sign * width) / (1 + z * z / total) for sign in (-1, 1))
        return cls(value=p, low=max(low, 0.0), high=min(high, 1.0))

    def __str__(self) -> str:
        return f"{self.value:.2%} [{self.low:.2%}, {self.high:.2%}]"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How many images are classified correctly.

    Args:
        top1: Share of images whose correct class is the most probable one.
        top5: Share of images whose correct class is among the five most probable.
        images: Number of images, without skipped files.
        confusion: A row for each class, a column for each predicted class.
        skipped: Files that could not be decoded.
    """

    top1: Share
    top5: Share
    images: int
    confusion: Array = field(repr=False)
    skipped: tuple[str, ...] = ()

    def to_json(self) -> Json:
        """All but the confusion matrix."""
        top1, top5 = (vars(share) | {"error": 1 - share.value} for share in (self.top1, self.top5))
        return {"images": self.images, "top1": top1, "top5": top5, "corrupt": list(self.skipped)}


def evaluate(
    models: AnyModel | Sequence[AnyModel],
    split: Split,
    data: Data,
    *,
    protocol: ProtocolName = "plain",
    corrupt_budget: int = 0,
    normalization: Any = None,
    override: bool = False,
    progress: OnMessage | None = None,
) -> Evaluation:
    """Evaluates a model, or an ensemble of models, whose probabilities are averaged.

    Args:
        models: One or several, or their paths.
        split: Images of `data`, which has the classes, and the normalization for models that are not known to have one.
        protocol: A name in `PROTOCOLS`.
        corrupt_budget: Number of files that are skipped if they cannot be decoded.
        normalization: `(mean, std)` of pixels in 0 to 255, for all models. Default: that of each model's training.
        override: Whether a normalization and classes are taken that contradict a model's training.
        progress: Called about ten times.

    Raises:
        ValueError: If there are no models or images, if a model does not fit the protocol or the data, if an output is
            not finite, or if too many files cannot be decoded.
    """
    require_type("protocol", protocol, str)
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}. Received: {protocol!r}")
    loaded = [runnable(model) for model in (models if isinstance(models, (list, tuple)) else [models])]
    if normalization is not None:
        loaded = [model.normalized(normalization, override=override) for model in loaded]
    for model in loaded:
        agreed(f"classes of {model.name}", data.classes, model.about.labels, override=override)
    if not loaded or not len(split):
        received = f"{counted(len(loaded), 'model')}, {counted(len(split), 'image')}"
        raise ValueError(f"At least one model and one image are needed. Received: {received}")
    classes = len(data.classes)
    size = _common_size(loaded, protocol, data)
    skipped = SkippedFiles(corrupt_budget)
    confusion, top5, done = np.zeros((classes, classes), "int64"), 0, 0
    runs = [_probabilities(model, data) for model in loaded]
    for views, labels, weights in _read(_batches(split, data, PROTOCOLS[protocol], size, skipped), split, skipped):
        flat, is_image = views.reshape(-1, *views.shape[2:]), weights > 0
        each = [run(flat).reshape(*views.shape[:2], classes).mean(axis=1) for run in runs]
        predicted, labels = np.mean(each, axis=0)[is_image], labels[is_image]
        np.add.at(confusion, (labels, predicted.argmax(axis=1)), 1)
        correct = predicted[np.arange(len(labels)), labels][:, None]
        top5 += int(((predicted > correct).sum(axis=1) < TOP).sum())
        if progress and (done + len(labels)) * 10 // len(split) > done * 10 // len(split):
            progress(f"evaluating: {done + len(labels):,} of {len(split):,} images")
        done += len(labels)
    skipped.check()
    if not done:
        raise ValueError(f"None of {counted(len(split), 'image')} can be decoded")
    return Evaluation(
        top1=Share.of(int(np.trace(confusion)), done),
        top5=Share.of(top5, done),
        images=done,
        confusion=confusion,
        skipped=tuple(skipped.paths),
    )


def labelled_images(
    model: AnyModel, split: Split, data: Data, *, limit: int, progress: OnMessage | None = None
) -> tuple[Images, Array]:
    """Some images of a split as a model takes them, `(samples, height, width, channels)`, and their labels.

    They are chosen at random, the same ones each time, and cropped as by the usual protocol of the model's size.

    Args:
        split: Images of `data`, in memory or files.
        limit: How many images at most.

    Raises:
        ValueError: If the images do not fit the model, cannot be decoded, or are records read one after the other.
    """
    loaded, progress = runnable(model), progress or (lambda message: None)
    if not isinstance(split, (Arrays, Files)):
        raise ValueError(f"Some images are taken of data in memory and of image files. Received: {data.name}")
    agreed(f"classes of {loaded.name}", data.classes, loaded.about.labels, override=False)
    protocol = protocol_for([loaded], data)
    split = split.take(np.sort(np.random.default_rng(0).permutation(len(split))[:limit]))
    size, skipped = _common_size([loaded], protocol, data), SkippedFiles()
    images, labels = [], []
    for views, of_batch, weights in _read(_batches(split, data, PROTOCOLS[protocol], size, skipped), split, skipped):
        images.append(views[weights > 0, 0])
        labels.append(of_batch[weights > 0])
        progress(f"reading: {sum(map(len, labels)):,} of {len(split):,} images")
    skipped.check()
    return _normalization(loaded, data).apply(np.concatenate(images)), np.concatenate(labels)


def _common_size(models, protocol, data):
    """Height and width of the views: those of the protocol and of all models."""
    size = (PROTOCOLS[protocol].size,) * 2
    for model in models:
        *own, channels = model.input_shape[1:]
        if channels != len(data.mean):
            raise ValueError(f"{data.name} has {len(data.mean)} channels. Received: {model.name} of {channels}")
        size = tuple(a or b for a, b in zip(size, own, strict=True))
        if any(b not in (a, None) for a, b in zip(size, own, strict=True)):
            raise ValueError(
                f"The protocol {protocol!r} and the other models need images of {size[0]}x{size[1]}. "
                f"Received: {model.name}, which takes {own[0]}x{own[1]}"
            )
    if None in size:
        pixels = getattr(data.test, "images", None)
        if pixels is None:
            raise ValueError(f"Models of any size need a protocol with a size: 224, 299 or 320. Received: {protocol!r}")
        size = tuple(pixels.shape[1:3])
    return size


def _read(batches, split, skipped) -> Iterator:
    """The same batches. Their errors are explained, and those of what is done with them are not."""
    while True:
        with read_errors(split, skipped):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _batches(split, data, protocol, size, skipped) -> Iterator:
    """Views `(batch, number, height, width, channels)` of pixels, labels, and weights: 0 for padding."""
    channels = len(data.mean)

    def read(index, content, label):
        image = tf.ensure_shape(as_pixels(content, channels), (None, None, channels))
        return index, tf.concat([protocol.views(image, size, scale) for scale in protocol.scales], axis=0), label

    blank = tf.zeros((*size, channels))
    number = sum(len(protocol.views(blank, size, scale)) for scale in protocol.scales)
    order = EpochOrder(batch=min(max(1, _VIEWS_AT_ONCE // number), len(split)))
    batches = read_batches(split, order, read, skipped).map(lambda _, *batch: batch)
    return batches.prefetch(PREFETCHED).as_numpy_iterator()


def _probabilities(model, data):
    """From pixels of the data to probabilities, `(samples, classes)`."""
    return class_probabilities(model, _normalization(model, data), classes=len(data.classes))


def _normalization(model, data):
    """The normalization of the data's pixels for a model: its own, or that of the data."""
    known = model.normalization
    return known.scaled((data.white or 255) / 255) if known else data.normalization


def _scaled(image, size, scale):
    """The image, resized so that its shorter side is `scale` times the network's size."""
    shape = tf.cast(tf.shape(image)[:2], "float32")
    factor = tf.reduce_max(scale * tf.constant(size, "float32") / shape)
    is_bounded = tf.reduce_prod(shape * factor) <= MOST_PIXELS  # a row of pixels would become gigabytes
    with tf.control_dependencies([tf.debugging.Assert(is_bounded, ["the scaled image has too many pixels"])]):
        scaled = tf.maximum(tf.cast(tf.round(shape * factor), "int32"), size)
    return tf.image.resize(image, scaled, antialias=True)


def _corners_and_centre(image, size):
    height, width = size
    bottom, right = tf.unstack(tf.shape(image)[:2] - size)
    offsets = ((0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2))
    views = [image[top : top + height, left : left + width] for top, left in offsets]
    return [tf.ensure_shape(view, (*size, image.shape[-1])) for view in views]


def _with_mirrored(views):
    return tf.concat([views, tf.reverse(views, axis=[2])], axis=0)


def write_confusion(target: FilePath, evaluation: Evaluation, classes: Sequence[str]) -> None:
    """Writes a confusion matrix atomically, as a table (.csv) or a picture (.png, .svg). Others raise ValueError."""
    target = Path(target)
    if target.suffix == ".csv":
        names = [f'"{name}"' for name in classes]
        rows = [["", *names], *([name, *map(str, row)] for name, row in zip(names, evaluation.confusion, strict=True))]
        return storage.write_bytes(target, "".join(",".join(row) + "\n" for row in rows).encode())
    if target.suffix not in (".png", ".svg"):
        raise ValueError(f"A confusion matrix is written as .csv, .png or .svg. Received: {str(target)!r}")
    with storage.staged(target) as path:
        _confusion_picture(evaluation.confusion, classes).savefig(path)


def _confusion_picture(confusion, classes):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, label="share of the class", shrink=0.8)
    axes.set(xlabel="predicted", ylabel="true")
    if len(classes) <= 20:
        long = max(map(len, classes)) > 3
        axes.set_xticks(range(len(classes)), classes, rotation=45 if long else 0, ha="right" if long else "center")
        axes.set_yticks(range(len(classes)), classes)
        for row, column in zip(*np.nonzero(confusion), strict=True):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(confusion[row, column]), ha="center", va="center", color=color, fontsize=9)
    return figure
