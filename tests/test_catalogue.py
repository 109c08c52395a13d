"""Every keyword of `create` and of the functions like those of keras.applications, and every refusal."""

import dataclasses
import inspect
import re
import types

import keras
import numpy as np
import pytest

import se_keras
from se_keras import applications, catalogue
from se_keras.catalogue import create, names, spec_of
from se_keras.recalibration import SEConfig
from se_keras.weights.released import IMAGENET

DIGITS = "se_resnet11_digits"
FUNCTIONS = {
    "ResNet18": "resnet18",
    "ResNet34": "resnet34",
    "ResNet50": "resnet50",
    "ResNet101": "resnet101",
    "ResNet152": "resnet152",
    "ResNeXt50": "resnext50_32x4d",
    "ResNeXt101": "resnext101_32x4d",
    "SEResNet18": "se_resnet18",
    "SEResNet34": "se_resnet34",
    "SEResNet50": "se_resnet50",
    "SEResNet101": "se_resnet101",
    "SEResNet152": "se_resnet152",
    "SEResNeXt50": "se_resnext50_32x4d",
    "SEResNeXt101": "se_resnext101_32x4d",
    "SENet154": "senet154",
    "VGG16": "vgg16_bn",
    "SEVGG16": "se_vgg16_bn",
    "BNInception": "bn_inception",
    "SEBNInception": "se_bn_inception",
    "InceptionResNetV2": "inception_resnet_v2",
    "SEInceptionResNetV2": "se_inception_resnet_v2",
    "MobileNet": "mobilenet",
    "SEMobileNet": "se_mobilenet",
    "ShuffleNet": "shufflenet_g3",
    "SEShuffleNet": "se_shufflenet_g3",
}


def noise(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def one_line(*parts):
    """A pattern for a message of one line that contains `parts` in this order."""
    return "^" + "".join(f"[^\n]*{re.escape(part)}" for part in parts) + r"[^\n]*\Z"


# The table.


def test_names_are_sorted_and_each_once():
    assert names() == sorted(set(names()))


def test_names_by_pattern_family_and_weights():
    assert names("se_resnet18") == ["se_resnet18"]
    assert names("se_resnet1??b") == ["se_resnet101b", "se_resnet152b"]
    assert names("*", pretrained=True) == sorted(IMAGENET)
    assert names("se_*", family="vgg", pretrained=True) == names("nothing") == []
    families = ("cifar", "inception", "mobilenet", "resnet", "shufflenet", "vgg")
    assert sorted(name for family in families for name in names(family=family)) == names()


def test_family_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match=r"family must be one of \('cifar', .*\)\. Received: family='alexnet'$"):
        names(family="alexnet")


@pytest.mark.parametrize("name", names())
def test_row_behind_a_name_is_a_frozen_spec_with_its_source(name):
    spec = spec_of(name)
    assert spec.source
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.se = None


@pytest.mark.parametrize("name", [name for name in names() if name.startswith("se_")])
def test_se_row_is_its_plain_twin_with_the_released_config(name):
    assert spec_of(name) == dataclasses.replace(spec_of(name.removeprefix("se_")), se=SEConfig())


def test_two_rows_of_one_name_are_refused():
    families = [types.SimpleNamespace(__name__=name, SPECS={"resnet50": None}) for name in ("one", "two")]
    with pytest.raises(ValueError, match="^Two rows are named 'resnet50': in one and two$"):
        catalogue._merge(families)


# Keywords.


def test_model_is_named_after_its_row():
    assert create(DIGITS).name == DIGITS


def test_name_is_the_models():
    assert create(DIGITS, name="mine").name == "mine"


@pytest.mark.parametrize(
    "name, shape, classes", [(DIGITS, (8, 8, 1), 10), ("resnet20", (32, 32, 3), 10), ("mobilenet", (224, 224, 3), 1000)]
)
def test_default_is_the_rows_image_and_its_classes(name, shape, classes):
    model = create(name)
    assert (model.input_shape, model.output_shape) == ((None, *shape), (None, classes))


@pytest.mark.parametrize(
    "pooling, shape", [(None, (None, None, None, 256)), ("avg", (None, 256)), ("max", (None, 256))]
)
def test_without_the_top_height_and_width_are_free(pooling, shape):
    model = create(DIGITS, include_top=False, pooling=pooling)
    assert (model.input_shape, model.output_shape) == ((None, None, None, 1), shape)


@pytest.mark.parametrize("pooling, pool", [("avg", np.mean), ("max", np.max)])
def test_pooling_is_that_of_the_feature_map(pooling, pool):
    features = create(DIGITS, include_top=False)
    pooled = create(DIGITS, include_top=False, pooling=pooling)
    pooled.set_weights(features.get_weights())
    images = noise(2, 12, 10, 1)
    # A mean of at most a dozen float32 values; a maximum is exact.
    np.testing.assert_allclose(pooled(images).numpy(), pool(features(images).numpy(), axis=(1, 2)), rtol=1e-5)


def test_pooling_does_not_matter_with_the_top():
    assert create(DIGITS, pooling="max").get_config() == create(DIGITS).get_config()


@pytest.mark.parametrize("classes", [1, 10])
def test_classes_is_the_width_of_the_output(classes):
    assert create(DIGITS, classes=classes).output_shape == (None, classes)


def test_probabilities_are_the_softmax_of_the_logits():
    model = create(DIGITS, classes=10)
    logits = create(DIGITS, classes=10, classifier_activation=None)
    logits.set_weights(model.get_weights())
    images = noise(2, 8, 8, 1)
    expected = np.exp(logits(images).numpy())
    # Ten float32 exponentials and one quotient.
    np.testing.assert_allclose(model(images).numpy(), expected / expected.sum(1, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize("shape", [(8, 8, 1), (4, 4, 1), (16, 12, 3), (None, None, 1), (None, 8, 2)])
def test_input_shape_is_the_models(shape):
    assert create(DIGITS, input_shape=shape).input_shape == (None, *shape)


def test_input_shape_may_be_a_list():
    assert create(DIGITS, input_shape=[16, 16, 3]).input_shape == (None, 16, 16, 3)


def test_network_of_free_size_computes_at_two_sizes():
    model = create(DIGITS, classes=10, input_shape=(None, None, 1))
    assert [model(noise(1, size, size, 1)).shape for size in (8, 13)] == [(1, 10)] * 2


def test_input_tensor_is_the_models_input():
    images = keras.Input((10, 10, 1))
    assert [x is images for x in create(DIGITS, input_tensor=images).inputs] == [True]


def test_model_of_an_input_tensor_takes_one_array():
    model = create(DIGITS, input_tensor=keras.Input((8, 8, 1)), classes=10)
    assert model(noise(2, 8, 8, 1)).shape == (2, 10)  # Keras warns where it expects a list of one array


def test_input_tensor_may_be_an_intermediate_one():
    images = keras.Input((16, 16, 1))
    halved = keras.layers.AveragePooling2D(2)(images)
    model = create(DIGITS, input_tensor=halved)
    plain = create(DIGITS)
    plain.set_weights(model.get_weights())
    x = noise(2, 16, 16, 1)
    assert model.inputs[0] is images
    np.testing.assert_array_equal(model(x).numpy(), plain(keras.ops.average_pool(x, 2)).numpy())


def test_input_tensor_may_come_from_two_inputs():
    one, two = keras.Input((8, 8, 1)), keras.Input((8, 8, 1))
    model = create(DIGITS, input_tensor=keras.layers.Add()([one, two]))
    assert len(model.inputs) == 2


@pytest.mark.parametrize("spelling", ["resnet11_digits", DIGITS])
def test_se_replaces_the_rows_own(spelling):
    model = create(spelling, se=SEConfig(ratio=4, site="post"))
    assert model.get_layer("stage3_block1_se").ratio == 4


def test_se_none_is_the_baseline_by_configuration():
    assert create(DIGITS, se=None, name="same").get_config() == create("resnet11_digits", name="same").get_config()


# Weights.

CLASSES = 10


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A network, and its files by suffix."""
    folder = tmp_path_factory.mktemp("weights")
    model = create(DIGITS, classes=CLASSES)
    rng = np.random.default_rng(0)
    for weight in model.weights:  # the moving statistics too, which begin at zero and one
        weight.assign(rng.uniform(0.1, 1, size=weight.shape))
    model.save(folder / "model.keras")
    model.save_weights(folder / "model.weights.h5")
    return model, {".keras": folder / "model.keras", ".weights.h5": folder / "model.weights.h5"}


SUFFIXES = (".weights.h5", ".keras")


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "Path"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_weights_give_the_outputs_of_the_saved_network(suffix, kind, saved):
    model, paths = saved
    loaded = create(DIGITS, classes=CLASSES, weights=kind(paths[suffix]))
    images = noise(2, 8, 8, 1)
    np.testing.assert_array_equal(loaded(images).numpy(), model(images).numpy())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_weights_load_at_another_image_size(suffix, saved):
    model, paths = saved
    loaded = create(DIGITS, classes=CLASSES, weights=paths[suffix], input_shape=(16, 16, 1))
    assert all(np.array_equal(a, b) for a, b in zip(loaded.get_weights(), model.get_weights(), strict=True))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_missing_file_is_refused(suffix, tmp_path):
    path = tmp_path / f"absent{suffix}"
    with pytest.raises(FileNotFoundError, match=one_line("There is no file of weights", str(path))):
        create(DIGITS, weights=path)


WEIGHTS_RULE = (
    "weights must be None, 'imagenet', or the path of a .weights.h5, .keras, .safetensors, .pth, .pt, .pth.tar, "
    ".bin or .ckpt file. Received: "
)


@pytest.mark.parametrize("weights", ["ImageNet", "notes.txt", "model.h5", ""])
def test_name_without_a_known_suffix_is_refused(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("not weights")
    message = one_line(WEIGHTS_RULE, repr(weights))
    with pytest.raises(ValueError, match=message):
        create(DIGITS, weights=weights)


@pytest.mark.parametrize("weights", [3, True, {}])
def test_weights_that_are_no_path_are_refused(weights):
    message = one_line(WEIGHTS_RULE, repr(weights))
    with pytest.raises((TypeError, ValueError), match=message):
        create(DIGITS, weights=weights)


@pytest.mark.parametrize("part", [0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_truncated_file_is_refused(suffix, part, saved, tmp_path):
    whole = saved[1][suffix].read_bytes()
    path = tmp_path / f"truncated{suffix}"
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ValueError, match=one_line(str(path), "is not a file of weights that can be read: ")):
        create(DIGITS, classes=CLASSES, weights=path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_text_under_a_known_suffix_is_refused(suffix, tmp_path):
    path = tmp_path / f"text{suffix}"
    path.write_text("not\nweights\n")
    with pytest.raises(ValueError, match=one_line(str(path), "is not a file of weights that can be read: ")):
        create(DIGITS, weights=path)


def refuses(path, network, *parts, **keywords):
    with pytest.raises(ValueError, match=one_line(str(path), *parts)):
        create(network, weights=path, **keywords)


def save(model, path):
    (model.save_weights if path.suffix == ".h5" else model.save)(path)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_file_of_a_foreign_model_is_refused(suffix, tmp_path):
    foreign = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])
    parts = ("is of another network: it lacks conv1, conv1_bn, ", "; the network lacks dense")
    refuses(save(foreign, tmp_path / f"foreign{suffix}"), DIGITS, *parts)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_file_of_another_class_count_than_published_is_refused(suffix, tmp_path):
    path = save(create(DIGITS, classes=12), tmp_path / f"twelve{suffix}")
    for classes in (CLASSES, 11):
        parts = (f"does not fit: predictions has the shape (256, {classes}) here and (256, 12) there",)
        refuses(path, DIGITS, *parts, classes=classes)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_file_of_another_network_is_refused(suffix, saved):
    refuses(saved[1][suffix], "se_resnet18", "another network", classes=CLASSES, input_shape=(32, 32, 1))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_file_of_the_baseline_is_refused_by_the_se_network(suffix, tmp_path):
    path = save(create("resnet11_digits", classes=CLASSES), tmp_path / f"baseline{suffix}")
    refuses(path, DIGITS, "it lacks stage2_block1_se, ", classes=CLASSES)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_file_of_the_se_network_is_refused_by_the_baseline(suffix, saved):
    refuses(saved[1][suffix], "resnet11_digits", "the network lacks stage2_block1_se, ", classes=CLASSES)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_file_with_the_top_fills_the_network_without_it(suffix, saved):
    model, paths = saved
    loaded = create(DIGITS, include_top=False, weights=paths[suffix])
    for layer in loaded.layers:
        for ours, theirs in zip(layer.get_weights(), model.get_layer(layer.name).get_weights(), strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_weights_pass_by_the_layers_in_front_of_an_input_tensor(suffix, saved):
    model, paths = saved
    images = keras.Input((8, 8, 1))
    before = keras.layers.Conv2D(1, 1, name="before")
    loaded = create(DIGITS, classes=CLASSES, input_tensor=before(images), weights=paths[suffix])
    before.set_weights([np.ones((1, 1, 1, 1)), np.zeros(1)])
    np.testing.assert_array_equal(loaded(noise(2, 8, 8, 1)).numpy(), model(noise(2, 8, 8, 1)).numpy())


@pytest.mark.parametrize("se", [SEConfig(bias=False), SEConfig(ratio=8), SEConfig(stages=(3,))])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_file_of_another_recalibration_is_refused(suffix, se, saved):
    refuses(saved[1][suffix], DIGITS, classes=CLASSES, se=se)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_weights_never_land_in_layers_of_other_names(suffix, tmp_path):
    # With this site the shortcut is read before the third convolution, and both are 1x1 from 16 to 64 channels.
    model = create(DIGITS, se=SEConfig(site="identity", stages=(2,)), classes=CLASSES)
    path = save(model, tmp_path / f"identity{suffix}")
    try:
        loaded = create(DIGITS, se=SEConfig(stages=(2,)), classes=CLASSES, weights=path)
    except ValueError:
        return
    for name in ("stage2_block1_conv3", "stage2_block1_shortcut"):
        np.testing.assert_array_equal(loaded.get_layer(name).kernel.numpy(), model.get_layer(name).kernel.numpy())


# Refused before a layer is built. The message has the rule and the received value.


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("se_resnet5O", "se_resnet50, "),
        ("SEResNet50", "se_resnet50, "),
        ("SENet154", "senet154"),
        ("se_resnext50", "se_resnext50_32x4d"),
        ("resnet-50", "resnet50"),
    ],
)
def test_unknown_name_gets_the_nearest(name, nearest):
    with pytest.raises(
        ValueError, match=one_line(f"There is no network {name!r} among the {len(names())}. The nearest: ", nearest)
    ):
        create(name)


@pytest.mark.parametrize("name", ["se_resnet5O", "SEResNet50"])
def test_first_of_the_nearest_is_the_one_meant(name):
    with pytest.raises(ValueError, match="The nearest: se_resnet50, "):
        spec_of(name)


@pytest.mark.parametrize("name", [None, 50, ["resnet50"], se_keras.SEResNet50])
def test_name_that_is_no_string_is_refused(name):
    message = one_line("The name of a network must be a string. Received: ", repr(name))
    with pytest.raises(TypeError, match=message):
        create(name)


SHAPE = "input_shape must be (height, width, channels), height and width None or at least 4. Received: input_shape="
SE = "se must be an SEConfig, or None for the plain baseline. Received: se="
STAGES = f"{DIGITS} has the stages (2, 3, 4): name some of them. Received: "
POOLING = "pooling must be None, 'avg' or 'max'. Received: pooling="
CLASSES_RULE = "classes must be a positive int. Received: classes="
TENSOR = "input_tensor must be a Keras tensor, as keras.Input returns. Received: "


@pytest.mark.parametrize(
    "keywords, error, message",
    [
        ({"input_shape": (8, 8)}, ValueError, SHAPE + "(8, 8)"),
        ({"input_shape": (1, 8, 8, 1)}, ValueError, SHAPE + "(1, 8, 8, 1)"),
        ({"input_shape": 8}, ValueError, SHAPE + "8"),
        ({"input_shape": (3, 8, 1)}, ValueError, SHAPE + "(3, 8, 1)"),
        ({"input_shape": (8, 0, 1)}, ValueError, SHAPE + "(8, 0, 1)"),
        ({"input_shape": (8, -8, 1)}, ValueError, SHAPE + "(8, -8, 1)"),
        ({"input_shape": ("8", "8", "1")}, ValueError, SHAPE + "('8', '8', '1')"),
        ({"input_shape": "8x8x1"}, ValueError, SHAPE + "'8x8x1'"),
        ({"input_shape": (8.0, 8.0, 1)}, ValueError, SHAPE + "(8.0, 8.0, 1)"),
        ({"input_shape": (8, 8, None)}, ValueError, SHAPE + "(8, 8, None)"),
        ({"input_shape": (8, 8, 0)}, ValueError, SHAPE + "(8, 8, 0)"),
        ({"classes": 0}, ValueError, CLASSES_RULE + "0"),
        ({"classes": -1}, ValueError, CLASSES_RULE + "-1"),
        ({"classes": True}, ValueError, CLASSES_RULE + "True"),
        ({"classes": 2.5}, ValueError, CLASSES_RULE + "2.5"),
        ({"classes": "10"}, ValueError, CLASSES_RULE + "'10'"),
        ({"pooling": "mean"}, ValueError, POOLING + "'mean'"),
        ({"pooling": True, "include_top": False}, ValueError, POOLING + "True"),
        ({"classifier_activation": "sofmax"}, ValueError, "sofmax"),
        ({"input_tensor": "images"}, TypeError, TENSOR + "<class 'str'>"),
        ({"input_tensor": np.zeros((2, 8, 8, 1))}, TypeError, TENSOR),
        ({"se": "standard"}, TypeError, SE + "'standard'"),
        ({"se": True}, TypeError, SE + "True"),
        ({"se": SEConfig(stages=(5,))}, ValueError, STAGES + "(5,)"),
        ({"se": SEConfig(stages=())}, ValueError, STAGES + "()"),
        ({"se": SEConfig(ratio=65)}, ValueError, "stage2_block1_se: ratio must be at most the number of channels, 64."),
    ],
)
def test_wrong_keyword_is_refused_in_one_line(keywords, error, message):
    with pytest.raises(error, match=one_line(message)):
        create(DIGITS, **keywords)


@pytest.mark.parametrize("shape", [(8,), (8, 8), (8, 8, None), (3, 8, 1)])
def test_input_tensor_of_a_wrong_shape_is_refused(shape):
    with pytest.raises(ValueError, match=one_line(SHAPE + str(shape))):
        create(DIGITS, input_tensor=keras.Input(shape))


@pytest.mark.parametrize("network, minimum", [("se_resnet50", 32), (DIGITS, 4)])
def test_image_below_the_networks_minimum_is_refused(network, minimum):
    with pytest.raises(
        ValueError, match=rf"at least {minimum}\. Received: input_shape=\({minimum - 1}, {minimum}, 3\)"
    ):
        create(network, input_shape=(minimum - 1, minimum, 3))


def test_site_that_a_family_lacks_is_refused_by_the_networks_name():
    message = "^vgg16_bn has no such site: site must be 'standard'. Received: site='pre'$"
    with pytest.raises(ValueError, match=message):
        create("vgg16_bn", se=SEConfig(site="pre"))


def test_misspelt_keyword_is_refused():
    with pytest.raises(TypeError, match="clases"):
        create(DIGITS, clases=10)


def test_channels_first_is_refused(channels_first):
    message = one_line("se_keras builds channels-last networks. Received: ", "image_data_format()='channels_first'")
    with pytest.raises(ValueError, match=message):
        create(DIGITS)


# The functions with the signature of keras.applications.


def test_every_function_is_known_here():
    built = {name for name, value in vars(applications).items() if name[0].isupper() and inspect.isfunction(value)}
    assert built == set(FUNCTIONS)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_function_has_the_parameters_of_keras_applications_and_two_more(function):
    ours = list(inspect.signature(getattr(applications, function)).parameters)
    assert ours == [*inspect.signature(keras.applications.ResNet50).parameters, "se", "include_preprocessing"]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_function_has_the_defaults_of_keras_applications_but_random_weights(function):
    theirs = inspect.signature(keras.applications.ResNet50).parameters
    ours = inspect.signature(getattr(applications, function)).parameters
    differ = {name for name in theirs if ours[name].default != theirs[name].default}
    assert (differ, ours["weights"].default, ours["name"].default) == ({"weights", "name"}, None, None)


@pytest.mark.parametrize("function, network", FUNCTIONS.items())
def test_function_builds_its_row(function, network, monkeypatch):
    monkeypatch.setattr(applications, "create", lambda network, **keywords: (network, keywords))
    built, keywords = getattr(applications, function)()
    defaults = {key: value.default for key, value in inspect.signature(create).parameters.items() if key != "network"}
    defaults["classes"] = 1000  # as keras.applications says it
    assert (built, keywords) == (network, defaults)


def test_function_passes_every_keyword_on(monkeypatch):
    monkeypatch.setattr(applications, "create", lambda network, **keywords: keywords)
    keywords = {key: object() for key in inspect.signature(applications.SEResNet50).parameters}
    assert applications.SEResNet50(**keywords) == keywords


def test_seresnet50_is_create_se_resnet50():
    with keras.StatelessScope(initialize_variables=False):  # a configuration has no values
        configs = [model.get_config() for model in (se_keras.SEResNet50(), create("se_resnet50"))]
    keras.utils.clear_session()
    assert configs[0] == configs[1]


@pytest.mark.parametrize("function, network", FUNCTIONS.items())
def test_docstring_names_the_row_and_its_source(function, network):
    assert inspect.getdoc(getattr(applications, function)).startswith(f"Builds `{network}`: {spec_of(network).source}.")


@pytest.mark.parametrize("name", se_keras.__all__)
def test_public_names_are_there(name):
    assert hasattr(se_keras, name)


def test_public_names_are_sixteen_at_most():
    assert len(se_keras.__all__) <= 16
