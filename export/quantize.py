"""Named precisions of a .tflite file, by ai-edge-quantizer."""

import contextlib
import io
import warnings

import numpy as np
from ai_edge_quantizer import quantizer, recipe
from ai_edge_quantizer.algorithm_manager import AlgorithmName
from ai_edge_quantizer.qtyping import TFLOperationName

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
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.filterwarnings("ignore", message=".*experimental_preserve_all_tensors.*")  # calibration reads them all
        ranges = engine.calibrate({signature: [{input_name: image[None]} for image in images]}, num_threads=2)
        result = engine.quantize(ranges, enable_progress_bar=False, enable_progress_report=False)
    return bytes(result.quantized_model)


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
