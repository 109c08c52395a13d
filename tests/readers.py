"""Programs that read .tflite files: what each computes for images, and how far that may be from LiteRT.

tflite-micro runs on microcontrollers, OpenVINO on Intel's processors: `pip install -e ".[readers]"` brings both.
"""

import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from se_keras.export.litert.packing import parsed, schema

PRECISIONS = ("float32", "float16", "dynamic", "int8")
XNNPACK, REFERENCE = OpResolverType.AUTO, OpResolverType.BUILTIN_REF
_ARENA = 2**28  # bytes; the default of ten times the file overflows tflite-micro's int for the largest files


def litert(content, images, *, kernels=XNNPACK):
    """LiteRT itself. Its interpreter first runs the verifier of flatbuffers over the file."""
    interpreter = Interpreter(model_content=content, experimental_op_resolver_type=kernels)
    interpreter.allocate_tensors()
    (taken,), (given,) = interpreter.get_input_details(), interpreter.get_output_details()

    def run(image):
        interpreter.set_tensor(taken["index"], image[None])
        interpreter.invoke()
        return interpreter.get_tensor(given["index"]).copy()

    return np.concatenate([run(image) for image in images])


def tflite_micro(content, images):
    """The runtime for microcontrollers. It prints how much memory it takes: `Arena allocation total N bytes`."""
    from tflite_micro.python.tflite_micro import runtime  # an extra

    interpreter = runtime.Interpreter.from_bytes(content, arena_size=min(10 * len(content), _ARENA))

    def run(image):
        interpreter.set_input(image[None], 0)
        interpreter.invoke()
        return interpreter.get_output(0).copy()

    outputs = np.concatenate([run(image) for image in images])
    interpreter.print_allocations()
    return outputs


def openvino(content, images):
    """OpenVINO on the CPU, in float32 where the file does not round."""
    from openvino import Core  # an extra

    core = Core()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.tflite")  # it knows the kind of a file by its name
        path.write_bytes(content)
        compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return np.concatenate([compiled(image[None])[0] for image in images])


READERS = {"tflite-micro": tflite_micro, "OpenVINO": openvino}
NEEDED = {
    reader: pytest.mark.skipif(find_spec(package) is None, reason="needs the extra readers")
    for reader, package in {"tflite-micro": "tflite_micro", "OpenVINO": "openvino"}.items()
}
on_each_reader = pytest.mark.parametrize("reader", [pytest.param(x, marks=NEEDED[x]) for x in READERS])
# What a reader does not take, and what it prints. docs/guides/microcontroller.md says so.
UNREAD = {
    ("tflite-micro", "float16"): "kernels/dequantize_common.cc",
    ("tflite-micro", "dynamic"): "Hybrid models are not supported on TFLite Micro",
}
# The same of single networks. OpenVINO 2026.4 loses the strides of two branches before a concatenation.
UNREAD_NETWORKS = {("OpenVINO", "dynamic", "se_shake_shake_26_2x96d"): "concat_shape_inference"}


def assert_read(reader, precision, files, images, *, steps=1):
    """A reader computes what LiteRT does from the file of a precision in `files`, `{precision: content}`.

    tflite-micro has LiteRT's reference kernels in C: float32 is equal. In int8 they round a value between two steps
    otherwise, about one of 50,000, which the following layers may make `steps` of the output.

    OpenVINO sums in another order than XNNPACK: up to 1e-5 of the range, while a lost bias is beyond 1e-3. In int8 and
    dynamic files both round the same values to the same steps, at other places of the computation. So their outputs
    are two samples of the same noise, whose size is the difference of LiteRT's file from that in float32: they differ
    by sqrt(2) of it. A wrong scale or zero point is far beyond.
    """
    outputs = READERS[reader](files[precision], images)
    expected = litert(files[precision], images, kernels=REFERENCE if reader == "tflite-micro" else XNNPACK)
    difference = np.abs(outputs.astype("float64") - expected)
    if reader == "tflite-micro":
        assert difference.max() <= (1.001 * steps * output_scale(files[precision]) if precision == "int8" else 0)
    elif precision in ("float32", "float16"):
        assert difference.max() <= 1e-4 * np.ptp(expected)
    else:
        noise = litert(files["float32"], images) - expected
        assert np.mean(difference**2) <= 1.5**2 * np.mean(noise**2)


def output_scale(content):
    """The size of a step of the output of an int8 file: in float32, where the file dequantizes it at its end."""
    (graph,) = parsed(content).subgraphs
    (last,) = [operator for operator in graph.operators if graph.outputs[0] in operator.outputs]
    output, before = (graph.tensors[i] for i in (graph.outputs[0], last.inputs[0]))
    return float(before.quantization.scale[0]) if output.type == schema.TensorType.FLOAT32 else 1.0
