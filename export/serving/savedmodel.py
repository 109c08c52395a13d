"""SavedModels for TF Serving: `folder/<version>/`, whole or absent, compared with the Keras model before it appears."""

import base64
import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from se_keras import storage
from se_keras.errors import first_line
from se_keras.graph import functional
from se_keras.images import evaluation_image
from se_keras.storage import sha256

from ..description import LABELS_FILE, describe
from ..lowering import lower
from ..manifest import manifest, reference_outputs
from ..model import (
    _FREE_SIZE,
    SIGNATURE,
    check_images,
    class_count,
    ends_in_softmax,
    output_names,
    predict,
    require_equal,
    require_one_input,
    signature_of,
    trace,
)
from ..outputs import agreement, in_batches
from . import warmup
from .signatures import IMAGE_BYTES, LOGITS, classify, logits

# What TF Serving gathers requests into, where it is asked to. A batch of another size is filled up to the next.
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
_GRAPH, _MANIFEST = "saved_model.pb", "assets.extra/manifest.json"
_BATCHING = "batching_params.pbtxt"  # where TF Serving looks with --enable_per_model_batching_parameters


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """A SavedModel on the disk: its folder, `<target>/<version>`, and its manifest."""

    path: Path
    manifest: dict

    def runner(self):
        """The SavedModel, ready to run."""
        return SavedModelRunner(self.path)


class SavedModelRunner:
    """A SavedModel ready to run: `runner(images)` gives the outputs of its signature `serving_default`.

    Args:
        path: Its folder, that of a version.

    Raises:
        ValueError: If it cannot be loaded, or if the signature is missing or has several inputs.
    """

    def __init__(self, path):
        try:
            self._loaded = tf.saved_model.load(path)  # its variables live as long as this
        except Exception as error:  # protobuf, the checkpoint's reader and TensorFlow raise their own kinds
            raise ValueError(f"{str(path)!r} is not a SavedModel that can be loaded: {first_line(error)}") from error
        self.signatures = self._loaded.signatures
        if SIGNATURE not in self.signatures:
            raise ValueError(f"A SavedModel has the signature {SIGNATURE!r}. Received: {str(path)!r} with "
                             f"{', '.join(map(repr, self.signatures)) or 'none'}")  # fmt: skip
        inputs = list(self.signatures[SIGNATURE].structured_input_signature[1].items())
        if len(inputs) != 1 or inputs[0][1].shape.rank is None:
            raise ValueError(f"A SavedModel with one input of a known shape can be run. Received: {inputs}")
        ((self._name, self._input),) = inputs

    @property
    def input_shape(self):
        """Shape of the input, batch first; None where it is free."""
        return tuple(self._input.shape.as_list())

    @property
    def input_dtype(self):
        """Type of the input."""
        return np.dtype(self._input.dtype.as_numpy_dtype)

    def describe(self):
        """Names, shapes and types of what each signature takes and gives, for the manifest; None is free."""

        def tensors(specs):
            return {name: {"shape": x.shape.as_list(), "dtype": x.dtype.name} for name, x in sorted(specs.items())}

        return {
            name: {"inputs": tensors(serve.structured_input_signature[1]), "outputs": tensors(serve.structured_outputs)}
            for name, serve in sorted(self.signatures.items())
        }

    def __call__(self, images, *, signature=SIGNATURE):
        """Outputs of a signature for `images`, `(samples, height, width, channels)`: `{name: array}`."""
        serve, dtype = self.signatures[signature], self._input.dtype
        return in_batches(lambda batch: serve(**{self._name: tf.cast(batch, dtype)}), images, size=self.input_shape[0])


def to_savedmodel(
    model,
    folder,
    *,
    version=None,
    held_out=None,
    lowering=True,
    labels=None,
    normalization=None,
    top=5,
):
    """Writes a functional model as a SavedModel that TF Serving loads.

    Its signature `serving_default` takes the model's inputs by name (`images` in this project's networks) at any batch
    size and gives its outputs by name (`probabilities` behind a softmax; then the signature `logits` gives those). With
    `labels` and `normalization`, the signature `image_bytes` takes JPEG, PNG, GIF, BMP and WebP files and gives
    `classes` and `scores`. Nothing in it needs Keras, Python or XLA. Beside the model are requests that TF Serving
    replays while it loads it, and how it may batch requests (`batching_params.pbtxt`).

    Args:
        model: A functional Keras model.
        folder: The model's folder, which holds its versions: TF Serving's `base_path`.
        version: Number of the version; default: the next free one.
        held_out: Images to compare on, `(samples, height, width, channels)`; default: noise.
        lowering: Whether to `lower` the model first.
        labels: Names of the classes, in the order of the outputs.
        normalization: `(mean, std)`, each a number or one for each channel: the model takes (pixel - mean) / std of
            pixels in 0 to 255.
        top: Number of classes that `image_bytes` gives, if there are as many.

    Returns:
        A `SavedModel`. The manifest is also in `<version>/assets.extra/manifest.json`.

    Raises:
        FileExistsError: If the version exists.
        ValueError: If an argument is not one of the above, or if the SavedModel disagrees with the model; then nothing
            of it is left.
        TypeError: If the model is not functional, or if labels or normalization are not of these types.
        OSError: If the folder cannot be written or is full.
    """
    model, folder = functional(model), Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"A SavedModel needs a folder. Received: the file {str(folder)!r}")
    version = next_version(folder) if version is None else version
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"version must be an int of at least 1. Received: version={version!r}")
    target = folder / str(version)
    if target.exists():
        raise FileExistsError(f"{str(target)!r} exists. The next free version is {next_version(folder)}")

    require_one_input(model)
    about = _about(model, labels, normalization, top)
    exported = lower(model) if lowering else model
    images = check_images(model) if held_out is None else np.asarray(held_out, dtype="float32")
    if (
        images.ndim != 4
        or not len(images)
        or any(b not in (a, None) for a, b in zip(images.shape, model.input_shape, strict=True))
    ):
        raise ValueError(f"held_out must be images for {model.input_shape}. Received: {images.shape}")
    with storage.staged(target) as path:
        _write_graph(exported, path, names=output_names(model), about=about, top=top)
        _forget_xla(path / _GRAPH)
        runner = SavedModelRunner(path)
        outputs = runner(images)
        result = agreement(predict(model, images), outputs, as_logits=ends_in_softmax(model))
        require_equal(result, "SavedModel")
        if LOGITS in runner.signatures:
            softmax = tf.nn.softmax(runner(images, signature=LOGITS)["logits"])
            require_equal(agreement(outputs, dict.fromkeys(outputs, softmax), as_logits=True), f"signature {LOGITS}")
        file = about.labels and _picture(images[0], about.normalization)
        warmup.write(path, model.name, _requests(runner, file))
        (path / _BATCHING).write_text(_batching())
        record = manifest(
            network=model.name,
            precision="float32",
            signature=signature_of(model),
            lowering=getattr(exported, "lowering", None),
            agreement=result,
            held_out=True,  # nothing was calibrated
            signatures=runner.describe(),
            golden=_golden(runner, images),
            golden_file=file and _golden_file(runner, file, about.normalization),
            warmup=warmup.replay(path, runner.signatures),
            files=_checksums(path),
        )
        storage.write_json(path / _MANIFEST, record)
    return SavedModel(path=target, manifest=record)


def _about(model, labels, normalization, top):
    """What `image_bytes` needs, checked."""
    if (labels is None) != (normalization is None):
        given = "labels" if normalization is None else "normalization"
        raise ValueError(f"image_bytes needs labels and normalization, both of them. Received: {given} alone")
    if type(top) is not int or top < 1:
        raise ValueError(f"top must be an int of at least 1. Received: top={top!r}")
    shape = model.inputs[0].shape[1:]
    if labels is not None and (len(shape) != 3 or None in shape or shape[-1] not in (1, 3)):
        raise ValueError(f"image_bytes needs images of a fixed size with 1 or 3 channels. Received: a model of {shape}")
    about = {"network": model.name, "precision": "float32", "channels": shape[-1], "classes": class_count(model)}
    return describe(**about, labels=labels, normalization=normalization)


def _write_graph(model, path, *, names, about, top):
    """The SavedModel itself, with every signature that the model allows."""
    (images,) = model.inputs
    more, as_logits = {}, logits(model)
    if as_logits is not None:
        spec = tf.TensorSpec((None, *images.shape[1:]), images.dtype, name=images.name)
        more[LOGITS] = (lambda batch: {"logits": as_logits(batch)}, spec)
    with tempfile.TemporaryDirectory() as scratch:
        tables = []
        if about.labels is not None:
            file = Path(scratch, LABELS_FILE)
            file.write_text("\n".join(about.labels), encoding="utf-8")
            size, how = images.shape[1:3], {"normalization": about.normalization, "channels": images.shape[-1]}
            top = min(top, len(about.labels))
            serve, table = classify(lambda x: model(x, training=False), size=size, labels=file, top=top, **how)
            tables.append(table)
            more[IMAGE_BYTES] = (serve, tf.TensorSpec((None,), "string", name=IMAGE_BYTES))
        trace(model, path, names=names, more=more, tracked=tables)


def _requests(runner, file):
    """What TF Serving replays while it loads: an image for each signature. More in a batch would add nothing.

    The first request takes se_resnet50 0.37 s, later ones 0.05 s, and those of any batch size the same after one alone.
    """
    ((name, images),) = runner.signatures[SIGNATURE].structured_input_signature[1].items()
    blank = tf.make_tensor_proto(0.0, images.dtype, _one(images.shape))  # one value stands for all: a few bytes
    requests = [(signature, {name: blank}) for signature in (SIGNATURE, LOGITS) if signature in runner.signatures]
    return requests + ([(IMAGE_BYTES, {IMAGE_BYTES: tf.make_tensor_proto([file])})] if file else [])


def _one(shape):
    """The shape of a batch of one image."""
    _, *image = shape
    return (1, *(size or _FREE_SIZE for size in image))


def _batching():
    """A BatchingParameters message: https://github.com/tensorflow/serving/blob/master/tensorflow_serving/batching.

    A first request waits a millisecond for others: little beside an inference on a processor.
    """
    sizes = "".join(f"allowed_batch_sizes: {size}\n" for size in BATCH_SIZES)
    return f"max_batch_size {{ value: {BATCH_SIZES[-1]} }}\nbatch_timeout_micros {{ value: 1000 }}\n{sizes}"


def _golden(runner, images):
    """The golden output on noise as loud as the images that were compared on."""
    middle, reach = float(images.mean()), math.sqrt(3) * float(images.std())
    return reference_outputs(
        runner, low=middle - reach, high=middle + reach, precision="float32", shape=_one(runner.input_shape)
    )


def _picture(image, normalization):
    """A corner of an image, turned back into pixels, as a PNG file."""
    return tf.io.encode_png(normalization.undo(image[:24, :24])).numpy()


def _golden_file(runner, file, normalization):
    """What `image_bytes` makes of a file, for the manifest: the same as `serving_default` makes of its pixels."""
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
    return {str(file.relative_to(path)): sha256(file.read_bytes()) for file in files}


def load_savedmodel(folder):
    """Finds a SavedModel on the disk; a foreign one, without our manifest, is named after its folder.

    Args:
        folder: A version's, with `saved_model.pb` in it, or TF Serving's `base_path`: then its highest version.

    Raises:
        FileNotFoundError: If there is no SavedModel.
        ValueError: If it is not the one that its manifest speaks of.
    """
    folder = Path(folder)
    versions = [path.parent for path in folder.glob(f"*/{_GRAPH}") if path.parent.name.isdecimal()]
    if (folder / _GRAPH).is_file():
        path = folder
    elif versions:
        path = max(versions, key=lambda version: int(version.name))
    else:
        raise FileNotFoundError(f"There is no SavedModel in {str(folder)!r}: neither {_GRAPH} nor a version with one")
    if not (path / _MANIFEST).is_file():
        return SavedModel(path=path, manifest={"network": folder.name, "precision": "unknown"})
    try:
        record = json.loads((path / _MANIFEST).read_text())
        expected = dict(record["files"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{str(path / _MANIFEST)!r} is not the manifest of a SavedModel") from None
    changed = sorted(name for name, known in expected.items()
                     if not (path / name).is_file() or sha256((path / name).read_bytes()) != known)  # fmt: skip
    if changed:
        raise ValueError(f"{str(path)!r} is not what was exported: {', '.join(changed)} differs from its manifest")
    return SavedModel(path=path, manifest=record)


def next_version(folder):
    """The number after the highest version in a model's folder; 1 in an empty or missing one."""
    folder = Path(folder)
    versions = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()] if folder.exists() else []
    return max(versions, default=0) + 1


def _forget_xla(path):
    """Keras compiles grouped convolutions with XLA, which TF Serving has switched off; TensorFlow's own kernel does."""
    saved = saved_model_pb2.SavedModel.FromString(path.read_bytes())
    for graph in (meta.graph_def for meta in saved.meta_graphs):
        bodies = [node for function in graph.library.function for node in function.node_def]
        for holder in (*graph.node, *graph.library.function, *bodies):
            holder.attr.pop("_XlaMustCompile", None)
    path.write_bytes(saved.SerializeToString(deterministic=True))
