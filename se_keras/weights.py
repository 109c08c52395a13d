"""Weights from a file into a network, by the names of layers: nothing left over on either side, nothing half loaded."""

import io
import zipfile
from pathlib import Path

import h5py

SUFFIXES = (".weights.h5", ".keras")


def load(layers, path, *, ignore=()):
    """Loads a file that Keras saved into layers of the same names.

    Keras itself goes by class and order, so that a file of another network with the same shapes loads silently into
    the wrong layers.

    Args:
        layers: The layers to fill; those without weights do not matter.
        path: A `.weights.h5` or `.keras` file.
        ignore: Names of layers that the file may have beside them.

    Raises:
        TypeError: If `path` is no path.
        FileNotFoundError: If there is no such file.
        ValueError: If it is no file of weights, or if names or shapes differ; no layer is changed then.
    """
    path = _checked(path)
    try:
        found = _read(path)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{str(path)!r} is not a file of weights that can be read: {_first_line(error)}") from error
    layers = {layer.name: layer for layer in layers if layer.weights}
    for name in set(found) & set(ignore) - set(layers):
        del found[name]
    missing, surplus = sorted(layers.keys() - found.keys()), sorted(found.keys() - layers.keys())
    if missing or surplus:
        differences = [f"the file lacks {_some(missing)}"] * bool(missing)
        differences += [f"the network lacks {_some(surplus)}"] * bool(surplus)
        raise ValueError(f"{str(path)!r} is of another network: {'; '.join(differences)}")
    for name, layer in layers.items():
        ours, theirs = [tuple(w.shape) for w in layer.weights], [array.shape for array in found[name]]
        if ours != theirs:
            raise ValueError(f"{str(path)!r} does not fit: {name} has {ours} here and {theirs} in the file")
    for name, layer in layers.items():
        layer.set_weights(found[name])


def _checked(path):
    if not isinstance(path, (str, Path)):
        raise TypeError(f"weights must be None or the path of a .weights.h5 or .keras file. Received: {path!r}")
    if not str(path).endswith(SUFFIXES):
        raise ValueError(f"weights must be None or the path of a .weights.h5 or .keras file. Received: {str(path)!r}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file of weights {str(path)!r}")
    return Path(path)


def _read(path):
    """The arrays of each layer by its name. Keras files them by class and number, the name in an attribute."""
    if path.suffix == ".keras":
        with zipfile.ZipFile(path) as archive:
            content = io.BytesIO(archive.read("model.weights.h5"))
    else:
        content = path
    with h5py.File(content, "r") as file:
        variables = [group["vars"] for group in file["layers"].values() if len(group.get("vars", ()))]
        return {group.attrs["name"]: [group[str(i)][()] for i in range(len(group))] for group in variables}


def _some(names):
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]
