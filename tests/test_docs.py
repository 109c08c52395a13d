"""The pages of docs/: their commands parse, their blocks run from top to bottom, and what is generated is complete."""

import gzip
import importlib.util
import re
from configparser import ConfigParser
from pathlib import Path

import documents
import numpy as np
import pytest
import sklearn.datasets
from documents import ROOT
from PIL import Image

import se_keras
import se_keras_cli
from se_keras.catalogue import names, spec_of
from se_keras.normalization import Normalization
from se_keras.weights.released import IMAGENET

PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}
BLOCKS = [block for page in PAGES for block in documents.blocks(page)]
# Pages whose blocks take a few seconds, all together. The others are slow.
FAST = ("docs/concepts/agreement.md", "docs/concepts/pairs_and_controls.md", "docs/guides/fine_tune.md")
# All blocks with a title. It says why the test of the page does not run the block.
NOT_RUN = {
    "docs/index.md": ["Run by tests/test_quickstart.py, with fewer epochs"],
    "docs/guides/arm.md": ["Not run in the tests: takes an hour"],
    "docs/guides/benchmark.md": ["Not run in the tests: takes minutes"],
    "docs/guides/browser.md": [
        "Not run in the tests: needs a phone",
        "Not run in the tests: needs npm",
        "Not run in the tests: needs a GPU",
    ],
    "docs/guides/distributed_training.md": ["Not run in the tests: needs two machines"],
    "docs/guides/fine_tune.md": [
        "Not run in the tests: needs the internet",
        "Not run in the tests: needs torch and timm",
        "Not run in the tests: needs the internet",
    ],
    "docs/guides/npu.md": ["Not run in the tests: downloads Qualcomm's compiler"],
    "docs/guides/gpu.md": [
        "Run by tests/test_gpu.py: needs a GPU",
        "Run by tests/test_gpu.py: needs Chromium",
        "Run by tests/test_gpu.py: needs a GPU",
    ],
    "docs/guides/microcontroller.md": ["Run by tests/test_readers.py: needs the extra readers"],
    "docs/guides/own_photos.md": ["Not run in the tests: needs the internet", "Not run in the tests: needs Docker"],
    "docs/guides/phone.md": ["Not run in the tests: needs a phone"],
    "docs/guides/serve.md": ["Not run in the tests: needs Docker"],
    "docs/guides/train.md": ["Not run in the tests: needs ImageNet"] * 2,
    "docs/guides/ssh.md": ["Not run in the tests: needs a board"] * 3,
    "docs/results/ablations.md": [
        "Run by tests/test_examples.py",
        "Run by tests/test_examples.py",
        "Run by tests/test_examples.py with one seed; takes nine minutes",
    ],
    "docs/results/devices.md": [
        "Not run in the tests: downloads qemu and Python for Arm",
        "Not run in the tests: takes an hour",
        "Not run in the tests: downloads MediaPipe",
    ],
    "docs/results/exports.md": ["Run by tests/test_examples.py with two networks; takes 15 minutes to an hour"],
    "docs/results/placement.md": ["Not run in the tests: takes minutes"],
}


PHOTOS = "docs/guides/own_photos.md"  # runs on photos, which a test of its own makes
RUN = list(dict.fromkeys(x.page for x in BLOCKS if not (x.title or x.installs or x.page == PHOTOS)))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


FASHION = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
CLASSES = {0: "shirt", 8: "bag", 9: "boot"}


def labelled_images():
    """Images of 28x28 pixels in 0 to 255 and their labels: Fashion-MNIST, or else enlarged digits."""
    if not FASHION.is_dir():
        scans = sklearn.datasets.load_digits()
        return np.kron(scans.images * 255 / 16, np.ones((1, 3, 3))).astype("uint8"), scans.target
    images, labels = (FASHION / f"train-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1"))
    labels = np.frombuffer(gzip.decompress(labels.read_bytes()), "uint8", offset=8)
    return np.frombuffer(gzip.decompress(images.read_bytes()), "uint8", offset=16).reshape(-1, 28, 28), labels


def write_photos(folder):
    """A folder photos/ with a folder for each class, and a photo new.jpg of the class boot that is not in it."""
    images, labels = labelled_images()
    for label, name in CLASSES.items():
        (folder / "photos" / name).mkdir(parents=True)
        *old, new = images[labels == label][:101]
        for number, image in enumerate(old):
            Image.fromarray(image).save(folder / "photos" / name / f"{number}.jpg")
    Image.fromarray(new).save(folder / "new.jpg")


@pytest.fixture(scope="module")
def hooks():
    specification = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", [pytest.param(x, marks=() if x in FAST else pytest.mark.slow) for x in RUN])
def test_blocks_of_a_page_run_from_top_to_bottom(page, folder):
    documents.run(page, folder)


@pytest.mark.slow
def test_photos_become_a_file_that_knows_them(folder):
    write_photos(folder)
    documents.run(PHOTOS, folder)
    best, *_ = se_keras.predict("photos_int8.tflite", "new.jpg", top=3)
    assert best.name == "boot"


@pytest.mark.sweep
def test_notebook_runs(tmp_path):
    nbformat = pytest.importorskip("nbformat", reason='pip install -e ".[docs]"')
    nbclient = pytest.importorskip("nbclient", reason='pip install -e ".[docs]"')
    notebook = nbformat.read(ROOT / "docs" / "quickstart.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    printed = "".join(output["text"] for output in notebook.cells[-1].outputs if output.get("name") == "stdout")
    assert float(re.search(r"top-1 agreement ([\d.]+)%", printed)[1]) > 99


def test_blocks_that_are_not_run_from_top_to_bottom_are_these():
    found = {}
    for block in BLOCKS:
        if block.title:
            found.setdefault(block.page, []).append(block.title)
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
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]*) \| .+ \| (\S+) \| (\S+) \|$", page, re.MULTILINE)
    assert set(rows) == {(x, f"{y.top1:.3f}" if y.top1 else "", y.license, y.repo) for x, y in IMAGENET.items()}
    inputs = {(spec_of(name).input_shape, spec_of(name).normalization) for name in IMAGENET}
    assert inputs == {((224, 224, 3), Normalization((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))}


def test_docs_say_how_many_networks_there_are():
    counts = {count for text in TEXTS.values() for count in re.findall(r"\b(\d+) networks", text)}
    assert str(len(names())) in counts
    # Those of groups of networks: the ones with grouped convolutions.
    assert counts <= {str(len(names())), "37"}
