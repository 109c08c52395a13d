"""Every network as a float32 and an int8 LiteRT file: sizes, agreement with Keras, operators not delegated to XNNPACK.

python examples/export_catalogue.py exports.jsonl                # all networks; resumes an earlier run
python examples/export_catalogue.py exports.jsonl mobilenet      # networks with this in their names
python examples/export_catalogue.py exports.jsonl --markdown     # prints the file as a table

Weights are random, with the BatchNorm statistics of images: crops of the two photographs of scikit-learn, eight to
calibrate on and eight others to compare on. Trained weights may lose more or less accuracy.
"""

import argparse
import collections
import gc
import json
import sys
import time
from pathlib import Path

import keras
import numpy as np
from sklearn.datasets import load_sample_images

import se_keras
from se_keras.catalogue import names, spec_of
from se_keras.export import to_litert

CROPS = 16


def pictures(shape):
    """Crops of photographs in a network's size, with mean 0 and standard deviation 1 in each channel."""
    height, width, channels = shape
    rng = np.random.default_rng(0)
    crops = []
    for number in range(CROPS):
        photograph = load_sample_images().images[number % 2].astype("float32")
        side = int(rng.integers(200, min(photograph.shape[:2])))
        top, left = (int(rng.integers(0, size - side + 1)) for size in photograph.shape[:2])
        crop = photograph[top : top + side, left : left + side]
        crops.append(keras.ops.convert_to_numpy(keras.ops.image.resize(crop, (height, width))))
    images = np.stack(crops)
    images = images if channels == 3 else images.mean(axis=-1, keepdims=True)
    return (images - images.mean(axis=(0, 1, 2))) / images.std(axis=(0, 1, 2))


def settle(model, images):
    """Sets the statistics of each BatchNorm to those of its input for `images`, as a long training would."""
    norms = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    for layer, x in zip(norms, keras.Model(model.input, [x.input for x in norms])(images, training=True), strict=True):
        layer.moving_mean.assign(keras.ops.mean(x, axis=(0, 1, 2)))
        layer.moving_variance.assign(keras.ops.var(x, axis=(0, 1, 2)))


def measured(name):
    """The record of one network."""
    keras.utils.set_random_seed(0)
    model = se_keras.create(name)
    images = pictures(spec_of(name).input_shape)
    settle(model, images[:4])
    started = time.perf_counter()
    float32 = to_litert(model, held_out=images[8:])
    int8 = to_litert(model, precision="int8", calibration=images[:8], held_out=images[8:], converted=float32)
    record = {"name": name, "seconds": round(time.perf_counter() - started, 1)}
    for precision, made in (("float32", float32), ("int8", int8)):
        undelegated = dict(collections.Counter(made.runner().undelegated()))
        record[precision] = {"bytes": len(made.content), "undelegated": undelegated, **made.manifest["agreement"]}
    return record


def markdown(records):
    """The table of docs/results/exports.md."""
    lines = [
        "| network | float32 MB | max error | int8 MB | max error | cosine | top-1 | not delegated |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for record in sorted(records, key=lambda r: (r["name"].removeprefix("se_"), r["name"])):
        full, int8 = record["float32"], record["int8"]
        undelegated = full["undelegated"] | int8["undelegated"]
        cells = (
            record["name"],
            f"{full['bytes'] / 1e6:.1f}",
            f"{full['max_error']:.0e}",
            f"{int8['bytes'] / 1e6:.1f}",
            f"{int8['max_error']:.2f}",
            f"{int8['cosine']:.4f}",
            f"{round(int8['top1'] * int8['samples'])}/{int8['samples']}",
            ", ".join(f"{count} {kind}" for kind, count in undelegated.items()),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, help="file of the records: one JSON object in each line")
    parser.add_argument("part", nargs="*", help="only networks with one of these in their names")
    parser.add_argument("--markdown", action="store_true", help="print the records as a table")
    options = parser.parse_args()
    done = [json.loads(line) for line in options.records.read_text().splitlines()] if options.records.exists() else []
    if options.markdown:
        print(markdown(done))
        sys.exit()
    wanted = [name for name in names() if not options.part or any(part in name for part in options.part)]
    for name in sorted(set(wanted) - {record["name"] for record in done}):
        record = measured(name)
        with options.records.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{name}: {record['seconds']} s, int8 cosine {record['int8']['cosine']:.4f}", file=sys.stderr)
        keras.utils.clear_session()
        gc.collect()
