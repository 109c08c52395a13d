"""Channel pruning by squeeze-and-excitation: removes the channels with the lowest gates.

arXiv:1709.01507 (section 8) ends with the idea that the importance values of SE may be used for network pruning. At the
3x3 site of a bottleneck, the gates weigh exactly the channels that can be removed without changes outside the block. A
channel is removed with its filter, its entries of BatchNorm, and the rows of the next convolution that read it (Li et
al. 2017, arXiv:1608.08710, Figure 1); here also with its row and column of the SqueezeExcite layer.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import keras
import numpy as np
from keras import layers

from se_keras.errors import require_choice
from se_keras.graph import calls, endpoints, parts
from se_keras.layers import SqueezeExcite, ops
from se_keras.typing import Array
from se_keras.wording import counted

from .gates import gate_calls, images_of
from .lowering.copies import arguments_of, copied_graph, rebuilt, set_weights

RankingName = Literal["excitation", "response", "magnitude", "random"]
_BATCH = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class ChannelPruning:
    """What `prune_channels` did.

    Args:
        kept: Indices of the channels that each pruned SqueezeExcite layer kept, ascending, by the name of the layer.
        channels: How many channels each of these layers had.
        skipped: Why each other SqueezeExcite layer was not pruned, by the name of the layer.
    """

    kept: dict[str, Array]
    channels: dict[str, int]
    skipped: dict[str, str]

    def __str__(self) -> str:
        kept, channels = sum(map(len, self.kept.values())), sum(self.channels.values())
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        return f"{kept} of {channels} channels kept in {counted(len(self.kept), 'SqueezeExcite layer')}{skipped}"


def prune_channels(
    model: keras.Model, *, share: float, ranking: RankingName = "excitation", images: Any = None, seed: int = 0
) -> keras.Model:
    """Removes a share of the channels of each SqueezeExcite layer: the result is a smaller network, not a mask.

    Channels can be removed if one ungrouped convolution makes them, one SqueezeExcite layer weighs them, and only
    ungrouped convolutions and fully connected layers read them. Channelwise layers, such as BatchNorm, activations and
    pooling, may be between these. The 3x3 site of a ResNet (`SEConfig(site="3x3")`) fulfils this, unless the 3x3
    convolution has groups (ResNeXt). Other SqueezeExcite layers keep their channels. The bottleneck of a gate keeps its
    units.

    Each layer loses the same share, because gates are comparable only within a layer. So the number of multiply-adds
    does not depend on the ranking. Fine-tune the new model before you evaluate it.

    Args:
        model: A functional Keras model, trained and not lowered.
        share: The share of each layer's channels to remove, above 0 and below 1. At least one channel stays.
        ranking: A row of `RANKINGS`. The channels with the lowest scores are removed.
        images: For rankings that need images, such as the training images: an array
            `(samples, height, width, channels)`, or an iterable of images or batches.
        seed: Seed of the ranking `"random"`.

    Returns:
        A new model, not compiled, with layers of the same types and names, and the same weights for the kept channels.
        Its attribute `pruning` is a `ChannelPruning`. `model` is not changed.

    Raises:
        TypeError: If `model` is not functional, or if images are not numbers.
        ValueError: If no channel can be removed (the message says why), if an argument is not valid, or if images are
            missing, not finite or of another shape.

    Example:

    ```python
    pruned = se_keras.export.prune_channels(model, share=0.5, images=data.train.images)
    print(pruned.pruning)  # 56 of 112 channels kept in 3 SqueezeExcite layers
    ```
    """
    if isinstance(share, bool) or not isinstance(share, Real) or not 0 < share < 1:
        raise ValueError(f"share must be above 0 and below 1. Received: share={share!r}")
    require_choice("ranking", ranking, RANKINGS)
    row = RANKINGS[ranking]
    if row.on_images and images is None:
        raise ValueError(f"ranking={ranking!r} needs images: give images=an array or an iterable. Received: None")
    spans, skipped = _spans(model)
    if not spans:
        found = next((f"{name}: {reason}" for name, reason in skipped.items()), "no SqueezeExcite layer")
        raise ValueError(
            "Channels can be removed if an ungrouped convolution makes them, SqueezeExcite weighs them and only "
            f"convolutions read them, as with se=SEConfig(site='3x3') in a ResNet. Received: {model.name} ({found})"
        )
    scores = row.scores(model, images) if row.on_images else row.scores(spans, seed)
    kept = {span: _highest(scores[span.gate.name], share, name=span.gate.name) for span in spans}
    pruned = _rebuilt(model, kept)
    pruned.pruning = ChannelPruning(
        kept={span.gate.name: channels for span, channels in kept.items()},
        channels={span.gate.name: span.channels for span in spans},
        skipped=skipped,
    )
    return pruned


def excitations(model: keras.Model, images: Any) -> dict[str, Array]:
    """The mean gate of each channel over images: how important each channel is to its SqueezeExcite layer.

    Args:
        model: A functional Keras model with one input, and with SqueezeExcite layers at any site.
        images: An array `(samples, height, width, channels)`, or an iterable of images or batches.

    Returns:
        `{name of the SqueezeExcite layer: array (channels,)}`, float64. For `tanh` gates, it is the mean magnitude,
        because a gate of -1 passes as much as 1. Without a squeeze, the mean is also over all positions.

    Raises:
        TypeError: If the model is not functional, or if images are not numbers.
        ValueError: If the model has no SqueezeExcite layer or several inputs, or if images are not finite or have
            another shape.
    """
    return _means(model, images, lambda call: call.operation.gate(call.input_tensors[0]))


def responses(model: keras.Model, images: Any) -> dict[str, Array]:
    """The mean magnitude of each recalibrated channel, gate x channel, over images and positions; see `excitations`.

    Unlike the gate alone, it depends on the magnitude of the channel.
    """
    return _means(model, images, lambda call: call.output_tensors[0])


def _means(model: keras.Model, images: Any, measure: Callable[[Any], Any]) -> dict[str, Array]:
    found, images = gate_calls(model), images_of(model, images)
    means = {name: ops.mean(ops.abs(ops.cast(measure(call), "float32")), axis=(1, 2)) for name, call in found.items()}
    probe: Any = keras.Model(endpoints(model)[0], means)
    probe.compile(jit_compile=False)  # compilation by XLA takes longer than the images
    values = probe.predict(images, batch_size=_BATCH, verbose=0)
    return {name: np.mean(value, axis=0, dtype="float64") for name, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """A row of `RANKINGS`: how channels are scored. Those with the lowest scores are removed.

    Args:
        scores: A function that returns `{name of the SqueezeExcite layer: array (channels,)}`.
        on_images: Whether `scores` takes the model and images; otherwise it takes the `_Span`s and a seed.
        source: Where the ranking comes from.
    """

    scores: Callable[..., dict[str, Array]]
    on_images: bool = False
    source: str


def _filter_norms(spans: "Sequence[_Span]", seed: int) -> dict[str, Array]:
    return {span.gate.name: np.abs(_values(span.maker.kernel)).sum(axis=(0, 1, 2)) for span in spans}


def _random(spans: "Sequence[_Span]", seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {span.gate.name: rng.uniform(size=span.channels) for span in spans}


RANKINGS: dict[RankingName, Ranking] = {
    "excitation": Ranking(scores=excitations, on_images=True, source="arXiv:1709.01507, section 8"),
    "response": Ranking(scores=responses, on_images=True, source="this project's own: the gate times what it weighs"),
    "magnitude": Ranking(scores=_filter_norms, source="Li et al. 2017 (arXiv:1608.08710), section 3.1: L1 of filters"),
    "random": Ranking(scores=_random, source="what every ranking must beat"),
}


def _highest(scores: Array, share: float, *, name: str) -> Array:
    """Indices of the channels that stay, ascending."""
    if not np.isfinite(scores).all():
        raise ValueError(f"{name}: channels cannot be ranked by values that are not finite. Received: {scores}")
    count = max(1, len(scores) - round(share * len(scores)))
    return np.sort(np.argsort(-scores, kind="stable")[:count])


@dataclass(frozen=True, kw_only=True, eq=False)
class _Span:
    """A SqueezeExcite layer, and the layers whose weights depend on its number of channels."""

    gate: SqueezeExcite
    maker: layers.Conv2D
    between: list[layers.Layer]  # the maker and the readers
    readers: list[layers.Layer]

    @property
    def channels(self) -> int:
        return self.maker.filters

    def axes(self) -> Iterator[tuple[layers.Layer, str, int]]:
        """The channels' axis in each weight that has one: layer, name of the weight, axis."""
        yield from ((self.maker, name, -1) for name in ("kernel", "bias"))
        yield from ((layer, weight.name, -1) for layer in self.between for weight in layer.weights)
        yield from ((self.gate, name, -1) for name in ("expand_kernel", "expand_bias"))
        yield self.gate, "reduce_kernel", 0
        yield from ((layer, "kernel", -2) for layer in self.readers)


# Layers that compute each channel from the same channel. For BatchNormalization and Activation, see _is_channelwise.
_CHANNELWISE = (
    layers.AveragePooling2D,
    layers.Cropping2D,
    layers.Dropout,
    layers.GlobalAveragePooling2D,
    layers.GlobalMaxPooling2D,
    layers.Identity,
    layers.LeakyReLU,
    layers.MaxPooling2D,
    layers.ReLU,
    layers.SpatialDropout2D,
    layers.ZeroPadding2D,
)
_ELEMENTWISE = tuple(
    getattr(keras.activations, name)
    for name in ("linear", "relu", "relu6", "leaky_relu", "elu", "gelu", "silu", "sigmoid", "hard_sigmoid", "tanh")
)


def _is_channelwise(call: Any) -> bool:
    """Whether a call computes each channel from the same channel."""
    layer = call.operation
    if type(layer) is layers.BatchNormalization:
        return layer.axis in (-1, len(call.input_tensors[0].shape) - 1)
    if type(layer) is layers.Activation:
        return layer.activation in _ELEMENTWISE
    return type(layer) in _CHANNELWISE


def _spans(model: keras.Model) -> tuple[list[_Span], dict[str, str]]:
    """The spans of a model, and by name the reason why any other SqueezeExcite layer has none."""
    graph = calls(model)
    facts = _Graph(
        made_by={id(x): call for call in graph for x in call.output_tensors},
        read_by=_readers(graph),
        outputs={id(x) for x in endpoints(model)[1]},
        times=Counter(call.operation for call in graph),
    )
    spans, skipped = [], {}
    for call in graph:
        if isinstance(call.operation, SqueezeExcite):
            try:
                spans.append(_span(call, facts))
            except _CannotPrune as reason:
                skipped[call.operation.name] = str(reason)
        elif isinstance(call.operation, keras.Model):
            inside = [part.name for part in parts(call.operation) if isinstance(part, SqueezeExcite)]
            skipped |= {name: f"it is inside {call.operation.name}: prune that model" for name in inside}
    return spans, skipped


@dataclass(frozen=True, kw_only=True, eq=False)
class _Graph:
    """The calls that make and read each tensor, by `id(tensor)`; the outputs; how often each layer is called."""

    made_by: dict[int, Any]
    read_by: dict[int, list[Any]]
    outputs: set[int]
    times: Counter[Any]


def _readers(graph: list[Any]) -> dict[int, list[Any]]:
    found = defaultdict(list)
    for call in graph:
        for x in call.input_tensors:
            found[id(x)].append(call)
    return found


class _CannotPrune(Exception):
    """Why no channels of a SqueezeExcite layer can be removed."""


def _span(gate: Any, facts: _Graph) -> _Span:
    """The span of a call of a SqueezeExcite layer: the convolution before it, and all layers that read its channels."""
    made = facts.made_by.get(id(gate.input_tensors[0]))
    while made is not None and _is_channelwise(made):
        made = facts.made_by.get(id(made.input_tensors[0]))
    if made is None:
        raise _CannotPrune("its channels are the model's input")
    maker = made.operation
    if type(maker) is not layers.Conv2D:
        raise _CannotPrune(f"{maker.name} ({type(maker).__name__}) makes its channels")
    if maker.activation not in _ELEMENTWISE:
        raise _CannotPrune(f"{maker.name} ends in an activation that mixes channels or is not from Keras")
    between, readers, tensors = [], [], [(made.output_tensors[0], False)]
    for x, gated in tensors:  # grows during the loop
        if id(x) in facts.outputs:
            raise _CannotPrune("its channels are an output of the model")
        for call in facts.read_by[id(x)]:
            layer = call.operation
            if call is gate:
                tensors.append((call.output_tensors[0], True))
            elif _is_channelwise(call):
                between.append(layer)
                tensors.append((call.output_tensors[0], gated))
            elif gated and type(layer) in (layers.Conv2D, layers.Dense):
                readers.append(layer)
            else:
                where = "" if gated else " without the gate"
                raise _CannotPrune(f"{layer.name} ({type(layer).__name__}) reads its channels{where}")
    for layer in (gate.operation, maker, *between, *readers):
        if facts.times[layer] > 1:
            raise _CannotPrune(f"{layer.name} is called {facts.times[layer]} times")
        if getattr(layer, "groups", 1) > 1:
            raise _CannotPrune(f"{layer.name} has {layer.groups} groups")
        if getattr(layer, "data_format", None) == "channels_first":
            raise _CannotPrune(f"{layer.name} is channels-first")
    return _Span(gate=gate.operation, maker=maker, between=between, readers=readers)


def _rebuilt(model: keras.Model, kept: Mapping[_Span, Array]) -> keras.Model:
    """A new model with only the kept channels, `{span: indices}`."""
    arguments, cuts, copies = defaultdict(dict), defaultdict(list), {}
    for span, channels in kept.items():
        arguments[span.maker]["filters"] = len(channels)
        arguments[span.gate]["units"] = span.gate.reduce_kernel.shape[1]
        for layer, name, axis in span.axes():
            cuts[layer].append((name, axis, channels))

    def copy(operation):
        copies[operation] = rebuilt(operation, arguments_of(operation) | arguments[operation])
        return copies[operation]

    pruned = copied_graph(model, copy)
    for operation, smaller in copies.items():
        if isinstance(operation, layers.Layer):
            set_weights(smaller, [_cut(weight, cuts[operation]) for weight in operation.weights])
    return pruned


def _cut(weight: Any, cuts: list[tuple[str, int, Array]]) -> Array:
    value = _values(weight)
    for name, axis, channels in cuts:
        if name == weight.name:
            value = np.take(value, channels, axis=axis)
    return value


def _values(weight: Any) -> Array:
    return ops.convert_to_numpy(weight)
