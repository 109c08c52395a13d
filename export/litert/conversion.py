"""Conversion to LiteRT (TFLite) files of builtin operators, which are run and compared with the Keras model."""

import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.lite.python.convert_phase import ConverterError

from se_keras.errors import require_choice, require_type
from se_keras.graph import functional, producer
from se_keras.images import calibration_images
from se_keras.normalization import Normalization
from se_keras.storage import sha256
from se_keras.typing import Images, Json, OnMessage
from se_keras.wording import counted

from ..description import Metadata, describe, manifest, reference_outputs
from ..freezing import freezing_of
from ..lowering import Lowering, in_float32, lower
from ..model import (
    SIGNATURE,
    check_images,
    class_count,
    default_normalization,
    ends_in_softmax,
    input_names,
    output_names,
    predict,
    require_equal,
    require_one_input,
    signature_of,
    trace,
    trained_precision,
    warn_of_other_range,
)
from ..outputs import Agreement, agreement, as_integers, integer_range
from . import flatbuffer, metadata
from .file import LiteRTModel, LiteRTRunner
from .flatbuffer import TYPES, InferenceType, OutputTypes, types_by_name, with_types, without_cast, without_idle_clamps
from .packing import completed
from .quantization import CALIBRATED, PRECISIONS, Precision, float_operators, quantize

FOR_GPU: tuple[Precision, ...] = ("int8", "dynamic")  # those whose strided 1x1 convolutions a GPU computes wrongly
LOW_COSINE = 0.9  # trained networks are above 0.99; below 0.9, the calibration images are not typical


def to_litert(
    model: keras.Model,
    *,
    precision: Precision = "float32",
    calibration: Any = None,
    held_out: Any = None,
    input_shape: Sequence[int] | None = None,
    input_type: InferenceType = "float32",
    output_type: OutputTypes = "float32",
    keep_float: str | None = None,
    for_gpu: bool = False,
    lowering: bool = True,
    converted: LiteRTModel | None = None,
    labels: Iterable[str] | None = None,
    normalization: Any = None,
    training: Json | None = None,
    override: bool = False,
    progress: OnMessage | None = None,
) -> LiteRTModel:
    """Converts a functional model to a LiteRT file of builtin operators, and compares the two.

    The weights are in the flatbuffer, where every reader looks for them; only those of more than 2 GB come after it.
    The file takes one image at a time. It has one signature, `serving_default`, with the names of the model's input
    (`images` in this project's networks) and outputs: the keys of a dict, `probabilities` after a softmax, or else the
    names of the last layers. All are float32 by default.

    A model that was trained in mixed precision, float16 or bfloat16 is compared as the float32 model of its weights.
    `trained_precision` in the manifest says how far the model itself is from that one.

    Args:
        model: A functional Keras model with one input.
        precision: One of
            `"float32"`;
            `"float16"`: weights in float16, half the size; computes in float32;
            `"dynamic"`: weights in int8, a quarter of the size, without calibration: ranges come from each image;
            `"int8"`: weights in int8 per channel and activations in int8 per tensor, for integer kernels: the fastest;
            `"int16x8"`: weights in int8 and activations in int16: a reference for accuracy; not delegated to XNNPACK.
        calibration: For int8 and int16x8: typical images, about a hundred. An array `(samples, height, width,
            channels)`, an iterable of images or batches, such as a `tf.data.Dataset`, or a folder of image files, which
            are normalized.
        held_out: Images to compare the model and the file on. Default: every fifth calibration image, which is then not
            used for calibration (all of them, if there are fewer than five); without calibration, noise.
        input_shape: `(height, width, channels)`; required if the model's size is free.
        input_type: For int8. The scale is in the file and in the manifest. A model's own integers stay.
        output_type: For int8: of all outputs, or `{name: type}` for some of them.
        keep_float: For int8 and int16x8: a regular expression for the names of layers of the lowered model that stay in
            float32. `".*_se_.*"` matches squeeze-and-excitation.
        for_gpu: For int8 and dynamic: whether strided 1x1 convolutions become dense ones of selected positions.
            LiteRT's GPU delegate computes strided ones wrongly. On a CPU the dense ones take about 2 % more time.
        lowering: Whether to `lower` the model first; `False` exports it as published, but in float32.
        converted: The same model's float32 file, which saves a conversion. Its metadata are the defaults of `labels`,
            `normalization` and `training`.
        labels: Names of the classes, in the order of the outputs. Default: those in `training`.
        normalization: `(mean, std)`, each a number or one for each channel: the model takes (pixel - mean) / std of
            pixels in 0 to 255. Apps need it, and the model does not contain it. Default: that in `training`, or that of
            the catalogue for a network with the published classes. MediaPipe takes one number for all channels of a
            float input. With a normalization, an integer input takes the pixels themselves: if it differs by channel,
            it becomes a part of the file, and the file and the model are compared on pixels.
        training: How the model was trained, as a dict for JSON, such as that in `run.json`.
        override: Whether labels and a normalization are taken that contradict `training`.
        progress: Called with a line of text at each step.

    Raises:
        ValueError: If an argument is not valid, if calibration images are missing, if a weight is not finite, or if the
            float32 file does not agree with the model to 1e-3 of the range of its outputs.
        TypeError: If the model is not functional, or if labels, normalization or training have other types.

    Warns:
        UserWarning: If the images have another range than the training images, or if the cosine between the outputs of
            a quantized file and the model is below 0.9.
    """
    report = progress or (lambda line: None)
    _check_options(precision, calibration, input_type, output_type, keep_float, for_gpu)
    if converted is not None:
        require_type("converted", converted, LiteRTModel)
    freezing, model = freezing_of(model), functional(model)
    require_one_input(model)
    output_types = types_by_name(output_type, output_names(model))
    shape = tuple(input_shape or model.inputs[0].shape[1:])
    if None in shape:
        raise ValueError(f"A LiteRT file has a fixed size: give input_shape. Received: a model of {shape}")
    input_type = type_of_input(model, input_type)
    about = describe(
        network=model.name,
        precision=precision,
        channels=shape[-1],
        classes=class_count(model),
        labels=labels,
        normalization=normalization,
        training=training,
        converted=metadata.read(converted.content) if converted else None,
        default=default_normalization(model),
        override=override,
    )
    reference = in_float32(model)
    inside = about.normalization if input_type != "float32" and not _is_one_scale(about.normalization) else None
    if inside and not lowering:
        raise ValueError(
            f"An integer input with a scale for each channel needs lowering. Received: {lowering=}, {inside}"
        )
    exported = lower(model, input_shape=input_shape, normalization=inside) if lowering else reference
    float_layers = _matching_layers(exported, keep_float)
    calibration_set, comparison_set = _image_sets(
        reference,
        shape,
        calibration=calibration if precision in CALIBRATED else None,
        held_out=held_out,
        normalization=about.normalization,
    )
    is_held_out = comparison_set is not calibration_set
    if inside:  # the file takes pixels, which are integers
        about = replace(about, normalization=Normalization((0.0,), (1.0,)))
        calibration_set, comparison_set = inside.undo(calibration_set), inside.apply(_levels(comparison_set, inside))
    report(f"converting {model.name}")
    if converted and not inside:
        content = metadata.detach(converted.content)
    else:
        content = _convert(exported, (1, *shape), output_names(model))
    content = _quantized(
        content,
        exported,
        about=about,
        images=calibration_set,
        types=(input_type, output_types),
        float_layers=float_layers,
        for_gpu=for_gpu,
        report=report,
    )
    report(f"comparing {model.name} with its file on {counted(len(comparison_set), 'image')}")
    file, result = compared_file(
        content,
        model=reference,
        about=about,
        lowering=getattr(exported, "lowering", None),
        images=comparison_set,
        inside=inside,
        held_out=is_held_out,
        calibration_images=len(calibration_set),
        kept_float=list(float_layers),
        **freezing,
        **trained_precision(model, reference, comparison_set),
    )
    _check_agreement(result, precision)
    return file


def compared_file(
    content: bytes,
    *,
    model: keras.Model,
    about: Metadata,
    lowering: Lowering | None,
    images: Images,
    inside: Normalization | None = None,
    **more: Any,
) -> tuple[LiteRTModel, Agreement]:
    """The last step of every conversion: adds metadata and manifest, and compares the file with the model.

    Args:
        content: The .tflite file without metadata.
        model: The functional Keras model that was converted, in float32.
        about: The metadata.
        lowering: None for a model that is exported as published.
        images: `(samples, height, width, channels)`, to compare on.
        inside: The normalization that is a part of the file, which then takes pixels.
        more: Further entries of the manifest. `held_out` is whether the images were not used for calibration.
    """
    content = metadata.attach(content, about)
    runner = LiteRTRunner(content)
    as_logits = ends_in_softmax(model) and not runner.has_quantized_outputs
    taken = images if inside is None else _levels(images, inside)
    result = agreement(predict(model, images), runner(taken), as_logits=as_logits)
    record = manifest(
        network=model.name,
        precision=about.precision,
        signature=runner.typed(signature_of(model, batch_shape=(1, *images.shape[1:]))),
        lowering=lowering,
        agreement=result,
        bytes=len(content),
        sha256=sha256(content),
        **({"float_operators": float_operators(content)} if about.precision in CALIBRATED else {}),
        golden=reference_outputs(runner, low=taken.min(), high=taken.max(), precision=about.precision),
        **more,
    )
    return LiteRTModel(content=content, manifest=record), result


def type_of_input(model: keras.Model, input_type: InferenceType) -> InferenceType:
    """The type to change the input of an int8 file to; `"float32"` leaves a model's own integers.

    Raises:
        ValueError: If the model's input has other integers.
    """
    dtype = model.inputs[0].dtype
    if integer_range(dtype) is None:
        return input_type
    if input_type not in ("float32", dtype):
        raise ValueError(f"The input of {model.name} stays {dtype}. Received: input_type={input_type!r}")
    return "float32"


def _check_options(
    precision: Any, calibration: Any, input_type: Any, output_type: Any, keep_float: Any, for_gpu: Any
) -> None:
    """Raises ValueError if an option is unknown, missing, or has no effect with this precision."""
    require_choice("precision", precision, PRECISIONS)
    if keep_float is not None:
        require_type("keep_float", keep_float, str)
    if precision in CALIBRATED and calibration is None:
        raise ValueError(
            f"{precision=} needs calibration images: calibration=an array or an iterable (--calibration photos/)"
        )
    output_types = output_type.values() if isinstance(output_type, Mapping) else [output_type]
    for option, value in (("input_type", input_type), *(("output_type", value) for value in output_types)):
        require_choice(option, value, TYPES)
        if value != "float32" and precision != "int8":
            raise ValueError(f"{option}={value!r} is for precision='int8'. Received: {precision=}")
    require_type("for_gpu", for_gpu, bool)
    if for_gpu and precision not in FOR_GPU:
        raise ValueError(f"for_gpu is for a precision in {FOR_GPU}: others need no change. Received: {precision=}")
    if keep_float is not None and precision not in CALIBRATED:
        raise ValueError(f"keep_float is for a precision in {CALIBRATED}. Received: {precision=}")


def _is_one_scale(normalization: Normalization | None) -> bool:
    return normalization is None or len(normalization.mean) == 1


def _levels(images: Images, normalization: Normalization) -> Images:
    """The pixels of normalized images, whole numbers of 0 to 255."""
    return np.clip(np.rint(normalization.undo(images)), 0, 255)


def _range_of_input(
    dtype: Any, input_type: InferenceType, normalization: Normalization | None
) -> tuple[float, float] | None:
    """The range of an input whose steps are integers or pixels; None if it is that of the images."""
    if integer_range(dtype) is not None:
        return integer_range(dtype) if dtype in TYPES else None
    if input_type == "float32" or normalization is None:
        return None
    return normalization.of_pixel(0)[0], normalization.of_pixel(255)[0]


def _matching_layers(model: keras.Model, pattern: str | None) -> tuple[str, ...]:
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


def without_clamps(content: bytes, images: Images) -> bytes:
    """Removes clamps without effect, if that leaves the outputs for `images` bit-identical."""
    unclamped = without_idle_clamps(content)
    if unclamped == content:
        return content
    before, after = LiteRTRunner(content)(images), LiteRTRunner(unclamped)(images)
    return unclamped if all(np.array_equal(before[name], after[name]) for name in before) else content


def _image_sets(
    model: keras.Model,
    shape: tuple[int, ...],
    *,
    calibration: Any,
    held_out: Any,
    normalization: Normalization | None,
) -> tuple[Images, Images]:
    """The images to calibrate on (none without `calibration`), and the images to compare the model and the file on."""
    images, rest, dtype = np.zeros((0, *shape), "float32"), None, model.inputs[0].dtype
    if calibration is not None:
        images = as_integers(_read(calibration, shape, normalization), dtype)
        if np.ptp(images) == 0:
            raise ValueError(f"Calibration images must not be constant. Received: {images.flat[0]} everywhere")
        every_fifth = np.arange(len(images)) % 5 == 4
        images, rest = (images[~every_fifth], images[every_fifth]) if len(images) >= 5 else (images, images)
        warn_of_other_range(model, images, stacklevel=4)
    if held_out is not None:
        rest = as_integers(_read(held_out, shape, normalization), dtype)
    return images, check_images(model, shape=shape) if rest is None else rest


def _read(images: Any, shape: tuple[int, ...], normalization: Normalization | None) -> Images:
    """Images as the model takes them; those of a folder are normalized."""
    if not isinstance(images, (str, os.PathLike)):
        return calibration_images(images, shape)
    if normalization is None:
        raise ValueError(
            f"The pixels of {str(images)!r} are 0 to 255: normalization (--normalize) says what becomes of them"
        )
    return normalization.apply(calibration_images(images, shape))


def _quantized(
    content: bytes,
    exported: keras.Model,
    *,
    about: Metadata,
    images: Images,
    types: tuple[InferenceType, dict[str, InferenceType]],
    float_layers: tuple[str, ...],
    for_gpu: bool,
    report: OnMessage,
) -> bytes:
    """Converts a float32 file to another precision, and its input and output to `types`."""

    def on_image(done: int, count: int) -> None:
        if done == count or not done % max(count // 10, 1):
            report(f"calibrating {exported.name}: {done} of {counted(count, 'image')}")

    input_type, output_type = types
    outputs = dict(zip(output_type, exported.outputs, strict=True))
    precision: Any = about.precision
    content = quantize(
        content,
        precision,
        images=images,
        signature=SIGNATURE,
        input_name=input_names(exported)[0],
        input_range=_range_of_input(exported.inputs[0].dtype, input_type, about.normalization),
        keep_float=float_layers,
        output_layers=[producer(outputs[name]).name for name in sorted(outputs)],
        progress=on_image,
    )
    content = flatbuffer.with_dense_pointwise(content) if for_gpu else content
    if precision != "int8":
        return content
    content = without_clamps(without_cast(content), images)
    return with_types(content, input_type=input_type, output_type=output_type)


def _check_agreement(result: Agreement, precision: Precision) -> None:
    """Raises ValueError if a float32 file disagrees with its model, and warns if a quantized one does."""
    if precision == "float32":
        require_equal(result, "LiteRT file")
    elif result.cosine < LOW_COSINE:
        advice = " Calibrate on more, and more typical, images" if precision in CALIBRATED else ""
        warnings.warn(f"The {precision} file is far from the Keras model: {result}.{advice}", stacklevel=3)


def _convert(model: keras.Model, batch_shape: tuple[int, ...], names: list[str]) -> bytes:
    """Converts through a SavedModel, because the converter loses the weights of a traced Keras 3 model."""
    with tempfile.TemporaryDirectory() as folder:
        trace(model, folder, names=names, batch_shape=batch_shape)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        return converted_by(converter, model.name)


def converted_by(converter: Any, name: str) -> bytes:
    """The file of builtin operators that a converter makes of the network called `name`.

    Raises:
        ValueError: If it needs other operators.
    """
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    try:
        content = converter.convert()
    except ConverterError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name} needs operators that are not built into LiteRT: {reason}") from None
    return completed(content)
