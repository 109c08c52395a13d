"""Copies of layers: with the same weights, and with the functions that they hold in memory."""

import warnings
from collections.abc import Callable
from typing import Any

import keras
from keras import layers

from se_keras.errors import first_line
from se_keras.graph import calls, endpoints, parts, structures
from se_keras.layers import ops
from se_keras.typing import Array, Json

_OTHER_FLOATS = ("float16", "bfloat16", "float64", "mixed_float16", "mixed_bfloat16")  # types and policies


def arguments_of(operation: Any) -> Json:
    """The arguments of a layer or operation, for `rebuilt`.

    A function is passed on as it is: one that is only in memory, such as a lambda, cannot be found by its name.
    """
    if type(operation) is layers.Lambda:  # its own get_config turns functions into bytes
        arguments = {"output_shape": operation._output_shape, "mask": operation.mask, "arguments": operation.arguments}
        return layers.Layer.get_config(operation) | {"function": operation.function} | arguments
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The object being serialized includes a `lambda`")
            config = operation.get_config()
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(f"{operation.name} cannot be copied: {first_line(error)}") from error
    held = {key: getattr(operation, key, None) for key in config}
    # Keras' own objects, such as initializers, have arguments themselves.
    return config | {key: value for key, value in held.items() if callable(value) and not hasattr(value, "get_config")}


def rebuilt(operation: Any, config: Json) -> Any:
    """A layer or operation of the same type with these arguments.

    Raises:
        ValueError: If they do not make such a layer.
    """
    try:
        return layers.Lambda(**config) if type(operation) is layers.Lambda else type(operation).from_config(config)
    except (ImportError, TypeError, ValueError) as error:
        raise ValueError(f"{operation.name} cannot be copied: {first_line(error)}") from error


def copied(operation: Any, *, name: str) -> Any:
    """A copy of a layer or operation for inference in float32, with the same weights."""
    copy = rebuilt(operation, in_float32(without_training(arguments_of(operation))) | {"name": name})
    if isinstance(operation, layers.Layer) and operation.weights:
        copy.build_from_config(operation.get_build_config())
        set_weights(copy, merged_weights(operation))
    return copy


def set_weights(layer: layers.Layer, values: list[Array]) -> None:
    """Sets the weights of a layer. A `Normalization` also derives from them what it computes with."""
    layer.set_weights(values)
    for part in parts(layer):
        if isinstance(part, layers.Normalization):
            part.finalize_state()


def copied_graph(model: keras.Model, copy: Callable[[Any], Any]) -> keras.Model:
    """A new functional model of the same calls, with `copy(operation)` in place of each layer or operation.

    It is called once for each, so that a layer that is called several times stays one.
    """
    values = {id(x): keras.Input(batch_shape=x.shape, dtype=x.dtype, name=x.name) for x in endpoints(model)[0]}
    input_structure, output_structure = structures(model)
    inputs = keras.tree.map_structure(lambda x: values[id(x)], input_structure)
    copies = {}
    for call in calls(model):
        if call.operation not in copies:
            copies[call.operation] = copy(call.operation)
        args, kwargs = call.arguments.fill_in(values)
        results = keras.tree.flatten(copies[call.operation](*args, **kwargs))
        values |= {id(x): result for x, result in zip(call.output_tensors, results, strict=True)}
    return keras.Model(inputs, keras.tree.map_structure(lambda x: values[id(x)], output_structure), name=model.name)


def merged_weights(layer: layers.Layer) -> list[Array]:
    """The weights of a layer. Those of LoRA (low-rank adaptation, arXiv:2106.09685) are added to the kernel."""
    adapted = [part for part in parts(layer) if getattr(part, "lora_enabled", False)]
    merged = {id(w): getattr(part, w.name) for part in adapted for w in part.weights if not _is_lora(w.name)}
    return [ops.convert_to_numpy(merged.get(id(w), w)) for w in layer.weights if not _is_lora(w.name)]


def _is_lora(name: str) -> bool:
    return name.startswith("lora_")


def without_training(config: Json) -> Json:
    """A layer's arguments without regularizers, constraints and LoRA. Weights start at zero, and are set later."""
    training = ("_regularizer", "_constraint")
    return {
        key: "zeros" if key.endswith("_initializer") else None if key.endswith(training) else value
        for key, value in _inside(config, without_training).items()
        if not _is_lora(key)
    }


def in_float32(config: Json) -> Json:
    """The arguments of a layer that computes in float32 instead of another float type."""
    policy = config.get("dtype")
    name = policy["config"].get("name") if isinstance(policy, dict) else policy
    return _inside(config, in_float32) | ({"dtype": "float32"} if name in _OTHER_FLOATS else {})


def _inside(config: Json, change: Callable[[Json], Json]) -> Json:
    """The arguments of a layer, with those of the layers inside it changed."""

    def changed(value: Any) -> Any:
        if isinstance(value, list):
            return [changed(part) for part in value]
        is_object = isinstance(value, dict) and isinstance(value.get("config"), dict)
        return value | {"config": change(value["config"])} if is_object else value

    return {key: changed(value) for key, value in config.items()}


def computes_in_float32(model: keras.Model) -> bool:
    """Whether no layer of a model computes in float16, bfloat16 or float64."""
    computing = [part for part in parts(model) if not isinstance(part, (keras.Model, layers.InputLayer))]
    return all(part.compute_dtype not in _OTHER_FLOATS for part in computing)
