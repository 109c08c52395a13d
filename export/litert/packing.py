"""Reading and writing .tflite files: the generated classes of the schema, and files that every reader loads.

Source: TFLite's schema.fbs.
"""

from typing import Any

import flatbuffers
from ai_edge_litert import schema_py_generated
from ai_edge_litert.tools import flatbuffer_utils

schema: Any = schema_py_generated  # generated code: pyright treats every field as optional

_DEQUANTIZE = schema.BuiltinOperator.DEQUANTIZE
_PLACEHOLDER = schema.BuiltinOperator.PLACEHOLDER_FOR_GREATER_OP_CODES
# Tables without fields, which ai-edge-quantizer 0.10 leaves out.
_OPTIONS = {
    schema.BuiltinOperator.QUANTIZE: (schema.BuiltinOptions.QuantizeOptions, schema.QuantizeOptionsT),
    _DEQUANTIZE: (schema.BuiltinOptions.DequantizeOptions, schema.DequantizeOptionsT),
}
LARGEST_INSIDE = 2**31 - 2**26  # bytes of weights in a flatbuffer of at most 2 GB; the rest is for the graph


def parsed(content: bytes) -> Any:
    """A model object of the bytes of a .tflite file."""
    return flatbuffer_utils.read_model_from_bytearray(content)


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
        if operator.builtinOptions is None and (options := _OPTIONS.get(code_of(model, operator))):
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


def completed(content: bytes) -> bytes:
    """Makes a file of the converter or of ai-edge-quantizer one that every reader loads, with the same outputs.

    The weights move to multiples of 16 bytes in the flatbuffer: see `packed`. The signature names the outputs of the
    graph; ai-edge-quantizer 0.10 leaves it at the integers before them, where the file reads an output itself.
    """
    model = parsed(content)
    (graph,) = model.subgraphs
    float_of = {o.inputs[0]: o.outputs[0] for o in graph.operators if code_of(model, o) == _DEQUANTIZE}
    for entry in model.signatureDefs[0].outputs:
        if entry.tensorIndex not in graph.outputs:
            entry.tensorIndex = float_of[entry.tensorIndex]
    return packed(model)


def code_of(model: Any, operator: Any) -> int:
    """Which of `schema.BuiltinOperator` an operator is."""
    return flatbuffer_utils.get_builtin_code_from_operator_code(model.operatorCodes[operator.opcodeIndex])


def opcode(model: Any, builtin: int, *, version: int = 1) -> int:
    """The index of a builtin operator's code, of at least a version, in the model; a missing code is added."""
    codes = [flatbuffer_utils.get_builtin_code_from_operator_code(code) for code in model.operatorCodes]
    if builtin not in codes:
        code = schema.OperatorCodeT()
        code.builtinCode = builtin
        model.operatorCodes.append(code)
        codes.append(builtin)
    index = codes.index(builtin)
    model.operatorCodes[index].version = max(model.operatorCodes[index].version, version)
    return index
