"""What a training leaves for people: figures as CSV, curves and TensorBoard's events, and what made them."""

import csv
import hashlib
import importlib.util
import io
import platform
from importlib.metadata import version
from pathlib import Path

import tensorflow as tf

from se_keras import storage

CSV, CURVES, EVENTS = "history.csv", ("curves.png", "curves.svg"), "tensorboard"
_PACKAGES = ("se-keras", "keras", "tensorflow", "numpy")
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")  # told apart by colour-blind eyes: Okabe and Ito


def write_csv(folder, figures):
    """Writes `history.csv`: a row for each epoch, a column for each figure."""
    text = io.StringIO()
    rows = csv.writer(text)
    rows.writerow(["epoch", *figures])
    rows.writerows([epoch, *values] for epoch, values in enumerate(zip(*figures.values(), strict=True), start=1))
    storage.write_bytes(Path(folder) / CSV, text.getvalue().encode())


def write_tensorboard(folder, figures, epoch):
    """Adds the figures of an epoch, `{name: value}`, to what TensorBoard shows of `folder`."""
    # As tf.summary.scalar writes them, which needs TensorBoard itself.
    scalar = tf.compat.v1.SummaryMetadata(plugin_data={"plugin_name": "scalars"}, data_class="DATA_CLASS_SCALAR")
    writer = tf.summary.create_file_writer(str(Path(folder) / EVENTS))
    with writer.as_default(step=epoch):
        for name, value in figures.items():
            tf.summary.write(name, tf.constant(value, "float32"), metadata=scalar)
    writer.close()


def draw_curves(target, runs):
    """Draws top-1 error and loss against epochs, as Figures 4 to 6 of arXiv:1709.01507: training dashed.

    Args:
        target: File to write; its ending, .png, .svg or .pdf, says how.
        runs: `{name: figures}`, as `fit` returns them; a colour each.

    Raises:
        ValueError: If there is nothing to draw, or if the ending is another.
    """
    from matplotlib.figure import Figure

    target = Path(target)
    if target.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"Curves are drawn as .png, .svg or .pdf. Received: {str(target)!r}")
    if not runs or not all(figures.get("loss") for figures in runs.values()):
        raise ValueError("Curves need runs with at least one epoch. Received: none")
    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    error, loss = figure.subplots(1, 2)
    for number, (name, figures) in enumerate(runs.items()):
        color = _COLORS[number % len(_COLORS)]
        epochs = range(1, len(figures["loss"]) + 1)
        marker = "o" if len(epochs) == 1 else None
        for part, style in (("", "--"), ("val_", "-")):
            label = f"{name}, {'validation' if part else 'training'}"
            how = {"color": color, "linestyle": style, "linewidth": 1.6, "marker": marker}
            error.plot(epochs, [100 * (1 - x) for x in figures[f"{part}accuracy"]], label=label, **how)
            loss.plot(epochs, figures[f"{part}loss"], **how)
    for axes, title in ((error, "top-1 error, %"), (loss, "loss")):
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("epoch")
        axes.set_ylim(bottom=0)
        if max(len(figures["loss"]) for figures in runs.values()) == 1:
            axes.set_xlim(0, 2)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*error.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    with storage.staged(target) as path:
        figure.savefig(path)


def provenance():
    """What made a run: versions, the system, and the SHA-256 of this package's sources, with or without git."""
    digest = hashlib.sha256()
    for package in ("se_keras", "se_keras.export", "se_keras_cli"):  # by import name: a checkout has other folders
        root = Path(next(iter(importlib.util.find_spec(package).submodule_search_locations)))
        inner = [root / name for name in ("export", "cli") if package == "se_keras"]
        for path in sorted(root.rglob("*.py")):
            if not any(path.is_relative_to(folder) for folder in inner):
                digest.update(f"{package}/{path.relative_to(root)}".encode() + b"\0" + path.read_bytes() + b"\0")
    return {
        "versions": {package: version(package) for package in _PACKAGES},
        "python": platform.python_version(),
        "system": platform.platform(),
        "source_sha256": digest.hexdigest(),
    }
