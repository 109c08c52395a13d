"""Wheel, sdist and editable install: each module once, at the path that its name says; versions are one everywhere."""

import configparser
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import se_keras

ROOT = Path(__file__).parents[1]
LINKS = {"se_keras/export": "../export", "se_keras_cli": "se_keras/cli"}


def modules():
    """The installed path of each .py file of the checkout's packages, sorted."""
    export = {f"se_keras/{path.relative_to(ROOT).as_posix()}" for path in ROOT.glob("export/**/*.py")}
    command = {f"se_keras_cli/{path.relative_to(ROOT / 'se_keras/cli')}" for path in ROOT.glob("se_keras/cli/**/*.py")}
    others = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("se_keras/**/*.py")}
    return sorted(export | command | {name for name in others if not name.startswith(("se_keras/cli/", "se_keras/ex"))})


def run(*command, folder, **environment):
    """A process that finds no package by the environment of this one; its stdout."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    result = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=inherited | environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The folder with the sdist, and the wheel that was built from it."""
    source, target = (tmp_path_factory.mktemp(name) for name in ("source", "dist"))
    # A copy: a build leaves folders in the checkout, and takes old ones for its own.
    left_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")
    shutil.copytree(ROOT, source, ignore=left_out, dirs_exist_ok=True)
    # Without isolation nothing is downloaded, where setuptools is as recent as pyproject.toml asks.
    recent = int(metadata.version("setuptools").partition(".")[0]) >= 77
    run("-m", "build", *(["--no-isolation"] if recent else []), "--outdir", target, source, folder=target)
    return target


@pytest.fixture(scope="session")
def wheel(built):
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def sdist(built):
    (path,) = built.glob("*.tar.gz")
    return path


@pytest.fixture(scope="session")
def installed(wheel, tmp_path_factory):
    """A folder with nothing but the wheel's content."""
    folder = tmp_path_factory.mktemp("installed")
    arguments = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", "--target", folder]
    run("-m", "pip", *arguments, wheel, folder=folder)
    return folder


@pytest.fixture(scope="session")
def information(wheel):
    """The wheel's METADATA."""
    with zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(file.read(name).decode())


@pytest.mark.slow
def test_wheel_has_every_module_of_the_checkout_and_no_other(wheel):
    with zipfile.ZipFile(wheel) as file:
        assert sorted(name for name in file.namelist() if name.endswith(".py")) == modules()


@pytest.mark.slow
def test_wheel_has_the_data_files_of_the_checkout(wheel):
    with zipfile.ZipFile(wheel) as file:
        data = {name for name in file.namelist() if not name.endswith(".py") and ".dist-info/" not in name}
    of_benchmark = {"report.html", "browser/page.html", "browser/page.js", "programs/count_instructions.c"}
    ours = {"se_keras/networks.json", "se_keras/py.typed"}
    assert data == ours | {f"se_keras/export/benchmark/{name}" for name in of_benchmark}


@pytest.mark.slow
def test_wheel_has_two_packages_at_its_top(wheel):
    with zipfile.ZipFile(wheel) as file:
        top = {name.partition("/")[0] for name in file.namelist()}
    assert top == {"se_keras", "se_keras_cli", f"se_keras-{se_keras.__version__}.dist-info"}


@pytest.mark.slow
def test_every_folder_of_modules_is_a_package(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    assert {f"{Path(name).parent.as_posix()}/__init__.py" for name in modules()} <= names


@pytest.mark.parametrize("link", LINKS)
def test_checkout_has_each_package_where_its_name_says(link):
    assert os.readlink(ROOT / link) == LINKS[link]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LICENSE", "README.md", "setup.cfg", "pyproject.toml", "se_keras/export/__init__.py"])
def test_sdist_has_what_a_build_needs(sdist, name):
    with tarfile.open(sdist) as file:
        assert f"se_keras-{se_keras.__version__}/{name}" in file.getnames()


@pytest.mark.slow
def test_sdist_has_every_module_of_the_checkout_once(sdist):
    with tarfile.open(sdist) as file:
        names = [name.partition("/")[2] for name in file.getnames() if name.endswith(".py")]
    assert sorted(name for name in names if name.startswith(("se_keras", "export"))) == modules()


WHERE = """
import json, se_keras, se_keras.export, se_keras.export.litert, se_keras_cli
print(json.dumps([module.__file__ for module in (se_keras, se_keras.export, se_keras.export.litert, se_keras_cli)]))
"""


@pytest.mark.slow
def test_wheel_is_imported_from_where_it_was_installed(installed, tmp_path):
    files = json.loads(run("-c", WHERE, folder=tmp_path, PYTHONPATH=str(installed)))
    names = ["se_keras/__init__.py", "se_keras/export/__init__.py", "se_keras/export/litert/__init__.py"]
    assert files == [str(installed / name) for name in (*names, "se_keras_cli/__init__.py")]


@pytest.mark.slow
def test_wheel_brings_the_command(installed, tmp_path):
    out = run(installed / "bin" / "se-keras", "--version", folder=tmp_path, PYTHONPATH=str(installed))
    assert out.startswith(f"se-keras {se_keras.__version__} (TensorFlow ")


@pytest.mark.slow
@pytest.mark.parametrize("place", ["the checkout", "its parent folder", "elsewhere"])
def test_editable_install_is_imported_from_every_folder(tmp_path, place):
    if place == "its parent folder":  # where a checkout named se_keras looks like a package without __init__.py
        (tmp_path / "se_keras").symlink_to(ROOT)
    files = json.loads(run("-c", WHERE, folder=ROOT if place == "the checkout" else tmp_path))
    names = ("se_keras/__init__.py", "se_keras/export/__init__.py", "se_keras/export/litert/__init__.py")
    assert files == [str(ROOT / name) for name in (*names, "se_keras_cli/__init__.py")]


def test_export_is_refused_under_the_name_of_its_folder():
    result = subprocess.run([sys.executable, "-c", "import export"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    *_, last = result.stderr.splitlines()
    assert last == (
        "ImportError: This package is se_keras.export: install se_keras and import that. Received: export"
    )  # fmt: skip


def test_cli_is_refused_under_the_name_of_its_folder():
    with pytest.raises(ImportError, match="This package is se_keras_cli: .+ Received: se_keras.cli"):
        importlib.import_module("se_keras.cli")


@pytest.mark.slow
def test_version_is_one(wheel, sdist, information):
    version = se_keras.__version__
    assert metadata.version("se-keras") == information["Version"] == version
    assert wheel.name.startswith(f"se_keras-{version}-")
    assert sdist.name == f"se_keras-{version}.tar.gz"


def test_version_is_that_of_the_citation_and_in_the_changelog():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == se_keras.__version__
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    newest = headings[headings[0] == "Unreleased"]
    assert re.fullmatch(rf"{re.escape(se_keras.__version__)} \(\d{{4}}-\d\d-\d\d\)", newest)


def test_ci_runs_every_python_of_the_classifiers_and_the_oldest_versions():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    pythons = re.findall(r"Python :: (3\.\d+)$", setup["metadata"]["classifiers"], re.MULTILINE)
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    matrix = workflow["jobs"]["tests"]["strategy"]["matrix"]
    assert matrix["python"] == pythons and setup["options"]["python_requires"] == f">={pythons[0]}"
    assert {"python": pythons[0], "part": "oldest"} in matrix["include"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra, requirements", [("test", {"pytest", "ruff", "build"}), ("parity", {"torch", "timm"})]
)  # fmt: skip
def test_extra_brings_its_requirements(information, extra, requirements):
    assert extra in information.get_all("Provides-Extra")
    lines = [line for line in information.get_all("Requires-Dist") if f'extra == "{extra}"' in line]
    assert requirements <= {Requirement(line).name for line in lines}


@pytest.mark.slow
def test_wheel_requires_what_the_packages_import(information):
    required = {Requirement(line).name for line in information.get_all("Requires-Dist") if "extra ==" not in line}
    assert {"tensorflow", "keras", "numpy", "ai-edge-litert", "ai-edge-quantizer", "rich", "scikit-learn"} <= required


@pytest.mark.slow
def test_metadata_have_the_readme_and_the_license(information, wheel):
    assert information.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    assert "Apache-2.0" in (information["License-Expression"], information["License"])
    with zipfile.ZipFile(wheel) as file:
        (license,) = (name for name in file.namelist() if name.endswith("/LICENSE"))
        assert file.read(license) == (ROOT / "LICENSE").read_bytes()
