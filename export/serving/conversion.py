"""SavedModels for TF Serving: `folder/<version>/`, written atomically after a comparison with the Keras model."""

import base64
import contextlib
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from se_keras import storage
from se_keras.errors import first_line
from se_keras.graph import functional
from se_keras.images import evaluation_image
from se_keras.typing import Array, FilePath, Json

from ..description import LABELS_FILE, describe, manifest, reference_outputs
from ..freezing import freezing_of
from ..lowering import in_float32, lower
from ..model import (
    SIGNATURE,
    check_images,
    class_count,
    default_normalization,
    ends_in_softmax,
    output_names,
    predict,
    require_equal,
    require_one_input,
    signature_of,
    trace,
    trained_precision,
)
from ..outputs import FREE_SIZE, agreement
from . import warmup
from .savedmodel import GRAPH, MANIFEST, SavedModel, SavedModelRunner, next_version
from .signatures import IMAGE_BYTES, LOGITS, classify, logits

# Batch sizes for TF Serving, if it batches requests. Other sizes are padded to the next larger one.
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
_BATCHING = "batching_params.pbtxt"  # TF Serving reads it with --enable_per_model_batching_parameters


def to_savedmodel(
    model: keras.Model,
    folder: FilePath,
    *,
    version: int | None = None,
    held_out: Array | None = None,
    lowering: bool = True,
    labels: Sequence[str] | None = None,
    normalization: Any = None,
    training: Json | None = None,
    override: bool = False,
    top: int = 5,
) -> SavedModel:
    """Writes a functional model as a SavedModel that TF Serving loads.

    The signature `serving_default` takes the input of the model by its name (`images` in the networks of se_keras) with
    any batch size, and returns its outputs by name (`probabilities` after a softmax). If the model ends in a softmax,
    the signature `logits` returns the logits. With `labels` and `normalization`, the signature `image_bytes` takes
    JPEG, PNG, GIF, BMP and WebP files and returns `classes` and `scores`. The SavedModel does not need Keras, Python or
    XLA. Its folder has warm-up requests, which TF Serving replays while it loads the model, batching parameters, and
    the manifest: `<version>/assets.extra/manifest.json`.

    Args:
        model: A functional Keras model with one input.
        folder: The folder for the versions of the model: `base_path` of TF Serving.
        version: By default the next free number.
        held_out: Images for the comparison, `(samples, height, width, channels)`. Default: noise.
        lowering: Whether to `lower` the model first.
        labels: Names of the classes, in the order of the outputs. Default: those in `training`.
        normalization: `(mean, std)`, each a number or one for each channel: the model takes (pixel - mean) / std of
            pixels in 0 to 255. Default: that in `training`, or that of the catalogue for a network with the published
            classes.
        training: How the model was trained, as a dict for JSON, such as that in `run.json`.
        override: Whether labels and a normalization are taken that contradict `training`.
        top: Number of classes that `image_bytes` returns. With fewer classes, it returns all.

    Raises:
        FileExistsError, OSError: If the version exists, or if the folder cannot be written or is full.
        ValueError, TypeError: If an argument is not valid, or if the SavedModel disagrees with the model. In this case
            nothing is written.
    """
    freezing, model, target = freezing_of(model), functional(model), _target(Path(folder), version)
    require_one_input(model)
    description = _description(model, labels, normalization, training, override, top)
    has_files = _takes_files(model, description)
    exported = lower(model) if lowering else model
    reference = in_float32(model) if lowering else model
    images = check_images(reference) if held_out is None else np.asarray(held_out, dtype="float32")
    shape = (None, *model.inputs[0].shape[1:])
    is_batch = images.ndim == len(shape) and len(images) > 0
    if not is_batch or any(b not in (a, None) for a, b in zip(images.shape, shape, strict=True)):
        raise ValueError(f"held_out must be images for {shape}. Received: {images.shape}")
    with _written(target) as path:
        _write_graph(exported, path, names=output_names(model), description=description if has_files else None, top=top)
        _remove_xla(path / GRAPH)
        runner = SavedModelRunner(path)
        result = _compare(reference, runner, images)
        file = _image_file(images[0], description.normalization) if has_files else None
        warmup.write(path, model.name, _requests(runner, file))
        (path / _BATCHING).write_text(_batching())
        record = manifest(
            network=model.name,
            precision="float32",
            signature=signature_of(reference),
            lowering=getattr(exported, "lowering", None),
            agreement=result,
            **freezing,
            held_out=True,  # nothing was calibrated
            labels=description.labels and list(description.labels),
            normalization=description.normalization and description.normalization.to_json(),
            training=description.training,
            signatures=runner.describe(),
            golden=_reference(runner, images),
            golden_file=file and _reference_file(runner, file, description.normalization),
            warmup=warmup.replay(path, runner.signatures),
            files=_checksums(path),
            **trained_precision(model, reference, images),
        )
        storage.write_json(path / MANIFEST, record)
    return SavedModel(path=target, manifest=record)


@contextlib.contextmanager
def _written(target):
    """Yields the path of a folder that becomes `target`. TensorFlow's errors of writing become OSErrors."""
    try:
        with storage.staged(target) as path:
            yield path
    except (tf.errors.ResourceExhaustedError, tf.errors.PermissionDeniedError, tf.errors.UnknownError) as error:
        raise OSError(f"{str(target)!r} cannot be written: {first_line(error)}") from error


def _target(folder, version):
    """The folder of the version, which must not exist yet."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"A SavedModel needs a folder. Received: the file {str(folder)!r}")
    version = next_version(folder) if version is None else version
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"version must be an int of at least 1. Received: version={version!r}")
    target = folder / str(version)
    if target.exists():
        raise FileExistsError(f"{str(target)!r} exists. The next free version is {next_version(folder)}")
    return target


def _description(model, labels, normalization, training, override, top):
    """What is known of the model: its labels and normalization are for `image_bytes`."""
    if type(top) is not int or top < 1:
        raise ValueError(f"top must be an int of at least 1. Received: top={top!r}")
    shape = model.inputs[0].shape[1:]
    description = describe(
        network=model.name,
        precision="float32",
        channels=shape[-1],
        classes=class_count(model),
        labels=labels,
        normalization=normalization,
        training=training,
        default=default_normalization(model),
        override=override,
    )
    if (labels is not None or normalization is not None) and not _takes_files(model, description):
        if None in (description.labels, description.normalization):
            given = "labels" if description.normalization is None else "normalization"
            raise ValueError(f"image_bytes needs labels and normalization, both of them. Received: {given} alone")
        raise ValueError(f"image_bytes needs images of a fixed size with 1 or 3 channels. Received: a model of {shape}")
    return description


def _takes_files(model, description):
    """Whether the SavedModel has the signature `image_bytes`."""
    shape = model.inputs[0].shape[1:]
    is_known = description.labels is not None and description.normalization is not None
    return is_known and len(shape) == 3 and None not in shape and shape[-1] in (1, 3)


def _write_graph(model, path, *, names, description, top):
    """Writes the SavedModel with every signature that is possible."""
    (images,) = model.inputs
    more, as_logits = {}, logits(model)
    if as_logits is not None:
        spec = tf.TensorSpec((None, *images.shape[1:]), images.dtype, name=images.name)
        more[LOGITS] = (lambda batch: {"logits": as_logits(batch)}, spec)
    with tempfile.TemporaryDirectory() as scratch:
        tables = []
        if description is not None:
            file = Path(scratch, LABELS_FILE)
            file.write_text("\n".join(description.labels), encoding="utf-8")
            serve, table = classify(
                lambda x: model(_as_input(x, images.dtype), training=False),
                shape=images.shape[1:],
                labels=file,
                normalization=description.normalization,
                top=min(top, len(description.labels)),
            )
            tables.append(table)
            more[IMAGE_BYTES] = (serve, tf.TensorSpec((None,), "string", name=IMAGE_BYTES))
        trace(model, path, names=names, more=more, tracked=tables)


def _as_input(pixels, dtype):
    """A tensor in the type of the input: rounded and clipped to integers."""
    return tf.saturate_cast(tf.round(pixels) if tf.as_dtype(dtype).is_integer else pixels, dtype)


def _compare(model, runner, images):
    """The agreement of a SavedModel with the Keras model. Raises ValueError if a signature disagrees."""
    _require_any_batch_size(model, runner, images[:1])
    outputs = runner(images)
    result = agreement(predict(model, images), outputs, as_logits=ends_in_softmax(model))
    require_equal(result, "SavedModel")
    if LOGITS in runner.signatures:
        softmax = tf.nn.softmax(runner(images, signature=LOGITS)["logits"]).numpy()
        require_equal(agreement(outputs, dict.fromkeys(outputs, softmax), as_logits=True), f"signature {LOGITS}")
    return result


def _require_any_batch_size(model, runner, image):
    """Raises ValueError if a model that was built for batches of one size computes something else for other sizes."""
    size = model.inputs[0].shape[0]
    if size is None:
        return
    other = 5 if size == 3 else 3
    expected = {name: np.repeat(values, other, axis=0) for name, values in predict(model, image).items()}
    try:
        require_equal(agreement(expected, runner(np.repeat(image, other, axis=0))), "SavedModel")
    except (tf.errors.OpError, ValueError) as error:
        rule = "A SavedModel must take batches of any size"
        raise ValueError(f"{rule}. Received: {model.name}, which computes with a batch size of {size}") from error


def _requests(runner, file):
    """The warm-up requests: one image for each signature.

    With se_resnet50 the first request takes 0.37 s and later ones 0.05 s. Larger batches need no separate warm-up.
    """
    ((name, images),) = runner.signatures[SIGNATURE].structured_input_signature[1].items()
    blank = tf.make_tensor_proto(0, images.dtype, _one_image(images.shape))  # the proto stores one value for all
    requests = [(signature, {name: blank}) for signature in (SIGNATURE, LOGITS) if signature in runner.signatures]
    return requests + ([(IMAGE_BYTES, {IMAGE_BYTES: tf.make_tensor_proto([file])})] if file else [])


def _one_image(shape):
    """The shape of a batch of one image."""
    return (1, *(size or FREE_SIZE for size in shape[1:]))


def _batching():
    """A BatchingParameters message: https://github.com/tensorflow/serving/blob/master/tensorflow_serving/batching."""
    sizes = "".join(f"allowed_batch_sizes: {size}\n" for size in BATCH_SIZES)
    # A request waits up to a millisecond for others, which is short compared with an inference on a CPU.
    return f"max_batch_size {{ value: {BATCH_SIZES[-1]} }}\nbatch_timeout_micros {{ value: 1000 }}\n{sizes}"


def _reference(runner, images):
    """The reference outputs, on uniform noise with the mean and standard deviation of the images."""
    mean, reach = float(images.mean()), math.sqrt(3) * float(images.std())
    return reference_outputs(
        runner, low=mean - reach, high=mean + reach, precision="float32", shape=_one_image(runner.input_shape)
    )


def _image_file(image, normalization):
    """A PNG file of a corner of a normalized image."""
    pixels = np.clip(np.rint(normalization.undo(image[:24, :24])), 0, 255)
    return tf.io.encode_png(pixels.astype("uint8")).numpy()


def _reference_file(runner, file, normalization):
    """The answer of `image_bytes` to a file, for the manifest. `serving_default` must give the same for its pixels."""
    _, *size, channels = runner.input_shape
    pixels = evaluation_image(tf.constant(file), size=size, channels=channels)[None].numpy()
    (expected,) = runner(normalization.apply(pixels)).values()
    answer = runner.signatures[IMAGE_BYTES](tf.constant([file]))
    scores = answer["scores"].numpy()
    expected = -np.sort(-expected)[:, : scores.shape[1]]
    require_equal(agreement({"scores": expected}, {"scores": scores}), f"signature {IMAGE_BYTES}")
    return {
        "base64": base64.b64encode(file).decode(),
        "classes": [name.decode() for name in answer["classes"][0].numpy()],
        "scores": [float(str(score)) for score in scores[0]],
    }


def _checksums(path):
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): storage.file_sha256(file) for file in files}


def _remove_xla(path):
    """Removes Keras' requests for XLA in grouped convolutions: TF Serving computes the same without XLA."""
    saved = saved_model_pb2.SavedModel.FromString(path.read_bytes())
    for graph in (meta.graph_def for meta in saved.meta_graphs):
        bodies = [node for function in graph.library.function for node in function.node_def]
        for holder in (*graph.node, *graph.library.function, *bodies):
            holder.attr.pop("_XlaMustCompile", None)
    path.write_bytes(saved.SerializeToString(deterministic=True))
