"""Accuracy by the paper's protocols: of one model or an ensemble, Keras models, LiteRT files and SavedModels alike."""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tensorflow as tf

from se_keras import storage
from se_keras.export.verification import runnable
from se_keras.images import decode, evaluation_image
from se_keras.training.data import Corrupt, Pass
from se_keras.training.distribution import TOP
from se_keras.training.pipeline import AUTO, normalized, weighted

_VIEWS_AT_ONCE = 64  # through a model
_SCALES = (256 / 224, 288 / 224, 320 / 224, 352 / 224)


def centre(image, size, scale):
    """The middle: `(1, height, width, channels)`."""
    return evaluation_image(image, size=size, channels=image.shape[-1], resize=scale * min(size))[None]


def as_it_is(image, size, scale):
    """The whole image where it has the network's size, else the middle of it."""
    return evaluation_image(image, size=size, channels=image.shape[-1])[None]


def mirrored_centre(image, size, scale):
    """The middle and its mirror image."""
    return _with_mirrored(centre(image, size, scale))


def ten(image, size, scale):
    """Four corners and the middle, and their mirror images: section 3.1 of Krizhevsky et al. 2012."""
    return _with_mirrored(tf.stack(_corners_and_centre(_scaled(image, size, scale), size)))


def thirty_six(image, size, scale):
    """Of the two ends and the middle of the longer side the ten, and the square itself, scaled: arXiv:1409.4842, 7."""
    scaled = _scaled(image, size, scale)
    side = tf.reduce_min(tf.shape(scaled)[:2])
    views = []
    for place in (0.0, 0.5, 1.0):
        offset = tf.cast(tf.round(place * tf.cast(tf.shape(scaled)[:2] - side, "float32")), "int32")
        square = scaled[offset[0] : offset[0] + side, offset[1] : offset[1] + side]
        views += [*_corners_and_centre(square, size), tf.image.resize(square, size, antialias=True)]
    return _with_mirrored(tf.stack(views))


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Which views of an image a network sees; the mean of its probabilities counts.

    Args:
        views: From pixels, `(height, width)` of the network and a scale to views `(number, height, width, channels)`.
        size: Height and width that the network must take; None for its own.
        scales: Of the shorter side of the image over the network's size; all views of all scales are seen.
        source: Where it is published.
    """

    views: Callable
    size: int | None = None
    scales: tuple[float, ...] = (256 / 224,)
    source: str


PROTOCOLS = {
    "plain": Protocol(views=as_it_is, source="images that have the network's size already, such as CIFAR's"),
    "224": Protocol(views=centre, size=224, source="arXiv:1709.01507, section 5.1: 224 of a shorter side of 256"),
    "299": Protocol(
        views=centre,
        size=299,
        scales=(352 / 299,),
        source="arXiv:1709.01507, section 5.1: 299 of a shorter side of 352",
    ),
    "320": Protocol(
        views=centre,
        size=320,
        source="arXiv:1709.01507, Table 8: a crop of 320; the shorter side is not stated, here 366, as 256 to 224",
    ),
    "ten_crop": Protocol(views=ten, source="Krizhevsky et al. 2012, section 3.1, at 224 of 256"),
    "multi_scale": Protocol(
        views=mirrored_centre,
        scales=_SCALES,
        source="the ILSVRC entry fused several scales and crops (arXiv:1709.01507, section 5.1), and does not state "
        "which: here the middle and its mirror image at the four scales of arXiv:1409.4842",
    ),
    "multi_crop": Protocol(
        views=thirty_six, scales=_SCALES, source="arXiv:1409.4842, section 7: 144 crops at four scales; see multi_scale"
    ),
}


@dataclass(frozen=True, kw_only=True)
class Share:
    """A share of the images, with the 95 % interval of Wilson's score (1927)."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, count, total):
        """The share `count / total`."""
        z, p = 1.959964, count / total
        middle, wide = p + z * z / (2 * total), z * math.sqrt(p * (1 - p) / total + z * z / (4 * total**2))
        low, high = ((middle + sign * wide) / (1 + z * z / total) for sign in (-1, 1))
        return cls(value=p, low=max(low, 0.0), high=min(high, 1.0))

    def __str__(self):
        return f"{self.value:.2%} [{self.low:.2%}, {self.high:.2%}]"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How many images are classified rightly.

    Args:
        top1: Share whose most probable class is the right one.
        top5: Share whose right class is among the five most probable ones, or fewer where there are fewer.
        images: Number of images.
        confusion: `(classes, classes)`: a row for each class, a column for what it was taken for.
        corrupt: Files that could not be decoded, and do not count.
    """

    top1: Share
    top5: Share
    images: int
    confusion: np.ndarray = field(repr=False)
    corrupt: tuple[str, ...] = ()

    def to_json(self):
        """All but the confusion matrix, as a dict for JSON."""
        shares = {name: vars(share) | {"error": 1 - share.value} for name, share in
                  (("top1", self.top1), ("top5", self.top5))}  # fmt: skip
        return {"images": self.images, **shares, "corrupt": list(self.corrupt)}


def evaluate(models, split, data, *, protocol="plain", corrupt_budget=0, progress=None):
    """Judges a model, or several as an ensemble: the mean of their probabilities.

    Args:
        models: One or several of what `export.verify` takes: Keras models, LiteRT files, SavedModels, or paths.
        split: Of `data`: its images are each judged once.
        data: A `Data`, for its classes and normalization.
        protocol: A name of `PROTOCOLS`.
        corrupt_budget: Files that may be left out because they cannot be decoded.
        progress: Called with what is done next, as a string, some ten times.

    Returns:
        An `Evaluation`.

    Raises:
        ValueError: If there are no models or images, if a model does not fit the protocol or the data, if an output is
            not finite, or if too many files cannot be decoded.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}. Received: {protocol!r}")
    models = [runnable(model) for model in (models if isinstance(models, (list, tuple)) else [models])]
    if not models or not len(split):
        raise ValueError(f"A model and an image are evaluated. Received: {len(models)} models, {len(split)} images")
    chosen, classes = PROTOCOLS[protocol], len(data.classes)
    size = _common_size(models, chosen, protocol, data)
    corrupt = Corrupt(corrupt_budget)
    confusion, among, done = np.zeros((classes, classes), "int64"), 0, 0
    runs = [_probabilities(model, classes) for model in models]
    for views, labels, weights in _batches(split, data, chosen, size, corrupt):
        flat = views.reshape(-1, *views.shape[2:])
        each = [run(flat).reshape(*views.shape[:2], classes).mean(axis=1) for run in runs]
        seen = weights > 0
        predicted, labels = np.mean(each, axis=0)[seen], labels[seen]
        np.add.at(confusion, (labels, predicted.argmax(axis=1)), 1)
        right = predicted[np.arange(len(labels)), labels][:, None]
        among += int(((predicted > right).sum(axis=1) < TOP).sum())
        if progress and (done + len(labels)) * 10 // len(split) > done * 10 // len(split):
            progress(f"evaluating: {done + len(labels):,} of {len(split):,} images")
        done += len(labels)
    corrupt.check()
    if not done:
        raise ValueError(f"No image of {len(split)} can be decoded")
    return Evaluation(
        top1=Share.of(int(np.trace(confusion)), done),
        top5=Share.of(among, done),
        images=done,
        confusion=confusion,
        corrupt=tuple(corrupt.paths),
    )


def _common_size(models, protocol, name, data):
    """Height and width of the views: those that all models take."""
    size = (protocol.size, protocol.size)
    for model in models:
        *own, channels = model.input_shape[1:]
        if channels != len(data.mean):
            raise ValueError(f"{data.name} has {len(data.mean)} channels. Received: {model.name} of {channels}")
        size = tuple(a or b for a, b in zip(size, own, strict=True))
        if any(b not in (a, None) for a, b in zip(size, own, strict=True)):
            raise ValueError(
                f"The protocol {name!r} and the models before it show {size[0]}x{size[1]} pixels. "
                f"Received: {model.name}, which takes {own[0]}x{own[1]}"
            )
    if None in size:
        pixels = getattr(data.test, "images", None)
        if pixels is None:
            raise ValueError(f"Models of any size need a protocol with one: 224, 299 or 320. Received: {name!r}")
        size = tuple(pixels.shape[1:3])
    return size


def _batches(split, data, protocol, size, corrupt):
    """Views `(batch, number, height, width, channels)`, normalized, labels, and weights: 0 for none."""
    channels = len(data.mean)

    def read(index, content, label):
        image = decode(content, channels) if content.dtype == tf.string else content
        image = tf.ensure_shape(tf.cast(image, "float32"), (None, None, channels))
        return index, tf.concat([protocol.views(image, size, scale) for scale in protocol.scales], axis=0), label

    blank = tf.zeros((*size, channels))
    number = sum(len(protocol.views(blank, size, scale)) for scale in protocol.scales)
    batch = min(max(1, _VIEWS_AT_ONCE // number), len(split))
    examples = split.examples(Pass(batch=batch))

    def finish(_, views, labels, weights):
        return normalized(views, data), labels, weights

    dataset = weighted(examples, read, corrupt, split, batch).map(finish, num_parallel_calls=AUTO).prefetch(2)
    return dataset.as_numpy_iterator()


def _probabilities(model, classes):
    """From images to probabilities, `(samples, classes)`."""
    run = model.run
    if model.model is not None:
        traced = tf.function(lambda images: model.model(images, training=False))
        names = list(model.model.output_names)

        def run(images):
            return {names[0]: traced(images).numpy()}

    def probabilities(images):
        outputs = run(images)
        ((name, values),) = outputs.items() if len(outputs) == 1 else [("", np.zeros(0))]
        values = np.asarray(values, "float64")
        if values.shape != (len(images), classes):
            raise ValueError(f"A classifier of {classes} classes can be evaluated. Received: {model.name}, which gives "
                             f"{[np.shape(x)[1:] for x in outputs.values()]}")  # fmt: skip
        if not np.isfinite(values).all():
            raise ValueError(f"The outputs of {model.name} are not finite")
        if values.min() >= 0 and np.allclose(values.sum(axis=1), 1, atol=0.05):  # integers round each to 1/256
            return values
        exponents = np.exp(values - values.max(axis=1, keepdims=True))
        return exponents / exponents.sum(axis=1, keepdims=True)

    return probabilities


def _scaled(image, size, scale):
    """The image with its shorter side at `scale` times the network's, and no side below that."""
    shape = tf.cast(tf.shape(image)[:2], "float32")
    factor = tf.reduce_max(scale * tf.constant(size, "float32") / shape)
    return tf.image.resize(image, tf.maximum(tf.cast(tf.round(shape * factor), "int32"), size), antialias=True)


def _corners_and_centre(image, size):
    height, width = size
    bottom, right = tf.unstack(tf.shape(image)[:2] - size)
    places = ((0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2))
    views = [image[top : top + height, left : left + width] for top, left in places]
    return [tf.ensure_shape(view, (*size, image.shape[-1])) for view in views]


def _with_mirrored(views):
    return tf.concat([views, tf.reverse(views, axis=[2])], axis=0)


def write_confusion(target, evaluation, classes):
    """Writes a confusion matrix, as a table (.csv) or a picture (.png, .svg), whole or not at all.

    Raises:
        ValueError: If the file's ending is another.
    """
    target = Path(target)
    if target.suffix == ".csv":
        text = io.StringIO()
        text.write(",".join(["", *(f'"{name}"' for name in classes)]) + "\n")
        for name, row in zip(classes, evaluation.confusion, strict=True):
            text.write(",".join([f'"{name}"', *map(str, row)]) + "\n")
        return storage.write_bytes(target, text.getvalue().encode())
    if target.suffix not in (".png", ".svg"):
        raise ValueError(f"A confusion matrix is written as .csv, .png or .svg. Received: {str(target)!r}")
    with storage.staged(target) as path:
        _confusion_picture(evaluation.confusion, classes).savefig(path)


def _confusion_picture(confusion, classes):
    from matplotlib.figure import Figure

    few = len(classes) <= 20
    figure = Figure(figsize=(7, 6.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    figure.colorbar(image, label="share of the class", shrink=0.8)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if few:
        long = max(map(len, classes)) > 3
        axes.set_xticks(range(len(classes)), classes, rotation=45 if long else 0, ha="right" if long else "center")
        axes.set_yticks(range(len(classes)), classes)
        for row, column in zip(*np.nonzero(confusion), strict=True):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(confusion[row, column]), ha="center", va="center", color=color, fontsize=9)
    return figure
