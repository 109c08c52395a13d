"""The README's commands parse and its Python runs, block after block, as they stand."""

import re
import shlex
from pathlib import Path

import keras
import pytest

import se_keras_cli
from se_keras.catalogue import names

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
QUICKSTART = "pip install -e . && se-keras quickstart"
TESTS = 'pip install -e ".[test]" && pytest'


def blocks(language):
    """Its fenced blocks: the line of the file at which each begins, and its text."""
    found = re.finditer(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [(README.count("\n", 0, match.start(1)), match[1]) for match in found]


def commands():
    """Each `se-keras` command of the bash blocks, as a list of words."""
    found = []
    for _, block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            ends = [index for index, word in enumerate(words) if word in ("&&", "||", "|", ";", ">", "&")]
            for start, end in zip([-1, *ends], [*ends, len(words)], strict=True):
                if words[start + 1 : start + 2] == ["se-keras"]:
                    found.append(words[start + 1 : end])
    return found


def test_readme_opens_with_the_command_to_use_and_the_command_to_test():
    assert [block.strip() for _, block in blocks("bash")][:2] == [QUICKSTART, TESTS]


def test_ci_runs_the_test_command_of_the_readme():
    lines = (ROOT / ".ci" / "run").read_text().replace(" --quiet", "").splitlines()
    assert TESTS in lines


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_command_of_the_readme_is_one_that_se_keras_takes(command):
    options = se_keras_cli._parser().parse_args(command[1:])
    assert callable(options.command)


@pytest.mark.slow
def test_python_of_the_readme_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keras.utils.set_random_seed(0)
    namespace = {"__name__": "readme"}
    python = blocks("python")
    assert python
    for line, block in python:
        # Empty lines in front: a traceback names the line of the README.
        exec(compile("\n" * line + block, ROOT / "README.md", "exec"), namespace)


def test_networks_of_the_readme_are_those_of_the_listing():
    listed = (ROOT / "docs/results/networks.md").read_text().splitlines()  # itself compared with what se-keras prints
    rows = [line for line in README.splitlines() if line.startswith(tuple(f"| {name} |" for name in names()))]
    assert len(rows) > 30
    assert [row for row in rows if row not in listed] == []


@pytest.mark.parametrize("link", re.findall(r"\]\((?!https?:)([^)#]+)\)", README))
def test_file_that_the_readme_links_to_is_there(link):
    assert (ROOT / link).exists()
