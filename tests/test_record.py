"""The files of a training for people, read back as they would read them."""

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import se_keras
from se_keras.training import record

FIGURES = {
    "loss": [2.0, 1.0, 0.5],
    "accuracy": [0.2, 0.6, 0.9],
    "val_loss": [1.9, 1.2, 0.8],
    "val_accuracy": [0.3, 0.5, 0.8],
    "learning_rate": [0.1, 0.1, 0.01],
}


def test_csv_has_a_row_for_each_epoch(tmp_path):
    record.write_csv(tmp_path, FIGURES)
    rows = list(csv.DictReader((tmp_path / "history.csv").read_text().splitlines()))
    assert [row.pop("epoch") for row in rows] == ["1", "2", "3"]
    assert {name: [float(row[name]) for row in rows] for name in FIGURES} == FIGURES


def test_csv_is_replaced_whole(tmp_path):
    record.write_csv(tmp_path, FIGURES)
    record.write_csv(tmp_path, {name: values[:1] for name, values in FIGURES.items()})
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["history.csv"]


def test_tensorboard_reads_each_epoch_once(tmp_path):
    for epoch in (1, 2, 3):
        record.write_tensorboard(tmp_path, {name: values[epoch - 1] for name, values in FIGURES.items()}, epoch)
    found = {}
    for path in sorted((tmp_path / record.EVENTS).iterdir()):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                assert value.metadata.plugin_data.plugin_name == "scalars"
                found.setdefault(value.tag, {})[event.step] = float(tf.make_ndarray(value.tensor))
    for name, values in FIGURES.items():
        assert found[name] == {epoch: pytest.approx(value) for epoch, value in enumerate(values, start=1)}


@pytest.mark.parametrize("epochs", [1, 3, 300])
def test_curves_show_each_run_in_its_colour(tmp_path, epochs):
    figures = {name: np.linspace(values[0], values[-1], epochs).tolist() for name, values in FIGURES.items()}
    other = {name: [0.8 * value for value in values] for name, values in figures.items()}
    record.draw_curves(tmp_path / "curves.png", {"resnet50": other, "se_resnet50": figures})
    pixels = tf.io.decode_png((tmp_path / "curves.png").read_bytes()).numpy()[..., :3].astype(int)
    assert pixels.shape[:2] == (480, 1200)
    for half in (pixels[:360, :600], pixels[:360, 600:]):  # error and loss, without the legend below them
        for color in ((0, 114, 178), (213, 94, 0)):  # blue and vermilion of Okabe and Ito
            assert (np.abs(half - color).max(axis=-1) < 8).sum() > 20


def test_curves_name_each_run_and_each_part(tmp_path):
    record.draw_curves(tmp_path / "curves.svg", {"resnet50": FIGURES, "se_resnet50": FIGURES})
    text = (tmp_path / "curves.svg").read_text()
    for label in ("resnet50, training", "resnet50, validation", "se_resnet50, validation", "top-1 error, %", "epoch"):
        assert f"<!-- {label} -->" in text


@pytest.mark.parametrize("runs", [{}, {"resnet50": {}}, {"resnet50": {"loss": []}}])
def test_nothing_to_draw_is_refused(tmp_path, runs):
    with pytest.raises(ValueError, match="Curves need runs with at least one epoch. Received: none"):
        record.draw_curves(tmp_path / "curves.png", runs)


def test_kind_of_picture_that_cannot_be_drawn_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Curves are drawn as .png, .svg or .pdf. Received: '.+/curves.gif'"):
        record.draw_curves(tmp_path / "curves.gif", {"resnet50": FIGURES})
    assert list(tmp_path.iterdir()) == []


def test_provenance_is_that_of_the_sources():
    made = record.provenance()
    assert made == record.provenance()
    assert made["versions"]["se-keras"] == se_keras.__version__
    assert re.fullmatch("[0-9a-f]{64}", made["source_sha256"])


def test_sources_have_the_same_checksum_in_a_checkout_and_in_a_wheel(tmp_path):
    root = Path(se_keras.__file__).parents[1]
    shutil.copytree(root / "se_keras", tmp_path / "se_keras", ignore=shutil.ignore_patterns("cli"))  # links as folders
    shutil.copytree(root / "se_keras_cli", tmp_path / "se_keras_cli")
    assert not (tmp_path / "se_keras" / "export").is_symlink()
    assert record.source_sha256(tmp_path) == record.source_sha256(root)
    for changed in ("se_keras/version.py", "se_keras/export/__init__.py", "se_keras_cli/__init__.py"):
        before = record.source_sha256(tmp_path)
        with (tmp_path / changed).open("a") as file:
            file.write("# changed")
        assert record.source_sha256(tmp_path) != before
