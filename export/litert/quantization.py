"""The precisions of .tflite files, made with ai-edge-quantizer."""

import contextlib
import io
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
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
from .flatbuffer import cast_input, with_own_constants
from .packing import completed
from .ranges import widened, with_wide_ranges

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
_ADDED = re.compile(r"(_quantized|_dequant|_duplicated_\d+)$")  # by the engine, to the names of copies of a tensor


def quantize(
    content: bytes,
    precision: Precision,
    *,
    images: Images,
    signature: str,
    input_name: str,
    input_range: tuple[float, float] | None = None,
    keep_float: Collection[str] = (),
    output_layers: Sequence[str] = (),
    progress: Callable[[int, int], object] | None = None,
) -> bytes:
    """Converts a float32 .tflite file to another precision. Its input and output keep their types.

    Args:
        content: The float32 file.
        precision: Of the new file.
        images: For calibration, `(samples, height, width, channels)` in the type of the input; not used unless
            `precision` is in `CALIBRATED`.
        signature: Key of the file's signature.
        input_name: Name of the signature's input.
        input_range: Lowest and highest value of the input. Default: those of `images`.
        keep_float: Names of layers that stay in float32.
        output_layers: Names of the last layers, in the order of the names of the outputs.
        progress: Called with the number of images that have been run and the number of all images.

    Raises:
        ValueError: If no ranges are found that integer kernels can compute with.
    """
    if precision == "float32":
        return content
    rules = _rules(precision, keep_float, output_layers)
    content = with_own_constants(content) if precision == "int8" else content
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.filterwarnings("ignore", message=".*experimental_preserve_all_tensors.*")  # calibration reads them all
        if precision not in CALIBRATED:
            return _quantized(content, rules, None)
        # The range of each tensor over all images. By default, the engine averages the ranges of the images, and the
        # first image weighs most: that clips values of later images.
        calibrator = Calibrator(content, num_threads=2, qsv_update_func=min_max_update)
        for done, image in enumerate(images, start=1):
            calibrator.calibrate({signature: [{input_name: image[None]}]}, rules)
            if progress:
                progress(done, len(images))
        ranges = calibrator.get_model_qsvs()
        pixels = cast_input(content) or f"{signature}_{input_name}:0"
        if input_range:
            low, high = np.asarray(input_range, "float32").reshape(2, 1, 1, 1, 1)
            ranges[pixels] = {"min": low, "max": high}

        def convert(in_float: Collection[str]) -> bytes:
            if in_float:
                exactly = rf"^({'|'.join(map(re.escape, in_float))});$"
                rules.add_quantization_config(exactly, _ALL, algorithm_key=AlgorithmName.NO_QUANTIZE)
            with np.errstate(invalid="ignore"):  # the scale of a dead unit's bias: widened below
                return _quantized(content, rules, ranges)

        def widen(narrow: dict[str, float]) -> None:
            for tensor, scale in narrow.items():
                name = _ADDED.sub("", tensor)
                if name != pixels or input_range is None:
                    ranges[name] = widened(ranges.get(name), 255 * scale)

        return with_wide_ranges(convert, widen) if precision == "int8" else convert(())


def float_operators(content: bytes) -> dict[str, str]:
    """The operators of a quantized file that compute in float32: `{name of the output: operator}`."""
    interpreter = plain_interpreter(content)
    tensors = {tensor["index"]: tensor for tensor in interpreter.get_tensor_details()}
    return {
        tensors[operator["outputs"][0]]["name"]: operator["op_name"]
        for operator in interpreter._get_ops_details()
        if operator["op_name"] != "DEQUANTIZE" and tensors[operator["outputs"][0]]["dtype"] == np.float32
    }


def _rules(precision: Precision, keep_float: Collection[str], output_layers: Sequence[str]) -> RecipeManager:
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
        for number, layer in enumerate(output_layers):
            if layer in keep_float:  # the converter's name for an output of the graph
                pattern += rf"|^StatefulPartitionedCall:{number}(\D|$)"
        rules.add_quantization_config(pattern, _ALL, algorithm_key=AlgorithmName.NO_QUANTIZE)
    return rules


def _quantized(content: bytes, rules: RecipeManager, ranges: Any) -> bytes:
    engine = quantizer.Quantizer(content, rules.get_quantization_recipe())
    with _large_kernels_in_parts():
        result = engine.quantize(ranges, enable_progress_bar=False, enable_progress_report=False)
    quantized: Any = result.quantized_model  # None only where nothing was quantized
    return completed(bytes(quantized))


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
