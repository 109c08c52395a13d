"""What gates do on images, and models whose gates became constants."""

import keras
import numpy as np
import pytest
from export_fixtures import difference, scattered

import se_keras
from se_keras.export import freeze_gates, lower, measure_gates
from se_keras.export.gates import draw_gates
from se_keras.layers import SqueezeExcite
from se_keras.recalibration import SEConfig
from se_keras.training.data import digits

ROUNDING = 1e-5  # of the range of the outputs: float32 sums in another order


@pytest.fixture(scope="module")
def images():
    return digits().test.images[:120]


@pytest.fixture(scope="module")
def labels():
    return digits().test.labels[:120]


@pytest.fixture
def trained(trained_digits):
    return keras.saving.load_model(trained_digits / "model.keras")


def gate_layers(model):
    return [layer for layer in model.layers if isinstance(layer, SqueezeExcite)]


def without_gates():
    pixels = keras.Input((8, 8, 1))
    return keras.Model(pixels, keras.layers.Flatten()(pixels))


def shut(layer):
    """Closes the bottleneck of a layer for every image."""
    layer.reduce_bias.assign(np.full(layer.reduce_bias.shape, -1e3))


# What gates do.


def test_statistics_are_those_of_the_gates_themselves(trained, images, labels):
    found = measure_gates(trained, images, labels)
    assert [gate.layer for gate in found] == [layer.name for layer in gate_layers(trained)]
    for gate, layer in zip(found, gate_layers(trained), strict=True):
        values = keras.Model(trained.input, layer.gate(layer.input)).predict(images, verbose=0)[:, 0, 0]
        np.testing.assert_allclose(gate.mean, values.mean(axis=0), atol=1e-6)
        np.testing.assert_allclose(gate.spread, values.std(axis=0), atol=1e-4)
        np.testing.assert_allclose(gate.by_class[3], values[labels == 3].mean(axis=0), atol=1e-6)
        assert gate.saturated == pytest.approx(np.mean((values < 0.01) | (values > 0.99)), abs=1e-6)
        assert (gate.elements, gate.images) == (np.prod(layer.output.shape[1:]), len(images))
        assert gate.between_classes <= gate.between_images + 1e-6  # the means of classes vary less than the images


def test_dead_units_are_counted_and_a_gate_without_live_ones_is_constant(trained, images):
    layer = gate_layers(trained)[1]
    shut(layer)
    dead, alive = measure_gates(trained, images)[1], measure_gates(trained, images)[0]
    assert (dead.dead_units, dead.units) == (layer.reduce_kernel.shape[1],) * 2
    assert dead.is_constant and dead.constant_channels == len(dead.mean)
    assert f"{layer.name} is the same for every image: no image opens any of its {dead.units} units" in dead.advice
    assert not alive.is_constant and alive.advice is None


def test_gate_at_each_position_is_constant_only_if_it_is_at_all_positions():
    pixels = keras.Input((4, 4, 8))
    model = keras.Model(pixels, keras.layers.GlobalAveragePooling2D()(SqueezeExcite(2, squeeze="none")(pixels)))
    image = np.random.default_rng(0).normal(size=(1, 4, 4, 8)).astype("float32")
    (gate,) = measure_gates(model, np.repeat(image, 3, axis=0))  # the same image thrice
    assert not gate.is_constant


@pytest.mark.parametrize(
    "given, error, message",
    [
        (lambda x: {"images": x[:1]}, ValueError, "Gates are compared on at least 2 images. Received: 1"),
        (
            lambda x: {"images": x, "labels": [1, 2]},
            ValueError,
            "labels must be an int of at least 0 for each of 120 im",
        ),
        (lambda x: {"images": x, "labels": np.full(len(x), 0.5)}, ValueError, "labels must be an int .+ float64"),
        (lambda x: {"images": x[:, :7]}, ValueError, r"must be \(8, 8, 1\). Received: \(120, 7, 8, 1\)"),
        (lambda x: {"images": np.full_like(x, np.nan)}, ValueError, "must be finite. Received: NaN"),
        (lambda x: {"images": x, "model": without_gates()}, ValueError, "no SqueezeExcite"),
    ],
    ids=["one image", "too few labels", "no ints", "another size", "NaN", "no gates"],
)
@pytest.mark.parametrize("function", [measure_gates, freeze_gates])
def test_what_cannot_be_measured_is_refused(trained, images, given, error, message, function):
    arguments = {"model": trained} | given(images)
    if function is freeze_gates:
        message = message.replace("compared on at least 2", "")
        if message.startswith("Gates are"):
            message = "at least 4. Received: 1"
    with pytest.raises(error, match=message):
        function(**arguments)


# Frozen gates.


def test_dead_gate_is_frozen_and_nothing_changes(trained, images):
    shut(gate_layers(trained)[1])
    frozen = freeze_gates(trained, images, budget=1)
    assert gate_layers(trained)[1].name in [gate.layer for gate in frozen.freezing.frozen]
    assert frozen.freezing.agreement > 0.9  # on other images than those that chose
    assert len(gate_layers(frozen)) == 3 - len(frozen.freezing.frozen)


@pytest.mark.slow
def test_budget_is_kept_on_the_images_that_choose_and_what_is_left_is_said(trained, images):
    before = trained.predict(images, verbose=0).argmax(axis=-1)
    sizes = []
    for budget in (1.0, 0.95, 0.5, 1e-6):
        frozen = freeze_gates(trained, images, budget=budget)
        after = frozen.predict(images, verbose=0).argmax(axis=-1)
        assert np.mean(after[::2] == before[::2]) >= budget
        assert frozen.freezing.agreement == np.mean(after[1::2] == before[1::2])
        assert set(frozen.freezing.kept) == {layer.name for layer in gate_layers(frozen)}
        sizes.append(len(frozen.freezing.frozen))
    assert sizes == sorted(sizes) and sizes[-1] == 3


def test_labels_make_the_budget_one_of_accuracy(trained, images, labels):
    frozen = freeze_gates(trained, images, labels, budget=0.9)
    before, after = frozen.freezing.accuracy
    accuracy = [
        np.mean(model.predict(images[1::2], verbose=0).argmax(axis=-1) == labels[1::2]) for model in (trained, frozen)
    ]
    assert [before, after] == accuracy


def test_constant_is_the_mean_gate_of_the_images_that_choose(trained, images):
    name = gate_layers(trained)[2].name
    frozen = freeze_gates(trained, images, names=[name])
    (gate,) = frozen.freezing.frozen
    np.testing.assert_allclose(gate.gate, measure_gates(trained, images[::2])[2].mean)
    np.testing.assert_allclose(frozen.get_layer(name).scale, gate.gate, rtol=1e-6)
    assert set(frozen.freezing.kept.values()) == {"not named"}
    assert frozen.freezing.to_json()["frozen"][0]["layer"] == name


def test_model_is_left_as_it_was(trained, images):
    weights, outputs = trained.get_weights(), trained.predict(images, verbose=0)
    calls = [len(layer._inbound_nodes) for layer in trained.layers]
    freeze_gates(trained, images, budget=0.5)
    assert [len(layer._inbound_nodes) for layer in trained.layers] == calls
    assert all(map(np.array_equal, trained.get_weights(), weights))
    np.testing.assert_array_equal(trained.predict(images, verbose=0), outputs)


def test_frozen_model_is_saved_and_loaded(trained, images, tmp_path):
    frozen = freeze_gates(trained, images, names=[gate_layers(trained)[0].name])
    frozen.save(tmp_path / "frozen.keras")
    loaded = keras.saving.load_model(tmp_path / "frozen.keras")
    np.testing.assert_array_equal(loaded.predict(images, verbose=0), frozen.predict(images, verbose=0))


@pytest.mark.parametrize("budget", [0, -1, 1.01, np.nan, "0.5", True])
def test_impossible_budget_is_refused(trained, images, budget):
    with pytest.raises(ValueError, match="budget must be above 0 and at most 1. Received: budget="):
        freeze_gates(trained, images, budget=budget)


def test_unknown_name_and_labels_of_other_classes_are_refused(trained, images):
    with pytest.raises(ValueError, match="names must be of gates that can be frozen, stage2_block1_se, .+ Received: x"):
        freeze_gates(trained, images, names=["x"])
    with pytest.raises(ValueError, match="classifies none of the images correctly: the labels are of other classes"):
        freeze_gates(trained, images, np.full(len(images), 99))


def test_shared_layer_stays(images):
    pixels, layer = keras.Input((8, 8, 1)), SqueezeExcite(2)
    x = layer(keras.layers.Conv2D(4, 1)(layer(keras.layers.Conv2D(4, 3)(pixels))))
    model = keras.Model(pixels, keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D()(x)))
    frozen = freeze_gates(model, images, budget=1e-6)
    assert frozen.freezing.frozen == ()
    assert set(frozen.freezing.kept.values()) == {"the layer is called several times"}


def test_detector_is_no_classifier(images):
    pixels = keras.Input((8, 8, 1))
    model = keras.Model(pixels, SqueezeExcite(2)(keras.layers.Conv2D(4, 3)(pixels)))
    with pytest.raises(ValueError, match=r"Gates are frozen in classifiers, with one output \(batch, classes\)"):
        freeze_gates(model, images)


def test_gates_are_drawn_by_class(trained, images, labels, tmp_path):
    found = measure_gates(trained, images, labels)
    draw_gates(tmp_path / "gates.svg", found, [f"class {number}" for number in range(10)])
    text = (tmp_path / "gates.svg").read_text()
    assert all(f"<!-- {name} -->" in text for name in ("stage2_block1_se", "class 0", "class 4", "all"))
    with pytest.raises(ValueError, match="Gates are drawn as .png, .svg or .pdf. Received: .+gates.gif"):
        draw_gates(tmp_path / "gates.gif", found, [])
    with pytest.raises(ValueError, match="Gates by class need labels. Received: none"):
        draw_gates(tmp_path / "gates.png", measure_gates(trained, images), [])


# Lowered, a frozen gate is gone.


@pytest.mark.slow
@pytest.mark.parametrize("excitation", ["sigmoid", "tanh", "relu", "hard_sigmoid"])
@pytest.mark.parametrize("site", ["standard", "3x3", "post", "pre", "identity"])
def test_lowered_frozen_model_equals_the_frozen_one(images, site, excitation):
    se = SEConfig(ratio=4, site=site, excitation=excitation)
    model = scattered(se_keras.create("se_resnet11_digits", se=se, classifier_activation=None))
    frozen = freeze_gates(model, images[:64], names=[layer.name for layer in gate_layers(model)])
    lowered = lower(frozen)
    outputs = [x.predict(images[:64], verbose=0) for x in (frozen, lowered)]
    assert difference([outputs[0]], [outputs[1]]) <= ROUNDING
    if site in ("standard", "3x3") and excitation != "tanh":  # where nothing else reads what the gate weighs
        assert not any("_se" in layer.name for layer in lowered.layers)


FAMILIES = (
    *("se_resnext50_32x4d", "se_bn_inception", "se_mobilenet_025", "se_shufflenet_g3_025"),
    *("se_vgg11_bn", "se_resnet20"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_lowered_frozen_network_of_each_family_equals_the_frozen_one(name):
    size = 32 if name == "se_resnet20" else 64
    model = scattered(se_keras.create(name, input_shape=(size, size, 3), classes=10, classifier_activation=None))
    pixels = np.random.default_rng(0).normal(size=(8, size, size, 3)).astype("float32")
    frozen = freeze_gates(model, pixels, names=[layer.name for layer in gate_layers(model)])
    lowered = lower(frozen)
    outputs = [x.predict(pixels, verbose=0) for x in (frozen, lowered)]
    assert difference([outputs[0]], [outputs[1]]) <= ROUNDING
    assert not any(type(layer) is keras.layers.Rescaling for layer in lowered.layers)


def test_gate_that_cannot_open_is_folded_by_its_weights_alone(trained, images):
    layer = gate_layers(trained)[0]
    layer.expand_kernel.assign(np.zeros(layer.expand_kernel.shape))
    lowered = lower(trained)
    assert lowered.lowering.constant == {layer.name: "its second layer is zero"}
    assert "1 gate constant" in str(lowered.lowering)
    assert difference([trained.predict(images, verbose=0)], [lowered.predict(images, verbose=0)]) <= ROUNDING
