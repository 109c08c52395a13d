"""The layers against the equations of their papers, and as Keras layers: saved, mixed precision, errors."""

import json
import os
import subprocess
import sys
from functools import partial

import keras
import numpy as np
import pytest
import tensorflow as tf

from se_keras.layers import EXCITATIONS, MIXTURES, SQUEEZES, ChannelShuffle, ShakeShake, SqueezeExcite

GATES = {
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "hard_sigmoid": lambda x: np.clip(x / 6 + 0.5, 0, 1),
}


def randomized(layer, shape, rng):
    """Builds `layer` and sets all weights, also the biases, to random values."""
    layer.build(shape)
    for weight in layer.weights:
        weight.assign(rng.normal(size=weight.shape))
    return layer


def recalibrated(x, layer):
    """Eq. 2-4 position by position in float64; only the weights are read from `layer`."""
    x = x.astype("float64")
    w1, w2 = (np.asarray(w.numpy(), "float64") for w in (layer.reduce_kernel, layer.expand_kernel))
    b1, b2 = (layer.reduce_bias.numpy(), layer.expand_bias.numpy()) if layer.bias else (0, 0)
    y = np.empty_like(x)
    for image in range(x.shape[0]):
        pooled = {"avg": x[image].mean((0, 1)), "max": x[image].max((0, 1))}
        for row, column in np.ndindex(*x.shape[1:3]):
            z = x[image, row, column] if layer.squeeze == "none" else pooled[layer.squeeze]
            gate = GATES[layer.excitation](w2.T @ np.maximum(w1.T @ z + b1, 0) + b2)
            y[image, row, column] = gate * x[image, row, column]
    return y


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("excitation", EXCITATIONS)
@pytest.mark.parametrize("squeeze", SQUEEZES)
def test_output_is_equations_2_to_4(squeeze, excitation, bias):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 7, 8)).astype("float32")
    layer = randomized(SqueezeExcite(2, squeeze, excitation, bias), x.shape, rng)
    # Sums of 35 and 8 terms of order one: a few float32 roundings of 1.2e-7.
    np.testing.assert_allclose(layer(x).numpy(), recalibrated(x, layer), rtol=1e-5, atol=1e-5)


def test_kernels_have_he_initialization_and_biases_begin_at_zero():
    layer = SqueezeExcite(1)
    layer.build((None, 4, 4, 512))
    for kernel in (layer.reduce_kernel.numpy(), layer.expand_kernel.numpy()):
        # 262,144 values: the sample's variance has a standard deviation below 0.3 %. Glorot's is half of this.
        assert kernel.var() == pytest.approx(2 / 512, rel=0.02)
    assert not np.any(layer.reduce_bias.numpy()) and not np.any(layer.expand_bias.numpy())


def test_ratio_that_does_not_divide_rounds_the_bottleneck_down():
    layer = SqueezeExcite(ratio=3)
    layer.build((None, 4, 4, 8))
    assert tuple(layer.reduce_kernel.shape) == (8, 2)


@pytest.mark.parametrize("units", [1, 3, 11])
def test_units_decide_in_place_of_the_ratio(units):
    layer = SqueezeExcite(ratio=16, units=units)  # a ratio that would leave no unit of 8 channels
    layer.build((None, 4, 4, 8))
    assert [tuple(weight.shape) for weight in layer.weights] == [(8, units), (units, 8), (units,), (8,)]
    assert SqueezeExcite.from_config(json.loads(json.dumps(layer.get_config()))).units == units


@pytest.mark.parametrize("height, width", [(3, 5), (8, 2)])
def test_height_and_width_may_be_dynamic(height, width):
    rng = np.random.default_rng(1)
    layer = randomized(SqueezeExcite(2), (None, None, None, 6), rng)
    images = keras.Input((None, None, 6))
    model = keras.Model(images, layer(images))
    x = rng.normal(size=(2, height, width, 6)).astype("float32")
    np.testing.assert_allclose(model(x).numpy(), recalibrated(x, layer), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("squeeze", SQUEEZES)
def test_output_shape_is_the_input_shape(squeeze):
    assert SqueezeExcite(2, squeeze)(keras.Input((None, 7, 6))).shape == (None, None, 7, 6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("excitation", EXCITATIONS)
@pytest.mark.parametrize("squeeze", SQUEEZES)
def test_config_round_trips_through_json(squeeze, excitation, bias):
    config = SqueezeExcite(4, squeeze, excitation, bias, name="stage2_block1_se").get_config()
    assert SqueezeExcite.from_config(json.loads(json.dumps(config))).get_config() == config


def test_config_names_every_argument():
    config = SqueezeExcite(4, "max", "tanh", False, 3).get_config()
    assert {key: config[key] for key in ("ratio", "squeeze", "excitation", "bias", "units")} == {
        "ratio": 4,
        "squeeze": "max",
        "excitation": "tanh",
        "bias": False,
        "units": 3,
    }


def test_config_of_a_file_from_before_units_loads():
    config = SqueezeExcite(4).get_config()
    del config["units"]
    assert SqueezeExcite.from_config(config).units is None


LAYERS = {
    "SqueezeExcite": lambda **arguments: SqueezeExcite(2, **arguments),
    "ChannelShuffle": partial(ChannelShuffle, 2),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_channels_first_as_keras_default_is_refused_by_name(kind, channels_first):
    message = f"{kind} must have data_format='channels_last'. Received: data_format='channels_first' from keras.config."
    with pytest.raises(ValueError, match=f"^{message}"):
        LAYERS[kind]()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("value", ["channels_first", "NHWC"])
def test_other_data_formats_are_refused_by_name(kind, value):
    message = f"^{kind} must have data_format='channels_last'. Received: data_format='{value}'$"
    with pytest.raises(ValueError, match=message):
        LAYERS[kind](data_format=value)


@pytest.mark.parametrize("kind", LAYERS)
def test_channels_last_layers_are_made_and_loaded_whatever_keras_default_is(kind, channels_first):
    layer = LAYERS[kind](data_format="channels_last")
    config = layer.get_config()
    assert config.pop("data_format") == "channels_last"  # files from before have none
    assert type(layer).from_config(config).get_config() == layer.get_config()


@pytest.mark.slow
def test_saved_model_loads_with_import_se_keras_alone(tmp_path):
    rng = np.random.default_rng(2)
    images = keras.Input((6, 6, 8))
    layer = randomized(SqueezeExcite(2, "max", "tanh"), (None, 6, 6, 8), rng)
    model = keras.Model(images, layer(keras.layers.Conv2D(8, 3, padding="same")(images)))
    x = rng.normal(size=(2, 6, 6, 8)).astype("float32")
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", x)
    script = (
        "import se_keras, sys; import keras, numpy as np\n"
        "model = keras.saving.load_model('model.keras')\n"
        "np.save('y.npy', model(np.load('x.npy')).numpy())\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True)
    # The same kernels on the same machine; a convolution may still split its sum over other threads.
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), model(x).numpy(), rtol=1e-6, atol=1e-6)


def test_mean_survives_a_sum_that_overflows_float16():
    layer = SqueezeExcite(1, excitation="relu", dtype="mixed_float16")
    layer.build((None, 112, 112, 4))
    layer.reduce_kernel.assign(np.eye(4))
    layer.expand_kernel.assign(np.eye(4))
    x = np.full((1, 112, 112, 4), 60, "float16")  # the sum, 752,640, is above float16's 65,504
    # Identity kernels make the gate the mean, 60, and the output 60 * 60: both exact in float16.
    np.testing.assert_array_equal(np.asarray(layer(x)), np.full(x.shape, 3600, "float16"))


@pytest.mark.parametrize("squeeze", SQUEEZES)
def test_mixed_float16_computes_in_float16_and_keeps_weights_in_float32(squeeze):
    layer = SqueezeExcite(2, squeeze, dtype="mixed_float16")
    y = layer(np.ones((1, 4, 4, 8), "float32"))
    assert keras.backend.standardize_dtype(y.dtype) == "float16"
    assert {weight.dtype for weight in layer.weights} == {"float32"}


@pytest.mark.parametrize("squeeze", SQUEEZES)
def test_gradient_reaches_all_four_weights(squeeze):
    rng = np.random.default_rng(3)
    x = rng.uniform(1, 2, size=(4, 5, 5, 8)).astype("float32")
    layer = SqueezeExcite(2, squeeze)
    layer.build(x.shape)
    layer.reduce_kernel.assign(np.abs(layer.reduce_kernel.numpy()))  # every unit of the bottleneck is awake
    with tf.GradientTape() as tape:
        loss = keras.ops.sum(keras.ops.square(layer(x)))
    gradients = tape.gradient(loss, [weight.value for weight in layer.trainable_weights])
    assert len(gradients) == 4
    assert all(np.all(np.abs(gradient) > 0) for gradient in gradients)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"ratio": 0}, ValueError, r"ratio must be at least 1\. Received: ratio=0"),
        ({"ratio": -16}, ValueError, r"ratio must be at least 1\. Received: ratio=-16"),
        ({"ratio": 2.5}, TypeError, r"ratio must be an int\. Received: ratio=2\.5"),
        ({"ratio": True}, TypeError, r"ratio must be an int\. Received: ratio=True"),
        ({"ratio": "16"}, TypeError, r"ratio must be an int\. Received: ratio='16'"),
        ({"squeeze": "mean"}, ValueError, r"squeeze must be one of \('avg', 'max', 'none'\)\. Received: .*'mean'"),
        ({"squeeze": None}, ValueError, r"squeeze must be one of .* Received: squeeze=None"),
        ({"excitation": "softmax"}, ValueError, r"excitation must be one of \('sigmoid', .* Received: .*'softmax'"),
        ({"excitation": None}, ValueError, r"excitation must be one of .* Received: excitation=None"),
        ({"bias": "no"}, TypeError, r"bias must be True or False\. Received: bias='no'"),
        ({"bias": 1}, TypeError, r"bias must be True or False\. Received: bias=1"),
        ({"units": 0}, ValueError, r"units must be an int of at least 1, or None\. Received: units=0"),
        ({"units": 2.0}, ValueError, r"units must be an int of at least 1, or None\. Received: units=2\.0"),
        ({"units": True}, ValueError, r"units must be an int of at least 1, or None\. Received: units=True"),
    ],
)
def test_wrong_argument_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        SqueezeExcite(**arguments)


def test_misspelt_argument_is_refused():
    with pytest.raises(ValueError, match="reduction"):
        SqueezeExcite(reduction=16)


def test_ratio_above_the_channels_is_refused():
    with pytest.raises(ValueError, match=r"gate: ratio must be at most the number of channels, 8\. Received: ratio=16"):
        SqueezeExcite(16, name="gate")(keras.Input((4, 4, 8)))


def test_unknown_number_of_channels_is_refused():
    with pytest.raises(ValueError, match=r"gate: the number of channels must be known\. Received: input shape=\(None"):
        SqueezeExcite(name="gate")(keras.Input((4, 4, None)))


def test_input_without_height_and_width_is_refused():
    with pytest.raises(ValueError, match=r"expected ndim=4, found ndim=3"):
        SqueezeExcite()(keras.Input((16, 32)))


@pytest.mark.parity
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_layer_computes_the_same_under_another_backend(backend, tmp_path):
    pytest.importorskip(backend, reason=f"the backend {backend} is not installed")
    layer = SqueezeExcite(ratio=4)
    images = np.random.default_rng(0).normal(size=(2, 5, 6, 8)).astype("float32")
    expected = layer(images).numpy()
    np.savez(tmp_path / "case.npz", images=images, **{str(i): w for i, w in enumerate(layer.get_weights())})
    script = (
        "import keras, numpy as np, se_keras\n"
        "case = np.load('case.npz')\n"
        "layer = se_keras.SqueezeExcite(ratio=4)\n"
        "layer.build(case['images'].shape)\n"
        "layer.set_weights([case[str(i)] for i in range(4)])\n"
        "np.save('result.npy', keras.ops.convert_to_numpy(layer(case['images'])))\n"
    )
    environment = os.environ | {"KERAS_BACKEND": backend}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True, capture_output=True)
    # Sums of eight float32 products in another order: a few units in the last place.
    np.testing.assert_allclose(np.load(tmp_path / "result.npy"), expected, rtol=1e-5, atol=1e-6)


# ChannelShuffle.


def shuffled(x, groups):
    """Zhang et al. 2018, section 3.1: "reshaping the output channel dimension into (g, n), transposing, flattening"."""
    return x.reshape(*x.shape[:3], groups, -1).swapaxes(3, 4).reshape(x.shape)


def numbered(*shape):
    """Distinct values, exact in float32 and, up to 2048, in float16."""
    return np.arange(np.prod(shape), dtype="float32").reshape(shape)


@pytest.mark.parametrize("groups, channels", [(1, 12), (2, 12), (3, 12), (4, 12), (12, 12), (8, 384)])
def test_shuffle_transposes_groups_and_their_channels(groups, channels):
    x = numbered(2, 3, 5, channels)
    np.testing.assert_array_equal(ChannelShuffle(groups)(x).numpy(), shuffled(x, groups))


def test_shuffle_of_six_channels_in_two_groups_alternates():
    x = np.array([0, 1, 2, 3, 4, 5], "float32").reshape(1, 1, 1, 6)
    assert ChannelShuffle(2)(x).numpy().ravel().tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parity
@pytest.mark.parametrize("groups", [2, 3, 4, 8])
def test_shuffle_is_torchs(groups):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    x = numbered(2, 3, 5, 24)
    channels_first = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    theirs = torch.nn.ChannelShuffle(groups)(channels_first).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(ChannelShuffle(groups)(x).numpy(), theirs)


@pytest.mark.parametrize("groups", [1, 12])
def test_shuffle_of_one_group_or_one_channel_a_group_changes_nothing(groups):
    x = numbered(1, 2, 2, 12)
    np.testing.assert_array_equal(ChannelShuffle(groups)(x).numpy(), x)


def test_shuffle_by_the_other_factor_is_the_inverse():
    x = numbered(2, 3, 4, 12)
    np.testing.assert_array_equal(ChannelShuffle(4)(ChannelShuffle(3)(x)).numpy(), x)


@pytest.mark.parametrize("samples, height, width", [(1, 3, 5), (4, 8, 2)])
@pytest.mark.parametrize("compiled", [False, True])
def test_sizes_of_a_shuffled_map_may_be_dynamic(samples, height, width, compiled):
    images = keras.Input((None, None, 6))
    model = keras.Model(images, ChannelShuffle(3)(images))
    assert model.output_shape == (None, None, None, 6)
    call = tf.function(model, input_signature=[tf.TensorSpec((None, None, None, 6))]) if compiled else model
    x = numbered(samples, height, width, 6)
    np.testing.assert_array_equal(call(x).numpy(), shuffled(x, 3))


def test_shuffle_computes_in_float16_exactly():
    x = numbered(2, 4, 4, 12)
    y = ChannelShuffle(3, dtype="mixed_float16")(x)
    assert keras.backend.standardize_dtype(y.dtype) == "float16"
    np.testing.assert_array_equal(y.numpy(), shuffled(x, 3))


def test_gradient_of_a_shuffle_is_shuffled_back():
    x, weight = tf.constant(numbered(2, 3, 4, 12)), numbered(2, 3, 4, 12)
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = keras.ops.sum(ChannelShuffle(3)(x) * weight)
    np.testing.assert_array_equal(tape.gradient(loss, x).numpy(), shuffled(weight, 4))


def test_shuffle_has_no_weights():
    layer = ChannelShuffle(3)
    layer(numbered(1, 2, 2, 6))
    assert layer.weights == []


def test_config_of_a_shuffle_round_trips_through_json():
    config = ChannelShuffle(3, name="stage2_block1_shuffle").get_config()
    assert config["groups"] == 3
    assert ChannelShuffle.from_config(json.loads(json.dumps(config))).get_config() == config


@pytest.mark.parametrize("groups", [0, -2, 2.0, True, "3", None])
def test_number_of_groups_that_is_none_is_refused(groups):
    with pytest.raises(ValueError, match=f"^groups must be an int of at least 1. Received: groups={groups!r}$"):
        ChannelShuffle(groups)


@pytest.mark.parametrize("channels", [8, 2, None])
def test_groups_that_do_not_divide_the_channels_are_refused(channels):
    message = f"mix: 3 groups must divide the number of channels. Received: {channels} channels"
    with pytest.raises(ValueError, match=message):
        ChannelShuffle(3, name="mix")(keras.Input((4, 4, channels)))


@pytest.mark.parametrize("shape", [(6,), (4, 6), (4, 4, 4, 6)])
def test_shuffle_of_another_rank_is_refused(shape):
    with pytest.raises(ValueError, match=f"expected ndim=4, found ndim={len(shape) + 1}"):
        ChannelShuffle(3)(keras.Input(shape))


# ShakeShake.

on_each_mixture = pytest.mark.parametrize("forward, backward", [(a, b) for a in MIXTURES for b in MIXTURES])
IMAGES = 4096


def branches(*shape):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype("float32") for _ in range(2)]


def shares(layer, *, channels=3):
    """The share of the first branch in each image's output, and in its gradients: both of shape `(IMAGES, channels)`.

    Ones and zeros are mixed to the share itself; the gradient of `sum(out * w)` is the share of `w`.
    """
    x, y = tf.ones((IMAGES, channels)), tf.zeros((IMAGES, channels))
    weight = np.random.default_rng(0).choice([-2.0, -1.0, 1.0, 2.0], size=(IMAGES, channels)).astype("float32")
    with tf.GradientTape() as tape:
        tape.watch([x, y])
        output = layer([x, y], training=True)
        loss = keras.ops.sum(output * weight)
    first, second = (gradient.numpy() / weight for gradient in tape.gradient(loss, [x, y]))
    # 1 - a rounds once.
    np.testing.assert_allclose(first + second, 1, rtol=0, atol=1e-6)
    return output.numpy(), first


def distance_from_uniform(values):
    """The Kolmogorov-Smirnov statistic: the largest difference of the distribution functions."""
    steps = np.arange(len(values) + 1) / len(values)
    values = np.sort(values)
    return max(np.max(steps[1:] - values), np.max(values - steps[:-1]))


# A sample of a uniform distribution exceeds it with a probability of 2 exp(-2 * 2.7 ** 2), one in a million.
UNIFORM = 2.7 / np.sqrt(IMAGES)
# Five standard deviations of the correlation coefficient of independent values.
UNCORRELATED = 5 / np.sqrt(IMAGES)


@on_each_mixture
def test_inference_is_the_mean_exactly(forward, backward):
    x, y = branches(5, 3, 3, 4)
    for training in (False, None):
        np.testing.assert_array_equal(ShakeShake(forward, backward)([x, y], training=training).numpy(), (x + y) / 2)
    np.testing.assert_array_equal(ShakeShake(forward, backward)([x, y]).numpy(), (x + y) / 2)


@pytest.mark.parametrize("backward", MIXTURES)
def test_training_output_is_between_the_branches_by_one_share_an_image(backward):
    x, y = branches(16, 3, 3, 4)
    output = ShakeShake("shake", backward, seed=1)([x, y], training=True).numpy()
    share = ((output - y) * (x - y)).sum(axis=(1, 2, 3)) / ((x - y) ** 2).sum(axis=(1, 2, 3))
    assert np.all((share > 0) & (share < 1))
    assert len(np.unique(share.round(4))) == 16
    share = share[:, None, None, None]
    # A few roundings of float32 in values up to four.
    np.testing.assert_allclose(output, share * x + (1 - share) * y, rtol=0, atol=3e-6)


def test_shares_of_the_output_are_uniform():
    output, _ = shares(ShakeShake("shake", "even", seed=1))
    assert distance_from_uniform(output[:, 0]) < UNIFORM


def test_shares_of_the_gradients_are_uniform():
    _, gradient = shares(ShakeShake("even", "shake", seed=1))
    assert distance_from_uniform(gradient[:, 0]) < UNIFORM


def test_shares_of_output_and_gradients_are_uniform_and_independent():
    output, gradient = shares(ShakeShake(seed=1))
    for share in (output, gradient):
        assert np.ptp(share, axis=1).max() < 1e-6  # one an image
        assert distance_from_uniform(share[:, 0]) < UNIFORM
    assert abs(np.corrcoef(output[:, 0], gradient[:, 0])[0, 1]) < UNCORRELATED


def test_every_step_draws_anew():
    layer = ShakeShake(seed=1)
    first, second = shares(layer), shares(layer)
    for before, after in zip(first, second, strict=True):
        assert abs(np.corrcoef(before[:, 0], after[:, 0])[0, 1]) < UNCORRELATED


@pytest.mark.parametrize("backward", MIXTURES)
def test_even_output_is_the_mean_in_training_too(backward):
    output, _ = shares(ShakeShake("even", backward, seed=1))
    # The mixture of the gradients is added and subtracted, which rounds twice by half of 1.2e-7. Alone it is exact.
    np.testing.assert_allclose(output, 0.5, rtol=0, atol=0 if backward == "even" else 1.2e-7)


@pytest.mark.parametrize("forward", MIXTURES)
def test_even_gradients_are_one_half_exactly(forward):
    _, gradient = shares(ShakeShake(forward, "even", seed=1))
    np.testing.assert_array_equal(gradient, np.full_like(gradient, 0.5))


def test_same_seed_draws_the_same_and_another_draws_others():
    one, same, other = (shares(ShakeShake(seed=seed))[0][:, 0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert abs(np.corrcoef(one, other)[0, 1]) < UNCORRELATED


def test_mixture_in_float16_is_float16_and_finite():
    x, y = branches(8, 3, 3, 4)
    output = ShakeShake(seed=1, dtype="mixed_float16")([x, y], training=True)
    assert keras.backend.standardize_dtype(output.dtype) == "float16"
    # Between the branches, but for roundings of float16, 2e-3 in values up to four.
    low, high = np.minimum(x, y) - 0.01, np.maximum(x, y) + 0.01
    assert np.all((output.numpy() > low) & (output.numpy() < high))


def test_sizes_of_mixed_maps_may_be_dynamic():
    inputs = [keras.Input((None, None, 4)), keras.Input((None, None, 4))]
    model = keras.Model(inputs, ShakeShake(seed=1)(inputs))
    assert model.output_shape == (None, None, None, 4)
    call = tf.function(lambda x, y: model([x, y], training=True), input_signature=[tf.TensorSpec([None] * 3 + [4])] * 2)
    for x, y in (branches(2, 3, 5, 4), branches(7, 4, 1, 4)):
        output = call(x, y).numpy()
        assert output.shape == x.shape
        assert np.all((output >= np.minimum(x, y) - 1e-6) & (output <= np.maximum(x, y) + 1e-6))


@on_each_mixture
def test_config_of_a_mixture_round_trips_through_json(forward, backward):
    config = ShakeShake(forward, backward, seed=3, name="stage2_block1_shake").get_config()
    assert (config["forward"], config["backward"], config["seed"]) == (forward, backward, 3)
    assert ShakeShake.from_config(json.loads(json.dumps(config))).get_config() == config


def test_mixture_made_from_its_config_draws_the_same():
    layer = ShakeShake(seed=3)
    again = ShakeShake.from_config(layer.get_config())
    np.testing.assert_array_equal(shares(layer)[0], shares(again)[0])


def test_saved_model_with_both_layers_loads_with_identical_outputs(tmp_path):
    images = keras.Input((4, 4, 6))
    mixed = ShakeShake(seed=1)([ChannelShuffle(3)(images), keras.layers.Conv2D(6, 3, padding="same")(images)])
    model = keras.Model(images, mixed)
    x = np.random.default_rng(0).normal(size=(4, 4, 4, 6)).astype("float32")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(x).numpy(), model(x).numpy())


@pytest.mark.parametrize("argument", ["forward", "backward"])
@pytest.mark.parametrize("value", ["mean", None, 0.5])
def test_mixture_that_is_none_is_refused(argument, value):
    message = rf"^{argument} must be one of \('shake', 'even'\)\. Received: {argument}={value!r}$"
    with pytest.raises(ValueError, match=message):
        ShakeShake(**{argument: value})


MAP = (4, 4, 6)


@pytest.mark.parametrize(
    "shapes", [(MAP,), (MAP, MAP, MAP), (MAP, (4, 4, 3)), (MAP, (4, 2, 6)), (MAP, (6,))], ids=lambda shapes: str(shapes)
)
def test_inputs_that_are_not_two_of_one_shape_are_refused(shapes):
    with pytest.raises(ValueError, match="mix mixes two tensors of one shape. Received: shapes="):
        ShakeShake(name="mix")([keras.Input(shape) for shape in shapes])


@pytest.mark.parametrize("shape", [(6,), MAP])
def test_mixture_of_one_tensor_is_refused(shape):
    with pytest.raises(ValueError, match="mix mixes two tensors of one shape. Received: shapes="):
        ShakeShake(name="mix")(keras.Input(shape))


@pytest.mark.parity
@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_shuffle_and_mixture_are_the_same_under_another_backend(backend, tmp_path):
    pytest.importorskip(backend, reason=f"the backend {backend} is not installed")
    x, y = branches(8, 3, 5, 6)
    np.savez(tmp_path / "case.npz", x=x, y=y)
    script = (
        "import keras, numpy as np\n"
        "from se_keras.layers import ChannelShuffle, ShakeShake\n"
        "case = np.load('case.npz')\n"
        "x, y = (keras.ops.convert_to_tensor(case[name]) for name in 'xy')\n"
        "layer = ShakeShake(seed=1)\n"
        "results = {'shuffled': ChannelShuffle(3)(x), 'mean': layer([x, y]), 'mixed': layer([x, y], training=True)}\n"
        "np.savez('result.npz', **{name: keras.ops.convert_to_numpy(z) for name, z in results.items()})\n"
    )
    environment = os.environ | {"KERAS_BACKEND": backend}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True, capture_output=True)
    result = np.load(tmp_path / "result.npz")
    np.testing.assert_array_equal(result["shuffled"], shuffled(x, 3))
    np.testing.assert_array_equal(result["mean"], (x + y) / 2)
    # Random numbers differ between backends. All have one share for each image, between 0 and 1.
    share = ((result["mixed"] - y) * (x - y)).sum(axis=(1, 2, 3)) / ((x - y) ** 2).sum(axis=(1, 2, 3))
    assert np.all((share > 0) & (share < 1)) and len(np.unique(share.round(4))) == 8
    share = share[:, None, None, None]
    np.testing.assert_allclose(result["mixed"], share * x + (1 - share) * y, rtol=0, atol=3e-6)


@pytest.mark.parity
def test_gradients_under_torch_have_shares_of_their_own():
    pytest.importorskip("torch", reason="the backend torch is not installed")
    script = (
        "import numpy as np, torch\n"
        "from se_keras.layers import ShakeShake\n"
        f"x, y = (torch.full(({IMAGES}, 1), value, requires_grad=True, device='cpu') for value in (1.0, 0.0))\n"
        "output = ShakeShake(seed=1)([x, y], training=True)\n"
        "output.sum().backward()\n"
        "output, gradient = (z.detach().numpy().ravel() for z in (output, x.grad))\n"
        "print(np.corrcoef(output, gradient)[0, 1], gradient.min(), gradient.max())\n"
    )
    environment = os.environ | {"KERAS_BACKEND": "torch"}
    ran = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True)
    correlation, least, largest = map(float, ran.stdout.split()[-3:])
    assert abs(correlation) < UNCORRELATED
    assert 0 <= least < 0.01 and 0.99 < largest <= 1  # missed by all 4096 with a probability of exp(-41)
