"""TFLite metadata: the description of a .tflite file for apps, in the file itself, as MediaPipe Tasks reads it.

The network's name, the normalization of the input and the name of the labels file are in a flatbuffer, which is the
model's buffer with the name TFLITE_METADATA. The labels, and a record that only se_keras reads, are files of a zip
archive after the model, which any zip program opens.

Sources: metadata_schema.fbs 1.5.0 of MediaPipe (mediapipe/tasks/metadata/, also in its wheel) and TFLite's schema.fbs.
The Python code that MediaPipe generates from the first is not used, because it needs all of MediaPipe.
"""

import hashlib
import io
import json
import struct
import zipfile
from typing import Any, NotRequired, TypedDict

import flatbuffers
import numpy as np
from flatbuffers import number_types
from flatbuffers.table import Table

from se_keras.errors import translated
from se_keras.normalization import Normalization
from se_keras.records import parse_json
from se_keras.typing import Json
from se_keras.version import __version__
from se_keras.wording import counted

from ..description import LABELS_FILE, Metadata
from .packing import schema, vector

RECORD_FILE = "se_keras.json"  # network, precision, training, and the checksum of the model before the archive

_ENTRY = b"TFLITE_METADATA"
_IDENTIFIER = b"M001"
_PARSER = "1.0.0"  # the first version of the schema has all fields that are written here
_ALIGNMENT = 64
_LARGEST = 2**24  # bytes of a file after the model; a million labels
_DAMAGED = "The metadata of the file are damaged"
_PIXELS = {"max": 255, "min": 0}
_BUFFERS, _METADATA = 4, 6  # slots of fields in TFLite's table Model
# The fields of each table that are used here, with their slot in the schema and their type. A name is a table, a list
# is a vector, and a dict is a union, whose type is in this slot and whose value is in the next one.
_SCHEMA: dict[str, dict[str, tuple[int, Any]]] = {
    "ModelMetadata": {
        "name": (0, str),
        "description": (1, str),
        "subgraphs": (3, ["SubGraphMetadata"]),
        "files": (6, ["AssociatedFile"]),
        "min_parser_version": (7, str),
    },
    "SubGraphMetadata": {"inputs": (2, ["TensorMetadata"]), "outputs": (3, ["TensorMetadata"])},
    "TensorMetadata": {
        "name": (0, str),
        "content": (3, "Content"),
        "process_units": (4, ["ProcessUnit"]),
        "stats": (5, "Stats"),
        "files": (6, ["AssociatedFile"]),
    },
    "Content": {"properties": (0, {1: "FeatureProperties", 2: "ImageProperties"})},
    "FeatureProperties": {},
    "ImageProperties": {"color_space": (0, int)},
    "ProcessUnit": {"options": (0, {1: "NormalizationOptions"})},
    "NormalizationOptions": {"mean": (0, [float]), "std": (1, [float])},
    "Stats": {"max": (0, [float]), "min": (1, [float])},
    "AssociatedFile": {"name": (0, str), "description": (1, str), "type": (2, int)},
}
_DESCRIPTION, _AXIS_LABELS = 1, 2  # AssociatedFileType
_COLOR_SPACE = {3: 1, 1: 2}  # channels: ColorSpaceType


class Place(TypedDict):
    """Where the model that metadata were added to is in the file."""

    begin: int
    end: int


class Record(TypedDict):
    """The file se_keras.json in a .tflite file."""

    network: str
    precision: str
    training: NotRequired[dict[str, Any] | None]
    model: Place
    sha256: str
    labels_sha256: NotRequired[str]


def attach(content: bytes, metadata: Metadata) -> bytes:
    """Adds metadata to a .tflite file with one input, or replaces those that this function added before.

    Operators and weights stay the same, and the outputs are bit-identical.

    Raises:
        ValueError: If the file has metadata of another program.
    """
    content = detach(content)
    if _entry(schema.Model.GetRootAs(content)) is not None:
        raise ValueError("Metadata are added to a file without any. Received: one with metadata of another program")
    begin, model = _prepended(content, _packed(content, metadata))
    record = {
        "schema": 1,
        "network": metadata.network,
        "precision": metadata.precision,
        "training": metadata.training,
        "model": {"begin": begin, "end": begin + len(content)},
        "sha256": hashlib.sha256(model).hexdigest(),
    }
    files = {}
    if metadata.labels is not None:
        files[LABELS_FILE] = "\n".join(metadata.labels)
        record["labels_sha256"] = hashlib.sha256(files[LABELS_FILE].encode()).hexdigest()
    files = {RECORD_FILE: json.dumps(record, indent=2)} | files
    file = io.BytesIO(model)
    with zipfile.ZipFile(file, "a") as archive:  # stored, not compressed: MediaPipe reads them in place
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name), text)  # always dated 1980-01-01: same model, same bytes
    return file.getvalue()


def detach(content: bytes) -> bytes:
    """The .tflite file as it was before `attach`, byte for byte."""
    if (record := check(content)) is None:
        return content
    begin, end = record["model"]["begin"], record["model"]["end"]
    return _with_moved_buffers(content[begin:end], -begin)


def read(content: bytes) -> Metadata | None:
    """The metadata of a .tflite file; None if it has none.

    Raises:
        ValueError: If the metadata are damaged, or if the file differs from the checksum in it.
    """
    record = check(content) or {}
    with translated("The metadata of the file cannot be read"):
        model = schema.Model.GetRootAs(content)
        entry = _entry(model)
        if entry is None:
            return None
        packed = model.Buffers(entry.Buffer()).DataAsNumpy().tobytes()
        found = _read("ModelMetadata", Table(packed, int.from_bytes(packed[:4], "little")))
        (subgraph, *_) = found.get("subgraphs") or [{}]
        (images, *_), (output, *_) = (subgraph.get(side) or [{}] for side in ("inputs", "outputs"))
        labels = next((x["name"] for x in output.get("files", ()) if x.get("type") == _AXIS_LABELS), None)
        options = [(unit.get("options") or {}).get("NormalizationOptions") for unit in images.get("process_units", ())]
        normalization = next(filter(None, options), None)
        files, _ = _archive(content)
        missing = {labels, *(file["name"] for file in found.get("files", ()))} - {None, *files}
        if missing:
            raise ValueError(f"{', '.join(sorted(missing))} should follow the model")
        return Metadata(
            network=found.get("name", ""),
            precision=record.get("precision", "unknown"),
            labels=labels and _labels(model, record, _file(content, files[labels]).decode()),
            normalization=normalization and Normalization(normalization["mean"], normalization["std"]),
            training=record.get("training"),
        )


def check(content: bytes) -> Json | None:
    """Compares a .tflite file with its own checksum. Returns the record that `attach` wrote; None for other files.

    It reads only the archive after the model, so that it never follows pointers of a damaged model.

    Raises:
        ValueError: If the file is damaged.
    """
    files, end = _archive(content)
    if RECORD_FILE not in files:
        return None
    refusal = f"{_DAMAGED}: {RECORD_FILE} is not the record of an export"
    record = parse_json(_file(content, files[RECORD_FILE]), Record, refusal=refusal)
    if record["sha256"] != hashlib.sha256(content[:end]).hexdigest():
        raise ValueError("The file is not the one that was exported: its SHA-256 is not its metadata's")
    return record


def _entry(model: Any) -> Any:
    """The entry of the model's metadata that MediaPipe reads; None if there is none."""
    entries = map(model.Metadata, range(model.MetadataLength()))
    return next((entry for entry in entries if entry.Name() == _ENTRY), None)


def _archive(content: bytes) -> tuple[dict[str, zipfile.ZipInfo], int]:
    """The files after a model, by name, and where the archive begins."""
    file = io.BytesIO(content)
    if not zipfile.is_zipfile(file):
        return {}, len(content)
    with translated(_DAMAGED), zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        end = min((entry.header_offset for entry in entries), default=len(content))
        return {entry.filename: entry for entry in entries}, end


def _file(content: bytes, entry: zipfile.ZipInfo) -> bytes:
    """The content of a file after a model. A short archive can say that it holds gigabytes."""
    if entry.file_size > _LARGEST:
        raise ValueError(f"{_DAMAGED}: {entry.filename} says that it has {entry.file_size:,} bytes")
    with translated(_DAMAGED), zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.read(entry)


def _labels(model: Any, record: Json, text: str) -> tuple[str, ...]:
    """The labels. In a file of this package they must be those of its record, one for each class and all different."""
    labels = tuple(text.splitlines())
    if not record:
        return labels
    expected = (record.get("training") or {}).get("classes")
    if "labels_sha256" in record:
        if hashlib.sha256(text.encode()).hexdigest() != record["labels_sha256"]:
            raise ValueError(f"{LABELS_FILE} is not the one that was exported: its SHA-256 is not the record's")
    elif isinstance(expected, list) and sorted(map(str, expected)) == sorted(labels) and list(labels) != expected:
        raise ValueError(f"{LABELS_FILE} has the classes of the training in another order")
    graph = model.Subgraphs(0)
    classes = int(graph.Tensors(graph.Outputs(0)).ShapeAsNumpy()[-1])
    if len(labels) != classes or len(set(labels)) != classes:
        raise ValueError(
            f"{LABELS_FILE} must name each of {classes} classes once. Received: {counted(len(labels), 'label')}"
        )
    return labels


def _packed(content: bytes, metadata: Metadata) -> bytes:
    """The metadata as a flatbuffer, which describes each input and output of the model."""
    model = schema.Model.GetRootAs(content)
    graph = model.Subgraphs(0)
    names = tensor_names(model)
    channels = int(graph.Tensors(graph.Inputs(0)).ShapeAsNumpy()[-1])
    image = {
        "name": names[graph.Inputs(0)],
        "content": {"properties": {"ImageProperties": {"color_space": _COLOR_SPACE.get(channels, 0)}}},
    }
    if metadata.normalization is not None:
        image["process_units"] = [{"options": {"NormalizationOptions": metadata.normalization._asdict()}}]
        image["stats"] = {limit: metadata.normalization.of_pixel(pixel) for limit, pixel in _PIXELS.items()}
    outputs = [
        {"name": names[graph.Outputs(i)], "content": {"properties": {"FeatureProperties": {}}}}
        for i in range(graph.OutputsLength())
    ]
    if metadata.labels is not None:
        outputs[0]["files"] = [{"name": LABELS_FILE, "description": "One class a line", "type": _AXIS_LABELS}]
    builder = flatbuffers.Builder()
    root = _write(
        builder,
        "ModelMetadata",
        {
            "name": metadata.network,
            "description": f"{metadata.network} in {metadata.precision}, by se_keras {__version__}",
            "subgraphs": [{"inputs": [image], "outputs": outputs}],
            "files": [{"name": RECORD_FILE, "description": "Precision, training, checksum", "type": _DESCRIPTION}],
            "min_parser_version": _PARSER,
        },
    )
    builder.Finish(root, file_identifier=_IDENTIFIER)
    return bytes(builder.Output())


def tensor_names(model: Any) -> dict[int, str]:
    """Names of the inputs and outputs, `{index of the tensor: name}`: those of the signature, if the file has one."""
    graph = model.Subgraphs(0)
    names = {i: graph.Tensors(i).Name().decode() for i in (*graph.InputsAsNumpy(), *graph.OutputsAsNumpy())}
    if model.SignatureDefsLength():
        signature = model.SignatureDefs(0)
        named = [signature.Inputs(i) for i in range(signature.InputsLength())]
        named += [signature.Outputs(i) for i in range(signature.OutputsLength())]
        names |= {tensor.TensorIndex(): tensor.Name().decode() for tensor in named}
    return names


def _prepended(content: bytes, packed: bytes) -> tuple[int, bytes]:
    """Adds the metadata `packed` to a model. Returns the number of bytes that were prepended, and the new file.

    Offsets of a flatbuffer point forward. So a new root and its lists are prepended to the old file and point into it.
    The old file stays the same, byte for byte, with the same alignment. Rewriting all of it would lose the alignment of
    the weights, and the buffers after the flatbuffer of a model of more than 2 GB.
    """
    model = schema.Model.GetRootAs(content)
    length = len(content) + -len(content) % _ALIGNMENT
    builder: Any = flatbuffers.Builder(length + 4096)
    builder.head -= length
    builder.Bytes[builder.head : builder.head + len(content)] = content
    builder.minalign = _ALIGNMENT  # the prepended length becomes a multiple of it

    def old(position: int) -> int:
        return length - position  # a builder counts from the end

    buffers = [old(model.Buffers(i)._tab.Pos) for i in range(model.BuffersLength())]
    entries = [old(model.Metadata(i)._tab.Pos) for i in range(model.MetadataLength())]
    data = vector(builder, 1, 16, packed)
    schema.BufferStart(builder)
    schema.BufferAddData(builder, data)
    buffers.append(schema.BufferEnd(builder))
    name = builder.CreateString(_ENTRY)
    schema.MetadataStart(builder)
    schema.MetadataAddName(builder, name)
    schema.MetadataAddBuffer(builder, len(buffers) - 1)
    entries.append(schema.MetadataEnd(builder))

    root = model._tab
    slots = root.Get(number_types.VOffsetTFlags, root.Pos - root.Get(number_types.SOffsetTFlags, root.Pos)) // 2 - 2
    fields = {slot: old(root.Indirect(root.Pos + at)) for slot in range(1, slots) if (at := root.Offset(4 + 2 * slot))}
    fields |= {_BUFFERS: _tables(builder, buffers), _METADATA: _tables(builder, entries)}
    builder.StartObject(max(slots, _METADATA + 1))
    schema.ModelAddVersion(builder, model.Version())
    for slot, offset in fields.items():
        builder.PrependUOffsetTRelativeSlot(slot, offset, 0)
    builder.Finish(builder.EndObject(), file_identifier=b"TFL3")
    result = builder.Output()
    prepended = len(result) - length
    return prepended, _with_moved_buffers(result, prepended)


def _with_moved_buffers(content: bytes | bytearray, distance: int) -> bytes:
    """Adds `distance` to the offsets of the buffers after the flatbuffer, which count from the start of the file."""
    content = bytearray(content)
    model = schema.Model.GetRootAs(content)
    for buffer in map(model.Buffers, range(model.BuffersLength())):
        if buffer.Offset() > 1:  # 0 and 1 mean that it is in the flatbuffer
            struct.pack_into("<Q", content, buffer._tab.Pos + buffer._tab.Offset(6), buffer.Offset() + distance)
    return bytes(content)


def _write(builder: Any, table: str, values: Json) -> int:
    """Writes a table, after everything that it refers to, and returns its offset."""
    fields = []
    for name, value in values.items():
        slot, kind = _SCHEMA[table][name]
        if kind is str:
            value = builder.CreateString(value)
        elif kind == [float]:
            value = vector(builder, 4, 4, np.asarray(value, dtype="<f4").tobytes())
        elif isinstance(kind, list):
            value = _tables(builder, [_write(builder, kind[0], item) for item in value])
        elif isinstance(kind, dict):
            ((member, item),) = value.items()
            fields.append((slot, int, next(code for code, name in kind.items() if name == member)))
            slot, value = slot + 1, _write(builder, member, item)
        elif kind is not int:
            value = _write(builder, kind, value)
        fields.append((slot, kind, value))
    builder.StartObject(1 + max((slot for slot, _, _ in fields), default=-1))
    for slot, kind, value in fields:
        prepend = builder.PrependInt8Slot if kind is int else builder.PrependUOffsetTRelativeSlot
        prepend(slot, value, 0)
    return builder.EndObject()


def _tables(builder: Any, offsets: list[int]) -> int:
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return builder.EndVector()


def _read(name: str, table: Table) -> Json:
    """The fields that a table has, `{name: value}`."""
    fields = {field: (table.Offset(4 + 2 * slot), slot, kind) for field, (slot, kind) in _SCHEMA[name].items()}
    return {field: _value(table, at, slot, kind) for field, (at, slot, kind) in fields.items() if at}


def _value(table: Any, at: int, slot: int, kind: Any) -> Any:
    here = table.Pos + at
    if kind is str:
        return table.String(here).decode()
    if kind is int:
        return table.Get(number_types.Int8Flags, here)
    if isinstance(kind, dict):
        member, at = kind.get(table.Get(number_types.Uint8Flags, here)), table.Offset(4 + 2 * (slot + 1))
        return {member: _read(member, Table(table.Bytes, table.Indirect(table.Pos + at)))} if member and at else None
    if not isinstance(kind, list):
        return _read(kind, Table(table.Bytes, table.Indirect(here)))
    first, length = table.Vector(at), table.VectorLen(at)
    if first + 4 * length > len(table.Bytes):
        raise ValueError("a vector ends after the metadata")
    starts = range(first, first + 4 * length, 4)
    if kind == [float]:
        # str() gives the shortest decimal that is this float32: 123.675 is read as 123.675.
        return tuple(float(str(np.float32(table.Get(number_types.Float32Flags, start)))) for start in starts)
    return [_read(kind[0], Table(table.Bytes, table.Indirect(start))) for start in starts]
