"""Runs a LiteRT file under LiteRT's own profiler, in a process of its own, and prints what it tells as JSON.

    python events.py FILE THREADS RUNS

The profiler is reached through the C API that the wheel's libLiteRt.so exports (ai-edge-litert 2.3: litert/c/*.h of
https://github.com/google-ai-edge/LiteRT). Of another version functions may be missing, which is told, or have other
arguments, which may end the process: therefore it is not the caller's.
"""

import ctypes
import importlib.util
import json
import sys
import time
from pathlib import Path

CPU = 1  # of LiteRtHwAccelerators
_MAX_RANK = 8
_XNNPACK = 8  # type of an event that a delegate's operator has sent
_LITERT = 1
Pointer = ctypes.c_void_p


class Layout(ctypes.Structure):
    """LiteRtLayout: the rank in the low seven bits, sizes, strides."""

    _fields_ = [
        ("bits", ctypes.c_uint),
        ("sizes", ctypes.c_int32 * _MAX_RANK),
        ("strides", ctypes.c_uint32 * _MAX_RANK),
    ]


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


def library():
    """`call(function, *arguments)` of the wheel's library, which raises RuntimeError where that fails."""
    found = importlib.util.find_spec("ai_edge_litert")
    path = Path(found.origin).with_name("libLiteRt.so") if found else None
    if path is None or not path.is_file():
        raise RuntimeError("the wheel of ai-edge-litert has no libLiteRt.so here")
    loaded = ctypes.CDLL(str(path))

    def call(function, *arguments):
        if not hasattr(loaded, function):
            raise RuntimeError(f"libLiteRt.so of this version has no {function}")
        if status := getattr(loaded, function)(*arguments):
            raise RuntimeError(f"{function} gives status {status}")

    return call


def made(call, function, *arguments):
    """The handle that a function writes through its last argument."""
    handle = Pointer()
    call(function, *arguments, ctypes.byref(handle))
    return handle


def main(path, threads, runs):
    """The events of `runs` runs, and the seconds that they took together."""
    call, kept = library(), []
    environment = made(call, "LiteRtCreateEnvironment", 0, None)
    model = made(call, "LiteRtCreateModelFromFile", environment, path.encode())
    options = made(call, "LiteRtCreateOptions")
    call("LiteRtSetOptionsHardwareAccelerators", options, CPU)
    keep = ctypes.CFUNCTYPE(None, Pointer)(lambda _: None)  # the text is Python's to free
    for name, text in (
        ("runtime_options_string", "enable_profiling = true\n"),
        ("xnnpack", f"num_threads = {threads}\n"),
    ):
        kept += [ctypes.create_string_buffer(text.encode()), ctypes.c_char_p(name.encode())]
        opaque = made(call, "LiteRtCreateOpaqueOptions", kept[-1], ctypes.cast(kept[-2], Pointer), keep)
        call("LiteRtAddOpaqueOptions", options, opaque)
    compiled = made(call, "LiteRtCreateCompiledModel", environment, model, options)
    profiler = made(call, "LiteRtCompiledModelGetProfiler", compiled)
    signature = made(call, "LiteRtGetModelSignature", model, ctypes.c_size_t(0))

    def buffers(kind):
        count, found = ctypes.c_size_t(), []
        call(f"LiteRtGetNumSignature{kind}s", signature, ctypes.byref(count))
        for index in range(count.value):
            tensor = made(call, f"LiteRtGetSignature{kind}TensorByIndex", signature, ctypes.c_size_t(index))
            kind_of = TensorType()
            call("LiteRtGetRankedTensorType", tensor, ctypes.byref(kind_of))
            for axis in range(kind_of.layout.bits & 127):
                kind_of.layout.sizes[axis] = max(kind_of.layout.sizes[axis], 1)  # a free batch is -1
            where = (compiled, ctypes.c_size_t(0), ctypes.c_size_t(index))
            needed = made(call, f"LiteRtGetCompiledModel{kind}BufferRequirements", *where)
            how = (environment, ctypes.byref(kind_of), needed)
            found.append(made(call, "LiteRtCreateManagedTensorBufferFromRequirements", *how).value)
        return ctypes.c_size_t(len(found)), (Pointer * len(found))(*found)

    arguments = (compiled, ctypes.c_size_t(0), *buffers("Input"), *buffers("Output"))

    def seconds_of(times):
        start = time.perf_counter()
        for _ in range(times):
            call("LiteRtRunCompiledModel", *arguments)
        return time.perf_counter() - start

    seconds_of(3)
    plain = seconds_of(runs)
    call("LiteRtStartProfiler", profiler)
    profiled = seconds_of(runs)
    call("LiteRtStopProfiler", profiler)
    count = ctypes.c_int()
    call("LiteRtGetNumProfilerEvents", profiler, ctypes.byref(count))
    events = (Event * max(count.value, 1))()
    call("LiteRtGetProfilerEvents", profiler, count, events)
    told = [(e.tag.decode(errors="replace"), e.elapsed_us) for e in events[: count.value] if e.type == _XNNPACK]
    others = sorted(
        {e.tag.decode(errors="replace") for e in events[: count.value] if e.type not in (_XNNPACK, _LITERT)}
    )
    return {"events": told, "others": others, "seconds": plain, "profiled_seconds": profiled}


if __name__ == "__main__":
    try:
        print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
    except RuntimeError as error:
        sys.exit(str(error))
