"""Runs a LiteRT file on the GPU and writes its outputs.

python -P gpu_program.py FOLDER

The folder has model.tflite and images.npy, `(samples, height, width, channels)` in the type of the input. The outputs
of all samples go to outputs.npz there, by the names of the signature. This is a process of its own, because LiteRT and
the drivers of the GPU print lines, and may crash.
"""

import sys
from pathlib import Path

import numpy as np
from ai_edge_litert.compiled_model import CompiledModel
from ai_edge_litert.hardware_accelerator import HardwareAccelerator


def main(folder: Path) -> None:
    """Runs all images, one after the other."""
    model = CompiledModel.from_file(str(folder / "model.tflite"), hardware_accel=HardwareAccelerator.GPU)
    (key,) = model.get_signature_list()
    details = model.get_output_tensor_details(key)
    (images,) = model.create_input_buffers(0)
    buffers = {name: model.create_output_buffer_by_name(key, name) for name in details}
    outputs = {name: [] for name in details}
    (input_name,) = model.get_input_tensor_details(key)
    for image in np.load(folder / "images.npy"):
        images.write(np.ascontiguousarray(image[None]))
        model.run_by_name(key, {input_name: images}, buffers)
        for name, detail in details.items():
            values = buffers[name].read(int(np.prod(detail["shape"])), np.dtype(detail["dtype"]).type)
            outputs[name].append(np.reshape(values, detail["shape"]))
    np.savez(folder / "outputs.npz", **{name: np.concatenate(values) for name, values in outputs.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
