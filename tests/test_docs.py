"""The pages of docs/: their commands parse, their blocks run from top to bottom, and what is generated is complete."""

import importlib.util
import re
from configparser import ConfigParser

import documents
import pytest
from documents import ROOT

import se_keras_cli
from se_keras.catalogue import names
from se_keras.weights.released import IMAGENET

PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}
BLOCKS = [block for page in PAGES for block in documents.blocks(page)]
# Pages whose blocks take a few seconds, all together. The others are slow.
FAST = ("docs/concepts/agreement.md", "docs/concepts/pairs_and_controls.md")
# All blocks that no test runs. Each says so in its title.
NOT_RUN = {
    "docs/index.md": ["tests/test_quickstart.py runs a shorter one"],
    "docs/guides/benchmark.md": ["takes minutes"],
    "docs/guides/distributed_training.md": ["needs two machines"],
    "docs/guides/fine_tune.md": ["needs a network", "needs torch and timm", "needs a network"],
    "docs/guides/own_photos.md": ["needs a network"],
    "docs/guides/phone.md": ["needs a phone"],
    "docs/guides/serve.md": ["needs Docker"],
    "docs/guides/train.md": ["needs ImageNet", "needs ImageNet"],
    "docs/results/ablations.md": [
        "tests/test_examples.py runs it",
        "tests/test_examples.py runs it",
        "takes nine minutes; tests/test_examples.py runs a shorter one",
    ],
    "docs/results/devices.md": ["downloads qemu and Python for Arm", "downloads MediaPipe"],
    "docs/results/exports.md": ["takes 15 minutes to an hour; tests/test_examples.py exports two networks"],
    "docs/results/placement.md": ["takes minutes"],
}


RUN = list(dict.fromkeys(block.page for block in BLOCKS if not (block.not_run or block.installs)))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def hooks():
    specification = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", [pytest.param(x, marks=() if x in FAST else pytest.mark.slow) for x in RUN])
def test_blocks_of_a_page_run_from_top_to_bottom(page, folder):
    documents.run(page, folder)


def test_blocks_that_no_test_runs_are_these():
    found = {}
    for block in BLOCKS:
        if block.not_run:
            found.setdefault(block.page, []).append(block.not_run)
    assert found == NOT_RUN


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.commands()], ids=str)
def test_commands_of_the_docs_are_those_of_se_keras(block):
    for command in block.commands():
        assert callable(se_keras_cli._parser().parse_args(command[1:]).command)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=str)
def test_python_of_the_docs_compiles(block):
    compile(block.text, str(block), "exec")


def test_extras_that_the_docs_install_exist():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    named = {name for text in TEXTS.values() for name in re.findall(r"pip install .*?\[(\w+)\]", text)}
    assert named and named <= {*setup["options.extras_require"]}


def test_examples_that_the_docs_name_exist():
    named = {name for text in TEXTS.values() for name in re.findall(r"(?:examples|tests)/[\w/]+\.\w+", text)}
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_reference_of_the_command_has_every_option(hooks):
    page = hooks.page(se_keras_cli._parser())
    for name, command in hooks.subcommands(se_keras_cli._parser()).items():
        (section,) = re.findall(rf"^## {name}$(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
        options = {option for action in command._actions for option in action.option_strings}
        missing = {option for option in options if not re.search(rf"`.*{option}\b.*`", section)}
        assert missing == {"-h", "--help", "--traceback"}, name


def test_released_weights_of_the_docs_are_those_of_the_table():
    page = TEXTS["docs/guides/fine_tune.md"]
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]*) \| .+ \| (\S+) \|$", page, re.MULTILINE)
    expected = {(name, f"{x.top1:.3f}" if x.top1 else "", x.repo) for name, x in IMAGENET.items()}
    assert set(rows) == expected


def test_docs_say_how_many_networks_there_are():
    counts = {count for text in TEXTS.values() for count in re.findall(r"\b(\d+) networks", text)}
    assert str(len(names())) in counts
    # Those of groups of networks: the ones with grouped convolutions.
    assert counts <= {str(len(names())), "37"}
