"""Hooks of mkdocs: the page of the command line is generated from the parser of se-keras."""

import argparse
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = "reference/cli.md"
_HEAD = """\
# Command line

Every command has `--help`, which prints the same as this page, and `--traceback`, which shows where in the code an
error came from.

| exit status | what |
| ---: | --- |
| 0 | success |
| 1 | `verify` or `serve-check` finds that two models disagree; `predict` answers some photos and cannot read others |
| 2 | an error that you can correct |
| 75 | `train` was stopped by SIGTERM and can be resumed |
| 130 | after Ctrl-C |
"""


def on_files(files: Any, config: Any) -> Any:
    """Adds the page to the files of the site."""
    from mkdocs.structure.files import File

    sys.path.insert(0, str(Path(config["config_file_path"]).parent))
    import se_keras_cli

    files.append(File.generated(config, PAGE, content=page(se_keras_cli._parser())))
    return files


def page(parser: argparse.ArgumentParser) -> str:
    """The Markdown of all commands of a parser."""
    return "\n".join([_HEAD, *(_command(name, command) for name, command in subcommands(parser).items())])


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of the commands, by name."""
    (action,) = (x for x in parser._actions if isinstance(x, argparse._SubParsersAction))
    return dict(action.choices)


def _command(name, parser):
    """The section of one command: what it is for, its examples, its arguments."""
    lines = [f"## {name}", "", parser.description.strip()]
    if parser.epilog:
        lines += ["", "```bash", textwrap.dedent(parser.epilog.removeprefix("Examples:")).strip(), "```"]
    return "\n".join([*lines, "", "| argument | what |", "| --- | --- |", *_rows(parser), ""])


def _rows(parser) -> Iterator[str]:
    """A row for each argument of a command, with its help as the command prints it."""
    formatter = parser._get_formatter()
    for action in sorted(parser._actions, key=lambda action: bool(action.option_strings)):
        if isinstance(action, argparse._HelpAction) or "--traceback" in action.option_strings:
            continue
        value = formatter._format_args(action, formatter._get_default_metavar_for_optional(action))
        shown = " ".join(f"`{word}`" for word in (", ".join(action.option_strings), value) if word)
        text = formatter._expand_help(action) if action.help else ""
        yield f"| {shown} | {_escaped(text)} |"


def _escaped(text):
    """Text of a cell: Markdown's own signs are written as they are."""
    for sign in "\\|*_<[":
        text = text.replace(sign, f"\\{sign}")
    return text
