"""A lowered model equals its original, is cheaper as it says, and needs only Keras."""

import functools
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

import keras
import numpy as np
import pytest
from export_fixtures import difference, grouped_network, images_for, outputs_of, scattered
from hypothesis import example, given, settings
from hypothesis import strategies as st
from keras import layers, ops
from keras.layers import BatchNormalization, Conv2D, Dense, DepthwiseConv2D, Dropout, ReLU

from se_keras.catalogue import create
from se_keras.export.lowering import in_float32, lower
from se_keras.graph import calls, producer, structures
from se_keras.layers import EXCITATIONS, SQUEEZES, ChannelShuffle, ShakeShake, SqueezeExcite
from se_keras.recalibration import SITES, SEConfig

# The largest allowed error, as a share of the outputs' range. Folding rounds each weight once (6e-8), and a hoisted
# mean sums in another order. That leaves float32 noise: up to 4e-6 in the deepest networks below, 1e-6 in the small
# ones. A lost bias, a wrong epsilon or a swapped channel changes more than 1e-3.
BOUND = 1e-5


def graph(function, shape=(6, 6, 8)):
    """A model of `function`, from its input tensor to its outputs."""
    images = keras.Input(shape, name="images")
    return keras.Model(images, function(images), name="graph")


def pointwise(x, channels=16, **arguments):
    """A convolution after which a squeeze can be hoisted."""
    return Conv2D(channels, 1, use_bias=False, **arguments)(x)


def norm(x, **arguments):
    return BatchNormalization(epsilon=1e-5, **arguments)(x)


def recalibrate(x, **arguments):
    return SqueezeExcite(4, **arguments)(x)


def scaled(x, channels=16, sign=1):
    return layers.Rescaling([sign * 0.1 * i for i in range(1, channels + 1)])(x)


def zero(model):
    """Gives all gates a second layer of zeros."""
    for layer in model.layers:
        if isinstance(layer, SqueezeExcite):
            layer.expand_kernel.assign(np.zeros_like(layer.expand_kernel))


def close(model):
    """Gives convolutions positive weights, and all bottlenecks negative ones."""
    for layer in model.layers:
        for weight in layer.weights:
            if isinstance(layer, Conv2D):
                weight.assign(np.abs(weight))
            elif weight.name.startswith("reduce"):
                weight.assign(-np.abs(weight))


def two_readers(x):
    y = pointwise(x)
    return layers.Add()([y, norm(y)])


def two_readers_one_behind_dropout(x):
    y = pointwise(x)
    return layers.Add()([y, norm(Dropout(0.5)(y))])


def two_readers_one_in_a_nested_model(x):
    y = pointwise(x)
    return layers.Add()([y, graph(norm, shape=(6, 6, 16))(y)])


def two_readers_one_within_the_nested_model(x):
    def inner(x):
        y = pointwise(x)
        return [y, ReLU()(y)]

    y, rectified = graph(inner)(x)
    return layers.Add()([norm(y), rectified])


def given_out_twice_by_the_nested_model(x):
    def inner(x):
        y = pointwise(x)
        return [y, y]

    first, second = graph(inner)(x)
    return layers.Add()([norm(first), second])


def read_and_given_out(x):
    y = pointwise(x)
    return [y, norm(y)]


def identities(x):
    y = layers.GaussianNoise(0.1)(pointwise(Dropout(0.5)(x)))
    y = layers.SpatialDropout2D(0.5)(layers.AlphaDropout(0.1)(y))
    return recalibrate(layers.Identity()(layers.ActivityRegularization(1e-3)(norm(y))))


def shared_convolution(x):
    convolution = Conv2D(8, 1)
    return recalibrate(norm(convolution(ReLU()(norm(convolution(x))))))


def shared_squeeze_excite(x):
    recalibrate = SqueezeExcite(4)
    return recalibrate(ReLU()(recalibrate(norm(pointwise(x, 8)))))


def shared_batchnorm(x):
    norm = BatchNormalization()
    return layers.Add()([norm(pointwise(x)), ReLU()(norm(pointwise(x)))])


def bottleneck(x):
    return recalibrate(norm(pointwise(ReLU()(norm(Conv2D(8, 3, padding="same", use_bias=False)(x))))))


def nested(x):
    inner = graph(bottleneck)
    return ReLU()(inner(x))


def nested_twice(x):
    inner = graph(lambda x: recalibrate(norm(pointwise(x, 8))))
    return inner(ReLU()(inner(x)))


def nested_in_nested(x):
    outer = graph(lambda x: graph(bottleneck)(ReLU()(x)))
    return outer(x)


def nested_several(x):
    inputs = {"b": keras.Input((6, 6, 8), name="b"), "a": keras.Input((6, 6, 8), name="a")}
    outputs = [layers.Subtract()([pointwise(inputs["b"], 8), inputs["a"]]), ReLU()(inputs["a"])]
    subtracted, rectified = keras.Model(inputs, outputs)({"a": x, "b": ReLU()(x)})
    return layers.Concatenate()([norm(subtracted), rectified])


def nested_sequential(x):
    inner = keras.Sequential([keras.Input((6, 6, 8)), Conv2D(16, 1), BatchNormalization(), SqueezeExcite(4)])
    return ReLU()(inner(x))


def operations(x):
    y = norm(pointwise(x)) * 2 - 0.5
    y = ops.concatenate([y, ops.relu(x)], axis=-1)
    return recalibrate(ops.transpose(y, (0, 2, 1, 3)) / (1 + ops.mean(ops.abs(y), axis=(1, 2), keepdims=True)))


def several_inputs():
    images, mask = keras.Input((6, 6, 8), name="images"), keras.Input((6, 6, 1), name="mask")
    return keras.Model([images, mask], recalibrate(norm(pointwise(layers.Multiply()([images, mask])))))


def several_by_name():
    inputs = {"right": keras.Input((6, 6, 8), name="right"), "left": keras.Input((6, 6, 8), name="left")}
    y = layers.Subtract()([norm(pointwise(inputs["right"])), pointwise(inputs["left"])])
    return keras.Model(inputs, {"maps": recalibrate(y), "vector": layers.GlobalAveragePooling2D()(y)})


def sequential():
    stack = [Conv2D(16, 1), BatchNormalization(), SqueezeExcite(4), Dropout(0.5), layers.Flatten(), Dense(5)]
    return keras.Sequential([keras.Input((6, 6, 8), name="images"), *stack], name="graph")


def normalization(x):
    layer = layers.Normalization()
    layer.adapt(np.random.default_rng(0).normal(3, 2, size=(50, 6, 6, 8)).astype("float32"))
    return norm(pointwise(layer(x)))


def augmented(x):
    x = layers.RandomFlip("horizontal")(x)
    x = layers.RandomTranslation(0.1, 0.1)(x)
    return norm(pointwise(layers.RandomContrast(0.1)(x)))


def other_layers(x):
    y = layers.PReLU()(norm(layers.SeparableConv2D(8, 3, padding="same")(x)))
    y = layers.LayerNormalization()(norm(layers.Conv2DTranspose(8, 3, padding="same")(y)))
    y = layers.Reshape((36, 8))(layers.LeakyReLU()(layers.UpSampling2D(2)(layers.AveragePooling2D(2)(y))))
    y = layers.Add()([y, layers.MultiHeadAttention(2, 4)(y, y)])
    return layers.LSTM(6)(layers.Conv1D(8, 3)(layers.ZeroPadding1D(1)(y)))


def shuffle_unit(x):
    y = ReLU()(norm(Conv2D(16, 1, groups=4, use_bias=False)(x)))
    y = norm(DepthwiseConv2D(3, padding="same", use_bias=False)(ChannelShuffle(4)(y)))
    y = recalibrate(norm(Conv2D(16, 1, groups=4, use_bias=False)(y)))
    return layers.Concatenate()([y, x])


def shared_shuffle(x):
    shuffle = ChannelShuffle(4)
    return shuffle(ReLU()(norm(pointwise(shuffle(x)))))


def shuffle_with_two_readers(x):
    y = ChannelShuffle(2)(norm(pointwise(x)))
    return layers.Add()([recalibrate(y), ReLU()(y)])


def shake_shake(x):
    branches = [norm(Conv2D(16, 3, padding="same", use_bias=False)(x)), norm(pointwise(x))]
    return recalibrate(ShakeShake()(branches))


def nested_shuffle_and_mixture(x):
    inner = graph(lambda x: ShakeShake("even")([ChannelShuffle(2)(pointwise(x)), pointwise(x)]))
    return ReLU()(inner(x))


def scaled_gate(x, offset=0.0):
    return layers.Rescaling(0.1, offset)(recalibrate(norm(pointwise(x))))


def scaled_gate_with_two_readers(x):
    y = recalibrate(norm(pointwise(x)))
    return layers.Add()([layers.Rescaling(0.1)(y), y])


def scaled_gate_of_what_others_read(x):
    y = pointwise(x)
    return layers.Add()([layers.Rescaling(0.1)(recalibrate(y)), y])


def concatenation_with_two_readers(x):
    y = layers.Concatenate()([pointwise(x), x])
    return layers.Add()([ReLU()(y), y])


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network, and how many layers `lower` must hoist, fold or drop in it.

    `rewritten` is the number of layers whose outputs have no counterpart for another reason. `change` is called with
    the model once its weights have values.
    """

    build: Callable
    hoisted: int = 0
    unhoisted: int = 0
    constant: int = 0
    folded: int = 0
    dropped: int = 0
    rewritten: int = 0
    change: Callable = lambda model: None  # of its weights


def case(function, **counts):
    return Case(build=lambda: graph(function), **counts)


CASES = {
    # The layer before a squeeze.
    "1x1": case(lambda x: recalibrate(norm(pointwise(x))), hoisted=1, folded=1),
    "1x1 grouped": case(lambda x: recalibrate(norm(pointwise(x, groups=4))), hoisted=1, folded=1),
    "1x1 one channel a group": case(lambda x: recalibrate(norm(pointwise(x, groups=8))), hoisted=1, folded=1),
    "1x1 with bias alone": case(lambda x: recalibrate(Conv2D(16, 1)(x)), hoisted=1),
    "1x1 with bias and BatchNorm": case(lambda x: recalibrate(norm(Conv2D(16, 1)(x))), hoisted=1, folded=1),
    "1x1 without either": case(lambda x: recalibrate(pointwise(x)), hoisted=1),
    "1x1 as wide as its input": case(lambda x: recalibrate(norm(pointwise(x, 8))), hoisted=1, folded=1),
    "1x1 from wide to narrow": case(lambda x: recalibrate(norm(pointwise(x, 4))), unhoisted=1, folded=1),
    "1x1 with stride": case(lambda x: recalibrate(norm(pointwise(x, strides=2))), unhoisted=1, folded=1),
    "1x1 with activation": case(lambda x: recalibrate(norm(Conv2D(16, 1, activation="relu")(x))), unhoisted=1),
    "1x1 and ReLU": case(lambda x: recalibrate(ReLU()(norm(pointwise(x)))), unhoisted=1, folded=1),
    "two 1x1": case(lambda x: recalibrate(pointwise(norm(pointwise(x)))), hoisted=1, folded=1),
    "3x3": case(lambda x: recalibrate(norm(Conv2D(16, 3, use_bias=False)(x))), unhoisted=1, folded=1),
    "1x3": case(lambda x: recalibrate(norm(Conv2D(16, (1, 3))(x))), unhoisted=1, folded=1),
    "3x3 dilated": case(lambda x: norm(Conv2D(4, 3, dilation_rate=2, padding="same")(x)), folded=1),
    "Dense on a map": case(lambda x: recalibrate(norm(Dense(16, use_bias=False)(x))), hoisted=1, folded=1),
    "Dense with activation": case(lambda x: recalibrate(Dense(16, activation="tanh")(x)), unhoisted=1),
    "depthwise": case(lambda x: recalibrate(norm(DepthwiseConv2D(3)(x))), unhoisted=1, folded=1),
    "depthwise multiplied": case(
        lambda x: recalibrate(norm(DepthwiseConv2D(3, depth_multiplier=2, use_bias=False)(x))), unhoisted=1, folded=1
    ),
    "input": case(recalibrate, unhoisted=1),
    "SqueezeExcite": case(lambda x: recalibrate(recalibrate(norm(pointwise(x)))), hoisted=1, unhoisted=1, folded=1),
    # The recalibration itself.
    "max": case(lambda x: recalibrate(norm(pointwise(x)), squeeze="max"), unhoisted=1, folded=1),
    "no squeeze": case(lambda x: recalibrate(norm(pointwise(x)), squeeze="none"), unhoisted=1, folded=1),
    "without bias": case(lambda x: recalibrate(norm(pointwise(x)), bias=False), hoisted=1, folded=1),
    "hard_sigmoid": case(lambda x: recalibrate(norm(pointwise(x)), excitation="hard_sigmoid"), hoisted=1, folded=1),
    # Gates that are the same for every image.
    "zero gate": case(lambda x: recalibrate(norm(pointwise(x))), change=zero, constant=1, folded=1, rewritten=1),
    "zero gate alone": case(recalibrate, change=zero, constant=1),
    "zero gate without bias": case(
        lambda x: recalibrate(norm(Conv2D(8, 3)(x)), bias=False), change=zero, constant=1, folded=1, rewritten=1
    ),
    "zero gate of what others read": case(
        lambda x: layers.Add()([y := norm(pointwise(x)), recalibrate(y)]), change=zero, constant=1, folded=1
    ),
    "zero gate of tanh behind ReLU": case(
        lambda x: recalibrate(ReLU()(pointwise(x)), excitation="tanh"), change=zero, constant=1
    ),
    "zero gate before a padded convolution": case(
        lambda x: Conv2D(4, 3, padding="same")(recalibrate(x)), change=zero, constant=1, rewritten=1
    ),
    **{
        f"closed gate behind ReLU, {squeeze}": case(
            lambda x, squeeze=squeeze: recalibrate(ReLU()(norm(pointwise(x))), squeeze=squeeze),
            change=close,
            constant=1,
            folded=1,
            rewritten=2,
        )
        for squeeze in ("avg", "max", "none")
    },
    "closed gate behind a padded convolution of a ReLU": case(
        lambda x: recalibrate(Conv2D(8, 3, padding="same")(ReLU()(x))), change=close, constant=1, rewritten=1
    ),
    "gate of a maximum behind a convolution of a ReLU": case(
        lambda x: recalibrate(Conv2D(8, 3)(ReLU()(x)), squeeze="max"), change=close, unhoisted=1
    ),
    "gate that an image can open": case(recalibrate, change=close, unhoisted=1),
    # Scales of channels, as `freeze_gates` leaves them.
    "scale of channels behind 3x3": case(lambda x: scaled(norm(Conv2D(16, 3)(x))), folded=2),
    "scale of channels behind ReLU": case(lambda x: scaled(ReLU()(norm(pointwise(x)))), folded=2, rewritten=1),
    "scale of channels behind ReLU6": case(lambda x: scaled(ReLU(6)(pointwise(x)))),
    "negative scale of channels behind ReLU": case(lambda x: scaled(ReLU()(pointwise(x)), sign=-1)),
    "scale of channels behind ReLU with two readers": case(
        lambda x: layers.Add()([y := ReLU()(pointwise(x)), scaled(y)])
    ),
    "scale of channels before a padded convolution": case(
        lambda x: Conv2D(4, 3, padding="same")(scaled(x, 8)), rewritten=1
    ),
    "scale of channels before a grouped convolution": case(lambda x: Conv2D(4, 3, groups=2)(scaled(x, 8))),
    # BatchNorm.
    "without scale": case(lambda x: norm(pointwise(x), scale=False), folded=1),
    "without center": case(lambda x: norm(pointwise(x), center=False), folded=1),
    "without both": case(lambda x: recalibrate(norm(pointwise(x), scale=False, center=False)), hoisted=1, folded=1),
    "axis 3": case(lambda x: norm(pointwise(x), axis=3), folded=1),
    "axis 1": case(lambda x: recalibrate(norm(pointwise(x), axis=1)), unhoisted=1),
    "twice": case(lambda x: recalibrate(norm(norm(pointwise(x)))), hoisted=1, folded=2),
    "first": case(lambda x: pointwise(norm(x))),
    "behind ReLU": case(lambda x: norm(ReLU()(pointwise(x)))),
    "behind Dense": case(lambda x: norm(Dense(4)(layers.Flatten()(x))), folded=1),
    "frozen": case(lambda x: norm(pointwise(x), trainable=False), folded=1),
    "in training mode": case(lambda x: BatchNormalization()(pointwise(x), training=True)),
    # Values with several readers.
    "two readers": case(two_readers),
    "two readers, one behind Dropout": case(two_readers_one_behind_dropout, dropped=1),
    "two readers, one in a nested model": case(two_readers_one_in_a_nested_model),
    "two readers, one within the nested model": case(two_readers_one_within_the_nested_model),
    "two readers, given out twice by the nested model": case(given_out_twice_by_the_nested_model),
    "read and given out": case(read_and_given_out),
    "given out twice": case(lambda x: [norm(pointwise(x))] * 2, folded=1),
    "shared convolution": case(shared_convolution, hoisted=1, folded=2),
    "shared SqueezeExcite": case(shared_squeeze_excite, hoisted=1, unhoisted=1, folded=1),
    "shared BatchNorm": case(shared_batchnorm, folded=2),
    "what only training needs": case(identities, hoisted=1, folded=1, dropped=6),
    # Kinds of models.
    "nested": case(nested, hoisted=1, folded=2),
    "nested twice": case(nested_twice, hoisted=2, folded=2),
    "nested in nested": case(nested_in_nested, hoisted=1, folded=2),
    "nested with several inputs and outputs": case(nested_several),
    "nested Sequential": case(nested_sequential, hoisted=1, folded=1),
    "Sequential": Case(build=sequential, hoisted=1, folded=1, dropped=1),
    "several inputs": Case(build=several_inputs, hoisted=1, folded=1),
    "several by name": Case(build=several_by_name, unhoisted=1, folded=1),
    "operations": case(operations, unhoisted=1, folded=1),
    "Rescaling": case(lambda x: norm(pointwise(layers.Rescaling(1 / 255, -0.5)(x))), folded=1),
    "Rescaling by channel": case(lambda x: layers.Rescaling([0.5] * 8, [0.1 * i for i in range(8)])(x)),
    "Normalization": case(normalization, folded=1),
    "Normalization by constants": case(lambda x: layers.Normalization(mean=[1.0] * 8, variance=[4.0] * 8)(x)),
    "augmentation": case(augmented, folded=1),
    "other layers": case(other_layers),
    "output is the input": case(Dropout(0.5), dropped=1),
    # Scales.
    "Rescaling behind 1x1": case(lambda x: layers.Rescaling(0.1, 0.5)(norm(pointwise(x))), folded=2),
    "Rescaling behind a hoisted gate": case(scaled_gate, hoisted=1, folded=2, rewritten=1),
    "Rescaling that shifts behind a gate": case(partial(scaled_gate, offset=0.1), hoisted=1, folded=1),
    "Rescaling behind a gate that reads what it scales": case(
        lambda x: layers.Rescaling(0.1)(recalibrate(ReLU()(norm(pointwise(x))))), unhoisted=1, folded=1
    ),
    "Rescaling behind a gate of a 3x3": case(
        lambda x: layers.Rescaling(0.1)(recalibrate(norm(Conv2D(16, 3)(x)))), unhoisted=1, folded=1
    ),
    "Rescaling behind a gate with two readers": case(scaled_gate_with_two_readers, hoisted=1, folded=1),
    "Rescaling behind a gate of what others read": case(scaled_gate_of_what_others_read, hoisted=1),
    # Poolings.
    "average": case(lambda x: norm(layers.AveragePooling2D((2, 3), 2)(x)), folded=1),
    "average with strides of its own": case(lambda x: norm(layers.AveragePooling2D(2, (2, 1))(x))),
    "average with padding": case(lambda x: norm(layers.AveragePooling2D(3, 1, padding="same")(x))),
    "average of a free size": Case(build=lambda: graph(layers.AveragePooling2D(3, 2), (None, None, 8))),
    "max of a free size": Case(
        build=lambda: graph(lambda x: recalibrate(x, squeeze="max"), (None, None, 8)), unhoisted=1
    ),
    # Concatenations.
    "ReLU of a concatenation": case(
        lambda x: ReLU()(layers.Concatenate()([norm(pointwise(x)), x])), folded=1, rewritten=1
    ),
    "relu of a concatenation": case(
        lambda x: layers.Activation("relu")(layers.Concatenate(axis=1)([x, x])), rewritten=1
    ),
    "ReLU6 of a concatenation": case(lambda x: ReLU(6)(layers.Concatenate()([pointwise(x), x]))),
    "ReLU of a concatenation with two readers": case(concatenation_with_two_readers),
    # The other layers of se_keras.
    "shuffle and 1x1": case(
        lambda x: recalibrate(norm(pointwise(ChannelShuffle(4)(x)))), hoisted=1, folded=1, rewritten=1
    ),
    "shuffle and 3x3": case(lambda x: norm(Conv2D(4, 3)(ChannelShuffle(2)(x))), folded=1, rewritten=1),
    "shuffle and depthwise": case(
        lambda x: pointwise(norm(DepthwiseConv2D(3, 2, padding="same")(ChannelShuffle(4)(x)))), folded=1, rewritten=2
    ),
    "shuffle and depthwise multiplied": case(
        lambda x: norm(DepthwiseConv2D(3, depth_multiplier=2)(ChannelShuffle(4)(x))), folded=1
    ),
    "shuffle of what others read": case(lambda x: layers.Add()([pointwise(ChannelShuffle(4)(x), 8), x]), rewritten=1),
    "shuffle": case(ChannelShuffle(4)),
    "shuffle of one group": case(ChannelShuffle(1), rewritten=1),
    "shuffle of a free size": Case(
        build=lambda: graph(shuffle_unit, (None, None, 8)), hoisted=1, folded=3, rewritten=1
    ),
    "shuffle of a free height": Case(build=lambda: graph(shuffle_unit, (None, 6, 8)), hoisted=1, folded=3, rewritten=1),
    "shuffle unit": case(shuffle_unit, hoisted=1, folded=3, rewritten=1),
    "shared shuffle": case(shared_shuffle, folded=1),
    "shuffle with two readers": case(shuffle_with_two_readers, unhoisted=1, folded=1),
    "mixture": case(shake_shake, unhoisted=1, folded=2),
    "mixture of a value with itself": case(lambda x: (lambda y: ShakeShake()([y, y]))(pointwise(x))),
    "nested shuffle and mixture": case(nested_shuffle_and_mixture),
}
every_case = pytest.mark.parametrize("name", CASES)


def built(name):
    keras.utils.set_random_seed(0)
    model = scattered(CASES[name].build())
    CASES[name].change(model)
    return model


@functools.cache
def pair(name):
    """The model of a case and its lowered model, for tests that change neither."""
    model = built(name)
    return model, lower(model)


def found(lowering):
    """`{kind: number of layers}` of a Lowering."""
    counted = (field.name for field in fields(lowering) if field.name not in ("reasons", "counterparts"))
    return {name: len(getattr(lowering, name)) for name in counted}


def all_layers(model):
    """The layers of a model and of the models inside it."""
    for layer in model.layers:
        yield layer
        if isinstance(layer, keras.Model):
            yield from all_layers(layer)


@pytest.fixture
def without_se_keras(monkeypatch):
    """Keras cannot find the project's layers, neither by registered name nor by import."""
    registered = dict(keras.saving.get_custom_objects())
    keras.saving.get_custom_objects().clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "se_keras"]:
        monkeypatch.setitem(sys.modules, name, None)
    yield
    keras.saving.get_custom_objects().update(registered)


# Graphs of users.


@every_case
def test_lowered_graph_equals_the_original(name):
    model, lowered = pair(name)
    images = images_for(model)
    assert difference(outputs_of(model, images), outputs_of(lowered, images)) <= BOUND


@every_case
def test_what_is_hoisted_folded_and_dropped(name):
    expected = {kind: getattr(CASES[name], kind) for kind in ("hoisted", "unhoisted", "constant", "folded", "dropped")}
    assert found(pair(name)[1].lowering) == expected


@every_case
def test_lowered_graph_has_stock_layers_alone(name):
    _, lowered = pair(name)
    assert {type(x).__module__.partition(".")[0] for x in lowered.operations} == {"keras"}
    assert not any(isinstance(layer, keras.Model) for layer in lowered.layers)
    assert "se_keras" not in lowered.to_json()


@pytest.mark.slow
@every_case
def test_lowered_graph_loads_without_se_keras_and_is_the_same(name, tmp_path, without_se_keras):
    _, lowered = pair(name)
    lowered.save(tmp_path / "lowered.keras")
    loaded = keras.saving.load_model(tmp_path / "lowered.keras")
    images = images_for(lowered)
    # The same weights in the same operations: bit-identical.
    for expected, actual in zip(outputs_of(lowered, images), outputs_of(loaded, images), strict=True):
        np.testing.assert_array_equal(actual, expected)


def is_model(tensor):
    return isinstance(producer(tensor), keras.Model)


def outputs_by_layer(model):
    """The output tensors of each layer that is called once, by its name."""
    times = Counter(call.operation.name for call in calls(model))
    return {call.operation.name: call.output_tensors for call in calls(model) if times[call.operation.name] == 1}


@every_case
def test_twins_give_the_same_values(name):
    model, lowered = pair(name)
    tensors, others = outputs_by_layer(model), outputs_by_layer(lowered)
    pairs = {one: other for one, other in lowered.lowering.counterparts.items() if one in tensors and other in others}
    # An output has no counterpart if the next layer was folded in, or for the reason that the case counts as rewritten.
    # Models inside the model are inlined.
    lost = [layer for layer, outputs in tensors.items() if layer not in pairs and not is_model(outputs[0])]
    assert len(lost) <= CASES[name].folded + CASES[name].dropped + CASES[name].rewritten
    if pairs:
        images = images_for(model)
        expected, actual = (
            outputs_of(keras.Model(structures(side)[0], [x for layer in names for x in outputs[layer]]), images)
            for side, outputs, names in ((model, tensors, pairs), (lowered, others, pairs.values()))
        )
        for x, y in zip(expected, actual, strict=True):
            np.testing.assert_allclose(y, x, rtol=0, atol=BOUND * max(np.ptp(x), 1e-3))


@pytest.mark.slow
@every_case
def test_lower_leaves_its_input_as_it_was(name):
    model = built(name)
    images = images_for(model)
    outputs, weights, config = outputs_of(model, images), model.get_weights(), model.to_json()
    calls = {layer.name: len(layer._inbound_nodes) for layer in all_layers(model)}
    lower(model)
    assert {layer.name: len(layer._inbound_nodes) for layer in all_layers(model)} == calls
    assert model.to_json() == config
    assert all(map(np.array_equal, model.get_weights(), weights))
    assert all(map(np.array_equal, outputs_of(model, images), outputs))


@pytest.mark.slow
@every_case
def test_lowered_graph_is_lowered_already(name):
    _, once = pair(name)
    twice = lower(once)
    assert found(twice.lowering) == dict.fromkeys(found(twice.lowering), 0)
    assert [(type(layer), layer.name) for layer in twice.layers] == [(type(layer), layer.name) for layer in once.layers]
    images = images_for(once)
    for expected, actual in zip(outputs_of(once, images), outputs_of(twice, images), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_a_network_with_squeeze_and_excitation_does_not_load_without_se_keras(tmp_path, without_se_keras):
    built("1x1").save(tmp_path / "model.keras")
    with pytest.raises(TypeError, match="SqueezeExcite"):
        keras.saving.load_model(tmp_path / "model.keras")


def test_shared_layer_stays_one_layer():
    prelu = layers.PReLU(name="shared")
    lowered = lower(graph(lambda x: layers.Add()([prelu(x), prelu(layers.Rescaling(-1.0)(x))])))
    assert [layer.name for layer in lowered.layers if isinstance(layer, layers.PReLU)] == ["shared"]


@pytest.mark.parametrize("name", ["several by name", "several inputs", "given out twice", "1x1"])
def test_lowered_graph_has_the_structure_of_the_original(name):
    model = CASES[name].build()
    lowered = lower(model)
    keras.tree.assert_same_structure(lowered.input, model.input)
    keras.tree.assert_same_structure(lowered.output, model.output)
    assert [x.name for x in lowered.inputs] == [x.name for x in model.inputs]
    assert lowered.name == model.name


def test_time_distributed_recalibration_does_not_stay_a_layer_of_se_keras():
    images = keras.Input((3, 6, 6, 8))
    model = keras.Model(images, layers.TimeDistributed(SqueezeExcite(4))(images))
    try:
        lowered = lower(model)
    except ValueError as error:
        assert "SqueezeExcite" in str(error)
    else:
        assert "se_keras" not in lowered.to_json()


def test_dense_layer_in_int8_is_not_lowered_to_something_else():
    images = keras.Input((8,), name="images")
    model = scattered(keras.Model(images, Dense(4)(images)))
    model.layers[-1].quantize("int8")
    x = images_for(model)
    try:
        lowered = lower(model)
    except ValueError as error:
        assert "int8" in str(error)
    else:
        # Keras computes the original in int8 throughout, the lowered one in float32: a step of either in 127.
        assert difference(outputs_of(model, x), outputs_of(lowered, x)) <= 0.02


# ChannelShuffle and ShakeShake.


@pytest.mark.parametrize("shape", [(6, 5, 12), (None, None, 12), (None, 5, 12)])
@pytest.mark.parametrize("groups", [1, 2, 3, 12])
def test_lowered_shuffle_is_equal_to_the_bit(shape, groups):
    model = graph(ChannelShuffle(groups), shape)
    images = np.random.default_rng(0).normal(size=(2, 6, 5, 12)).astype("float32")
    np.testing.assert_array_equal(lower(model)(images).numpy(), model(images).numpy())


def test_shuffle_of_a_fixed_size_becomes_layers_that_carry_its_name():
    lowered = lower(graph(ChannelShuffle(4, name="shuffle")))
    assert [(type(layer), layer.name) for layer in lowered.layers[1:]] == [
        (layers.Reshape, "shuffle_apart"),
        (layers.Permute, "shuffle_turned"),
        (layers.Reshape, "shuffle"),
    ]


def test_shuffle_of_a_free_size_leaves_it_free():
    lowered = lower(graph(ChannelShuffle(4), (None, None, 8)))
    assert lowered.input_shape == lowered.output_shape == (None, None, None, 8)


@pytest.mark.parametrize("name", ["shuffle and 1x1", "shuffle and 3x3", "shuffle and depthwise"])
def test_shuffle_in_front_of_a_convolution_of_all_channels_is_gone(name):
    kinds = {type(layer) for layer in pair(name)[1].layers}
    assert kinds & {layers.Reshape, layers.Permute} == set()


def test_shuffle_stands_behind_the_depthwise_convolution_with_fewer_positions():
    model = graph(lambda x: pointwise(DepthwiseConv2D(3, 2, padding="same")(ChannelShuffle(4)(x)), groups=4))
    (turned,) = [layer for layer in lower(model).layers if isinstance(layer, layers.Permute)]
    assert turned.output.shape == (None, 3 * 3, 2, 4)


def test_average_pooling_without_padding_is_a_depthwise_convolution():
    kinds = [type(layer) for layer in pair("average")[1].layers]
    assert kinds == [layers.InputLayer, DepthwiseConv2D]


def test_what_rectified_a_concatenation_rectifies_its_parts():
    kinds = [type(layer) for layer in pair("ReLU of a concatenation")[1].layers]
    assert sorted(kind.__name__ for kind in kinds) == ["Concatenate", "Conv2D", "InputLayer", "ReLU", "ReLU"]
    assert kinds[-1] is layers.Concatenate


def test_maximum_is_a_pooling_with_a_window_of_the_whole_map():
    (pool,) = [layer for layer in pair("max")[1].layers if isinstance(layer, layers.MaxPooling2D)]
    assert pool.pool_size == (6, 6)


def test_lowered_mixture_is_an_average_equal_to_the_bit():
    model = graph(lambda x: ShakeShake(name="shake")([x, ReLU()(x)]))
    lowered = lower(model)
    images = images_for(model)
    assert type(lowered.get_layer("shake")) is layers.Average
    np.testing.assert_array_equal(lowered(images).numpy(), model(images).numpy())


def test_mixture_that_draws_in_inference_is_refused():
    # The mean would be a different model.
    model = graph(lambda x: ShakeShake(name="shake")([x, ReLU()(x)], training=True))
    with pytest.raises(ValueError, match=r"Received: shake \(training=True\)$"):
        lower(model)


# Another size.


@pytest.mark.slow
@pytest.mark.parametrize("own", [(None, None, 8), (None, 6, 8), (6, 6, 8)])
@pytest.mark.parametrize("size", [(6, 6, 8), [9, 4, 8]])
@pytest.mark.parametrize("function", [shuffle_unit, shake_shake, bottleneck])
def test_input_shape_is_fixed_in_the_lowered_model_alone(own, size, function):
    model = scattered(graph(function, own), images=np.random.default_rng(0).normal(size=(2, 6, 6, 8)))
    lowered = lower(model, input_shape=size)
    assert (lowered.input_shape, model.input_shape) == ((None, *size), (None, *own))
    # A model of another size is compared by one of the same weights that takes any.
    free = graph(function, (None, None, 8))
    free.set_weights(model.get_weights())
    images = images_for(lowered)
    assert difference(outputs_of(free, images), outputs_of(lowered, images)) <= BOUND


def test_shuffle_of_a_free_size_is_lowered_to_layers_where_the_size_is_given():
    model = graph(ChannelShuffle(4), (None, None, 8))
    kinds = {type(layer) for layer in lower(model, input_shape=(6, 5, 8)).layers}
    assert kinds == {layers.InputLayer, layers.Reshape, layers.Permute}


@pytest.mark.parametrize(
    "size",
    [(6, 6), (6, 6, 8, 1), (), 6, "6x6", (6, 6, 3), (6, 6, None), (None, 6, 8), (0, 6, 8), (-6, 6, 8), (6.0, 6, 8)],
    ids=str,
)
def test_input_shape_that_the_model_does_not_take_is_refused(size):
    message = f"graph takes input_shape=(None, None, 8), of any size. Received: input_shape={size!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        lower(graph(bottleneck, (None, None, 8)), input_shape=size)


def test_input_shape_that_a_layer_inside_does_not_take_is_refused_in_one_line():
    model = graph(lambda x: Dense(4, name="top")(layers.Flatten()(x)))
    with pytest.raises(ValueError, match=r"^graph does not take input_shape=\(8, 8, 8\): [^\n]+$"):
        lower(model, input_shape=(8, 8, 8))


def test_input_shape_for_two_inputs_is_refused():
    with pytest.raises(ValueError, match=r"^input_shape is for models with one input\. Received: a model with 2$"):
        lower(several_inputs(), input_shape=(6, 6, 8))


# Random graphs.


# Steps of random graphs: from a tensor with 8 or 16 channels, and the tensors before it, to the next tensor.
STEPS = {
    "1x1": lambda x, previous: pointwise(x),
    "1x1 narrower": lambda x, previous: Conv2D(8, 1)(x),
    "1x1 grouped": lambda x, previous: pointwise(x, groups=4),
    "3x3": lambda x, previous: Conv2D(8, 3, padding="same", use_bias=False)(x),
    "3x3 grouped": lambda x, previous: Conv2D(16, 3, padding="same", groups=4)(x),
    "depthwise": lambda x, previous: DepthwiseConv2D(3, padding="same")(x),
    "dense": lambda x, previous: Dense(8)(x),
    "norm": lambda x, previous: norm(x),
    "scale": lambda x, previous: layers.Rescaling(0.3)(x),
    "scale of channels": lambda x, previous: scaled(x, x.shape[-1]),
    "scale and shift": lambda x, previous: layers.Rescaling(-0.7, 0.2)(x),
    "relu": lambda x, previous: ReLU()(x),
    "dropout": lambda x, previous: Dropout(0.5)(x),
    "average": lambda x, previous: layers.AveragePooling2D(3, 1)(layers.ZeroPadding2D(1)(x)),
    "shuffle": lambda x, previous: ChannelShuffle(4)(x),
    "se": lambda x, previous: recalibrate(x),
    "se without bias": lambda x, previous: recalibrate(x, bias=False),
    "se by maximum": lambda x, previous: recalibrate(x, squeeze="max"),
    "se at each position": lambda x, previous: recalibrate(x, squeeze="none"),
    "concatenate": lambda x, previous: Conv2D(8, 1)(ReLU()(layers.Concatenate()([x, previous[-1]]))),
    "add": lambda x, previous: layers.Add()([x, next(y for y in previous if y.shape == x.shape)]),
    "mix": lambda x, previous: ShakeShake()([x, next(y for y in previous if y.shape == x.shape)]),
}


def graph_of(steps):
    """The model of these steps."""
    keras.utils.set_random_seed(0)
    images = x = keras.Input((6, 6, 8), name="images")
    previous = [x]
    for step in steps:
        x = STEPS[step](x, [*previous, x])
        previous.append(x)
    return keras.Model(images, x)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(list(STEPS)), min_size=1, max_size=12))
@example(["1x1", "norm", "relu", "scale of channels", "1x1"])
@example(["1x1", "norm", "se", "scale", "shuffle", "depthwise", "norm", "1x1 narrower"])
@example(["shuffle", "depthwise", "norm", "1x1 grouped", "norm", "se", "add"])
def test_random_graph_equals_the_original(steps):
    model = scattered(graph_of(steps))
    images = images_for(model)
    assert difference(outputs_of(model, images), outputs_of(lower(model), images)) <= BOUND


# A network of the catalogue; test_networks.py has all of them.


@pytest.mark.slow
@pytest.mark.parametrize("squeeze", SQUEEZES)
@pytest.mark.parametrize("site", SITES)
def test_every_place_and_squeeze_equals_the_original(site, squeeze):
    se = SEConfig(site=site, squeeze=squeeze, ratio=4)
    model = create("se_resnet11_digits", se=se, classes=10, classifier_activation=None)
    images = images_for(scattered(model))
    assert difference(outputs_of(model, images), outputs_of(lower(model), images)) <= BOUND


@pytest.mark.slow
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("excitation", EXCITATIONS)
def test_every_excitation_equals_the_original(excitation, bias):
    se = SEConfig(excitation=excitation, bias=bias)
    model = create("se_resnet11_digits", se=se, classes=10, classifier_activation=None)
    images = images_for(scattered(model))
    assert difference(outputs_of(model, images), outputs_of(lower(model), images)) <= BOUND


@pytest.mark.parametrize(
    ("site", "hoisted"),
    [
        ("standard", ("stage2_block1_se", "stage3_block1_se", "stage4_block1_se")),
        # The only projection without a stride is that of stage 2: 1x1, from 16 to 64 channels.
        ("identity", ("stage2_block1_se",)),
        ("pre", ()),  # after a ReLU, like the next two
        ("3x3", ()),
        ("post", ()),
    ],
)
def test_which_squeezes_are_hoisted_by_site(site, hoisted):
    lowering = lower(create("se_resnet11_digits", se=SEConfig(site=site), classes=10)).lowering
    assert lowering.hoisted == hoisted
    assert len(lowering.hoisted + lowering.unhoisted) == 3


@pytest.mark.parametrize("squeeze", ["max", "none"])
def test_only_the_mean_is_hoisted(squeeze):
    lowering = lower(create("se_resnet11_digits", se=SEConfig(squeeze=squeeze), classes=10)).lowering
    assert (len(lowering.hoisted), len(lowering.unhoisted)) == (0, 3)


def test_baseline_has_nothing_to_hoist():
    lowering = lower(create("resnet11_digits", classes=10)).lowering
    assert lowering.hoisted == lowering.unhoisted == ()
    assert len(lowering.folded) == 13


def test_senet154s_dropout_is_dropped_by_name():
    model = create("se_resnet11_digits", classes=10, include_top=False, pooling="avg")
    outputs = Dropout(0.2, name="dropout")(model.output)
    assert lower(keras.Model(model.input, outputs)).lowering.dropped == ("dropout",)


def test_lowering_reads_as_a_sentence():
    lowering = lower(create("se_resnet11_digits", classes=10)).lowering
    assert str(lowering) == "3 of 3 squeezes hoisted, 13 layers folded into others, 0 dropped"


@pytest.mark.parametrize(
    ("config", "summary"),
    [
        (SEConfig(site="post"), "0 of 3 squeezes hoisted (3 not directly after a 1x1 convolution of stride 1), "),
        (SEConfig(site="identity"), "1 of 3 squeezes hoisted (2 not directly after a 1x1 convolution of stride 1), "),
        (SEConfig(squeeze="max"), "0 of 3 squeezes hoisted (3 with squeeze='max'), "),
    ],
)
def test_lowering_says_why_a_squeeze_is_not_hoisted(config, summary):
    lowering = lower(create("se_resnet11_digits", se=config, classes=10)).lowering
    assert str(lowering).startswith(summary)
    assert tuple(lowering.reasons) == lowering.unhoisted
    assert sum(lowering.counts()["reasons"].values()) == len(lowering.unhoisted)


def test_squeeze_after_a_convolution_that_narrows_is_not_hoisted_and_says_so():
    lowering = pair("1x1 from wide to narrow")[1].lowering
    assert set(lowering.reasons.values()) == {"after a convolution with fewer outputs than inputs"}


def test_names_in_nested_models_are_prefixed_with_the_models():
    inner = graph(lambda x: SqueezeExcite(4, name="se")(BatchNormalization(name="bn")(Conv2D(16, 1, name="conv")(x))))
    inner.name = "backbone"
    images = keras.Input((6, 6, 8))
    lowered = lower(keras.Model(images, ReLU(name="relu")(inner(images))))
    assert lowered.lowering.hoisted == ("backbone_se",)
    assert lowered.lowering.folded == ("backbone_bn",)
    assert {"backbone_conv", "relu"} <= {layer.name for layer in lowered.layers}


# The purpose of hoisting.


@pytest.fixture(scope="module")
def lowered_digits():
    keras.utils.set_random_seed(0)
    return lower(create("se_resnet11_digits", classes=10))


@pytest.mark.parametrize(("stage", "channels"), [(2, 64), (3, 128), (4, 256)])
def test_hoisted_squeeze_reads_a_quarter_of_the_channels(lowered_digits, stage, channels):
    squeeze = lowered_digits.get_layer(f"stage{stage}_block1_se_squeeze")
    assert squeeze.input.shape[-1] == channels // 4
    reduce = lowered_digits.get_layer(f"stage{stage}_block1_se_reduce")
    assert tuple(reduce.kernel.shape) == (1, 1, channels // 4, channels // 16)


@pytest.mark.parametrize("stage", [2, 3, 4])
def test_product_alone_reads_the_convolution_behind_which_the_squeeze_was(lowered_digits, stage):
    # Then XNNPACK can multiply in place.
    convolution = lowered_digits.get_layer(f"stage{stage}_block1_conv3")
    readers = [node.operation.name for node in convolution._outbound_nodes]
    assert readers == [f"stage{stage}_block1_se_scale"]


def test_no_batchnorm_is_left_in_the_networks(lowered_digits):
    assert not any(isinstance(layer, BatchNormalization) for layer in lowered_digits.layers)


# Mixed precision.


def float32_and_float16():
    """Two networks with the same weights: one computes in float32, one in float16."""
    arguments = {"classes": 10, "classifier_activation": None}
    keras.config.set_dtype_policy("float32")
    full = scattered(create("se_resnet11_digits", **arguments))
    keras.config.set_dtype_policy("mixed_float16")
    half = create("se_resnet11_digits", **arguments)
    half.set_weights(full.get_weights())
    return full, half


def test_mixed_precision_is_lowered_to_float32(mixed_float16):
    full, half = float32_and_float16()
    images = images_for(full)
    # The variables of both are float32, and the lowered network computes in float32.
    assert difference(outputs_of(full, images), outputs_of(lower(half), images)) <= BOUND


def test_lowered_mixed_network_equals_its_original_to_float16(mixed_float16):
    _, half = float32_and_float16()
    images = images_for(half)
    # float16 has 11 bits: an error of 5e-4 at each of eleven layers. 1e-3 measured in all.
    assert difference(outputs_of(half, images), outputs_of(lower(half), images)) <= 5e-3


@pytest.mark.parametrize(
    "build", [lambda: float32_and_float16()[1], lambda: graph(shuffle_unit), lambda: graph(shake_shake)]
)
def test_lowered_mixed_network_computes_in_float32_throughout(build, mixed_float16):
    lowered = lower(build())
    computing = [layer for layer in lowered.layers if not isinstance(layer, layers.InputLayer)]
    assert {layer.compute_dtype for layer in computing} == {"float32"}
    assert {str(x.dtype) for x in (*lowered.inputs, *lowered.outputs)} == {"float32"}


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16", "float64"])
def test_model_of_another_float_type_has_a_model_in_float32_with_its_weights(policy):
    def function(x):
        x = layers.TimeDistributed(Dense(8))(recalibrate(norm(Conv2D(8, 3)(x))))
        return layers.Softmax(dtype="float32")(ops.cast(x, x.dtype))

    full = scattered(graph(function))
    keras.config.set_dtype_policy(policy)
    try:
        other = graph(function)
    finally:
        keras.config.set_dtype_policy("float32")
    other.set_weights(full.get_weights())
    full.set_weights(other.get_weights())  # rounded by the policies whose variables are of 16 bits
    images = images_for(full)
    copy = in_float32(other)
    assert [type(layer) for layer in copy.layers] == [type(layer) for layer in other.layers]
    assert {str(x.dtype) for call in calls(copy) for x in call.output_tensors} == {"float32"}
    assert difference(outputs_of(full, images), outputs_of(copy, images)) <= 1e-6


def test_model_in_float32_is_its_own():
    model = graph(bottleneck)
    assert in_float32(model) is model


# Channels first as Keras' default.


def test_lowering_is_the_same_whatever_keras_default_is(channels_first):
    keras.config.set_image_data_format("channels_last")

    def function(x):
        x = layers.AveragePooling2D(2)(recalibrate(norm(pointwise(x))))
        return recalibrate(norm(pointwise(x)), squeeze="max")

    model = scattered(graph(function))
    keras.config.set_image_data_format("channels_first")
    images = images_for(model)
    assert difference(outputs_of(model, images), outputs_of(lower(model), images)) <= BOUND


# Functions that are only in memory.


def doubled(x):
    return x * 2


SCALE = 3.0
FUNCTIONS = {
    "activation": Conv2D(4, 1, activation=doubled),
    "lambda as activation": Conv2D(4, 1, activation=lambda x: ops.tanh(x) * SCALE),
    "activation layer": layers.Activation(lambda x: ops.tanh(x) * SCALE),
    "lambda": layers.Lambda(lambda x: ops.tanh(x) * SCALE),
    "function": layers.Lambda(doubled),
    "arguments": layers.Lambda(lambda x, factor: x * factor, arguments={"factor": 5.0}),
    "output shape": layers.Lambda(lambda x: ops.max(x, axis=-1), output_shape=lambda shape: shape[:-1]),
    "regularizer": Conv2D(4, 1, activation="relu", kernel_regularizer=lambda w: ops.sum(ops.square(w))),
    "initializer": Conv2D(4, 1, activation="relu", kernel_initializer=lambda shape, dtype: ops.ones(shape, dtype)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_kept_as_they_are_in_memory(name):
    model = scattered(graph(lambda x: FUNCTIONS[name](recalibrate(norm(pointwise(x))))))
    images = images_for(model)
    assert difference(outputs_of(model, images), outputs_of(lower(model), images)) <= BOUND


# Low-rank adaptation.


@pytest.mark.parametrize("activation", ["linear", "relu"])
@pytest.mark.parametrize("kind", ["Dense", "Conv2D", "EinsumDense", "TimeDistributed"])
def test_low_rank_adaptation_is_added_to_the_weights(kind, activation):
    layer = {
        "Dense": lambda: Dense(4, activation=activation),
        "Conv2D": lambda: Conv2D(4, 3, activation=activation),
        "EinsumDense": lambda: layers.EinsumDense("abcd,de->abce", (6, 6, 4), activation=activation),
        "TimeDistributed": lambda: layers.TimeDistributed(Dense(4, activation=activation)),
    }[kind]()
    model = graph(lambda x: recalibrate(norm(layer(x))))
    getattr(layer, "layer", layer).enable_lora(2)
    scattered(model)
    lowered, images = lower(model), images_for(model)
    assert difference(outputs_of(model, images), outputs_of(lowered, images)) <= BOUND
    assert sum("lora" in w.path for w in model.weights) == 2
    assert not any("lora" in w.path for w in lowered.weights)
    assert '"lora_rank": 2' not in lowered.to_json()


# Inputs of bytes.


def test_input_of_bytes_stays_one():
    images = keras.Input((6, 6, 3), dtype="uint8", name="images")
    model = scattered(
        keras.Model(images, norm(pointwise(layers.Rescaling(1 / 255)(images)))),
        images=np.random.default_rng(0).integers(0, 256, (2, 6, 6, 3)).astype("uint8"),
    )
    lowered = lower(model)
    x = np.random.default_rng(1).integers(0, 256, (2, 6, 6, 3)).astype("uint8")
    assert lowered.inputs[0].dtype == "uint8"
    assert difference(outputs_of(model, x), outputs_of(lowered, x)) <= BOUND


# Errors.


@keras.saving.register_keras_serializable(package="tests")
class Foreign(layers.Layer):
    def call(self, inputs):
        return inputs * 2


@keras.saving.register_keras_serializable(package="tests")
class ForeignConvolution(Conv2D):
    """A subclass could compute anything."""


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__(name="subclassed")
        self.convolution = Conv2D(4, 1)

    def call(self, inputs):
        return self.convolution(inputs)


def test_custom_layer_is_refused_by_name():
    model = graph(lambda x: Foreign(name="mine")(x))
    with pytest.raises(ValueError, match=r"float layers of Keras and of se_keras. Received: mine \(Foreign\)$"):
        lower(model)


def test_subclass_of_a_keras_layer_is_custom():
    with pytest.raises(ValueError, match=r"Received: mine \(ForeignConvolution\)$"):
        lower(graph(ForeignConvolution(4, 1, name="mine")))


def test_every_custom_layer_is_named_those_in_nested_models_too():
    inner = graph(Foreign(name="inner"))
    model = graph(lambda x: Foreign(name="outer")(inner(x)))
    with pytest.raises(ValueError, match=r"Received: inner \(Foreign\), outer \(Foreign\)$"):
        lower(model)


def test_layer_that_cannot_be_copied_is_refused_by_name():
    # Keras has no arguments for an object of functools.
    with pytest.raises(ValueError, match=r"^mine cannot be copied: Cannot serialize object functools.partial[^\n]+$"):
        lower(graph(layers.Activation(partial(ops.leaky_relu, negative_slope=0.1), name="mine")))


def test_subclassed_model_is_refused():
    with pytest.raises(TypeError, match="functional"):
        lower(Subclassed())


def test_subclassed_model_inside_is_refused():
    with pytest.raises(TypeError, match="functional"):
        lower(graph(Subclassed()))


def test_sequential_model_without_input_is_refused():
    with pytest.raises(TypeError, match="Input"):
        lower(keras.Sequential([Conv2D(4, 1)]))


@pytest.mark.parametrize("value", [None, "se_resnet50", Conv2D(4, 1)], ids=["None", "name", "layer"])
def test_what_is_no_model_is_refused(value):
    with pytest.raises(TypeError, match="functional"):
        lower(value)


def test_refused_model_stays_as_it_was():
    model = graph(lambda x: Foreign()(norm(pointwise(x))))
    before = model.to_json()
    with pytest.raises(ValueError):
        lower(model)
    assert model.to_json() == before


def test_grouped_network_equals_the_original():
    model = scattered(grouped_network())
    images = images_for(model)
    assert difference(outputs_of(model, images), outputs_of(lower(model), images)) <= BOUND
