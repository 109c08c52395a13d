"""The graph of a functional Keras model. Only this file reads Keras' private graph attributes."""

from collections.abc import Sequence
from typing import Any

import keras


def calls(model: keras.Model) -> list[Any]:
    """The nodes of a functional model in topological order, without its inputs.

    A node is one call of a layer. It has `operation` (the layer, or an operation of keras.ops), `input_tensors`,
    `output_tensors`, and `arguments`, whose `fill_in({id(tensor): value})` gives the `args` and `kwargs` of the call
    with the tensors replaced by values.
    """
    by_depth = functional(model)._nodes_by_depth
    return [node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth] if not node.is_input]


def endpoints(model: keras.Model) -> tuple[list[Any], list[Any]]:
    """The input and output tensors of a functional or Sequential model, as flat lists."""
    graph = functional(model)
    return graph.inputs, graph.outputs


def structures(model: keras.Model) -> tuple[Any, Any]:
    """The input and output tensors in the structures, such as a dict, that the model takes and returns."""
    graph = functional(model)
    return graph.input, graph.output


def input_shape_of(model: keras.Model, input_shape: Sequence[int] | None) -> tuple[int | None, ...]:
    """The checked `input_shape`, `(height, width, channels)`; the model's own if it is None."""
    inputs, _ = endpoints(model)
    own = tuple(inputs[0].shape[1:])
    if input_shape is None:
        return own
    if len(inputs) != 1:
        raise ValueError(f"input_shape is for models with one input. Received: a model with {len(inputs)}")
    if (
        not isinstance(input_shape, (tuple, list))
        or len(input_shape) != len(own)
        or own[-1] not in (None, input_shape[-1])
        or not all(type(size) is int and size > 0 for size in input_shape)
    ):
        raise ValueError(f"{model.name} takes input_shape={own}, of any size. Received: {input_shape=!r}")
    return tuple(input_shape)


def producer(tensor: Any) -> Any:
    """The layer or operation whose call returned a symbolic tensor."""
    return tensor._keras_history.operation


def gives_probabilities(layer: Any) -> bool:
    """Whether a layer ends in a softmax."""
    return isinstance(layer, keras.layers.Softmax) or getattr(layer, "activation", None) is keras.activations.softmax


def parts(operation: Any) -> list[Any]:
    """A layer and the layers inside it, as in a wrapper; for an operation of keras.ops, the operation alone."""
    return list(operation._flatten_layers()) if isinstance(operation, keras.layers.Layer) else [operation]


def functional(model: Any) -> Any:
    """The functional model itself, or the one inside a Sequential model. Raises TypeError for any other model."""
    graph = getattr(model, "_functional", None) if isinstance(model, keras.Sequential) else model
    if not isinstance(graph, keras.Model) or not hasattr(graph, "_nodes_by_depth"):
        what = f"{type(model).__name__} {getattr(model, 'name', '')}".strip()
        raise TypeError(f"Only functional models, and Sequential ones with an Input, have a graph. Received: {what}")
    return graph
