"""Output of the commands: results on stdout, progress and errors on stderr. TensorFlow's own logs are hidden."""

import contextlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Column, Table

USER_ERRORS = (ValueError, TypeError, OSError, ImportError)  # the last for packages that are optional
EXIT_DISAGREEMENT = 1  # two models do not compute the same
EXIT_UNREAD = 1  # some photos cannot be read


class Output(Console):
    """Standard output, which may be closed while it is written to."""

    def on_broken_pipe(self) -> None:
        """Raises BrokenPipeError, where rich would end the process."""
        raise  # noqa: PLE0704  rich calls this in an except clause, and main catches the error


def print_line(line: str, console: Console | None = None) -> None:
    """Prints a line unchanged, however long, on stdout or another console."""
    (console or Output()).print(line, highlight=False, soft_wrap=True, markup=False)


def print_message(console: Console, message: str) -> None:
    """Prints an error, a warning or a note, as a line of this command."""
    print_line(f"se-keras: {message}", console)


def print_json(value: Any) -> None:
    """Prints JSON. It has no NaN and no infinity: they become null."""
    print(json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None), indent=2))


def print_table(columns: Sequence[str | Column], rows: Iterable[Iterable[RenderableType]], **options: Any) -> None:
    """Prints a table that fits 80 characters, without titles if `columns` is empty; `options` are those of rich."""
    options = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "show_header": bool(columns), **options}
    table = Table(*columns, **options)
    for column in table.columns[:1]:
        column.no_wrap = True  # names can be copied
    for row in rows:
        table.add_row(*row)
    Output().print(table)


def ratio_cells(ratio: Mapping[str, float]) -> tuple[str, str]:
    """The cells of a ratio with `median`, `low` and `high`: the median and the interval."""
    return f"{ratio['median']:.3f}", f"{ratio['low']:.3f}..{ratio['high']:.3f}"


@contextlib.contextmanager
def show_progress(console: Console) -> Iterator[Callable[[str], object]]:
    """Yields a function that shows a message: next to a spinner on a terminal, otherwise as a line."""
    if not console.is_terminal:
        yield lambda line: print_line(line, console)
        return
    with console.status("starting") as status:
        yield lambda line: status.update(escape(line))


@contextlib.contextmanager
def hide_native_logs() -> Iterator[None]:
    """Hides what TensorFlow's C++ code writes to file descriptor 2; an unexpected error shows it."""
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    screen, hidden = os.fdopen(os.dup(2), "w"), tempfile.TemporaryFile()
    python_stderr, sys.stderr = sys.stderr, screen
    os.dup2(hidden.fileno(), 2)
    try:
        yield
    except (*USER_ERRORS, KeyboardInterrupt):
        raise
    except BaseException:
        hidden.seek(0)
        screen.write(hidden.read().decode(errors="replace"))
        raise
    finally:
        screen.flush()
        os.dup2(screen.fileno(), 2)
        sys.stderr = python_stderr
        screen.close()
