"""Runs int8 and float32 files of several networks on Arm, emulated by qemu, and compares the outputs with x86.

python examples/on_arm.py                  # keeps qemu and Python for Arm, 230 MB, in ~/.cache/se_keras/arm
python examples/on_arm.py a_folder --networks se_resnet50 --cpu max --json

It needs Debian's apt-get and dpkg on x86, and pip, but no root: nothing is installed. It exits with 1 if outputs
disagree and with 2 if they could not be compared. docs/results/devices.md has its output and what that shows.
`se-keras benchmark --arm-instructions` counts instructions there: docs/guides/arm.md.
"""

import argparse
import json
import platform
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import keras
import numpy as np

import se_keras
from se_keras.export import agreement, to_litert
from se_keras.export.benchmark import arm
from se_keras.export.benchmark.programs import marked_inference, run
from se_keras.export.benchmark.targets.instructions import CPUS
from se_keras.export.litert.file import plain_interpreter
from se_keras.export.outputs import noise
from se_keras.training.data import digits

NETWORKS = (
    "se_resnet11_digits",  # trained; the others have random weights, and noise as images
    "se_resnet50",
    "se_resnext50_32x4d",
    "se_bn_inception",
    "se_mobilenet_025",
    "se_shufflenet_g3_025",
)
IMAGES, CALIBRATION = 4, 32
SHAPE = (64, 64, 3)  # qemu is slow

# Sums of int8 products are exact in int32, in any order. Then each result is rounded to int8. Here kernels differ: when
# XNNPACK multiplies tensors, as in squeeze-and-excitation, it rounds halves up in fixed point on Arm, and it rounds
# halves to even in float32 on x86. A value near a half can become either neighbour.
LARGEST_STEPS = 1
# Float32 sums in another order: about 1e-7 of the terms in each sum, which grows through fifty layers.
LARGEST_ERROR = 1e-5


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How much the outputs of a file on Arm differ from those on x86.

    Args:
        difference: The largest difference, as a share of the range of the logits.
        steps: The same in steps of the last int8 tensor; None in float32.
        span: The range of the outputs on x86 in these steps; None in float32.
    """

    network: str
    precision: str
    bytes: int
    cpu: str
    difference: float
    steps: int | None
    span: int | None

    @property
    def agrees(self):
        """Whether the difference is within the tolerance."""
        return self.difference <= LARGEST_ERROR if self.steps is None else self.steps <= LARGEST_STEPS

    @property
    def verdict(self):
        """The same in words."""
        if not self.agrees:
            return "DISAGREES"
        if self.difference == 0:
            return "equal"
        return f"within {LARGEST_ERROR:.0e}" if self.steps is None else "within one step"


def say(line):
    """Prints progress."""
    print(line, file=sys.stderr, flush=True)


def network(name):
    """A network with logits as outputs, images to calibrate it on, and images to compare on."""
    keras.utils.set_random_seed(0)
    if name == "se_resnet11_digits":
        data, model = digits(), se_keras.create(name, classifier_activation=None)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.05, momentum=0.9), loss)
        model.fit(data.train.images, data.train.labels, epochs=5, verbose=0)
        return model, data.train.images[:CALIBRATION], data.test.images[:IMAGES]
    model = se_keras.create(name, input_shape=SHAPE, classifier_activation=None)
    images = noise(SHAPE, samples=CALIBRATION + IMAGES)
    # The statistics of the images, as after training: with Keras' initial ones, activations grow or vanish from block
    # to block, and the logits become meaningless. And a beta of 1, so that most values pass the next ReLU: with 0, each
    # BatchNorm amplifies what the ReLU left of the differences, rounding included, and int8 ends in noise.
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
            layer.beta.assign(keras.ops.ones_like(layer.beta))
    model(images[:CALIBRATION], training=True)
    return model, images[:CALIBRATION], images[CALIBRATION:]


def files(model, calibration):
    """The float32 and the int8 file. The int8 file ends with logits, because a softmax hides a shift of all logits."""
    probabilities = keras.Model(model.input, keras.layers.Softmax()(model.output), name=model.name)
    return {
        "float32": to_litert(probabilities).content,
        "int8": to_litert(model, precision="int8", calibration=calibration).content,
    }


def output_step(content):
    """One step of the int8 tensor that the output of a file is dequantized from."""
    reader = plain_interpreter(content)
    (output,) = reader.get_output_details()
    (quantized,) = (op["inputs"][0] for op in reader._get_ops_details() if output["index"] in op["outputs"])
    (tensor,) = (tensor for tensor in reader.get_tensor_details() if tensor["index"] == quantized)
    return tensor["quantization"][0]


def compare(machine, cpus, name):
    """Yields the Comparisons of both files of a network on each CPU."""
    say(f"{name}: exporting")
    model, calibration, images = network(name)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        np.save(folder / "images.npy", images[:, None])
        for precision, content in files(model, calibration).items():
            (folder / "file.tflite").write_bytes(content)
            paths = [folder / part for part in ("file.tflite", "images.npy", "outputs.npz")]
            run(marked_inference, *paths, failure="The file does not run here")
            x86 = outputs(paths[-1])
            for cpu in cpus:
                say(f"{name}: {precision} on {cpu}")
                machine.python(cpu, "-P", marked_inference.__file__, *paths)
                yield compared(name, precision, content, cpu, x86, outputs(paths[-1]))


def outputs(path):
    """The output that the program saved."""
    with np.load(path) as saved:
        (output,) = saved.values()
    return output


def compared(name, precision, content, cpu, x86, arm):
    """The Comparison of two outputs of a file."""
    step = output_step(content) if precision == "int8" else None
    return Comparison(
        network=name,
        precision=precision,
        bytes=len(content),
        cpu=cpu,
        difference=agreement({"output": x86}, {"output": arm}, as_logits=precision == "float32").max_error,
        steps=None if step is None else round(float(np.abs(arm - x86).max() / step)),
        span=None if step is None else round(float(np.ptp(x86) / step)),
    )


def table(rows):
    """Rows of text as lines, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def for_people(comparisons):
    """A table of the CPU with the largest difference for each file."""
    worst = {}
    for c in comparisons:
        file = (c.network, c.precision)
        worst[file] = max(worst.get(file, c), c, key=lambda one: one.difference)
    rows = [("network", "precision", "bytes", "difference", "int8 steps", "verdict")]
    for (name, precision), c in worst.items():
        steps = "" if c.steps is None else f"{c.steps} of {c.span}"
        rows.append((name, precision, f"{c.bytes:,}", f"{c.difference:.1e}", steps, c.verdict))
    return table(rows)


def main():
    """Compares every network on every CPU and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=arm.FOLDER)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--cpu", nargs="+", default=list(CPUS), help="as qemu-aarch64 names them")
    parser.add_argument("--json", action="store_true", help="each comparison, for programs")
    arguments = parser.parse_args()
    if platform.machine() != "x86_64":
        parser.exit(2, f"Arm is compared with x86_64, so this must run on x86_64. Received: {platform.machine()}\n")
    try:
        machine = arm.fetch(arguments.folder, progress=say)
        versions = machine.versions | {"ai-edge-litert on x86": version("ai-edge-litert")}
        comparisons = [c for name in arguments.networks for c in compare(machine, arguments.cpu, name)]
    except (OSError, ValueError) as error:
        parser.exit(2, f"{error}\n")
    if arguments.json:
        found = [asdict(c) | {"verdict": c.verdict} for c in comparisons]
        print(json.dumps({"versions": versions, "comparisons": found}, indent=2))
    else:
        print(", ".join(f"{name} {version}" for name, version in versions.items()), for_people(comparisons), sep="\n\n")
    return 0 if all(c.agrees for c in comparisons) else 1


if __name__ == "__main__":
    sys.exit(main())
