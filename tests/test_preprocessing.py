"""Preprocessing as a function and inside the network, and the names of the predicted classes."""

import json
import socket

import keras
import numpy as np
import pytest
import tensorflow as tf
from export_fixtures import difference, outputs_of, scattered
from keras.src.applications import imagenet_utils
from keras.src.backend import config
from test_catalogue import one_line
from torch_oracles import torchvision_for_import

from se_keras.catalogue import create, names, spec_of
from se_keras.export.litert.conversion import to_litert
from se_keras.export.litert.file import LiteRTRunner
from se_keras.export.lowering import lower
from se_keras.preprocessing import decode_predictions, preprocess_input
from se_keras.weights.released import IMAGENET

CIFAR = "se_resnet20"
DIGITS = "se_resnet11_digits"
# One network for each mean and standard deviation that there is.
NORMALIZED = {(spec_of(name).mean, spec_of(name).std): name for name in reversed(names())}
# A float32 is off by 6e-8 of itself. Pixels over the smallest standard deviation are at most 4.7, two roundings of
# which remain in the sum of either order: 1e-6. A mean or deviation of another row is off by 1e-2 or more.
ROUNDING = 2e-6


def pixels(name, *shape, dtype="uint8", seed=0):
    channels = len(spec_of(name).mean)
    return np.random.default_rng(seed).integers(0, 256, size=(*shape, channels)).astype(dtype)


def small():
    """A network for pixels and the same for normalized images, with weights that do not hide errors."""
    inner = create(CIFAR)
    scattered(inner, images=preprocess_input(pixels(CIFAR, 16, 32, 32, seed=1), CIFAR))
    model = create(CIFAR, include_preprocessing=True)
    model.set_weights(inner.get_weights())
    return model, inner


@pytest.fixture(scope="module")
def networks():
    return small()


# preprocess_input.


@pytest.mark.parametrize("name", names())
def test_each_channel_has_the_networks_mean_taken_off_and_its_deviation_divided_out(name):
    spec, images = spec_of(name), pixels(name, 2, 3, 4)
    assert len(spec.mean) == len(spec.std) == spec.input_shape[-1]
    result = preprocess_input(images, name)
    assert (result.shape, result.dtype) == (images.shape, np.float32)
    for channel, (mean, std) in enumerate(zip(spec.mean, spec.std, strict=True)):
        expected = (images[..., channel].astype("float64") - mean) / std
        np.testing.assert_allclose(result[..., channel], expected, rtol=0, atol=ROUNDING * max(1, 255 / std / 4.7))


@pytest.mark.parity
@pytest.mark.parametrize("name", IMAGENET)
def test_mean_and_deviation_are_timms_for_the_released_weights(name):
    reason = 'needs torch and timm: pip install -e ".[parity]"'
    pytest.importorskip("torch", reason=reason)
    with torchvision_for_import():
        timm = pytest.importorskip("timm", reason=reason)
    theirs = timm.get_pretrained_cfg(IMAGENET[name].repo.removeprefix("timm/"))
    np.testing.assert_allclose(spec_of(name).mean, 255 * np.array(theirs.mean), rtol=1e-12)
    np.testing.assert_allclose(spec_of(name).std, 255 * np.array(theirs.std), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float16", "float32", "float64"])
def test_array_gives_an_array_and_stays_as_it_is(dtype):
    images = pixels(CIFAR, 2, 4, 4, dtype=dtype)
    before = images.copy()
    result = preprocess_input(images, CIFAR)
    assert type(result) is np.ndarray and result.dtype == np.float32
    assert images.dtype == dtype and np.array_equal(images, before)
    # Whole pixels are the same number in each of these types.
    np.testing.assert_array_equal(result, preprocess_input(before.astype("uint8"), CIFAR))


def test_array_that_must_not_be_written_is_no_obstacle():
    images = pixels(CIFAR, 1, 2, 2, dtype="float32")
    images.flags.writeable = False
    assert preprocess_input(images, CIFAR).flags.writeable


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float16", "float32", "float64"])
def test_tensor_gives_a_tensor_of_the_same_numbers(dtype):
    images = pixels(CIFAR, 2, 4, 4, dtype=dtype)
    tensor = tf.constant(images)
    result = preprocess_input(tensor, CIFAR)
    assert tf.is_tensor(result) and result.dtype == tf.float32
    np.testing.assert_array_equal(tensor, images)
    np.testing.assert_allclose(result, preprocess_input(images, CIFAR), rtol=0, atol=ROUNDING)


def test_variable_gives_the_numbers_of_its_value_and_keeps_it():
    images = pixels(CIFAR, 1, 2, 2, dtype="float32")
    variable = keras.Variable(images)
    result = preprocess_input(variable, CIFAR)
    np.testing.assert_allclose(result, preprocess_input(images, CIFAR), rtol=0, atol=ROUNDING)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), images)


def test_pipeline_of_decoded_images_is_preprocessed_in_its_graph():
    images = pixels(CIFAR, 5, 4, 6)
    encoded = tf.data.Dataset.from_tensor_slices([tf.io.encode_png(image) for image in images])
    decoded = encoded.map(lambda image: preprocess_input(tf.io.decode_png(image, channels=3), CIFAR))
    np.testing.assert_allclose(list(decoded), preprocess_input(images, CIFAR), rtol=0, atol=ROUNDING)


def test_symbolic_tensor_gives_a_part_of_a_network():
    images = keras.Input((None, None, 3), dtype="uint8")
    model = keras.Model(images, preprocess_input(images, CIFAR))
    x = pixels(CIFAR, 2, 4, 5)
    np.testing.assert_allclose(model(x), preprocess_input(x, CIFAR), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("kind", [np.asarray, tf.constant], ids=["array", "tensor"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_stays_so_and_where_it_is(value, kind):
    images = pixels(CIFAR, 1, 2, 2, dtype="float32")
    images[0, 1, 0, 2] = value
    result = np.asarray(preprocess_input(kind(images), CIFAR))
    np.testing.assert_equal(result[0, 1, 0, 2], np.float32(value))
    assert np.isfinite(result).sum() == result.size - 1


@pytest.mark.parametrize("shape", [(4, 5, 3), (1, 4, 5, 3), (2, 7, 4, 5, 3), (0, 4, 5, 3)])
def test_any_number_of_images_will_do(shape):
    assert preprocess_input(np.zeros(shape, "uint8"), CIFAR).shape == shape


@pytest.mark.parametrize("kind", [np.zeros, tf.zeros, keras.KerasTensor], ids=["array", "tensor", "symbolic"])
@pytest.mark.parametrize("shape", [(2, 4, 4, 1), (2, 4, 4, 4), (2, 3, 4, 4), (4, 3), (3,), ()])
def test_other_channels_are_refused(shape, kind):
    message = one_line(f"{CIFAR} takes images (..., height, width, 3). Received: {shape}")
    with pytest.raises(ValueError, match=message):
        preprocess_input(kind(shape), CIFAR)


def test_network_of_gray_images_takes_one_channel():
    with pytest.raises(
        ValueError, match=one_line(f"{DIGITS} takes images (..., height, width, 1). Received: (8, 8, 3)")
    ):
        preprocess_input(np.zeros((8, 8, 3)), DIGITS)


def test_images_of_unknown_rank_are_refused():
    def prepare(image):
        with pytest.raises(ValueError, match=one_line(f"{CIFAR} takes images (..., height, width, 3). Received: ")):
            preprocess_input(tf.io.decode_image(image), CIFAR)
        return image

    tf.data.Dataset.from_tensors(tf.constant(b"")).map(prepare)


@pytest.mark.parametrize("x", [[[[1, 2, 3]]], None, "image.png", 3])
def test_what_is_no_image_is_refused(x):
    message = one_line(f"{CIFAR} takes images (..., height, width, 3). Received: {type(x).__name__}")
    with pytest.raises(ValueError, match=message):
        preprocess_input(x, CIFAR)


def test_unknown_network_is_refused_with_the_nearest_names():
    with pytest.raises(ValueError, match=one_line("There is no network 'seresnet50'", "se_resnet50")):
        preprocess_input(np.zeros((8, 8, 3)), "seresnet50")
    with pytest.raises(TypeError, match=one_line("The name of a network must be a string. Received: None")):
        preprocess_input(np.zeros((8, 8, 3)), None)


# include_preprocessing.


@pytest.mark.slow
@pytest.mark.parametrize("name", NORMALIZED.values())
def test_layer_computes_what_the_function_does(name):
    with keras.StatelessScope(initialize_variables=False):
        layer = create(name, include_preprocessing=True).get_layer("preprocessing")
    keras.utils.clear_session()  # or the next scope would give the variables values after all
    images = pixels(name, 2, 8, 8)
    bound = ROUNDING * max(1, 255 / min(spec_of(name).std) / 4.7)
    np.testing.assert_allclose(layer(images), preprocess_input(images, name), rtol=0, atol=bound)


def test_network_gives_for_pixels_what_it_gives_for_preprocessed_ones(networks):
    model, inner = networks
    images = pixels(CIFAR, 4, 32, 32)
    # Another rounding of the input: 4e-7 of the outputs' range, measured. Pixels that are off by half a
    # step, as by a mean that was rounded, are off by far more.
    bound = 1e-5
    assert difference(outputs_of(inner, preprocess_input(images, CIFAR)), outputs_of(model, images)) <= bound
    assert difference(outputs_of(inner, preprocess_input(images + 0.5, CIFAR)), outputs_of(model, images)) > 10 * bound


def test_pixels_may_be_bytes(networks):
    model, _ = networks
    bytes_in = create(CIFAR, include_preprocessing=True, input_tensor=keras.Input((32, 32, 3), dtype="uint8"))
    bytes_in.set_weights(model.get_weights())
    images = pixels(CIFAR, 2, 32, 32)
    np.testing.assert_array_equal(bytes_in(images), model(images.astype("float32")))


def test_network_without_it_has_no_layer_for_it():
    assert "preprocessing" not in [layer.name for layer in create(DIGITS).layers]


def test_weights_are_the_same_by_name_with_and_without(networks):
    model, inner = networks
    assert [weight.path for weight in model.weights] == [weight.path for weight in inner.weights]


def test_saved_network_gives_the_same(networks, tmp_path):
    model, _ = networks
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    images = pixels(CIFAR, 2, 32, 32)
    np.testing.assert_array_equal(loaded(images), model(images))


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".weights.h5", ".keras"])
@pytest.mark.parametrize("within", [True, False], ids=["from pixels", "from preprocessed"])
def test_weights_files_go_both_ways(within, suffix, networks, tmp_path):
    source = networks[0 if within else 1]
    path = tmp_path / f"model{suffix}"
    source.save(path) if suffix == ".keras" else source.save_weights(path)
    loaded = create(CIFAR, weights=path, include_preprocessing=not within)
    for ours, theirs in zip(loaded.weights, source.weights, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name, channels, takes", [(CIFAR, 1, 3), (CIFAR, 4, 3), (DIGITS, 3, 1)])
def test_other_channels_cannot_be_preprocessed(name, channels, takes):
    message = one_line(f"{name} preprocesses {takes} channels. Received: input_shape=(32, 32, {channels})")
    with pytest.raises(ValueError, match=message):
        create(name, input_shape=(32, 32, channels), include_preprocessing=True)


def test_lowered_network_gives_the_same_for_pixels(networks):
    model, _ = networks
    images = pixels(CIFAR, 4, 32, 32, dtype="float32")
    # BatchNorm is folded into the convolutions: other roundings of the same sums in 20 layers, 2e-7 measured.
    assert difference(outputs_of(model, images), outputs_of(lower(model), images)) <= 1e-5


@pytest.mark.slow
def test_litert_file_takes_pixels(networks):
    model, _ = networks
    images = pixels(CIFAR, 4, 32, 32, dtype="float32")
    exported = to_litert(model, held_out=images)
    # The same float32 sums in XNNPACK's order.
    assert difference(outputs_of(model, images), list(LiteRTRunner(exported.content)(images).values())) <= 1e-4


# decode_predictions.


@pytest.fixture
def class_names(monkeypatch):
    """Keras' table of classes, stood in by names that say their number."""
    table = {str(n): [f"n{n:08d}", f"class_{n}"] for n in range(1000)}
    monkeypatch.setattr(imagenet_utils, "CLASS_INDEX", table)


def probabilities(samples=3):
    p = np.random.default_rng(0).exponential(size=(samples, 1000)).astype("float32")
    return p / p.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("kind", [np.asarray, tf.constant, np.ndarray.tolist], ids=["array", "tensor", "list"])
@pytest.mark.parametrize("top", [1, 5, 1000])
def test_most_probable_classes_come_first_with_their_names(top, kind, class_names):
    p = probabilities()
    decoded = decode_predictions(kind(p), top=top)
    assert [len(classes) for classes in decoded] == [top] * len(p)
    for row, classes in zip(p, decoded, strict=True):
        numbers = [int(synset[1:]) for synset, _, _ in classes]
        assert numbers == list(np.argsort(-row)[:top])
        assert [name for _, name, _ in classes] == [f"class_{n}" for n in numbers]
        np.testing.assert_array_equal([probability for _, _, probability in classes], row[numbers])


def test_five_classes_unless_told(class_names):
    assert len(decode_predictions(probabilities(1))[0]) == 5


def test_no_images_have_no_classes(class_names):
    assert decode_predictions(np.zeros((0, 1000))) == []


def test_prediction_of_a_network_is_decoded(class_names):
    model = create("se_mobilenet_025", input_shape=(32, 32, 3), include_preprocessing=True)
    p = model(pixels("se_mobilenet_025", 2, 32, 32), training=False)
    assert [int(classes[0][0][1:]) for classes in decode_predictions(p, top=1)] == list(np.argmax(p, axis=1))


@pytest.mark.parametrize("shape", [(1000,), (2, 10), (2, 1001), (1, 2, 1000), ()])
def test_other_shapes_are_refused(shape, class_names):
    message = one_line(f"decode_predictions takes probabilities (samples, 1000). Received: {shape}")
    with pytest.raises(ValueError, match=message):
        decode_predictions(np.zeros(shape))


@pytest.mark.parametrize("top", [0, -1, 1001, 2.0, True, None, "5"])
def test_top_that_is_no_number_of_classes_is_refused(top, class_names):
    with pytest.raises(ValueError, match=one_line(f"top must be an int from 1 to 1000. Received: top={top!r}")):
        decode_predictions(probabilities(), top=top)


@pytest.fixture
def unreachable(tmp_path, monkeypatch):
    """Keras' file of names is missing, and its URL is a local port without a server."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/imagenet_class_index.json"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(imagenet_utils, "CLASS_INDEX", None)
    monkeypatch.setattr(imagenet_utils, "CLASS_INDEX_PATH", url)
    monkeypatch.setattr(config, "_KERAS_DIR", str(tmp_path))
    return tmp_path


def test_names_that_cannot_be_fetched_are_told_in_one_line(unreachable):
    message = one_line("Keras' file of class names could not be downloaded: URL fetch failure", "Connection refused")
    with pytest.raises(OSError, match=message):
        decode_predictions(probabilities())
    assert not [path for path in unreachable.rglob("*") if path.is_file()]


def test_file_of_names_that_was_changed_is_not_used(unreachable):
    folder = unreachable / "models"
    folder.mkdir()
    (folder / "imagenet_class_index.json").write_text(json.dumps({"0": ["n0", "foreign"]}))
    with pytest.raises(OSError, match=one_line("Keras' file of class names could not be downloaded: ")):
        decode_predictions(probabilities())
