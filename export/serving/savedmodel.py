"""A SavedModel on disk: its folder and its manifest, found and run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import tensorflow as tf

from se_keras import storage
from se_keras.errors import first_line, translated
from se_keras.normalization import Normalization, NormalizationRecord
from se_keras.records import read_json
from se_keras.typing import Array, FilePath, Json, Outputs

from ..description import Manifest, Metadata, Signature
from ..model import (
    SIGNATURE,
)
from ..outputs import as_integers, in_batches

GRAPH, MANIFEST = "saved_model.pb", "assets.extra/manifest.json"


class ReferenceFile(TypedDict):
    """An image file and the answer of `image_bytes`."""

    base64: str
    classes: list[str]
    scores: list[float]


class FolderManifest(Manifest):
    """The manifest of a SavedModel, as far as it is read."""

    files: dict[str, str]
    labels: NotRequired[list[str] | None]
    normalization: NotRequired[NormalizationRecord | None]
    training: NotRequired[dict[str, Any] | None]
    signatures: NotRequired[dict[str, Signature]]
    golden_file: NotRequired[ReferenceFile | None]


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """A SavedModel on disk: its folder, `<target>/<version>`, and its manifest."""

    path: Path
    manifest: Json

    @property
    def about(self) -> Metadata:
        """What its manifest says of its labels, normalization and training."""
        labels, normalization = (self.manifest.get(key) for key in ("labels", "normalization"))
        return Metadata(
            network=self.manifest["network"],
            precision=self.manifest["precision"],
            labels=labels and tuple(labels),
            normalization=normalization and Normalization(*(tuple(normalization[key]) for key in ("mean", "std"))),
            training=self.manifest.get("training"),
        ).completed()

    def runner(self) -> "SavedModelRunner":
        """Loads the SavedModel to run it."""
        return SavedModelRunner(self.path)


class SavedModelRunner:
    """A loaded SavedModel: `runner(images)` gives the outputs of its signature `serving_default`, with one input.

    `path` is the folder of a version. Raises ValueError if it cannot be loaded, or has no such signature.
    """

    def __init__(self, path: FilePath):
        try:
            self._loaded: Any = tf.saved_model.load(path)  # owns the variables
        except Exception as error:  # protobuf, the reader of checkpoints and TensorFlow raise their own types
            raise ValueError(f"{str(path)!r} is not a SavedModel that can be loaded: {first_line(error)}") from error
        self.signatures = self._loaded.signatures
        if SIGNATURE not in self.signatures:
            found = ", ".join(map(repr, self.signatures)) or "none"
            raise ValueError(f"A SavedModel has the signature {SIGNATURE!r}. Received: {str(path)!r} with {found}")
        inputs = list(self.signatures[SIGNATURE].structured_input_signature[1].items())
        if len(inputs) != 1 or inputs[0][1].shape.rank is None:
            raise ValueError(f"A SavedModel with one input of a known shape can be run. Received: {inputs}")
        ((self._name, self._input),) = inputs

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        """Shape of the input, batch first. None where a size is free."""
        return tuple(self._input.shape.as_list())

    @property
    def input_dtype(self) -> np.dtype[Any]:
        """Type of the input."""
        return np.dtype(self._input.dtype.as_numpy_dtype)

    def describe(self) -> Json:
        """Names, shapes and types of the inputs and outputs of each signature, for the manifest."""

        def tensors(specs):
            return {name: {"shape": x.shape.as_list(), "dtype": x.dtype.name} for name, x in sorted(specs.items())}

        return {
            name: {"inputs": tensors(serve.structured_input_signature[1]), "outputs": tensors(serve.structured_outputs)}
            for name, serve in sorted(self.signatures.items())
        }

    def __call__(self, images: Array, *, signature: str = SIGNATURE) -> Outputs:
        """Outputs of a signature for `images`, `(samples, height, width, channels)`: `{name: array}`."""
        serve, dtype = self.signatures[signature], self._input.dtype
        images = as_integers(images, dtype.name)

        def run(batch: Array) -> Outputs:
            with translated(f"The signature {signature!r} of the SavedModel cannot be run"):
                return serve(**{self._name: tf.cast(batch, dtype)})

        return in_batches(run, images, size=self.input_shape[0])


def load_savedmodel(folder: FilePath) -> SavedModel:
    """Finds a SavedModel on disk. If it has no manifest, as from other programs, it is named after its folder.

    `folder` is the folder of one version, which contains `saved_model.pb`, or of all versions: the highest is used.

    Raises:
        FileNotFoundError: If there is no SavedModel.
        ValueError: If its files differ from its manifest.
    """
    folder = Path(folder)
    versions = [path.parent for path in folder.glob(f"*/{GRAPH}") if path.parent.name.isdecimal()]
    if (folder / GRAPH).is_file():
        path = folder
    elif versions:
        path = max(versions, key=lambda version: int(version.name))
    else:
        raise FileNotFoundError(f"There is no SavedModel in {str(folder)!r}: neither {GRAPH} nor a version with one")
    if not (path / MANIFEST).is_file():
        return SavedModel(path=path, manifest={"network": folder.name, "precision": "unknown"})
    record = read_json(path / MANIFEST, FolderManifest, what="the manifest of a SavedModel")
    expected = record["files"]
    files = {name: path / name for name in sorted(expected)}
    changed = [x for x, file in files.items() if not file.is_file() or storage.file_sha256(file) != expected[x]]
    if changed:
        raise ValueError(f"{str(path)!r} is not what was exported: {', '.join(changed)} differs from its manifest")
    return SavedModel(path=path, manifest=record)


def next_version(folder: FilePath) -> int:
    """The number after the highest version in the folder of a model. 1 if the folder is empty or missing."""
    folder = Path(folder)
    versions = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()] if folder.exists() else []
    return max(versions, default=0) + 1
