"""Runs int8 and float32 files of several networks on Arm, emulated by qemu, and compares the outputs with x86.

python examples/on_arm.py                        # keeps the files for Arm, 150 MB, in ~/.cache/se_keras/on_arm
python examples/on_arm.py a_folder --networks se_resnet50 --cpu max --json

It needs Debian's apt-get and dpkg on x86, and pip, but no root: nothing is installed. It exits with 1 if outputs
disagree and with 2 if they could not be compared. docs/results/devices.md has its output and what that shows.
"""

import argparse
import importlib.metadata
import inspect
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import keras
import numpy as np

import se_keras
from se_keras.export import agreement, to_litert
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

LITERT = "2.1.6"  # 2.2.0 and 2.3.0 crash with a segmentation fault under qemu 7.2
# Armv8.0; with dot products of int8; with products of int8 matrices and everything else except SME. Int8 kernels for
# SME use smopa, with which every int8 file is wrong under qemu 7.2, and only there.
CPUS = ("cortex-a53", "cortex-a76", "max,sme=off")
# The instructions of XNNPACK's matrix products, as (mask, value). They show which kernels ran on which CPU.
INSTRUCTIONS = {
    "smull": (0xBFE0FC00, 0x0E20C000),  # int8 times int8
    "sdot": (0xBFC0F400, 0x0F80E000),  # sums of four such products
    "smmla": (0xFFE0FC00, 0x4E80A400),  # a 2x8 matrix by an 8x2
    "smopa": (0xFFE0001C, 0xA0800000),  # SME: a column by a row, four deep
    "fmla": (0xBFC0F400, 0x0F801000),  # float32
    "fmopa": (0xFFE0001C, 0x80800000),  # SME: a column by a row
}

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
        instructions: How many instructions of each kind qemu translated.
    """

    network: str
    precision: str
    bytes: int
    cpu: str
    difference: float
    steps: int | None
    span: int | None
    instructions: dict

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


def call(*command, **options):
    """What a command prints. Raises OSError with its last line if it fails."""
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    if result.returncode:
        lines = (result.stderr or result.stdout).strip().splitlines() or ["no message"]
        raise OSError(f"{Path(command[0]).name} exited with {result.returncode}: {lines[-1]}")
    return result.stdout


class Arm:
    """qemu with Debian's Python and LiteRT for Arm, in a folder that is created atomically the first time.

    Raises:
        OSError: If a tool is missing, or fails.
    """

    def __init__(self, folder):
        folder = folder.resolve()
        self.qemu, self.root, self.site = folder / "qemu", folder / "root", folder / "site"
        if not folder.exists():
            missing = [tool for tool in ("apt-get", "dpkg", "dpkg-deb") if shutil.which(tool) is None]
            if missing:
                raise OSError(f"Python for Arm needs Debian's apt-get and dpkg. Missing: {', '.join(missing)}")
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
                (Path(temporary) / "new").mkdir()
                self._fill(Path(temporary) / "new", Path(temporary) / "packages")
                (Path(temporary) / "new").rename(folder)
        self.python = _python(self.root)

    @staticmethod
    def _fill(folder, packages):
        state, cache, status = packages / "state", packages / "cache", packages / "status"
        for partial in (state / "lists/partial", cache / "archives/partial"):
            partial.mkdir(parents=True)
        status.touch()  # as if nothing were installed, so that everything that Python needs is fetched
        host = call("dpkg", "--print-architecture").strip()
        options = {
            "Dir::State": state,
            "Dir::State::status": status,
            "Dir::Cache": cache,
            "APT::Sandbox::User": "root",  # another user could not write to this folder
        }
        apt = ["apt-get", "--quiet", "--yes", f"--option=APT::Architectures={host},arm64"]
        apt += [f"--option={name}={value}" for name, value in options.items()]
        say("fetching qemu and Debian's Python for Arm")
        call(*apt, "update")
        wanted = (f"qemu-user-static:{host}", "python3:arm64", "libstdc++6:arm64")
        call(*apt, "install", "--download-only", "--no-install-recommends", *wanted)
        archives = cache / "archives"
        for package in archives.glob("*_arm64.deb"):
            call("dpkg-deb", "--extract", package, folder / "root")
        call("dpkg-deb", "--extract", *archives.glob("qemu-user-static_*.deb"), packages / "qemu")
        shutil.copy2(packages / "qemu/usr/bin/qemu-aarch64-static", folder / "qemu")
        say(f"fetching ai-edge-litert {LITERT} and numpy for Arm")
        version = _python(folder / "root").name.removeprefix("python")
        platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in range(17, 37)]  # Debian 12 has glibc 2.36
        options = ["--no-deps", "--only-binary=:all:", f"--python-version={version}", *platforms]
        wanted = (f"ai-edge-litert=={LITERT}", "numpy")
        call(sys.executable, "-m", "pip", "install", *options, "--target", folder / "site", *wanted)

    def run(self, cpu, *arguments):
        """Calls `run` on an emulated CPU, and returns how many of the INSTRUCTIONS were translated."""
        program = f"{inspect.getsource(run)}\nimport sys\nrun(*sys.argv[1:])"
        with tempfile.NamedTemporaryFile("r") as trace:
            machine = (self.qemu, "-cpu", cpu, "-L", self.root, "-d", "in_asm", "-D", trace.name)
            call(*machine, self.python, "-c", program, *arguments, env={"PYTHONPATH": str(self.site)})
            found = re.findall(r"^0x[0-9a-f]+: +([0-9a-f]{8})\b", trace.read(), re.MULTILINE)
        words = [int(word, 16) for word in found]
        counts = Counter(name for word in words for name, (mask, value) in INSTRUCTIONS.items() if word & mask == value)
        return {name: counts[name] for name in INSTRUCTIONS if counts[name]}


def _python(root):
    return next((root / "usr/bin").glob("python3.*"))


def run(file, images, outputs):
    """Runs a file image by image and saves its outputs: the same code here and on Arm, where se_keras is missing."""
    import numpy as np
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=file, num_threads=1)
    interpreter.allocate_tensors()
    (image,), (output,) = interpreter.get_input_details(), interpreter.get_output_details()
    rows = []
    for pixels in np.load(images):
        interpreter.set_tensor(image["index"], pixels[None])
        interpreter.invoke()
        rows.append(interpreter.get_tensor(output["index"]))
    np.save(outputs, np.concatenate(rows))


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


def compare(arm, cpus, name):
    """Yields the Comparisons of both files of a network on each CPU."""
    say(f"{name}: exporting")
    model, calibration, images = network(name)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        np.save(folder / "images.npy", images)
        for precision, content in files(model, calibration).items():
            (folder / "file.tflite").write_bytes(content)
            paths = [str(folder / part) for part in ("file.tflite", "images.npy", "outputs.npy")]
            run(*paths)
            x86 = np.load(paths[-1])
            for cpu in cpus:
                say(f"{name}: {precision} on {cpu}")
                instructions = arm.run(cpu, *paths)
                yield compared(name, precision, content, cpu, x86, np.load(paths[-1]), instructions)


def compared(name, precision, content, cpu, x86, arm, instructions):
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
        instructions=instructions,
    )


def table(rows):
    """Rows of text as lines, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def for_people(comparisons):
    """A table of the CPU with the largest difference for each file, and a table of the instructions on each CPU."""
    worst, instructions = {}, {}
    for c in comparisons:
        file = (c.network, c.precision)
        worst[file] = max(worst.get(file, c), c, key=lambda one: one.difference)
        instructions.setdefault((c.cpu, c.precision), Counter()).update(c.instructions)
    rows = [("network", "precision", "bytes", "difference", "int8 steps", "verdict")]
    for (name, precision), c in worst.items():
        steps = "" if c.steps is None else f"{c.steps} of {c.span}"
        rows.append((name, precision, f"{c.bytes:,}", f"{c.difference:.1e}", steps, c.verdict))
    kernels = [("qemu's CPU", "precision", "instructions in the kernels")]
    for (cpu, precision), counts in instructions.items():
        kernels.append((cpu, precision, ", ".join(f"{count} {name}" for name, count in counts.items())))
    return f"{table(rows)}\n\n{table(kernels)}"


def main():
    """Compares every network on every CPU and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path.home() / ".cache/se_keras/on_arm")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--cpu", nargs="+", default=CPUS, help="as qemu-aarch64 names them")
    parser.add_argument("--json", action="store_true", help="each comparison, for programs")
    arguments = parser.parse_args()
    if platform.machine() != "x86_64":
        parser.exit(2, f"Arm is compared with x86_64, so this must run on x86_64. Received: {platform.machine()}\n")
    try:
        arm = Arm(arguments.folder)
        versions = {
            "qemu": call(arm.qemu, "--version").split()[2],
            "ai-edge-litert on Arm": LITERT,
            "ai-edge-litert on x86": importlib.metadata.version("ai-edge-litert"),
        }
        comparisons = [c for name in arguments.networks for c in compare(arm, arguments.cpu, name)]
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
