"""The content of a .tflite file, and a comparison of the file and its outputs with its manifest."""

import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from se_keras.errors import translated
from se_keras.storage import sha256
from se_keras.typing import FilePath, Json

from ..description import Metadata, reference_error
from . import metadata
from .file import LiteRTModel, load_litert, plain_interpreter
from .flatbuffer import strided_pointwise
from .packing import schema

_OPERATORS = {code: name for name, code in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
_TYPES = {code: name.lower() for name, code in vars(schema.TensorType).items() if not name.startswith("_")}


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """An input or output. If it has a scale, its integers stand for (value - zero_point) * scale.

    A size of the shape is None if the file leaves it free.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str
    scale: float | None
    zero_point: int | None


@dataclass(frozen=True, kw_only=True)
class ReferenceCheck:
    """The error of the file's outputs on this machine and its tolerance, as shares of the largest value."""

    error: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What `inspect` found in a .tflite file.

    Args:
        bytes: Size of the file.
        sha256: Its checksum.
        checked: The source of the checksum that the file was compared with: its `"manifest"` or its own `"metadata"`;
            None if it has neither.
        inputs: The inputs.
        outputs: The outputs.
        operators: Number of each kind, `{name: count}`, the most frequent first.
        undelegated: Names of the operators that are not delegated to XNNPACK.
        wrong_on_gpu: Names of the outputs of strided 1x1 convolutions with weights in int8, which LiteRT's GPU delegate
            computes wrongly (docs/guides/gpu.md). Files of this version have none.
        tensors: Number of tensors, weights included.
        weights: Bytes of the weights of each type, `{dtype: bytes}`, the largest first.
        metadata: The metadata in the file; None if there is none.
        manifest: The manifest next to the file; None if there is none.
        reference: Comparison with the reference outputs in the manifest; None if it has none.
    """

    bytes: int
    sha256: str
    checked: str | None
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    operators: dict[str, int]
    undelegated: tuple[str, ...]
    wrong_on_gpu: tuple[str, ...]
    tensors: int
    weights: dict[str, int]
    metadata: Metadata | None
    manifest: Json | None
    reference: ReferenceCheck | None

    def to_json(self) -> Json:
        """The same as a dict for JSON, in which `reference` is called `golden`."""
        found = asdict(self)
        found["golden"] = found.pop("reference")
        if self.reference:
            found["golden"]["agrees"] = self.reference.agrees
        return found


def inspect(path: FilePath) -> Inspection:
    """Reads a .tflite file, checks its checksum, and compares its outputs with the reference outputs of its manifest.

    The manifest is the file `<path>.json`, if there is one. The file is run only after its checksum was checked.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a LiteRT file, or if it is damaged: its checksum differs from the recorded one. A
            difference of the outputs does not raise an error: it is in the result.
    """
    file = load_litert(path)
    manifest = file.manifest if "sha256" in file.manifest else None
    reference = None
    if manifest and "golden" in manifest:
        with translated(f"The reference output in the manifest of {str(path)!r} is damaged"):
            record = manifest["golden"]
            reference = ReferenceCheck(error=reference_error(file.runner(), record), tolerance=record["tolerance"])
    with translated(f"{str(path)!r} cannot be inspected"):
        return _inspection(file, manifest, reference)


def _inspection(file: LiteRTModel, manifest: Json | None, reference: ReferenceCheck | None) -> Inspection:
    model = schema.Model.GetRootAs(file.content)
    graphs = [model.Subgraphs(i) for i in range(model.SubgraphsLength())]
    weights = _weights(model, graphs)
    return Inspection(
        bytes=len(file.content),
        sha256=sha256(file.content),
        checked="manifest" if manifest else "metadata" if metadata.check(file.content) else None,
        inputs=_tensors(model, graphs[0].InputsAsNumpy()),
        outputs=_tensors(model, graphs[0].OutputsAsNumpy()),
        operators=dict(_operators(model, graphs).most_common()),
        undelegated=tuple(file.runner().undelegated()),
        wrong_on_gpu=tuple(strided_pointwise(file.content)),
        tensors=sum(graph.TensorsLength() for graph in graphs),
        weights=dict(weights.most_common()),
        metadata=metadata.read(file.content),
        manifest=manifest,
        reference=reference,
    )


def _operators(model: Any, graphs: list[Any]) -> Counter[str]:
    codes = [model.OperatorCodes(i) for i in range(model.OperatorCodesLength())]
    names = [
        (code.CustomCode() or b"").decode() or _OPERATORS[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())]
        for code in codes
    ]
    return Counter(names[graph.Operators(i).OpcodeIndex()] for graph in graphs for i in range(graph.OperatorsLength()))


def _weights(model: Any, graphs: list[Any]) -> Counter[str]:
    """Bytes of the weights of each type; tensors that share a buffer count once."""
    types = {}
    for tensor in (graph.Tensors(i) for graph in graphs for i in range(graph.TensorsLength())):
        types[tensor.Buffer()] = _TYPES[tensor.Type()]
    sizes = Counter()
    for index, dtype in types.items():
        buffer = model.Buffers(index)
        if size := buffer.Size() if buffer.Offset() > 1 else buffer.DataLength():
            sizes[dtype] += size
    return sizes


def _tensors(model: Any, indices: Iterable[int]) -> tuple[Tensor, ...]:
    names = metadata.tensor_names(model)
    found = []
    for index in indices:
        tensor = model.Subgraphs(0).Tensors(index)
        quantization = tensor.Quantization()
        shape = tensor.ShapeSignatureAsNumpy() if tensor.ShapeSignatureLength() else tensor.ShapeAsNumpy()
        scale = zero_point = None
        if quantization is not None and quantization.ScaleLength():
            scale, zero_point = float(quantization.Scale(0)), int(quantization.ZeroPoint(0))
        found.append(
            Tensor(
                name=names[index],
                shape=tuple(None if size < 0 else size for size in shape.tolist()),
                dtype=_TYPES[tensor.Type()],
                scale=scale,
                zero_point=zero_point,
            )
        )
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Compression:
    """How much a LiteRT file can be compressed, and why.

    Args:
        bytes: Size of the file.
        compressed_bytes: Its size after zlib at the highest level: what a download or an app package takes.
        sparsity: Share of zeros in its kernels.
        values: The largest number of different values in a kernel.
    """

    bytes: int
    compressed_bytes: int
    sparsity: float
    values: int

    def __str__(self) -> str:
        return (
            f"{self.bytes:,} bytes, {self.compressed_bytes:,} compressed, "
            f"{self.sparsity:.1%} of the weights zero, at most {self.values} values in a kernel"
        )


def compression(content: bytes) -> Compression:
    """Measures how much a .tflite file can be compressed."""
    interpreter = plain_interpreter(content)
    kernels = {
        int(operator["inputs"][1])
        for operator in interpreter._get_ops_details()
        if operator["op_name"] in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
    }
    values = [interpreter.get_tensor(index) for index in sorted(kernels)]
    return Compression(
        bytes=len(content),
        compressed_bytes=len(zlib.compress(content, 9)),
        sparsity=sum(np.count_nonzero(x == 0) for x in values) / sum(x.size for x in values),
        values=max(len(np.unique(x)) for x in values),
    )
