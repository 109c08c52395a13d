"""Named precisions of a .tflite file, by ai-edge-quantizer."""

import contextlib
import io
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from ai_edge_quantizer import quantizer
from ai_edge_quantizer.algorithm_manager import AlgorithmName
from ai_edge_quantizer.algorithms.uniform_quantize import uniform_quantize_tensor
from ai_edge_quantizer.calibrator import Calibrator
from ai_edge_quantizer.qtyping import (
    ComputePrecision,
    OpQuantizationConfig,
    TensorDataType,
    TensorQuantizationConfig,
    TFLOperationName,
)
from ai_edge_quantizer.recipe_manager import RecipeManager
from ai_edge_quantizer.utils.qsv_utils import min_max_update


def _weights(bits, dtype, *, algorithm):
    """Weights alone in another type: the runtime widens them once, when it loads the file."""
    weights = TensorQuantizationConfig(num_bits=bits, dtype=dtype)
    config = OpQuantizationConfig(
        weight_tensor_config=weights, compute_precision=ComputePrecision.FLOAT, explicit_dequantize=True
    )
    return lambda rules, regex, operation: rules.add_quantization_config(regex, operation, config, algorithm)


def _static(activation_bits):
    """Weights in int8, activations in integers of ranges that calibration found."""
    bits = {"activation_num_bits": activation_bits, "weight_num_bits": 8}
    return lambda rules, regex, operation: rules.add_static_config(regex, operation, **bits)


def _dynamic(rules, regex, operation):
    """Weights in int8, activations in int8 of ranges found anew for each image."""
    rules.add_dynamic_config(regex, operation, num_bits=8)


_float16 = _weights(16, TensorDataType.FLOAT, algorithm=AlgorithmName.FLOAT_CASTING)
_int8_weights = _weights(8, TensorDataType.INT, algorithm=AlgorithmName.MIN_MAX_UNIFORM_QUANT)
_CONV, _DEPTHWISE, _DENSE = (
    TFLOperationName.CONV_2D,
    TFLOperationName.DEPTHWISE_CONV_2D,
    TFLOperationName.FULLY_CONNECTED,
)
_ALL = TFLOperationName.ALL_SUPPORTED
# How each kind of operator is quantized, by precision.
_RULES = {
    "float32": {},
    "float16": {_CONV: _float16, _DEPTHWISE: _float16, _DENSE: _float16},
    # XNNPACK has no depthwise convolution with ranges found anew: TensorFlow Lite's own would run, on one thread.
    "dynamic": {_CONV: _dynamic, _DENSE: _dynamic, _DEPTHWISE: _int8_weights},
    "int8": {_ALL: _static(8)},
    "int16x8": {_ALL: _static(16)},
}
PRECISIONS = tuple(_RULES)
CALIBRATED = ("int8", "int16x8")
# Float32 images in, float32 probabilities out: callers need no scales. A softmax in int8 leaves XNNPACK, and its 256
# steps of 1/256 would be all that is left of the probabilities.
_IN_FLOAT = (TFLOperationName.INPUT, TFLOperationName.OUTPUT, TFLOperationName.SOFTMAX)


def quantize(
    content,
    precision,
    *,
    images=None,
    signature,
    input_name,
    input_range=None,
    keep_float=(),
    output_layer=None,
    progress=None,
):
    """Gives a float32 file another precision; its input and output stay float32.

    Args:
        content: The .tflite file, as bytes.
        precision: One of `PRECISIONS`.
        images: For those in `CALIBRATED`: `(samples, height, width, channels)`, to show the range of each tensor.
        signature: Key of the file's signature.
        input_name: Name of the signature's input.
        input_range: Lowest and highest value of the input, where they are known; default: those of `images`.
        keep_float: Names of layers that stay in float32.
        output_layer: Name of the last layer.
        progress: Called with the number of images that have been run, and of all.

    Returns:
        The new file, as bytes.

    Raises:
        ValueError: If no ranges can be found that integer kernels bear.
    """
    if precision == "float32":
        return content
    rules = RecipeManager()
    for operation, rule in _RULES[precision].items():
        rule(rules, ".*", operation)
    if precision in CALIBRATED:
        for operation in _IN_FLOAT:
            rules.add_quantization_config(".*", operation, algorithm_key=AlgorithmName.NO_QUANTIZE)
    if keep_float:
        # A tensor is called model/layer_1/Op, or several of those with semicolons between them.
        named = rf"(^|[/;])({'|'.join(map(re.escape, keep_float))})(_\d+)?/"
        if output_layer in keep_float:
            named += "|^StatefulPartitionedCall:"  # what the converter calls the output of the graph
        rules.add_quantization_config(named, _ALL, algorithm_key=AlgorithmName.NO_QUANTIZE)
    engine = quantizer.Quantizer(content, rules.get_quantization_recipe())
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.filterwarnings("ignore", message=".*experimental_preserve_all_tensors.*")  # calibration reads them all
        if precision not in CALIBRATED:
            return _quantized(engine, None)
        # The whole range of each tensor over all images. The engine's own average over images, of which the first
        # weighs most, cuts off what later ones show.
        calibrator = Calibrator(content, num_threads=2, qsv_update_func=min_max_update)
        for done, image in enumerate(images, start=1):
            calibrator.calibrate({signature: [{input_name: image[None]}]}, rules)
            if progress:
                progress(done, len(images))
        ranges = calibrator.get_model_qsvs()
        if input_range:
            low, high = np.float32(input_range).reshape(2, 1, 1, 1, 1)
            ranges[f"{signature}_{input_name}:0"] = {"min": low, "max": high}

        def convert():
            with np.errstate(invalid="ignore"):  # the scale of a dead unit's bias: widened below
                return _quantized(engine, ranges)

        def widen(narrow):
            for name in narrow.keys() & ranges.keys():  # the engine adds tensors of its own
                ranges[name] = widened(ranges[name], 255 * narrow[name])

        return with_wide_ranges(convert, widen) if precision == "int8" else convert()


def with_wide_ranges(convert: Callable[[], bytes], widen: Callable[[dict[str, float]], None]) -> bytes:
    """An int8 file whose ranges are all wide enough for integer kernels.

    Args:
        convert: Makes the file.
        widen: Widens ranges before the next try: `{tensor: scale that it needs}`.

    Raises:
        ValueError: If ranges are still too narrow after five tries.
    """
    for _ in range(_ROUNDS):
        content = convert()
        narrow = too_narrow(content)
        if not narrow:
            return content
        widen(narrow)
    raise ValueError(f"No int8 ranges fit integer kernels at {', '.join(narrow)}: calibrate on more typical images")


def _quantized(engine, ranges):
    with _large_kernels_in_parts():
        result = engine.quantize(ranges, enable_progress_bar=False, enable_progress_report=False)
    return bytes(result.quantized_model)


_LARGE = 32 * 2**20


@contextlib.contextmanager
def _large_kernels_in_parts():
    """Lets the engine see kernels of convolutions in parts of less than 32 MiB.

    ai-edge-quantizer 0.10 flattens larger ones, SENet-154's last shortcut among them, and not their scales with them.
    """
    whole = uniform_quantize_tensor.uniform_quantize

    def in_parts(kernel, parameters, *blockwise):
        if kernel.ndim <= 2 or kernel.nbytes <= _LARGE or parameters.quantized_dimension != 0:
            return whole(kernel, parameters, *blockwise)
        count = -(-kernel.nbytes // _LARGE)
        pieces = (np.array_split(x, count) for x in (kernel, parameters.scale, parameters.zero_point))
        return np.concatenate(
            [
                whole(part, replace(parameters, scale=scale, zero_point=zero_point), *blockwise)
                for part, scale, zero_point in zip(*pieces, strict=True)
            ]
        )

    uniform_quantize_tensor.uniform_quantize = in_parts
    try:
        yield
    finally:
        uniform_quantize_tensor.uniform_quantize = whole


_ROUNDS = 5
# XNNPACK multiplies sums by a factor that must be below 2^8, and adds tensors whose scales are at most 2^10 apart. It
# does not always refuse the others: it can also end the process.
_LARGEST_FACTOR = 2.0**7
_SMALLEST_FACTOR = 2.0**-9
_MARGIN = 1.5
_SUMS_OF_PRODUCTS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "MUL")


def too_narrow(content):
    """The tensors whose scale is too small for integer kernels, and the scale that each needs.

    Dead units do that: where a gate's bottleneck is zero for all calibration images, so is the range behind it.
    """
    reader = Interpreter(
        model_content=content, experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    )
    tensors = {tensor["index"]: tensor for tensor in reader.get_tensor_details()}
    scales = {
        index: float(tensor["quantization_parameters"]["scales"].max())
        for index, tensor in tensors.items()
        if tensor["quantization_parameters"]["scales"].size
    }
    needed = {}
    for operator in reader._get_ops_details():
        output, inputs = operator["outputs"][0], [index for index in operator["inputs"] if index in scales]
        if output not in scales or not inputs:
            continue
        if operator["op_name"] in _SUMS_OF_PRODUCTS:
            factor = math.prod(scales[index] for index in inputs[:2]) / scales[output]
        elif operator["op_name"] == "ADD":
            factor = max(scales[index] for index in inputs) / scales[output]
        else:
            continue
        if factor > _LARGEST_FACTOR:
            needed[output] = scales[output] = scales[output] * factor / _LARGEST_FACTOR * _MARGIN
        if operator["op_name"] == "ADD":
            for index in inputs:
                if scales[index] < scales[output] * _SMALLEST_FACTOR:
                    needed[index] = scales[index] = scales[output] * _SMALLEST_FACTOR * _MARGIN
    return {tensors[index]["name"]: scale for index, scale in needed.items()}


def widened(ranges, extent):
    """Ranges of that extent: on zero's own side where they had one."""
    low, high = np.minimum(ranges["min"], 0), np.maximum(ranges["max"], 0)
    if not np.any(high - low):  # a dead unit, which other images may wake
        low, high, extent = low - 1, high + 1, max(extent, 2)
    factor = extent / np.max(high - low)
    return {**ranges, "min": low * factor, "max": high * factor}
