"""A stand-in for adb, with a phone that runs `benchmark_model`. Tests put it on the PATH; it is not a test itself.

The folder in STAND_IN has the properties of the phone in `phone.json`, its files in `phone/`, and the calls in `log`.
"""

import json
import os
import shutil
import struct
import sys
from pathlib import Path

HOME = Path(os.environ["STAND_IN"])
PHONE = json.loads((HOME / "phone.json").read_text())

# tensorflow/tensorflow#73862 (2024), #42507 (2020), and of 2019 (yuenshome.github.io#77).
NEW = """INFO: STARTING!
INFO: Log parameter values verbosely: [0]
INFO: Num threads: [1]
INFO: Graph: [{graph}]
INFO: Loaded model {graph}
INFO: Created TensorFlow Lite XNNPACK delegate for CPU.
INFO: {delegated}
INFO: The input model file size (MB): 16.9008
INFO: Initialized session in 12.75ms.
INFO: Running benchmark for at least 1 iterations and at least 0.5 seconds but terminate if exceeding 150 seconds.
INFO: count=37 first=14744 curr=15520 min=13164 max=18295 avg=13764.3 std=967

INFO: Running benchmark for at least 50 iterations and at least 1 seconds but terminate if exceeding 150 seconds.
INFO: count=74 first=14850 curr=13315 min={time} max=15765 avg={average} std=470

INFO: Inference timings in us: Init: 12750, First inference: 14744, Warmup (avg): 13764.3, Inference (avg): {average}
INFO: Note: as the benchmark tool itself affects memory footprint, the following is only APPROXIMATE.
INFO: Memory footprint delta from the start of the tool (MB): init=8.97656 overall=18.7227
"""
OLD = NEW.replace("INFO: ", "").replace("Memory footprint delta from the start of the tool", "Peak memory footprint")
OLDEST = """STARTING!
Graph: [{graph}]
Running benchmark for at least 10 iterations and at least 1 seconds
count=15 first=66753 curr=66800 min={time} max=66838 avg={average} std=39

Average inference timings in us: Warmup: 14744, Init: 12750, no stats: {average}
"""
NEWEST = (
    NEW
    + """INFO: Saving benchmark result to: {result}
INFO: Saved benchmark result to: {result}
"""
)
OUTPUTS = {"newest": NEWEST, "new": NEW, "old": OLD, "oldest": OLDEST}


def benchmark_result(time, average):
    """A BenchmarkResult of 2025, written by hand: tensorflow/lite/tools/benchmark/proto/benchmark_result.proto."""

    def number(field, value):
        return struct.pack("<Bf", field << 3 | 5, value)

    def part(field, content):
        return bytes([field << 3 | 2, len(content)]) + content

    latency = [average / 1e3, time / 1e3, 15.765, 0.47, 13.7, 13.2, 15.1, 12.75, 14.744, 13.7643]
    kilobytes = b"\x08\xe8\x47\x10\x88\x96\x01"  # 9192 and 19208, as varints
    return part(2, b"".join(map(number, range(1, 11), latency))) + part(3, kilobytes) + part(4, number(1, 16.9008))


def fail(text, status=1):
    """Ends as adb does when it fails."""
    print(text, file=sys.stderr)
    sys.exit(status)


def shell(command):
    """What a command prints on the phone."""
    calls = (HOME / "log").read_text().count("--graph")
    if "getprop" in command or "scaling_governor" in command:
        known = {
            "ro.product.model": "Pixel 9",
            "ro.soc.model": "Tensor G4",
            "ro.build.version.release": "16",
            "ro.product.cpu.abi": "arm64-v8a",
        }
        return next((value for name, value in known.items() if name in command), "") + "\n"
    if "thermal" in command:
        return "31000\n-40000\n0\n33500\n"
    if command.startswith("mkdir"):
        (HOME / "phone" / command.split()[-1].strip("/")).mkdir(parents=True)
        return ""
    if command.startswith("rm -rf"):
        pattern = Path(command.split()[-1].strip("/"))
        for folder in (HOME / "phone" / pattern.parent).glob(pattern.name):
            shutil.rmtree(folder)
        return ""
    if "--graph" in command:
        if calls > PHONE.get("torn_after", 10**6):
            (HOME / "torn").touch()
            print("INFO: STARTING!\nINFO: Log para", end="")  # and no more: with the status of a torn stream, or 0
            sys.exit(PHONE["torn_status"])
        if calls > PHONE.get("lost_after", 10**6):
            fail(f"error: device '{PHONE['serials'][0]}' not found")
        if PHONE.get("abi") == "wrong":
            print("/system/bin/sh: benchmark_model: not executable: 64-bit ELF file")
            sys.exit(126)
        graph = command.split("--graph=")[1].split()[0]
        size = (HOME / "phone" / graph.strip("/")).stat().st_size
        delegated = "completely" if not PHONE.get("partial") else "partially"
        message = (
            f"Explicitly applied XNNPACK delegate, and the model graph will be {delegated} executed by the delegate."
        )
        if PHONE.get("partial") == "nothing":
            message = (
                "Though XNNPACK delegate is explicitly applied, the model graph will not be executed by the delegate."
            )
        version, time, average = PHONE.get("version", "newest"), 10 * size + calls % 2, 10 * size + 50.5
        result = command.split("--result_file_path=")[1].split()[0]
        if version == "newest":
            (HOME / "phone" / result.strip("/")).write_bytes(benchmark_result(time, average))
        return OUTPUTS[version].format(graph=graph, delegated=message, time=time, average=average, result=result)
    return ""


def main(arguments):
    """One call of adb."""
    with (HOME / "log").open("a") as log:
        log.write(" ".join(arguments) + "\n")
    if arguments == ["devices"]:
        print("List of devices attached")
        for serial in PHONE["serials"]:
            print(f"{serial}\t{PHONE.get('state', 'device')}")
        print()
        return
    _, serial, verb, *rest = arguments
    if serial not in PHONE["serials"]:
        fail(f"error: device '{serial}' not found")
    if verb == "push":
        source, target = rest
        if PHONE.get("full"):
            fail(f"adb: error: failed to copy '{source}' to '{target}': remote write failed: No space left on device")
        (HOME / "phone" / target.strip("/")).write_bytes(Path(source).read_bytes())
        print(f"{source}: 1 file pushed, 0 skipped. 30.1 MB/s (1000 bytes in 0.001s)")
    elif verb == "get-state":
        if (HOME / "torn").exists():
            fail("error: device 'PIXEL' not found")
        print("device")
    elif verb == "pull":
        source, target = rest
        Path(target).write_bytes((HOME / "phone" / source.strip("/")).read_bytes())
        print(f"{source}: 1 file pulled, 0 skipped. 0.2 MB/s (77 bytes in 0.001s)")
    else:
        sys.stdout.write(shell(rest[0]))


main(sys.argv[1:])
