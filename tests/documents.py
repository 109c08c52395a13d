"""The fenced blocks of a page of Markdown, and how they are run: Python in this process, bash as a user types it.

A block that cannot run there has a title that says why: `bash title="Not run in the tests: needs a phone"`.
"""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import keras

ROOT = Path(__file__).parents[1]
_FENCE = re.compile(r'^```(python|bash)(?: title="(.*?)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of Python or bash.

    Args:
        page: Path of the file, from the root of the checkout.
        line: The line at which the text begins, from 0.
        language: python or bash.
        text: What stands between the fences.
        title: Its title, which only blocks have that are not run with the page; or None.
    """

    page: str
    line: int
    language: str
    text: str
    title: str | None

    def __str__(self):
        return f"{self.page}:{self.line}"

    @property
    def installs(self):
        """Whether it only installs packages."""
        return self.language == "bash" and all(line.startswith("pip install ") for line in self.text.splitlines())

    def commands(self):
        """Each `se-keras` command of bash, as a list of words."""
        found = []
        for line in self.text.replace("\\\n", " ").splitlines() if self.language == "bash" else ():
            words = shlex.split(line, comments=True)
            ends = [index for index, word in enumerate(words) if word in ("&&", "||", "|", ";", ">", "&")]
            for start, end in zip([-1, *ends], [*ends, len(words)], strict=True):
                if words[start + 1 : start + 2] == ["se-keras"]:
                    found.append(words[start + 1 : end])
        return found


def blocks(page):
    """The blocks of Python and bash of a page, by its path from the root."""
    text = (ROOT / page).read_text()
    found = []
    for match in _FENCE.finditer(text):
        language, title, code = match.groups()
        found.append(Block(page, text.count("\n", 0, match.start(3)), language, code, title))
    return found


def run(page, folder, *, language=None):
    """Runs the blocks of a page, or those of one language, in a folder, in order; those of Python share their names."""
    keras.utils.set_random_seed(0)
    names = {"__name__": "page"}
    for block in blocks(page):
        if block.title or block.installs or language not in (None, block.language):
            continue
        if block.language == "python":
            # Empty lines in front: a traceback names the line of the page.
            exec(compile("\n" * block.line + block.text, ROOT / page, "exec"), names)
        else:
            run_bash(block, folder)


def run_bash(block, folder):
    """Runs a block in a shell, with the commands of this environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", "-euo", "pipefail", "-c", block.text]
    result = subprocess.run(command, cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert result.returncode == 0, f"{block}\n{result.stdout}{result.stderr}"
