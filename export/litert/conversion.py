"""LiteRT (TFLite) files: builtin operators only, run and compared with the Keras model before they are handed out."""

import os
import re
import tempfile
import warnings
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.lite.python.convert_phase import ConverterError

from se_keras.graph import functional, producer
from se_keras.images import calibration_images, require_pixels
from se_keras.storage import sha256
from se_keras.typing import Images

from ..description import Metadata, describe
from ..lowering import Lowering, lower
from ..manifest import manifest, reference_outputs
from ..model import (
    SIGNATURE,
    check_images,
    class_count,
    ends_in_softmax,
    input_names,
    output_names,
    predict,
    require_equal,
    require_one_input,
    signature_of,
    trace,
    warn_of_other_range,
)
from ..outputs import Agreement, agreement
from . import metadata
from .file import LiteRTModel, LiteRTRunner
from .flatbuffer import TYPES, with_types, without_idle_clamps
from .quantization import CALIBRATED, PRECISIONS, quantize

LOW_COSINE = 0.9  # trained networks are above 0.99; below it, calibration did not show what the network sees


def to_litert(
    model,
    *,
    precision="float32",
    calibration=None,
    held_out=None,
    input_shape=None,
    input_type="float32",
    output_type="float32",
    keep_float=None,
    lowering=True,
    converted=None,
    labels=None,
    normalization=None,
    training=None,
    progress=None,
):
    """Converts a functional model to a LiteRT file of builtin operators, and compares the two before handing it out.

    The file has one signature, `serving_default`, with the model's input by name (`images` in this project's networks)
    and its output (`probabilities` behind a softmax), both float32 unless asked otherwise, for one image at a time.

    Args:
        model: A functional Keras model with one input.
        precision: One of
            `"float32"`;
            `"float16"`: weights in float16, half the size; runs in float32;
            `"dynamic"`: weights in int8, a quarter of the size, no calibration; ranges are found anew for each image;
            `"int8"`: weights per channel and activations per tensor, for integer kernels: the fastest;
            `"int16x8"`: weights in int8 and activations in int16: an accuracy reference; XNNPACK has no kernels for it.
        calibration: For int8 and int16x8: images as the network will see them, an array `(samples, height, width,
            channels)`, an iterable of images or batches, such as a `tf.data.Dataset`, or the path of a folder of
            pictures, whose pixels stay 0 to 255. A hundred typical ones are enough.
        held_out: Images to compare on. Default: every fifth calibration image, which then is not calibrated on (all of
            them, where there are fewer than five); without calibration, noise.
        input_shape: `(height, width, channels)`; needed where the model leaves a size free.
        input_type: For int8: `"float32"`, `"int8"` or `"uint8"`. The scale is in the file and in the manifest.
        output_type: Likewise.
        keep_float: For int8 and int16x8: a regular expression; layers of the lowered model with such names stay in
            float32. `".*_se_.*"` keeps squeeze-and-excitation.
        lowering: Whether to `lower` the model first; `False` exports it as published.
        converted: The same model's float32 `LiteRTModel`, where there is one; it is not converted again, and what it
            says in its metadata is said again where the next three arguments are not given.
        labels: Names of the classes, in the order of the outputs.
        normalization: `(mean, std)`, each a number or one for each channel: the model takes (pixel - mean) / std of
            pixels in 0 to 255. The model does not tell, and apps need to know. MediaPipe takes one number alone: where
            the channels differ, `create(..., include_preprocessing=True)` and (0, 1). An integer input then takes the
            pixels themselves.
        training: How the model was trained, as a dict for JSON, such as `run.json` has it.
        progress: Called with a line for each step.

    Returns:
        A `LiteRTModel` with `.content`, `.manifest` and `.save(path)`.

    Raises:
        ValueError: If an argument is not one of these, if there are no calibration images where they are needed, if a
            weight is not finite, or if the file does not agree with the model in float32 to 1e-3 of the outputs' range.
        TypeError: If the model is not functional, or if labels, normalization or training are not of these types.

    Warns:
        UserWarning: If the images have another range than those that the model was trained on, or if a quantized file
            is far from the model: below a cosine of 0.9.
    """
    told = progress or (lambda line: None)
    calibrated = precision in CALIBRATED
    _check_options(precision, calibration, input_type, output_type, keep_float)
    model = functional(model)
    require_one_input(model)
    shape = tuple(input_shape or model.inputs[0].shape[1:])
    if None in shape:
        raise ValueError(f"A LiteRT file has a fixed size: give input_shape. Received: a model of {shape}")
    about = describe(
        network=model.name,
        precision=precision,
        channels=shape[-1],
        classes=class_count(model),
        labels=labels,
        normalization=normalization,
        training=training,
        converted=metadata.read(converted.content) if converted else None,
    )
    seen, unseen = _calibration(calibration, shape) if calibrated else (None, None)
    if calibrated:
        if isinstance(calibration, (str, os.PathLike)):
            require_pixels(model)
        warn_of_other_range(model, seen)
    exported = lower(model, input_shape=shape) if lowering else model
    kept = _kept(exported, keep_float)
    told(f"converting {model.name}")
    names = output_names(model)
    content = metadata.detach(converted.content) if converted else _convert(exported, (1, *shape), names)

    def counted(done, images):
        if done == images or not done % max(images // 10, 1):
            told(f"calibrating {model.name}: {done} of {images} images")

    (input_name,) = input_names(exported)
    content = quantize(
        content,
        precision,
        images=seen,
        signature=SIGNATURE,
        input_name=input_name,
        input_range=None if input_type == "float32" else _range_of_pixels(about.normalization),
        keep_float=kept,
        output_layer=producer(exported.outputs[0]).name,
        progress=counted,
    )
    if precision == "int8":
        content = without_clamps(content, seen)
        content = with_types(content, input_type=input_type, output_type=output_type)
    if held_out is not None:
        check_on = calibration_images(held_out, shape)
    elif seen is not None:
        check_on = seen if unseen is None else unseen
    else:
        check_on = check_images(model, shape=shape)
    told(f"comparing {model.name} with its file on {len(check_on)} images")
    file, result = compared_file(
        content,
        model=model,
        about=about,
        lowering=getattr(exported, "lowering", None),
        images=check_on,
        held_out=check_on is not seen,
        calibration_images=0 if seen is None else len(seen),
        kept_float=list(kept),
    )
    if precision == "float32":
        require_equal(result, "LiteRT file")
    elif result.cosine < LOW_COSINE:
        warnings.warn(
            f"The {precision} file is far from the Keras model: {result}."
            + " Calibrate on more, and more typical, images" * calibrated,
            stacklevel=2,
        )
    return file


def compared_file(
    content: bytes,
    *,
    model: keras.Model,
    about: Metadata,
    lowering: Lowering | None,
    images: Images,
    **more: Any,
) -> tuple[LiteRTModel, Agreement]:
    """The end of every conversion: a file with its metadata and manifest, and how well it agrees with its model.

    Args:
        content: The .tflite file without metadata.
        model: The functional Keras model that it was made of.
        about: What the file says about itself.
        lowering: What `lower` did; None for a model exported as published.
        images: `(samples, height, width, channels)`: what to compare on.
        more: Further entries of the manifest; `held_out` says whether calibration did not see the images.
    """
    content = metadata.attach(content, about)
    runner = LiteRTRunner(content)
    as_logits = ends_in_softmax(model) and not runner.has_quantized_outputs
    result = agreement(predict(model, images), runner(images), as_logits=as_logits)
    record = manifest(
        network=model.name,
        precision=about.precision,
        signature=runner.typed(signature_of(model, batch_shape=(1, *images.shape[1:]))),
        lowering=lowering,
        agreement=result,
        bytes=len(content),
        sha256=sha256(content),
        golden=reference_outputs(runner, low=images.min(), high=images.max(), precision=about.precision),
        **more,
    )
    return LiteRTModel(content=content, manifest=record), result


def _check_options(precision, calibration, input_type, output_type, keep_float):
    """Raises ValueError if a precision does not have what is asked of it."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}. Received: precision={precision!r}")
    if precision in CALIBRATED and calibration is None:
        raise ValueError(f"{precision=} needs calibration images: calibration=an array or an iterable of images")
    for what, given in (("input_type", input_type), ("output_type", output_type)):
        if given not in TYPES:
            raise ValueError(f"{what} must be one of {tuple(TYPES)}. Received: {what}={given!r}")
        if given != "float32" and precision != "int8":
            raise ValueError(f"{what}={given!r} is for precision='int8'. Received: {precision=}")
    if keep_float is not None and precision not in CALIBRATED:
        raise ValueError(f"keep_float is for a precision in {CALIBRATED}. Received: {precision=}")


def _range_of_pixels(normalization):
    """What an integer input has to hold for its steps to be pixels; None where nobody told."""
    if normalization is None:
        return None
    if len(normalization.mean) > 1:
        raise ValueError(f"An integer input has one scale for all channels. Received: {normalization=}")
    return tuple(normalization.of_pixel(pixel)[0] for pixel in (0, 255))


def _kept(model, pattern):
    """Names of the layers of `model` that `pattern` matches."""
    if pattern is None:
        return ()
    try:
        names = tuple(layer.name for layer in model.layers if re.fullmatch(pattern, layer.name))
    except (re.error, TypeError) as error:
        raise ValueError(f"keep_float must be a regular expression: {error}. Received: {pattern!r}") from None
    if not names:
        raise ValueError(f"keep_float matches no layer of {model.name}. Received: {pattern!r}")
    return names


def without_clamps(content, images):
    """The file without clamps that cannot act, if its outputs are the same to the bit; else the file as it is."""
    elided = without_idle_clamps(content)
    if elided == content:
        return content
    before, after = LiteRTRunner(content)(images), LiteRTRunner(elided)(images)
    return elided if all(np.array_equal(before[name], after[name]) for name in before) else content


def _calibration(calibration, shape):
    """Images to calibrate on, and those held out: every fifth, or None where there are fewer than five."""
    images = calibration_images(calibration, shape)
    if np.ptp(images) == 0:
        raise ValueError(f"Calibration images must show what the network sees. Received: {images.flat[0]} everywhere")
    every_fifth = np.arange(len(images)) % 5 == 4
    return (images[~every_fifth], images[every_fifth]) if len(images) >= 5 else (images, None)


def _convert(model, batch_shape, names):
    """By way of a SavedModel: the converter loses the weights of a traced Keras 3 model."""
    with tempfile.TemporaryDirectory() as folder:
        trace(model, folder, names=names, batch_shape=batch_shape)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        try:
            return converter.convert()
        except ConverterError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{model.name} needs operators that LiteRT has not built in: {reason}") from None
