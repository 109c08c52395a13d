"""The calls of a functional Keras model, in order. The one file that reads Keras' private graph attributes."""

import keras


def calls(model):
    """The nodes of a functional model, each behind those that it reads, without its inputs.

    A node has `operation` (a layer, or an operation of keras.ops), `input_tensors`, `output_tensors`, and
    `arguments`, whose `fill_in({id(tensor): value})` gives the call's `args` and `kwargs` with other tensors in place.

    Raises:
        TypeError: If `model` is not functional: its graph cannot be read.
    """
    if isinstance(model, keras.Sequential):
        if not model.built:
            raise TypeError(f"{model.name!r} is not built: give it an Input first")
        model = model._functional
    if not isinstance(model, keras.Model) or not hasattr(model, "_nodes_by_depth"):
        raise TypeError(f"Only functional and Sequential Keras models have a graph to read. Received: {model!r}")
    by_depth = model._nodes_by_depth
    return [node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth] if not node.is_input]


def endpoints(model):
    """The input and the output tensors of a functional or Sequential model, as flat lists."""
    functional = model._functional if isinstance(model, keras.Sequential) else model
    return functional.inputs, functional.outputs


def producer(tensor):
    """The layer or operation whose call gave a symbolic tensor."""
    return tensor._keras_history.operation
