"""Channel pruning by squeeze-and-excitation: the channels whose gates stay low go, and a smaller network is left.

That the importance values of SE may serve network pruning is the closing idea of arXiv:1709.01507 (section 8). At the
3x3 site of a bottleneck the gates weigh exactly the channels that can go without touching anything outside the block.
With a channel go its filter, its entries of BatchNorm, and the rows of the next convolution that read it (Li et al.
2017, arXiv:1608.08710, Figure 1); here its row and column of the SqueezeExcite layer as well.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import keras
import numpy as np
from keras import layers, ops

from se_keras.graph import calls, endpoints, input_shape_of, parts, structures
from se_keras.images import calibration_images
from se_keras.layers import SqueezeExcite


@dataclass(frozen=True, kw_only=True, eq=False)
class ChannelPruning:
    """What `prune_channels` did.

    Args:
        kept: Of each SqueezeExcite layer that lost channels, by name: the indices of those that it kept, ascending.
        channels: How many channels each of them had.
        whole: Of each other SqueezeExcite layer: what stands in the way.
    """

    kept: dict[str, np.ndarray]
    channels: dict[str, int]
    whole: dict[str, str]

    def __str__(self):
        kept, channels = sum(map(len, self.kept.values())), sum(self.channels.values())
        left = f", {len(self.whole)} left whole" if self.whole else ""
        return f"{kept} of {channels} channels kept behind {len(self.kept)} SqueezeExcite layers{left}"


def prune_channels(model, *, share, ranking="excitation", images=None, seed=0):
    """Removes a share of the channels that each SqueezeExcite layer weighs: a smaller network, not a mask.

    Channels go where one ungrouped convolution makes them, one SqueezeExcite layer weighs them, and only ungrouped
    convolutions and fully connected layers read them, with nothing but BatchNorm, activations, pooling and the like in
    between. That is so at the 3x3 site of a ResNet (`SEConfig(site="3x3")`), but not where that 3x3 has groups
    (ResNeXt). A SqueezeExcite layer anywhere else keeps its channels. The bottleneck of a gate keeps its units.

    Each layer loses the same share, because gates compare the channels of one layer; so any ranking leaves the same
    multiply-adds. Fine-tune the new model before judging it.

    Args:
        model: A functional Keras model, trained and not lowered.
        share: Of each layer's channels that goes, above 0 and below 1; rounded to whole channels, of which one stays.
        ranking: A row of `RANKINGS`: by what the lowest channels go.
        images: What to rank on, for rankings that look at images: an array `(samples, height, width, channels)`, or an
            iterable of images or batches, such as the training images.
        seed: Of the ranking `"random"`.

    Returns:
        A new `keras.Model`, not compiled, with layers of the same types and names and the kept weights as they were.
        Its attribute `pruning` is a `ChannelPruning`: what was done. `model` stays as it was.

    Raises:
        TypeError: If `model` is not functional, or if images are no numbers.
        ValueError: If no channels can go, the message says why; if an argument is not one of these; if images are
            missing, of another shape or not finite.

    Example:

    ```python
    pruned = se_keras.export.prune_channels(model, share=0.5, images=data.train.images)
    print(pruned.pruning)  # 56 of 112 channels kept behind 3 SqueezeExcite layers
    ```
    """
    if isinstance(share, bool) or not isinstance(share, Real) or not 0 < share < 1:
        raise ValueError(f"share must be above 0 and below 1. Received: share={share!r}")
    if ranking not in RANKINGS:
        raise ValueError(f"ranking must be one of {tuple(RANKINGS)}. Received: ranking={ranking!r}")
    row = RANKINGS[ranking]
    if row.on_images and images is None:
        raise ValueError(f"ranking={ranking!r} looks at images: give images=an array or an iterable. Received: None")
    spans, whole = _spans(model)
    if not spans:
        found = next((f"{name}: {reason}" for name, reason in whole.items()), "no SqueezeExcite layer")
        raise ValueError(
            "Channels can go where an ungrouped convolution makes them, SqueezeExcite weighs them and convolutions "
            f"alone read them, as with se=SEConfig(site='3x3') in a ResNet. Received: {model.name} ({found})"
        )
    scores = row.scores(model, images) if row.on_images else row.scores(spans, seed)
    kept = {span: _highest(scores[span.gate.name], share, name=span.gate.name) for span in spans}
    pruned = _rebuilt(model, kept)
    pruned.pruning = ChannelPruning(
        kept={span.gate.name: chosen for span, chosen in kept.items()},
        channels={span.gate.name: span.channels for span in spans},
        whole=whole,
    )
    return pruned


def excitations(model, images):
    """The mean gate of each channel over images: what each SqueezeExcite layer thinks of its channels.

    Args:
        model: A functional Keras model with one input; its SqueezeExcite layers may stand at any site.
        images: An array `(samples, height, width, channels)`, or an iterable of images or batches.

    Returns:
        `{name of the SqueezeExcite layer: array (channels,)}`, float64. Of a `tanh` gate it is the mean magnitude: at
        -1 it lets through as much as at 1. Without a squeeze it is the mean over all positions too.

    Raises:
        TypeError: If the model is not functional, or if images are no numbers.
        ValueError: If the model has no SqueezeExcite layer or several inputs, or if images have another shape or are
            not finite.
    """
    return _means(model, images, lambda call: call.operation.gate(call.input_tensors[0]))


def responses(model, images):
    """The mean magnitude of each recalibrated channel, gate x channel, over images and positions: as `excitations`.

    A gate alone does not know how large the channel is that it weighs.
    """
    return _means(model, images, lambda call: call.output_tensors[0])


def _means(model, images, measure):
    gates = [call for call in calls(model) if isinstance(call.operation, SqueezeExcite)]
    if not gates:
        raise ValueError(f"Excitations are those of SqueezeExcite layers. Received: {model.name}, without any")
    if len(endpoints(model)[0]) > 1:
        raise ValueError(f"Images go into models with one input. Received: {model.name} with {len(model.inputs)}")
    shape = input_shape_of(model, None)
    if None in shape and len(np.shape(images)) == 4:
        shape = input_shape_of(model, np.shape(images)[1:])
    images = calibration_images(images, shape)
    means = {call.operation.name: ops.mean(ops.abs(ops.cast(measure(call), "float32")), axis=(1, 2)) for call in gates}
    probe = keras.Model(endpoints(model)[0], means)
    probe.compile(jit_compile=False)  # XLA's compilation takes longer than the images
    values = probe.predict(images, batch_size=_BATCH, verbose=0)
    return {name: np.mean(value, axis=0, dtype="float64") for name, value in values.items()}


_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """A row of `RANKINGS`: scores of channels, of which the lowest go.

    Args:
        scores: A function to `{name of the SqueezeExcite layer: array (channels,)}`.
        on_images: Whether it takes the model and images; otherwise it takes the `_Span`s and a seed.
        source: Where it comes from.
    """

    scores: Callable
    on_images: bool = False
    source: str


def _filter_norms(spans, seed):
    return {span.gate.name: np.abs(_values(span.maker.kernel)).sum(axis=(0, 1, 2)) for span in spans}


def _chance(spans, seed):
    rng = np.random.default_rng(seed)
    return {span.gate.name: rng.uniform(size=span.channels) for span in spans}


RANKINGS = {
    "excitation": Ranking(scores=excitations, on_images=True, source="arXiv:1709.01507, section 8"),
    "response": Ranking(scores=responses, on_images=True, source="this project's own: the gate times what it weighs"),
    "magnitude": Ranking(scores=_filter_norms, source="Li et al. 2017 (arXiv:1608.08710), section 3.1: L1 of filters"),
    "random": Ranking(scores=_chance, source="what every ranking must beat"),
}


def _highest(scores, share, *, name):
    """Indices of the channels that stay, ascending."""
    if not np.isfinite(scores).all():
        raise ValueError(f"{name}: channels cannot be ranked by values that are not finite. Received: {scores}")
    count = max(1, len(scores) - round(share * len(scores)))
    return np.sort(np.argsort(-scores, kind="stable")[:count])


@dataclass(frozen=True, kw_only=True, eq=False)
class _Span:
    """A SqueezeExcite layer, and the layers that know how many channels it weighs."""

    gate: SqueezeExcite
    maker: layers.Conv2D
    passing: list  # layers between the maker and the readers
    readers: list

    @property
    def channels(self):
        return self.maker.filters

    def axes(self):
        """The channels' axis in each weight that has one: layer, name of the weight, axis."""
        yield from ((self.maker, name, -1) for name in ("kernel", "bias"))
        yield from ((layer, weight.name, -1) for layer in self.passing for weight in layer.weights)
        yield from ((self.gate, name, -1) for name in ("expand_kernel", "expand_bias"))
        yield self.gate, "reduce_kernel", 0
        yield from ((layer, "kernel", -2) for layer in self.readers)


# Layers that treat each channel by itself. BatchNormalization and activations do on a condition.
_PASSING = (
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


def _passes(call):
    """Whether a call treats each channel by itself."""
    layer = call.operation
    if type(layer) is layers.BatchNormalization:
        return layer.axis in (-1, len(call.input_tensors[0].shape) - 1)
    if type(layer) is layers.Activation:
        return layer.activation in _ELEMENTWISE
    return type(layer) in _PASSING


def _spans(model):
    """The spans of a model, and of each SqueezeExcite layer outside one what stands in the way."""
    graph = calls(model)
    facts = _Graph(
        made_by={id(x): call for call in graph for x in call.output_tensors},
        read_by=_readers(graph),
        outputs={id(x) for x in endpoints(model)[1]},
        times=Counter(call.operation for call in graph),
    )
    spans, whole = [], {}
    for call in graph:
        if isinstance(call.operation, SqueezeExcite):
            try:
                spans.append(_span(call, facts))
            except _InTheWay as reason:
                whole[call.operation.name] = str(reason)
        elif isinstance(call.operation, keras.Model):
            inside = [part.name for part in parts(call.operation) if isinstance(part, SqueezeExcite)]
            whole |= {name: f"it stands inside {call.operation.name}: prune that model" for name in inside}
    return spans, whole


@dataclass(frozen=True, kw_only=True, eq=False)
class _Graph:
    """Who makes a tensor and who reads it, by `id(tensor)`; how often a layer is called."""

    made_by: dict
    read_by: dict
    outputs: set
    times: Counter


def _readers(graph):
    found = defaultdict(list)
    for call in graph:
        for x in call.input_tensors:
            found[id(x)].append(call)
    return found


class _InTheWay(Exception):
    """Why the channels of a SqueezeExcite layer have to stay."""


def _span(gate, facts):
    """The span of one call of a SqueezeExcite layer: up to the convolution, then down to all who read its channels."""
    made = facts.made_by.get(id(gate.input_tensors[0]))
    while made is not None and _passes(made):
        made = facts.made_by.get(id(made.input_tensors[0]))
    if made is None:
        raise _InTheWay("they are the model's input")
    maker = made.operation
    if type(maker) is not layers.Conv2D:
        raise _InTheWay(f"{maker.name} ({type(maker).__name__}) makes its channels")
    if maker.activation not in _ELEMENTWISE:
        raise _InTheWay(f"{maker.name} ends in an activation that mixes channels or is not Keras' own")
    passing, readers, tensors = [], [], [(made.output_tensors[0], False)]
    for x, gated in tensors:  # grows on the way
        if id(x) in facts.outputs:
            raise _InTheWay("its channels are an output of the model")
        for call in facts.read_by[id(x)]:
            layer = call.operation
            if call is gate:
                tensors.append((call.output_tensors[0], True))
            elif _passes(call):
                passing.append(layer)
                tensors.append((call.output_tensors[0], gated))
            elif gated and type(layer) in (layers.Conv2D, layers.Dense):
                readers.append(layer)
            else:
                where = "" if gated else " beside the gate"
                raise _InTheWay(f"{layer.name} ({type(layer).__name__}) reads its channels{where}")
    for layer in (gate.operation, maker, *passing, *readers):
        if facts.times[layer] > 1:
            raise _InTheWay(f"{layer.name} is called {facts.times[layer]} times")
        if getattr(layer, "groups", 1) > 1:
            raise _InTheWay(f"{layer.name} has {layer.groups} groups")
        if getattr(layer, "data_format", None) == "channels_first":
            raise _InTheWay(f"{layer.name} has its channels first")
    return _Span(gate=gate.operation, maker=maker, passing=passing, readers=readers)


def _rebuilt(model, kept):
    """The model anew with the `{span: indices}` that are kept."""
    arguments, cuts, copies = defaultdict(dict), defaultdict(list), {}
    for span, chosen in kept.items():
        arguments[span.maker]["filters"] = len(chosen)
        arguments[span.gate]["units"] = span.gate.reduce_kernel.shape[1]
        for layer, name, axis in span.axes():
            cuts[layer].append((name, axis, chosen))
    values = {id(x): keras.Input(batch_shape=x.shape, dtype=x.dtype, name=x.name) for x in endpoints(model)[0]}
    taken, given = structures(model)
    inputs = keras.tree.map_structure(lambda x: values[id(x)], taken)
    for call in calls(model):
        operation = call.operation
        if operation not in copies:
            copies[operation] = type(operation).from_config(operation.get_config() | arguments[operation])
        args, kwargs = call.arguments.fill_in(values)
        results = keras.tree.flatten(copies[operation](*args, **kwargs))
        values |= {id(x): result for x, result in zip(call.output_tensors, results, strict=True)}
    for operation, copy in copies.items():
        if isinstance(operation, layers.Layer):
            copy.set_weights([_cut(weight, cuts[operation]) for weight in operation.weights])
            for part in parts(copy):
                if isinstance(part, layers.Normalization):
                    part.finalize_state()  # it computes with what it derived from its weights
    return keras.Model(inputs, keras.tree.map_structure(lambda x: values[id(x)], given), name=model.name)


def _cut(weight, cuts):
    value = _values(weight)
    for name, axis, chosen in cuts:
        if name == weight.name:
            value = np.take(value, chosen, axis=axis)
    return value


def _values(weight):
    return ops.convert_to_numpy(weight)
