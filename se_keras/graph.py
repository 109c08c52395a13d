"""The calls of a functional Keras model, in order. The one file that reads Keras' private graph attributes."""

import keras


def calls(model):
    """The nodes of a functional model, each behind those that it reads, without its inputs.

    A node has `operation` (a layer, or an operation of keras.ops), `input_tensors`, `output_tensors`, and
    `arguments`, whose `fill_in({id(tensor): value})` gives the call's `args` and `kwargs` with other tensors in place.

    Raises:
        TypeError: If `model` is not functional: its graph cannot be read.
    """
    by_depth = functional(model)._nodes_by_depth
    return [node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth] if not node.is_input]


def endpoints(model):
    """The input and the output tensors of a functional or Sequential model, as flat lists.

    Raises:
        TypeError: If `model` is not functional.
    """
    graph = functional(model)
    return graph.inputs, graph.outputs


def structures(model):
    """The same in the structures, such as a dict, that the model takes and gives."""
    graph = functional(model)
    return graph.input, graph.output


def input_shape_of(model, input_shape):
    """The shape to take images in, `(height, width, channels)`: the given one, if `model` takes it, or its own.

    Raises:
        ValueError: If `input_shape` is given and `model` has several inputs, or takes other shapes.
    """
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


def producer(tensor):
    """The layer or operation whose call gave a symbolic tensor."""
    return tensor._keras_history.operation


def gives_probabilities(layer):
    """Whether a layer ends in a softmax."""
    return isinstance(layer, keras.layers.Softmax) or getattr(layer, "activation", None) is keras.activations.softmax


def parts(operation):
    """A layer and the layers inside it, such as a wrapper's; an operation of keras.ops alone."""
    return list(operation._flatten_layers()) if isinstance(operation, keras.layers.Layer) else [operation]


def functional(model):
    """The functional model that a model is, or a Sequential one holds.

    Raises:
        TypeError: If `model` is neither.
    """
    graph = getattr(model, "_functional", None) if isinstance(model, keras.Sequential) else model
    if not isinstance(graph, keras.Model) or not hasattr(graph, "_nodes_by_depth"):
        what = f"{type(model).__name__} {getattr(model, 'name', '')}".strip()
        raise TypeError(f"Only functional models, and Sequential ones with an Input, have a graph. Received: {what}")
    return graph
