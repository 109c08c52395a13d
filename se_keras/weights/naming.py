"""The names that timm and pytorchcv give to our layers in their networks.

A naming is a function from the names of our layers, in order, to `{our layer: their modules}`. A SqueezeExcite layer
has two modules, one for each fully connected layer. Layers that a naming does not know are left out.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

Modules = dict[str, tuple[str, ...]]
_IN_BLOCK = re.compile(r"stage(\d+)_block(\d+)_(.+)")


@dataclass(frozen=True, kw_only=True)
class Naming:
    """The names in a network whose blocks all have the same layers.

    Args:
        outside: Their module for each of our layers outside of blocks.
        block: Their prefix of a block, from our numbers of the stage and of the block in it.
        inside: Their module or modules for each of our layers in a block.
        padding: Padding of some layers, which distinguishes networks with the same names and shapes.
    """

    outside: Mapping[str, str]
    block: Callable[[int, int], str]
    inside: Mapping[str, str | tuple[str, ...]]
    padding: Mapping[str, tuple[tuple[int, int], tuple[int, int]]] = field(default_factory=dict)

    def __call__(self, names: Collection[str]) -> Modules:
        """Their modules for each of our layers in `names`."""
        found: Modules = {name: (module,) for name, module in self.outside.items() if name in names}
        for name in names:
            if (match := _IN_BLOCK.fullmatch(name)) and (modules := self.inside.get(match[3])):
                prefix = self.block(int(match[1]), int(match[2]))
                modules = (modules,) if isinstance(modules, str) else modules
                found[name] = tuple(f"{prefix}.{module}" for module in modules)
        return found


def _layer(stage, block):
    return f"layer{stage - 1}.{block - 1}"


def _residual(*se: str) -> dict[str, str | tuple[str, ...]]:
    numbered = {f"conv{n}": f"conv{n}" for n in (1, 2, 3)} | {f"conv{n}_bn": f"bn{n}" for n in (1, 2, 3)}
    return numbered | {"shortcut": "downsample.0", "shortcut_bn": "downsample.1", "se": se}


timm_resnet = Naming(
    outside={"conv1": "conv1", "conv1_bn": "bn1", "predictions": "fc"},
    block=_layer,
    inside=_residual("se.fc1", "se.fc2"),
    padding={"pool1_pad": ((1, 1), (1, 1))},  # our networks that end in "b", which also have other strides
)
timm_legacy = Naming(
    outside={"conv1": "layer0.conv1", "conv1_bn": "layer0.bn1", "predictions": "last_linear"}
    | {f"conv1_{n}": f"layer0.conv{n}" for n in (1, 2, 3)}  # SENet-154
    | {f"conv1_{n}_bn": f"layer0.bn{n}" for n in (1, 2, 3)},
    block=_layer,
    inside=_residual("se_module.fc1", "se_module.fc2"),
    padding={"pool1_pad": ((0, 1), (0, 1))},  # the pooling of Caffe
)
timm_mobilenet = Naming(
    outside={"conv1": "conv_stem", "conv1_bn": "bn1", "predictions": "classifier"},
    block=lambda stage, block: f"blocks.{stage - 1}.{block - 1}",
    inside={"conv1": "conv_dw", "conv1_bn": "bn1", "conv2": "conv_pw", "conv2_bn": "bn2"},
)


def timm_vgg(names: Collection[str]) -> Modules:
    """The features are one list: three modules for each convolution, one for each pooling between stages."""
    found: Modules = {"fc1": ("pre_logits.fc1",), "fc2": ("pre_logits.fc2",), "predictions": ("head.fc",)}
    convolutions = [name for name in names if name.endswith("_conv")]
    for before, name in enumerate(convolutions):
        if match := _IN_BLOCK.fullmatch(name):
            index = 3 * before + int(match[1]) - 1
            found |= {name: (f"features.{index}",), f"{name}_bn": (f"features.{index + 1}",)}
    return found


def timm_inception_resnet(names: Collection[str]) -> Modules:
    """Branches are numbered from 0, and a branch with one convolution is not a list."""
    stem = {f"conv{n}": f"conv2d_{suffix}" for n, suffix in enumerate(("1a", "2a", "2b", "3b", "4a"), start=1)}
    first = {3: "mixed_5b", 4: "mixed_6a", 5: "mixed_7a"}
    found: Modules = {"predictions": ("classif",), **_with_bn(stem)}
    for name in names:
        match = _IN_BLOCK.fullmatch(name)
        if not match or match[3].endswith("_bn") or int(match[1]) not in first:
            continue
        stage, block, part = int(match[1]), int(match[2]), match[3]
        prefix = first[stage] if block == 1 else f"repeat{'' if stage == 3 else f'_{stage - 3}'}.{block - 2}"
        if (stage, block) == (5, 11):
            prefix = "block8"
        if (stage, block) == (5, 12):
            found |= _with_bn({name: "conv2d_7b"})
        elif part == "conv":
            found[name] = (f"{prefix}.conv2d",)
        elif branch := re.fullmatch(r"branch(\d)_conv(\d)", part):
            module = f"{prefix}.branch{int(branch[1]) - 1}"
            if prefix == "mixed_5b" and branch[1] == "4":
                module += ".1"  # after the pooling
            elif f"{name[:-1]}2" in names:
                module += f".{int(branch[2]) - 1}"
            found |= _with_bn({name: module})
    return found


def _with_bn(modules: Mapping[str, str]) -> Modules:
    """Convolutions and their BatchNorm, for modules that contain both."""
    convolutions = {name: (f"{module}.conv",) for name, module in modules.items()}
    return convolutions | {f"{name}_bn": (f"{module}.bn",) for name, module in modules.items()}


def _unit(stage, block):
    return f"features.stage{stage - 1}.unit{block}"


def _module_names(modules):
    return {name: module for name, (module,) in _with_bn(modules).items()}


_OUTPUT = {"predictions": "output"}
_OUTSIDE = _OUTPUT | _module_names({"conv1": "features.init_block"})
_SE = ("se.conv1", "se.conv2")
_BODY = {f"conv{n}": f"body.conv{n}" for n in (1, 2, 3)}
pytorchcv_mobilenet = Naming(
    outside=_OUTSIDE,
    block=lambda stage, block: f"features.stage{stage}.unit{block}",
    inside=_module_names({"conv1": "dw_conv", "conv2": "pw_conv"}),
)
pytorchcv_shufflenet = Naming(
    outside=_OUTSIDE,
    block=_unit,
    inside={"conv1": "compress_conv1", "conv2": "dw_conv2", "conv3": "expand_conv3"}
    | {"conv1_bn": "compress_bn1", "conv2_bn": "dw_bn2", "conv3_bn": "expand_bn3"},
)
pytorchcv_cifar_resnet = Naming(
    outside=_OUTSIDE, block=_unit, inside=_module_names(_BODY | {"shortcut": "identity_conv"}) | {"se": _SE}
)
pytorchcv_cifar_preresnet = Naming(
    outside=_OUTPUT | {"conv1": "features.init_block", "stage4_end_bn": "features.post_activ.bn"},
    block=_unit,
    inside=_module_names(_BODY) | {"shortcut": "identity_conv", "se": _SE},
)


def pytorchcv_bn_inception(names: Collection[str]) -> Modules:
    """Its stages begin with the module that halves the size. Ours end with it, like the paper's 3a to 5b."""
    stem = {"conv1": "conv1", "conv2_conv1": "conv2.conv1", "conv2_conv2": "conv2.conv2"}
    found: Modules = {"predictions": ("output",), **_with_bn({k: f"features.init_block.{v}" for k, v in stem.items()})}
    ends = {3: 3, 4: 5}  # 3c and 4e
    for name in names:
        if match := re.fullmatch(r"stage(\d)_block(\d)_branch(\d)_conv(\d)", name):
            stage, block, branch, number = map(int, match.groups())
            halves = ends.get(stage) == block
            unit = 1 if halves else block + (stage > 3)
            module = f"features.stage{stage - 2 + halves}.unit{unit}.branches.branch{branch}"
            if branch == 4:
                module += ".conv"
            elif f"{name[:-1]}2" in names:
                module += f".conv{number}"
            found |= _with_bn({name: module})
    return found


NAMINGS: dict[str, tuple[Callable[[Collection[str]], Modules], ...]] = {
    "timm": (timm_resnet, timm_legacy, timm_mobilenet, timm_vgg, timm_inception_resnet),
    "pytorchcv": (
        pytorchcv_mobilenet,
        pytorchcv_shufflenet,
        pytorchcv_cifar_resnet,
        pytorchcv_cifar_preresnet,
        pytorchcv_bn_inception,
    ),
}
