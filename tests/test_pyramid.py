"""Feature pyramids: the published levels of every family, with the tensors and weights of the network."""

import re
from functools import partial

import keras
import numpy as np
import pytest
from export_fixtures import difference, images_for, outputs_of, scattered

from se_keras.catalogue import create, spec_of
from se_keras.export import lower
from se_keras.graph import calls
from se_keras.pyramids import pyramid
from se_keras.recalibration import SEConfig

# (pixels, channels) of each level at the default size.
_resnet = {"P2": (56, 256), "P3": (28, 512), "P4": (14, 1024), "P5": (7, 2048)}
LEVELS = {
    # He et al. 2015, Table 1.
    "se_resnet18": {"P2": (56, 64), "P3": (28, 128), "P4": (14, 256), "P5": (7, 512)},
    "se_resnet34": {"P2": (56, 64), "P3": (28, 128), "P4": (14, 256), "P5": (7, 512)},
    "se_resnet50": _resnet,
    "se_resnet101": _resnet,
    "se_resnet152": _resnet,
    "se_resnext50_32x4d": _resnet,  # Xie et al. 2016, Table 1
    "senet154": _resnet,
    "se_resnet11_digits": {"P0": (8, 64), "P1": (4, 128), "P2": (2, 256)},
    # Simonyan & Zisserman 2014, Table 1: before each pooling.
    "se_vgg11_bn": {"P0": (224, 64), "P1": (112, 128), "P2": (56, 256), "P3": (28, 512), "P4": (14, 512)},
    # Ioffe & Szegedy 2015, appendix: 3b, 4d and 5b.
    "se_bn_inception": {"P3": (28, 320), "P4": (14, 608), "P5": (7, 1024)},
    # Szegedy et al. 2016, Figure 15; 320 and 1088 channels as released in TF-Slim.
    "se_inception_resnet_v2": {"P3": (35, 320), "P4": (17, 1088), "P5": (8, 1536)},
    # Howard et al. 2017, Table 1.
    "se_mobilenet": {"P1": (112, 64), "P2": (56, 128), "P3": (28, 256), "P4": (14, 512), "P5": (7, 1024)},
    "se_mobilenet_025": {"P1": (112, 16), "P2": (56, 32), "P3": (28, 64), "P4": (14, 128), "P5": (7, 256)},
    # Zhang et al. 2018, Table 1: stages 2 to 4.
    "se_shufflenet_g1": {"P3": (28, 144), "P4": (14, 288), "P5": (7, 576)},
    "se_shufflenet_g3": {"P3": (28, 240), "P4": (14, 480), "P5": (7, 960)},
    # He et al. 2016, Table 1 and section 5.
    "se_resnet20": {"P0": (32, 16), "P1": (16, 32), "P2": (8, 64)},
    "se_resnet164": {"P0": (32, 64), "P1": (16, 128), "P2": (8, 256)},
    "se_wrn16_8": {"P0": (32, 128), "P1": (16, 256), "P2": (8, 512)},  # Zagoruyko & Komodakis 2016, Table 1
    # Gastaldi 2017, section 2.2 and its released ResNeXt.
    "se_shake_shake_26_2x96d": {"P0": (32, 96), "P1": (16, 192), "P2": (8, 384)},
    "se_shake_even_29_2x4x64d": {"P0": (32, 256), "P1": (16, 512), "P2": (8, 1024)},
}
# A row of each family, and the block or layer that reads each of its levels.
READERS = {
    "se_resnet18": ("stage3_block1", "stage4_block1", "stage5_block1", "avg_pool"),
    "se_vgg11_bn": ("pool1", "pool2", "pool3", "pool4", "pool5"),
    "se_bn_inception": ("stage3_block3", "stage4_block5", "avg_pool"),  # 3c and 4e halve the size
    "se_inception_resnet_v2": ("stage4_block1", "stage5_block1", "avg_pool"),
    "se_mobilenet_025": ("stage2_block1", "stage3_block1", "stage4_block1", "stage5_block1", "avg_pool"),
    "se_shufflenet_g1": ("stage3_block1", "stage4_block1", "avg_pool"),
    "se_resnet20": ("stage3_block1", "stage4_block1", "avg_pool"),
    "se_shake_even_29_2x4x64d": ("stage3_block1", "stage4_block1", "avg_pool"),
}
# Networks that are fast to compute, with small images.
SMALL = {
    "se_resnet11_digits": (8, 8, 1),
    "se_vgg11_bn": (32, 48, 3),
    "se_bn_inception": (64, 96, 3),
    "se_mobilenet_025": (64, 32, 3),
    "se_shufflenet_g1_025": (64, 64, 3),
    "se_resnet20": (16, 8, 3),
}


@pytest.fixture
def sketch():
    """`create` without values for the weights: enough to test a graph, in a fifth of the time."""
    with keras.StatelessScope(initialize_variables=False):
        yield create
    keras.utils.clear_session()


def noise(*shape):
    return np.random.default_rng(0).uniform(-1, 1, shape).astype("float32")


def trained(model):
    """With weights like after training. Most values pass the ReLUs, because not every family has shortcuts."""
    return scattered(model, beta=(0.5, 1.5))


def agrees(maps, expected, images):
    assert list(maps.output) == list(expected.output)
    # The noise of float32: two units in the last place of the images make as much as 2e-5 of the range at the deepest
    # levels of networks without shortcuts. A lost bias or a wrong block is beyond 1e-3.
    assert difference(outputs_of(expected, images), outputs_of(maps, images)) < 1e-4


def published(name):
    return {level: (pixels, pixels, channels) for level, (pixels, channels) in LEVELS[name].items()}


def shapes(levels):
    return {level: tuple(x.shape[1:]) for level, x in levels.items()}


# Levels.


@pytest.mark.sweep
@pytest.mark.parametrize("name", LEVELS)
def test_levels_of_the_network_with_its_top_are_as_published(name, sketch):
    assert shapes(pyramid(sketch(name)).output) == published(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_levels_without_the_top_at_a_free_size_are_as_published(name, sketch):
    free = pyramid(sketch(name, include_top=False))
    images = keras.KerasTensor((1, *spec_of(name).input_shape))
    assert shapes(free.compute_output_spec(images)) == published(name)


@pytest.mark.sweep
@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("beyond", [0, 9])
def test_size_of_the_image_does_not_matter_to_the_names_of_levels(name, beyond, sketch):
    size = spec_of(name).minimum_size + beyond
    fixed = pyramid(sketch(name, include_top=False, input_shape=(size, size, 3)))
    channels = {level: channels for level, (_, channels) in LEVELS[name].items()}
    assert {level: x.shape[-1] for level, x in fixed.output.items()} == channels


def test_rounding_at_every_stage_does_not_matter_to_the_names_of_levels(sketch):
    maps = pyramid(sketch("se_resnet18", input_shape=(41, 41, 3)))
    # 41 / 3 is nearer to 16 than to 8, and 41 / 2 nearer to 16 than to 32.
    assert shapes(maps.output) == {"P2": (10, 10, 64), "P3": (5, 5, 128), "P4": (3, 3, 256), "P5": (2, 2, 512)}


@pytest.mark.sweep
@pytest.mark.parametrize("name, site", [(name, site) for name in READERS for site in spec_of(name).sites])
def test_level_is_what_the_next_stage_reads_wherever_blocks_recalibrate(name, site, sketch):
    model = sketch(name, se=SEConfig(site=site, ratio=4))
    levels = pyramid(model).output
    found = []
    for level in levels.values():
        readers = {call.operation.name for call in calls(model) if any(x is level for x in call.input_tensors)}
        found.append({re.sub(r"(_block\d+)_.*", r"\1", reader) for reader in readers})
    # A BatchNorm and ReLU end pre-activation networks, and belong to the last level.
    assert found == [{reader} for reader in READERS[name]]


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_baseline_has_the_same_levels(name, sketch):
    assert shapes(pyramid(sketch(name, se=None)).output) == shapes(pyramid(sketch(name)).output)


def test_last_level_is_the_feature_map():
    model = create("se_resnet11_digits", include_top=False)
    assert pyramid(model).output["P2"] is model.output


# Values and weights.


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_outputs_are_the_tensors_of_the_network_on_the_same_images(name):
    model = trained(create(name, input_shape=SMALL[name]))
    maps = pyramid(model)
    agrees(maps, keras.Model(model.input, {**maps.output}), images_for(model))
    # The layers after a level compute the output of the network from it.
    *_, last = maps.output
    rest = keras.Model(maps.output[last], model.output)
    images = images_for(model)
    assert difference(outputs_of(model, images), outputs_of(rest, maps(images)[last])) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_weights_are_the_networks_own_and_all_but_the_classifiers(name, sketch):
    model = sketch(name)
    head = {id(w) for layer in model.layers if layer.name in ("predictions", "fc1", "fc2") for w in layer.weights}
    own = {id(w) for w in model.weights}
    assert {id(w) for w in pyramid(model).weights} == own - head and head


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_no_layer_stands_behind_the_last_level(name, sketch):
    model = pyramid(sketch(name))
    read = {id(x) for call in calls(model) for x in call.input_tensors} | {id(x) for x in model.output.values()}
    assert [call.operation.name for call in calls(model) if not any(id(x) in read for x in call.output_tensors)] == []
    assert not {"avg_pool", "pool5", "flatten", "dropout", "predictions"} & {layer.name for layer in model.layers}


@pytest.mark.slow
def test_training_the_pyramid_trains_the_network():
    model = create("se_resnet11_digits", include_top=False)
    before = model.get_weights()
    maps = pyramid(model)
    maps.compile("sgd", dict.fromkeys(maps.output, "mse"), jit_compile=False)
    images = noise(4, 8, 8, 1)
    maps.fit(images, {level: np.ones_like(x) for level, x in maps(images).items()}, verbose=0)
    moved = [np.any(new != old) for new, old in zip(model.get_weights(), before, strict=True)]
    assert all(moved)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["se_resnet11_digits", "se_mobilenet_025", "se_shufflenet_g1_025"])
def test_saved_pyramid_gives_the_same_levels(name, tmp_path):
    maps = trained(pyramid(create(name, include_top=False, input_shape=SMALL[name])))
    maps.save(tmp_path / "maps.keras")
    loaded = keras.saving.load_model(tmp_path / "maps.keras")
    agrees(loaded, maps, images_for(maps))
    assert list(loaded.pyramid_outputs) == list(maps.output)


# What a network may be part of.


def test_preprocessing_inside_the_network_stays_in_front_of_the_levels():
    inside = create("se_resnet20", include_top=False, include_preprocessing=True)
    plain = create("se_resnet20", include_top=False)
    plain.set_weights(inside.get_weights())
    images = np.random.default_rng(0).uniform(0, 255, (2, 16, 24, 3)).astype("float32")
    spec = spec_of("se_resnet20")
    prepared = ((images - spec.mean) / spec.std).astype("float32")
    # (x - m) / s and x / s - m / s differ by roundings of 4, the largest of the quotients.
    assert difference(outputs_of(pyramid(plain), prepared), outputs_of(pyramid(inside), images)) < 1e-4


def test_layers_in_front_of_an_input_tensor_stay_in_front_of_the_levels(sketch):
    images = keras.Input((None, None, 1), name="scans")
    prepared = keras.layers.Resizing(64, 64)(keras.layers.Concatenate()([images] * 3))
    maps = pyramid(sketch("se_resnet18", input_tensor=prepared))
    assert maps.input is images
    assert shapes(maps.output) == {"P2": (16, 16, 64), "P3": (8, 8, 128), "P4": (4, 4, 256), "P5": (2, 2, 512)}


def test_strides_of_layers_in_front_of_an_input_tensor_count(sketch):
    images = keras.Input((64, 64, 3))
    halved = keras.layers.AveragePooling2D(2)(images)
    assert shapes(pyramid(sketch("se_resnet20", include_top=False, input_tensor=halved)).output) == {
        "P1": (32, 32, 16),
        "P2": (16, 16, 32),
        "P3": (8, 8, 64),
    }


def test_two_images_that_meet_in_front_of_the_network_are_both_inputs():
    left, right = keras.Input((8, 8, 1)), keras.Input((8, 8, 1))
    both = keras.layers.Concatenate()([left, right])
    maps = pyramid(create("se_resnet11_digits", input_tensor=both))
    images = noise(2, 8, 8, 1)
    assert {level: x.shape for level, x in maps([images, images]).items()} == {
        "P0": (2, 8, 8, 64),
        "P1": (2, 4, 4, 128),
        "P2": (2, 2, 2, 256),
    }


@pytest.mark.sweep
@pytest.mark.parametrize("name", SMALL)
def test_lowered_network_has_the_same_levels(name):
    model = trained(create(name, include_top=False, input_shape=SMALL[name]))
    agrees(pyramid(lower(model)), pyramid(model), images_for(model))


@pytest.mark.sweep
@pytest.mark.parametrize("site", spec_of("se_resnet11_digits").sites)
def test_lowered_network_has_the_same_levels_wherever_blocks_recalibrate(site):
    model = trained(create("se_resnet11_digits", se=SEConfig(site=site)))
    agrees(pyramid(lower(model)), pyramid(model), images_for(model))


def test_pyramid_lowers_into_stock_layers():
    maps = trained(pyramid(create("se_resnet11_digits")))
    lowered = lower(maps)
    agrees(lowered, maps, images_for(maps))
    assert {type(layer).__module__.partition(".")[0] for layer in (lowered, *lowered.layers)} == {"keras"}


# Refusals.


class Subclassed(keras.Model):
    def call(self, images):
        return images


def foreign():
    return keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(4, 3, name="block1_conv1")], name="mine")


@pytest.mark.parametrize(
    "build",
    [
        foreign,
        # A network inside another model: its layers are not the outer model's.
        lambda: keras.Sequential(
            [create("se_resnet11_digits", include_top=False), keras.layers.Flatten()], name="mine"
        ),
    ],
)
def test_model_without_blocks_of_the_catalogue_is_refused_in_one_line(build):
    message = "^mine has no layers named stage2_block1_...: pyramid takes networks of se_keras$"
    with pytest.raises(ValueError, match=message):
        pyramid(build())


@pytest.mark.parametrize(
    "build, came",
    [
        (partial(Subclassed, name="mine"), "Subclassed mine"),
        (lambda: keras.Sequential([keras.layers.Flatten()], name="mine"), "Sequential mine"),
        (lambda: keras.layers.Flatten(name="mine"), "Flatten mine"),
        (lambda: "se_resnet50", "str"),
        (lambda: None, "NoneType"),
    ],
)
def test_what_has_no_graph_is_refused_in_one_line(build, came):
    message = f"^Only functional models, and Sequential ones with an Input, have a graph. Received: {came}$"
    with pytest.raises(TypeError, match=message):
        pyramid(build())
