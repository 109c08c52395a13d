"""The precisions of .tflite files, made with ai-edge-quantizer."""

import contextlib
import io
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
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

from se_keras.typing import Images

from .file import plain_interpreter

Precision = Literal["float32", "float16", "dynamic", "int8", "int16x8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
CALIBRATED: tuple[Precision, ...] = ("int8", "int16x8")

_Rule = Callable[[RecipeManager, str, TFLOperationName], None]  # adds the quantization of a kind of operator


def _weights(bits: int, dtype: TensorDataType, *, algorithm: AlgorithmName) -> _Rule:
    """Only the weights are quantized. The runtime converts them to float32 once, when it loads the file."""
    weights = TensorQuantizationConfig(num_bits=bits, dtype=dtype)
    config = OpQuantizationConfig(
        weight_tensor_config=weights, compute_precision=ComputePrecision.FLOAT, explicit_dequantize=True
    )
    return lambda rules, regex, operation: rules.add_quantization_config(regex, operation, config, algorithm)


def _static(activation_bits: int) -> _Rule:
    """Weights in int8; activations in integers, with ranges from calibration."""
    return lambda rules, regex, operation: rules.add_static_config(
        regex, operation, activation_num_bits=activation_bits, weight_num_bits=8
    )


def _dynamic(rules: RecipeManager, regex: str, operation: TFLOperationName) -> None:
    """Weights in int8; activations in int8, with ranges from each image."""
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
_RULES: dict[Precision, dict[TFLOperationName, _Rule]] = {
    "float32": {},
    "float16": {_CONV: _float16, _DEPTHWISE: _float16, _DENSE: _float16},
    # XNNPACK has no depthwise convolution with dynamic ranges: TFLite's own kernel would run, on one thread.
    "dynamic": {_CONV: _dynamic, _DENSE: _dynamic, _DEPTHWISE: _int8_weights},
    "int8": {_ALL: _static(8)},
    "int16x8": {_ALL: _static(16)},
}
# Images and probabilities stay in float32, so that callers need no scales. In int8, a softmax has only 256 different
# outputs and is not delegated to XNNPACK.
_IN_FLOAT = (TFLOperationName.INPUT, TFLOperationName.OUTPUT, TFLOperationName.SOFTMAX)


def quantize(
    content: bytes,
    precision: Precision,
    *,
    images: Images,
    signature: str,
    input_name: str,
    input_range: tuple[float, float] | None = None,
    keep_float: Collection[str] = (),
    output_layer: str | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> bytes:
    """Converts a float32 .tflite file to another precision. Its input and output stay float32.

    Args:
        content: The float32 file.
        precision: Precision of the new file.
        images: Calibration images, `(samples, height, width, channels)`; used if `precision` is in `CALIBRATED`.
        signature: Key of the file's signature.
        input_name: Name of the signature's input.
        input_range: Lowest and highest value of the input. Default: those of `images`.
        keep_float: Names of layers that stay in float32.
        output_layer: Name of the last layer.
        progress: Called with the number of images that have been run and the number of all images.

    Raises:
        ValueError: If no ranges are found that integer kernels can compute with.
    """
    if precision == "float32":
        return content
    rules = _rules(precision, keep_float, output_layer)
    engine = quantizer.Quantizer(content, rules.get_quantization_recipe())
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.filterwarnings("ignore", message=".*experimental_preserve_all_tensors.*")  # calibration reads them all
        if precision not in CALIBRATED:
            return _quantized(engine, None)
        # The range of each tensor over all images. By default, the engine averages the ranges of the images, and gives
        # the first image the most weight, which clips values of later images.
        calibrator = Calibrator(content, num_threads=2, qsv_update_func=min_max_update)
        for done, image in enumerate(images, start=1):
            calibrator.calibrate({signature: [{input_name: image[None]}]}, rules)
            if progress:
                progress(done, len(images))
        ranges = calibrator.get_model_qsvs()
        if input_range:
            low, high = np.asarray(input_range, "float32").reshape(2, 1, 1, 1, 1)
            ranges[f"{signature}_{input_name}:0"] = {"min": low, "max": high}

        def convert() -> bytes:
            with np.errstate(invalid="ignore"):  # the scale of a dead unit's bias: widened below
                return _quantized(engine, ranges)

        def widen(narrow: dict[str, float]) -> None:
            for name in narrow.keys() & ranges.keys():  # the engine adds tensors of its own
                ranges[name] = widened(ranges[name], 255 * narrow[name])

        return with_wide_ranges(convert, widen) if precision == "int8" else convert()


def with_wide_ranges(convert: Callable[[], bytes], widen: Callable[[dict[str, float]], None]) -> bytes:
    """Converts to an int8 file until all its ranges are wide enough for integer kernels.

    Args:
        convert: Makes the file.
        widen: Widens ranges before the next attempt; takes `{tensor: scale that it needs}`.

    Raises:
        ValueError: If ranges are still too narrow after five attempts.
    """
    narrow: dict[str, float] = {}
    for _ in range(5):
        content = convert()
        narrow = too_narrow(content)
        if not narrow:
            return content
        widen(narrow)
    raise ValueError(f"No int8 ranges fit integer kernels at {', '.join(narrow)}: calibrate on more typical images")


def _rules(precision: Precision, keep_float: Collection[str], output_layer: str | None) -> RecipeManager:
    """How the engine quantizes each operator of a file."""
    rules = RecipeManager()
    for operation, rule in _RULES[precision].items():
        rule(rules, ".*", operation)
    if precision in CALIBRATED:
        for operation in _IN_FLOAT:
            rules.add_quantization_config(".*", operation, algorithm_key=AlgorithmName.NO_QUANTIZE)
    if keep_float:
        # A tensor's name is model/layer_1/Op, or several of these separated by semicolons.
        pattern = rf"(^|[/;])({'|'.join(map(re.escape, keep_float))})(_\d+)?/"
        if output_layer in keep_float:
            pattern += "|^StatefulPartitionedCall:"  # the converter's name for the output of the graph
        rules.add_quantization_config(pattern, _ALL, algorithm_key=AlgorithmName.NO_QUANTIZE)
    return rules


def _quantized(engine: quantizer.Quantizer, ranges: Any) -> bytes:
    with _large_kernels_in_parts():
        result = engine.quantize(ranges, enable_progress_bar=False, enable_progress_report=False)
    return bytes(result.quantized_model)  # pyright: ignore[reportArgumentType]  # None only where nothing was quantized


_LARGE = 32 * 2**20


@contextlib.contextmanager
def _large_kernels_in_parts() -> Iterator[None]:
    """Makes the engine quantize kernels of convolutions in parts of less than 32 MiB.

    ai-edge-quantizer 0.10 flattens larger kernels, as in SENet-154's last shortcut, but not their scales.
    """
    quantize_at_once = uniform_quantize_tensor.uniform_quantize

    def in_parts(kernel: Any, parameters: Any, *blockwise: Any) -> Any:
        if kernel.ndim <= 2 or kernel.nbytes <= _LARGE or parameters.quantized_dimension != 0:
            return quantize_at_once(kernel, parameters, *blockwise)
        count = -(-kernel.nbytes // _LARGE)
        pieces = (np.array_split(x, count) for x in (kernel, parameters.scale, parameters.zero_point))
        return np.concatenate(
            [
                quantize_at_once(part, replace(parameters, scale=scale, zero_point=zero_point), *blockwise)
                for part, scale, zero_point in zip(*pieces, strict=True)
            ]
        )

    uniform_quantize_tensor.uniform_quantize = in_parts
    try:
        yield
    finally:
        uniform_quantize_tensor.uniform_quantize = quantize_at_once


# XNNPACK multiplies sums by a factor that must be below 2^8, and adds tensors only if the ratio of their scales is at
# most 2^10. It does not reject all other files: some abort the process.
_LARGEST_FACTOR = 2.0**7
_SMALLEST_FACTOR = 2.0**-9
_MARGIN = 1.5
_SUMS_OF_PRODUCTS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "MUL")


def too_narrow(content: bytes) -> dict[str, float]:
    """The tensors whose scale is too small for integer kernels, `{tensor: scale that it needs}`.

    Dead units cause them: if the bottleneck of a gate is zero for all calibration images, the next range is zero too.
    """
    interpreter = plain_interpreter(content)
    tensors = {tensor["index"]: tensor for tensor in interpreter.get_tensor_details()}
    scales = {
        index: float(tensor["quantization_parameters"]["scales"].max())
        for index, tensor in tensors.items()
        if tensor["quantization_parameters"]["scales"].size
    }
    needed = {}
    for operator in interpreter._get_ops_details():
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


def widened(ranges: Mapping[str, Any], extent: float) -> dict[str, Any]:
    """Scales the ranges, extended to include 0, so that the widest has this extent."""
    low, high = np.minimum(ranges["min"], 0), np.maximum(ranges["max"], 0)
    if not np.any(high - low):  # a dead unit, which other images may activate
        low, high, extent = low - 1, high + 1, max(extent, 2)
    factor = extent / np.max(high - low)
    return {**ranges, "min": low * factor, "max": high * factor}
