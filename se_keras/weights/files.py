"""Files of weights: those of Keras, as arrays by layer, and state dicts of torch. Code in them is never run.

A damaged file is refused before it is used: the checksums in a zip archive are compared, and HDF5, which loops for ever
on some damaged files, first reads a file in a process of its own.
"""

import functools
import io
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from se_keras.errors import translated
from se_keras.typing import Array, FilePath

TORCH = (".pth", ".pt", ".pth.tar", ".bin", ".ckpt")  # what torch.save writes has any of these
STATE_DICTS = (".safetensors", *TORCH)
SUFFIXES = (".weights.h5", ".keras", *STATE_DICTS)
RULE = "A state dict is a dict of arrays by their names"
# Where training scripts keep the weights, the averaged ones first: timm; DeiT and torchvision; PyTorch's tutorial.
_EMA = ("state_dict_ema", "model_ema")
_HOLDERS = (*_EMA, "state_dict", "model", "model_state_dict")
_PREFIXES = ("module.", "_orig_mod.", "model.")  # of DataParallel, torch.compile, and Lightning
COUNTERS = ("num_batches_tracked", "n_averaged")
HDF5_SECONDS = 10  # of the processor for a file, and one more for each 20 MB; a small one takes 0.2


def checked_path(path: Any) -> Path:
    """The path of a file of weights; TypeError, ValueError or FileNotFoundError for anything else."""
    rule = f"weights must be None, 'imagenet', or the path of a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file"
    if not isinstance(path, (str, Path)):
        raise TypeError(f"{rule}. Received: {path!r}")
    if not str(path).endswith(SUFFIXES):
        raise ValueError(f"{rule}. Received: {str(path)!r}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file of weights {str(path)!r}")
    return Path(path)


def unreadable(path: Path) -> str:
    """The beginning of a message about a file that cannot be read."""
    return f"{str(path)!r} is not a file of weights that can be read"


# Files of Keras


def read_layers(path: Path) -> dict[str, list[Array]]:
    """The arrays of each layer by its name. Keras stores them by class and number, with the name as an attribute."""
    with translated(unreadable(path)):
        check_keras(path)
        content = path
        if path.suffix == ".keras":
            with zipfile.ZipFile(path) as archive:
                content = io.BytesIO(archive.read("model.weights.h5"))
        with h5py.File(content, "r") as opened:
            file: Any = opened  # groups within groups, which h5py does not type
            variables = [group["vars"] for group in file["layers"].values() if len(group.get("vars", ()))]
            return {group.attrs["name"]: [group[str(i)][()] for i in range(len(group))] for group in variables}


def check_keras(path: Path) -> None:
    """Raises ValueError for a damaged `.keras` or `.weights.h5` file, as far as its checksums and HDF5 tell."""
    if path.suffix != ".keras":
        return _check_hdf5(path, b"", size=path.stat().st_size)
    _check_archive(path)
    with zipfile.ZipFile(path) as archive:
        if "model.weights.h5" in archive.namelist():
            content = archive.read("model.weights.h5")
            _check_hdf5("-", content, size=len(content))


def _check_archive(path):
    """Compares the checksums in a zip archive. Readers that jump to a place, as torch's and HDF5's, do not."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > _largest(path.stat().st_size):
            raise ValueError("it says that it holds far more than its size")
        # torch.serialization.set_crc32_options(False) writes none.
        damaged = archive.testzip() if any(entry.CRC for entry in entries) else None
        if damaged is not None:
            raise ValueError(f"it is damaged: the checksum of {damaged} does not match")


def _largest(size):
    """Bytes that a file of weights may hold: trained weights hardly compress, those at the start are often zero."""
    return 100 * size + 2**24


_READ = """
import io, sys
seconds, largest = int(sys.argv[2]), int(sys.argv[3])
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
except ImportError:  # Windows
    pass
import h5py

def read(name, item):
    dict(item.attrs)
    if isinstance(item, h5py.Dataset):
        if item.nbytes > largest:
            sys.exit("it says that it holds far more than its size")
        item[()]

try:
    with h5py.File(io.BytesIO(sys.stdin.buffer.read()) if sys.argv[1] == "-" else sys.argv[1], "r") as file:
        file.visititems(read)
except Exception as error:
    sys.exit((str(error) or type(error).__name__).splitlines()[0])
"""


def _check_hdf5(name, content, *, size):
    """Reads a file once in a child process, which can be ended. An application without Python's program cannot."""
    if not sys.executable or getattr(sys, "frozen", False):
        return
    seconds = HDF5_SECONDS + size // 20_000_000
    command = [sys.executable, "-c", _READ, os.fspath(name), str(seconds), str(_largest(size))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        child = subprocess.run(command, input=content, capture_output=True, env=environment, timeout=20 * seconds)
    except subprocess.TimeoutExpired:
        raise ValueError(f"HDF5 is not done with it after {20 * seconds} seconds") from None
    if child.returncode < 0:
        raise ValueError(f"HDF5 fails on it, or is not done after {seconds} seconds of computing")
    if child.returncode:
        raise ValueError((child.stderr.decode(errors="replace").strip() or "HDF5 fails on it").splitlines()[-1])


# State dicts


def read_state_dict(path: FilePath) -> dict[str, Array]:
    """The state dict in a `.safetensors` file or a file of torch, `{name: array}`.

    A file of torch may have it where training scripts put it (`"state_dict"`, `"model"`, `"model_state_dict"`), next to
    other objects, or be a whole module. Averaged weights (`"state_dict_ema"`, `"model_ema"`) are preferred. Prefixes
    that all names have, such as DataParallel's `module.`, are removed.

    Raises:
        FileNotFoundError, ValueError: If there is no such file, or if it is damaged or of another kind.

    Warns:
        UserWarning: If averaged weights are taken, or a prefix is removed.
    """
    path = checked_path(path)
    if not path.name.endswith(STATE_DICTS):
        raise ValueError(
            f"A state dict is a {', '.join(STATE_DICTS[:-1])} or {STATE_DICTS[-1]} file. Received: {str(path)!r}"
        )
    with translated(unreadable(path)):
        state, notes = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
        prefix = _common_prefix(state)
        arrays = {name.removeprefix(prefix): as_array(name, tensor) for name, tensor in state.items()}
    if prefix:
        notes.append(f"the names are taken without their prefix {prefix!r}")
    if notes:
        warnings.warn(f"{str(path)!r}: {', and '.join(notes)}", stacklevel=2)
    return arrays


def _read_safetensors(path):
    from safetensors.numpy import load_file

    return load_file(path), []


def _read_torch(path):
    """A state dict with the names that it has in the file, and notes on where it was."""
    try:
        import torch  # pyright: ignore[reportMissingImports]  optional
    except ImportError:
        raise ValueError("reading files of torch needs torch; .safetensors files do not") from None
    unknown, inert = [], _inert()
    if zipfile.is_zipfile(path):
        _check_archive(path)
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    # Objects of other classes, such as the arguments of a script, become empty ones of ours: nothing of theirs is run.
    stand_ins: Any = [(_empty if name == "collections.defaultdict" else inert, name) for name in unknown]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(stand_ins):
            warnings.simplefilter("ignore", UserWarning)  # about pickle protocols
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        # The message of torch recommends to run the code.
        raise ValueError("it is truncated or not of torch, or it contains pickled code, which is not run") from None
    notes = []
    if isinstance(state, dict):
        holder = next((key for key in _HOLDERS if isinstance(state.get(key), (dict, inert))), None)
        if holder in _EMA:
            notes.append(f"of its weights, the averaged ones, {holder!r}, are taken")
        state = state if holder is None else state[holder]
    if isinstance(state, inert):
        state = _module_state(state)
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ValueError("it contains no state dict, {name: tensor}")
    return state, notes


@functools.cache
def _inert() -> type:
    """The class of objects that stand for those of other classes: they keep their attributes, and do nothing."""

    class Inert:
        def __new__(cls, *args, **kwargs):
            return super().__new__(cls)

        def __init__(self, *args, **kwargs):
            pass

        def __setstate__(self, state):
            self.__dict__.update(state if isinstance(state, dict) else {})

    return Inert


def _empty(*_):
    return {}


def _module_state(module, prefix=""):
    """The state dict of a torch.nn.Module, from its attributes."""
    own = vars(module)
    temporary = own.get("_non_persistent_buffers_set") or ()
    state = {f"{prefix}{name}": x for name, x in own.get("_parameters", {}).items() if x is not None}
    buffers = own.get("_buffers", {}).items()
    state |= {f"{prefix}{name}": x for name, x in buffers if x is not None and name not in temporary}
    for name, child in own.get("_modules", {}).items():
        if child is not None:
            state |= _module_state(child, f"{prefix}{name}.")
    return state


def _common_prefix(state: Mapping[str, Any]) -> str:
    """What wrappers put in front of every name; counters of a wrapper itself do not count."""
    names, prefix = [name for name in state if name not in COUNTERS], ""
    while wrapper := next((x for x in _PREFIXES if names and all(n.startswith(prefix + x) for n in names)), None):
        prefix += wrapper
    return prefix


def as_array(name: str, tensor: Any, *, where: str = "it") -> Array:
    """An array or torch tensor of real numbers in float32. Values out of its range become infinite."""
    if getattr(tensor.dtype, "kind", "f") in "cOSU" or getattr(tensor.dtype, "is_complex", False):
        raise TypeError(f"{RULE}, of real numbers. Received: {tensor.dtype} as {name!r} in {where}")
    if hasattr(tensor, "detach"):  # torch: numpy cannot read tensors with gradients, on a GPU, or in bfloat16
        tensor = tensor.detach().cpu().float()
    with np.errstate(over="ignore"):
        return np.asarray(tensor, dtype="float32")
