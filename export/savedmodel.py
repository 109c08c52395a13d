"""SavedModels for TF Serving: `folder/<version>/`, whole or absent, compared with the Keras model before it appears."""

import json
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from se_keras import storage
from se_keras.errors import first_line
from se_keras.export.agreement import agreement, in_batches, logit_range, noise
from se_keras.export.lower import lower
from se_keras.export.manifest import manifest, sha256
from se_keras.graph import functional, gives_probabilities, producer, structures

SIGNATURE = "serving_default"
_GRAPH, _MANIFEST = "saved_model.pb", "assets.extra/manifest.json"
# Ranges of logits that probabilities tell: float32 resolves those of about 1e-3 to 1e-5 of the first, and 1e-30 is the
# least that is compared.
_TELLING = (0.01, 60)


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """A SavedModel on the disk: its folder, `<target>/<version>`, and its manifest."""

    path: Path
    manifest: dict

    def runner(self):
        """The SavedModel, ready to run."""
        return Runner(self.path)


class Runner:
    """A SavedModel ready to run by its signature `serving_default`: `runner(images)` gives the outputs.

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
        signatures = self._loaded.signatures
        if SIGNATURE not in signatures:
            raise ValueError(f"A SavedModel has the signature {SIGNATURE!r}. Received: {str(path)!r} with "
                             f"{', '.join(map(repr, signatures)) or 'none'}")  # fmt: skip
        self._serve = signatures[SIGNATURE]
        inputs = list(self._serve.structured_input_signature[1].items())
        if len(inputs) != 1 or inputs[0][1].shape.rank is None:
            raise ValueError(f"A SavedModel with one input of a known shape can be run. Received: {inputs}")
        ((self._name, self._input),) = inputs

    @property
    def input_shape(self):
        """Shape of the input, batch first; None where it is free."""
        return tuple(self._input.shape.as_list())

    def __call__(self, images):
        """Outputs for `images`, `(samples, height, width, channels)`: `{name: array}`."""
        dtype = self._input.dtype
        return in_batches(
            lambda batch: self._serve(**{self._name: tf.cast(batch, dtype)}), images, size=self.input_shape[0]
        )


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
        _forget_xla(path / _GRAPH)
        result = agreement(predict(model, images), Runner(path)(images))
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
        storage.write_json(path / _MANIFEST, record)
    return SavedModel(path=target, manifest=record)


def load(folder):
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


def trace(model, folder, *, names=None, batch_shape=None):
    """Writes a functional model as a plain SavedModel with the signature `serving_default`.

    `names` are those of the outputs, which lowering may have changed; default: the model's. `batch_shape` fixes the
    shape of a single input; default: the model's own at any batch size.
    """

    names = names or output_names(model)
    broken = [layer.name for layer in model.layers if not all(np.isfinite(w).all() for w in layer.get_weights())]
    if broken:
        raise ValueError(f"The weights of {model.name} are not finite: {', '.join(broken)}")

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
    if len(model.outputs) == 1 and gives_probabilities(producer(model.outputs[0])):
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
