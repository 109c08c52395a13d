"""Feature pyramids for detectors and segmenters: a network's feature map at the end of each stage."""

import re

import keras

from se_keras.graph import calls, structures


@keras.saving.register_keras_serializable(package="se_keras")
class Pyramid(keras.Model):
    """A functional model whose outputs are levels by name."""

    @property
    def pyramid_outputs(self):
        """The levels, under the name by which KerasHub's detectors and segmenters ask an image encoder for them."""
        return self.output


def pyramid(model):
    """Makes a model that returns a network's feature maps: `{"P2": ..., "P3": ...}`, `Pn` with a stride of 2 ** n.

    Each is the output of the last block with that stride, so ResNets have P2 to P5. Layers and weights are shared with
    `model`, whose classifier, if any, is left out.

    Args:
        model: A network of the catalogue, with or without its top, at any input size, fixed or free; lowered or not.

    Returns:
        A `keras.Model` with the inputs of `model`. Sizes are rounded as the network pads. It is an image encoder for
        KerasHub, such as that of `keras_hub.models.RetinaNetBackbone`.

    Raises:
        TypeError: If `model` is not functional.
        ValueError: If it has no blocks named as those of the catalogue.
    """
    ends, strides = {}, {}
    for call in calls(model):
        # By the strides of convolutions and pooling: those of sizes would be off where a small image is rounded.
        stride = max(strides.get(id(x), 1) for x in call.input_tensors) * getattr(call.operation, "strides", (1,))[0]
        strides |= {id(x): stride for x in call.output_tensors}
        if block := re.match(r"(stage\d+_(?:block\d+|end))_", call.operation.name):
            ends[block[1]] = call.output_tensors[0]
    if not ends:
        raise ValueError(f"{model.name} has no layers named stage2_block1_...: pyramid takes networks of se_keras")
    levels = {f"P{strides[id(x)].bit_length() - 1}": x for x in ends.values()}
    return Pyramid(structures(model)[0], levels, name=f"{model.name}_pyramid")
