"""Feature pyramids for detectors and segmenters: a network's feature map at the end of each stage."""

import math
import re

import keras

from se_keras.complexity import complexity
from se_keras.graph import calls, endpoints


def pyramid(model):
    """Makes a model that returns a network's feature maps: `{"P2": ..., "P3": ...}`, `Pn` with a stride of 2 ** n.

    Each is the output of the last block with that stride, so ResNets have P2 to P5. Layers and weights are shared with
    `model`, whose classifier, if any, is left out.

    Args:
        model: A network of the catalogue, with or without its top, at any input size, fixed or free.

    Returns:
        A `keras.Model` with the inputs of `model`. Sizes are rounded as the network pads.

    Raises:
        TypeError: If `model` is not functional.
        ValueError: If it has no blocks named as those of the catalogue.
    """
    ends = {}
    for call in calls(model):
        if block := re.match(r"(stage\d+_(?:block\d+|end))_", call.operation.name):
            ends[block[1]] = call
    if not ends:
        raise ValueError(f"{model.name} has no layers named stage2_block1_...: pyramid takes networks of se_keras")
    inputs, _ = endpoints(model)
    shape = tuple(size or 512 for size in inputs[0].shape[1:-1]) + (inputs[0].shape[-1],)
    heights = {layer.name: layer.output_shape[0] for layer in complexity(model, input_shape=shape).layers}
    levels = {}
    for call in ends.values():
        stride = shape[0] / heights[call.operation.name]
        levels[f"P{round(math.log2(stride))}"] = call.output_tensors[0]
    return keras.Model(inputs[0] if len(inputs) == 1 else inputs, levels, name=f"{model.name}_pyramid")
