"""JSON of ours, in files and in answers of servers: read by one function, which checks its shape."""

import json
import types
import typing
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from se_keras.errors import first_line
from se_keras.typing import FilePath

DEEPEST = 50  # lists and objects within one another
_NAMES = {
    str: "a string",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    list: "a list",
    tuple: "a list",
    dict: "an object",
    type(None): "null",
}


def read_json(path: FilePath, shape: Any, *, what: str) -> Any:
    """The value in a JSON file.

    Args:
        path: The file.
        shape: The type of the value: a `TypedDict`, which may have further keys in the file, or `list[...]`,
            `tuple[...]` for a list of this length, `dict[str, ...]`, `Literal[...]`, a union, `str`, `bool`, `int`,
            `float`, `None` or `Any`.
        what: What the file should be, for the message: `"the record of a run"`.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is not JSON, or of another shape. The message says where it differs.
    """
    return parse_json(Path(path).read_bytes(), shape, refusal=f"{str(path)!r} is not {what}")


def parse_json(content: bytes | str, shape: Any, *, refusal: str) -> Any:
    """The value of a JSON text, as `read_json`. The message of an error begins with `refusal`."""
    try:
        value = json.loads(content)
        is_deep = _is_deep(value)
    except RecursionError:
        value, is_deep = None, True
    except UnicodeDecodeError:
        raise ValueError(f"{refusal}: it is not text") from None
    except ValueError as error:
        raise ValueError(f"{refusal}: it is not JSON: {first_line(error)}") from None
    if is_deep:
        raise ValueError(f"{refusal}: more than {DEEPEST} lists and objects are within one another")
    if fault := _fault(value, shape, ""):
        raise ValueError(f"{refusal}: {fault}")
    return value


def _is_deep(value):
    """Whether lists and objects are within one another so often that others' functions would fail."""
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [x for y in level for x in (y.values() if isinstance(y, dict) else y if isinstance(y, list) else ())]
    return bool(level)


def _fault(value: Any, shape: Any, where: str) -> str | None:
    """Where a value differs from a shape, in words; None if it does not."""
    origin, arguments = get_origin(shape), get_args(shape)
    if shape is Any:
        return None
    if origin in (Union, types.UnionType):
        faults = [_fault(value, option, where) for option in arguments]
        return None if None in faults else faults[0]
    if origin is Literal:
        return None if value in arguments else _expected(" or ".join(map(repr, arguments)), value, where)
    kind: Any = dict if typing.is_typeddict(shape) else origin or shape or type(None)
    if not _is_of(value, kind):
        return _expected(_NAMES[kind], value, where)
    if typing.is_typeddict(shape):
        if missing := sorted(shape.__required_keys__ - value.keys()):
            return f"{where or 'it'} lacks {', '.join(missing)}"
        entries = [(key, hint) for key, hint in get_type_hints(shape).items() if key in value]
    elif kind is tuple:
        if len(value) != len(arguments):
            return _expected(f"a list of {len(arguments)}", value, where)
        entries = list(enumerate(arguments))
    else:
        keys = value if kind is dict else range(len(value)) if kind is list else ()
        entries = [(key, arguments[-1]) for key in keys if arguments]
    named = ((value[key], hint, f"{where}.{key}" if where else str(key)) for key, hint in entries)
    return next(filter(None, (_fault(*each) for each in named)), None)


def _is_of(value, kind):
    accepted = {float: (int, float), tuple: list}.get(kind, kind)
    return isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))


def _expected(kind, value, where):
    shown = json.dumps(value)
    return f"{where or 'it'} must be {kind}. Received: {shown[:60]}{'...' * (len(shown) > 60)}"
