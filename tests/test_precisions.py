"""The precisions of LiteRT files: each has the types of its name, agrees with Keras, and is delegated to XNNPACK."""

import re
import warnings

import flatbuffers
import keras
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from ai_edge_litert.tools import flatbuffer_utils
from export_fixtures import INTEGERS, difference, images_for, network_of_integers, outputs_of, scattered
from keras import initializers, layers, ops

from se_keras.catalogue import create
from se_keras.export.litert import conversion as litert
from se_keras.export.litert import metadata, ranges
from se_keras.export.litert.conversion import FOR_GPU, PRECISIONS, to_litert
from se_keras.export.litert.file import LiteRTRunner
from se_keras.export.litert.flatbuffer import without_idle_clamps
from se_keras.export.litert.packing import LARGEST_INSIDE, code_of, packed, parsed
from se_keras.export.model import predict
from se_keras.export.verification import runnable, verify
from se_keras.layers import SqueezeExcite
from se_keras.normalization import Normalization
from se_keras.training.data import digits

IMAGES = digits().train.images[:60]
TYPES = {code: name for name, code in vars(schema.TensorType).items() if not name.startswith("_")}


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    return scattered(create("se_resnet11_digits", classes=10), images=IMAGES)


@pytest.fixture(scope="module")
def exported(model):
    """`exported(precision, **options)`: the network's file, which is converted from Keras only once."""
    float32 = to_litert(model, held_out=IMAGES)
    made = {"float32": float32}

    def export(precision, **options):
        key = precision + repr(sorted(options.items()))
        if precision == "float32":
            return float32
        if key not in made:
            made[key] = to_litert(
                model, precision=precision, calibration=IMAGES, held_out=IMAGES, converted=float32, **options
            )
        return made[key]

    return export


def tensors(content):
    """`{name: (type, values or None)}` of the tensors of a file."""
    read = flatbuffer_utils.read_model_from_bytearray(content)
    (graph,) = read.subgraphs
    return {x.name.decode(): (TYPES[x.type], read.buffers[x.buffer].data) for x in graph.tensors}


def kernels(content):
    """The types of the weights of convolutions and fully connected layers."""
    constants = {name: kind for name, (kind, data) in tensors(content).items() if data is not None}
    skipped = re.compile("BiasAdd|_dequant$")
    return {kind for name, kind in constants.items() if "/convolution" in name and not skipped.search(name)}


# The largest error as a share of the logits' range: a little above that of rounding to so many bits in this network,
# and far below that of a lost weight.
BOUNDS = {"float32": 1e-5, "float16": 2e-3, "dynamic": 0.06, "int8": 0.12, "int16x8": 0.03}


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_file_agrees_with_keras(precision, exported):
    made = exported(precision).manifest["agreement"]
    assert made["max_error"] <= BOUNDS[precision]
    assert made["cosine"] >= 0.99
    assert made["top1"] >= 0.95


@pytest.mark.slow
def test_finer_precisions_are_closer(exported):
    errors = [exported(precision).manifest["agreement"]["mean_error"] for precision in ("int8", "int16x8", "float16")]
    assert errors == sorted(errors, reverse=True)


WEIGHTS = {
    "float32": {"FLOAT32"},
    "float16": {"FLOAT16"},
    "dynamic": {"INT8"},
    "int8": {"INT8"},
    "int16x8": {"INT8"},
}


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_have_the_type_of_the_precision(precision, exported):
    assert kernels(exported(precision).content) == WEIGHTS[precision]


def test_sizes_are_in_the_order_of_the_bits(exported):
    sizes = {precision: len(exported(precision).content) for precision in PRECISIONS}
    assert sizes["float16"] < 0.6 * sizes["float32"]
    assert max(sizes[precision] for precision in ("dynamic", "int8", "int16x8")) < 0.4 * sizes["float32"]


@pytest.mark.parametrize("precision", ["float32", "float16", "dynamic", "int8"])
def test_xnnpack_takes_every_operator(precision, exported):
    assert exported(precision).runner().undelegated() == []


@pytest.mark.slow
def test_xnnpack_takes_depthwise_convolutions_too():
    small = create("se_mobilenet_025", input_shape=(64, 64, 3), classes=10)
    images = images_for(small, samples=16)
    float32 = to_litert(scattered(small, images=images, beta=(0.5, 1.5)))
    for precision in ("float16", "dynamic", "int8"):
        made = to_litert(small, precision=precision, calibration=images, converted=float32)
        assert made.runner().undelegated() == []
        assert made.manifest["agreement"]["cosine"] > 0.9


def test_int16x8_runs_on_the_reference_kernels(exported):
    # XNNPACK has no int16 kernels: this precision is a reference for accuracy.
    assert "CONV_2D" in exported("int16x8").runner().undelegated()


# Types of input and output.


@pytest.mark.parametrize("output_type", ["float32", "int8", "uint8"])
@pytest.mark.parametrize("input_type", ["float32", "int8", "uint8"])
def test_input_and_output_have_the_types_asked_for(input_type, output_type, exported):
    made = exported("int8", input_type=input_type, output_type=output_type)
    runner = made.runner()
    (output,) = runner._outputs.values()
    assert np.dtype(runner._input["dtype"]).name == input_type
    assert np.dtype(output["dtype"]).name == output_type
    assert made.manifest["agreement"]["top1"] >= 0.95
    entry = made.manifest["signature"]["inputs"]["images"]
    assert entry["dtype"] == input_type
    assert ("scale" in entry, "zero_point" in entry) == (input_type != "float32",) * 2
    # XNNPACK does not convert uint8 to int8. The kernel that does it flips one bit of each byte.
    allowed = ["QUANTIZE"] * ((input_type == "uint8") + (output_type == "uint8"))
    assert runner.undelegated() in ([], allowed[:1], allowed)


@pytest.mark.parametrize("types", [("int8", "int8"), ("uint8", "uint8")])
def test_integer_input_gives_what_the_float_one_does(types, exported):
    # The file with float input quantizes it with the same scale: the same integers from there on.
    integers = exported("int8", input_type=types[0], output_type=types[1])
    (floats,) = exported("int8").runner()(IMAGES[:20]).values()
    (actual,) = integers.runner()(IMAGES[:20]).values()
    # A step of the output is 1/256, and rounding changes at most half a step.
    np.testing.assert_allclose(actual, floats, rtol=0, atol=0.5 / 256 + 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("output_type", ["int8", "uint8"])
def test_logits_can_be_integers_too(output_type):
    logits = scattered(create("se_resnet11_digits", classes=10, classifier_activation=None), images=IMAGES)
    made = to_litert(logits, precision="int8", calibration=IMAGES, output_type=output_type)
    assert made.manifest["agreement"]["cosine"] > 0.99
    assert list(made.runner()(IMAGES[:1])) == logits.output_names


@pytest.fixture(scope="module")
def heads():
    """Three outputs: `y` is computed from `x`."""
    keras.utils.set_random_seed(0)
    images = keras.Input((8, 8, 3), name="images")
    features = layers.GlobalAveragePooling2D()(layers.Conv2D(8, 3, activation="relu")(images))
    x = layers.Dense(4, name="logits")(features)
    return keras.Model(
        images, {"x": x, "y": layers.Softmax()(x), "z": layers.Dense(2, name="last")(features)}, name="heads"
    )


NOISE = np.random.default_rng(0).normal(size=(20, 8, 8, 3)).astype("float32")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("output_type", "expected"),
    [
        ("float32", ["float32", "float32", "float32"]),
        ("int8", ["int8", "int8", "int8"]),
        ("uint8", ["uint8", "uint8", "uint8"]),
        ({"z": "uint8", "x": "int8"}, ["int8", "float32", "uint8"]),
    ],
    ids=str,
)
def test_every_output_has_the_type_asked_for(output_type, expected, heads):
    made = to_litert(heads, precision="int8", calibration=NOISE, output_type=output_type)
    outputs = made.runner()._outputs
    assert [np.dtype(outputs[name]["dtype"]).name for name in "xyz"] == expected
    assert [made.manifest["signature"]["outputs"][name]["dtype"] for name in "xyz"] == expected
    assert made.manifest["agreement"]["max_error"] < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("layer", "kept", "other"), [("logits", "x", "z"), ("last", "z", "x")])
def test_head_that_is_kept_in_float_is_the_one_that_is_named(layer, kept, other, heads):
    options = {"precision": "int8", "calibration": NOISE, "keep_float": layer}
    made = to_litert(heads, **options, output_type={other: "int8"})
    assert np.dtype(made.runner()._outputs[other]["dtype"]) == "int8"
    with pytest.raises(ValueError, match=f"needs a last layer in int8: that of '{kept}' is in float32"):
        to_litert(heads, **options, output_type={kept: "int8"})


def test_types_of_outputs_that_the_model_does_not_have_are_refused(heads):
    message = r"output_type must name outputs of the model, x, y, z. Received: \['a', 'probabilities'\]"
    with pytest.raises(ValueError, match=message):
        to_litert(heads, precision="int8", calibration=NOISE, output_type={"probabilities": "int8", "a": "int8"})


def test_pixels_are_the_bytes_of_a_picture(exported):
    made = exported("int8", input_type="uint8", normalization=(0, 255))
    scale, zero_point = made.runner()._input["quantization"]
    assert (scale, zero_point) == (pytest.approx(1 / 255, rel=1e-6), 0)


def test_pixels_may_have_a_mean(exported):
    made = exported("int8", input_type="uint8", normalization=(128, 64))
    scale, zero_point = made.runner()._input["quantization"]
    assert (scale, zero_point) == (pytest.approx(1 / 64, rel=1e-6), 128)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int4"}, r"precision must be one of \('float32', .+\). Received: precision='int4'"),
        ({"precision": None}, "Received: precision=None"),
        ({"precision": "int16x8"}, "precision='int16x8' needs calibration images"),
        ({"input_type": "uint8"}, "input_type='uint8' is for precision='int8'. Received: precision='float32'"),
        ({"precision": "dynamic", "output_type": "int8"}, "output_type='int8' is for precision='int8'. Received: "),
        ({"input_type": "int16"}, r"input_type must be one of \('float32', 'int8', 'uint8'\). Received: .+'int16'"),
        ({"keep_float": "x"}, r"keep_float is for a precision in \('int8', 'int16x8'\). Received: precision='float32'"),
    ],
)
def test_option_that_a_precision_does_not_have_is_refused(options, message, model):
    with pytest.raises(ValueError, match=message):
        to_litert(model, **options)


def test_integer_input_of_pixels_normalized_by_channel_is_a_part_of_the_file():
    # Channels that are normalized very differently, so that one scale for all would fail.
    keras.utils.set_random_seed(0)
    rgb, normalization = create("se_resnet20", classes=10), Normalization((20.0, 120.0, 220.0), (10.0, 60.0, 90.0))
    pixels = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3))
    options = {"calibration": normalization.apply(pixels), "input_type": "uint8", "normalization": normalization}
    made = to_litert(rgb, precision="int8", **options)
    entry = made.manifest["signature"]["inputs"]["images"]
    assert (entry["dtype"], entry["scale"], entry["zero_point"]) == ("uint8", 1.0, 0)
    assert made.manifest["agreement"]["cosine"] > 0.99
    # What the file says of itself is what evaluate and verify go by: it takes pixels as they are.
    assert metadata.read(made.content).normalization == ((0.0,), (1.0,))
    assert (
        verify(runnable(rgb).normalized(normalization), made, normalization.apply(pixels[:8])).agreement.cosine > 0.99
    )
    with pytest.raises(ValueError, match="An integer input with a scale for each channel needs lowering. Received"):
        to_litert(rgb, precision="int8", lowering=False, **options)


# Models that take integers and scale them inside.


@pytest.fixture(scope="module", params=INTEGERS[:-1])  # LiteRT does not cast uint64
def of_integers(request):
    """The type of the input, the network, its images, and `{precision: file}`."""
    dtype = request.param
    network, images = network_of_integers(dtype)
    float32 = to_litert(network)
    made = {
        precision: to_litert(network, precision=precision, calibration=images, held_out=images, converted=float32)
        for precision in PRECISIONS[1:]
    }
    return dtype, network, images, {"float32": float32} | made


@pytest.mark.parametrize("precision", PRECISIONS)
def test_file_takes_the_integers_of_its_model(precision, of_integers):
    dtype, _, images, made = of_integers
    file = made[precision]
    entry = file.manifest["signature"]["inputs"]["images"]
    assert entry["dtype"] == file.manifest["golden"]["input"]["dtype"] == dtype
    assert (entry.get("scale", 1), entry.get("zero_point", 0)) == (1, 0)  # the integers stand for themselves
    # A scale of 1/32768 becomes a part of the first kernel, whose values are then below the normal ones of float16.
    of_16_bits = precision == "float16" and dtype in ("uint16", "int16")
    assert file.manifest["agreement"]["max_error"] <= (0.02 if of_16_bits else BOUNDS[precision])
    assert file.manifest["agreement"]["top1"] >= 0.95
    run = file.runner()
    for name, expected in run(images).items():
        np.testing.assert_array_equal(run(images.astype("float32") + 0.25)[name], expected)  # rounded to the same


def test_xnnpack_takes_the_integers_of_a_byte(of_integers):
    # It has no kernels to cast, nor to convert uint8 to int8, which flips one bit of each byte.
    dtype, _, _, made = of_integers
    assert made["int8"].runner().undelegated() == {"uint8": ["QUANTIZE"], "int8": []}.get(dtype, ["CAST"])
    assert made["float32"].runner().undelegated() == ["CAST"]


def test_first_layer_that_stays_in_float_takes_integers_too():
    network, images = network_of_integers("uint8")
    made = to_litert(network, precision="int8", calibration=images, keep_float="conv", input_type="uint8")
    assert made.manifest["signature"]["inputs"]["images"]["dtype"] == "uint8"
    assert made.manifest["agreement"]["cosine"] > 0.99


def test_integers_of_a_model_are_not_changed_to_others():
    network, images = network_of_integers("uint8")
    with pytest.raises(ValueError, match="The input of functional.* stays uint8. Received: input_type='int8'"):
        to_litert(network, precision="int8", calibration=images, input_type="int8")


def test_integers_that_litert_cannot_cast_are_refused():
    with pytest.raises(ValueError, match="needs operators that are not built into LiteRT: .+Cast"):
        to_litert(network_of_integers("uint64")[0])


# Layers that stay in float32.


def test_layers_kept_in_float_have_float_weights(exported):
    made = exported("int8", keep_float=".*_se_.*")
    constants = {name: kind for name, (kind, data) in tensors(made.content).items() if data is not None}
    found = {kind for name, kind in constants.items() if "_se_" in name and "/convolution" in name}
    assert found == {"FLOAT32"}
    assert "stage2_block1_se_reduce" in made.manifest["kept_float"]
    assert "INT8" in {kind for kind, _ in tensors(made.content).values()}
    assert made.runner().undelegated() == []


def test_no_other_layer_is_kept(exported):
    made = tensors(exported("int8", keep_float="stage2_block1_se_reduce").content)
    floats = [name for name, (kind, data) in made.items() if kind == "FLOAT32" and data is not None]
    assert floats and all("stage2_block1_se_reduce" in name for name in floats)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("_se_", "matches no layer of se_resnet11_digits. Received: '_se_'"), ("(", "must be a regular expression: ")],
)
def test_pattern_that_keeps_nothing_is_refused(pattern, message, model):
    with pytest.raises(ValueError, match=message):
        to_litert(model, precision="int8", calibration=IMAGES, keep_float=pattern)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "options"), [("conv1", {"input_type": "uint8"}), ("predictions", {"output_type": "int8"})]
)
def test_integers_at_an_end_that_is_kept_in_float_are_refused(layer, options):
    model = scattered(create("se_resnet11_digits", classes=10, classifier_activation=None), images=IMAGES)
    (option,) = options
    message = f"{option}='u?int8' needs a (first|last) layer in int8: (it|that of 'predictions') is (kept )?in float32"
    with pytest.raises(ValueError, match=message):
        to_litert(model, precision="int8", calibration=IMAGES, keep_float=layer, **options)


# Ranges that integer kernels can compute with.


def instance_norm(x):
    return (x - ops.mean(x, (1, 2), keepdims=True)) / ops.sqrt(ops.var(x, (1, 2), keepdims=True) + 1e-5)


def response_norm(x):  # GRN of ConvNeXt V2
    sums = ops.sqrt(ops.sum(ops.square(x), axis=(1, 2), keepdims=True) + 1e-6)
    return x * (sums / (ops.mean(sums, axis=-1, keepdims=True) + 1e-6)) + x


def pre_activation(shift):
    """A BatchNorm before its ReLU cannot be folded into a convolution: its shift is an addition of constants."""

    def norm(x):
        x = layers.ReLU()(x)
        return layers.Add()([x, layers.BatchNormalization(beta_initializer=initializers.Constant(shift))(x)])

    return norm


# Each adds or subtracts a constant, which is far below the range of the sum in most of them.
NORMALIZATIONS = {
    "addition": lambda x: x * 10 + 1e-3,
    "subtraction": lambda x: x * 10 - 1e-3,
    "from_constant": lambda x: 1e-3 - x * 10,
    "rms": lambda x: x * ops.rsqrt(ops.mean(ops.square(3 * x), axis=-1, keepdims=True) + 1e-6),
    "response": response_norm,
    "instance": lambda x: instance_norm(10 * x),
    # Equal epsilons, which the converter shares: of no weight in one, and of as much as the variance in the other.
    "layer_wide": lambda x: layers.LayerNormalization()(1000 * x),
    "layer_narrow": lambda x: layers.LayerNormalization()(0.05 * x),
    "group": lambda x: layers.GroupNormalization(4)(30 * x),
    "batch_1": pre_activation(1.0),
    "batch_1e_2": pre_activation(1e-2),
    "batch_1e_4": pre_activation(1e-4),
}


@pytest.fixture(scope="module")
def normalizations():
    """`{precision: (outputs of Keras, outputs of the file)}` of a network with one output for each normalization."""
    keras.utils.set_random_seed(0)
    images = keras.Input((10, 10, 3), name="images")
    x = layers.Conv2D(16, 3)(images)
    heads = {}
    for name, norm in NORMALIZATIONS.items():
        y = SqueezeExcite(ratio=4)(layers.ReLU()(norm(x)))
        heads[name] = layers.Dense(4, name=name)(layers.GlobalAveragePooling2D()(y))
    network = keras.Model(images, list(heads.values()))
    samples = images_for(network, samples=24)
    float32 = to_litert(network, held_out=samples)
    found = {}
    for precision in ("int8", "int16x8"):
        made = to_litert(network, precision=precision, calibration=samples, converted=float32)
        found[precision] = predict(network, samples), made.runner()(samples)
    return found


@pytest.mark.parametrize("precision", ["int8", "int16x8"])
@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_normalization_agrees_with_keras(name, precision, normalizations):
    expected, actual = (outputs[name].astype("float64").ravel() for outputs in normalizations[precision])
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    # About ten operators round to 1/256 of a range whose typical value is a tenth: at most 4 % each, and 12 % together,
    # which is a cosine of 0.993. With one scale for both layer normalizations, the narrow one is 20 % off.
    assert error < 0.12


def with_addition(*, other):
    """A network that adds `other` of an activation to 100,000 times the activation."""
    keras.utils.set_random_seed(0)
    images = keras.Input((8, 8, 3), name="images")
    x = layers.Conv2D(8, 3, name="conv")(images)
    x = layers.Add(name="sum")([x * 1e5, other(x)])
    return keras.Model(images, layers.Dense(4)(layers.GlobalAveragePooling2D()(x)))


# XNNPACK adds tensors whose scales are within 2^10. The range of these cannot be widened to that.
@pytest.mark.slow
@pytest.mark.parametrize("other", [layers.Activation("sigmoid"), layers.MaxPooling2D(3, 1, padding="same")])
def test_addition_that_no_integer_kernel_computes_stays_in_float(other):
    network = with_addition(other=other)
    made = to_litert(network, precision="int8", calibration=images_for(network, samples=20))
    assert set(made.manifest["float_operators"].values()) == {"ADD"}
    assert made.manifest["agreement"]["cosine"] > 0.98
    assert made.runner().undelegated() == []


def test_manifest_names_the_operators_in_float32(exported):
    assert set(exported("int8").manifest["float_operators"].values()) == {"SOFTMAX"}
    kept = exported("int8", keep_float="stage2_block1_se_reduce").manifest["float_operators"]
    assert sorted(kept.values()) == ["CONV_2D", "SOFTMAX"]
    assert "float_operators" not in exported("float32").manifest


def test_images_60_times_too_loud_are_warned_of_and_not_refused():
    images = keras.Input((8, 8, 3), name="images")
    x = pre_activation(0.01)(layers.Conv2D(8, 3)(images))
    network = keras.Model(images, layers.Dense(4)(layers.GlobalAveragePooling2D()(x)))
    (norm,) = (layer for layer in network.layers if isinstance(layer, layers.BatchNormalization))
    norm.moving_variance.assign(np.full(8, 0.5))  # as after training on normal images
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = to_litert(network, precision="int8", calibration=60 * images_for(network, samples=20))
    assert sum("was trained on values about" in str(warning.message) for warning in caught) == 1
    assert made.manifest["agreement"]["cosine"] > 0.99
    assert made.runner().undelegated() == []


def test_zero_gammas_leave_every_operator_to_xnnpack():
    keras.utils.set_random_seed(0)
    network = create("se_resnet11_digits", classes=10)
    for layer in network.layers:
        if layer.name.endswith("_conv2_bn"):
            layer.gamma.assign(np.zeros(layer.gamma.shape))
    made = to_litert(network, precision="int8", calibration=IMAGES)
    assert made.manifest["agreement"]["cosine"] > 0.99
    assert made.runner().undelegated() == []


def test_gate_whose_bottleneck_is_dead_runs_in_int8():
    # Its range is zero. With a scale near zero, XNNPACK's factors overflow, and XNNPACK aborts the process.
    images = keras.Input((8, 8, 3), name="images")
    x = layers.Conv2D(16, 3, padding="same")(images)
    x = layers.Add()([SqueezeExcite(16, name="se")(x), x])
    model = keras.Model(images, layers.Dense(4)(layers.GlobalAveragePooling2D()(x)))
    model.get_layer("se").reduce_bias.assign([-1e3])
    random = np.random.default_rng(0)
    images = (random.normal(size=(20, 8, 8, 3)) + random.normal(size=(20, 1, 1, 3))).astype("float32")
    converted = to_litert(model, precision="int8", calibration=images)
    assert converted.manifest["agreement"]["cosine"] > 0.99
    assert converted.runner().undelegated() == []


def test_ranges_that_fit_no_integer_kernel_are_refused(monkeypatch):
    narrow = {"not in the file": {"serving_default_images:0": 1.0, "inserted by the engine": 1.0}}
    monkeypatch.setattr(ranges, "too_narrow", lambda content: narrow)
    images = keras.Input((8, 8, 3), name="images")
    network = keras.Model(images, layers.Conv2D(2, 1)(images))
    with pytest.raises(ValueError, match="No int8 ranges fit integer kernels at inserted .*, .*images.*: calibrate"):
        to_litert(network, precision="int8", calibration=images_for(network, samples=4))


# Clamps without effect.


def additions(content):
    read = flatbuffer_utils.read_model_from_bytearray(content)
    codes = [flatbuffer_utils.get_builtin_code_from_operator_code(code) for code in read.operatorCodes]
    found = [o for o in read.subgraphs[0].operators if codes[o.opcodeIndex] == schema.BuiltinOperator.ADD]
    return [operator.builtinOptions.fusedActivationFunction for operator in found]


def test_additions_of_int8_have_no_clamp(exported):
    assert additions(exported("float32").content) == [schema.ActivationFunctionType.RELU] * 3
    assert additions(exported("int8").content) == [schema.ActivationFunctionType.NONE] * 3


def test_without_idle_clamps_outputs_are_equal_to_the_bit(exported, model, monkeypatch):
    monkeypatch.setattr(litert, "without_clamps", lambda content, images: content)
    clamped = to_litert(model, precision="int8", calibration=IMAGES, converted=exported("float32"))
    assert additions(clamped.content) == [schema.ActivationFunctionType.RELU] * 3
    for images in (IMAGES, 3 * np.random.default_rng(0).normal(size=(20, 8, 8, 1)).astype("float32")):
        (expected,) = clamped.runner()(images).values()
        (actual,) = LiteRTRunner(without_idle_clamps(clamped.content))(images).values()
        np.testing.assert_array_equal(actual, expected)


def test_clamps_stay_where_the_outputs_would_differ(exported, monkeypatch):
    other = exported("int8", input_type="uint8", normalization=(128, 64)).content  # computes something else
    monkeypatch.setattr(litert, "without_idle_clamps", lambda content: other)
    content = exported("int8").content
    assert litert.without_clamps(content, IMAGES[:4]) == content


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_are_in_the_flatbuffer_at_multiples_of_sixteen(precision, exported):
    content = exported(precision).content
    root = schema.Model.GetRootAs(content)
    buffers = [root.Buffers(index) for index in range(root.BuffersLength())]
    starts = [buffer._tab.Vector(buffer._tab.Offset(4)) for buffer in buffers if buffer.DataLength()]
    assert len(starts) > 40 and all(start % 16 == 0 for start in starts)
    assert {(buffer.Offset(), buffer.Size()) for buffer in buffers} == {(0, 0)}


def test_weights_of_a_file_above_two_gigabytes_come_after_the_flatbuffer(exported):
    content = exported("int8").content
    large = packed(flatbuffer_utils.read_model_from_bytearray(content), largest_inside=1000)
    root = schema.Model.GetRootAs(large)
    offsets = [root.Buffers(index).Offset() for index in range(root.BuffersLength())]
    assert len(set(offsets)) > 40 and all(offset % 16 == 0 for offset in offsets)
    np.testing.assert_array_equal(*(list(LiteRTRunner(x)(IMAGES[:4]).values())[0] for x in (content, large)))
    # As many bytes as fit stay inside; the graph and its names take the rest of the two gigabytes.
    assert flatbuffers.Builder.MAX_BUFFER_SIZE - 2**27 < LARGEST_INSIDE < flatbuffers.Builder.MAX_BUFFER_SIZE - 2**25


@pytest.mark.parametrize("precision", ["int8", "float16"])
def test_quantize_and_dequantize_have_their_options(precision, exported):
    model = flatbuffer_utils.read_model_from_bytearray(exported(precision).content)
    kinds = {
        schema.BuiltinOperator.QUANTIZE: "QuantizeOptionsT",
        schema.BuiltinOperator.DEQUANTIZE: "DequantizeOptionsT",
    }
    found = {
        (kind, type(operator.builtinOptions).__name__)
        for operator in model.subgraphs[0].operators
        if (kind := flatbuffer_utils.get_builtin_code_from_operator_code(model.operatorCodes[operator.opcodeIndex]))
        in kinds
    }
    assert found and found <= set(kinds.items())


# Strided convolutions.


def pointwise_strides(content):
    """The strides of 1x1 convolutions, and the types of their inputs and kernels."""
    model = parsed(content)
    (graph,) = model.subgraphs
    found = [o for o in graph.operators if code_of(model, o) == schema.BuiltinOperator.CONV_2D]
    return [
        (o.builtinOptions.strideH, o.builtinOptions.strideW, *(TYPES[graph.tensors[i].type] for i in o.inputs[:2]))
        for o in found
        if list(graph.tensors[o.inputs[1]].shape[1:3]) == [1, 1]
    ]


def dense(precision, exported, model):
    calibration = IMAGES if precision == "int8" else None
    return to_litert(model, precision=precision, calibration=calibration, converted=exported("float32"), for_gpu=True)


@pytest.mark.parametrize("precision", FOR_GPU)
def test_strided_pointwise_convolutions_become_dense_for_a_gpu(precision, exported, model):
    file = dense(precision, exported, model)
    strides = pointwise_strides(file.content)
    assert len(strides) > 9 and {row[:2] for row in strides} == {(1, 1)}
    assert file.runner().undelegated() == []
    # The two strided stages have a convolution and a shortcut each, which read the same positions.
    assert file.content.count(b"_selected_kernel") == 2
    assert [row[:2] for row in pointwise_strides(exported(precision).content)].count((2, 2)) == 4


@pytest.mark.parametrize("precision", ["float32", "float16", "int16x8"])
def test_other_precisions_need_no_change_for_a_gpu(precision, model):
    calibration = IMAGES if precision == "int16x8" else None
    with pytest.raises(ValueError, match=f"for_gpu is for a precision in .+ Received: precision='{precision}'"):
        to_litert(model, precision=precision, calibration=calibration, for_gpu=True)


@pytest.mark.parametrize("kernels", [OpResolverType.AUTO, OpResolverType.BUILTIN_REF])
def test_int8_outputs_of_dense_convolutions_are_equal_to_the_bit(kernels, exported, model):
    split = dense("int8", exported, model).content

    def run(content, image):
        interpreter = Interpreter(model_content=content, experimental_op_resolver_type=kernels)
        interpreter.allocate_tensors()
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image[None])
        interpreter.invoke()
        return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])

    for image in (*IMAGES[:8], 3 * IMAGES[0], np.zeros_like(IMAGES[0])):
        np.testing.assert_array_equal(run(exported("int8").content, image), run(split, image))


# Calibration.


@pytest.mark.parametrize("form", ["array", "list", "batches", "dataset", "generator"])
def test_calibration_data_comes_in_many_forms(form, exported, model):
    calibration = {
        "array": lambda: IMAGES[:12],
        "list": lambda: list(IMAGES[:12]),
        "batches": lambda: [IMAGES[:8], IMAGES[8:12]],
        "dataset": lambda: tf.data.Dataset.from_tensor_slices((IMAGES[:12], np.arange(12))).batch(5),
        "generator": lambda: (image for image in IMAGES[:12]),
    }[form]()
    made = to_litert(model, precision="int8", calibration=calibration, converted=exported("float32"))
    # Every fifth is held out.
    assert (made.manifest["calibration_images"], made.manifest["agreement"]["samples"]) == (10, 2)


def test_progress_tells_how_many_images_have_been_run(exported, model):
    lines = []
    to_litert(model, precision="int8", calibration=IMAGES, converted=exported("float32"), progress=lines.append)
    assert "calibrating se_resnet11_digits: 48 of 48 images" in lines
    assert len(lines) < 20


def test_images_of_another_range_are_warned_of(exported, model):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        to_litert(model, precision="int8", calibration=IMAGES * 255, held_out=IMAGES, converted=exported("float32"))
    (message,) = {str(warning.message) for warning in caught if "trained" in str(warning.message)}
    assert message.startswith("The images have values in 0..255. se_resnet11_digits was trained on values about ")


@pytest.mark.slow
def test_range_of_an_untrained_network_is_unknown():
    fresh = create("se_resnet11_digits", classes=10)
    to_litert(fresh, precision="int8", calibration=IMAGES * 255)  # a warning would be an error


def test_weights_that_are_not_finite_are_refused():
    bad = create("se_resnet11_digits", classes=10)
    kernel = bad.get_layer("stage3_block1_conv2").kernel
    kernel.assign(np.full(kernel.shape, np.nan))
    with pytest.raises(ValueError, match="The weights of se_resnet11_digits are not finite: stage3_block1_conv2"):
        to_litert(bad)


def test_average_pooling_and_concatenations_stay_on_xnnpack_in_int8():
    images = keras.Input((9, 9, 4), name="images")
    x = layers.Concatenate()([layers.AveragePooling2D(3, 2)(images), layers.Conv2D(4, 3, 2)(images)])
    pooled = keras.Model(images, layers.Conv2D(3, 1)(layers.ReLU()(x)))
    inputs = images_for(pooled, samples=20)
    made = to_litert(pooled, precision="int8", calibration=inputs)
    assert made.runner().undelegated() == []
    (actual,) = made.runner()(inputs).values()
    assert difference(outputs_of(pooled, inputs), [actual]) < 0.03


@pytest.mark.slow
def test_kernel_of_more_than_32_mib_is_quantized():
    keras.utils.set_random_seed(0)
    images = keras.Input((4, 4, 1024))
    outputs = keras.layers.Conv2D(1024, 3, name="conv")(images)  # 36 MiB, as SENet-154's last shortcut has 72
    model = keras.Model(images, outputs)
    data = np.random.default_rng(0).normal(size=(4, 4, 4, 1024)).astype("float32")
    result = to_litert(model, precision="int8", calibration=data[:2], held_out=data[2:]).manifest["agreement"]
    # A kernel in steps of 1/127 of each channel's largest value. Scales of other channels give far less.
    assert result["cosine"] > 0.999
