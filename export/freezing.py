"""Frozen gates: a gate that hardly differs between images becomes a constant, which costs nothing.

A constant scale of a convolution's outputs is a convolution with other weights. So the multiplication goes, and with it
the squeeze and both fully connected layers. The paper (arXiv:1709.01507, section 7.2) sees such gates: those of early
stages are nearly the same for all classes, and SE_5_2 saturates.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import keras
import numpy as np
from keras import layers

from se_keras.layers import SqueezeExcite, ops
from se_keras.typing import Array, Json, OnMessage
from se_keras.wording import counted

from .gates import Gate, checked_labels, gate_calls, images_of, measure_gates
from .lowering.copies import arguments_of, copied_graph, rebuilt, set_weights

_BATCH = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class FrozenGate:
    """A gate that became a constant.

    Args:
        layer: Name of the SqueezeExcite layer.
        gate: The constant of each channel, `(channels,)`: the mean over the images.
        spread: Root mean square of the standard deviations of the channels over the images.
        elements: Multiplications of an image that are saved.
        alone: Agreement if this gate alone is frozen, on the images that chose; None if the layer was named.
    """

    layer: str
    gate: Array
    spread: float
    elements: int
    alone: float | None

    def to_json(self) -> Json:
        """The gate as a dict for JSON, without its values."""
        fields = ("layer", "spread", "elements", "alone")
        return {field: getattr(self, field) for field in fields} | {"mean": float(self.gate.mean())}


@dataclass(frozen=True, kw_only=True, eq=False)
class Freezing:
    """What `freeze_gates` did.

    Args:
        frozen: The gates that became constants, in the order of the network.
        kept: Names of the other SqueezeExcite layers, and why they stay.
        elements: Multiplications of an image in all gates of the model.
        agreement: Share of the held-out images with the same top-1 class as before.
        accuracy: Accuracy on them before and after; None without labels.
        images: How many images chose, and how many were held out.
    """

    frozen: tuple[FrozenGate, ...]
    kept: dict[str, str]
    elements: int
    agreement: float
    accuracy: tuple[float, float] | None
    images: tuple[int, int]

    @property
    def saved(self) -> float:
        """The share of the gates' multiplications that is saved."""
        return sum(gate.elements for gate in self.frozen) / self.elements

    def to_json(self) -> Json:
        """The freezing as a dict for JSON, for the manifest."""
        return {
            "frozen": [gate.to_json() for gate in self.frozen],
            "kept": self.kept,
            "saved": self.saved,
            "agreement": self.agreement,
            "accuracy": self.accuracy and list(self.accuracy),
            "images": list(self.images),
        }

    def __str__(self) -> str:
        gates = len(self.frozen) + len(self.kept)
        return (
            f"{len(self.frozen)} of {counted(gates, 'gate')} frozen, {self.saved:.0%} of their multiplications; the "
            f"same top-1 class on {self.agreement:.2%} of {counted(self.images[1], 'held-out image')}"
        )


def freezing_of(model: Any) -> Json:
    """The entry `freezing` of a manifest, if `freeze_gates` made the model; otherwise none."""
    found = getattr(model, "freezing", None)
    return {"freezing": found.to_json()} if isinstance(found, Freezing) else {}


def freeze_gates(
    model: keras.Model,
    images: Any,
    labels: Sequence[int] | Array | None = None,
    *,
    budget: float = 0.995,
    names: Collection[str] | None = None,
    progress: OnMessage | None = None,
) -> keras.Model:
    """Makes constants of the gates that a model needs least.

    Half of the images choose, and the other half, which is held out, says what it costs. Each gate is frozen alone, at
    its mean over the images. Then gates are frozen together, beginning with the one that saves most multiplications for
    each image whose class changes, as long as the budget allows; a gate that goes beyond it stays as it is.

    Args:
        model: A functional Keras model, trained and not lowered, whose output are class probabilities or logits.
        images: An array `(samples, height, width, channels)` as the model takes them, in random order, or an iterable
            of images or batches. Some hundreds: with 200, a budget of 0.995 allows no image to change.
        labels: The class of each image. With them, the budget is the accuracy that must be left, as a share of that of
            the model; without, it is the share of the images that keep their top-1 class.
        budget: Above 0 and at most 1.
        names: Names of the SqueezeExcite layers to freeze, whatever it costs, in place of the budget.
        progress: Called with messages.

    Returns:
        A new model, not compiled, with a `Rescaling` in place of each frozen SqueezeExcite layer, which `lower` makes a
        part of another layer. Its attribute `freezing` is a `Freezing`. `model` is not changed.

    Raises:
        TypeError: If the model is not functional, or if images are not numbers.
        ValueError: If there are no gates, too few images, labels of another number, an invalid budget or unknown names,
            or if the model's output is not one vector of classes.

    Example:

    ```python
    frozen = se_keras.export.freeze_gates(model, data.test.images)
    print(frozen.freezing)  # 5 of 9 gates frozen, 62% of their multiplications; the same top-1 class on 99.60% of ...
    ```
    """
    if isinstance(budget, bool) or not isinstance(budget, Real) or not 0 < budget <= 1:
        raise ValueError(f"budget must be above 0 and at most 1. Received: budget={budget!r}")
    progress = progress or (lambda message: None)
    found, images = gate_calls(model), images_of(model, images)
    output = model.output
    if not hasattr(output, "shape") or len(output.shape) != 2 or output.shape[-1] < 2:
        raise ValueError(f"Gates are frozen in classifiers, with one output (batch, classes). Received: {model.name}")
    if len(images) < 4:
        raise ValueError(f"Half of the images choose and half are held out: at least 4. Received: {len(images)}")
    classes = None if labels is None else checked_labels(labels, len(images))
    fixed = {name: reason for name, call in found.items() if (reason := _obstacle(call, found))}
    if names is not None and (unknown := sorted(set(names) - set(found) | set(names) & set(fixed))):
        possible = ", ".join(name for name in found if name not in fixed)
        raise ValueError(f"names must be of gates that can be frozen, {possible}. Received: {', '.join(unknown)}")
    choosing, held_out = images[::2], images[1::2]
    measured = {gate.layer: gate for gate in measure_gates(model, choosing)}
    switched = _Switched(model, measured)
    if names is None:
        judge = _Judge(switched, choosing, None if classes is None else classes[::2])
        chosen, alone, kept = _choose(judge, measured, fixed, budget, progress)
    else:
        chosen, alone = [name for name in found if name in names], {}
        kept = fixed | {name: "not named" for name in found if name not in names and name not in fixed}
    judge = _Judge(switched, held_out, None if classes is None else classes[1::2])
    frozen = _frozen(model, {name: measured[name].mean for name in chosen})
    agreement, accuracy = judge.agreement(chosen), judge.accuracies(chosen)
    frozen.freezing = Freezing(
        frozen=tuple(
            FrozenGate(
                layer=name,
                gate=measured[name].mean,
                spread=measured[name].between_images,
                elements=measured[name].elements,
                alone=alone.get(name),
            )
            for name in found
            if name in chosen
        ),
        kept=kept,
        elements=sum(gate.elements for gate in measured.values()),
        agreement=agreement,
        accuracy=accuracy,
        images=(len(choosing), len(held_out)),
    )
    return frozen


def _obstacle(call: Any, found: Mapping[str, Any]) -> str | None:
    """Why a gate cannot become a constant; None if it can."""
    if sum(other.operation is call.operation for other in found.values()) > 1:
        return "the layer is called several times"
    return None


def _choose(
    judge: "_Judge", measured: Mapping[str, Gate], fixed: Mapping[str, str], budget: float, progress: OnMessage
) -> tuple[list[str], dict[str, float], dict[str, str]]:
    """Names of the gates to freeze, the score with each alone, and why each other gate stays."""
    alone = {}
    for name in (name for name in measured if name not in fixed):
        progress(f"freezing {name} alone: gate {len(alone) + 1} of {len(measured) - len(fixed)}")
        alone[name] = judge.score([name])
    # A gate that changes nothing comes first; half an image stands for less than one.
    cost = {name: max(1 - score, 0.5 / judge.images) for name, score in alone.items()}
    order = sorted(alone, key=lambda name: cost[name] / measured[name].elements)
    chosen, kept = [], dict(fixed)
    for name in order:
        progress(f"freezing {counted(len(chosen) + 1, 'gate')} together")
        if (score := judge.score([*chosen, name])) >= budget:
            chosen.append(name)
        else:
            kept[name] = f"{score:.2%} would be left, less than {budget:.2%}"
    return chosen, alone, kept


class _Judge:
    """What frozen gates cost on images."""

    def __init__(self, switched: "_Switched", images: Array, classes: Array | None):
        self._switched, self._pixels, self._classes = switched, images, classes
        self._before, self.images = switched.top1(images, []), len(images)
        if classes is not None and not self._accuracy(self._before):
            raise ValueError("The model classifies none of the images correctly: the labels are of other classes")

    def score(self, names: Sequence[str]) -> float:
        """The share that is left: of the accuracy with labels, of the top-1 classes without."""
        after = self._switched.top1(self._pixels, names)
        if self._classes is None:
            return float(np.mean(after == self._before))
        return self._accuracy(after) / self._accuracy(self._before)

    def agreement(self, names: Sequence[str]) -> float:
        """The share of the images with the same top-1 class."""
        return float(np.mean(self._switched.top1(self._pixels, names) == self._before))

    def accuracies(self, names: Sequence[str]) -> tuple[float, float] | None:
        """The accuracy before and after; None without labels."""
        if self._classes is None:
            return None
        return self._accuracy(self._before), self._accuracy(self._switched.top1(self._pixels, names))

    def _accuracy(self, top1):
        return float(np.mean(top1 == self._classes))


class _Switched:
    """A copy of a model whose gates can be switched to constants, so that each choice needs no new model."""

    def __init__(self, model: keras.Model, measured: Mapping[str, Gate]):
        self._switches: dict[str, _Switch] = {}

        def switch(layer):
            if layer.name in measured:  # a layer that is called several times is there with a number
                self._switches[layer.name] = _Switch(measured[layer.name].mean, layer)
            return self._switches.get(layer.name)

        self._model: Any = _with(model, switch)
        self._model.compile(jit_compile=False)

    def top1(self, images: Array, names: Collection[str]) -> Array:
        """The top-1 class of each image, with the gates of these names frozen."""
        for name, switch in self._switches.items():
            switch.is_frozen.assign(float(name in names))
        return self._model.predict(images, batch_size=_BATCH, verbose=0).argmax(axis=-1)


class _Switch(layers.Layer):
    """A SqueezeExcite layer, or a constant scale of each channel."""

    def __init__(self, gate: Array, layer: SqueezeExcite):
        super().__init__(name=f"{layer.name}_switch", dtype=layer.dtype_policy)
        self.layer, self.constant = layer, gate.astype("float32")
        self.is_frozen = self.add_weight((), initializer="zeros", name="is_frozen", trainable=False, dtype="float32")

    def call(self, inputs):
        gate = self.layer.gate(inputs)
        constant = ops.broadcast_to(ops.cast(self.constant, gate.dtype), ops.shape(gate))
        return inputs * ops.where(self.is_frozen > 0, constant, gate)


def _frozen(model: keras.Model, constants: Mapping[str, Array]) -> Any:
    """A copy of a model with a Rescaling in place of each SqueezeExcite layer that has a constant."""

    def scale(layer):
        gate = constants.get(layer.name)
        if gate is None:
            return None
        return layers.Rescaling(gate.astype("float32").tolist(), name=layer.name, dtype=layer.dtype_policy)

    return _with(model, scale)


def _with(model: keras.Model, replacement: Callable[[SqueezeExcite], layers.Layer | None]) -> Any:
    """A copy of a model with other layers in place of its SqueezeExcite layers, where `replacement` returns one."""
    copies: dict[Any, Any] = {}

    def copy(operation):
        if isinstance(operation, SqueezeExcite) and (other := replacement(operation)) is not None:
            return other
        copies[operation] = rebuilt(operation, arguments_of(operation))
        return copies[operation]

    new = copied_graph(model, copy)
    for operation, own in copies.items():
        if isinstance(operation, layers.Layer):
            set_weights(own, [ops.convert_to_numpy(weight) for weight in operation.weights])
    return new
