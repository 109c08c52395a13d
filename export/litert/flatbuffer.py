"""Changes to a quantized .tflite file: which types go in and out, and clamps that cannot act."""

from copy import copy

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils

TYPES = {"float32": schema.TensorType.FLOAT32, "int8": schema.TensorType.INT8, "uint8": schema.TensorType.UINT8}
_ZERO_POINTS = {"int8": 0, "uint8": 128}  # beside those of int8
_PROBABILITIES = (
    1 / 256,
    -128,
)  # scale and zero point in int8 of what lies in 0..1, as TensorFlow Lite's softmax has it
_QUANTIZE, _DEQUANTIZE = schema.BuiltinOperator.QUANTIZE, schema.BuiltinOperator.DEQUANTIZE
_SOFTMAX = schema.BuiltinOperator.SOFTMAX


def with_types(content, *, input_type="float32", output_type="float32"):
    """Lets an int8 file with float32 input and output take and give integers.

    Args:
        content: The .tflite file, as bytes: one input, quantized first of all, and one output.
        input_type: `"float32"`, `"int8"` or `"uint8"`. Scale and zero point are those of the tensor behind the input.
        output_type: Likewise; of an output that was in float32 up to its end, such as a softmax's, 256 steps in 0..1.

    Returns:
        The new file.

    Raises:
        ValueError: If the file computes in float32 at that end.
    """
    if (input_type, output_type) == ("float32", "float32"):
        return content
    model = flatbuffer_utils.read_model_from_bytearray(content)
    (graph,) = model.subgraphs
    if input_type != "float32":
        reader = next((o for o in graph.operators if o.inputs[0] == graph.inputs[0]), None)
        if reader is None or _code(model, reader) != _QUANTIZE:
            raise ValueError(f"input_type={input_type!r} needs a first layer in int8: it is kept in float32")
        _retype(graph.tensors[reader.inputs[0]], input_type, graph.tensors[reader.outputs[0]].quantization)
        if input_type == "int8":
            _bypass(model, graph, reader, graph.inputs, model.signatureDefs[0].inputs)
    if output_type != "float32":
        writer = next(o for o in graph.operators if o.outputs[0] == graph.outputs[0])
        given = graph.tensors[graph.outputs[0]]
        if _code(model, writer) == _DEQUANTIZE:
            _retype(given, output_type, graph.tensors[writer.inputs[0]].quantization)
            writer.opcodeIndex, writer.builtinOptions, writer.builtinOptionsType = _opcode(model, _QUANTIZE), None, 0
            if output_type == "int8":
                _bypass(model, graph, writer, graph.outputs, model.signatureDefs[0].outputs)
        elif _code(model, writer) == _SOFTMAX:
            step, zero_point = _PROBABILITIES
            quantized = copy(given)
            quantized.name = given.name + b"_quantized"
            quantization = schema.QuantizationParametersT()
            quantization.scale, quantization.zeroPoint = [step], [zero_point]
            _retype(quantized, output_type, quantization)
            graph.tensors.append(quantized)
            operator = schema.OperatorT()
            operator.opcodeIndex = _opcode(model, _QUANTIZE)
            operator.inputs, operator.outputs = [graph.outputs[0]], [len(graph.tensors) - 1]
            graph.operators.append(operator)
            _replace(graph.outputs[0], operator.outputs[0], graph.outputs, model.signatureDefs[0].outputs)
        else:
            raise ValueError(f"output_type={output_type!r} needs a last layer in int8: it is kept in float32")
    return packed(model)


def without_idle_clamps(content):
    """Takes the ReLU off int8 additions whose output has the zero point -128: no smaller value can be stored.

    XNNPACK runs it all the same, as a pass of its own.

    Returns:
        The new file; the same bytes where there is nothing to take off.
    """
    model = flatbuffer_utils.read_model_from_bytearray(content)
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


def with_float_softmax(content):
    """Puts a softmax behind its dequantization, not in front: in int8 it leaves XNNPACK and gives but 256 values."""
    model = flatbuffer_utils.read_model_from_bytearray(content)
    (graph,) = model.subgraphs
    for softmax in graph.operators:
        behind = next((o for o in graph.operators if o.inputs[0] == softmax.outputs[0]), None)
        if behind is None or (_code(model, softmax), _code(model, behind)) != (_SOFTMAX, _DEQUANTIZE):
            continue
        for field in ("opcodeIndex", "builtinOptionsType", "builtinOptions"):
            theirs = getattr(behind, field)
            setattr(behind, field, getattr(softmax, field))
            setattr(softmax, field, theirs)
        between = graph.tensors[softmax.outputs[0]]
        between.type, between.quantization = schema.TensorType.FLOAT32, None
    return packed(model)


def packed(model):
    """A model object as the bytes of a .tflite file.

    The weights stand behind the flatbuffer, each at a multiple of 16 bytes for the kernels' wide loads; metadata
    stands in it, where its readers look.
    """
    described = {entry.buffer for entry in model.metadata or ()}
    behind = {}
    for index, buffer in enumerate(model.buffers):
        if index not in described and buffer.data is not None and len(buffer.data):
            behind[index] = bytes(buffer.data)
            buffer.data, buffer.offset, buffer.size = None, 1, 1  # room for what is known below
    content = bytearray(flatbuffer_utils.convert_object_to_bytearray(model))
    root = schema.Model.GetRootAs(content)
    for index, data in behind.items():
        content += bytes(-len(content) % 16)
        flatbuffer_utils.update_packed_buffer(root.Buffers(index), offset=len(content), size=len(data))
        content += data
    return bytes(content)


def _retype(tensor, name, int8):
    """Gives a tensor the type of that name, with the scale of an int8 one."""
    tensor.type = TYPES[name]
    tensor.quantization = schema.QuantizationParametersT()
    tensor.quantization.scale = np.asarray(int8.scale, "float32")
    tensor.quantization.zeroPoint = np.asarray(int8.zeroPoint, "int64") + _ZERO_POINTS[name]


def _bypass(model, graph, operator, ends, signature):
    """Takes an operator out that gives what it takes, between an end of the graph and a tensor within."""
    outer, inner = operator.inputs[0], operator.outputs[0]
    outer, inner = (outer, inner) if outer in ends else (inner, outer)
    graph.tensors[inner].name = graph.tensors[outer].name
    graph.operators.remove(operator)
    _replace(outer, inner, ends, signature)


def _replace(old, new, ends, signature):
    ends[list(ends).index(old)] = new
    for entry in signature:
        entry.tensorIndex = new if entry.tensorIndex == old else entry.tensorIndex


def _code(model, operator):
    return flatbuffer_utils.get_builtin_code_from_operator_code(model.operatorCodes[operator.opcodeIndex])


def _opcode(model, builtin):
    """The index of an operator's code, which is added where the model has none yet."""
    codes = [flatbuffer_utils.get_builtin_code_from_operator_code(code) for code in model.operatorCodes]
    if builtin not in codes:
        code = schema.OperatorCodeT()
        code.builtinCode = code.deprecatedBuiltinCode = builtin
        model.operatorCodes.append(code)
        codes.append(builtin)
    return codes.index(builtin)
