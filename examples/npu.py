"""Compiles SE-ResNet-50 and ResNet-50 for the NPU of a Snapdragon, and shows what each takes. Nothing is run or timed.

pip install --no-deps onnxruntime-qnn      # Qualcomm's compiler, 100 MB; nothing else of the package is used
python examples/npu.py                     # float32 and int8, published and lowered, for the Snapdragon 8 Gen 3
python examples/npu.py --soc SM8750 --network se_mobilenet --size 160 --output compiled --json

It needs Linux on x86-64. It calls the program that `ai_edge_litert.aot.aot_compile` calls too, because that one drops
what the compiler prints: the bytes that the NPU moves to and from DRAM. docs/guides/npu.md has its output.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import ai_edge_litert
from ai_edge_litert.aot.vendors.qualcomm.target import SocModel

from se_keras import storage
from se_keras.catalogue import baseline_name, spec_of
from se_keras.export.benchmark.overhead import VARIANTS, export_pairs
from se_keras.export.litert.file import plain_interpreter

PACKAGE = "onnxruntime-qnn"
LITERT = Path(ai_edge_litert.__file__).parent
COMPILER = LITERT / "tools/apply_plugin_main"
PLUGINS = LITERT / "vendors/qualcomm/compiler"
PARTITIONED = re.compile(r"Partitioned subgraph<\d+>, selected (\d+) ops, from a total of (\d+) ops")
TRAFFIC = re.compile(r"\b(read|write)_total_bytes=(\d+)")


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A file that was compiled for an NPU.

    Args:
        operators: Number of operators of the file.
        on_npu: How many of them the NPU runs.
        on_cpu: Names of the operators that stay on the CPU.
        read_bytes, written_bytes: What the NPU moves from and to DRAM in one inference, as the compiler plans it.
        bytes: Size of the compiled file.
    """

    network: str
    precision: str
    variant: str
    operators: int
    on_npu: int
    on_cpu: tuple[str, ...]
    read_bytes: int
    written_bytes: int
    bytes: int


def libraries():
    """The folder with Qualcomm's libraries.

    Raises:
        ImportError: If the package is missing.
        OSError: If LiteRT's wheel has no compiler for this system.
    """
    if not COMPILER.is_file() or not PLUGINS.is_dir():
        raise OSError(f"Compiling for an NPU needs LiteRT's wheel for Linux on x86-64. Missing: {COMPILER}")
    found = importlib.util.find_spec("onnxruntime_qnn")  # not imported: that would need onnxruntime
    if found is None or found.origin is None:
        raise ImportError(f"Compiling for a Snapdragon needs Qualcomm's libraries: pip install --no-deps {PACKAGE}")
    return Path(found.origin).parent


def compile_file(content, target, *, soc, folder, network, precision, variant):
    """Compiles a LiteRT file into the file `target`, with the libraries of `folder`: a `Compiled`.

    Raises:
        ValueError: If the compiler fails, with its first error.
    """
    with tempfile.TemporaryDirectory() as temporary:
        file, compiled = (Path(temporary) / name for name in ("model.tflite", "compiled.tflite"))
        file.write_bytes(content)
        # LiteRT's plugin wants this library too, for an audio processor that is not used here. The package lacks it.
        (Path(temporary) / "libQnnLpai.so").symlink_to(folder / "libQnnSystem.so")
        search = os.pathsep.join(map(str, (temporary, folder, LITERT)))
        about = ("--cmd=apply", "--soc_manufacturer=Qualcomm", f"--soc_model={soc}", f"--libs={PLUGINS}")
        result = subprocess.run(
            [COMPILER, *about, f"--model={file}", f"--o={compiled}"],
            env=os.environ | {"LD_LIBRARY_PATH": search},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        partitions, traffic = PARTITIONED.findall(result.stdout), dict(TRAFFIC.findall(result.stdout))
        if result.returncode or not partitions or not compiled.is_file():
            errors = [x for x in result.stdout.splitlines() if x.startswith("ERROR")] or ["it printed no error"]
            raise ValueError(f"{network} in {precision} cannot be compiled for {soc}: {errors[0]}")
        storage.write_bytes(target, compiled.read_bytes())
    left = [operator["op_name"] for operator in plain_interpreter(target.read_bytes())._get_ops_details()]
    return Compiled(
        network=network,
        precision=precision,
        variant=variant,
        operators=sum(int(total) for _, total in partitions),
        on_npu=sum(int(selected) for selected, _ in partitions),
        on_cpu=tuple(sorted(name for name in left if name != "DISPATCH_OP")),
        read_bytes=int(traffic.get("read", 0)),
        written_bytes=int(traffic.get("write", 0)),
        bytes=target.stat().st_size,
    )


def compile_pairs(options, folder, output):
    """Yields the `Compiled` of the baseline and of the network in each precision and variant."""
    names = baseline_name(options.network), options.network
    shape = options.size and (options.size, options.size, spec_of(options.network).input_shape[2])
    for variant in VARIANTS:
        pairs = export_pairs(
            options.network, variant=variant, precisions=("float32", "int8"), input_shape=shape, progress=say
        )
        for precision, pair in pairs.items():
            for name, file in zip(names, pair, strict=True):
                say(f"compiling {name} {variant} in {precision} for {options.soc}")
                target = output / f"{name}_{variant}_{precision}_{options.soc}.tflite"
                about = {"network": name, "precision": precision, "variant": variant}
                yield compile_file(file.content, target, soc=options.soc, folder=folder, **about)


def for_people(found):
    """A table with a row for each file. SE compared with plain: the ratio of the bytes that are moved."""
    rows = [("precision", "variant", "network", "operators", "on the NPU", "on the CPU", "DRAM MB", "SE / plain")]
    for baseline, network in zip(found[::2], found[1::2], strict=True):
        moved = [one.read_bytes + one.written_bytes for one in (baseline, network)]
        ratios = ("", f"{moved[1] / moved[0]:.3f}" if moved[0] else "unknown")
        for one, total, ratio in zip((baseline, network), moved, ratios, strict=True):
            counts = (str(one.operators), str(one.on_npu), ", ".join(one.on_cpu) or "none")
            rows.append((one.precision, one.variant, one.network, *counts, f"{total / 1e6:.2f}", ratio))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def say(line):
    """Prints progress."""
    print(line, file=sys.stderr, flush=True)


def main():
    """Compiles all files and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="se_resnet50", help="a network with SE (default: %(default)s)")
    parser.add_argument("--size", type=int, metavar="N", help="height and width (default: the network's own)")
    models = [model.value for model in SocModel if model is not SocModel.ALL]
    parser.add_argument("--soc", default="SM8650", choices=models, help="Snapdragon (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="keep the compiled files here")
    parser.add_argument("--json", action="store_true", help="each file, for programs")
    options = parser.parse_args()
    try:
        folder = libraries()
        with tempfile.TemporaryDirectory() as temporary:
            output = options.output or Path(temporary)
            output.mkdir(parents=True, exist_ok=True)
            found = list(compile_pairs(options, folder, output))
    except (ImportError, OSError, ValueError) as error:
        parser.exit(2, f"{error}\n")
    versions = {package: version(package) for package in ("ai-edge-litert", PACKAGE)}
    if options.json:
        print(json.dumps({"soc": options.soc, "versions": versions, "files": list(map(asdict, found))}, indent=2))
    else:
        about = ", ".join(f"{name} {number}" for name, number in versions.items())
        print(f"{options.soc}, {about}: compiled, not run", for_people(found), sep="\n\n")


if __name__ == "__main__":
    main()
