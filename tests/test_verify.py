"""Any two models, of any kind, agree if they are the same network, and differ if they are not."""

import json
import re
from dataclasses import FrozenInstanceError

import keras
import numpy as np
import pytest
import tensorflow as tf
from export_fixtures import Subclassed, images_for, network_of_integers, scattered
from keras import layers

from se_keras.catalogue import create
from se_keras.export import lower, to_litert, to_savedmodel, verify
from se_keras.export.litert.file import LiteRTRunner
from se_keras.export.model import trace
from se_keras.export.outputs import agreement
from se_keras.export.serving.savedmodel import SavedModelRunner
from se_keras.layers import SqueezeExcite

# Each kind sums in its own order, which changes about 1e-6 of the range in float32 (3e-7 here). A lost bias changes
# more than 1e-3.
BOUND = 1e-5
KINDS = ("keras", "litert", "savedmodel")
BLOCKS = ("conv1_bn", "conv2_bn", "se", "add", "relu")


def network(seed=0, *, shape=(8, 8, 3), activation="softmax", batch=None):
    """A residual block with squeeze-and-excitation and a classifier."""
    keras.utils.set_random_seed(seed)
    images = keras.Input(batch_shape=(batch, *shape), name="images")
    x = shortcut = layers.Conv2D(8, 3, padding="same", name="stem")(images)
    for name, size in {"conv1": 3, "conv2": 1}.items():
        x = layers.Conv2D(8, size, padding="same", use_bias=False, name=name)(x)
        x = layers.BatchNormalization(name=f"{name}_bn")(x)
    x = SqueezeExcite(4, name="se")(x)
    x = layers.ReLU(name="relu")(layers.Add(name="add")([x, shortcut]))
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.Dense(5, activation=activation, name="classes")(layers.Dropout(0.2, name="dropout")(x))
    return scattered(keras.Model(images, x, name="net"), seed=seed)


@pytest.fixture(scope="module")
def model():
    return network()


@pytest.fixture(scope="module")
def images(model):
    return images_for(model, samples=7)


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    """The network in each kind, in memory and on the disk: `{kind: (value, path)}`."""
    folder = tmp_path_factory.mktemp("made")
    model.save(folder / "net.keras")
    file = to_litert(model)
    file.save(folder / "net.tflite")
    saved = to_savedmodel(model, folder / "served")
    return {
        "keras": (model, folder / "net.keras"),
        "litert": (file, folder / "net.tflite"),
        "savedmodel": (saved, folder / "served"),
    }


@pytest.fixture(scope="module")
def foreign(model, tmp_path_factory):
    """A folder of files of other programs: other names of outputs, no manifests."""
    folder = tmp_path_factory.mktemp("foreign")
    model.export(folder / "net", verbose=False)

    def images():
        yield from ([image[None]] for image in images_for(model, samples=30, seed=5))

    for name, dtype in {"float32": None, "uint8": tf.uint8, "int8": tf.int8}.items():
        converter = tf.lite.TFLiteConverter.from_saved_model(str(folder / "net"))
        if dtype:
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
            converter.representative_dataset = images
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
            converter.inference_input_type = converter.inference_output_type = dtype
        (folder / f"{name}.tflite").write_bytes(converter.convert())
    return folder


# Kinds


@pytest.mark.slow
@pytest.mark.parametrize("b", KINDS)
@pytest.mark.parametrize("a", KINDS)
def test_one_network_in_two_kinds_agrees(made, images, a, b):
    result = verify(made[a][0], made[b][1], images).agreement
    assert result.max_error < BOUND
    assert (result.top1, result.samples) == (1.0, 7)


@pytest.mark.parametrize("kind", KINDS)
def test_another_networks_weights_do_not_agree(made, images, kind):
    result = verify(network(seed=1), made[kind][1], images).agreement
    assert result.max_error > 0.1 and result.cosine < 0.9


def test_errors_are_those_of_the_outputs(made, model, images):
    other = network(seed=1)
    expected, actual = ({"probabilities": side.predict(images, verbose=0)} for side in (model, other))
    found, known = verify(made["litert"][1], other, images).agreement, agreement(expected, actual, as_logits=True)
    assert found.max_error == pytest.approx(known.max_error, abs=BOUND)
    assert found.mean_error == pytest.approx(known.mean_error, abs=BOUND)
    assert found.cosine == pytest.approx(known.cosine, abs=BOUND)
    assert found.top1 == known.top1


def test_highest_version_of_a_served_model_is_meant(model, images, tmp_path):
    to_savedmodel(network(seed=1), tmp_path, version=9)
    to_savedmodel(model, tmp_path, version=10)
    (tmp_path / "11").mkdir()  # not copied completely yet
    assert verify(model, tmp_path, images).agreement.max_error < BOUND
    assert verify(model, tmp_path / "9", images).agreement.max_error > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["net", "float32.tflite"])
def test_files_of_others_agree_whatever_their_output_is_called(foreign, made, images, name):
    for kind in KINDS:
        assert verify(made[kind][1], foreign / name, images).agreement.max_error < BOUND


def test_probabilities_are_compared_as_logits_whatever_one_side_calls_them(foreign, images):
    other = network(seed=1)
    expected = {"probabilities": SavedModelRunner(foreign / "net")(images)["output_0"]}
    known = agreement(expected, {"probabilities": other.predict(images, verbose=0)}, as_logits=True)
    assert verify(foreign / "net", other, images).agreement.max_error == pytest.approx(known.max_error, abs=BOUND)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_integer_files_take_and_give_real_values(foreign, model, images, dtype):
    result = verify(model, foreign / f"{dtype}.tflite", images).agreement
    # Steps of 1/256 at the input, the output and each layer; 1e-2 measured. A wrong zero point changes half the range.
    assert result.max_error < 0.05 and result.cosine > 0.999


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_integer_files_take_their_own_integers_as_they_are(foreign, images, dtype):
    runner = LiteRTRunner((foreign / f"{dtype}.tflite").read_bytes())
    scale, zero_point = runner._input["quantization"]
    limits = np.iinfo(dtype)
    stored = np.clip(np.rint(images / scale) + zero_point, limits.min, limits.max).astype(dtype)
    (real,), (own,) = runner(images).values(), runner(stored).values()
    np.testing.assert_array_equal(real, own)
    assert real.dtype == "float32" and np.ptp(real) > 0.1


def test_file_of_a_fixed_batch_takes_any_number_of_images(model, images, tmp_path):
    trace(model, tmp_path / "three", batch_shape=(3, 8, 8, 3))
    converted = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path / "three")).convert()
    (tmp_path / "three.tflite").write_bytes(converted)
    for file in ("three", "three.tflite"):
        for samples in (7, 3, 1):
            result = verify(model, tmp_path / file, images[:samples]).agreement
            assert result.max_error < BOUND and result.samples == samples


# Images


def test_images_may_come_in_any_form(made, images):
    forms = (
        images,
        list(images),
        [images[:3], images[3:]],
        iter(images),
        tf.data.Dataset.from_tensor_slices(images).batch(2),
        [(images, np.zeros(7))],
    )
    first, *others = (verify(*made["keras"], form) for form in forms)
    assert first.agreement.samples == 7
    assert all(other == first for other in others)


@pytest.mark.parametrize("b", KINDS)
@pytest.mark.parametrize("a", ["litert", "savedmodel"])
def test_without_images_noise_tells(made, a, b):
    assert verify(made[a][1], made[b][1]).agreement.max_error < BOUND
    assert verify(made[a][1], network(seed=1)).agreement.max_error > 0.1


def test_folder_of_images(made, tmp_path):
    rng = np.random.default_rng(0)
    for index in range(3):
        pixels = rng.integers(0, 2, (10, 8, 3), "uint8")  # so dark that the values are no larger than noise
        (tmp_path / f"{index}.png").write_bytes(tf.io.encode_png(pixels).numpy())
    result = verify(made["keras"][1], made["litert"][1], tmp_path).agreement
    assert result.samples == 3 and result.max_error < BOUND


def test_free_size_takes_that_of_the_images_or_of_the_other_side(made, images):
    free = network(shape=(None, None, 3))
    free.set_weights(made["keras"][0].get_weights())
    for inputs, samples in ((images_for(free, samples=2, size=10), 2), (None, 4)):
        assert verify(free, free, inputs).agreement.samples == samples
    assert verify(free, made["litert"][1]).agreement.max_error < BOUND
    with pytest.raises(ValueError, match=r"Verification images must be \(8, 8, 3\). Received: \(2, 10, 10, 3\)"):
        verify(free, made["litert"][1], images_for(free, samples=2, size=10))


def test_saturated_probabilities_are_warned_of(made, images):
    # As if pixels of 0 to 255 were used instead of standard normal values: one probability is 1, the others are 0.
    with pytest.warns(UserWarning, match="^Most probabilities of net are 0, which hides .*: are the images scaled"):
        verify(made["keras"][0], made["litert"][1], images * 1e4)


# Layers


def test_two_keras_models_have_a_row_for_every_layer(made, images):
    found = verify(*made["keras"], images)
    assert [name for name, _ in found.layers] == [layer.name for layer in made["keras"][0].layers[1:]]
    assert all((result.max_error, result.samples) == (0.0, 4) for _, result in found.layers)


@pytest.mark.parametrize("pair", [("keras", "litert"), ("litert", "keras"), ("savedmodel", "litert")])
def test_other_kinds_have_no_layers(made, images, pair):
    found = verify(*(made[kind][1] for kind in pair), images)
    assert found.layers == () and found.first_above(0.0) is None


@pytest.mark.parametrize("name", ["stem", "classes"])
def test_flipped_bit_of_a_bias_is_found_at_its_layer(model, images, name):
    other = keras.models.clone_model(model)
    other.set_weights(model.get_weights())
    kernel, bias = other.get_layer(name).get_weights()
    bias.view("uint32")[2] ^= 1 << 24  # of the exponent: four times the value, or a quarter
    other.get_layer(name).set_weights([kernel, bias])
    found = verify(model, other, images)
    assert found.first_above() == name
    rows = dict(found.layers)
    previous = list(rows)[: list(rows).index(name)]
    assert all(rows[layer].max_error == 0 for layer in previous)
    assert len(previous) == {"stem": 0, "classes": len(rows) - 1}[name]


@pytest.mark.parametrize("from_disk", [False, True])
def test_lowered_twin_has_a_row_for_every_block(model, images, tmp_path, from_disk):
    lowered = lower(model)
    if from_disk:  # then nothing says that it was lowered
        lowered.save(tmp_path / "lowered.keras")
        lowered = tmp_path / "lowered.keras"
    found = verify(model, lowered, images)
    rows = dict(found.layers)
    # The outputs of the convolutions have no counterparts, because BatchNormalization is folded into them.
    assert set(rows) == {layer.name for layer in model.layers[1:]} - {"conv1", "conv2"} and set(BLOCKS) < set(rows)
    assert max(result.max_error for result in rows.values()) < BOUND


def test_lowered_twin_may_come_first(model, images):
    rows = dict(verify(lower(model), model, images).layers)
    assert {"conv1", "conv2", "se_scale", "add", "relu"} < set(rows)
    assert max(result.max_error for result in rows.values()) < BOUND


def test_two_lowered_models_have_a_row_for_every_layer(model, images):
    lowered = lower(model)
    found = verify(lowered, lower(model), images)
    assert [name for name, _ in found.layers] == [layer.name for layer in lowered.layers[1:]]


def test_wrong_bias_of_a_lowered_twin_is_found_at_its_block(model, images):
    lowered = lower(model)
    kernel, bias = lowered.get_layer("conv1").get_weights()
    lowered.get_layer("conv1").set_weights([kernel, bias + 0.1])
    assert verify(model, lowered, images).first_above() == "conv1_bn"


@pytest.mark.parametrize("input_shape", [None, (12, 12, 1)])
def test_lowered_twin_of_a_network_of_the_catalogue_has_a_row_for_every_block(input_shape):
    original = scattered(create("se_resnet11_digits", input_shape=input_shape))
    found = verify(original, lower(original, input_shape=input_shape))
    kinds = (SqueezeExcite, layers.Add, layers.BatchNormalization)
    blocks = {layer.name for layer in original.layers if isinstance(layer, kinds)}
    assert len(blocks) > 15 and blocks <= {name for name, _ in found.layers}
    assert found.first_above(BOUND) is None


def test_layers_of_two_networks_are_compared_where_name_and_shape_are_the_same():
    def net(width, last):
        images = keras.Input((4, 4, 3), name="images")
        x = layers.Conv2D(2, 1, name="same")(images)
        x = layers.Conv2D(width, 1, name="width")(x)
        return keras.Model(images, layers.Conv2D(2, 1, name=last)(x))

    assert [name for name, _ in verify(net(2, "a"), net(3, "b")).layers] == ["same"]


def test_layer_that_is_called_twice_has_no_row():
    images = keras.Input((4, 4, 3), name="images")
    twice = layers.Conv2D(3, 1, name="twice")
    shared = keras.Model(images, layers.Conv2D(2, 1, name="last")(twice(twice(images))))
    assert [name for name, _ in verify(shared, shared).layers] == ["last"]


def test_sequential_models_have_layers():
    keras.utils.set_random_seed(0)
    sequential = keras.Sequential([keras.Input((4, 4, 3)), layers.Conv2D(2, 1, name="conv"), layers.Flatten(name="f")])
    assert [name for name, _ in verify(sequential, sequential).layers] == ["conv", "f"]


def test_verification_is_frozen(made, images):
    with pytest.raises(FrozenInstanceError):
        verify(*made["keras"], images).layers = ()


# Refusals


def test_path_that_does_not_exist_is_refused(model, tmp_path):
    for name, message in {
        "x.keras": "There is no model file",
        "x.tflite": "There is no LiteRT file",
        "x": "There is no file or folder",
    }.items():
        with pytest.raises(FileNotFoundError, match=f"^{message} '{tmp_path}/{name}'$"):
            verify(model, tmp_path / name)


def test_folder_without_a_savedmodel_is_refused(model, tmp_path):
    (tmp_path / "1").mkdir()
    with pytest.raises(FileNotFoundError, match="^There is no SavedModel in .*: neither saved_model.pb nor a version"):
        verify(model, tmp_path)


def test_file_of_another_kind_is_refused(model, tmp_path):
    (tmp_path / "net.onnx").touch()
    rule = f"Give a .keras file, a .tflite file or a SavedModel's folder. Received: '{tmp_path}/net.onnx'"
    with pytest.raises(ValueError, match=f"^{re.escape(rule)}$"):
        verify(model, tmp_path / "net.onnx")


@pytest.mark.parametrize("given", [None, 3, np.zeros(3)])
def test_what_is_no_model_is_refused(model, given):
    rule = "Give a Keras model, a LiteRTModel, a SavedModel or a path. Received: "
    with pytest.raises(TypeError, match=f"^{rule}{type(given).__name__}$"):
        verify(model, given)


def test_subclassed_model_is_refused(model):
    with pytest.raises(TypeError, match="Only functional models.* Received: Subclassed"):
        verify(model, Subclassed())


def test_models_of_other_sizes_are_refused(made):
    rule = r"The models must take the same images. Received: other of \(9, 9, 3\) and .*net.tflite of \(8, 8, 3\)$"
    other = network(shape=(9, 9, 3))
    with pytest.raises(ValueError, match=rule):
        verify(keras.Model(other.inputs[0], other.outputs[0], name="other"), made["litert"][1])


def test_models_of_other_outputs_are_refused(model, images):
    with pytest.raises(ValueError, match="outputs differ in name or shape. Received:"):
        verify(model, keras.Model(model.inputs[0], model.get_layer("pool").output), images)


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_another_size_are_refused(made, kind):
    with pytest.raises(ValueError, match=r"Verification images must be \(8, 8, 3\). Received: \(2, 9, 9, 3\)"):
        verify(made[kind][1], made["litert"][1], np.zeros((2, 9, 9, 3)))


@pytest.mark.parametrize(
    "inputs, message",
    {
        "NaN": (
            np.full((2, 8, 8, 3), np.nan),
            "Verification images must be finite. Received: NaN or infinity in 2 of 2",
        ),
        "none": (np.zeros((0, 8, 8, 3)), r"Verification needs at least one image of \(8, 8, 3\)"),
    }.values(),
    ids=["NaN", "none"],
)
def test_images_that_tell_nothing_are_refused(made, inputs, message):
    with pytest.raises(ValueError, match=message):
        verify(made["keras"][1], made["litert"][1], inputs)


def test_words_are_no_images(made):
    with pytest.raises(TypeError, match="Verification data must be arrays of numbers. Received: list"):
        verify(*made["keras"], [["seven"]])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("kind, message", {"keras": "is not a Keras model", "litert": "(LiteRT file|metadata)"}.items())
def test_truncated_file_is_refused(made, tmp_path, kind, message, share):
    path = made[kind][1]
    content = path.read_bytes()
    cut = tmp_path / path.name
    cut.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=f"^'{cut}'.* {message}") as caught:
        verify(cut, made["litert"][1])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
@pytest.mark.parametrize(
    "file", ["saved_model.pb", "variables/variables.index", "variables/variables.data-00000-of-00001"]
)
def test_truncated_savedmodel_of_others_is_refused(foreign, model, tmp_path, file, share):
    for path in (foreign / "net").rglob("*"):
        if path.is_file():
            cut = tmp_path / path.relative_to(foreign / "net")
            cut.parent.mkdir(exist_ok=True)
            content = path.read_bytes()
            cut.write_bytes(content[: int(share * len(content))] if cut == tmp_path / file else content)
    with pytest.raises(ValueError, match=f"^'{tmp_path}' is not a SavedModel that can be loaded: ") as caught:
        verify(model, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("does", [lambda path: path.write_bytes(path.read_bytes()[:-1]), lambda path: path.unlink()])
def test_savedmodel_that_is_not_its_manifests_is_refused(model, tmp_path, does):
    path = to_savedmodel(model, tmp_path).path
    does(path / "variables" / "variables.index")
    with pytest.raises(ValueError, match=f"^'{path}' is not what was exported: variables/variables.index differs from"):
        verify(model, tmp_path)


@pytest.mark.parametrize("entry", [{"normalization": 3}, {"labels": "cat"}, {"training": [1]}], ids=str)
def test_manifest_that_describes_its_images_in_another_shape_is_refused(model, tmp_path, entry):
    path = to_savedmodel(model, tmp_path).path / "assets.extra" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entry))
    with pytest.raises(
        ValueError, match=f"manifest.json' is not the manifest of a SavedModel: {next(iter(entry))} must"
    ):
        verify(model, tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": 3}'])
def test_foreign_manifest_of_a_savedmodel_is_refused(model, tmp_path, content):
    path = to_savedmodel(model, tmp_path).path
    (path / "assets.extra" / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match="manifest.json' is not the manifest of a SavedModel: "):
        verify(model, path)


def test_savedmodel_of_another_signature_is_refused(model, tmp_path):
    module = tf.Module()
    module.f = tf.function(lambda x: x, input_signature=[tf.TensorSpec((None, 8, 8, 3))])
    tf.saved_model.save(module, tmp_path / "a", signatures={"classify": module.f})
    tf.saved_model.save(module, tmp_path / "b", signatures={})
    for name, signatures in {"a": "'classify'", "b": "none"}.items():
        with pytest.raises(
            ValueError, match=f"signature 'serving_default'. Received: '{tmp_path}/{name}' with {signatures}$"
        ):
            verify(model, tmp_path / name)


@pytest.mark.parametrize("inputs", [[tf.TensorSpec(None)], [tf.TensorSpec((1, 2)), tf.TensorSpec((1, 2))]], ids=len)
def test_savedmodel_of_other_inputs_is_refused(model, tmp_path, inputs):
    module = tf.Module()
    module.f = tf.function(lambda *x: {"y": x[0]}, input_signature=inputs)
    tf.saved_model.save(module, tmp_path, signatures=module.f)
    with pytest.raises(ValueError, match="A SavedModel with one input of a known shape can be run. Received: "):
        verify(model, tmp_path)


def test_network_of_integers_agrees_with_its_exports(tmp_path):
    integers, images = network_of_integers("uint8")
    litert, served = to_litert(integers), to_savedmodel(integers, tmp_path)
    fractions = images * np.float32(0.97)  # each side rounds them in the same way
    for a, b in ((integers, litert), (litert, served), (served, integers)):
        for inputs in (None, images, fractions):
            assert verify(a, b, inputs).agreement.max_error < 1e-5
