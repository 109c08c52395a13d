"""timm and pytorchcv without torchvision: the independent implementations that tests/test_parity.py compares with.

Both were written by others in another framework, with other paddings, names and layouts: agreement with them is
evidence that no test against our own output can give.
"""

import contextlib
import enum
import importlib.machinery
import importlib.util
import sys
import types


@contextlib.contextmanager
def torchvision_for_import():
    """While open, timm and pytorchcv import without torchvision, of whose names their networks here use none.

    timm imports torchvision for its data pipeline, pytorchcv for deformable convolutions. An installed torchvision is
    used as it is. Otherwise empty classes stand in for the names that both look up, and leave `sys.modules` at the
    end, so that nothing else takes them for torchvision.
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
