"""Changes to .tflite files: the types of input and output, clamps without effect, the softmax, shared constants.

Source: TFLite's schema.fbs.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, Literal

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated
from ai_edge_litert.tools import flatbuffer_utils

schema: Any = schema_py_generated  # generated code: pyright treats every field as optional

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
_PLACEHOLDER = schema.BuiltinOperator.PLACEHOLDER_FOR_GREATER_OP_CODES
_SOFTMAX = schema.BuiltinOperator.SOFTMAX
_ELEMENTWISE = (schema.BuiltinOperator.ADD, schema.BuiltinOperator.SUB, schema.BuiltinOperator.MUL)
# Tables without fields, which ai-edge-quantizer 0.10 leaves out.
_OPTIONS = {
    _QUANTIZE: (schema.BuiltinOptions.QuantizeOptions, schema.QuantizeOptionsT),
    _DEQUANTIZE: (schema.BuiltinOptions.DequantizeOptions, schema.DequantizeOptionsT),
}
LARGEST_INSIDE = 2**31 - 2**26  # bytes of weights in a flatbuffer of at most 2 GB; the rest is for the graph


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
    model = _parsed(content)
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


def completed(content: bytes) -> bytes:
    """Makes a file of the converter or of ai-edge-quantizer one that every reader loads, with the same outputs.

    The weights move to multiples of 16 bytes in the flatbuffer: see `packed`. The signature names the outputs of the
    graph; ai-edge-quantizer 0.10 leaves it at the integers before them, where the file reads an output itself.
    """
    model = _parsed(content)
    (graph,) = model.subgraphs
    float_of = {o.inputs[0]: o.outputs[0] for o in graph.operators if _code(model, o) == _DEQUANTIZE}
    for entry in model.signatureDefs[0].outputs:
        if entry.tensorIndex not in graph.outputs:
            entry.tensorIndex = float_of[entry.tensorIndex]
    return packed(model)


def _retype_input(model: Any, input_type: InferenceType) -> None:
    (graph,) = model.subgraphs
    reader = next((o for o in graph.operators if o.inputs[0] == graph.inputs[0]), None)
    if reader is None or _code(model, reader) != _QUANTIZE:
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
    code = None if writer is None else _code(model, writer)
    if code == _DEQUANTIZE and not any(index in o.inputs for o in graph.operators):
        _retype(output, output_type, graph.tensors[writer.inputs[0]].quantization)
        writer.opcodeIndex, writer.builtinOptions, writer.builtinOptionsType = _opcode(model, _QUANTIZE), None, 0
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
    operator.opcodeIndex = _opcode(model, _QUANTIZE)
    operator.inputs, operator.outputs = [source], [len(graph.tensors) - 1]
    graph.operators.append(operator)
    _replace(index, operator.outputs[0], graph.outputs, model.signatureDefs[0].outputs)


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


def without_cast(content: bytes) -> bytes:
    """Quantizes an input of 8-bit integers from the integers themselves, if its steps are 1, and not from a cast.

    XNNPACK has no kernel for the cast. Returns the same bytes if there is no such cast.
    """
    model = _parsed(content)
    (graph,) = model.subgraphs
    cast = _only_reader(graph, graph.inputs[0])
    quantize = cast and _only_reader(graph, cast.outputs[0])
    image = graph.tensors[graph.inputs[0]]
    name = next((name for name, kind in TYPES.items() if kind == image.type), None)
    if not quantize or name not in _ZERO_POINTS or (_code(model, cast), _code(model, quantize)) != (_CAST, _QUANTIZE):
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
    model = _parsed(content)
    (graph,) = model.subgraphs
    cast = _only_reader(graph, graph.inputs[0])
    return graph.tensors[cast.outputs[0]].name.decode() if cast and _code(model, cast) == _CAST else None


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


def packed(model: Any, *, largest_inside: int = LARGEST_INSIDE) -> bytes:
    """A model object as the bytes of a .tflite file.

    The weights are in the flatbuffer, each at a multiple of 16 bytes, as the schema says: kernels load as many at once.
    Only weights of more than `largest_inside` bytes, which a flatbuffer cannot hold, are written after it: LiteRT reads
    them there, but tflite-micro and OpenVINO do not. Metadata stays in the flatbuffer, where its readers look for it.
    """
    # ai-edge-quantizer 0.10 sets the new field alone. OpenVINO reads the old one first, where 0 is ADD.
    for code in model.operatorCodes:
        code.deprecatedBuiltinCode = min(max(code.builtinCode, code.deprecatedBuiltinCode), _PLACEHOLDER)
    for operator in (operator for graph in model.subgraphs for operator in graph.operators):
        if operator.builtinOptions is None and (options := _OPTIONS.get(_code(model, operator))):
            operator.builtinOptionsType, operator.builtinOptions = options[0], options[1]()
    data = {i: buffer.data for i, buffer in enumerate(model.buffers) if buffer.data is not None and len(buffer.data)}
    in_place = {entry.buffer for entry in model.metadata or ()}
    is_large = sum(map(len, data.values())) > largest_inside
    after = {i: values for i, values in data.items() if is_large and i not in in_place}
    # Offset and size of 1 reserve space for the values set below.
    model.buffers = [_Aligned(None, 1, 1) if i in after else _Aligned(data.get(i)) for i in range(len(model.buffers))]
    builder = flatbuffers.Builder(sum(len(values) for i, values in data.items() if i not in after) + 2**20)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    content = memoryview(builder.Bytes)[builder.Head() :]
    if not after:
        return bytes(content)
    content = bytearray(content)
    root = schema.Model.GetRootAs(content)
    for index, values in after.items():
        content += bytes(-len(content) % 16)
        flatbuffer_utils.update_packed_buffer(root.Buffers(index), offset=len(content), size=len(values))
        content += memoryview(values)
    return bytes(content)


class _Aligned(schema.BufferT):
    """A buffer with its data at a multiple of 16 bytes. The generated code packs them at any byte, one by one."""

    def Pack(self, builder: Any) -> int:
        data = None if self.data is None else vector(builder, 1, 16, self.data)
        schema.BufferStart(builder)
        if data is not None:
            schema.BufferAddData(builder, data)
        schema.BufferAddOffset(builder, self.offset)
        schema.BufferAddSize(builder, self.size)
        return schema.BufferEnd(builder)


def vector(builder: Any, size: int, alignment: int, content: Any) -> int:
    """Writes a vector of elements of `size` bytes, which begin at a multiple of `alignment`, and returns its offset."""
    builder.StartVector(size, len(content) // size, alignment)
    builder.head -= len(content)
    builder.Bytes[builder.head : builder.head + len(content)] = memoryview(content)
    return builder.EndVector()


def _parsed(content: bytes) -> Any:
    return flatbuffer_utils.read_model_from_bytearray(content)


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


def _code(model: Any, operator: Any) -> int:
    return flatbuffer_utils.get_builtin_code_from_operator_code(model.operatorCodes[operator.opcodeIndex])


def _opcode(model: Any, builtin: int) -> int:
    """The index of a builtin operator's code in the model; a missing code is added."""
    codes = [flatbuffer_utils.get_builtin_code_from_operator_code(code) for code in model.operatorCodes]
    if builtin not in codes:
        code = schema.OperatorCodeT()
        code.builtinCode = code.deprecatedBuiltinCode = builtin
        model.operatorCodes.append(code)
        codes.append(builtin)
    return codes.index(builtin)
