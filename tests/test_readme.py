"""The README is short, its commands and its Python run as they stand, and its figures are those of docs/."""

import re
import shlex

import documents
import keras
import numpy as np
import pytest
from documents import ROOT
from PIL import Image
from safetensors.numpy import save
from test_pretrained import Release, connect, timm_state
from test_pretrained import hub as hub  # a fixture

import se_keras_cli
from se_keras.catalogue import create, names
from se_keras.weights.released import IMAGENET

README = (ROOT / "README.md").read_text(encoding="utf-8")
QUICKSTART = "pip install -e . && se-keras quickstart"
TESTS = 'pip install -e ".[test]" && pytest'


BLOCKS = documents.blocks("README.md")
IN_BLOCKS = [command for block in BLOCKS for command in block.commands()]
IN_TEXT = [shlex.split(command) for command in re.findall(r"`(se-keras [^`]+)`", README)]


def results(name):
    """The text of a page of docs/results/."""
    return (ROOT / "docs" / "results" / name).read_text(encoding="utf-8")


def test_readme_is_short():
    assert len(README.splitlines()) <= 130


def test_readme_opens_with_the_command_to_use_and_the_command_to_test():
    assert [block.text.strip() for block in BLOCKS if block.language == "bash"][:2] == [QUICKSTART, TESTS]


def test_ci_runs_the_test_command_of_the_readme():
    lines = (ROOT / ".ci" / "run").read_text().replace(" --quiet", "").splitlines()
    assert TESTS in lines


@pytest.mark.parametrize("command", [*IN_BLOCKS, *IN_TEXT], ids=" ".join)
def test_command_of_the_readme_is_one_that_se_keras_takes(command):
    options = se_keras_cli._parser().parse_args(command[1:])
    assert callable(options.command)


@pytest.mark.parametrize("program", re.findall(r"`python (\S+)`", README))
def test_program_of_the_readme_is_there(program):
    assert (ROOT / program).is_file()


@pytest.mark.parametrize("link", re.findall(r'(?:\]\(|src=")(?!https?:)([^)#"]+)', README))
def test_file_that_the_readme_links_to_is_there(link):
    assert (ROOT / link).exists()


# The blocks, run.


@pytest.fixture
def photos(hub, tmp_path, monkeypatch):
    """A working folder with photos of two classes and a new one; the hub has weights of SE-ResNet-50."""
    rng = np.random.default_rng(0)
    for name, color in {"cat": (200, 120, 40), "dog": (40, 120, 200)}.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(10):  # of which 16 are for training: a batch
            pixels = np.clip(rng.normal(color, 30, (240, 300, 3)), 0, 255).astype("uint8")
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.jpg")
    Image.fromarray(pixels).save(tmp_path / "new.jpg")
    keras.utils.set_random_seed(0)
    released = save(timm_state(create("se_resnet50"), legacy=True))
    hub.releases = {IMAGENET["se_resnet50"].repo: Release(content=released)}
    connect(monkeypatch, hub.url, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_commands_for_ones_own_photos_run_as_they_stand(photos, capfd):
    (block,) = (block for block in BLOCKS if "--data photos/" in block.text)
    printed = {}
    for _, *arguments in block.commands():
        assert se_keras_cli.main(arguments) == 0, capfd.readouterr().err
        printed[arguments[0]] = capfd.readouterr().out
    assert {"cat", "dog"} <= set(re.findall(r"\w+", printed["predict"]))
    assert "photos" in printed["serve-config"]
    assert (photos / "confusion.png").is_file() and (photos / "served" / "photos" / "1").is_dir()


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.*the classifier of 2 is left as it is, untrained",
    "ignore:`shuffle=True` was passed, but will be ignored",  # Keras, of every fit of a tf.data.Dataset
)
def test_python_of_the_readme_runs_from_top_to_bottom(photos, capfd):
    documents.run("README.md", photos, language="python")
    assert {"cat", "dog"} <= set(re.findall(r"\w+", capfd.readouterr().out))


# Its figures.


def test_networks_of_the_readme_are_those_of_the_listing():
    listed = results("networks.md").splitlines()  # itself compared with what se-keras prints
    rows = [line for line in README.splitlines() if line.startswith(tuple(f"| {name} |" for name in names()))]
    assert len(rows) == 5
    assert [row for row in rows if row not in listed] == []
    assert f"There are {len(names())}, " in README and f"Five of the {len(names())};" in README


@pytest.mark.parametrize(
    "figure, name, row",
    [
        ("35.5 ms", "overhead.md", "LiteRT, lowered (se_keras)"),
        ("1.10 times", "overhead.md", "ONNX Runtime, timm"),
        ("2.03 times", "overhead.md", "PyTorch, timm, channels last"),
        ("28.4 MB", "exports.md", "se_resnet50"),
        ("108.5 MB", "exports.md", "se_resnet50"),
    ],
)
def test_figure_of_the_readme_is_that_of_its_page(figure, name, row):
    (line,) = (line for line in results(name).splitlines() if line.startswith(f"| {row} |"))
    assert figure in " ".join(README.split())
    assert figure.split()[0] in line.split()
