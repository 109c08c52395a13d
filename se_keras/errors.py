"""Errors of other libraries, which become ours where a file is read, a model is run, or a server is asked."""

import contextlib
import re
from collections.abc import Iterable, Iterator

_NODE = re.compile(r"^(\{\{[^}]*\}\}\s*)+")  # the node of a graph, with which TensorFlow's messages begin
_IN_LAYER = re.compile(r".*Exception encountered when calling [^\n]*\n\s*(?:\x1b\[1m)?([^\x1b\n]+)", re.DOTALL)


def first_line(error: object) -> str:
    """The first line of an error's message; the type of the error if it has no message.

    Where Keras says first in which layer the error was, it is the line after the last of these.
    """
    message = str(error).strip()
    if found := _IN_LAYER.match(message):
        return _NODE.sub("", found[1].strip())
    return (_NODE.sub("", message) or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def translated(message: str, *, into: type[Exception] = ValueError) -> Iterator[None]:
    """Turns every error in the `with` block into one of ours: `message`, a colon, and the first line of its own.

    Readers of damaged files raise errors of any type. A path that the system cannot open, such as one without
    permission, keeps its OSError.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise into(f"{message}: {first_line(error)}") from error


@contextlib.contextmanager
def needs_extra(extra: str, what: str) -> Iterator[None]:
    """Says how to install the packages of an extra, if one that is imported inside is missing: an ImportError."""
    try:
        yield
    except ImportError as error:
        package = (error.name or "").partition(".")[0].replace("_", "-")
        rule = f'{what} needs the package {package}: pip install "se-keras[{extra}]"'
        raise ImportError(rule, name=error.name) from None


def require_type(argument: str, value: object, kind: type) -> None:
    """Raises TypeError if the value of an argument is not of a type."""
    if not isinstance(value, kind):
        raise TypeError(f"{argument} must be of the type {kind.__name__}. Received: {type(value).__name__}")


def require_choice(argument: str, value: object, choices: Iterable[str]) -> None:
    """Raises ValueError if the value of an argument is none of the choices; TypeError for an array or a list."""
    try:
        hash(value)
    except TypeError:  # compared with the choices, an array gives an array
        require_type(argument, value, str)
    if value not in (names := tuple(choices)):
        raise ValueError(f"{argument} must be one of {names}. Received: {argument}={value!r}")
