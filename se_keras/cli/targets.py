"""The options that say where `se-keras benchmark` measures: a row for each target."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .arguments import BLOCKS, BROWSER_ACCELERATORS, PORT, POSITIVE, RATE, SECONDS, one_of

if TYPE_CHECKING:  # not imported for --help
    from se_keras.export.benchmark.measuring import Target


@dataclass(frozen=True, kw_only=True)
class TargetRow:
    """A target on the command line.

    Args:
        flag: The option that chooses the target; empty for this machine. Its value, if it has one, is a field too.
        path: Module in `se_keras.export.benchmark.targets` and class, whose fields are the target's options.
        chooses: Arguments of argparse for the flag.
        options: Arguments of argparse for the options that only this target adds.
    """

    flag: str
    path: str
    chooses: Mapping[str, Any]
    options: Mapping[str, Mapping[str, Any]]

    @property
    def title(self) -> str:
        """The target in messages."""
        return self.flag or "this machine"

    def kind(self) -> "type[Target]":
        """The class, imported when it is needed."""
        module, name = self.path.split(".")
        return getattr(import_module(f"se_keras.export.benchmark.targets.{module}"), name)


TARGETS = (
    TargetRow(
        flag="",
        path="host.Host",
        chooses={},
        options={"--profile": {"action": "store_true", "help": "profile the files too, for the report"}},
    ),
    TargetRow(
        flag="--adb",
        path="adb.Adb",
        chooses={"action": "store_true", "help": "measure on a phone with adb (docs/guides/phone.md)"},
        options={
            "--serial": {"metavar": "S", "help": "serial number of the phone, if there are several"},
            "--benchmark-model": {
                "metavar": "PATH",
                "help": "LiteRT's binary for the phone, device:/path of one on it, or fetch to get it",
            },
        },
    ),
    TargetRow(
        flag="--ssh",
        path="ssh.Ssh",
        chooses={"metavar": "USER@HOST", "help": "measure on a Linux board with ssh (docs/guides/ssh.md)"},
        options={
            "--setup": {
                "action": "store_true",
                "help": "install numpy and ai-edge-litert on the board, in a temporary folder",
            },
            "--python": {"metavar": "PATH", "help": "Python on the board (default: python3)"},
            "--ssh-config": {"metavar": "FILE", "help": "configuration of ssh (default: your own)"},
        },
    ),
    TargetRow(
        flag="--arm-instructions",
        path="instructions.Instructions",
        chooses={
            "nargs": "*",
            "metavar": "CPU",
            "help": "count the instructions on processors of Arm in qemu, and time nothing (docs/guides/arm.md; "
            "default: cortex-a53 cortex-a76 max,sme=off)",
        },
        options={
            "--fetch": {"action": "store_true", "help": "get qemu and Python for Arm, 250 MB, with Debian's apt-get"},
            "--arm-folder": {"metavar": "FOLDER", "help": "where they are (default: ~/.cache/se_keras/arm)"},
        },
    ),
    TargetRow(
        flag="--browser",
        path="browser.Browser",
        chooses={"action": "store_true", "help": "measure in a browser, here or on a phone (docs/guides/browser.md)"},
        options={
            "--lan": {"action": "store_true", "help": "let other devices in the network open the page"},
            "--https": {"action": "store_true", "help": "serve with HTTPS: threads and WebGPU on other devices"},
            "--open": {"action": "store_true", "help": "open the page in this computer's browser"},
            "--headless": {"action": "store_true", "help": "measure in a Chromium without a window"},
            "--accelerator": {"metavar": "A", "help": f"{one_of(BROWSER_ACCELERATORS)} (default: wasm)"},
            "--devices": {
                "type": POSITIVE,
                "metavar": "N",
                "help": "how many devices measure, one after another (default: 1)",
            },
            "--port": {"type": PORT, "metavar": "N", "help": "of the page (default: any that is free)"},
            "--litertjs": {"metavar": "DIR", "help": "LiteRT.js as .tgz files (default: fetched once with npm)"},
        },
    ),
)
PLAN: Mapping[str, Mapping[str, Any]] = {  # of several targets
    "--blocks": {"type": BLOCKS, "help": "number of paired measurements (default: 30; 10 on a phone)"},
    "--within": {
        "type": RATE,
        "metavar": "X",
        "help": "stop when the 95 %% interval is narrower than X, such as 0.01",
    },
    "--rest": {
        "type": SECONDS,
        "metavar": "S",
        "help": "seconds for a device to cool down between blocks (default: 0; 5 on a phone)",
    },
    "--seconds": {
        "type": SECONDS,
        "metavar": "S",
        "help": "stop a comparison after this time (default: 60 in a browser)",
    },
    "--allow-undelegated": {
        "action": "store_true",
        "help": "measure even if operators are not delegated to XNNPACK",
    },
}


def add_targets(parser: argparse.ArgumentParser) -> None:
    """Adds the options of all targets, of which one may be chosen."""
    group = parser.add_argument_group("where to measure", "on this machine, unless one of these is given")
    one = group.add_mutually_exclusive_group()
    for row in TARGETS:
        if row.flag:
            one.add_argument(row.flag, **row.chooses)
    titles = {"how to measure": PLAN, **{f"for {row.title}": row.options for row in TARGETS}}
    for title, options in titles.items():
        of_title = parser.add_argument_group(title)
        for option, arguments in options.items():
            of_title.add_argument(option, **arguments)


def target_of(options: argparse.Namespace) -> "Target":
    """The chosen target with its options.

    Raises:
        ValueError: If an option was given that is not for this target.
    """
    row = next((row for row in TARGETS if row.flag and _given(options, row.flag) is not None), TARGETS[0])
    known, values = _fields(row), {}
    for option in (row.flag, *PLAN, *(option for other in TARGETS for option in other.options)):
        value = _given(options, option) if option else None
        if value is None or (option == row.flag and value is True):
            continue
        if (name := _dest(option)) not in known:
            of = " and ".join(other.title for other in TARGETS if name in _fields(other))
            raise ValueError(f"{option} is for {of}. Received: {row.title}")
        values[name] = value
    return row.kind()(**values)


def _given(options, option):
    """The value of an option; None if it was not given."""
    value = getattr(options, _dest(option))
    return None if value is False else value


def _dest(option):
    return option.removeprefix("--").replace("-", "_")


def _fields(row):
    return {field.name for field in fields(row.kind())}
