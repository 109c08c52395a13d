"""A LiteRT file: its bytes and its manifest, saved, loaded and run."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from se_keras import storage
from se_keras.errors import translated
from se_keras.records import read_json
from se_keras.storage import sha256
from se_keras.typing import Array, FilePath, Json, Outputs

from ..description import Manifest
from ..outputs import FREE_SIZE, as_integers, in_batches
from . import metadata


@dataclass(frozen=True, kw_only=True)
class LiteRTModel:
    """A .tflite file and its manifest, with its signature, provenance and agreement with the Keras model."""

    content: bytes
    manifest: Json

    def save(self, path: FilePath) -> None:
        """Writes the file, and its manifest to `<path>.json`: `load_litert` reads both or neither at any time.

        Meanwhile the manifest has the entry `replaces`, with the manifest of the file that was there before.

        Raises:
            ValueError: If `path` does not end in .tflite.
            OSError: If it cannot be written, or if another process writes it for a minute.
        """
        path = Path(path)
        if path.suffix != ".tflite":
            raise ValueError(f"A LiteRT file's name ends in .tflite. Received: {str(path)!r}")
        manifest, record = _manifest_path(path), storage.as_json(self.manifest)
        with storage.locked(path.with_name(f".{path.name}.lock"), timeout=60):
            first = storage.as_json(self.manifest | {"replaces": _identity(path)}) if path.exists() else record
            storage.write_in_order([(manifest, first), (path, self.content), (manifest, record)])

    def runner(self, *, threads: int = 1) -> "LiteRTRunner":
        """The file, ready to run."""
        return LiteRTRunner(self.content, threads=threads)


class FileManifest(Manifest):
    """The manifest of a LiteRT file, as far as it is read."""

    sha256: str
    replaces: NotRequired["Replaced"]


class Replaced(TypedDict):
    """The file that a save replaces, and its manifest: valid until then."""

    sha256: str
    manifest: FileManifest | None


class LiteRTRunner:
    """A LiteRT file that runs on the CPU with XNNPACK: `runner(images)` gives the outputs.

    A file of another program may leave the size of the images free: it runs at the size of the images that it is given.

    Args:
        content: The content of the file.
        threads: Number of threads.

    Raises:
        ValueError: If this is not a LiteRT file with one input, or if it needs operators that are not built in.
    """

    def __init__(self, content: bytes, *, threads: int = 1):
        check_threads(threads)
        self.content = content
        with translated("Not a LiteRT file that can be run here"):
            self._interpreter = Interpreter(model_content=content, num_threads=threads)
            inputs = self._interpreter.get_input_details()
            if len(inputs) == 1 and None in (free := _free_shape(inputs[0])):
                # At the interpreter's own size, 1, many networks cannot be prepared.
                shape = [size or (FREE_SIZE if axis else 1) for axis, size in enumerate(free)]
                self._interpreter.resize_tensor_input(inputs[0]["index"], shape)
            self._interpreter.allocate_tensors()
        if len(inputs) != 1:
            raise ValueError(f"Only LiteRT files with one input can be run. Received: one with {len(inputs)}")
        (self._input,) = self._interpreter.get_input_details()
        signature = next(iter(self._interpreter.get_signature_list()), None)  # other programs' files may have none
        if signature:
            outputs = self._interpreter.get_signature_runner(signature).get_output_details()
        else:
            outputs = {detail["name"]: detail for detail in self._interpreter.get_output_details()}
        self._outputs = dict(outputs)

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        """Shape of the input, batch first. None where a size is free."""
        return _free_shape(self._input)

    @property
    def has_quantized_outputs(self) -> bool:
        """Whether an output is quantized. Quantized probabilities have no logits."""
        return any(detail["quantization"][0] for detail in self._outputs.values())

    @property
    def takes_integers(self) -> bool:
        """Whether images are integers. The integers of a quantized input stand for other values."""
        return self.input_dtype.kind in "iu" and self._input["quantization"] in ((0, 0), (1, 0))

    @property
    def input_dtype(self) -> np.dtype[Any]:
        """Type of the input."""
        return np.dtype(self._input["dtype"])

    @property
    def output_dtypes(self) -> dict[str, np.dtype[Any]]:
        """Types of the outputs by name."""
        return {name: np.dtype(detail["dtype"]) for name, detail in self._outputs.items()}

    def typed(self, signature: Json) -> Json:
        """The signature of a Keras model with the types of this file, and scale and zero point of its integers."""
        inputs = {name: {**entry, **_type(self._input)} for name, entry in signature["inputs"].items()}
        outputs = {name: {**entry, **_type(self._outputs[name])} for name, entry in signature["outputs"].items()}
        return {"inputs": inputs, "outputs": outputs}

    def __call__(self, images: Array) -> Outputs:
        """Outputs for `images`, `(samples, height, width, channels)`: `{name: array}`.

        A file with an integer input takes its integers, or the float images that they stand for, which are rounded.
        Integer outputs are returned as the float values that they stand for.
        """

        def run(batch: Array) -> Outputs:
            with translated("The LiteRT file cannot be run"):
                self.prepare(batch)()
            return {
                name: dequantized(self._interpreter.get_tensor(detail["index"]), detail)
                for name, detail in self._outputs.items()
            }

        return in_batches(run, images, size=self.input_shape[0] or 1)

    def typed_images(self, images: Array) -> Array:
        """Images in the type of the input. Integers stand for the float images, which are rounded."""
        return quantized(np.asarray(images), self._input)

    def prepare(self, images: Array) -> Callable[[], None]:
        """Sets the input, and returns the function that runs the file, for benchmarks.

        Raises:
            ValueError: If the file does not take images of this shape.
        """
        images = self.typed_images(images)
        if None in self.input_shape and images.shape != tuple(self._input["shape"]):
            self._resize(images.shape)
        self._interpreter.set_tensor(self._input["index"], images)
        return self._interpreter.invoke

    def _resize(self, shape: tuple[int, ...]) -> None:
        """Prepares a file that leaves the size of the images free to take this shape."""
        try:
            self._interpreter.resize_tensor_input(self._input["index"], shape, strict=True)
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:  # the interpreter's text may be that of an earlier error
            rule = f"Images must have a shape that the file takes, {self.input_shape}"
            raise ValueError(f"{rule}. Received: {shape}") from error
        (self._input,) = self._interpreter.get_input_details()

    def undelegated(self) -> list[str]:
        """Names of the operators that are not delegated to XNNPACK: they run on slow kernels."""
        outputs = [output["index"] for output in self._interpreter.get_output_details()]
        return undelegated(self._interpreter._get_ops_details(), outputs)


def undelegated(operators: Sequence[Mapping[str, Any]], outputs: Sequence[int]) -> list[str]:
    """Names of the operators that an interpreter executes and that are not delegated to XNNPACK.

    Args:
        operators: What `Interpreter._get_ops_details()` gives: delegates come last, and replace other operators.
        outputs: Numbers of the output tensors.
    """
    produced_by = {}
    for index, operator in enumerate(operators):
        produced_by |= {int(tensor): index for tensor in operator["outputs"]}
    needed, executed = list(outputs), set()
    while needed:
        index = produced_by.get(int(needed.pop()))
        if index is not None and index not in executed:
            executed.add(index)
            needed += [int(tensor) for tensor in operators[index]["inputs"] if tensor >= 0]
    return sorted(name for index in executed if (name := operators[index]["op_name"]) != "DELEGATE")


def plain_interpreter(content: bytes) -> Interpreter:
    """LiteRT's interpreter without XNNPACK: it shows the operators and tensors as they are in the file."""
    return Interpreter(
        model_content=content, experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    )


def _free_shape(tensor: Json) -> tuple[int | None, ...]:
    """Shape of a tensor, with None where the file leaves a size free. The interpreter's own shape has 1 there."""
    return tuple(None if size < 0 else size for size in tensor["shape_signature"].tolist())


def _type(tensor: Json) -> Json:
    scale, zero_point = tensor["quantization"]
    quantization = {"scale": float(scale), "zero_point": int(zero_point)} if scale else {}
    return {"dtype": np.dtype(tensor["dtype"]).name} | quantization


def quantized(values: Array, tensor: Json) -> Array:
    """Float values in the type of a tensor; values that have this type already are not changed."""
    scale, zero_point = tensor["quantization"]
    if scale and values.dtype != tensor["dtype"]:
        values = np.rint(values / scale) + zero_point
    return as_integers(values, tensor["dtype"]).astype(tensor["dtype"])


def dequantized(values: Array, tensor: Json) -> Array:
    """The values of a tensor as floats."""
    scale, zero_point = tensor["quantization"]
    return (values.astype("float32") - zero_point) * np.float32(scale) if scale else values


def check_threads(threads: Any) -> None:
    """Raises ValueError if `threads` is not an int of 1 to 1024."""
    if type(threads) is not int or not 1 <= threads <= 1024:
        raise ValueError(f"threads must be an int of 1 to 1024. Received: threads={threads!r}")


def load_litert(path: FilePath) -> LiteRTModel:
    """Reads a .tflite file and the manifest next to it.

    Without a manifest, name and precision of the network come from the metadata in the file, or from its file name.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a LiteRT file, or not the one that its manifest describes.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no LiteRT file {str(path)!r}")
    content, record = _read(path)
    if content[4:8] != b"TFL3":
        raise ValueError(f"{str(path)!r} is not a LiteRT file")
    if record is None:
        with translated(repr(str(path))):
            metadata.check(content)  # a damaged file is not run
            LiteRTRunner(content)
            about = metadata.read(content)
        network, precision = (about.network, about.precision) if about else (path.stem, "unknown")
        return LiteRTModel(content=content, manifest={"network": network, "precision": precision})
    return LiteRTModel(content=content, manifest=record)


def _read(path: Path) -> tuple[bytes, Json | None]:
    """A file and its manifest, or None. If they do not belong together, they may just have been replaced: once more."""
    manifest, before = _manifest_path(path), None
    while True:
        now = [(x.stat().st_ino, x.stat().st_mtime_ns) for x in (path, manifest) if x.exists()]
        content = path.read_bytes()
        if not manifest.is_file():
            return content, None
        record = read_json(manifest, FileManifest, what="the manifest of a LiteRT file")
        # A file with a flipped or missing byte may load and run. Only the checksum shows it.
        checksum, replaces = sha256(content), record.pop("replaces", None)
        if record["sha256"] == checksum:
            return content, record
        if replaces and replaces["sha256"] == checksum:
            return content, replaces["manifest"]
        if now == before:
            raise ValueError(f"{str(path)!r} is not the file that was exported: its SHA-256 is not its manifest's")
        before = now


def _identity(path: Path) -> Json:
    """What a manifest says of the file that is there while another is saved."""
    content, record = path.read_bytes(), None
    with contextlib.suppress(ValueError):  # the manifest may be damaged
        content, record = _read(path)
    return {"sha256": sha256(content), "manifest": record}


def _manifest_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")
