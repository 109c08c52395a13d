"""Runs a LiteRT file on batches, on one thread, and saves its outputs. It runs on Arm too, without se_keras.

python -P marked_inference.py FILE.tflite BATCHES.npy OUTPUTS.npz

BATCHES.npy has the inputs, one after the other. Each run of the file is between two calls of prctl that do nothing: the
marks for count_instructions.c. Prints a line of JSON, with the operators and the numbers of the output tensors.
"""

import ctypes
import json
import sys

import numpy as np
from ai_edge_litert.interpreter import Interpreter

MARK = 0x5EC0  # an option that prctl does not have; as in count_instructions.c


def main(file: str, batches: str, outputs: str) -> None:
    """Runs the file."""
    prctl = ctypes.CDLL(None).prctl
    interpreter = Interpreter(model_path=file, num_threads=1)
    interpreter.allocate_tensors()
    (image,), details = interpreter.get_input_details(), interpreter.get_output_details()
    rows = []
    for batch in np.load(batches):
        interpreter.set_tensor(image["index"], batch)
        prctl(MARK, 0, 0, 0, 0)
        interpreter.invoke()
        prctl(MARK, 0, 0, 0, 0)
        rows.append([interpreter.get_tensor(detail["index"]) for detail in details])
    np.savez(outputs, *map(np.concatenate, zip(*rows, strict=True)))
    operators = [
        {"op_name": operator["op_name"], **{name: list(map(int, operator[name])) for name in ("inputs", "outputs")}}
        for operator in interpreter._get_ops_details()
    ]
    print(json.dumps({"operators": operators, "outputs": [int(detail["index"]) for detail in details]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
