"""Parameters and multiply-adds against figures counted by hand, one layer after another."""

import re

import keras
import pytest
from keras import layers

from se_keras.catalogue import create, names
from se_keras.counting import complexity
from se_keras.layers import SqueezeExcite


def model_of(layer, *input_shape):
    images = keras.Input(input_shape)
    return keras.Model(images, layer(images))


# Layer, input shape, trained parameters, statistics and multiply-adds, each written as a sum.
BY_HAND = [
    (layers.Conv2D(8, 3, strides=2), (9, 9, 4), 3 * 3 * 4 * 8 + 8, 0, 4 * 4 * (3 * 3 * 4 * 8)),
    (layers.Conv2D(8, 3, strides=2, groups=2), (9, 9, 4), 3 * 3 * 2 * 8 + 8, 0, 4 * 4 * (3 * 3 * 2 * 8)),
    (layers.Conv2D(8, (1, 5), padding="same", use_bias=False), (6, 7, 4), 5 * 4 * 8, 0, 6 * 7 * (5 * 4 * 8)),
    (layers.Conv2D(2, 3, dilation_rate=2), (9, 9, 4), 3 * 3 * 4 * 2 + 2, 0, 5 * 5 * (3 * 3 * 4 * 2)),
    (layers.Conv1D(6, 3), (10, 4), 3 * 4 * 6 + 6, 0, 8 * (3 * 4 * 6)),
    (layers.DepthwiseConv2D(3, depth_multiplier=2), (6, 6, 4), 3 * 3 * 4 * 2 + 8, 0, 4 * 4 * (3 * 3 * 4 * 2)),
    (layers.DepthwiseConv1D(3), (6, 4), 3 * 4 + 4, 0, 4 * (3 * 4)),
    (layers.SeparableConv1D(6, 3), (6, 4), 3 * 4 + 4 * 6 + 6, 0, 4 * (3 * 4 + 4 * 6)),
    (
        layers.SeparableConv2D(6, 3, padding="same"),
        (5, 5, 4),
        3 * 3 * 4 + 4 * 6 + 6,
        0,
        5 * 5 * (3 * 3 * 4 + 4 * 6),
    ),
    # A transposed convolution multiplies every input position by the whole kernel.
    (
        layers.Conv2DTranspose(5, 3, strides=2, padding="same"),
        (4, 4, 6),
        3 * 3 * 6 * 5 + 5,
        0,
        4 * 4 * (3 * 3 * 6 * 5),
    ),
    (layers.Conv1DTranspose(5, 3, strides=2), (7, 6), 3 * 6 * 5 + 5, 0, 7 * (3 * 6 * 5)),
    (layers.Dense(10), (32,), 32 * 10 + 10, 0, 32 * 10),
    (layers.Dense(3), (8, 8, 5), 5 * 3 + 3, 0, 8 * 8 * (5 * 3)),  # at every position
    (SqueezeExcite(4), (7, 7, 16), 16 * 4 + 4 + 4 * 16 + 16, 0, 16 * 4 + 4 * 16),
    (SqueezeExcite(4, "max", bias=False), (7, 7, 16), 16 * 4 + 4 * 16, 0, 16 * 4 + 4 * 16),
    (SqueezeExcite(4, "none"), (7, 7, 16), 16 * 4 + 4 + 4 * 16 + 16, 0, 7 * 7 * (16 * 4 + 4 * 16)),
    (layers.BatchNormalization(), (7, 7, 16), 2 * 16, 2 * 16, 0),
    (layers.BatchNormalization(scale=False), (7, 7, 16), 16, 2 * 16, 0),
    (layers.LayerNormalization(), (7, 16), 2 * 16, 0, 0),
    (layers.ReLU(), (7, 7, 16), 0, 0, 0),
    (layers.GlobalAveragePooling2D(), (7, 7, 16), 0, 0, 0),
    (layers.Dropout(0.2), (16,), 0, 0, 0),  # the state of its random numbers is no parameter
]


@pytest.mark.parametrize("layer, shape, trainable, statistics, macs", BY_HAND, ids=[row[0].name for row in BY_HAND])
def test_layer_costs_what_one_counts_by_hand(layer, shape, trainable, statistics, macs):
    (row,) = complexity(model_of(layer, *shape)).layers
    assert (row.trainable, row.statistics, row.macs) == (trainable, statistics, macs)


@pytest.mark.parametrize("layer, shape, trainable, statistics, macs", BY_HAND, ids=[row[0].name for row in BY_HAND])
def test_row_has_the_layers_name_type_and_output_shape(layer, shape, trainable, statistics, macs):
    model = model_of(layer, *shape)
    (row,) = complexity(model).layers
    assert (row.name, row.type, row.output_shape) == (layer.name, type(layer).__name__, model.output_shape[1:])


@pytest.fixture
def handmade():
    """A little of everything: a nested model, a layer called twice, an operation without a layer."""
    inner_images = keras.Input((8, 8, 6))
    inner = keras.Model(inner_images, layers.Conv2D(6, 1, name="inner_conv")(inner_images), name="inner")
    shared = layers.Conv2D(6, 3, padding="same", name="shared")
    images = keras.Input((8, 8, 6))
    x = layers.BatchNormalization(name="bn")(shared(shared(images)))
    x = SqueezeExcite(3, name="se")(inner(x) + images)
    return keras.Model(images, layers.Dense(10, name="top")(layers.GlobalMaxPooling2D()(x)))


@pytest.fixture
def digits():
    return create("se_resnet11_digits")


def rows(counted, name):
    return [row for row in counted.layers if row.name == name]


def test_totals_of_the_handmade_model(handmade):
    counted = complexity(handmade)
    conv, inner, se, top = 9 * 6 * 6, 6 * 6, 2 * 6 * 2, 6 * 10
    assert counted.trainable == (conv + 6) + 2 * 6 + (inner + 6) + (se + 2 + 6) + (top + 10)
    assert (counted.statistics, counted.se_trainable, counted.se_macs) == (2 * 6, se + 2 + 6, se)
    assert counted.macs == 64 * (2 * conv + inner) + se + top


def test_shared_layer_pays_multiply_adds_at_each_call_and_parameters_once(handmade):
    first, second = rows(complexity(handmade), "shared")
    assert (first.trainable, second.trainable) == (9 * 6 * 6 + 6, 0)
    assert first.macs == second.macs == 64 * 9 * 6 * 6


def test_model_called_twice_pays_multiply_adds_at_each_call_and_parameters_once(handmade):
    images = keras.Input((8, 8, 6))
    inner = handmade.get_layer("inner")
    twice = complexity(keras.Model(images, inner(inner(images))))
    assert (twice.trainable, twice.macs) == (6 * 6 + 6, 2 * 64 * 6 * 6)


def test_nested_model_is_counted_layer_by_layer(handmade):
    counted = complexity(handmade)
    assert [row.macs for row in rows(counted, "inner_conv")] == [64 * 6 * 6]
    assert rows(counted, "inner") == []


def test_sequential_model_counts_as_its_layers():
    model = keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(4, 3), layers.Flatten(), layers.Dense(2)])
    assert complexity(model).macs == 6 * 6 * (9 * 3 * 4) + (6 * 6 * 4) * 2


def test_model_with_two_inputs_is_counted():
    one, two = keras.Input((8, 8, 3)), keras.Input((4,))
    outputs = [layers.Conv2D(4, 1)(one), layers.Dense(5)(two)]
    assert complexity(keras.Model([one, two], outputs)).macs == 64 * 3 * 4 + 4 * 5


@pytest.mark.parametrize("model", ["handmade", "digits"])
@pytest.mark.parametrize("total", ["trainable", "statistics", "macs"])
def test_total_is_the_sum_over_the_layers(model, total, request):
    counted = complexity(request.getfixturevalue(model))
    assert getattr(counted, total) == sum(getattr(row, total) for row in counted.layers)


@pytest.mark.parametrize("total", ["trainable", "macs"])
def test_se_share_is_the_sum_over_the_se_layers(total, digits):
    counted = complexity(digits)
    recalibrating = [row for row in counted.layers if row.name.endswith("_se")]
    assert getattr(counted, f"se_{total}") == sum(getattr(row, total) for row in recalibrating) > 0


def test_parameters_of_the_handmade_model_are_count_params(handmade):
    assert complexity(handmade).parameters == handmade.count_params()


@pytest.mark.parametrize("name", names())
def test_parameters_are_count_params(name, facts):
    assert facts(name).complexity.parameters == facts(name).count_params


@pytest.mark.parametrize("name", names())
def test_every_layer_but_the_input_has_one_row(name, facts):
    called = [layer for layer, (kind, _) in facts(name).layers.items() if kind != "InputLayer"]
    assert sorted(row.name for row in facts(name).complexity.layers) == sorted(called)


@pytest.mark.parametrize("of", [complexity, lambda model: complexity(model).layers[0]])
def test_results_are_frozen(of, digits):
    with pytest.raises(AttributeError, match="macs"):
        of(digits).macs = 0


def test_frozen_layers_count_too(digits):
    counted = complexity(digits)
    digits.trainable = False
    assert complexity(digits) == counted


def test_counting_leaves_the_model_as_it_was(digits):
    config = digits.get_config()
    complexity(digits, input_shape=(16, 16, 1))
    assert (digits.get_config(), digits.input_shape) == (config, (None, 8, 8, 1))


def test_convolutions_of_another_size_pay_by_its_positions(digits):
    small, large = complexity(digits), complexity(digits, input_shape=(32, 16, 1))
    fixed = small.se_macs + rows(small, "predictions")[0].macs  # after a global pooling
    assert large.macs - fixed == 8 * (small.macs - fixed)
    assert (large.trainable, large.se_macs) == (small.trainable, small.se_macs)


def test_model_of_a_free_size_counts_as_one_of_that_size(digits):
    free = create("se_resnet11_digits", input_shape=(None, None, 1))
    assert complexity(free, input_shape=(8, 8, 1)) == complexity(digits)


def test_free_size_is_refused():
    model = create("se_resnet11_digits", include_top=False)
    message = r"^Multiply-adds need a size: give input_shape\. Received: a model of \(None, None, 1\)$"
    with pytest.raises(ValueError, match=message):
        complexity(model)


@pytest.mark.parametrize("shape", [(8, 8), (None, 8, 1), (0, 8, 1), (8,), (8, 8, 1, 1), (8, 8, 3), 8, "8x8"])
def test_shape_that_the_model_does_not_take_is_refused(shape, digits):
    rule = "se_resnet11_digits takes input_shape=(8, 8, 1), of any size. Received: input_shape="
    with pytest.raises(ValueError, match=re.escape(rule + repr(shape))):
        complexity(digits, input_shape=shape)


def test_input_shape_for_two_inputs_is_refused():
    one, two = keras.Input((8, 8, 3)), keras.Input((8, 8, 3))
    message = r"^input_shape is for models with one input\. Received: a model with 2$"
    with pytest.raises(ValueError, match=message):
        complexity(keras.Model([one, two], one + two), input_shape=(8, 8, 3))


class Subclassed(keras.Model):
    def call(self, inputs):
        return inputs


@pytest.mark.parametrize("model", [Subclassed(name="subclassed"), "model", None])
def test_model_without_a_graph_is_refused(model):
    message = "Only functional models, and Sequential ones with an Input, have a graph. Received: "
    with pytest.raises(TypeError, match=message):
        complexity(model)


def test_sequential_model_that_is_not_built_is_refused():
    with pytest.raises(TypeError, match="have a graph. Received: Sequential unbuilt"):
        complexity(keras.Sequential([layers.Dense(3)], name="unbuilt"))
