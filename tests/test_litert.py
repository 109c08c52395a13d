"""LiteRT files run, agree with Keras, contain only builtin operators, and are saved atomically."""

import errno
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from export_fixtures import Subclassed, grouped_network, images_for, scattered
from keras import layers

from se_keras.catalogue import create
from se_keras.export.benchmark.results import require_pair
from se_keras.export.litert import conversion as litert
from se_keras.export.litert import file, inspection
from se_keras.export.litert.conversion import to_litert
from se_keras.export.litert.file import LiteRTModel, LiteRTRunner, load_litert
from se_keras.export.litert.metadata import detach
from se_keras.export.model import trace
from se_keras.export.verification import verify
from se_keras.images import calibration_images
from se_keras.layers import SqueezeExcite
from se_keras.training.data import digits

BUILTIN = {code: name for name, code in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
TYPES = {code: name for name, code in vars(schema.TensorType).items() if not name.startswith("_")}


@pytest.fixture(scope="module")
def data():
    return digits()


@pytest.fixture(scope="module")
def trained(trained_digits):
    """A network that knows the digits: 97 % of the test after three epochs."""
    return keras.saving.load_model(trained_digits / "model.keras")


@pytest.fixture(scope="module")
def expected(trained, data):
    """The probabilities that Keras gives for the test images."""
    return trained.predict(data.test.images, verbose=0)


@pytest.fixture(scope="module")
def float32(trained_digits):
    return load_litert(trained_digits / "float32.tflite")


@pytest.fixture(scope="module")
def int8(trained, data, float32):
    return to_litert(
        trained,
        precision="int8",
        calibration=data.train.images[:100],
        held_out=data.test.images,
        converted=float32,
    )


@pytest.fixture(scope="module")
def published(trained):
    return to_litert(trained, lowering=False)


@pytest.fixture(scope="module")
def logits():
    """A network without softmax at its end, in both precisions."""
    model = create("se_resnet11_digits", classes=10, classifier_activation=None)
    return both(model, pixels(5, (8, 8, 1)))


@pytest.fixture(scope="module")
def grouped():
    """A small network with grouped convolutions, in both precisions."""
    keras.utils.set_random_seed(0)
    model = scattered(grouped_network())
    return both(model, images_for(model, samples=20))


@pytest.fixture(scope="module")
def networks(float32, int8, grouped):
    return {"digits": {"float32": float32, "int8": int8}, "grouped": grouped}


def both(model, images):
    """A model in both precisions."""
    full = to_litert(model)
    return {"float32": full, "int8": to_litert(model, precision="int8", calibration=images, converted=full)}


def small(function=lambda x: layers.ReLU()(layers.Conv2D(3, 1, name="conv")(x)), shape=(4, 4, 2)):
    """A model of one convolution or of `function`, which is converted fast."""
    images = keras.Input(shape, name="images")
    return keras.Model(images, function(images), name="small")


@pytest.fixture(scope="module")
def tiny():
    """A small model and its float32 file."""
    keras.utils.set_random_seed(0)
    model = small()
    return model, to_litert(model)


def pixels(samples, shape=(4, 4, 2), seed=0):
    return np.random.default_rng(seed).normal(size=(samples, *shape)).astype("float32")


@pytest.fixture
def calibrated_on(monkeypatch):
    """The images that each int8 file of the test is calibrated on."""
    calibrated, quantize = [], litert.quantize

    def recording(content, precision, *, images, **options):
        calibrated.extend([images] if precision == "int8" else [])
        return quantize(content, precision, images=images, **options)

    monkeypatch.setattr(litert, "quantize", recording)
    return calibrated


def run(content, images, **options):
    """Outputs of a file from the runtime itself, without any of the project's code."""
    interpreter = Interpreter(model_content=content, num_threads=1, **options)
    signature = interpreter.get_signature_runner("serving_default")
    results = [signature(images=image[None]) for image in images]
    return {name: np.concatenate([result[name] for result in results]) for name in results[0]}


def parsed(content):
    """The flatbuffer's only graph, and the names of its operators."""
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    (graph,) = model.subgraphs
    # Newer operators have their code in the second field, older ones in both.
    codes = [max(code.deprecatedBuiltinCode, code.builtinCode) for code in model.operatorCodes]
    return graph, [BUILTIN[codes[operator.opcodeIndex]] for operator in graph.operators]


def operands(content, name):
    """Types of the tensors of each operator of a name: inputs, then outputs."""
    graph, names = parsed(content)
    for operator, its_name in zip(graph.operators, names, strict=True):
        if its_name == name:
            yield [TYPES[graph.tensors[i].type] for i in (*operator.inputs, *operator.outputs)]


# What the files compute.


def test_training_was_long_enough_to_tell_digits_apart(expected, data):
    # The ten probabilities of an untrained network are almost equal, whether the export is good or bad.
    assert (expected.argmax(axis=1) == data.test.labels).mean() > 0.9


def test_float32_file_gives_keras_probabilities(float32, expected, data):
    actual = run(float32.content, data.test.images)["probabilities"]
    # Eleven layers in float32, 1.2e-7 each: 7e-7 measured.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_float32_file_does_without_xnnpack(float32, expected, data):
    kernels = {"experimental_op_resolver_type": OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES}
    actual = run(float32.content, data.test.images[:60], **kernels)["probabilities"]
    np.testing.assert_allclose(actual, expected[:60], rtol=0, atol=1e-5)


def test_int8_file_finds_the_digits_that_keras_finds(int8, expected, data):
    actual = run(int8.content, data.test.images)["probabilities"]
    # A step of int8 is 1/255 of a tensor's range, which changes the class of a few scans: 1 of 360 measured, 7 allowed.
    assert (actual.argmax(axis=1) == expected.argmax(axis=1)).mean() >= 0.98


def test_int8_probabilities_are_near_keras_on_the_mean(int8, expected, data):
    actual = run(int8.content, data.test.images)["probabilities"]
    # 0.005 measured; the probabilities of another scan are 0.17 off.
    assert np.abs(actual - expected).mean() <= 0.015


def test_int8_probabilities_sum_to_one(int8, data):
    actual = run(int8.content, data.test.images[:20])["probabilities"]
    np.testing.assert_allclose(actual.sum(axis=1), 1, rtol=0, atol=1e-6)  # a softmax in int8 is 1/256 off


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_runner_gives_what_the_runtime_gives(precision, data, request):
    model = request.getfixturevalue(precision)
    images = data.test.images[:20]
    ours, theirs = model.runner()(images), run(model.content, images)
    np.testing.assert_array_equal(ours["probabilities"], theirs["probabilities"])  # the same kernels and file


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_two_threads_give_what_one_gives(precision, data, request):
    model = request.getfixturevalue(precision)
    images = data.test.images[:20]
    one, two = (model.runner(threads=threads)(images)["probabilities"] for threads in (1, 2))
    np.testing.assert_allclose(two, one, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_published_form_gives_keras_probabilities_too(published, expected, data):
    actual = run(published.content, data.test.images)["probabilities"]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_int8_file_is_a_good_deal_smaller(float32, int8):
    # One byte for a weight instead of four. The sizes of scales, names and the graph stay.
    assert len(int8.content) < len(float32.content) / 2


# What is in the files.


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("network", ["digits", "grouped"])
def test_operators_are_builtin(network, precision, networks):
    content = networks[network][precision].content
    _, names = parsed(content)
    assert "CONV_2D" in names
    assert {"CUSTOM", "DELEGATE"} & set(names) == set()  # TensorFlow's own (Flex) operators are custom ones
    codes = schema.ModelT.InitFromPackedBuf(content, 0).operatorCodes
    assert not any(code.customCode for code in codes)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_squeeze_is_a_mean(precision, request):
    # AVERAGE_POOL_2D is not delegated to XNNPACK in int8. Three squeezes and the pooling of the classifier.
    _, names = parsed(request.getfixturevalue(precision).content)
    assert names.count("MEAN") == 4
    assert "AVERAGE_POOL_2D" not in names


def test_batchnorm_left_no_operator(float32):
    # 1 in the stem, 3 in each block, 3 projections, 2 in each recalibration.
    _, names = parsed(float32.content)
    assert names.count("CONV_2D") == 1 + 3 * 3 + 3 + 3 * 2
    assert (names.count("MUL"), names.count("ADD")) == (3, 3)  # recalibrations; residual sums
    assert "SUB" not in names


def test_int8_convolutions_compute_in_int8(int8):
    convolutions = list(operands(int8.content, "CONV_2D"))
    assert len(convolutions) == 19
    assert all(types == ["INT8", "INT8", "INT32", "INT8"] for types in convolutions)


@pytest.mark.parametrize("operator", ["ADD", "MUL", "MEAN", "LOGISTIC", "FULLY_CONNECTED"])
def test_int8_file_has_no_float_island(int8, operator):
    found = list(operands(int8.content, operator))
    assert found and all(set(types) <= {"INT8", "INT32"} for types in found)


def test_int8_weights_have_a_scale_for_each_channel(int8):
    graph, names = parsed(int8.content)
    kernels = [
        graph.tensors[operator.inputs[1]]
        for operator, name in zip(graph.operators, names, strict=True)
        if name == "CONV_2D"
    ]
    assert all(len(kernel.quantization.scale) == kernel.shape[0] for kernel in kernels)


def test_softmax_stays_in_float(int8):
    assert list(operands(int8.content, "SOFTMAX")) == [["FLOAT32", "FLOAT32"]]


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_input_and_output_are_float32(precision, request):
    graph, _ = parsed(request.getfixturevalue(precision).content)
    assert [TYPES[graph.tensors[i].type] for i in (*graph.inputs, *graph.outputs)] == ["FLOAT32", "FLOAT32"]


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_signature_is_from_images_to_probabilities(precision, request):
    interpreter = Interpreter(model_content=request.getfixturevalue(precision).content)
    assert interpreter.get_signature_list() == {"serving_default": {"inputs": ["images"], "outputs": ["probabilities"]}}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_logits_have_the_name_that_keras_gives_them(precision, logits):
    interpreter = Interpreter(model_content=logits[precision].content)
    assert interpreter.get_signature_list()["serving_default"]["outputs"] == ["predictions"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "function",
    [
        lambda x: layers.BatchNormalization(name="last")(layers.Conv2D(3, 1, name="conv")(x)),
        lambda x: SqueezeExcite(2, name="last")(layers.Conv2D(4, 1, name="conv")(x)),
        lambda x: layers.Dropout(0.5, name="last")(layers.Conv2D(3, 1, name="conv")(x)),
        lambda x: small()(x),
    ],
    ids=["BatchNormalization", "SqueezeExcite", "Dropout", "model"],
)
def test_output_keeps_its_name_where_lowering_renames_the_last_layer(function):
    model = small(function)
    assert list(to_litert(model).manifest["signature"]["outputs"]) == model.output_names


def test_softmax_in_a_layer_of_its_own_gives_probabilities():
    model = small(lambda x: layers.Softmax()(layers.Flatten()(x)))
    assert list(to_litert(model).manifest["signature"]["outputs"]) == ["probabilities"]


def test_several_outputs_are_compared_by_name():
    model = small(lambda x: [layers.ReLU(name="b")(x), layers.Conv2D(3, 1, name="a")(x)])
    exported = to_litert(model)
    x = pixels(3)
    actual = exported.runner()(x)
    for name, values in zip(("b", "a"), model(x), strict=True):
        np.testing.assert_allclose(actual[name], values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("keys", [("boxes", "scores"), ("scores", "boxes"), ("P2",)])
def test_outputs_of_a_dict_have_its_keys(keys):
    # Sorted by key, the layers are not sorted by name.
    model = small(lambda x: {key: layers.Conv2D(3, 1, name=f"{9 - i}_layer")(x) for i, key in enumerate(keys)})
    exported, x = to_litert(model), pixels(3)
    expected, actual = model(x), exported.runner()(x)
    assert set(actual) == set(exported.manifest["signature"]["outputs"]) == set(keys)
    for key in keys:
        np.testing.assert_allclose(actual[key], expected[key], rtol=0, atol=1e-6)


def test_outputs_of_one_layer_have_different_names():
    shared = layers.Conv2D(3, 1, name="head")
    model = small(lambda x: [shared(x), shared(layers.ReLU()(x))])
    exported, x = to_litert(model), pixels(3)
    for name, values in zip(("head", "head_1"), model(x), strict=True):
        np.testing.assert_allclose(exported.runner()(x)[name], values, rtol=0, atol=1e-6)


# Mixed precision, and functions in memory.


@pytest.mark.parametrize("lowering", [True, False], ids=["lowered", "published"])
def test_mixed_precision_is_compared_with_its_float32_model(lowering, mixed_float16):
    mixed = small(lambda x: SqueezeExcite(2)(layers.Conv2D(4, 3)(x)), (8, 8, 2))
    made = to_litert(mixed, held_out=pixels(8, (8, 8, 2)), lowering=lowering)
    # float32 rounds to 6e-8, float16 to 5e-4.
    assert made.manifest["agreement"]["max_error"] < 1e-5
    assert 1e-5 < made.manifest["trained_precision"]["max_error"] < 1e-2


def test_mixed_precision_that_overflows_is_converted(mixed_float16):
    mixed = small(lambda x: layers.Rescaling(1e-4)(layers.Rescaling(1e5)(x)))
    assert to_litert(mixed, held_out=pixels(2)).manifest["trained_precision"] is None


def test_float32_has_no_other_precision(tiny):
    assert "trained_precision" not in tiny[1].manifest


def test_error_of_a_layer_does_not_blame_an_input_shape_that_was_not_given():
    model = small(lambda x: layers.Activation(functools.partial(keras.ops.leaky_relu, negative_slope=0.1), name="a")(x))
    with pytest.raises(ValueError, match=r"^a cannot be copied: "):
        to_litert(model)
    assert to_litert(model, lowering=False).manifest["agreement"]["max_error"] < 1e-6


# Files of other programs that leave the size of images free.


@pytest.fixture(scope="module")
def free(tmp_path_factory):
    """A model that takes images of any size, and the path of its file by TensorFlow's converter."""
    images = keras.Input((None, None, 3), name="images")
    x = layers.Conv2D(4, 5, strides=2)(images)  # the interpreter's own size, 1x1, is too small
    model = scattered(keras.Model(images, layers.ReLU()(x), name="free"))
    folder = tmp_path_factory.mktemp("free")
    trace(model, folder / "saved")
    (folder / "free.tflite").write_bytes(tf.lite.TFLiteConverter.from_saved_model(str(folder / "saved")).convert())
    return model, folder / "free.tflite"


def test_free_size_is_shown_as_free(free):
    assert load_litert(free[1]).runner().input_shape == (None, None, None, 3)
    found = inspection.inspect(free[1])
    assert [x.shape for x in (*found.inputs, *found.outputs)] == [(None, None, None, 3), (None, None, None, 4)]


def test_file_of_a_free_size_runs_at_the_size_of_the_images(free):
    model, path = free
    runner = load_litert(path).runner()
    for size in ((16, 16), (33, 20), (16, 16)):
        x = pixels(3, (*size, 3))
        (actual,) = runner(x).values()
        np.testing.assert_allclose(actual, model(x), rtol=0, atol=1e-5)
    assert verify(model, path).agreement.max_error < 1e-5


@pytest.mark.parametrize("shape", [(16, 16, 4), (2, 2, 3)], ids=["channels", "too small"])
def test_images_that_a_file_of_a_free_size_does_not_take_are_refused(shape, free):
    message = rf"Images must have a shape that the file takes, \(None, None, None, 3\). Received: \(1, {shape[0]}, "
    runner = load_litert(free[1]).runner()
    with pytest.raises(ValueError, match=message):
        runner(pixels(1, shape))
    assert len(runner(pixels(1, (16, 16, 3)))) == 1  # it still runs


def test_files_of_a_free_size_are_no_pair_to_time(free):
    runner = load_litert(free[1]).runner()
    with pytest.raises(ValueError, match=r"^A pair needs images of a fixed size. Received: files of \(None, None, "):
        require_pair(runner, runner)


# Delegation.


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("network", ["digits", "grouped"])
def test_xnnpack_takes_every_operator(network, precision, networks):
    assert networks[network][precision].runner().undelegated() == []


def test_operator_that_xnnpack_does_not_take_is_named():
    model = small(lambda x: layers.Conv2D(3, 1)(keras.ops.cumsum(layers.Conv2D(3, 1)(x), axis=1)))
    assert to_litert(model).runner().undelegated() == ["CUMSUM"]


def test_operators_that_fell_off_are_named_once_for_each():
    model = small(lambda x: keras.ops.cumsum(layers.Conv2D(3, 1)(keras.ops.cumsum(x, axis=1)), axis=2))
    assert to_litert(model).runner().undelegated() == ["CUMSUM", "CUMSUM"]


def test_operator_that_xnnpack_takes_in_float32_alone_is_named_in_int8():
    model = small(lambda x: layers.Conv2D(3, 1)(layers.Activation("hard_swish")(layers.Conv2D(3, 1)(x))))
    full = to_litert(model)
    quantized = to_litert(model, precision="int8", calibration=pixels(5), converted=full)
    assert full.runner().undelegated() == []
    assert quantized.runner().undelegated() == ["HARD_SWISH"]


def test_operator_that_is_not_builtin_is_an_error_that_names_it(capfd):
    model = small(lambda x: keras.ops.erfinv(keras.ops.tanh(x)))
    with pytest.raises(ValueError, match="Erfinv") as error:
        to_litert(model)
    assert "FlexErfinv" not in str(error.value)  # its name in a file with operators of TensorFlow


# Calibration data.

IMAGES = pixels(10)


def labelled(images):
    return tf.data.Dataset.from_tensor_slices((images, np.arange(len(images))))


@pytest.mark.parametrize(
    "calibration",
    [
        IMAGES,
        IMAGES.astype("float64"),
        tf.constant(IMAGES),
        list(IMAGES),
        [IMAGES[:4], IMAGES[4:]],
        [*IMAGES[:3], IMAGES[3:]],
        IMAGES.tolist(),
        (image for image in IMAGES),
        labelled(IMAGES),
        labelled(IMAGES).batch(4),
        labelled(IMAGES).map(lambda image, label: image).batch(3),
        [(IMAGES[:4], np.arange(4)), (IMAGES[4:], np.arange(6))],
        (IMAGES, np.arange(10)),
        [[IMAGES[:4], np.arange(4)], [IMAGES[4:], np.arange(6)]],
        lambda: ([image[None]] for image in IMAGES),
        {"image": IMAGES, "label": np.arange(10)},
        labelled(IMAGES).map(lambda image, label: {"image": image, "label": label}),
        labelled(IMAGES).map(lambda image, label: ({"image": image}, label)).batch(4),
    ],
    ids=[
        "array",
        "float64",
        "tensor",
        "list of images",
        "list of batches",
        "images and batches",
        "nested lists",
        "generator",
        "dataset",
        "dataset of batches",
        "dataset without labels",
        "pairs",
        "images and labels",
        "pairs in lists",
        "representative_dataset",
        "dict",
        "dataset of dicts",
        "dataset of dicts and labels",
    ],
)
def test_calibration_takes(calibration):
    images = calibration_images(calibration, (4, 4, 2))
    assert images.dtype == "float32"
    np.testing.assert_array_equal(images, IMAGES)


@pytest.mark.parametrize(
    "endless",
    [lambda: labelled(IMAGES).repeat(), lambda: labelled(IMAGES).batch(3).repeat(), lambda: itertools.repeat(IMAGES)],
    ids=["dataset", "batches", "generator"],
)
def test_of_endless_calibration_data_a_limited_number_is_read(endless):
    with pytest.warns(UserWarning, match="Calibration read 2,048 images: of data without a length.+ at most 2,048 are"):
        images = calibration_images(endless(), (4, 4, 2))
    assert images.shape == (2048, 4, 4, 2)


def test_data_with_a_length_are_read_to_their_end():
    for data in (labelled(IMAGES).repeat(300), list(IMAGES) * 300):
        assert len(calibration_images(data, (4, 4, 2))) == 3000


@pytest.mark.parametrize("data", [{"a": IMAGES, "b": IMAGES}, {"a": np.arange(10)}], ids=["two", "none"])
def test_dict_with_other_than_one_entry_of_the_shape_is_refused(data):
    with pytest.raises(TypeError, match="Calibration data must be arrays of numbers.+ Received: "):
        calibration_images([data], (4, 4, 2))


def test_single_image_is_calibration_data():
    assert calibration_images(IMAGES[0], (4, 4, 2)).shape == (1, 4, 4, 2)


def test_bytes_become_float32_as_they_are():
    images = np.arange(32, dtype="uint8").reshape(1, 4, 4, 2)
    np.testing.assert_array_equal(calibration_images(images, (4, 4, 2)), images.astype("float32"))


@pytest.mark.parametrize(
    "calibration",
    [[], np.zeros((0, 4, 4, 2)), [np.zeros((0, 4, 4, 2))], iter(())],
    ids=["list", "array", "batch", "iterator"],
)
def test_no_calibration_image_is_an_error(calibration):
    with pytest.raises(ValueError, match=r"at least one image of \(4, 4, 2\). Received: none"):
        calibration_images(calibration, (4, 4, 2))


@pytest.mark.parametrize("shape", [(10, 4, 4, 1), (10, 5, 4, 2), (10, 4, 4), (10,), (), (2, 10, 4, 4, 2)])
def test_calibration_images_of_another_shape_are_an_error(shape):
    with pytest.raises(ValueError, match=r"must be \(4, 4, 2\). Received: \("):
        calibration_images([np.zeros(shape)], (4, 4, 2))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_calibration_value_that_is_not_finite_is_an_error_that_says_where(bad):
    images = IMAGES.copy()
    images[[3, 7], 0, 0, 0] = bad
    with pytest.raises(ValueError, match="in 2 of 10 images, the first in image 3"):
        calibration_images(images, (4, 4, 2))


@pytest.mark.parametrize("calibration", [["a.png", "b.png"], [{"image": 1}]], ids=repr)
def test_calibration_data_that_are_no_numbers_are_an_error(calibration):
    with pytest.raises(TypeError, match="must be arrays of numbers"):
        calibration_images(calibration, (4, 4, 2))


def test_calibration_that_cannot_be_iterated_is_an_error():
    with pytest.raises(TypeError):
        calibration_images(3, (4, 4, 2))


def test_every_fifth_calibration_image_is_compared_on_and_not_calibrated_on(tiny, calibrated_on):
    model, converted = tiny
    record = to_litert(model, precision="int8", calibration=pixels(12), converted=converted).manifest
    np.testing.assert_array_equal(calibrated_on[0], np.delete(pixels(12), [4, 9], axis=0))
    assert (record["calibration_images"], record["agreement"]["samples"]) == (10, 2)
    assert record["agreement"]["held_out"] is True


@pytest.mark.parametrize("samples", [1, 4])
def test_fewer_than_five_calibration_images_serve_for_both(tiny, calibrated_on, samples):
    model, converted = tiny
    record = to_litert(model, precision="int8", calibration=pixels(samples), converted=converted).manifest
    np.testing.assert_array_equal(calibrated_on[0], pixels(samples))
    assert (record["calibration_images"], record["agreement"]["samples"]) == (samples, samples)
    assert record["agreement"]["held_out"] is False


def test_held_out_images_are_those_compared_on(tiny):
    model, converted = tiny
    record = to_litert(
        model, precision="int8", calibration=pixels(10), held_out=pixels(7, seed=1), converted=converted
    ).manifest
    assert (record["agreement"]["samples"], record["agreement"]["held_out"]) == (7, True)


def test_float32_is_compared_on_noise_by_default(tiny):
    record = tiny[1].manifest
    assert (record["agreement"]["samples"], record["agreement"]["held_out"]) == (4, True)
    assert record["calibration_images"] == 0


def test_int8_of_a_generator(tiny):
    model, converted = tiny
    calibration = ((image, 0) for image in pixels(10))
    record = to_litert(model, precision="int8", calibration=calibration, converted=converted).manifest
    assert record["calibration_images"] == 8


# Arguments.


def test_converted_file_is_not_converted_again(tiny, monkeypatch):
    model, converted = tiny
    fresh = to_litert(model, precision="int8", calibration=pixels(10))
    monkeypatch.setattr(litert, "_convert", None)
    again = to_litert(model, precision="int8", calibration=pixels(10), converted=converted)
    assert again.content == fresh.content


@pytest.mark.parametrize("precision", ["float8", "INT8", "", None, 8])
def test_unknown_precision_is_an_error(precision):
    with pytest.raises(ValueError, match=r"precision must be one of \('float32', .+, 'int16x8'\). Received"):
        to_litert(small(), precision=precision)


def test_int8_needs_calibration_images():
    with pytest.raises(ValueError, match="precision='int8' needs calibration images"):
        to_litert(small(), precision="int8")


@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        (pixels(5, (4, 4, 3)), ValueError, r"must be \(4, 4, 2\)"),
        (pixels(5) * np.nan, ValueError, "must be finite"),
        ([], ValueError, "at least one image"),
        (["image.png"], TypeError, "arrays of numbers"),
    ],
    ids=["shape", "NaN", "empty", "strings"],
)
def test_bad_calibration_is_an_error_before_anything_is_converted(calibration, error, message, monkeypatch):
    monkeypatch.setattr(litert, "_convert", None)
    with pytest.raises(error, match=message):
        to_litert(small(), precision="int8", calibration=calibration)


@pytest.mark.parametrize("value", [0, 7])
def test_calibration_images_that_show_nothing_are_an_error(value):
    with pytest.raises(ValueError, match=rf"Calibration images must not be constant. Received: {value}.0 everywhere"):
        to_litert(small(), precision="int8", calibration=np.full((5, 4, 4, 2), value, "float32"))


@pytest.mark.parametrize("held_out", [pixels(5, (4, 4, 3)), pixels(5) * np.inf, []], ids=["shape", "infinity", "empty"])
def test_bad_held_out_images_are_an_error(tiny, held_out):
    model, converted = tiny
    with pytest.raises(ValueError):
        to_litert(model, held_out=held_out, converted=converted)


def test_several_inputs_are_an_error():
    inputs = [keras.Input((4, 4, 2), name="left"), keras.Input((4, 4, 2), name="right")]
    model = keras.Model(inputs, layers.Add()(inputs), name="pair")
    with pytest.raises(ValueError, match="Only models with one input can be exported. Received: pair with 2"):
        to_litert(model)


def test_free_size_needs_an_input_shape():
    with pytest.raises(ValueError, match=r"give input_shape. Received: a model of \(None, None, 2\)"):
        to_litert(small(shape=(None, None, 2)))


def test_input_shape_with_a_free_size_is_an_error():
    with pytest.raises(ValueError, match="fixed size"):
        to_litert(small(shape=(None, None, 2)), input_shape=(None, 6, 2))


def test_input_shape_fixes_a_free_size():
    model = small(shape=(None, None, 2))
    exported = to_litert(model, input_shape=(6, 5, 2))
    assert exported.runner().input_shape == (1, 6, 5, 2)
    x = pixels(2, (6, 5, 2))
    (actual,) = exported.runner()(x).values()
    np.testing.assert_allclose(actual, model(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 5, 2), (4, 4, 3), (4, 4)])
def test_input_shape_that_the_model_does_not_take_is_an_error(shape):
    with pytest.raises(ValueError):
        to_litert(small(lambda x: layers.Dense(2)(layers.Flatten()(x))), input_shape=shape)


@pytest.mark.parametrize("lowering", [True, False])
@pytest.mark.parametrize(
    "model", [Subclassed(), keras.Sequential([layers.ReLU()]), None], ids=["subclass", "unbuilt", "None"]
)
def test_what_is_no_functional_model_is_a_type_error(model, lowering):
    with pytest.raises(TypeError, match="functional"):
        to_litert(model, lowering=lowering)


@pytest.mark.parametrize("lowering", [True, False])
def test_sequential_model_is_exported(lowering):
    stack = [layers.Conv2D(4, 1), layers.BatchNormalization(), SqueezeExcite(2), layers.Flatten()]
    model = scattered(keras.Sequential([keras.Input((4, 4, 2), name="images"), *stack, layers.Dense(3)]))
    x = pixels(3)
    (actual,) = to_litert(model, lowering=lowering).runner()(x).values()
    np.testing.assert_allclose(actual, model(x, training=False), rtol=0, atol=1e-5)


def test_model_stays_as_it_was(tiny):
    model, converted = tiny
    weights, config = model.get_weights(), model.to_json()
    to_litert(model, precision="int8", calibration=pixels(5), converted=converted)
    assert all(map(np.array_equal, model.get_weights(), weights))
    assert model.to_json() == config


# Files that disagree with the model.


def test_file_that_disagrees_with_keras_is_an_error(tiny, monkeypatch):
    model, _ = tiny

    def other(model, **_):
        copy = keras.models.clone_model(model)
        copy.set_weights([weight + 0.01 for weight in model.get_weights()])
        return copy

    monkeypatch.setattr(litert, "lower", other)
    with pytest.raises(ValueError, match="The LiteRT file disagrees with the Keras model: max error"):
        to_litert(model)


def test_int8_file_that_is_far_from_keras_is_a_warning(trained, data, float32):
    # After calibration on dark images, all activations of a light image are clipped.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        to_litert(
            trained,
            precision="int8",
            calibration=data.train.images[:20] / 100,
            held_out=data.test.images[:40],
            converted=float32,
        )
    messages = [str(warning.message) for warning in caught if warning.category is UserWarning]
    assert any(line.startswith("The images have values in 0..0.01. ") for line in messages)
    assert any(line.startswith("The int8 file is far from the Keras model: ") for line in messages)


# Manifests.


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_manifest_speaks_of_this_file(precision, request):
    model = request.getfixturevalue(precision)
    assert model.manifest["sha256"] == hashlib.sha256(model.content).hexdigest()
    assert model.manifest["bytes"] == len(model.content)
    assert model.manifest["precision"] == precision


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_manifest_has_the_signature(precision, request):
    assert request.getfixturevalue(precision).manifest["signature"] == {
        "inputs": {"images": {"shape": [1, 8, 8, 1], "dtype": "float32"}},
        "outputs": {"probabilities": {"shape": [1, 10], "dtype": "float32"}},
    }


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_manifest_says_how_the_file_was_made(precision, request):
    record = request.getfixturevalue(precision).manifest
    assert (record["schema"], record["network"]) == (1, "se_resnet11_digits")
    assert record["lowering"] == {
        "hoisted": 3,
        "unhoisted": 0,
        "constant": 0,
        "folded": 13,
        "dropped": 0,
        "reasons": {},
    }
    installed = {package: importlib.metadata.version(package) for package in record["versions"]}
    assert record["versions"] == installed
    assert {"se-keras", "keras", "tensorflow", "ai-edge-litert", "ai-edge-quantizer"} <= set(installed)


@pytest.mark.slow
def test_manifest_of_the_published_form_has_no_lowering(published):
    assert published.manifest["lowering"] is None


def test_manifest_counts_the_calibration_images(float32, int8):
    assert (float32.manifest["calibration_images"], int8.manifest["calibration_images"]) == (0, 80)


def test_manifest_has_the_agreement_on_the_held_out_images(float32, int8, data):
    for model in (float32, int8):
        assert model.manifest["agreement"]["samples"] == len(data.test.images)
        assert model.manifest["agreement"]["held_out"] is True
    assert float32.manifest["agreement"]["max_error"] <= 1e-5
    assert float32.manifest["agreement"]["top1"] == 1.0
    assert 1e-4 < int8.manifest["agreement"]["mean_error"] <= 0.03  # the error of int8, and not more
    assert int8.manifest["agreement"]["cosine"] >= 0.98


# On the disk.


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def saved(tiny, tmp_path):
    """The path of a saved file with its manifest."""
    tiny[1].save(tmp_path / "small.tflite")
    return tmp_path / "small.tflite"


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_loaded_is_what_was_saved(precision, tmp_path, request):
    model = request.getfixturevalue(precision)
    model.save(tmp_path / "digits.tflite")
    assert load_litert(tmp_path / "digits.tflite") == model


def test_save_leaves_the_file_and_its_manifest_alone(saved):
    assert names_in(saved.parent) == ["small.tflite", "small.tflite.json"]


def test_saved_file_runs_in_the_runtime(saved, tiny):
    x = pixels(2)
    interpreter = Interpreter(model_path=str(saved))
    actual = interpreter.get_signature_runner("serving_default")(images=x[:1])
    np.testing.assert_array_equal(list(actual.values())[0], list(tiny[1].runner()(x[:1]).values())[0])


def test_path_may_be_a_string_in_a_new_folder(tiny, tmp_path):
    tiny[1].save(str(tmp_path / "new" / "small.tflite"))
    assert load_litert(str(tmp_path / "new" / "small.tflite")) == tiny[1]


@pytest.mark.parametrize("name", ["model", "model.keras", "model.tflite.json", "tflite"])
def test_name_that_does_not_end_in_tflite_is_an_error(tiny, tmp_path, name):
    with pytest.raises(ValueError, match="name ends in .tflite. Received: "):
        tiny[1].save(tmp_path / name)
    assert names_in(tmp_path) == []


def test_folder_that_cannot_be_written_is_an_os_error(tiny, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        tiny[1].save(tmp_path / "file" / "small.tflite")
    assert names_in(tmp_path) == ["file"]


def break_replace(monkeypatch):
    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", fail)


def fill_disk(monkeypatch):
    def fail(path, content):
        with open(path, "wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)


@pytest.mark.parametrize("failure", [break_replace, fill_disk])
def test_save_that_fails_leaves_the_old_file(saved, tiny, failure, monkeypatch):
    with monkeypatch.context() as patch:
        failure(patch)
        with pytest.raises(OSError):
            LiteRTModel(content=b"new", manifest={}).save(saved)
    assert load_litert(saved) == tiny[1]
    assert names_in(saved.parent) == ["small.tflite", "small.tflite.json"]


@pytest.mark.parametrize("failure", [break_replace, fill_disk])
def test_save_that_fails_leaves_nothing(tiny, failure, tmp_path, monkeypatch):
    failure(monkeypatch)
    with pytest.raises(OSError):
        tiny[1].save(tmp_path / "small.tflite")
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("has_manifest", [True, False], ids=["manifest", "no manifest"])
@pytest.mark.parametrize("done", range(3))
def test_save_that_ends_between_file_and_manifest_leaves_one_of_both_models(
    saved, int8, done, has_manifest, monkeypatch
):
    if not has_manifest:
        saved.with_name("small.tflite.json").unlink()
    old, steps, replace_ = load_litert(saved), [], os.replace

    def fail(path, target):
        if len(steps) == done:
            raise OSError(errno.EIO, "Input/output error")
        steps.append(Path(target).name)
        replace_(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="Input/output"):
            int8.save(saved)
    assert steps == ["small.tflite.json", "small.tflite"][:done]
    assert load_litert(saved) == (int8 if done == 2 else old)
    int8.save(saved)
    assert json.loads(saved.with_name("small.tflite.json").read_text()) == int8.manifest


def test_first_save_that_ends_between_manifest_and_file_leaves_no_file(int8, tmp_path, monkeypatch):
    replace_ = os.replace
    monkeypatch.setattr(os, "replace", lambda path, target: target.suffix == ".json" and replace_(path, target))
    int8.save(tmp_path / "int8.tflite")
    with pytest.raises(FileNotFoundError):
        load_litert(tmp_path / "int8.tflite")


def test_reader_that_finds_the_manifest_of_the_next_file_reads_again(saved, int8, monkeypatch):
    read_bytes, first = Path.read_bytes, []

    def saved_over_after_the_first_read(path):
        content = read_bytes(path)
        if path == saved and not first:
            first.append(path)
            int8.save(saved)
        return content

    monkeypatch.setattr(Path, "read_bytes", saved_over_after_the_first_read)
    assert load_litert(saved) == int8


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no LiteRT file '.*missing.tflite'"):
        load_litert(tmp_path / "missing.tflite")


def test_folder_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no LiteRT file"):
        load_litert(tmp_path)


@pytest.mark.parametrize("content", [b"", b"TFL3", b"not a model at all", b"PK\3\4" + bytes(100)])
def test_foreign_format_is_an_error(content, tmp_path):
    (tmp_path / "foreign.tflite").write_bytes(content)
    with pytest.raises(ValueError, match="foreign.tflite' is not a LiteRT file"):
        load_litert(tmp_path / "foreign.tflite")


def test_file_without_manifest_is_what_its_metadata_say(tiny, tmp_path):
    (tmp_path / "other.tflite").write_bytes(tiny[1].content)
    loaded = load_litert(tmp_path / "other.tflite")
    assert loaded.content == tiny[1].content
    assert loaded.manifest == {"network": "small", "precision": "float32"}


def test_file_without_manifest_and_metadata_is_named_after_itself(tiny, tmp_path):
    (tmp_path / "other.tflite").write_bytes(detach(tiny[1].content))
    assert load_litert(tmp_path / "other.tflite").manifest == {"network": "other", "precision": "unknown"}


@pytest.mark.parametrize("place", [0.02, 0.5, 0.9])
def test_one_flipped_bit_without_manifest_is_noticed(saved, place):
    saved.with_name("small.tflite.json").unlink()
    content = bytearray(saved.read_bytes())
    content[int(place * len(content))] ^= 1
    saved.write_bytes(content)
    with pytest.raises(ValueError, match="small.tflite': The (file is not the one|metadata of the file are damaged)"):
        load_litert(saved)


@pytest.mark.parametrize("place", [0, 20, 0.5, 0.9, -1])
def test_one_flipped_bit_is_noticed(saved, place):
    content = bytearray(saved.read_bytes())
    content[int(place * len(content)) if isinstance(place, float) else place] ^= 1
    saved.write_bytes(content)
    with pytest.raises(ValueError, match="its SHA-256 is not its manifest's"):
        load_litert(saved)


@pytest.mark.parametrize("length", [100, 0.5, -1])
def test_truncated_file_is_noticed(saved, length):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(length * len(content)) if isinstance(length, float) else length])
    with pytest.raises(ValueError, match="its SHA-256 is not its manifest's"):
        load_litert(saved)


def test_damaged_file_is_not_run(saved, monkeypatch):
    # Some flipped bits make the runtime abort the process, so the checksum is checked first.
    monkeypatch.setattr(file, "LiteRTRunner", None)
    content = bytearray(saved.read_bytes())
    content[len(content) // 2] ^= 1
    saved.write_bytes(content)
    with pytest.raises(ValueError, match="its SHA-256 is not its manifest's"):
        load_litert(saved)


@pytest.mark.parametrize(
    "length, message", [(0.5, "Not a LiteRT file that can be run here"), (-100, "The metadata of the")]
)
def test_truncated_file_without_manifest_is_an_error_that_names_it(saved, length, message):
    saved.with_name("small.tflite.json").unlink()
    content = saved.read_bytes()
    saved.write_bytes(content[: int(length * len(content)) if isinstance(length, float) else length])
    with pytest.raises(ValueError, match=f"small.tflite': {message}"):
        load_litert(saved)


@pytest.mark.parametrize("manifest", ["", "{", "[]", "3", "null", "{}", '{"network": "small"}', "\udcff"], ids=repr)
def test_damaged_manifest_is_an_error(saved, manifest):
    saved.with_name("small.tflite.json").write_bytes(manifest.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match="small.tflite.json' is not the manifest of a LiteRT file"):
        load_litert(saved)


def test_manifest_is_json_for_people(saved, tiny):
    text = saved.with_name("small.tflite.json").read_text()
    assert json.loads(text) == tiny[1].manifest
    assert text.count("\n") > 20


# The runner.


def test_runner_knows_the_input_shape(float32):
    assert float32.runner().input_shape == (1, 8, 8, 1)


@pytest.mark.parametrize(
    "content",
    [b"", b"text", b"\x1c\0\0\0TFL3", b"\x1c\0\0\0TFL3" + bytes(4000), b"\x1c\0\0\0TFL3" + bytes(range(256)) * 8],
    ids=["empty", "text", "magic", "zeros", "garbage"],
)
def test_runner_refuses_what_is_no_file(content):
    with pytest.raises(ValueError, match="Not a LiteRT file that can be run here: .+"):
        LiteRTRunner(content)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_runner_refuses_a_truncated_file(float32, share):
    with pytest.raises(ValueError, match="Not a LiteRT file that can be run here"):
        LiteRTRunner(float32.content[: int(share * len(float32.content))])


@pytest.mark.parametrize("seed", range(20))
def test_runner_refuses_random_bytes_behind_the_magic(seed):
    rng = np.random.default_rng(seed)
    with pytest.raises(ValueError, match="Not a LiteRT file that can be run here"):
        LiteRTRunner(b"\x1c\0\0\0TFL3" + rng.bytes(rng.integers(5000)))


@pytest.mark.parametrize(
    "argument, value",
    [
        ("converted", b"x"),
        ("precision", np.array(["int8", "float32"])),
        ("precision", ["int8"]),
        ("input_type", np.zeros(2)),
        ("output_type", ["int8"]),
        ("keep_float", 5),
    ],
)
def test_argument_of_another_type_is_refused(tiny, argument, value):
    match = f"{argument} must be of the type .+ Received: {type(value).__name__}$"
    with pytest.raises(TypeError, match=match):
        to_litert(tiny[0], **{argument: value})


@pytest.mark.parametrize("threads", [0, -1, 1.0, True, None, "2"])
def test_number_of_threads_that_is_none_is_an_error(tiny, threads):
    with pytest.raises(ValueError, match="threads must be an int of 1 to 1024. Received: threads="):
        tiny[1].runner(threads=threads)
