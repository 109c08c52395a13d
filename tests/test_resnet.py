"""ResNet, ResNeXt and SENet-154: the ablations of the paper, the sites of recalibration, strides and constants."""

import functools
from dataclasses import replace

import keras
import numpy as np
import pytest

from se_keras.architectures import resnet
from se_keras.blocks import conv_bn
from se_keras.catalogue import create, spec_of
from se_keras.graph import calls
from se_keras.layers import SqueezeExcite
from se_keras.recalibration import SITES, SEConfig

WITH_SE = (*(name for name in resnet.SPECS if name.startswith("se_")), "senet154")
IMAGENET = tuple(name for name, spec in resnet.SPECS.items() if spec.input_shape == (224, 224, 3))
BOTTLENECKS = tuple(name for name, spec in resnet.SPECS.items() if spec.block is resnet.bottleneck)
NO_BIAS = SEConfig(bias=False)  # the paper's tables count the fully connected layers without their biases


def blocks_of(name):
    """The names of a network's blocks: stage2_block1, ..."""
    spec = spec_of(name)
    return [
        f"stage{stage}_block{block}"
        for stage, count in zip(spec.stages, spec.blocks, strict=True)
        for block in range(1, count + 1)
    ]


def millions(count):
    return round(count / 1e6, 1)


@pytest.mark.parametrize("ratio", [4, 16, 32])
def test_count_params_by_ratio(ratio, facts, golden):
    counted = facts("se_resnet50", se=replace(NO_BIAS, ratio=ratio)).count_params
    assert counted == golden["derived"]["se_resnet50_no_bias_count_params_by_ratio"][str(ratio)]


# The paper's tables. Their parameters are rounded to 0.1 M, their GFLOPs to 0.01.


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [2, 4, 8, 16, 32])
def test_table_10_parameters_by_ratio(ratio, facts, golden):
    published = golden["paper"]["table10_ratio"][str(ratio)][2]
    counted = facts("se_resnet50", se=replace(NO_BIAS, ratio=ratio)).count_params / 1e6
    # The tolerance is half of the smallest difference between two rows of the table.
    assert counted == pytest.approx(published, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("row", [2, 3, 4])
def test_table_13_row_is_our_stage_of_the_same_number_alone(row, facts, golden):
    published = golden["paper"]["table13_stage"][f"stage{row}"][3]
    stages = (2, 3, 4, 5)
    counts = [millions(facts("se_resnet50", se=replace(NO_BIAS, stages=(stage,))).count_params) for stage in stages]
    # Rounded like the table: its rows for stages 2 and 3 differ by only 0.1 M.
    assert [stage for stage, count in zip(stages, counts, strict=True) if count == published] == [row]


@pytest.mark.parametrize("row", [2, 3, 4])
def test_table_13_multiply_adds_by_stage(row, facts, golden):
    published = golden["paper"]["table13_stage"][f"stage{row}"][2]
    assert facts("se_resnet50", se=replace(NO_BIAS, stages=(row,))).complexity.macs / 1e9 == pytest.approx(
        published, abs=0.01
    )


def test_table_13_without_and_with_every_stage(facts, golden):
    table = golden["paper"]["table13_stage"]
    counted = [millions(facts("se_resnet50", se=se).count_params) for se in (None, NO_BIAS)]
    assert counted == [table["resnet50"][3], table["all"][3]]


def test_table_15_parameters_at_the_3x3_site(facts, golden):
    counted = millions(facts("se_resnet50", se=replace(NO_BIAS, site="3x3")).count_params)
    assert counted == golden["paper"]["table15_3x3"]["3x3"][3]


def test_table_16_no_squeeze_pays_at_every_position(facts, golden):
    published = golden["paper"]["table16_squeeze_effect"]["no_squeeze"][2]
    counted = facts("se_resnet50", se=replace(NO_BIAS, squeeze="none")).complexity.macs / 1e9
    assert counted == pytest.approx(published, abs=0.02)  # the SE layers have 0.41: 0.02 distinguishes the sites


# The baseline inside the SE network.


def open_gates(model):
    """Makes every gate of `model` one: the sigmoid of 40 rounds to exactly 1.0 in float32."""
    for layer in model.layers:
        if isinstance(layer, SqueezeExcite):
            layer.expand_kernel.assign(np.zeros(layer.expand_kernel.shape))
            layer.expand_bias.assign(np.full(layer.expand_bias.shape, 40))
    return model


def with_weights_of(model, baseline):
    """Gives `baseline` the weights of `model`, layer by layer name."""
    for layer in baseline.layers:
        layer.set_weights(model.get_layer(layer.name).get_weights())
    return baseline


def network(block, se):
    """The network for digits with two blocks of one kind a stage, so that it has every kind of shortcut."""
    spec = replace(resnet.SPECS["resnet11_digits"], block=block, blocks=(2, 2), se=se)
    images = keras.Input(spec.input_shape, name="images")
    return keras.Model(images, resnet.build(spec, images))


def noise(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


on_each_kind = pytest.mark.parametrize("block", [resnet.bottleneck, resnet.basic])


@pytest.mark.slow
@pytest.mark.parametrize("site", SITES)
@on_each_kind
def test_gates_forced_to_one_equal_the_baseline(block, site):
    model = open_gates(network(block, SEConfig(site=site)))
    baseline = with_weights_of(model, network(block, None))
    images = noise(2, 8, 8, 1)
    # Exactly: a product with 1.0 rounds nothing, and everything else is the same operation on the same numbers.
    np.testing.assert_array_equal(model(images).numpy(), baseline(images).numpy())


@pytest.mark.slow
@pytest.mark.parametrize("site", SITES)
def test_gates_as_initialized_do_not_equal_the_baseline(site):
    model = network(resnet.bottleneck, SEConfig(site=site))
    baseline = with_weights_of(model, network(resnet.bottleneck, None))
    images = noise(2, 8, 8, 1)
    # Initial gates are about one half: they change their inputs by tens of percent.
    assert np.abs(model(images) - baseline(images)).max() > 0.05 * np.abs(baseline(images)).max()


@pytest.mark.slow
@pytest.mark.parametrize("site", SITES)
def test_gates_forced_to_one_give_the_baselines_probabilities(site):
    model = open_gates(create("se_resnet11_digits", se=SEConfig(site=site)))
    baseline = with_weights_of(model, create("resnet11_digits"))
    images = noise(2, 8, 8, 1)
    np.testing.assert_array_equal(model(images).numpy(), baseline(images).numpy())


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_SE)
def test_every_block_has_one_se_layer_named_after_it(name, facts):
    layers = [layer for layer, (kind, _) in facts(name).layers.items() if kind == "SqueezeExcite"]
    assert sorted(layers) == sorted(f"{block}_se" for block in blocks_of(name))


def test_last_block_of_stage_4_is_the_papers_se_4_6(facts):
    assert facts("se_resnet50").layers["stage4_block6_se"][0] == "SqueezeExcite"


@pytest.mark.parametrize("name, count", [("se_resnet50", 16), ("se_resnet101", 33), ("senet154", 50)])
def test_number_of_se_layers_is_the_number_of_residual_blocks(name, count, facts):
    assert sum(row.type == "SqueezeExcite" for row in facts(name).complexity.layers) == count


# The five sites of Figure 5. Of the four blocks, stage2_block1 projects its shortcut if it is a bottleneck,
# which widens there; stage3_block1 projects with a stride; the second blocks have the identity.


class Graph:
    """The graph of a model: which layers read the outputs of which."""

    def __init__(self, model):
        self.calls = calls(model)
        self.made_by = {id(tensor): call.operation.name for call in self.calls for tensor in call.output_tensors}

    def inputs(self, name):
        """The names of the layers whose outputs the layer `name` reads."""
        call = next(call for call in self.calls if call.operation.name == name)
        return {self.made_by[id(tensor)] for tensor in call.input_tensors}

    def readers(self, name):
        """The names of the layers that read the output of the layer `name`."""
        made_by = self.made_by.get
        return {call.operation.name for call in self.calls if name in map(made_by, map(id, call.input_tensors))}

    def has(self, name):
        return any(call.operation.name == name for call in self.calls)

    def first(self, block):
        """The first layer of the residual branch; a strided 3x3 has its padding before it."""
        return f"{block}_conv1_pad" if self.has(f"{block}_conv1_pad") else f"{block}_conv1"

    def shortcut(self, block):
        """The first layer of the shortcut: a projection, or the sum itself."""
        return f"{block}_shortcut" if self.has(f"{block}_shortcut") else f"{block}_add"


@functools.cache
def graph_of(block, site):
    return Graph(network(block, site and SEConfig(site=site)))


# Block, and the layer whose output it reads in a network without `post`.
BLOCKS = (
    ("stage2_block1", "conv1_relu"),
    ("stage2_block2", "stage2_block1_relu"),
    ("stage3_block1", "stage2_block2_relu"),
    ("stage3_block2", "stage3_block1_relu"),
)
on_each_block = pytest.mark.parametrize("name, before", BLOCKS)


def last_conv(block):
    return "conv3" if block is resnet.bottleneck else "conv2"


@on_each_kind
@on_each_block
def test_baseline_block_reads_its_input_on_both_paths(block, name, before):
    graph = graph_of(block, None)
    assert graph.readers(before) == {graph.first(name), graph.shortcut(name)}


@on_each_kind
@on_each_block
def test_standard_is_the_residual_branchs_end_before_the_sum(block, name, before):
    graph = graph_of(block, "standard")
    assert graph.inputs(f"{name}_se") == {f"{name}_{last_conv(block)}_bn"}
    assert graph.readers(f"{name}_se") == {f"{name}_add"}
    assert graph.readers(before) == {graph.first(name), graph.shortcut(name)}


@on_each_kind
@on_each_block
def test_pre_is_the_residual_branchs_begin_and_not_on_the_shortcut(block, name, before):
    graph = graph_of(block, "pre")
    assert graph.inputs(f"{name}_se") == {before}
    assert graph.readers(f"{name}_se") == {graph.first(name)}
    assert graph.readers(before) == {f"{name}_se", graph.shortcut(name)}


@on_each_kind
@on_each_block
def test_3x3_is_behind_the_relu_of_the_inner_3x3(block, name, before):
    graph = graph_of(block, "3x3")
    inner, following = ("conv2", "conv3") if block is resnet.bottleneck else ("conv1", "conv2")
    assert graph.inputs(f"{name}_se") == {f"{name}_{inner}_relu"}
    assert graph.readers(f"{name}_se") == {f"{name}_{following}"}
    assert graph.readers(before) == {graph.first(name), graph.shortcut(name)}


@on_each_kind
@on_each_block
def test_identity_is_on_the_shortcut_alone(block, name, before):
    graph = graph_of(block, "identity")
    projected = graph.has(f"{name}_shortcut")
    assert graph.inputs(f"{name}_se") == {f"{name}_shortcut_bn" if projected else before}
    assert graph.readers(f"{name}_se") == {f"{name}_add"}
    assert graph.readers(before) == {graph.first(name), f"{name}_shortcut" if projected else f"{name}_se"}


@on_each_kind
@on_each_block
def test_post_is_behind_the_relu_on_all_that_follows(block, name, before):
    graph = graph_of(block, "post")
    assert graph.inputs(f"{name}_se") == {f"{name}_relu"}
    assert graph.readers(f"{name}_relu") == {f"{name}_se"}
    assert graph.readers(before.replace("block1_relu", "block1_se").replace("block2_relu", "block2_se")) == {
        graph.first(name),
        graph.shortcut(name),
    }


# Shapes, strides and constants.


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGENET)
def test_features_of_a_224_image_are_7x7(name, facts):
    pooled = [row.name for row in facts(name).complexity.layers].index("avg_pool")
    assert facts(name).complexity.layers[pooled - 1].output_shape[:2] == (7, 7)


@pytest.fixture(scope="module")
def headless():
    with keras.StatelessScope(initialize_variables=False):  # only shapes are read
        models = {name: create(name, include_top=False) for name in ("resnet18", "resnet50", "resnet50b")}
    keras.utils.clear_session()
    return models


# The stem's 7x7 gives ceil(size / 2); Caffe's pooling ceil((n - 3) / 2) + 1, torch's floor((n - 1) / 2) + 1: one more
# where n is odd. Three strided stages then halve, rounding up.
@pytest.mark.parametrize(
    "name, size, features",
    [
        ("resnet18", 224, 7),
        ("resnet50", 224, 7),
        ("resnet50b", 224, 7),
        ("resnet18", 193, 6),
        ("resnet50", 193, 6),
        ("resnet50b", 193, 7),
        ("resnet50", 225, 7),
        ("resnet50b", 225, 8),
        ("resnet50", 32, 1),
        ("resnet50b", 32, 1),
    ],
)
def test_size_of_the_features(name, size, features, headless):
    assert headless[name].compute_output_shape((None, size, size, 3))[1:3] == (features, features)


@pytest.mark.parametrize("name", tuple(resnet.SPECS))
def test_strided_convolutions_are_padded_alike_on_all_sides(name, facts):
    layers = facts(name).layers
    strided = {
        layer: config["kernel_size"][0] // 2
        for layer, (kind, config) in layers.items()
        if kind == "Conv2D" and config["strides"] == (2, 2) and config["kernel_size"] != (1, 1)
    }
    paddings = {layer: layers[f"{layer}_pad"][1]["padding"] for layer in strided}
    assert paddings == {layer: ((half, half), (half, half)) for layer, half in strided.items()}


@pytest.mark.parametrize("name", [name for name in BOTTLENECKS if "digits" not in name])
@pytest.mark.parametrize("stage", [2, 3, 4, 5])
def test_stride_is_on_the_convolution_of_the_source(name, stage, facts):
    layers = facts(name).layers
    strides = tuple(layers[f"stage{stage}_block1_{conv}"][1]["strides"] for conv in ("conv1", "conv2", "conv3"))
    on_3x3 = name.endswith("b") or "resnext" in name or name == "senet154"  # Caffe's ResNets have it on the first 1x1
    once, twice = (1, 1), (2, 2)
    assert strides == ((once,) * 3 if stage == 2 else (once, twice, once) if on_3x3 else (twice, once, once))


@pytest.mark.parametrize("name", IMAGENET)
def test_only_first_blocks_from_stage_3_on_have_strides(name, facts):
    strided = {
        layer.rsplit("_", 1)[0]
        for layer, (kind, config) in facts(name).layers.items()
        if kind == "Conv2D" and config["strides"] != (1, 1) and layer.startswith("stage")
    }
    assert strided == {"stage3_block1", "stage4_block1", "stage5_block1"}


@pytest.mark.parametrize("name, groups", [("resnet50", 1), ("resnext50_32x4d", 32), ("senet154", 64)])
def test_cardinality_is_the_groups_of_every_3x3(name, groups, facts):
    layers = facts(name).layers
    assert {layers[f"{block}_conv2"][1]["groups"] for block in blocks_of(name)} == {groups}


@pytest.mark.parametrize(
    "name, channels",
    [
        ("resnet50", (64, 64, 256)),
        ("resnext50_32x4d", (128, 128, 256)),
        ("senet154", (128, 256, 256)),  # "the number of the first 1x1 convolutional channels was halved", appendix
    ],
)
def test_channels_of_a_bottleneck_in_stage_2(name, channels, facts):
    layers = facts(name).layers
    convolutions = ("conv1", "conv2", "conv3")
    assert tuple(layers[f"stage2_block1_{conv}"][1]["filters"] for conv in convolutions) == channels


@pytest.mark.parametrize("name, kernel", [("se_resnet50", (1, 1)), ("senet154", (3, 3))])
def test_kernel_of_the_strided_shortcuts(name, kernel, facts):
    layers = facts(name).layers
    assert {layers[f"stage{stage}_block1_shortcut"][1]["kernel_size"] for stage in (3, 4, 5)} == {kernel}


@pytest.mark.parametrize("name", WITH_SE)
def test_batch_norm_has_the_constants_of_the_released_networks(name, facts):
    constants = {
        (config["momentum"], config["epsilon"])
        for kind, config in facts(name).layers.values()
        if kind == "BatchNormalization"
    }
    assert constants == {(0.9, 1e-5)}


@pytest.mark.parametrize("name", WITH_SE)
def test_convolutions_have_no_bias(name, facts):
    assert {config["use_bias"] for kind, config in facts(name).layers.values() if kind == "Conv2D"} == {False}


@pytest.mark.parametrize("name, rate", [("senet154", 0.2), ("se_resnet50", None)])
def test_dropout_before_the_classifier(name, rate, facts):
    assert facts(name).layers.get("dropout", (None, {"rate": None}))[1]["rate"] == rate


@pytest.mark.parametrize("groups", [1, 32])
def test_convolutions_have_he_initialization(groups):
    images = keras.Input((8, 8, 512))
    kernel = keras.Model(images, conv_bn(images, 512, 3, groups=groups, name="conv")).get_layer("conv").kernel.numpy()
    # 73,728 values or more: the sample's variance has a standard deviation below 0.6 %. Glorot's is half of this.
    assert kernel.var() == pytest.approx(2 / (9 * 512 / groups), rel=0.03)


def test_classifier_has_he_initialization():
    kernel = create("resnet18").get_layer("predictions").kernel.numpy()
    assert kernel.var() == pytest.approx(2 / 512, rel=0.02)  # 512,000 values: 0.2 % each standard deviation


@pytest.fixture
def mixed_float16():
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    yield
    keras.config.set_dtype_policy(policy)


@pytest.mark.parametrize("site", SITES)
def test_mixed_float16_gives_finite_float32_probabilities(site, mixed_float16):
    model = create("se_resnet11_digits", se=SEConfig(site=site))
    assert model.get_layer("stage2_block1_se").compute_dtype == "float16"
    probabilities = model(noise(2, 8, 8, 1)).numpy()
    assert probabilities.dtype == "float32"
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)  # 1,000 float32 terms; NaN would fail
