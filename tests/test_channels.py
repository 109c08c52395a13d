"""A pruned network is the network without some channels: smaller by their cost, equal if they had no effect."""

import keras
import numpy as np
import pytest
from export_fixtures import Subclassed, difference, grouped_network, images_for, outputs_of, scattered
from keras import layers

import se_keras
from se_keras.counting import complexity
from se_keras.export import lower, to_litert
from se_keras.export.pruning import RANKINGS, excitations, prune_channels, responses
from se_keras.layers import SqueezeExcite

# Networks with SE at the 3x3 site: the shape of the image, and the layer of each block that makes the channels, their
# BatchNorm, and the layer that reads them. ResNets and pre-activation ResNets, with bottlenecks and with basic blocks.
NETWORKS = {
    "se_resnet11_digits": ((8, 8, 1), "conv2", "conv2_bn", "conv3"),
    "se_resnet50": ((64, 64, 3), "conv2", "conv2_bn", "conv3"),
    "se_resnet18": ((64, 64, 3), "conv1", "conv1_bn", "conv2"),
    "se_resnet164": ((16, 16, 3), "conv2", "conv3_bn", "conv3"),
    "se_resnet20": ((16, 16, 3), "conv1", "conv2_bn", "conv2"),
}


def network(name, **se):
    """A row of the catalogue with SE at the 3x3 site, without a softmax, which could hide an error."""
    keras.utils.set_random_seed(0)
    config = se_keras.SEConfig(**{"site": "3x3"} | se)
    model = se_keras.create(name, se=config, classes=10, input_shape=NETWORKS[name][0], classifier_activation=None)
    return scattered(model)


def gates(model):
    """Its SqueezeExcite layers."""
    return [layer for layer in model.layers if isinstance(layer, SqueezeExcite)]


def weights(model):
    """`{path: value}`."""
    return {weight.path: keras.ops.convert_to_numpy(weight).copy() for weight in model.weights}


def parameters():
    """The names of the networks; those with many layers in the long tests."""
    long = ("se_resnet164", "se_resnet50")
    return [pytest.param(name, marks=pytest.mark.slow if name in long else ()) for name in NETWORKS]


@pytest.fixture(scope="module", params=parameters())
def row(request):
    """The name of each network, the model, and the model without three channels in eight."""
    model = network(request.param)
    return request.param, model, prune_channels(model, share=3 / 8, ranking="magnitude")


@pytest.fixture(scope="module")
def digits():
    return network("se_resnet11_digits")


@pytest.fixture(scope="module")
def pruned_digits(digits):
    return prune_channels(digits, share=0.5, ranking="magnitude")


# The smaller network.


@pytest.mark.slow
def test_layers_keep_their_types_and_names(row):
    _, model, pruned = row
    assert [(layer.name, type(layer)) for layer in pruned.layers] == [
        (layer.name, type(layer)) for layer in model.layers
    ]
    assert pruned.name == model.name


def test_every_layer_at_the_3x3_site_loses_its_share(row):
    _, model, pruned = row
    assert pruned.pruning.skipped == {}
    assert list(pruned.pruning.kept) == [gate.name for gate in gates(model)]
    for gate in gates(model):
        channels = gate.input.shape[-1]
        assert pruned.pruning.channels[gate.name] == channels
        assert len(pruned.pruning.kept[gate.name]) == channels - round(channels * 3 / 8)


def test_kept_weights_are_slices_and_all_others_as_they_were(row):
    name, model, pruned = row
    _, makes, norm, reads = NETWORKS[name]
    expected = weights(model)
    for gate, kept in pruned.pruning.kept.items():
        block = gate.removesuffix("_se")
        axes = {f"{block}_{makes}/kernel": -1, f"{block}_{reads}/kernel": -2}
        axes |= {f"{block}_{norm}/{w}": 0 for w in ("gamma", "beta", "moving_mean", "moving_variance")}
        axes |= {f"{gate}/reduce_kernel": 0, f"{gate}/expand_kernel": 1, f"{gate}/expand_bias": 0}
        for path, axis in axes.items():
            expected[path] = np.take(expected[path], kept, axis=axis)
    found = weights(pruned)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


def test_multiply_adds_fall_by_those_of_the_channels_that_went(row):
    name, model, pruned = row
    _, makes, _, reads = NETWORKS[name]
    saved = 0
    for gate, kept in pruned.pruning.kept.items():
        gone = pruned.pruning.channels[gate] - len(kept)
        maker, reader = (model.get_layer(f"{gate.removesuffix('se')}{layer}") for layer in (makes, reads))
        for layer, other in ((maker, maker.kernel.shape[2]), (reader, reader.kernel.shape[3])):
            positions = layer.output.shape[1] * layer.output.shape[2]
            saved += gone * positions * int(np.prod(layer.kernel.shape[:2])) * other
        saved += gone * 2 * model.get_layer(gate).reduce_kernel.shape[1]
    assert saved > 0.2 * complexity(model).macs
    assert complexity(pruned).macs == complexity(model).macs - saved


def switch_off(gate, channels):
    """Makes channels of a gate have no effect, in place: no gate reads them, and their own gates are closed."""
    reduce, expand, bias = (
        keras.ops.convert_to_numpy(w).copy() for w in (gate.reduce_kernel, gate.expand_kernel, gate.expand_bias)
    )
    reduce[channels], expand[:, channels], bias[channels] = 0, 0, -1000  # sigmoid(-1000) is 0 in float32
    for weight, value in ((gate.reduce_kernel, reduce), (gate.expand_kernel, expand), (gate.expand_bias, bias)):
        weight.assign(value)


def test_network_without_channels_that_do_nothing_is_what_it_was(row):
    _, model, pruned = row
    before = model.get_weights()
    for name, kept in pruned.pruning.kept.items():
        switch_off(model.get_layer(name), np.setdiff1d(range(pruned.pruning.channels[name]), kept))
    images = images_for(model)
    expected = outputs_of(model, images)
    model.set_weights(before)
    # Sums of fewer float32 terms, the others being zero, in another order.
    assert difference(expected, outputs_of(pruned, images)) < 1e-5
    assert difference(outputs_of(model, images), outputs_of(pruned, images)) > 1e-3  # they had an effect


def assert_closed_gates_go(model, **images):
    """The channels with closed gates are removed, and without them the model computes the same."""
    opened = {}
    for gate in gates(model):
        gate.expand_kernel.assign(0.1 * gate.expand_kernel)  # far from closed, whatever the images
        channels = gate.expand_bias.shape[0]
        opened[gate.name] = np.arange(1, channels, 2)
        switch_off(gate, np.arange(0, channels, 2))
    images = images_for(model, samples=4, **images)
    pruned = prune_channels(model, share=0.5, images=images)
    assert pruned.pruning.skipped == {} and pruned.pruning.kept.keys() == opened.keys()
    for name, kept in pruned.pruning.kept.items():
        np.testing.assert_array_equal(kept, opened[name])
    assert difference(outputs_of(model, images), outputs_of(pruned, images)) < 1e-5  # as above


@pytest.mark.slow
@pytest.mark.parametrize("name", ["se_resnet11_digits", "se_resnet20"])
def test_channels_behind_closed_gates_go(name):
    assert_closed_gates_go(network(name))


# Graphs other than the catalogue's.


def block(x, *, name, channels=8, **convolution):
    x = layers.Conv2D(channels, 3, padding="same", name=f"{name}_conv", **convolution)(x)
    return SqueezeExcite(4, name=f"{name}_se")(layers.ReLU()(layers.BatchNormalization(name=f"{name}_bn")(x)))


def chain(x):
    """The second convolution reads the channels of one gate and makes those of the next, which a Dense layer reads."""
    x = layers.MaxPooling2D()(layers.Dropout(0.5)(block(x, name="first")))
    x = layers.GlobalAveragePooling2D()(block(x, name="second"))
    return layers.Dense(3)(x)


def two_readers(x):
    x = block(x, name="first")
    return layers.Add()([layers.Conv2D(4, 1)(x), layers.Conv2D(4, 3, padding="same")(layers.ZeroPadding2D(0)(x))])


def with_bias_and_activation(x):
    x = layers.Conv2D(8, 3, activation="relu", bias_initializer="ones")(x)
    return layers.Conv2D(3, 1)(layers.Activation("silu")(SqueezeExcite(2, bias=True)(x)))


def with_operations(x):
    x = layers.Normalization(mean=[0.1, 0.2], variance=[2.0, 3.0])(x) * 2 + 1
    return keras.ops.mean(layers.Conv2D(3, 1)(block(x, name="first")), axis=(1, 2))


def with_a_model_inside(x):
    images = keras.Input((8, 8, 3))
    inner = keras.Model(images, layers.Conv2D(4, 1)(block(images, name="inner", channels=4)), name="inner")
    return inner(layers.Conv2D(3, 1)(block(x, name="outer")))


def of(function, shape=(8, 8, 2)):
    """The model of a function of images."""
    images = keras.Input(shape, name="images")
    return keras.Model(images, function(images), name="own")


@pytest.mark.parametrize("function", [chain, two_readers, with_bias_and_activation, with_operations])
def test_channels_behind_closed_gates_go_from_a_graph_of_ones_own(function):
    assert_closed_gates_go(scattered(of(function)))


def test_sequential_model_of_free_size_is_pruned():
    parts = [layers.Conv2D(8, 3), layers.BatchNormalization(), SqueezeExcite(2), layers.Conv2D(2, 1)]
    assert_closed_gates_go(scattered(keras.Sequential([keras.Input((None, None, 2)), *parts])), size=9)


def test_gates_inside_another_model_stay_and_say_so():
    model = scattered(of(with_a_model_inside))
    pruned = prune_channels(model, share=0.5, ranking="magnitude")
    assert pruned.pruning.skipped == {"inner_se": "it is inside inner: prune that model"}
    for before, after in zip(
        model.get_layer("inner").get_weights(), pruned.get_layer("inner").get_weights(), strict=True
    ):
        np.testing.assert_array_equal(before, after)
    assert pruned.get_layer("outer_conv").filters == 4


def test_frozen_layers_stay_frozen():
    model = of(chain)
    model.get_layer("first_bn").trainable = False
    pruned = prune_channels(model, share=0.5, ranking="magnitude")
    assert [layer.name for layer in pruned.layers if not layer.trainable] == ["first_bn"]


def test_mixed_precision_is_kept(mixed_float16):
    model = of(chain)
    pruned = prune_channels(model, share=0.5, images=images_for(model))
    assert pruned.get_layer("first_conv").compute_dtype == "float16"
    assert {weight.dtype for weight in pruned.weights} == {"float32"}


# What can be done with a pruned model.


def test_model_stays_as_it_was(digits):
    images = images_for(digits)
    before, nodes, expected = weights(digits), len(gates(digits)[0]._inbound_nodes), outputs_of(digits, images)
    prune_channels(digits, share=0.5, images=images)
    for path, value in weights(digits).items():
        np.testing.assert_array_equal(value, before[path])
    assert len(gates(digits)[0]._inbound_nodes) == nodes
    np.testing.assert_array_equal(outputs_of(digits, images)[0], expected[0])


def test_pruned_model_is_saved_and_loaded(pruned_digits, tmp_path):
    pruned_digits.save(tmp_path / "pruned.keras")
    loaded = keras.saving.load_model(tmp_path / "pruned.keras")
    images = images_for(pruned_digits)
    # The same graph and weights, but a convolution may split its sum over threads differently.
    assert difference(outputs_of(pruned_digits, images), outputs_of(loaded, images)) < 1e-6
    # Four channels are left of sixteen after the second time, less than the ratio of 16 would take.
    again = prune_channels(loaded, share=0.5, ranking="magnitude")
    assert [layer.filters for layer in again.layers if layer.name.endswith("_conv2")] == [4, 8, 16]
    assert [gate.reduce_kernel.shape[1] for gate in gates(again)] == [1, 2, 4]


@pytest.mark.slow
def test_pruned_model_is_lowered_and_exported(pruned_digits):
    images = images_for(pruned_digits, samples=8)
    # The bound of tests/test_lower.py: folding in float64 rounds once.
    assert difference(outputs_of(pruned_digits, images), outputs_of(lower(pruned_digits), images)) < 1e-5
    assert to_litert(pruned_digits, held_out=images).manifest["agreement"]["max_error"] < 1e-4


@pytest.mark.slow
def test_pruned_model_learns():
    model = prune_channels(of(lambda x: layers.Softmax()(chain(x))), share=0.5, ranking="magnitude")
    model.compile(keras.optimizers.Adam(0.03), "sparse_categorical_crossentropy", jit_compile=False)
    images = images_for(model, samples=64)
    bright = images.mean(axis=(1, 2, 3)) > 0
    before = model.evaluate(images, bright, verbose=0)
    model.fit(images, bright, epochs=20, verbose=0)
    # Guessing between the two classes gives 0.69.
    assert model.evaluate(images, bright, verbose=0) < min(before, 0.6)


def test_pruning_reads_as_what_was_done(pruned_digits):
    assert str(pruned_digits.pruning) == "56 of 112 channels kept in 3 SqueezeExcite layers"
    pruned = prune_channels(of(with_a_model_inside), share=0.5, ranking="magnitude")
    assert str(pruned.pruning) == "4 of 8 channels kept in 1 SqueezeExcite layer, 1 skipped"


# Rankings.


@pytest.mark.parametrize("squeeze", ["avg", "none"])
@pytest.mark.parametrize("excitation", ["sigmoid", "tanh"])
def test_excitations_are_the_mean_gates(squeeze, excitation):
    model = scattered(of(lambda x: SqueezeExcite(2, squeeze, excitation, name="gate")(x), shape=(4, 4, 6)))
    images = images_for(model, samples=70)  # more than two batches
    layer = model.get_layer("gate")
    w1, w2, b1, b2 = (w.astype("float64") for w in layer.get_weights())
    z = images.mean(axis=(1, 2), keepdims=True) if squeeze == "avg" else images
    gate = np.maximum(z @ w1 + b1, 0) @ w2 + b2
    gate = np.abs(np.tanh(gate)) if excitation == "tanh" else 1 / (1 + np.exp(-gate))
    # Sums of six float32 terms of order one.
    np.testing.assert_allclose(excitations(model, images)["gate"], gate.mean(axis=(0, 1, 2)), rtol=1e-5)
    recalibrated = np.abs(outputs_of(model, images)[0])
    np.testing.assert_allclose(responses(model, images)["gate"], recalibrated.mean(axis=(0, 1, 2)), rtol=1e-5)


def test_excitations_are_told_of_every_site_and_of_batches_of_images(digits):
    model = network("se_resnet11_digits", site="standard")
    images = images_for(model, samples=6)
    found = excitations(model, images)
    assert {name: value.shape for name, value in found.items()} == {
        "stage2_block1_se": (64,),
        "stage3_block1_se": (128,),
        "stage4_block1_se": (256,),
    }
    batches = excitations(model, ((batch, "labels") for batch in np.split(images, 3)))
    for name, value in found.items():
        np.testing.assert_array_equal(batches[name], value)


@pytest.mark.parametrize("ranking", [*RANKINGS])
def test_lowest_channels_go(ranking):
    model = of(chain)
    images = images_for(model)
    gate, conv, norm = (model.get_layer(f"first_{layer}") for layer in ("se", "conv", "bn"))
    low = np.array([0, 3, 5])
    change = {
        "excitation": (gate.expand_bias, -5.0),
        "response": (norm.gamma, 1e-3),  # the gates stay about as high as those of other channels
        "magnitude": (conv.kernel, 1e-3),
    }
    if ranking in change:
        weight, value = change[ranking]
        values = keras.ops.convert_to_numpy(weight).copy()
        values[..., low] = values[..., low] * value if ranking == "magnitude" else value
        weight.assign(values)
    pruned = prune_channels(model, share=3 / 8, ranking=ranking, images=images)
    kept = pruned.pruning.kept["first_se"]
    assert len(kept) == 5
    if ranking in change:
        assert not set(low) & set(kept)


def test_every_ranking_leaves_the_same_multiply_adds(digits):
    images = images_for(digits)
    pruned = [prune_channels(digits, share=0.3, ranking=ranking, images=images) for ranking in RANKINGS]
    assert len({complexity(model).macs for model in pruned}) == 1
    assert len({str(model.pruning.kept) for model in pruned}) == len(RANKINGS)  # and not the same network


def test_random_ranking_is_that_of_its_seed(digits):
    first, second, other = (
        prune_channels(digits, share=0.5, ranking="random", seed=seed).pruning.kept["stage4_block1_se"]
        for seed in (1, 1, 2)
    )
    assert np.array_equal(first, second) and not np.array_equal(first, other)


@pytest.mark.parametrize("share, left", [(0.01, 8), (0.3, 6), (0.999, 1)])
def test_share_is_rounded_to_whole_channels_of_which_one_stays(share, left):
    model = of(lambda x: layers.Conv2D(3, 1)(block(x, name="only")))
    assert prune_channels(model, share=share, ranking="magnitude").get_layer("only_conv").filters == left


# Bad arguments.


@pytest.mark.parametrize("share", [0, 1, -0.5, 50, float("nan"), True, "half", None])
def test_share_that_is_none_is_refused(digits, share):
    with pytest.raises(ValueError, match=rf"^share must be above 0 and below 1\. Received: share={share!r}$"):
        prune_channels(digits, share=share, ranking="magnitude")


def test_unknown_ranking_is_refused(digits):
    message = r"^ranking must be one of \('excitation', 'response', 'magnitude', 'random'\)\. Received: ranking='gate'$"
    with pytest.raises(ValueError, match=message):
        prune_channels(digits, share=0.5, ranking="gate")


@pytest.mark.parametrize("ranking", ["excitation", "response"])
def test_ranking_on_images_needs_them(digits, ranking):
    with pytest.raises(ValueError, match=f"^ranking='{ranking}' needs images: give images=.* Received: None$"):
        prune_channels(digits, share=0.5, ranking=ranking)


@pytest.mark.parametrize(
    "images, error, message",
    [
        (np.zeros((2, 4, 4, 1)), ValueError, r"images must be \(8, 8, 1\)\. Received: \(2, 4, 4, 1\)"),
        (np.full((2, 8, 8, 1), np.nan), ValueError, "images must be finite. Received: NaN or infinity in 2 of 2"),
        (np.zeros((0, 8, 8, 1)), ValueError, "at least one image"),
        (["digits"], TypeError, "must be arrays of numbers. Received: str"),
    ],
)
def test_images_that_are_none_are_refused(digits, images, error, message):
    with pytest.raises(error, match=message):
        prune_channels(digits, share=0.5, images=images)


def shared(x):
    conv = layers.Conv2D(2, 1, name="twice")
    return conv(SqueezeExcite(1, name="only_se")(conv(x)))


REASONS = {
    "its channels are the model's input": lambda x: layers.Conv2D(3, 1)(SqueezeExcite(1, name="only_se")(x)),
    r"only_conv has 2 groups": lambda x: layers.Conv2D(3, 1)(block(x, name="only", groups=2)),
    r"reader has 4 groups": lambda x: layers.Conv2D(4, 1, groups=4, name="reader")(block(x, name="only")),
    r"sum \(Add\) reads its channels": lambda x: layers.Add(name="sum")([block(x, name="only")] * 2),
    r"flat \(Flatten\) reads its channels": lambda x: layers.Flatten(name="flat")(block(x, name="only")),
    r"deep \(DepthwiseConv2D\) reads its": lambda x: layers.DepthwiseConv2D(3, name="deep")(block(x, name="only")),
    r"softmax \(Activation\) reads its": lambda x: layers.Activation("softmax", name="softmax")(block(x, name="only")),
    r"deep \(DepthwiseConv2D\) makes its": lambda x: layers.Conv2D(3, 1)(
        SqueezeExcite(1, name="only_se")(layers.DepthwiseConv2D(3, name="deep")(x))
    ),
    r"conv ends in an activation that mixes": lambda x: layers.Conv2D(3, 1)(
        SqueezeExcite(1, name="only_se")(layers.Conv2D(8, 1, activation="softmax", name="conv")(x))
    ),
    r"its channels are an output of the model": lambda x: block(x, name="only"),
    r"twice is called 2 times": shared,
}


@pytest.mark.parametrize("reason", REASONS)
def test_layer_whose_channels_have_to_stay_is_refused_by_name_and_reason(reason):
    message = (
        rf"^Channels can be removed if .* as with se=SEConfig\(site='3x3'\) .* Received: own \(only_se: {reason}.*\)$"
    )
    with pytest.raises(ValueError, match=message):
        prune_channels(of(REASONS[reason]), share=0.5, ranking="magnitude")


def test_batchnorm_over_another_axis_is_in_the_way():
    model = of(
        lambda x: layers.Conv2D(3, 1)(layers.BatchNormalization(axis=1, name="rows")(block(x, name="only"))),
    )
    with pytest.raises(ValueError, match=r"only_se: rows \(BatchNormalization\) reads its channels"):
        prune_channels(model, share=0.5, ranking="magnitude")


def test_reader_that_the_gate_does_not_stand_before_is_in_the_way():
    def squeezed_and_skipped(x):
        y = layers.ReLU()(layers.Conv2D(8, 1)(x))
        branches = [layers.Conv2D(2, 1)(SqueezeExcite(2, name="only_se")(y)), layers.Conv2D(2, 1, name="skip")(y)]
        return layers.Add()(branches)

    with pytest.raises(ValueError, match=r"only_se: skip \(Conv2D\) reads its channels without the gate\)"):
        prune_channels(of(squeezed_and_skipped), share=0.5, ranking="magnitude")


@pytest.mark.parametrize("site", ["standard", "pre", "post", "identity"])
def test_network_with_se_at_another_site_is_told_the_right_one(site):
    with pytest.raises(
        ValueError, match=r"se=SEConfig\(site='3x3'\) in a ResNet\. Received: se_resnet11_digits \(stage2"
    ):
        prune_channels(network("se_resnet11_digits", site=site), share=0.5, ranking="magnitude")


def test_resnext_is_refused_for_its_groups():
    model = grouped_network(site="3x3")
    with pytest.raises(ValueError, match=r"\(stage2_block1_se: stage2_block1_conv2 has 8 groups\)$"):
        prune_channels(model, share=0.5, ranking="magnitude")


@pytest.mark.parametrize("function", [lambda model: model, lower], ids=["baseline", "lowered"])
def test_model_without_se_is_refused(function):
    model = function(se_keras.create("resnet11_digits", classes=10))
    with pytest.raises(ValueError, match=r"Received: resnet11_digits \(no SqueezeExcite layer\)$"):
        prune_channels(model, share=0.5, ranking="magnitude")
    with pytest.raises(ValueError, match="^The model has no SqueezeExcite layers. Received: resnet11_digits$"):
        excitations(model, images_for(model))


def test_subclassed_model_is_refused():
    with pytest.raises(TypeError, match="^Only functional models, .* Received: Subclassed own"):
        prune_channels(Subclassed(name="own"), share=0.5, ranking="magnitude")


def test_images_of_a_model_with_two_inputs_are_refused():
    images = [keras.Input((8, 8, 2)), keras.Input((8, 8, 2))]
    model = keras.Model(images, layers.Conv2D(2, 1)(block(layers.Add()(images), name="only")), name="two")
    with pytest.raises(ValueError, match="^Images are for models with one input. Received: two with 2$"):
        prune_channels(model, share=0.5, images=np.zeros((2, 8, 8, 2)))
    assert len(prune_channels(model, share=0.5, ranking="magnitude").inputs) == 2


def test_values_that_are_not_finite_are_refused():
    model = of(chain)
    model.get_layer("first_conv").kernel.assign(np.full((3, 3, 2, 8), np.nan))
    with pytest.raises(ValueError, match="^first_se: channels cannot be ranked by values that are not finite"):
        prune_channels(model, share=0.5, ranking="magnitude")
