"""Changes to .tflite files: the types of input and output, clamps without effect, the softmax, shared constants."""

from copy import copy
from typing import Any, Literal

import numpy as np
from ai_edge_litert import schema_py_generated
from ai_edge_litert.tools import flatbuffer_utils

schema: Any = schema_py_generated  # generated code, in which pyright takes every field for optional

InferenceType = Literal["float32", "int8", "uint8"]  # of the input or output
TYPES: dict[InferenceType, int] = {
    "float32": schema.TensorType.FLOAT32,
    "int8": schema.TensorType.INT8,
    "uint8": schema.TensorType.UINT8,
}
_ZERO_POINTS = {"int8": 0, "uint8": 128}  # relative to those of int8
_PROBABILITIES = (1 / 256, -128)  # scale and zero point in int8 of values in 0..1, as in TFLite's softmax
_QUANTIZE, _DEQUANTIZE = schema.BuiltinOperator.QUANTIZE, schema.BuiltinOperator.DEQUANTIZE
_SOFTMAX = schema.BuiltinOperator.SOFTMAX
_ELEMENTWISE = (schema.BuiltinOperator.ADD, schema.BuiltinOperator.SUB, schema.BuiltinOperator.MUL)


def with_types(
    content: bytes, *, input_type: InferenceType = "float32", output_type: InferenceType = "float32"
) -> bytes:
    """Changes the input or output of an int8 file from float32 to integers.

    Args:
        content: The .tflite file, with one input, which is quantized first, and one output.
        input_type: Scale and zero point are those of the quantized input.
        output_type: Scale and zero point are those of the output before it is dequantized. The output of a softmax is
            computed in float32; it gets 256 steps in 0..1.

    Raises:
        ValueError: If the first or last layer computes in float32.
    """
    if (input_type, output_type) == ("float32", "float32"):
        return content
    model = _parsed(content)
    if input_type != "float32":
        _retype_input(model, input_type)
    if output_type != "float32":
        _retype_output(model, output_type)
    return packed(model)


def _retype_input(model: Any, input_type: InferenceType) -> None:
    (graph,) = model.subgraphs
    reader = next((o for o in graph.operators if o.inputs[0] == graph.inputs[0]), None)
    if reader is None or _code(model, reader) != _QUANTIZE:
        raise ValueError(f"input_type={input_type!r} needs a first layer in int8: it is kept in float32")
    _retype(graph.tensors[reader.inputs[0]], input_type, graph.tensors[reader.outputs[0]].quantization)
    if input_type == "int8":
        _bypass(graph, reader, graph.inputs, model.signatureDefs[0].inputs)


def _retype_output(model: Any, output_type: InferenceType) -> None:
    (graph,) = model.subgraphs
    writer = next(o for o in graph.operators if o.outputs[0] == graph.outputs[0])
    output = graph.tensors[graph.outputs[0]]
    if _code(model, writer) == _DEQUANTIZE:
        _retype(output, output_type, graph.tensors[writer.inputs[0]].quantization)
        writer.opcodeIndex, writer.builtinOptions, writer.builtinOptionsType = _opcode(model, _QUANTIZE), None, 0
        if output_type == "int8":
            _bypass(graph, writer, graph.outputs, model.signatureDefs[0].outputs)
    elif _code(model, writer) == _SOFTMAX:
        quantized, quantization = copy(output), schema.QuantizationParametersT()
        quantized.name = output.name + b"_quantized"
        quantization.scale, quantization.zeroPoint = ([value] for value in _PROBABILITIES)
        _retype(quantized, output_type, quantization)
        graph.tensors.append(quantized)
        operator = schema.OperatorT()
        operator.opcodeIndex = _opcode(model, _QUANTIZE)
        operator.inputs, operator.outputs = [graph.outputs[0]], [len(graph.tensors) - 1]
        graph.operators.append(operator)
        _replace(graph.outputs[0], operator.outputs[0], graph.outputs, model.signatureDefs[0].outputs)
    else:
        raise ValueError(f"output_type={output_type!r} needs a last layer in int8: it is kept in float32")


def without_idle_clamps(content: bytes) -> bytes:
    """Removes the ReLU of int8 additions whose output has the zero point -128: no smaller value can be stored.

    XNNPACK executes such a ReLU as a separate pass. Returns the same bytes if there is none.
    """
    model = _parsed(content)
    idle = [
        operator
        for graph in model.subgraphs
        for operator in graph.operators
        if _code(model, operator) == schema.BuiltinOperator.ADD
        and operator.builtinOptions.fusedActivationFunction == schema.ActivationFunctionType.RELU
        and graph.tensors[operator.outputs[0]].type == schema.TensorType.INT8
        and list(graph.tensors[operator.outputs[0]].quantization.zeroPoint) == [-128]
    ]
    for operator in idle:
        operator.builtinOptions.fusedActivationFunction = schema.ActivationFunctionType.NONE
    return packed(model) if idle else content


def with_float_softmax(content: bytes) -> bytes:
    """Moves a softmax after the dequantization of its output, so that it computes in float32.

    In int8 a softmax is not delegated to XNNPACK and has only 256 different outputs.
    """
    model = _parsed(content)
    (graph,) = model.subgraphs
    for softmax in graph.operators:
        follower = next((o for o in graph.operators if o.inputs[0] == softmax.outputs[0]), None)
        if follower is None or (_code(model, softmax), _code(model, follower)) != (_SOFTMAX, _DEQUANTIZE):
            continue
        for field in ("opcodeIndex", "builtinOptionsType", "builtinOptions"):
            value = getattr(follower, field)
            setattr(follower, field, getattr(softmax, field))
            setattr(softmax, field, value)
        between = graph.tensors[softmax.outputs[0]]
        between.type, between.quantization = schema.TensorType.FLOAT32, None
    return packed(model)


def with_own_constants(content: bytes) -> bytes:
    """Gives each addition, subtraction and multiplication its own copy of its constant.

    The converter shares equal constants, such as the epsilon of all normalizations. Each needs the scale of its sum.
    """
    model = _parsed(content)
    (graph,) = model.subgraphs
    count, read = len(graph.tensors), set()
    for operator in graph.operators:
        if _code(model, operator) not in _ELEMENTWISE:
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


def packed(model: Any) -> bytes:
    """A model object as the bytes of a .tflite file.

    The weights are written after the flatbuffer, each at a multiple of 16 bytes for the wide loads of kernels. Metadata
    stays in the flatbuffer, where its readers look for it.
    """
    in_place = {entry.buffer for entry in model.metadata or ()}
    moved = {}
    for index, buffer in enumerate(model.buffers):
        if index not in in_place and buffer.data is not None and len(buffer.data):
            moved[index] = bytes(buffer.data)
            buffer.data, buffer.offset, buffer.size = None, 1, 1  # reserve space for the values set below
    content = bytearray(flatbuffer_utils.convert_object_to_bytearray(model))
    root = schema.Model.GetRootAs(content)
    for index, data in moved.items():
        content += bytes(-len(content) % 16)
        flatbuffer_utils.update_packed_buffer(root.Buffers(index), offset=len(content), size=len(data))
        content += data
    return bytes(content)


def _parsed(content: bytes) -> Any:
    return flatbuffer_utils.read_model_from_bytearray(content)


def _retype(tensor: Any, name: InferenceType, int8: Any) -> None:
    """Changes a tensor to the type `name`, with the scale of the int8 quantization `int8`."""
    tensor.type = TYPES[name]
    tensor.quantization = schema.QuantizationParametersT()
    tensor.quantization.scale = np.asarray(int8.scale, "float32")
    tensor.quantization.zeroPoint = np.asarray(int8.zeroPoint, "int64") + _ZERO_POINTS[name]


def _bypass(graph: Any, operator: Any, ends: list[int], signature: Any) -> None:
    """Removes an operator that copies, between an input or output of the graph (`ends`) and an inner tensor."""
    outer, inner = operator.inputs[0], operator.outputs[0]
    outer, inner = (outer, inner) if outer in ends else (inner, outer)
    graph.tensors[inner].name = graph.tensors[outer].name
    graph.operators.remove(operator)
    _replace(outer, inner, ends, signature)


def _replace(old: int, new: int, ends: list[int], signature: Any) -> None:
    """Makes the tensor `new` the input or output that `old` was."""
    ends[list(ends).index(old)] = new
    for entry in signature:
        entry.tensorIndex = new if entry.tensorIndex == old else entry.tensorIndex


def _code(model: Any, operator: Any) -> int:
    return flatbuffer_utils.get_builtin_code_from_operator_code(model.operatorCodes[operator.opcodeIndex])


def _opcode(model: Any, builtin: int) -> int:
    """The index of a builtin operator's code in the model, which gets one if it has none."""
    codes = [flatbuffer_utils.get_builtin_code_from_operator_code(code) for code in model.operatorCodes]
    if builtin not in codes:
        code = schema.OperatorCodeT()
        code.builtinCode = code.deprecatedBuiltinCode = builtin
        model.operatorCodes.append(code)
        codes.append(builtin)
    return codes.index(builtin)
