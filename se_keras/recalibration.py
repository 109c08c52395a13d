"""Where and how a network recalibrates its channels: `SEConfig`, and the hook that blocks call at each site."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import keras

from se_keras.errors import require_choice
from se_keras.layers import Excitation, Squeeze, SqueezeExcite, check_arguments

Site = Literal["standard", "pre", "3x3", "post", "identity"]
SITES: tuple[Site, ...] = get_args(Site)
Hook = Callable[[Site, keras.KerasTensor], keras.KerasTensor]  # se(site, x)


@dataclass(frozen=True, kw_only=True)
class SEConfig:
    """Squeeze-and-excitation of a whole network. `None` instead of a config is the plain baseline.

    Args:
        ratio: Reduction ratio r of eq. 3 (Table 10).
        squeeze: Pooling of the squeeze (Table 11; `"none"` is NoSqueeze, Table 16).
        excitation: Activation of the gate (Table 12).
        bias: Whether the two fully connected layers have biases, as the released networks do.
        site: Position in the residual block (Figure 5, Tables 14 and 15).
        stages: The stages that recalibrate, numbered as in the paper (Table 13): a ResNet has 2 to 5.
        minimum_units: The fewest units of a bottleneck, whatever the ratio. With ratio 16, narrow networks have one or
            two, which may close for all images in training: see `se-keras gates`. The paper has no minimum.
    """

    ratio: int = 16
    squeeze: Squeeze = "avg"
    excitation: Excitation = "sigmoid"
    bias: bool = True
    site: Site = "standard"
    stages: tuple[int, ...] | Literal["all"] = "all"
    minimum_units: int = 1

    def __post_init__(self) -> None:
        check_arguments(self.ratio, self.squeeze, self.excitation, self.bias)
        require_choice("site", self.site, SITES)
        if type(self.minimum_units) is not int or self.minimum_units < 1:
            raise ValueError(f"minimum_units must be an int of at least 1. Received: {self.minimum_units!r}")
        if self.stages != "all":
            if not isinstance(self.stages, (tuple, list)) or not all(type(stage) is int for stage in self.stages):
                raise TypeError(f"stages must be 'all' or a tuple of ints. Received: stages={self.stages!r}")
            object.__setattr__(self, "stages", tuple(self.stages))  # JSON has lists


def check_fits(config: SEConfig | None, *, network: str, sites: Sequence[str], stages: Sequence[int]) -> None:
    """Raises ValueError or TypeError unless `config` fits a network with these `sites` and `stages`."""
    if config is None:
        return
    if not isinstance(config, SEConfig):
        raise TypeError(f"se must be an SEConfig, or None for the plain baseline. Received: se={config!r}")
    if config.site not in sites:
        possible = " or ".join(map(repr, sites))
        raise ValueError(f"{network} has no such site: site must be {possible}. Received: site={config.site!r}")
    if config.stages != "all" and not (config.stages and set(config.stages) <= set(stages)):
        raise ValueError(f"{network} has the stages {tuple(stages)}: name some of them. Received: {config.stages}")


def recalibrator(config: SEConfig | None, *, stage: int, name: str) -> Hook:
    """The hook `se(site, x)` of one block. It recalibrates `x` at the site and in the stages of the config.

    Everywhere else it returns `x` itself, so a baseline and its SE network share one code path.
    """
    if config is None or not (config.stages == "all" or stage in config.stages):
        return lambda site, x: x

    def se(site: Site, x: keras.KerasTensor) -> keras.KerasTensor:
        if site != config.site:
            return x
        is_narrow = config.minimum_units > max(1, x.shape[-1] // config.ratio)
        units = config.minimum_units if is_narrow else None
        layer = SqueezeExcite(
            config.ratio, config.squeeze, config.excitation, config.bias, units=units, name=f"{name}_se"
        )
        return layer(x)

    return se
