"""docs/picture.svg is drawn from docs/data/cost.csv, whose figures are those of the pages that have them."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def picture():
    """docs/picture.py as a module."""
    specification = importlib.util.spec_from_file_location("picture", ROOT / "docs" / "picture.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_picture_is_what_its_script_makes_of_its_data(picture):
    assert picture.PICTURE.read_text(encoding="utf-8") == picture.draw(picture.read())


def test_picture_has_a_bar_for_each_row(picture):
    rows = picture.read()
    new = {"where": "Arm", "what": "int8, frozen", "ratio": 1.004, "low": 1.003, "high": 1.005}
    before, after = picture.draw(rows), picture.draw([*rows, new])
    assert after.count('height="18"') == before.count('height="18"') + 1 == len(rows) + 1
    assert ">+0.4 %<" in after and ">Arm<" in after


def test_figures_of_the_picture_are_those_of_their_pages(picture):
    for row in picture.read():
        lines = (ROOT / "docs" / row["source"]).read_text(encoding="utf-8").splitlines()
        ratio = f"{row['ratio']:.3f}" if row["low"] else picture.percent(row["ratio"])
        interval = f"{row['low']:.3f}..{row['high']:.3f}" if row["low"] else ""
        assert any(ratio in line and interval in line for line in lines), row


def test_percentages_of_the_readme_are_those_of_the_picture(picture):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    drawn = {picture.percent(row["ratio"]).lstrip("+") for row in picture.read()}
    assert set(re.findall(r"\d+\.\d %", readme)) <= drawn
