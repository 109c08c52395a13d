"""Runs a LiteRT file with LiteRT's own profiler and prints the profiler's events as JSON.

python -P profiler_events.py FILE THREADS RUNS

The profiler is called through the C API that the wheel's libLiteRt.so exports (ai-edge-litert 2.3: litert/c/*.h of
https://github.com/google-ai-edge/LiteRT). In other versions a function may be missing, which is reported, or may have
other arguments, which may crash the process. Therefore this is a separate process.
"""

import ctypes
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CPU = 1  # of LiteRtHwAccelerators
_RANK = 8  # the largest
_LITERT, _XNNPACK = 1, 8  # types of events: of LiteRT itself, and of an operator inside a delegate
Pointer = ctypes.c_void_p
_TEXTS = []  # keeps the options alive, which the library reads as long as the process runs
_FREE = ctypes.CFUNCTYPE(None, Pointer)(lambda _: None)  # does nothing: Python owns the texts


class Layout(ctypes.Structure):
    """LiteRtLayout: the rank in the low seven bits, sizes, strides."""

    _fields_ = [("bits", ctypes.c_uint), ("sizes", ctypes.c_int32 * _RANK), ("strides", ctypes.c_uint32 * _RANK)]


class TensorType(ctypes.Structure):
    """LiteRtRankedTensorType."""

    _fields_ = [("element", ctypes.c_int), ("layout", Layout)]


class Memory(ctypes.Structure):
    """Memory use at an event."""

    _fields_ = [("total", ctypes.c_size_t), ("allocated", ctypes.c_size_t), ("used", ctypes.c_size_t)]


class Event(ctypes.Structure):
    """ProfiledEventData."""

    _fields_ = [
        ("tag", ctypes.c_char_p),
        ("type", ctypes.c_int),
        ("start_us", ctypes.c_uint64),
        ("elapsed_us", ctypes.c_uint64),
        ("begin", Memory),
        ("end", Memory),
        ("metadata1", ctypes.c_uint64),
        ("metadata2", ctypes.c_uint64),
        ("source", ctypes.c_int),
    ]


def library() -> Callable[..., None]:
    """`call(function, *arguments)` of the wheel's library; it raises RuntimeError if the function fails."""
    package = importlib.util.find_spec("ai_edge_litert")
    path = Path(package.origin).with_name("libLiteRt.so") if package and package.origin else None
    if path is None or not path.is_file():
        raise RuntimeError("the wheel of ai-edge-litert has no libLiteRt.so here")
    loaded = ctypes.CDLL(str(path))

    def call(function, *arguments):
        if not hasattr(loaded, function):
            raise RuntimeError(f"libLiteRt.so of this version has no {function}")
        if status := getattr(loaded, function)(*arguments):
            raise RuntimeError(f"{function} fails with status {status}")

    return call


def handle(call: Callable[..., None], function: str, *arguments: Any) -> Pointer:
    """The handle that a function writes through its last argument."""
    found = Pointer()
    call(function, *arguments, ctypes.byref(found))
    return found


def compiled_model(call: Callable[..., None], path: str, threads: int) -> tuple[Pointer, Pointer, Pointer]:
    """A file compiled for the CPU, with its profiler switched on: the environment, the model and the compiled model."""
    environment = handle(call, "LiteRtCreateEnvironment", 0, None)
    model = handle(call, "LiteRtCreateModelFromFile", environment, path.encode())
    options = handle(call, "LiteRtCreateOptions")
    call("LiteRtSetOptionsHardwareAccelerators", options, CPU)
    texts = {"runtime_options_string": "enable_profiling = true\n", "xnnpack": f"num_threads = {threads}\n"}
    for name, text in texts.items():
        _TEXTS.extend((ctypes.c_char_p(name.encode()), ctypes.create_string_buffer(text.encode())))
        opaque = handle(call, "LiteRtCreateOpaqueOptions", _TEXTS[-2], ctypes.cast(_TEXTS[-1], Pointer), _FREE)
        call("LiteRtAddOpaqueOptions", options, opaque)
    return environment, model, handle(call, "LiteRtCreateCompiledModel", environment, model, options)


def buffers(
    call: Callable[..., None], environment: Pointer, model: Pointer, compiled: Pointer, kind: str
) -> tuple[ctypes.c_size_t, ctypes.Array]:
    """Number and handles of the buffers for each input or output of a model; `kind` is "Input" or "Output"."""
    signature = handle(call, "LiteRtGetModelSignature", model, ctypes.c_size_t(0))
    count, found = ctypes.c_size_t(), []
    call(f"LiteRtGetNumSignature{kind}s", signature, ctypes.byref(count))
    for index in range(count.value):
        tensor = handle(call, f"LiteRtGetSignature{kind}TensorByIndex", signature, ctypes.c_size_t(index))
        tensor_type = TensorType()
        call("LiteRtGetRankedTensorType", tensor, ctypes.byref(tensor_type))
        for axis in range(tensor_type.layout.bits & 127):
            tensor_type.layout.sizes[axis] = max(tensor_type.layout.sizes[axis], 1)  # a free batch size is -1
        place = compiled, ctypes.c_size_t(0), ctypes.c_size_t(index)
        needed = handle(call, f"LiteRtGetCompiledModel{kind}BufferRequirements", *place)
        create = "LiteRtCreateManagedTensorBufferFromRequirements"
        found.append(handle(call, create, environment, ctypes.byref(tensor_type), needed).value)
    return ctypes.c_size_t(len(found)), (Pointer * len(found))(*found)


def main(path: str, threads: int, runs: int) -> dict[str, Any]:
    """The events of `runs` runs, and the seconds that these runs took with and without the profiler."""
    call = library()
    environment, model, compiled = compiled_model(call, path, threads)
    inputs, outputs = (buffers(call, environment, model, compiled, kind) for kind in ("Input", "Output"))

    def seconds_of(times):
        start = time.perf_counter()
        for _ in range(times):
            call("LiteRtRunCompiledModel", compiled, ctypes.c_size_t(0), *inputs, *outputs)
        return time.perf_counter() - start

    seconds_of(3)
    plain = seconds_of(runs)
    profiler = handle(call, "LiteRtCompiledModelGetProfiler", compiled)
    call("LiteRtStartProfiler", profiler)
    profiled = seconds_of(runs)
    call("LiteRtStopProfiler", profiler)
    count = ctypes.c_int()
    call("LiteRtGetNumProfilerEvents", profiler, ctypes.byref(count))
    events = (Event * max(count.value, 1))()
    call("LiteRtGetProfilerEvents", profiler, count, events)
    found = [event for event in events[: count.value] if event.type != _LITERT]
    return {
        "events": [(_tag(event), event.elapsed_us) for event in found if event.type == _XNNPACK],
        "others": sorted({_tag(event) for event in found if event.type != _XNNPACK}),
        "seconds": plain,
        "profiled_seconds": profiled,
    }


def _tag(event):
    return event.tag.decode(errors="replace")


if __name__ == "__main__":
    try:
        print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
    except RuntimeError as error:
        sys.exit(str(error))
