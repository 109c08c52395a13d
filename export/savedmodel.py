"""SavedModels for TF Serving: `folder/<version>/`, whole or absent, compared with the Keras model before it appears."""

from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from se_keras import storage
from se_keras.export.lower import lower
from se_keras.export.manifest import manifest, sha256
from se_keras.export.verify import agreement, in_batches, logit_range, noise
from se_keras.graph import functional, producer, structures

SIGNATURE = "serving_default"
# Ranges of logits that probabilities tell: float32 resolves those of about 1e-3 to 1e-5 of the first, and 1e-30 is the
# least that is compared.
_TELLING = (0.01, 60)


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """A SavedModel on the disk: its folder, `<target>/<version>`, and its manifest."""

    path: Path
    manifest: dict


def to_savedmodel(model, folder, *, version=None, held_out=None, lowering=True):
    """Writes a functional model as a SavedModel that TF Serving loads.

    Its signature `serving_default` takes the model's inputs by name (`images` in this project's networks) at any batch
    size and gives its outputs by name (`probabilities` behind a softmax). Nothing in it needs Keras, Python or XLA.

    Args:
        model: A functional Keras model.
        folder: The model's folder, which holds its versions: TF Serving's `base_path`.
        version: Number of the version; default: the next free one.
        held_out: Images to compare on, `(samples, height, width, channels)`; default: noise.
        lowering: Whether to `lower` the model first.

    Returns:
        A `SavedModel`. The manifest is also in `<version>/assets.extra/manifest.json`.

    Raises:
        FileExistsError: If the version exists.
        ValueError: If the SavedModel disagrees with the model; then nothing of it is left.
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
    exported = lower(model) if lowering else model
    images = check_images(model) if held_out is None else np.asarray(held_out, dtype="float32")
    if (
        images.ndim != 4
        or not len(images)
        or any(b not in (a, None) for a, b in zip(images.shape, model.input_shape, strict=True))
    ):
        raise ValueError(f"held_out must be images for {model.input_shape}. Received: {images.shape}")
    with storage.staged(target) as path:
        trace(exported, path, names=output_names(model))
        _forget_xla(path / "saved_model.pb")
        serve = tf.saved_model.load(path).signatures[SIGNATURE]
        (name,) = input_names(exported)
        actual = in_batches(lambda batch: serve(**{name: tf.constant(batch)}), images)
        result = agreement(predict(model, images), actual)
        require_equal(result, "SavedModel")
        files = sorted(file for file in path.rglob("*") if file.is_file())
        record = manifest(
            network=model.name,
            precision="float32",
            signature=signature(model),
            lowering=getattr(exported, "lowering", None),
            agreement=result,
            held_out=True,  # nothing was calibrated
            files={str(file.relative_to(path)): sha256(file.read_bytes()) for file in files},
        )
        extra = path / "assets.extra"
        extra.mkdir(exist_ok=True)
        storage.write_json(extra / "manifest.json", record)
    return SavedModel(path=target, manifest=record)


def next_version(folder):
    """The number after the highest version in a model's folder; 1 in an empty or missing one."""
    folder = Path(folder)
    versions = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()] if folder.exists() else []
    return max(versions, default=0) + 1


def trace(model, folder, *, names=None, batch_shape=None):
    """Writes a functional model as a plain SavedModel with the signature `serving_default`.

    `names` are those of the outputs, which lowering may have changed; default: the model's. `batch_shape` fixes the
    shape of a single input; default: the model's own at any batch size.
    """

    names = names or output_names(model)

    def serve(*images):
        outputs = model(keras.tree.pack_sequence_as(structures(model)[0], list(images)), training=False)
        return dict(zip(names, keras.tree.flatten(outputs), strict=True))

    archive = keras.export.ExportArchive()
    archive.track(model)
    specs = [
        tf.TensorSpec(batch_shape or (None, *x.shape[1:]), x.dtype, name=name)
        for x, name in zip(model.inputs, input_names(model), strict=True)
    ]
    archive.add_endpoint(SIGNATURE, serve, input_signature=specs)
    archive.write_out(str(folder), verbose=False)


def _forget_xla(path):
    """Keras compiles grouped convolutions with XLA, which TF Serving has switched off; TensorFlow's own kernel does."""
    saved = saved_model_pb2.SavedModel.FromString(path.read_bytes())
    for graph in (meta.graph_def for meta in saved.meta_graphs):
        bodies = [node for function in graph.library.function for node in function.node_def]
        for holder in (*graph.node, *graph.library.function, *bodies):
            holder.attr.pop("_XlaMustCompile", None)
    path.write_bytes(saved.SerializeToString(deterministic=True))


def input_names(model):
    """Names of the inputs, as Keras has them."""
    return [x.name for x in model.inputs]


def output_names(model):
    """Names of the outputs: `probabilities` for a single one behind a softmax, else those that Keras has."""
    if len(model.outputs) == 1:
        layer = producer(model.outputs[0])
        softmax = getattr(layer, "activation", None) is keras.activations.softmax
        if softmax or isinstance(layer, keras.layers.Softmax):
            return ["probabilities"]
    return list(model.output_names)


def classes(model):
    """Number of the classes; None for a model that does not end with one vector."""
    shapes = [x.shape for x in model.outputs]
    return shapes[0][-1] if len(shapes) == 1 and len(shapes[0]) == 2 else None


def signature(model, *, batch_shape=None):
    """Names, shapes and types of a model's input and outputs, for the manifest; None is free."""
    images = keras.KerasTensor(batch_shape or (None, *model.inputs[0].shape[1:]), dtype=model.inputs[0].dtype)
    outputs = keras.tree.flatten(model.compute_output_spec(images))

    def describe(names, tensors):
        return {name: {"shape": list(x.shape), "dtype": str(x.dtype)} for name, x in zip(names, tensors, strict=True)}

    return {"inputs": describe(input_names(model), [images]), "outputs": describe(output_names(model), outputs)}


def check_images(model, *, shape=None, samples=4, free_size=64):
    """Noise to compare a model and its export on, so loud that the outputs tell, and no louder than the model bears.

    In inference nothing has normalized the activations of an untrained network yet. Loud images saturate the gates of
    a deep one, and a difference of 1e-6 becomes one of 1; quiet ones are lost in one without shortcuts, whose gates
    halve them at each block, and all probabilities are equal. A trained network bears standard normal noise.

    Args:
        model: A Keras model with one input.
        shape: `(height, width, channels)`; default: the model's own, free sizes being `free_size`.
        samples: Number of images.
        free_size: See `shape`.
    """
    shape = shape or [size or free_size for size in model.inputs[0].shape[1:]]
    normal = noise(shape, samples=samples)
    exponent, images = 0, normal
    for _ in range(8):
        one, nudged = predict(model, images[:1]), predict(model, images[:1] * np.float32(1 + 1e-6))
        finite = all(np.isfinite(x).all() for x in one.values())
        logits = logit_range(one) if finite else np.inf
        quiet = finite and agreement(one, nudged).max_error < 1e-5
        if quiet and (logits is None or _TELLING[0] < logits < _TELLING[1]):
            return images
        exponent += 1 if logits is not None and logits <= _TELLING[0] else -1
        images = normal * np.float32(10.0**exponent)
    return normal


def predict(model, images):
    """Outputs of a Keras model in inference: `{name: array}`."""
    names = output_names(model)

    def run(batch):
        outputs = keras.tree.flatten(model(batch, training=False))
        return dict(zip(names, map(keras.ops.convert_to_numpy, outputs), strict=True))

    return in_batches(run, images)


def require_one_input(model):
    """Raises ValueError if a model has several inputs."""
    if len(model.inputs) != 1:
        raise ValueError(f"A model with one input can be exported. Received: {model.name} with {len(model.inputs)}")


def require_equal(result, what):
    """Raises ValueError if an export in float32 is not the model that it was made from."""
    # Sums in another order differ by about 1e-6; a wrong graph or a lost weight by more than 1e-2.
    if result.max_error > 1e-3:
        raise ValueError(f"The {what} disagrees with the Keras model: {result}. Nothing was written")
