"""timm's networks under this project's names: the import without torchvision, the name rules, the strict port.

timm's `senet.py` (`legacy_*`) and `resnet.py` were written by others in another framework and with other paddings,
names and layouts: agreement with them is evidence that no test against our own output can give.
"""

import contextlib
import enum
import importlib.machinery
import importlib.util
import re
import sys
import types

KERNEL = {"weight": "kernel"}
DENSE = {"weight": "kernel", "bias": "bias"}
REDUCE = {"weight": "reduce_kernel", "bias": "reduce_bias"}
EXPAND = {"weight": "expand_kernel", "bias": "expand_bias"}
NORM = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
    "num_batches_tracked": None,  # torch's training counter; inference does not read it and Keras has none
}

# Module in timm, layer of ours, {tensor of the module: weight of the layer}. The first row that fits is the rule.
NETWORK_RULES = (
    (r"(?:layer0\.)?conv1", "conv1", KERNEL),
    (r"(?:layer0\.)?bn1", "conv1_bn", NORM),
    (r"last_linear|fc", "predictions", DENSE),
)
STEM_3X3X3_RULES = (
    (r"layer0\.conv([123])", r"conv1_\1", KERNEL),
    (r"layer0\.bn([123])", r"conv1_\1_bn", NORM),
)
BLOCK_RULES = (
    (r"conv([123])", r"conv\1", KERNEL),
    (r"bn([123])", r"conv\1_bn", NORM),
    (r"downsample\.0", "shortcut", KERNEL),
    (r"downsample\.1", "shortcut_bn", NORM),
    (r"se(?:_module)?\.fc1", "se", REDUCE),
    (r"se(?:_module)?\.fc2", "se", EXPAND),
)


def keras_name(tensor, *, stem_3x3x3=False):
    """The path of our weight for timm's `tensor`, None for a tensor without counterpart; KeyError without a rule."""
    module, _, leaf = tensor.rpartition(".")
    prefix, rules = "", (STEM_3X3X3_RULES if stem_3x3x3 else ()) + NETWORK_RULES
    if in_block := re.fullmatch(r"layer([1-4])\.(\d+)\.(.+)", module):
        # timm counts residual stages from 1 and blocks from 0; the paper's conv1 is stage 1, and blocks start at 1.
        stage, block, module = int(in_block[1]) + 1, int(in_block[2]) + 1, in_block[3]
        prefix, rules = f"stage{stage}_block{block}_", BLOCK_RULES
    for pattern, layer, weights in rules:
        if match := re.fullmatch(pattern, module):
            weight = weights[leaf]
            return weight and f"{prefix}{match.expand(layer)}/{weight}"
    raise KeyError(tensor)


def keras_layout(array, path):
    """timm's array in the layout of our weight `path`: (out, in / groups, h, w) becomes (h, w, in / groups, out)."""
    if array.ndim == 4 and path.endswith(("/reduce_kernel", "/expand_kernel")) and array.shape[2:] == (1, 1):
        array = array[:, :, 0, 0]  # timm's fully connected layers of an SE module are 1x1 convolutions
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array.transpose()


def port(state, model, *, stem_3x3x3=False):
    """Copies `state`, timm's `{name: array}`, into the Keras `model`: each tensor of either side exactly once.

    Raises:
        ValueError: If a tensor is left over or missing on either side, or has another shape. The message names all
            of them; the model is untouched then.
    """
    weights = {weight.path: weight for weight in model.weights}
    values, sources, problems = {}, {}, []
    for tensor, array in state.items():
        try:
            path = keras_name(tensor, stem_3x3x3=stem_3x3x3)
        except KeyError:
            problems.append(f"no rule for timm's {tensor}")
            continue
        if path is None:
            continue
        if path not in weights:
            problems.append(f"no weight {path} for timm's {tensor}")
        elif path in values:
            problems.append(f"two tensors for {path}: timm's {sources[path]} and {tensor}")
        else:
            sources[path], values[path] = tensor, keras_layout(array, path)
            if values[path].shape != tuple(weights[path].shape):
                problems.append(
                    f"{path} has the shape {tuple(weights[path].shape)}, timm's {tensor} {array.shape}, which is "
                    f"{values[path].shape} in our layout"
                )
    problems += [f"no tensor for {path}" for path in weights if path not in values]
    if problems:
        raise ValueError(f"{model.name} does not take these weights: " + "; ".join(problems))
    for path, value in values.items():
        weights[path].assign(value)


@contextlib.contextmanager
def torchvision_for_import():
    """While open, `import timm` works without torchvision, of whose names timm's networks here use none.

    timm imports torchvision for its data pipeline. An installed torchvision is used as it is. Otherwise empty
    classes stand in for the names that `import timm` looks up, and leave `sys.modules` at the end, so that nothing
    else takes them for torchvision.
    """
    if importlib.util.find_spec("torchvision"):
        yield
        return
    import torch

    def empty(*names, base=object):
        return {name: type(name, (base,), {}) for name in names}

    modes = ("NEAREST", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS")
    names_of = {
        "torchvision": {},
        "torchvision.ops": empty("DeformConv2d", base=torch.nn.Module),
        "torchvision.ops.misc": empty("FrozenBatchNorm2d", base=torch.nn.Module),
        "torchvision.transforms": empty("ToTensor"),
        "torchvision.transforms.functional": {"InterpolationMode": enum.Enum("InterpolationMode", modes)},
        "torchvision.datasets": empty("CIFAR10", "CIFAR100", "MNIST", "KMNIST", "FashionMNIST", "ImageFolder"),
    }
    for name, names in names_of.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        vars(module).update(names)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    try:
        yield
    finally:
        for name in names_of:
            sys.modules.pop(name, None)
