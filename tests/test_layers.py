"""SqueezeExcite against eq. 2-4 of arXiv:1709.01507, and as a Keras layer: saved, mixed precision, errors."""

import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from se_keras.layers import EXCITATIONS, SQUEEZES, SqueezeExcite

GATES = {
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "hard_sigmoid": lambda x: np.clip(x / 6 + 0.5, 0, 1),
}


def randomized(layer, shape, rng):
    """Builds `layer` and gives each weight, biases too, values away from their zeros."""
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
    config = SqueezeExcite(4, "max", "tanh", False).get_config()
    assert {key: config[key] for key in ("ratio", "squeeze", "excitation", "bias")} == {
        "ratio": 4,
        "squeeze": "max",
        "excitation": "tanh",
        "bias": False,
    }


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
