"""Loading weights by name. Every weight must be found and every array used; otherwise nothing is changed.

Keras files are matched by the names of our layers. Keras itself matches by class and order, so a file of another
network with the same shapes would silently load into the wrong layers. State dicts are matched by the names of timm
and pytorchcv.
"""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import keras
import numpy as np

from se_keras.errors import require_choice
from se_keras.graph import producer
from se_keras.typing import FilePath
from se_keras.weights.files import COUNTERS, RULE, STATE_DICTS, as_array, checked_path, read_layers, read_state_dict
from se_keras.weights.naming import NAMINGS
from se_keras.wording import counted

Source = Literal["timm", "pytorchcv"]


def load_weights(
    layers: Sequence[keras.layers.Layer],
    path: FilePath,
    *,
    ignore: Collection[str] = (),
    adapt: Mapping[str, int] | None = None,
) -> None:
    """Loads a file into layers: a file of Keras, or a state dict of timm or pytorchcv.

    Args:
        layers: The layers to fill, in order. Layers without weights are ignored.
        path: A `.weights.h5`, `.keras` or `.safetensors` file, or one of torch, as `read_state_dict` takes it.
        ignore: Names of further layers that the file may contain.
        adapt: Layers that may be for another number of classes or channels than the file, whose number is given, by
            name. A classifier of other classes keeps its values. A kernel for other channels becomes the file's as in
            timm: summed for one channel; for others repeated, and scaled by the quotient of the numbers.

    Raises:
        TypeError, FileNotFoundError: If `path` is not a path, or not the path of a file.
        ValueError: If the file has no weights, or if names or shapes differ. No layer is changed in this case.

    Warns:
        UserWarning: If a layer is adapted.
    """
    path = checked_path(path)
    if path.name.endswith(STATE_DICTS):
        namings = [naming for source in NAMINGS.values() for naming in source]
        return _port(layers, read_state_dict(path), namings, where=repr(str(path)), ignore=ignore, adapt=adapt)
    found = read_layers(path)
    weights = {f"{layer.name}/{n}": w for layer in layers for n, w in enumerate(layer.weights)}
    values = {
        f"{name}/{n}": array
        for name, arrays in found.items()
        if name not in ignore or f"{name}/0" in weights
        for n, array in enumerate(arrays)
    }
    adapt = adapt or {}
    own = {key: adapt[name] for key in weights if (name := key.rpartition("/")[0]) in adapt}
    _adapt(values, weights, own, where=repr(str(path)))
    _check(values, weights, where=repr(str(path)), name=lambda key: key.rpartition("/")[0])
    for key, weight in weights.items():
        weight.assign(values[key])


def port(model: keras.Model, state_dict: dict[str, Any], *, source: Source) -> None:
    """Fills a network of the catalogue with the weights of the same network of timm or pytorchcv.

    Args:
        model: The network of the catalogue.
        state_dict: `{name: array or torch tensor}`, as from `torch_module.state_dict()` or `read_state_dict(path)`.
        source: The library that the names are from.

    Raises:
        TypeError, ValueError: If it is not a dict of arrays, or if an array is missing, not used, not finite, or of
            another shape. The message lists the first names, and the model is unchanged.
    """
    require_choice("source", source, NAMINGS)
    _port(model.layers, state_dict, NAMINGS[source], where="the state dict")


def _port(layers, state, namings, *, where, ignore=(), adapt=None):
    arrays = _arrays(state, where)
    names = [layer.name for layer in layers if layer.weights]
    found = [(naming, naming([*names, *ignore])) for naming in namings]
    candidates = [(naming, modules, _rows(layers, modules)) for naming, modules in found]
    # The naming that matches the most tensors. An error message lists the differences from it.
    naming, modules, rows = max(candidates, key=lambda candidate: len(candidate[2].keys() & arrays.keys()))
    dropped = tuple(f"{module}." for name in ignore if name not in names for module in modules.get(name, ()))
    values = {
        name: array for name, array in arrays.items() if not name.endswith(COUNTERS) and not name.startswith(dropped)
    }
    for bias, mean in _folded_biases(layers, modules, arrays).items():
        if mean in values and values[mean].shape == values[bias].shape:
            # BatchNorm(W x + b) with mean m is BatchNorm(W x) with mean m - b.
            values[mean] = values[mean] - values.pop(bias)
    values = {name: _in_our_layout(array, *rows[name]) if name in rows else array for name, array in values.items()}
    weights = {name: weight for name, (weight, _) in rows.items()}
    adapt = adapt or {}
    own = {name: adapt[layer.name] for name, (_, layer) in rows.items() if layer.name in adapt}
    _adapt(values, weights, own, where=where)
    _check(values, weights, where=where)
    for layer in layers:
        padding = getattr(naming, "padding", {}).get(layer.name)
        if padding not in (None, getattr(layer, "padding", None)):
            pads = f"{layer.name} pads {layer.padding} here and {padding} there"
            raise ValueError(f"{where} is of another network: {pads}")
    for name, weight in weights.items():
        weight.assign(values[name])


def _arrays(state, where):
    if not isinstance(state, dict):
        raise TypeError(f"{RULE}. Received: {type(state).__name__} as {where}")
    for name, tensor in state.items():
        if not isinstance(name, str) or not hasattr(tensor, "shape"):
            raise TypeError(f"{RULE}. Received: {type(tensor).__name__} as {name!r} in {where}")
    arrays = {name: as_array(name, tensor, where=where) for name, tensor in state.items()}
    infinite = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if infinite:
        raise ValueError(f"{where} has values that are not finite: in {_first_names(infinite)}")
    return arrays


# For each variable of our layers: the index of the module that contains it, and its name there.
_TENSORS = {
    "kernel": (0, "weight"),
    "bias": (0, "bias"),
    "gamma": (0, "weight"),
    "beta": (0, "bias"),
    "moving_mean": (0, "running_mean"),
    "moving_variance": (0, "running_var"),
    "reduce_kernel": (0, "weight"),
    "reduce_bias": (0, "bias"),
    "expand_kernel": (1, "weight"),
    "expand_bias": (1, "bias"),
}


def _rows(layers, modules):
    """`{their tensor: (our variable, its layer)}`. A variable without a name of theirs is listed by our layer."""
    rows = {}
    for layer in layers:
        for weight in layer.weights:
            module, tensor = _TENSORS.get(weight.name, (0, None))
            if tensor and module < len(modules.get(layer.name, ())):
                rows[f"{modules[layer.name][module]}.{tensor}"] = (weight, layer)
            else:
                rows[layer.name] = (weight, layer)
    return rows


def _folded_biases(layers, modules, arrays):
    """`{their bias: their moving mean}` of convolutions that have no bias here, because BatchNorm follows."""
    found = {}
    for layer in layers:
        if isinstance(layer, keras.layers.BatchNormalization) and layer.name in modules:
            convolution = producer(layer.input)
            bias = f"{modules.get(convolution.name, ('',))[0]}.bias"
            if getattr(convolution, "use_bias", True) is False and bias in arrays:
                found[bias] = f"{modules[layer.name][0]}.running_mean"
    return found


def _in_our_layout(array, weight, layer):
    """Their array in the layout of our variable: `(out, in, h, w)` becomes `(h, w, in, out)`."""
    if array.ndim == 4:
        depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
        array = array.transpose(2, 3, 0, 1) if depthwise else array.transpose(2, 3, 1, 0)
        # Fully connected layers are convolutions in most SE modules, and in VGG's classifier, over the full map.
        dense = len(weight.shape) == 2 and array.shape[:2] == _map_size(layer)
        return array.reshape(-1, array.shape[-1]) if dense else array
    # A matrix does not show how a map was flattened (torch has channels first): it is refused by its shape.
    return array if array.ndim == 2 and _map_size(layer) != (1, 1) else array.T


def _map_size(layer):
    """Height and width of the feature map that was flattened for a fully connected layer."""
    flatten = producer(layer.input)
    if not isinstance(flatten, keras.layers.Flatten):
        return (1, 1)
    return tuple(flatten.input.shape[1:3])  # pyright: ignore[reportAttributeAccessIssue]: it has one input


def _adapt(values, weights, numbers, *, where):
    """Fits arrays with this number of classes or channels, `{key: number}`, to variables for another, and says so."""
    notes = {}
    for key, number in numbers.items():
        theirs, ours = list(np.shape(values.get(key))), list(weights[key].shape)
        if len(ours) == len(theirs) == 4 and theirs == [*ours[:2], number, ours[3]]:
            channels, own = number, ours[2]
            repeated = np.tile(values[key], (1, 1, -(-own // channels), 1))[:, :, :own] * (channels / own)
            values[key] = values[key].sum(axis=2, keepdims=True) if own == 1 else repeated
            notes[f"it takes {counted(channels, 'channel')}, and its first kernel is adapted to {own}"] = None
        elif len(ours) < 4 and theirs == [*ours[:-1], number]:
            del values[key], weights[key]
            classes = counted(number, "class")
            notes[f"it has {classes}, and the classifier of {ours[-1]} is left as it is, untrained"] = None
    if notes:
        warnings.warn(f"{where}: {'; '.join(notes)}", stacklevel=3)


def _check(values, weights, *, where, name: Callable[[str], str] = str):
    """Raises ValueError unless each array has a variable of the same shape, and each variable an array."""
    missing = list(dict.fromkeys(name(key) for key in weights if key not in values))
    surplus = list(dict.fromkeys(name(key) for key in values if key not in weights))
    if missing or surplus:
        differences = [f"it lacks {_first_names(missing)}"] * bool(missing)
        differences += [f"the network lacks {_first_names(surplus)}"] * bool(surplus)
        raise ValueError(f"{where} is of another network: {'; '.join(differences)}")
    for key, weight in weights.items():
        ours, theirs = tuple(weight.shape), tuple(values[key].shape)
        if ours != theirs:
            raise ValueError(f"{where} does not fit: {name(key)} has the shape {ours} here and {theirs} there")


def _first_names(names):
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)
