"""What a .tflite file is, from its bytes alone, and whether it is and computes what its manifest says."""

import zlib
from collections import Counter
from dataclasses import asdict, dataclass

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from se_keras.storage import sha256

from ..manifest import reference_error
from . import metadata
from .file import load_litert

_OPERATORS = {code: name for name, code in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
_TYPES = {code: name.lower() for name, code in vars(schema.TensorType).items() if not name.startswith("_")}


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """An input or output: integers stand for (value - zero_point) * scale."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: float | None
    zero_point: int | None


@dataclass(frozen=True, kw_only=True)
class GoldenCheck:
    """How far the file is from its golden output on this machine, and how far it may: shares of the largest value."""

    error: float
    tolerance: float

    @property
    def agrees(self):
        """Whether the file computes here what it should."""
        return self.error <= self.tolerance


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What was found in a .tflite file.

    Args:
        bytes: Its size.
        sha256: Its checksum.
        checked: What that agrees with: `"manifest"`, the file's own `"metadata"`, or None where there is neither.
        inputs, outputs: A `Tensor` each.
        operators: How many of each, `{name: count}`, the most frequent first.
        undelegated: Operators that XNNPACK did not take, by name.
        tensors: Number of tensors, weights included.
        weights: Bytes of the weights of each type, `{dtype: bytes}`, the largest first.
        metadata: A `Metadata`, or None.
        manifest: What is beside the file, whose checksum agrees; None where nothing is.
        golden: A `GoldenCheck`; None where no manifest has a golden output.
    """

    bytes: int
    sha256: str
    checked: str | None
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    operators: dict[str, int]
    undelegated: tuple[str, ...]
    tensors: int
    weights: dict[str, int]
    metadata: metadata.Metadata | None
    manifest: dict | None
    golden: GoldenCheck | None

    def to_json(self):
        """What was found as a dict for JSON."""
        found = asdict(self)
        if self.golden:
            found["golden"]["agrees"] = self.golden.agrees
        return found


def inspect(path):
    """Reads a .tflite file and compares it with the manifest beside it, if there is one: first its checksum, then, by
    running it, its golden output.

    Args:
        path: Of the file.

    Returns:
        An `Inspection`, also where the golden output disagrees.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no LiteRT file, is truncated, or is not the one that its manifest or metadata speak of.
    """
    file = load_litert(path)
    runner = file.runner()
    manifest = file.manifest if "sha256" in file.manifest else None
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
        undelegated=tuple(runner.undelegated()),
        tensors=sum(graph.TensorsLength() for graph in graphs),
        weights=dict(weights.most_common()),
        metadata=metadata.read(file.content),
        manifest=manifest,
        golden=_golden(runner, path, manifest) if manifest and "golden" in manifest else None,
    )


def _golden(runner, path, manifest):
    try:
        record = manifest["golden"]
        return GoldenCheck(error=reference_error(runner, record), tolerance=float(record["tolerance"]))
    except (AttributeError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"The golden output in the manifest of {str(path)!r} is damaged: {error!r}") from None


def _operators(model, graphs):
    codes = [model.OperatorCodes(i) for i in range(model.OperatorCodesLength())]
    names = [
        (code.CustomCode() or b"").decode() or _OPERATORS[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())]
        for code in codes
    ]
    return Counter(names[graph.Operators(i).OpcodeIndex()] for graph in graphs for i in range(graph.OperatorsLength()))


def _weights(model, graphs):
    """Bytes of each type; tensors that share a buffer count once."""
    types = {}
    for tensor in (graph.Tensors(i) for graph in graphs for i in range(graph.TensorsLength())):
        types[tensor.Buffer()] = _TYPES[tensor.Type()]
    sizes = Counter()
    for index, dtype in types.items():
        buffer = model.Buffers(index)
        if size := buffer.Size() if buffer.Offset() > 1 else buffer.DataLength():
            sizes[dtype] += size
    return sizes


def _tensors(model, indices):
    names = metadata.tensor_names(model)
    found = []
    for index in indices:
        tensor = model.Subgraphs(0).Tensors(index)
        quantization = tensor.Quantization()
        quantized = quantization is not None and quantization.ScaleLength()
        found.append(
            Tensor(
                name=names[index],
                shape=tuple(tensor.ShapeAsNumpy().tolist()),
                dtype=_TYPES[tensor.Type()],
                scale=float(quantization.Scale(0)) if quantized else None,
                zero_point=int(quantization.ZeroPoint(0)) if quantized else None,
            )
        )
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Compression:
    """How far a LiteRT file can be compressed, and why.

    Args:
        bytes: Size of the file.
        compressed_bytes: Size behind zlib at its highest level: what a download or an app's package takes.
        sparsity: Share of zeros in its kernels.
        values: The largest number of different values in a kernel.
    """

    bytes: int
    compressed_bytes: int
    sparsity: float
    values: int

    def __str__(self):
        return (
            f"{self.bytes:,} bytes, {self.compressed_bytes:,} compressed, "
            f"{self.sparsity:.1%} of the weights zero, at most {self.values} values in a kernel"
        )


def compression(content):
    """Reads off a .tflite file, as bytes, how far it can be compressed: a `Compression`."""
    reader = Interpreter(model_content=content, experimental_op_resolver_type=_PLAIN)
    kernels = {
        int(operator["inputs"][1]) for operator in reader._get_ops_details() if operator["op_name"] in _KERNEL_OPERATORS
    }
    values = [reader.get_tensor(index) for index in sorted(kernels)]
    return Compression(
        bytes=len(content),
        compressed_bytes=len(zlib.compress(content, 9)),
        sparsity=sum(np.count_nonzero(x == 0) for x in values) / sum(x.size for x in values),
        values=max(len(np.unique(x)) for x in values),
    )


_KERNEL_OPERATORS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")


_PLAIN = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
