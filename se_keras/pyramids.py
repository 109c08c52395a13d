"""Feature pyramids for detectors and segmenters: the feature map of a network at the end of each stage."""

import re
from typing import Any

import keras

from se_keras.graph import calls, structures


@keras.saving.register_keras_serializable(package="se_keras")
class Pyramid(keras.Model):
    """A functional model. Its outputs are the levels of the pyramid by name."""

    @property
    def pyramid_outputs(self) -> dict[str, Any]:
        """The levels. The detectors and segmenters of KerasHub read this property of an image encoder."""
        return self.output  # pyright: ignore[reportReturnType]: `pyramid` gives it a dict


def pyramid(model: keras.Model) -> Pyramid:
    """Makes a model that returns the feature maps of a network: `{"P2": ..., "P3": ...}`, `Pn` with stride 2 ** n.

    A level is the output of the last block with that stride, so ResNets have P2 to P5. Its size depends on the padding
    in the network. Inputs, layers and weights are shared with `model`. A classifier is left out. The pyramid is an
    image encoder for KerasHub, such as for `keras_hub.models.RetinaNetBackbone`.

    Args:
        model: A network of the catalogue, with or without its top, with any input shape, lowered or not.

    Raises:
        TypeError, ValueError: If `model` is not functional, or has no blocks with the names of the catalogue.
    """
    ends, strides = {}, {}
    for call in calls(model):
        # From the strides of convolutions and pooling: the sizes of the maps are rounded.
        stride = max(strides.get(id(x), 1) for x in call.input_tensors) * getattr(call.operation, "strides", (1,))[0]
        strides |= {id(x): stride for x in call.output_tensors}
        if block := re.match(r"(stage\d+_(?:block\d+|end))_", call.operation.name):
            ends[block[1]] = call.output_tensors[0]
    if not ends:
        raise ValueError(f"{model.name} has no layers named stage2_block1_...: pyramid takes networks of se_keras")
    levels = {f"P{strides[id(x)].bit_length() - 1}": x for x in ends.values()}
    return Pyramid(structures(model)[0], levels, name=f"{model.name}_pyramid")
