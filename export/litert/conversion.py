"""LiteRT (TFLite) files: builtin operators only, run and compared with the Keras model before they are handed out."""

import json
import os
import re
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from tensorflow.lite.python.convert_phase import ConverterError

from se_keras import storage
from se_keras.errors import first_line
from ..agreement import agreement, in_batches
from ..calibration import calibration_images, warn_of_other_range
from ..golden import golden
from . import metadata
from .flatbuffer import TYPES, with_types, without_idle_clamps
from .quantization import CALIBRATED, PRECISIONS, quantize
from ..lowering import lower
from ..manifest import manifest, sha256
from ..serving import savedmodel
from se_keras.graph import functional, producer
from se_keras.images import require_pixels

_LOW_COSINE = 0.9  # trained networks are above 0.99; below it, calibration did not show what the network sees


@dataclass(frozen=True, kw_only=True)
class LiteRTModel:
    """A .tflite file and its manifest: what it is, what made it, how well it agrees with the Keras model."""

    content: bytes
    manifest: dict

    def save(self, path):
        """Writes the file and, beside it, `<path>.json` with the manifest: both whole, or neither.

        Raises:
            ValueError: If `path` does not end in .tflite.
            OSError: If it cannot be written.
        """
        path = Path(path)
        if path.suffix != ".tflite":
            raise ValueError(f"A LiteRT file's name ends in .tflite. Received: {str(path)!r}")
        storage.write_together({path: self.content, _manifest_path(path): storage.as_json(self.manifest)})

    def runner(self, *, threads=1):
        """The file, ready to run."""
        return Runner(self.content, threads=threads)


class Runner:
    """A LiteRT file ready to run on the CPU with XNNPACK: `runner(images)` gives the outputs.

    Args:
        content: The file, as bytes.
        threads: Number of threads.

    Raises:
        ValueError: If this is no LiteRT file with one input, or if it needs operators that are not built in.
    """

    def __init__(self, content, *, threads=1):
        check_threads(threads)
        try:
            self._interpreter = Interpreter(model_content=content, num_threads=threads)
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"Not a LiteRT file that can be run here: {first_line(error)}") from None
        inputs = self._interpreter.get_input_details()
        if len(inputs) != 1:
            raise ValueError(f"A LiteRT file with one input can be run. Received: one with {len(inputs)}")
        self._input = inputs[0]
        signature = next(iter(self._interpreter.get_signature_list()), None)  # files of other makers may have none
        if signature:
            outputs = self._interpreter.get_signature_runner(signature).get_output_details()
        else:
            outputs = {detail["name"]: detail for detail in self._interpreter.get_output_details()}
        self._outputs = dict(outputs)

    @property
    def input_shape(self):
        """Shape of the input, batch first."""
        return tuple(self._input["shape"].tolist())

    @property
    def has_quantized_outputs(self):
        """Whether an output comes in steps, such as probabilities in 256 of them: those have no logits."""
        return any(detail["quantization"][0] for detail in self._outputs.values())

    @property
    def input_dtype(self):
        """Type of the input."""
        return np.dtype(self._input["dtype"])

    def typed(self, signature):
        """A Keras model's signature with the types of the file, and the scale and zero point of its integers."""
        inputs = {name: {**entry, **_type(self._input)} for name, entry in signature["inputs"].items()}
        outputs = {name: {**entry, **_type(self._outputs[name])} for name, entry in signature["outputs"].items()}
        return {"inputs": inputs, "outputs": outputs}

    def __call__(self, images):
        """Outputs for `images`, `(samples, height, width, channels)`: `{name: array}`.

        A file with an integer input takes real images too, and its integer outputs are given as the real values that
        they stand for.
        """

        def run(batch):
            self.prepare(batch)()
            return {
                name: _dequantized(self._interpreter.get_tensor(detail["index"]), detail)
                for name, detail in self._outputs.items()
            }

        return in_batches(run, images, size=self.input_shape[0])

    def prepare(self, images):
        """Sets the input and returns the call that runs the file: what a benchmark times."""
        self._interpreter.set_tensor(self._input["index"], _quantized(np.asarray(images), self._input))
        return self._interpreter.invoke

    def undelegated(self):
        """Names of the operators that XNNPACK did not take: they run on slow kernels. Empty is as it should be."""
        details = self._interpreter._get_ops_details()
        produced_by = {}
        for operator in details:  # delegates come last, and stand in for the operators that they took
            produced_by |= {int(tensor): operator for tensor in operator["outputs"]}
        needed = [int(output["index"]) for output in self._interpreter.get_output_details()]
        executed = {}
        while needed:
            operator = produced_by.get(needed.pop())
            if operator is not None and operator["index"] not in executed:
                executed[operator["index"]] = operator["op_name"]
                needed += [int(tensor) for tensor in operator["inputs"] if tensor >= 0]
        return sorted(name for name in executed.values() if name != "DELEGATE")


def _type(tensor):
    scale, zero_point = tensor["quantization"]
    steps = {"scale": float(scale), "zero_point": int(zero_point)} if scale else {}
    return {"dtype": np.dtype(tensor["dtype"]).name} | steps


def _quantized(values, tensor):
    """Real values in the type of a tensor; integers of that type are what they are."""
    scale, zero_point = tensor["quantization"]
    if not scale or values.dtype == tensor["dtype"]:
        return values.astype(tensor["dtype"])
    limits = np.iinfo(tensor["dtype"])
    return np.clip(np.rint(values / scale) + zero_point, limits.min, limits.max).astype(tensor["dtype"])


def _dequantized(values, tensor):
    """The real values that those of a tensor stand for."""
    scale, zero_point = tensor["quantization"]
    return (values.astype("float32") - zero_point) * np.float32(scale) if scale else values


def check_threads(threads):
    """Raises ValueError unless this is a number of threads."""
    if type(threads) is not int or threads < 1:
        raise ValueError(f"threads must be an int of at least 1. Received: threads={threads!r}")


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
    savedmodel.require_one_input(model)
    shape = tuple(input_shape or model.inputs[0].shape[1:])
    if None in shape:
        raise ValueError(f"A LiteRT file has a fixed size: give input_shape. Received: a model of {shape}")
    about = metadata.describe(
        network=model.name,
        precision=precision,
        channels=shape[-1],
        classes=savedmodel.classes(model),
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
    names = savedmodel.output_names(model)
    content = metadata.detach(converted.content) if converted else _convert(exported, (1, *shape), names)

    def counted(done, images):
        if done == images or not done % max(images // 10, 1):
            told(f"calibrating {model.name}: {done} of {images} images")

    (input_name,) = savedmodel.input_names(exported)
    content = quantize(
        content,
        precision,
        images=seen,
        signature=savedmodel.SIGNATURE,
        input_name=input_name,
        input_range=None if input_type == "float32" else _range_of_pixels(about.normalization),
        keep_float=kept,
        output_layer=producer(exported.outputs[0]).name,
        progress=counted,
    )
    if precision == "int8":
        content = without_clamps(content, seen)
        content = with_types(content, input_type=input_type, output_type=output_type)
    content = metadata.attach(content, about)
    if held_out is not None:
        check_on = calibration_images(held_out, shape)
    elif seen is not None:
        check_on = seen if unseen is None else unseen
    else:
        check_on = savedmodel.check_images(model, shape=shape)
    told(f"comparing {model.name} with its file on {len(check_on)} images")
    runner = Runner(content)
    expected, actual = savedmodel.predict(model, check_on), runner(check_on)
    result = agreement(expected, actual, in_steps=runner.has_quantized_outputs)
    if precision == "float32":
        savedmodel.require_equal(result, "LiteRT file")
    elif result.cosine < _LOW_COSINE:
        warnings.warn(
            f"The {precision} file is far from the Keras model: {result}."
            + " Calibrate on more, and more typical, images" * calibrated,
            stacklevel=2,
        )
    return LiteRTModel(
        content=content,
        manifest=manifest(
            network=model.name,
            precision=precision,
            signature=runner.typed(savedmodel.signature(model, batch_shape=(1, *shape))),
            lowering=getattr(exported, "lowering", None),
            agreement=result,
            held_out=check_on is not seen,
            calibration_images=0 if seen is None else len(seen),
            kept_float=list(kept),
            bytes=len(content),
            sha256=sha256(content),
            golden=golden(runner, low=check_on.min(), high=check_on.max(), precision=precision),
        ),
    )


def load(path):
    """Reads a .tflite file; without a manifest beside it, it is what its metadata say, or named after its file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no LiteRT file, or not the one that its manifest speaks of.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no LiteRT file {str(path)!r}")
    content = path.read_bytes()
    if content[4:8] != b"TFL3":
        raise ValueError(f"{str(path)!r} is not a LiteRT file")
    if not _manifest_path(path).is_file():
        try:
            metadata.check(content)  # a damaged file is not run
            Runner(content)
            about = metadata.read(content)
        except ValueError as error:
            raise ValueError(f"{str(path)!r}: {error}") from None
        network, precision = (about.network, about.precision) if about else (path.stem, "unknown")
        return LiteRTModel(content=content, manifest={"network": network, "precision": precision})
    try:
        record = json.loads(_manifest_path(path).read_text())
        checksum = record["sha256"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{str(_manifest_path(path))!r} is not the manifest of a LiteRT file") from None
    # A flipped or missing byte can load and run: only a checksum tells.
    if checksum != sha256(content):
        raise ValueError(f"{str(path)!r} is not the file that was exported: its SHA-256 is not its manifest's")
    return LiteRTModel(content=content, manifest=record)


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
    mean, std = normalization
    if len(mean) > 1:
        raise ValueError(f"An integer input has one scale for all channels. Received: {normalization=}")
    return tuple((pixel - mean[0]) / std[0] for pixel in (0, 255))


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
    before, after = Runner(content)(images), Runner(elided)(images)
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
        savedmodel.trace(model, folder, names=names, batch_shape=batch_shape)
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        try:
            return converter.convert()
        except ConverterError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{model.name} needs operators that LiteRT has not built in: {reason}") from None


def _manifest_path(path):
    return path.with_name(path.name + ".json")
