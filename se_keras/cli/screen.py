"""What the command shows: answers on stdout, progress and refusals on stderr, TensorFlow's own logs nowhere."""

import contextlib
import json
import logging
import os
import sys
import tempfile

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

USER_ERRORS = (ValueError, TypeError, OSError)


class Output(Console):
    """Standard output, which may be closed while it is written to."""

    def on_broken_pipe(self):
        """Raises BrokenPipeError, instead of rich's end of the process."""
        raise  # noqa: PLE0704  within rich's own except: main ends quietly


def say(console, line):
    """Prints a line as it is, however long."""
    console.print(line, highlight=False, soft_wrap=True, markup=False)


def answer(line):
    """Prints a line of the answer."""
    say(Output(), line)


def print_json(value):
    """Prints the answer for programs; JSON has no NaN and no infinity: null stands for them."""
    print(json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None), indent=2))


@contextlib.contextmanager
def progress_on(console):
    """Yields a function that shows what is done now: beside a spinner on a terminal, a line each elsewhere."""
    if not console.is_terminal:
        yield lambda line: say(console, line)
        return
    with console.status("starting") as status:
        yield lambda line: status.update(escape(line))


@contextlib.contextmanager
def native_logs_hidden():
    """Keeps what TensorFlow's C++ side writes to file descriptor 2 off the screen; shows it if all else fails."""
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


def new_table(*columns, **options):
    """A table that fits 80 characters."""
    table = Table(*columns, **{"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), **options})
    if columns:
        table.columns[0].no_wrap = True  # a name is there to be copied
    return table
