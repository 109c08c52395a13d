"""Named precisions of a .tflite file, by ai-edge-quantizer."""

import contextlib
import io
import math
import warnings

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from ai_edge_quantizer import quantizer, recipe
from ai_edge_quantizer.algorithm_manager import AlgorithmName
from ai_edge_quantizer.calibrator import Calibrator
from ai_edge_quantizer.qtyping import TFLOperationName
from ai_edge_quantizer.recipe_manager import RecipeManager
from ai_edge_quantizer.utils.qsv_utils import min_max_update

# Float32 images in, float32 probabilities out: callers need no scales. A softmax in int8 leaves XNNPACK, and its 256
# steps of 1/256 would be all that is left of the probabilities.
_IN_FLOAT = (TFLOperationName.INPUT, TFLOperationName.OUTPUT, TFLOperationName.SOFTMAX)


def quantize_int8(content, images, *, signature, input_name):
    """Static int8: weights per channel, activations per tensor, ranges from running `images` through the file.

    Args:
        content: A float32 .tflite file, as bytes.
        images: The calibration images, `(samples, height, width, channels)`.
        signature: Key of the file's signature.
        input_name: Name of the signature's input.

    Returns:
        The .tflite file with float32 input and output.
    """
    engine = quantizer.Quantizer(content, recipe.static_wi8_ai8())
    for operation in _IN_FLOAT:
        engine.update_quantization_recipe(regex=".*", operation_name=operation, algorithm_key=AlgorithmName.NO_QUANTIZE)
    rules = RecipeManager()
    rules.load_quantization_recipe(engine.get_quantization_recipe())
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.filterwarnings("ignore", message=".*experimental_preserve_all_tensors.*")  # calibration reads them all
        # The whole range of each tensor over all images. The engine's own average over images, of which the first
        # weighs most, cuts off what later ones show.
        calibrator = Calibrator(content, num_threads=2, qsv_update_func=min_max_update)
        calibrator.calibrate({signature: [{input_name: image[None]} for image in images]}, rules)
        ranges = calibrator.get_model_qsvs()
        for _ in range(_ROUNDS):
            result = engine.quantize(ranges, enable_progress_bar=False, enable_progress_report=False)
            content = bytes(result.quantized_model)
            narrow = too_narrow(content)
            if not narrow:
                return content
            for name in narrow.keys() & ranges.keys():  # the engine adds tensors of its own
                ranges[name] = widened(ranges[name], 255 * narrow[name])
    raise ValueError(f"No int8 ranges fit integer kernels at {', '.join(narrow)}: calibrate on more typical images")


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


def calibration_images(calibration, shape):
    """Gathers calibration data into one float32 array `(samples, *shape)`.

    Args:
        calibration: An array of images, or an iterable of images or batches (a `tf.data.Dataset` too); of tuples such
            as `(images, labels)` the first is taken.
        shape: `(height, width, channels)` of the model's input.

    Raises:
        ValueError: If there are none, if they have another shape, or if a value is not finite.
        TypeError: If they are no numbers.
    """
    shape = tuple(shape)
    if hasattr(calibration, "shape"):
        calibration = [calibration]
    batches = []
    for item in calibration:
        try:
            batch = np.asarray(item[0] if isinstance(item, tuple) else item, dtype="float32")
        except (TypeError, ValueError):
            raise TypeError(f"Calibration data must be arrays of numbers. Received: {type(item).__name__}") from None
        if batch.shape == shape:
            batch = batch[None]
        if batch.shape[1:] != shape:
            raise ValueError(f"Calibration images must be {shape}. Received: {batch.shape}")
        batches.append(batch)
    images = np.concatenate(batches) if batches else np.zeros((0, *shape), "float32")
    if not len(images):
        raise ValueError(f"Calibration needs at least one image of {shape}. Received: none")
    bad = np.flatnonzero(~np.isfinite(images).reshape(len(images), -1).all(axis=1))
    if len(bad):
        found = f"NaN or infinity in {len(bad)} of {len(images)} images, the first in image {bad[0]}"
        raise ValueError(f"Calibration images must be finite. Received: {found}")
    return images
