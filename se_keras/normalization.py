"""Mean and std of pixels: `Normalization`."""

import math
from typing import Any, NamedTuple, TypedDict

import keras
import numpy as np

from se_keras.layers import ops


class NormalizationRecord(TypedDict):
    """A normalization in JSON, such as run.json."""

    mean: list[float]
    std: list[float]


class Normalization(NamedTuple):
    """(pixel - mean) / std of pixels in 0 to 255, with one mean and std for all channels, or one for each."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, normalization: Any, *, channels: int) -> "Normalization":
        """Checks `(mean, std)`, each one number or one for each channel. Equal channels are stored as one value."""
        each = f"each a number or one for each of {channels} channels, std above zero"
        rule = f"normalization must be (mean, std), {each}"
        try:
            mean, std = (tuple(np.atleast_1d(np.asarray(values, dtype="float64")).tolist()) for values in normalization)
            finite = all(math.isfinite(value) for value in (*mean, *std))
        except (TypeError, ValueError):
            raise TypeError(f"{rule}. Received: {normalization=}") from None
        if not finite or min(std, default=0) <= 0 or not {len(mean), len(std)} <= {1, channels}:
            raise ValueError(f"{rule}. Received: {normalization=}")
        if len(set(mean)) == len(set(std)) == 1:
            return cls(mean[:1], std[:1])
        count = max(len(mean), len(std))
        return cls(mean * (count // len(mean)), std * (count // len(std)))

    def apply(self, pixels: Any) -> Any:
        """(pixel - mean) / std in float32, channels last: an array for an array, a tensor for a tensor."""
        if ops.is_tensor(pixels) or keras.utils.is_keras_tensor(pixels):
            mean, std = (ops.convert_to_tensor(values, "float32") for values in self)
            return (ops.cast(pixels, "float32") - mean) / std
        return ((np.asarray(pixels) - np.array(self.mean)) / np.array(self.std)).astype("float32")

    def of_pixel(self, pixel: float) -> tuple[float, ...]:
        """The normalized value of a pixel, in each channel."""
        return tuple((pixel - mean) / std for mean, std in zip(self.mean, self.std, strict=True))

    def undo(self, images: np.ndarray) -> np.ndarray:
        """The pixels of normalized images, in float32."""
        return (images * np.array(self.std) + np.array(self.mean)).astype("float32")

    def scaled(self, factor: float) -> "Normalization":
        """The normalization of pixels that are `factor` times as large."""
        return Normalization(*(tuple(value * factor for value in values) for values in self))

    def agrees(self, other: "Normalization") -> bool:
        """Whether two normalizations are the same but for rounded numbers: half a level of 255, and 1 % of std."""
        if len(self.mean) > 1 < len(other.mean) != len(self.mean):
            return False
        (mean, std), (other_mean, other_std) = map(np.asarray, (self, other))
        return np.allclose(mean, other_mean, rtol=0, atol=0.5) and np.allclose(std, other_std, rtol=0.01)

    def as_layer(self, name: str) -> keras.layers.Layer:
        """The normalization as a Keras layer."""
        scale, offset = [1 / s for s in self.std], [-m / s for m, s in zip(self.mean, self.std, strict=True)]
        return keras.layers.Rescaling(scale, offset, name=name)  # pyright: ignore[reportArgumentType]  # lists work

    def to_json(self) -> dict[str, list[float]]:
        """The normalization as a dict for JSON, as in run.json."""
        return {"mean": list(self.mean), "std": list(self.std)}


IMAGENET = Normalization((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))  # RGB, as in timm and torchvision
