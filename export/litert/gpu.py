"""A LiteRT file on LiteRT's GPU delegate, which phones use and which may compute something else than the CPU."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from se_keras.typing import Array, Outputs

from . import gpu_program
from .file import LiteRTRunner, dequantized, quantized

_LONGEST = 1800  # seconds; a software GPU takes a minute for an image of 224x224
_NO_GPU = ("No adapters found", "Couldn't load Vulkan", "GPU accelerator could not be loaded")


class GPURunner(LiteRTRunner):
    """A LiteRT file that runs on the GPU: `runner(images)` gives the outputs, as `LiteRTRunner` does on the CPU.

    All operators run there, in the precision that LiteRT chooses for it, in a process of their own.

    Args:
        content: The content of the file.

    Attributes:
        gpu: Name of the GPU, as LiteRT gives it; empty before the first run.

    Raises:
        ValueError: If this is not a LiteRT file, or if it takes anything else than one image of a fixed size.
    """

    def __init__(self, content: bytes):
        super().__init__(content)
        if None in self.input_shape or self.input_shape[0] != 1:
            raise ValueError(f"The GPU runs files that take one image of a fixed size. Received: {self.input_shape}")
        self.gpu = ""

    def __call__(self, images: Array) -> Outputs:
        """Outputs for `images`, `(samples, height, width, channels)`: `{name: array}`.

        Raises:
            OSError: If LiteRT finds no GPU.
            ValueError: If the GPU delegate cannot compute the file.
        """
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "model.tflite").write_bytes(self.content)
            np.save(folder / "images.npy", quantized(np.asarray(images), self._input))
            self._run(folder)
            with np.load(folder / "outputs.npz") as outputs:
                return {name: dequantized(outputs[name], detail) for name, detail in self._outputs.items()}

    def _run(self, folder: Path) -> None:
        command = [sys.executable, "-P", str(gpu_program.__file__), str(folder)]
        try:
            child = subprocess.run(command, capture_output=True, errors="replace", timeout=_LONGEST)
        except subprocess.TimeoutExpired:
            raise ValueError(f"The GPU is not done with the file after {_LONGEST} seconds") from None
        found = re.search(r"Selected adapter: ([^\n]*?)(?:, arch=[^\n]*)?\n", child.stderr)
        self.gpu = found[1] if found else ""
        if not child.returncode:
            return
        if reason := next((text for text in _NO_GPU if text in child.stderr), None):
            raise OSError(f"LiteRT finds no GPU here (docs/guides/gpu.md): {reason}")
        reasons = [line.strip(" └─") for line in child.stderr.splitlines() if line.strip().startswith("└")]
        last = (reasons or child.stderr.strip().splitlines() or ["it printed no message"])[-1]
        raise ValueError(f"LiteRT's GPU delegate cannot compute the file (exit status {child.returncode}): {last}")
