"""Messages of protocol buffers that no dependency has, declared field by field."""

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_FIELD = descriptor_pb2.FieldDescriptorProto
_TYPES = {str: _FIELD.TYPE_STRING, bytes: _FIELD.TYPE_BYTES, int: _FIELD.TYPE_INT64, float: _FIELD.TYPE_FLOAT}


def message(name, schema):
    """The class of the message `name`.

    Args:
        name: Of one of the schema's messages.
        schema: `{message: {field: (number, type)}}`, a type being str, bytes, int (of 64 bits), float (of 32), the
            name of another message, or a list with one of these for a repeated field. On the wire a map is a list of
            messages with a key (1) and a value (2), and a message may stand as its bytes. Fields that are not declared
            are passed over.
    """
    package = f"se_keras.{name}"
    file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto2")
    for told, fields in schema.items():
        described = file.message_type.add(name=told)
        for field, (number, kind) in fields.items():
            label = _FIELD.LABEL_REPEATED if isinstance(kind, list) else _FIELD.LABEL_OPTIONAL
            (kind,) = kind if isinstance(kind, list) else (kind,)
            entry = described.field.add(
                name=field, number=number, label=label, type=_TYPES.get(kind, _FIELD.TYPE_MESSAGE)
            )
            if kind not in _TYPES:
                entry.type_name = f".{package}.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}"))
