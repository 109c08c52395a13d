"""Ranges of int8 files that integer kernels can compute with."""

import itertools
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .file import plain_interpreter

_ATTEMPTS = 5
_MARGIN = 1.5


@dataclass(frozen=True, kw_only=True)
class _Limits:
    """Between which factors a kernel scales its inputs to its output.

    Args:
        is_product: Whether the factor is the product of the two inputs' scales, and not each of them, by the output's.
        smallest: Below it, an input's scale is too small.
        largest: Above it, the output's scale is too small.
    """

    is_product: bool
    smallest: float = 0.0
    largest: float = 2.0**7


# XNNPACK multiplies sums by a factor that must be below 2^8, and does not refuse all other files: it may abort the
# process. Additions with a factor below 2^-10 and products below 2^-16 are not delegated to it. The margin is 2.
_SUM, _DOT = _Limits(is_product=False, smallest=2.0**-9), _Limits(is_product=True)
_LIMITS = {
    "ADD": _SUM,
    "SUB": _SUM,
    "CONV_2D": _DOT,
    "DEPTHWISE_CONV_2D": _DOT,
    "FULLY_CONNECTED": _DOT,
    "MUL": _Limits(is_product=True, smallest=2.0**-15),
}

Narrow = dict[str, dict[str, float]]  # {operator, which has the name of its output: {tensor: scale that it needs}}


def with_wide_ranges(
    convert: Callable[[Collection[str]], bytes],
    widen: Callable[[dict[str, float]], None],
    *,
    may_stay_float: bool = True,
) -> bytes:
    """Converts to an int8 file until all its ranges are wide enough for integer kernels.

    Not every range can be widened: that of a pooling follows from its input, and that of a sigmoid is fixed. What does
    not fit after five attempts stays in float32.

    Args:
        convert: Makes the file. Takes the names of the operators that stay in float32.
        widen: Widens ranges before the next attempt; takes `{tensor: scale that it needs}`.
        may_stay_float: Whether operators may stay in float32.

    Raises:
        ValueError: If ranges are too narrow after five attempts, and no operator may stay in float32.
    """
    in_float: set[str] = set()
    for attempt in itertools.count(1):
        content = convert(in_float)
        narrow = too_narrow(content)
        if not narrow:
            return content
        if attempt < _ATTEMPTS:
            widen({name: scale for needed in narrow.values() for name, scale in needed.items()})
        elif may_stay_float and narrow.keys() - in_float:
            in_float |= narrow.keys()
        else:
            break
    names = sorted({name for needed in narrow.values() for name in needed})
    raise ValueError(f"No int8 ranges fit integer kernels at {', '.join(names)}: calibrate on more typical images")


def too_narrow(content: bytes) -> Narrow:
    """The operators whose tensors have scales too small for integer kernels.

    Dead units cause them: if the bottleneck of a gate is zero for all calibration images, the next range is zero too.
    So do constants far below the sum that they are added to, such as the epsilon of a normalization.
    """
    interpreter = plain_interpreter(content)
    tensors = {tensor["index"]: tensor for tensor in interpreter.get_tensor_details()}
    scales = {
        index: float(tensor["quantization_parameters"]["scales"].max())
        for index, tensor in tensors.items()
        if tensor["quantization_parameters"]["scales"].size
    }
    narrow: Narrow = {}
    for operator in interpreter._get_ops_details():
        output, limits = operator["outputs"][0], _LIMITS.get(operator["op_name"])
        inputs = [index for index in operator["inputs"][:2] if index in scales]
        if limits is None or output not in scales or not inputs:
            continue
        needed = _needed(limits, scales, inputs, output)
        scales |= needed
        if needed:
            narrow[tensors[output]["name"]] = {tensors[index]["name"]: scale for index, scale in needed.items()}
    return narrow


def _needed(limits: _Limits, scales: Mapping[int, float], inputs: list[int], output: int) -> dict[int, float]:
    """The scales that an operator needs where they are too small: `{tensor: scale}`."""
    needed, goal = {}, scales[output]
    values = [scales[index] for index in inputs]
    factor = (math.prod(values) if limits.is_product else max(values)) / goal
    if factor > limits.largest:
        needed[output] = goal = goal * factor / limits.largest * _MARGIN
    for index in [min(inputs, key=lambda index: scales[index])] if limits.is_product else inputs:
        factor = (math.prod(values) if limits.is_product else scales[index]) / goal
        if factor < limits.smallest:
            needed[index] = scales[index] / factor * limits.smallest * _MARGIN
    return needed


def widened(ranges: Mapping[str, Any] | None, extent: float) -> dict[str, Any]:
    """Scales the ranges, extended to include 0, so that the widest has this extent.

    Without ranges, as those of a constant, which is smaller than this, they are plus and minus the extent.
    """
    if ranges is None:
        return {"min": np.float32([-extent]), "max": np.float32([extent])}
    low, high = np.minimum(ranges["min"], 0), np.maximum(ranges["max"], 0)
    if not np.any(high - low):  # a dead unit, which other images may activate
        low, high, extent = low - 1, high + 1, max(extent, 2)
    factor = extent / np.max(high - low)
    return {**ranges, "min": low * factor, "max": high * factor}
