"""Files of a training for people to read: figures as CSV, curves and TensorBoard events, and their provenance."""

import csv
import hashlib
import io
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import tensorflow as tf

from se_keras import storage
from se_keras.drawing import COLORS, picture_file, save
from se_keras.environment import TRAINING_PACKAGES, versions
from se_keras.typing import FilePath, Json

CSV, CURVES, EVENTS = "history.csv", ("curves.png", "curves.svg"), "tensorboard"


def write_csv(folder: FilePath, figures: Mapping[str, Sequence[float]]) -> None:
    """Writes `history.csv`: a row for each epoch, a column for each figure."""
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(["epoch", *figures])
    rows.writerows([epoch, *values] for epoch, values in enumerate(zip(*figures.values(), strict=True), start=1))
    storage.write_bytes(Path(folder) / CSV, text.getvalue().encode())


def write_tensorboard(folder: FilePath, figures: Mapping[str, float], epoch: int) -> None:
    """Appends the figures of an epoch, `{name: value}`, to the TensorBoard events in `folder`."""
    # As tf.summary.scalar does, which needs the package tensorboard.
    scalar = tf.compat.v1.SummaryMetadata(plugin_data={"plugin_name": "scalars"}, data_class="DATA_CLASS_SCALAR")
    writer = tf.summary.create_file_writer(str(Path(folder) / EVENTS))
    with writer.as_default(step=epoch):
        for name, value in figures.items():
            tf.summary.write(name, tf.constant(value, "float32"), metadata=scalar)
    writer.close()


def draw_curves(target: FilePath, runs: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Draws top-1 error and loss against epochs, as in Figures 4 to 6 of arXiv:1709.01507; training is dashed.

    `runs` is `{name: figures}` with the figures that `fit` returns.

    Raises:
        ValueError: If there is nothing to draw, or if `target` is not a .png, .svg or .pdf file.
    """
    from matplotlib.figure import Figure

    target = picture_file(target, "Curves")
    if not runs or not all(figures.get("loss") for figures in runs.values()):
        raise ValueError("Curves need runs with at least one epoch. Received: none")
    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    error, loss = figure.subplots(1, 2)
    for number, (name, figures) in enumerate(runs.items()):
        color = COLORS[number % len(COLORS)]
        epochs = range(1, len(figures["loss"]) + 1)
        marker = "o" if len(epochs) == 1 else None
        for part, style in (("", "--"), ("val_", "-")):
            errors = [100 * (1 - accuracy) for accuracy in figures[f"{part}accuracy"]]
            label = f"{name}, {'validation' if part else 'training'}"
            for axes, values in ((error, errors), (loss, figures[f"{part}loss"])):
                axes.plot(epochs, values, label=label, color=color, linestyle=style, linewidth=1.6, marker=marker)
    for axes, title in ((error, "top-1 error, %"), (loss, "loss")):
        axes.set_title(title, loc="left", fontsize=11)
        axes.set(xlabel="epoch", ylim=(0, None))
        if max(len(figures["loss"]) for figures in runs.values()) == 1:
            axes.set_xlim(0, 2)
        axes.locator_params(axis="x", integer=True)
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*error.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    save(figure, target)


def provenance() -> Json:
    """What made a run: versions, the system, and the SHA-256 of this package's sources, with or without git."""
    return {
        "versions": versions(TRAINING_PACKAGES),
        "python": platform.python_version(),
        "system": platform.platform(),
        "source_sha256": source_sha256(Path(__file__).parents[2]),
    }


def source_sha256(root: Path) -> str:
    """SHA-256 of the sources: the same in a checkout, which has links for two packages, as in site-packages."""
    digest = hashlib.sha256()
    for package in ("se_keras", "se_keras/export", "se_keras_cli"):
        for path in sorted((root / package).rglob("*.py")):
            name = path.relative_to(root / package)
            if package != "se_keras" or name.parts[0] not in ("export", "cli"):
                digest.update(f"{package}/{name}".encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
