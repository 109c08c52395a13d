"""Protocol buffer messages that no dependency provides, declared field by field."""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_FIELD = descriptor_pb2.FieldDescriptorProto
_TYPES = {str: _FIELD.TYPE_STRING, bytes: _FIELD.TYPE_BYTES, int: _FIELD.TYPE_INT64, float: _FIELD.TYPE_FLOAT}


def message(name: str, schema: dict[str, dict[str, tuple[int, Any]]]) -> Any:
    """The class of the message `name` of a schema, `{message: {field: (number, type)}}`.

    A type is str, bytes, int (64 bits), float (32 bits), the name of another message, or a list with one of these for a
    repeated field. In the wire format, a map is a list of messages with a key (1) and a value (2), and a message can be
    declared as bytes. Fields that are not declared are ignored.
    """
    package = f"se_keras.{name}"
    file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto2")
    for declared, fields in schema.items():
        descriptor = file.message_type.add(name=declared)
        for field, (number, kind) in fields.items():
            label = _FIELD.LABEL_REPEATED if isinstance(kind, list) else _FIELD.LABEL_OPTIONAL
            (kind,) = kind if isinstance(kind, list) else (kind,)
            type_ = _TYPES.get(kind, _FIELD.TYPE_MESSAGE)
            entry = descriptor.field.add(name=field, number=number, label=label, type=type_)
            if kind not in _TYPES:
                entry.type_name = f".{package}.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}"))
