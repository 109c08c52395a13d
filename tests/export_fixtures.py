"""What the tests of export share: networks of whose weights none could hide an error, and how far outputs are apart."""

from unittest import mock

import keras
import numpy as np
import pytest
from keras import layers

from se_keras.architectures import resnet
from se_keras.blocks import classifier
from se_keras.export.outputs import integer_range, noise
from se_keras.layers import SqueezeExcite
from se_keras.recalibration import SEConfig


def images_for(model, *, samples=2, size=32, seed=0):
    """Standard normal images in the shape of each input of `model`, in its own structure; free sizes become `size`."""
    rng = np.random.default_rng(seed)
    # A Sequential model has no `input` before it is called.
    inputs = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    return keras.tree.map_structure(
        lambda x: rng.normal(size=(samples, *(side or size for side in x.shape[1:]))).astype("float32"), inputs
    )


def scattered(model, *, images=None, beta=(-0.5, 0.5), seed=0):
    """Gives the weights of `model`, in place, values as a trained network might have them, and returns it.

    Keras starts with gamma = 1, beta = 0, mean = 0, variance = 1 and biases of 0: a graph that lost one of them would
    still be equal. Values scattered about those alone would let activations grow from block to block until the gates
    saturate and amplify rounding. So, as in tests/test_parity.py, the statistics are scattered about the true
    ones, which `images` show on their way through the network, and residual branches end with small gammas.

    Where there are no shortcuts, every BatchNorm with its ReLU amplifies rounding by some 1.2: the ReLU takes away what
    images have in common more than how they differ, and the next BatchNorm makes up for it. A `beta` about 1 lets most
    values pass, and the factor is near 1.
    """
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        if weight.name == "beta":
            weight.assign(rng.uniform(*beta, weight.shape))
        elif weight.name in ("bias", "reduce_bias", "expand_bias", "pointwise_bias"):
            weight.assign(rng.uniform(-0.5, 0.5, weight.shape))
        elif weight.name == "gamma":
            ends_branch = "_conv3_bn" in weight.path or "_conv2_bn" in weight.path
            weight.assign(rng.uniform(*((0.2, 0.6) if ends_branch else (0.5, 1.5)), weight.shape))
    call = layers.BatchNormalization.call

    def scatter_statistics(layer, inputs, **kwargs):
        values = np.moveaxis(keras.ops.convert_to_numpy(inputs).astype("float64"), layer.axis, -1)
        values = values.reshape(-1, values.shape[-1])
        mean, variance = values.mean(axis=0), values.var(axis=0) + 1e-3
        layer.moving_mean.assign(mean + np.sqrt(variance) * rng.uniform(-0.5, 0.5, mean.shape))
        layer.moving_variance.assign(variance * rng.uniform(0.5, 2.0, variance.shape))
        return call(layer, inputs, **kwargs)

    with mock.patch.object(layers.BatchNormalization, "call", scatter_statistics):
        model(images_for(model, seed=seed + 1) if images is None else images, training=False)
    return model


# Types of integers that a model takes: bytes by default, the others in the long tests.
INTEGERS = ["uint8"] + [
    pytest.param(dtype, marks=pytest.mark.slow)
    for dtype in ("int8", "uint16", "int16", "uint32", "int32", "int64", "uint64")
]


def network_of_integers(dtype):
    """A small network with a softmax that takes `(8, 8, 3)` integers, and 20 images for it, no two alike in color."""
    keras.utils.set_random_seed(0)
    low, high = integer_range(dtype)
    images = keras.Input((8, 8, 3), dtype=dtype, name="images")
    x = layers.Rescaling(2 / (high - low), -(high + low) / (high - low))(images)
    x = SqueezeExcite(ratio=4)(layers.Conv2D(8, 3, activation="relu", name="conv")(x))
    scores = layers.Dense(4, activation="softmax", name="scores")(layers.GlobalAveragePooling2D()(x))
    colors = np.random.default_rng(0).uniform(low, high, (20, 1, 1, 3))
    samples = 0.5 * noise((8, 8, 3), samples=20, dtype=dtype) + 0.5 * colors
    return keras.Model(images, scores), np.rint(samples).astype(dtype)


def outputs_of(model, images):
    """The outputs of a Keras model in inference, as a flat list of arrays."""
    return [keras.ops.convert_to_numpy(x) for x in keras.tree.flatten(model(images, training=False))]


def difference(expected, actual):
    """The largest difference of two lists of outputs, each as a share of the range of the expected one."""
    assert [x.shape for x in expected] == [x.shape for x in actual]
    # Infinite or constant outputs would agree in spite of errors in front of them.
    assert all(np.isfinite(x).all() and np.ptp(x) > 1e-3 for x in expected)
    return max(float(np.abs(x - y).max() / np.ptp(x)) for x, y in zip(expected, actual, strict=True))


class Subclassed(keras.Model):
    """A model whose graph cannot be read."""

    def call(self, inputs):
        """Anything."""
        return inputs * 2


def grouped_network(*, name="se_resnext_small", site="standard"):
    """A ResNeXt of two blocks with squeeze-and-excitation, for 8x8 images: grouped convolutions in little time."""
    spec = resnet.ResNetSpec(
        blocks=(1, 1),
        cardinality=8,
        width_per_group=4,
        strides_at="3x3",
        stem=resnet.stem_small,
        se=SEConfig(site=site),
    )
    images = keras.Input((8, 8, 3), name="images")
    x = classifier(resnet.build(spec, images), 10, activation="softmax", dropout=0.0)
    return keras.Model(images, x, name=name)
