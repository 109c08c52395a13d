"""What the gates of a model do on images: how they differ between images and classes, and which units never open."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import keras
import numpy as np

from se_keras.drawing import COLORS, picture_file, save
from se_keras.graph import calls, endpoints, input_shape_of
from se_keras.images import calibration_images
from se_keras.layers import SqueezeExcite, ops
from se_keras.typing import Array, FilePath, Json
from se_keras.wording import counted

_BATCH, _CHUNK = 32, 256  # images in a step, and whose gates are in memory at once
SAME = 1e-3  # a gate whose channels all vary less than this between images does nothing
_SATURATED = 0.01  # a sigmoid within this of 0 or 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Gate:
    """What a SqueezeExcite layer does on images.

    Args:
        layer: Its name.
        mean: Mean gate of each channel, over images and positions, `(channels,)`.
        spread: Standard deviation of each channel, over images and positions.
        by_class: Mean gate of the images of each class, `(classes, channels)`; None without labels.
        dead_units: Units of the bottleneck that no image opens.
        units: All units of the bottleneck.
        saturated: Share of the gates, of all images and channels, within 0.01 of 0 or 1.
        elements: Elements of an image that the layer multiplies.
        images: On how many images.
    """

    layer: str
    mean: Array
    spread: Array
    by_class: Array | None
    dead_units: int
    units: int
    saturated: float
    elements: int
    images: int

    @property
    def is_constant(self) -> bool:
        """Whether the gate is the same for all images, to a thousandth."""
        return bool(self.spread.max() < SAME)

    @property
    def constant_channels(self) -> int:
        """The channels that are the same for all images, to a thousandth."""
        return int((self.spread < SAME).sum())

    @cached_property
    def between_classes(self) -> float | None:
        """Root mean square of the standard deviation of the classes' means; None without labels."""
        return None if self.by_class is None else float(np.sqrt(np.mean(np.nanvar(self.by_class, axis=0))))

    @property
    def between_images(self) -> float:
        """Root mean square of the channels' spread."""
        return float(np.sqrt(np.mean(self.spread**2)))

    @property
    def advice(self) -> str | None:
        """What to try if the gate does nothing; None if it does something."""
        if not self.is_constant:
            return None
        dead = f"no image opens {'its unit' if self.units == 1 else f'any of its {self.units} units'}"
        why = dead if self.dead_units == self.units else "its units hardly differ between images"
        advice = "Try a larger bottleneck, such as SEConfig(minimum_units=8), or freeze it"
        return f"{self.layer} is the same for every image: {why}. {advice}"

    def to_json(self) -> Json:
        """The gate as a dict for JSON."""
        return {
            "layer": self.layer,
            "mean": self.mean.tolist(),
            "spread": self.spread.tolist(),
            "by_class": None if self.by_class is None else self.by_class.tolist(),
            "between_images": self.between_images,
            "between_classes": self.between_classes,
            "constant_channels": self.constant_channels,
            "dead_units": self.dead_units,
            "units": self.units,
            "saturated": self.saturated,
            "elements": self.elements,
            "images": self.images,
            "advice": self.advice,
        }


def measure_gates(model: keras.Model, images: Any, labels: Sequence[int] | Array | None = None) -> list[Gate]:
    """What each SqueezeExcite layer of a model does on images, in the order of the network.

    Args:
        model: A functional Keras model with one input.
        images: An array `(samples, height, width, channels)` as the model takes them, or an iterable of images or
            batches; at least two.
        labels: The class of each image, from 0.

    Raises:
        TypeError: If the model is not functional, or if images are not numbers.
        ValueError: If the model has no SqueezeExcite layers or several inputs, if images are not finite or of another
            shape, or if there are too few of them or labels of another number.
    """
    found = gate_calls(model)
    images = images_of(model, images)
    if len(images) < 2:
        raise ValueError(f"Gates are compared on at least 2 images. Received: {len(images)}")
    classes = None if labels is None else checked_labels(labels, len(images))
    sums = {name: _Sums(call, classes) for name, call in found.items()}
    probe: Any = keras.Model(endpoints(model)[0], {name: _measured(call) for name, call in found.items()})
    probe.compile(jit_compile=False)  # compilation by XLA takes longer than the images
    for start in range(0, len(images), _CHUNK):
        measured = probe.predict(images[start : start + _CHUNK], batch_size=_BATCH, verbose=0)
        for name, values in measured.items():
            sums[name].add(values, None if classes is None else classes[start : start + _CHUNK])
    return [sums[name].gate(name) for name in found]


def draw_gates(target: FilePath, found: Sequence[Gate], classes: Sequence[str]) -> None:
    """Draws the mean gate of each channel, for some classes and for all, a panel for each layer: Figures 6 and 7.

    Args:
        found: Of `measure_gates`, with labels.
        classes: Names of the classes; lines are drawn for the first five.

    Raises:
        ValueError: If `target` is not a .png, .svg or .pdf file, or if there are no labels.
    """
    from matplotlib.figure import Figure

    target = picture_file(target, "Gates")
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(1 + 4 * columns, 0.8 + 2.1 * rows), dpi=120, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel, gate in zip(panels, found, strict=False):
        if gate.by_class is None:
            raise ValueError("Gates by class need labels. Received: none")
        channels = range(len(gate.mean))
        for name, color, values in zip(classes, COLORS, gate.by_class, strict=False):
            panel.plot(channels, values, color=color, linewidth=0.9, label=name)
        panel.plot(channels, gate.mean, color="black", linewidth=1.4, label="all")
        panel.set_title(gate.layer, loc="left", fontsize=10)
        panel.set(ylim=(0, 1) if 0 <= np.nanmin(gate.by_class) and np.nanmax(gate.by_class) <= 1 else None)
        panel.grid(color="0.9")
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    for panel in list(figure.axes)[len(found) :]:
        panel.set_visible(False)
    figure.supxlabel("channel", fontsize=10)
    figure.supylabel("mean gate", fontsize=10)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=6, frameon=False, fontsize=9)
    save(figure, target)


def gate_calls(model: keras.Model) -> dict[str, Any]:
    """The calls of SqueezeExcite layers by name; those of a layer that is called several times get numbers.

    Raises:
        ValueError: If there are none.
    """
    found = {}
    for call in calls(model):
        if isinstance(call.operation, SqueezeExcite):
            name, number = call.operation.name, 1
            while name in found:
                name, number = f"{call.operation.name} ({number + 1})", number + 1
            found[name] = call
    if not found:
        raise ValueError(f"The model has no SqueezeExcite layers. Received: {model.name}")
    return found


def images_of(model: keras.Model, images: Any) -> Array:
    """Images for a model with one input, `(samples, height, width, channels)`, checked."""
    if len(endpoints(model)[0]) > 1:
        raise ValueError(f"Images are for models with one input. Received: {model.name} with {len(model.inputs)}")
    shape = input_shape_of(model, None)
    if None in shape and len(np.shape(images)) == 4:
        shape = input_shape_of(model, np.shape(images)[1:])
    return calibration_images(images, shape, what="These")


def checked_labels(labels: Sequence[int] | Array, count: int) -> Array:
    """Labels as an array of ints; raises ValueError if their number is not `count`."""
    found = np.asarray(labels)
    if found.shape != (count,) or found.dtype.kind not in "iu" or found.min(initial=0) < 0:
        received = f"{found.dtype} of shape {found.shape}"
        raise ValueError(
            f"labels must be an int of at least 0 for each of {counted(count, 'image')}. Received: {received}"
        )
    return found


def _measured(call: Any) -> dict[str, Any]:
    """Statistics of a call for each image: over the positions of a gate without a squeeze."""
    layer, (x,) = call.operation, call.input_tensors
    gate = ops.cast(layer.gate(x), "float32")
    low, high = ops.less(gate, _SATURATED), ops.greater(gate, 1 - _SATURATED)
    return {
        "mean": ops.mean(gate, axis=(1, 2)),
        "square": ops.mean(ops.square(gate), axis=(1, 2)),
        "saturated": ops.mean(ops.cast(ops.logical_or(low, high), "float32"), axis=(1, 2, 3)),
        "open": ops.max(ops.cast(layer.hidden(x), "float32"), axis=(1, 2)),
    }


class _Sums:
    """Sums over the images of the statistics of one call."""

    def __init__(self, call: Any, classes: Array | None):
        layer, (x,) = call.operation, call.input_tensors
        channels, self.units = layer.expand_kernel.shape[1], layer.reduce_kernel.shape[1]
        size = [1 if extent is None else extent for extent in x.shape[1:]]
        self.elements, self.images, self.saturated = int(np.prod(size)), 0, 0.0
        self.opened = np.zeros(self.units, bool)
        self.mean, self.square = np.zeros(channels), np.zeros(channels)
        self.by_class = None if classes is None else np.zeros((classes.max() + 1, channels))
        self.counts = None if classes is None else np.zeros(classes.max() + 1)

    def add(self, values: dict[str, Array], classes: Array | None) -> None:
        mean = values["mean"].astype("float64")
        self.images += len(mean)
        self.mean += mean.sum(axis=0)
        self.square += values["square"].astype("float64").sum(axis=0)
        self.saturated += float(values["saturated"].sum())
        self.opened |= (values["open"] > 0).any(axis=0)
        if self.by_class is not None and self.counts is not None and classes is not None:
            np.add.at(self.by_class, classes, mean)
            np.add.at(self.counts, classes, 1)

    def gate(self, name: str) -> Gate:
        mean, by_class = self.mean / self.images, None
        if self.by_class is not None and self.counts is not None:
            with np.errstate(invalid="ignore"):  # a class without images has no mean
                by_class = self.by_class / self.counts[:, None]
        return Gate(
            layer=name,
            mean=mean,
            spread=np.sqrt(np.maximum(self.square / self.images - mean**2, 0)),
            by_class=by_class,
            dead_units=int((~self.opened).sum()),
            units=self.units,
            saturated=self.saturated / self.images,
            elements=self.elements,
            images=self.images,
        )
