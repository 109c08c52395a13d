"""Changes to .tflite files: types of input and output, idle clamps, the softmax, constants, strided convolutions."""

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, Literal

import numpy as np

from .packing import code_of, opcode, packed, parsed, schema

InferenceType = Literal["float32", "int8", "uint8"]  # of the input or output
TYPES: dict[InferenceType, int] = {
    "float32": schema.TensorType.FLOAT32,
    "int8": schema.TensorType.INT8,
    "uint8": schema.TensorType.UINT8,
}
OutputTypes = InferenceType | Mapping[str, InferenceType]  # of all outputs, or of some by their names
_ZERO_POINTS = {"int8": 0, "uint8": 128}  # relative to those of int8
_PROBABILITIES = (1 / 256, -128)  # scale and zero point in int8 of values in 0..1, as in TFLite's softmax
_QUANTIZE, _DEQUANTIZE = schema.BuiltinOperator.QUANTIZE, schema.BuiltinOperator.DEQUANTIZE
_CAST = schema.BuiltinOperator.CAST
_SOFTMAX = schema.BuiltinOperator.SOFTMAX
_ELEMENTWISE = (schema.BuiltinOperator.ADD, schema.BuiltinOperator.SUB, schema.BuiltinOperator.MUL)


def with_types(content: bytes, *, input_type: InferenceType = "float32", output_type: OutputTypes = "float32") -> bytes:
    """Changes the input or outputs of an int8 file from float32 to integers.

    Args:
        content: The .tflite file, with one input, which is quantized first.
        input_type: Scale and zero point are those of the quantized input.
        output_type: Of all outputs, or `{name: type}`. Scale and zero point are those of the output before it is
            dequantized. The output of a softmax is computed in float32; it gets 256 steps in 0..1.

    Raises:
        ValueError: If the first layer, or the last one of an output, computes in float32, or if a name is unknown.
    """
    model = parsed(content)
    outputs = {entry.name.decode(): entry for entry in model.signatureDefs[0].outputs}
    changed = {name: kind for name, kind in types_by_name(output_type, list(outputs)).items() if kind != "float32"}
    if input_type == "float32" and not changed:
        return content
    if input_type != "float32":
        _retype_input(model, input_type)
    for name, kind in changed.items():
        _retype_output(model, outputs[name].tensorIndex, kind, name)
    return packed(model)


def types_by_name(output_type: OutputTypes, names: Sequence[str]) -> dict[str, InferenceType]:
    """The type of each output in `names`: float32 for those that a mapping does not name.

    Raises:
        ValueError: If the mapping has another name.
    """
    if not isinstance(output_type, Mapping):
        return dict.fromkeys(names, output_type)
    if unknown := sorted(set(output_type) - set(names)):
        raise ValueError(f"output_type must name outputs of the model, {', '.join(names)}. Received: {unknown}")
    return dict.fromkeys(names, "float32") | dict(output_type)


def _retype_input(model: Any, input_type: InferenceType) -> None:
    (graph,) = model.subgraphs
    reader = next((o for o in graph.operators if o.inputs[0] == graph.inputs[0]), None)
    if reader is None or code_of(model, reader) != _QUANTIZE:
        raise ValueError(f"input_type={input_type!r} needs a first layer in int8: it is kept in float32")
    _retype(graph.tensors[reader.inputs[0]], input_type, graph.tensors[reader.outputs[0]].quantization)
    if input_type == "int8":
        _bypass(graph, reader, graph.inputs, model.signatureDefs[0].inputs)


def _retype_output(model: Any, index: int, output_type: InferenceType, name: str) -> None:
    """Changes the tensor `index`, the output `name`, to integers."""
    (graph,) = model.subgraphs
    output = graph.tensors[index]
    if output.type == TYPES[output_type]:  # a tensor that is two outputs has been changed already
        return
    writer = next((o for o in graph.operators if index in o.outputs), None)
    code = None if writer is None else code_of(model, writer)
    if code == _DEQUANTIZE and not any(index in o.inputs for o in graph.operators):
        _retype(output, output_type, graph.tensors[writer.inputs[0]].quantization)
        writer.opcodeIndex, writer.builtinOptions, writer.builtinOptionsType = opcode(model, _QUANTIZE), None, 0
        if output_type == "int8":
            _bypass(graph, writer, graph.outputs, model.signatureDefs[0].outputs)
    elif code == _DEQUANTIZE:  # float layers read it too: the integers become a tensor of their own
        _add_quantized(model, index, output_type, writer.inputs[0], graph.tensors[writer.inputs[0]].quantization)
    elif code == _SOFTMAX:
        quantization = schema.QuantizationParametersT()
        quantization.scale, quantization.zeroPoint = ([value] for value in _PROBABILITIES)
        _add_quantized(model, index, output_type, index, quantization)
    else:
        raise ValueError(f"output_type={output_type!r} needs a last layer in int8: that of {name!r} is in float32")


def _add_quantized(model: Any, index: int, output_type: InferenceType, source: int, quantization: Any) -> None:
    """Makes integers of the tensor `source` the output that the tensor `index` was."""
    (graph,) = model.subgraphs
    quantized = copy(graph.tensors[index])
    quantized.name = quantized.name + b"_quantized"
    _retype(quantized, output_type, quantization)
    graph.tensors.append(quantized)
    operator = schema.OperatorT()
    operator.opcodeIndex = opcode(model, _QUANTIZE)
    operator.inputs, operator.outputs = [source], [len(graph.tensors) - 1]
    graph.operators.append(operator)
    _replace(index, operator.outputs[0], graph.outputs, model.signatureDefs[0].outputs)


def without_idle_clamps(content: bytes) -> bytes:
    """Removes the ReLU of int8 additions whose output has the zero point -128: no smaller value can be stored.

    XNNPACK executes such a ReLU as a separate pass. Returns the same bytes if there is none.
    """
    model = parsed(content)
    idle = [
        operator
        for graph in model.subgraphs
        for operator in graph.operators
        if code_of(model, operator) == schema.BuiltinOperator.ADD
        and operator.builtinOptions.fusedActivationFunction == schema.ActivationFunctionType.RELU
        and graph.tensors[operator.outputs[0]].type == schema.TensorType.INT8
        and list(graph.tensors[operator.outputs[0]].quantization.zeroPoint) == [-128]
    ]
    for operator in idle:
        operator.builtinOptions.fusedActivationFunction = schema.ActivationFunctionType.NONE
    return packed(model) if idle else content


def with_dense_pointwise(content: bytes) -> bytes:
    """Splits each strided 1x1 convolution with weights in int8 into a selection of its positions and a dense one.

    LiteRT's GPU delegate (2.3.0) computes a dense one at the first positions instead: docs/guides/gpu.md. A depthwise
    convolution with kernels of 1 selects, because XNNPACK has neither strided slices nor pooling of size 1 in int8. It
    multiplies integers by 127 and by 1/127, which gives them back: int8 outputs are bit-identical. In files of
    precision dynamic, the range of each image becomes that of the selected values. Returns the same bytes if there is
    no such convolution.
    """
    model = parsed(content)
    (graph,) = model.subgraphs
    selected: dict[tuple[int, int, int], int] = {}
    for operator in [o for o in graph.operators if _is_strided_pointwise(model, graph, o)]:
        options, source = operator.builtinOptions, operator.inputs[0]
        key = source, options.strideH, options.strideW  # a block's first convolution and its shortcut share one
        if key not in selected:
            graph.operators.insert(graph.operators.index(operator), _selection(model, operator))
            selected[key] = len(graph.tensors) - 1
        operator.inputs[0] = selected[key]
        options.strideH = options.strideW = 1
    return packed(model) if selected else content


def strided_pointwise(content: bytes) -> list[str]:
    """Names of the outputs of the convolutions that `with_dense_pointwise` splits, in any file."""
    model = parsed(content)
    found = [(graph, o) for graph in model.subgraphs for o in graph.operators if _is_strided_pointwise(model, graph, o)]
    return [graph.tensors[operator.outputs[0]].name.decode() for graph, operator in found]


def _is_strided_pointwise(model: Any, graph: Any, operator: Any) -> bool:
    if code_of(model, operator) != schema.BuiltinOperator.CONV_2D:
        return False
    images, kernel, options = (*(graph.tensors[i] for i in operator.inputs[:2]), operator.builtinOptions)
    types = images.type in (TYPES["int8"], TYPES["float32"]) and kernel.type == TYPES["int8"]
    return types and tuple(kernel.shape[1:3]) == (1, 1) and (options.strideH, options.strideW) != (1, 1)


def _selection(model: Any, strided: Any) -> Any:
    """The operator that selects the positions that the convolution `strided` reads; its output is the last tensor."""
    (graph,) = model.subgraphs
    images, output = graph.tensors[strided.inputs[0]], graph.tensors[strided.outputs[0]]
    channels, name = images.shape[3], output.name + b"_selected"
    one, zero = copy(images), copy(images)
    one.name, one.shape, one.shapeSignature = name + b"_kernel", [1, 1, 1, channels], None
    zero.name, zero.shape, zero.shapeSignature = name + b"_bias", [channels], None
    ones, zeros = np.ones(channels, "float32"), np.zeros(channels, "int32")  # of float32 too, all bits of 0 are 0
    if images.type == TYPES["int8"]:
        ones, scale = np.full(channels, 127, "int8"), images.quantization.scale[0]
        one.quantization = _by_channel(np.full(channels, 1 / 127), axis=3)
        zero.type, zero.quantization = schema.TensorType.INT32, _by_channel(np.full(channels, scale / 127), axis=0)
    for tensor, values in ((one, ones), (zero, zeros)):
        tensor.buffer = len(model.buffers)
        model.buffers.append(schema.BufferT(values.view("uint8")))
    values = copy(images)
    values.name, values.shape, values.shapeSignature = name, [*images.shape[:1], *output.shape[1:3], channels], None
    index = len(graph.tensors)
    graph.tensors += [one, zero, values]
    operator = schema.OperatorT()
    operator.opcodeIndex = opcode(model, schema.BuiltinOperator.DEPTHWISE_CONV_2D, version=3)  # from 3 on in int8
    operator.inputs, operator.outputs = [strided.inputs[0], index, index + 1], [index + 2]
    operator.builtinOptionsType = schema.BuiltinOptions.DepthwiseConv2DOptions
    operator.builtinOptions = options = schema.DepthwiseConv2DOptionsT()
    options.strideH, options.strideW = strided.builtinOptions.strideH, strided.builtinOptions.strideW
    options.padding, options.depthMultiplier = schema.Padding.VALID, 1
    return operator


def _by_channel(scale: Any, *, axis: int) -> Any:
    quantization = schema.QuantizationParametersT()
    quantization.scale, quantization.zeroPoint = scale.astype("float32"), np.zeros(len(scale), "int64")
    quantization.quantizedDimension = axis
    return quantization


def with_float_softmax(content: bytes) -> bytes:
    """Moves a softmax after the dequantization of its output, so that it computes in float32.

    In int8 a softmax is not delegated to XNNPACK and has only 256 different outputs.
    """
    model = parsed(content)
    (graph,) = model.subgraphs
    for softmax in graph.operators:
        follower = next((o for o in graph.operators if o.inputs[0] == softmax.outputs[0]), None)
        if follower is None or (code_of(model, softmax), code_of(model, follower)) != (_SOFTMAX, _DEQUANTIZE):
            continue
        for field in ("opcodeIndex", "builtinOptionsType", "builtinOptions"):
            value = getattr(follower, field)
            setattr(follower, field, getattr(softmax, field))
            setattr(softmax, field, value)
        between = graph.tensors[softmax.outputs[0]]
        between.type, between.quantization = schema.TensorType.FLOAT32, None
    return packed(model)


def without_cast(content: bytes) -> bytes:
    """Quantizes an input of 8-bit integers from the integers themselves, if its steps are 1, and not from a cast.

    XNNPACK has no kernel for the cast. Returns the same bytes if there is no such cast.
    """
    model = parsed(content)
    (graph,) = model.subgraphs
    cast = _only_reader(graph, graph.inputs[0])
    quantize = cast and _only_reader(graph, cast.outputs[0])
    image = graph.tensors[graph.inputs[0]]
    name = next((name for name, kind in TYPES.items() if kind == image.type), None)
    if (
        not quantize
        or name not in _ZERO_POINTS
        or (code_of(model, cast), code_of(model, quantize)) != (_CAST, _QUANTIZE)
    ):
        return content
    steps = graph.tensors[quantize.outputs[0]].quantization
    if (steps.scale[0], steps.zeroPoint[0] + _ZERO_POINTS[name]) != (1, 0):
        return content
    graph.operators.remove(cast)
    quantize.inputs = [graph.inputs[0]]
    _retype(image, name, steps)
    if name == "int8":
        _bypass(graph, quantize, graph.inputs, model.signatureDefs[0].inputs)
    return packed(model)


def cast_input(content: bytes) -> str | None:
    """Name of the float tensor that an input of integers is cast to; None if it is not cast, or read otherwise too."""
    model = parsed(content)
    (graph,) = model.subgraphs
    cast = _only_reader(graph, graph.inputs[0])
    return graph.tensors[cast.outputs[0]].name.decode() if cast and code_of(model, cast) == _CAST else None


def with_own_constants(content: bytes) -> bytes:
    """Gives each addition, subtraction and multiplication its own copy of its constant.

    The converter shares equal constants, such as the epsilon of all normalizations. Each needs the scale of its sum.
    """
    model = parsed(content)
    (graph,) = model.subgraphs
    count, read = len(graph.tensors), set()
    for operator in graph.operators:
        if code_of(model, operator) not in _ELEMENTWISE:
            continue
        for slot, index in enumerate(operator.inputs):
            tensor = graph.tensors[index]
            if model.buffers[tensor.buffer].data is None or index not in read:
                read.add(index)
                continue
            own = copy(tensor)
            own.name, own.buffer = tensor.name + b"_%d" % len(graph.tensors), len(model.buffers)
            model.buffers.append(copy(model.buffers[tensor.buffer]))
            operator.inputs[slot] = len(graph.tensors)
            graph.tensors.append(own)
    return packed(model) if len(graph.tensors) > count else content


def _only_reader(graph: Any, tensor: int) -> Any:
    """The operator that reads a tensor; None if several do."""
    readers = [operator for operator in graph.operators if tensor in operator.inputs]
    return readers[0] if len(readers) == 1 else None


def _retype(tensor: Any, name: InferenceType, int8: Any) -> None:
    """Changes a tensor to the type `name`, with the scale of the int8 quantization `int8`."""
    tensor.type = TYPES[name]
    tensor.quantization = schema.QuantizationParametersT()
    tensor.quantization.scale = np.asarray(int8.scale, "float32")
    tensor.quantization.zeroPoint = np.asarray(int8.zeroPoint, "int64") + _ZERO_POINTS[name]


def _bypass(graph: Any, operator: Any, ends: list[int], signature: Any) -> None:
    """Removes an operator that copies between an input or output of the graph (`ends`) and an inner tensor."""
    outer, inner = operator.inputs[0], operator.outputs[0]
    outer, inner = (outer, inner) if outer in ends else (inner, outer)
    graph.tensors[inner].name = graph.tensors[outer].name
    graph.operators.remove(operator)
    _replace(outer, inner, ends, signature)


def _replace(old: int, new: int, ends: list[int], signature: Any) -> None:
    """Makes the tensor `new` the input or output that `old` was."""
    ends[:] = [new if index == old else index for index in ends]
    for entry in signature:
        entry.tensorIndex = new if entry.tensorIndex == old else entry.tensorIndex
