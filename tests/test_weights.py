"""Weights from files and state dicts: all or none are loaded, errors have one line, and code in files is not run."""

import pickle
import re
from pathlib import Path

import keras
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_catalogue import one_line

from se_keras.catalogue import create, names
from se_keras.recalibration import SEConfig
from se_keras.weights.naming import NAMINGS, pytorchcv_bn_inception, timm_legacy, timm_resnet, timm_vgg
from se_keras.weights.porting import _rows, load_weights, port, read_state_dict

DIGITS = "se_resnet11_digits"


def filled(model, seed=0):
    """The model with random values in all weights, also moving statistics and biases."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        weight.assign(rng.uniform(0.1, 1, size=weight.shape))
    return model


def state_of(model, naming):
    """The state dict that timm or pytorchcv would have for the network: their names, axes and counters.

    tests/test_parity.py shows for each naming that the names are theirs.
    """
    state = {}
    for name, (weight, layer) in _rows(model.layers, naming([x.name for x in model.layers if x.weights])).items():
        array = weight.numpy()
        if array.ndim == 4:
            depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
            array = array.transpose(2, 3, 0, 1) if depthwise else array.transpose(3, 2, 0, 1)
        elif isinstance(layer, keras.layers.Dense) and array.ndim == 2:
            array = array.T
        elif array.ndim == 2:  # the fully connected layers of an SE module
            array = array.T[:, :, None, None]
        state[name] = np.ascontiguousarray(array)
        if name.endswith("running_var"):
            state[name.replace("running_var", "num_batches_tracked")] = np.array(7)
    return state


def values(model):
    return {weight.path: weight.numpy() for weight in model.weights}


def assert_equal(model, expected):
    found = values(model)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


@pytest.fixture(scope="module")
def trained():
    """A network with its state dict in timm's names."""
    model = filled(create(DIGITS))
    return model, state_of(model, timm_legacy)


@pytest.fixture
def target():
    """Another network of the same row, and its values."""
    model = filled(create(DIGITS), seed=1)
    return model, values(model)


def refused(target, error, *parts, state, source="timm"):
    """`port` refuses `state` with a message of one line, and the network stays bit-identical."""
    model, before = target
    with pytest.raises(error, match=one_line(*parts)):
        port(model, state, source=source)
    assert_equal(model, before)


# Names.


@pytest.mark.parametrize("name", names())
def test_no_two_variables_have_one_name_of_theirs(name, facts):
    layers = list(dict.fromkeys(path.rpartition("/")[0] for path in facts(name).weights))
    for naming in [naming for namings in NAMINGS.values() for naming in namings]:
        modules = [module for layer, found in naming(layers).items() if layer in layers for module in found]
        assert len(modules) == len(set(modules))


# Porting.


def test_ported_network_is_the_one_that_the_state_dict_is_of(trained, target):
    port(target[0], trained[1], source="timm")
    assert_equal(target[0], values(trained[0]))


def test_order_of_the_tensors_does_not_matter(trained, target):
    port(target[0], dict(reversed(trained[1].items())), source="timm")
    assert_equal(target[0], values(trained[0]))


def test_port_leaves_the_state_dict_as_it_was(trained, target):
    state = {name: array.copy() for name, array in trained[1].items()}
    port(target[0], state, source="timm")
    assert state.keys() == trained[1].keys()
    assert all(np.array_equal(state[name], array) for name, array in trained[1].items())


def test_fully_connected_layers_are_taken_in_two_axes_and_as_1x1_convolutions(trained, target):
    state = {
        name: array[:, :, 0, 0] if ".se_module." in name and array.ndim == 4 else array
        for name, array in trained[1].items()
    }
    state["last_linear.weight"] = state["last_linear.weight"][:, :, None, None]
    port(target[0], state, source="timm")
    assert_equal(target[0], values(trained[0]))


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_precisions_are_taken(dtype, trained, target):
    port(target[0], {name: array.astype(dtype) for name, array in trained[1].items()}, source="timm")
    for path, value in values(trained[0]).items():
        np.testing.assert_array_equal(values(target[0])[path], value.astype(dtype).astype("float32"))


MISSING, SURPLUS = "layer2.0.bn2.running_var", "aux.weight"
VECTOR = np.ones(64, "float32")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({MISSING: None}, ["is of another network: it lacks ", MISSING]),
        ({SURPLUS: VECTOR}, ["is of another network: the network lacks ", SURPLUS]),
        ({"layer2.0.bn2.scale": VECTOR}, ["the network lacks layer2.0.bn2.scale"]),
        ({"layer2.0.bn4.bias": VECTOR}, ["the network lacks layer2.0.bn4.bias"]),
        ({"fc.bias": VECTOR[:10]}, ["the network lacks fc.bias"]),
        (
            {MISSING: None, "last_linear.bias": None, SURPLUS: VECTOR, "aux.bias": VECTOR},
            ["it lacks ", MISSING, "last_linear.bias; the network lacks aux.weight, aux.bias"],
        ),
        (
            {"layer1.0.conv2.weight": np.ones((16, 16, 1, 9), "float32")},
            ["does not fit: layer1.0.conv2.weight has the shape (3, 3, 16, 16) here and (1, 9, 16, 16) there"],
        ),
        (
            {"layer1.0.bn1.weight": np.ones((16, 1), "float32")},
            ["does not fit: layer1.0.bn1.weight has the shape (16,) here and (1, 16) there"],
        ),
        # The same number of values as the fully connected layer, but another layer.
        (
            {"layer1.0.se_module.fc1.weight": np.ones((4, 16, 2, 2), "float32")},
            ["layer1.0.se_module.fc1.weight has the shape (64, 4) here and (2, 2, 16, 4) there"],
        ),
        ({"layer1.0.bn1.weight": np.float32(1)}, ["layer1.0.bn1.weight has the shape (16,) here and () there"]),
    ],
    ids="missing,surplus module,surplus tensor,surplus layer,twice,both sides,kernel,rank,flattened,scalar".split(","),
)
def test_state_dict_with_a_difference_is_refused_and_changes_nothing(changes, parts, trained, target):
    state = {name: array for name, array in (trained[1] | changes).items() if array is not None}
    refused(target, ValueError, "the state dict ", *parts, state=state)


def test_each_tensor_that_is_left_out_is_missed(trained, target):
    for name in trained[1]:
        if not name.endswith("num_batches_tracked"):
            state = {other: array for other, array in trained[1].items() if other != name}
            refused(target, ValueError, f"the state dict is of another network: it lacks {name}", state=state)


def test_message_names_three_of_each_side_and_counts_the_rest(trained, target):
    state = {f"module.{name}": array for name, array in trained[1].items()}
    count = sum(not name.endswith("num_batches_tracked") for name in state)
    rest = rf" and {count - 3} more"
    message = (
        rf"the state dict is of another network: it lacks [^, ]+, [^, ]+, [^, ]+{rest}; "
        rf"the network lacks module\.[^, ]+, module\.[^, ]+, module\.[^, ]+{rest}"
    )
    with pytest.raises(ValueError) as error:
        port(target[0], state, source="timm")
    assert re.fullmatch(message, str(error.value))
    assert_equal(*target)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [MISSING, "last_linear.weight"])
def test_value_that_is_not_finite_is_refused(name, value, trained, target):
    doctored = trained[1][name].copy()
    doctored.flat[-1] = value
    parts = ("the state dict has values that are not finite: in ", name)
    refused(target, ValueError, *parts, state=trained[1] | {name: doctored})


def test_value_beyond_float32_is_refused(trained, target):
    state = trained[1] | {"last_linear.bias": np.full(10, 1e300)}
    refused(target, ValueError, "values that are not finite: in last_linear.bias", state=state)


RULE = "A state dict is a dict of arrays by their names"


@pytest.mark.parametrize(
    ("state", "part"),
    [
        (None, ". Received: NoneType as the state dict"),
        ([("conv1.weight", VECTOR)], ". Received: list as the state dict"),
        ("model.pth", ". Received: str as the state dict"),
        ({"conv1.weight": [1.0]}, ". Received: list as 'conv1.weight' in the state dict"),
        ({"state_dict": {"conv1.weight": VECTOR}}, ". Received: dict as 'state_dict' in the state dict"),
        ({0: VECTOR}, ". Received: ndarray as 0 in the state dict"),
        ({"conv1.weight": np.array(["a"])}, ", of real numbers. Received: <U1 as 'conv1.weight' in the state dict"),
        ({"conv1.weight": np.array([{}])}, ", of real numbers. Received: object as 'conv1.weight' in the state dict"),
        (
            {"conv1.weight": np.array([1j])},
            ", of real numbers. Received: complex128 as 'conv1.weight' in the state dict",
        ),
    ],
)
def test_what_is_no_dict_of_arrays_is_refused(state, part, target):
    refused(target, TypeError, RULE + part, state=state)


@pytest.mark.parametrize("source", ["torchvision", "", None, "TIMM"])
def test_unknown_source_is_refused(source, trained, target):
    parts = ("source must be one of ('timm', 'pytorchcv'). Received: ", repr(source))
    refused(target, ValueError, *parts, state=trained[1], source=source)


def test_names_of_the_other_library_are_refused(trained, target):
    refused(target, ValueError, "it lacks ", "; the network lacks ", state=trained[1], source="pytorchcv")


@pytest.mark.parametrize(
    ("network", "parts"),
    [
        ("resnet11_digits", ["it lacks layer1.0.se_module.fc1.weight, "]),
        ("se_resnet20", ["it lacks ", "; the network lacks "]),
    ],
)
def test_state_dict_of_another_network_is_refused(network, parts, target):
    refused(target, ValueError, *parts, state=state_of(create(network), timm_legacy))


def test_state_dict_of_the_se_network_is_refused_by_its_baseline(trained):
    model = filled(create("resnet11_digits"))
    refused((model, values(model)), ValueError, "the network lacks layer1.0.se_module.fc1.weight, ", state=trained[1])


def test_state_dict_of_another_class_count_is_refused(trained, target):
    state = state_of(create(DIGITS, classes=11), timm_legacy)
    part = "does not fit: last_linear.weight has the shape (256, 10) here and (256, 11) there"
    refused(target, ValueError, part, state=state)


@pytest.mark.parametrize("ratio", [8, 32])
def test_state_dict_of_another_ratio_is_refused(ratio, target):
    state = state_of(create(DIGITS, se=SEConfig(ratio=ratio)), timm_legacy)
    refused(target, ValueError, "does not fit: layer1.0.se_module.fc1.weight has the shape ", state=state)


def test_network_that_differs_in_its_pooling_and_not_in_shapes_is_refused():
    # timm's resnet18 pools as torch does, ours as Caffe does; its resnet50 is our resnet50b, with other strides too.
    model = filled(create("resnet18", input_shape=(32, 32, 3)))
    part = "is of another network: pool1_pad pads ((0, 1), (0, 1)) here and ((1, 1), (1, 1)) there"
    refused((model, values(model)), ValueError, part, state=state_of(model, timm_resnet))


def test_layer_of_ones_own_in_front_of_the_network_is_missed_by_its_name(trained):
    images = keras.layers.Conv2D(1, 1, name="mine")(keras.Input((8, 8, 1)))
    model = filled(create(DIGITS, input_tensor=images))
    refused((model, values(model)), ValueError, "is of another network: it lacks mine", state=trained[1])


def test_model_that_is_none_of_ours_is_refused(trained):
    embedding, dense = keras.layers.Embedding(4, 2, name="conv1"), keras.layers.Dense(10, name="predictions")
    model = filled(keras.Sequential([keras.Input((8,)), embedding, keras.layers.Flatten(), dense]))
    refused((model, values(model)), ValueError, "it lacks conv1; the network lacks ", state=trained[1])


# Biases of convolutions before BatchNorm. Our networks do not have them.


def with_biases(state, convolutions, rng):
    """An equivalent state dict: convolutions have biases, and the moving means are shifted by them."""
    state = dict(state)
    for convolution, norm in convolutions.items():
        bias = rng.uniform(-1, 1, state[f"{convolution}.weight"].shape[0]).astype("float32")
        state[f"{convolution}.bias"] = bias
        state[f"{norm}.running_mean"] = state[f"{norm}.running_mean"] + bias
    return state


BIASED = {
    "vgg11_bn": (timm_vgg, "timm", {"features.0": "features.1", "features.25": "features.26"}),
    "bn_inception": (
        pytorchcv_bn_inception,
        "pytorchcv",
        {
            f"{module}.conv": f"{module}.bn"
            for module in ("features.init_block.conv1", "features.stage2.unit1.branches.branch2.conv3")
        },
    ),
}


@pytest.fixture(scope="module", params=BIASED)
def biased(request):
    """A network without its heavy classifier, the naming and the source, and a state dict of it with biases."""
    naming, source, convolutions = BIASED[request.param]
    model = filled(create(request.param, include_top=False))
    return model, source, with_biases(state_of(model, naming), convolutions, np.random.default_rng(0)), convolutions


def test_bias_in_front_of_batch_norm_goes_into_its_moving_mean(biased):
    model, source, state, _ = biased
    before = values(model)
    port(filled(model, seed=1), state, source=source)
    for path, value in values(model).items():
        # Adding and subtracting a bias below 1 rounds by half a unit in the last place of 2, twice.
        np.testing.assert_allclose(value, before[path], rtol=0, atol=2 * 2.0**-24, err_msg=path)


def test_bias_of_another_length_is_refused(biased):
    model, source, state, convolutions = biased
    name = f"{next(iter(convolutions))}.bias"
    state = state | {name: VECTOR[:3]}
    refused((model, values(model)), ValueError, "the network lacks ", name, state=state, source=source)


def test_bias_without_its_batch_norm_is_refused(biased):
    model, source, state, convolutions = biased
    mean = f"{next(iter(convolutions.values()))}.running_mean"
    state = {name: array for name, array in state.items() if name != mean}
    refused((model, values(model)), ValueError, f"it lacks {mean}; the network lacks ", state=state, source=source)


def test_flattened_maps_are_taken_as_convolutions_alone():
    # A matrix does not say whether the channels or the pixels of its map come first.
    model = filled(create("vgg11_bn", input_shape=(64, 64, 3), classes=3))
    state = state_of(model, timm_vgg)
    kernel = state["pre_logits.fc1.weight"]
    refused((model, values(model)), ValueError, "pre_logits.fc1.weight", state=state)
    # (out, h w in) as our matrix has it, as a convolution (out, in, h, w).
    state["pre_logits.fc1.weight"] = kernel.reshape(4096, 2, 2, 512).transpose(0, 3, 1, 2)
    before = values(model)
    port(filled(model, seed=1), state, source="timm")
    assert_equal(model, before)


# Files.


def write(path, state):
    """A state dict as a file of its suffix."""
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch = pytest.importorskip("torch", reason="only torch writes .pth")
        torch.save({name: torch.from_numpy(np.array(array)) for name, array in state.items()}, path)
    return path


SUFFIXES = (".safetensors", pytest.param(".pth", marks=pytest.mark.parity))


@pytest.fixture(params=SUFFIXES)
def file(request, trained, tmp_path):
    return write(tmp_path / f"model{request.param}", trained[1])


def test_read_gives_the_arrays_by_name(file, trained):
    state = read_state_dict(file)
    assert state.keys() == trained[1].keys()
    for name, array in trained[1].items():
        np.testing.assert_array_equal(state[name], array)


@pytest.mark.parametrize("kind", [str, Path])
def test_file_gives_the_network_that_it_is_of(kind, file, trained):
    assert_equal(create(DIGITS, weights=kind(file)), values(trained[0]))


@pytest.mark.parametrize("size", [None, 8, 21])
def test_file_fills_networks_for_other_image_sizes(size, file, trained):
    assert_equal(create(DIGITS, weights=file, input_shape=(size, size, 1)), values(trained[0]))


def test_file_with_the_top_fills_the_network_without_it(file, trained):
    model = create(DIGITS, include_top=False, weights=file)
    assert_equal(model, {p: v for p, v in values(trained[0]).items() if not p.startswith("predictions/")})


def test_file_without_the_top_fills_the_network_without_it(trained, tmp_path):
    state = {name: array for name, array in trained[1].items() if not name.startswith("last_linear.")}
    model = create(DIGITS, include_top=False, weights=write(tmp_path / "features.safetensors", state))
    assert_equal(model, {p: v for p, v in values(trained[0]).items() if not p.startswith("predictions/")})


def test_file_without_the_top_is_refused_by_the_network_with_it(trained, tmp_path):
    state = {name: array for name, array in trained[1].items() if not name.startswith("last_linear.")}
    path = write(tmp_path / "features.safetensors", state)
    message = one_line(str(path), "is of another network: it lacks last_linear.weight, last_linear.bias")
    with pytest.raises(ValueError, match=message):
        create(DIGITS, weights=path)


def test_file_with_something_beside_the_top_is_refused_without_the_top(trained, tmp_path):
    path = write(tmp_path / "more.safetensors", trained[1] | {"aux.weight": VECTOR})
    with pytest.raises(ValueError, match=one_line(str(path), "is of another network: the network lacks aux.weight")):
        create(DIGITS, include_top=False, weights=path)


def test_file_of_vgg_fills_the_network_without_its_three_fully_connected_layers(tmp_path):
    whole = filled(create("vgg11_bn", input_shape=(32, 32, 3), classes=3))
    path = write(tmp_path / "vgg.safetensors", state_of(whole, timm_vgg))
    head = ("fc1/", "fc2/", "predictions/")
    model = create("vgg11_bn", include_top=False, weights=path)
    assert_equal(model, {p: v for p, v in values(whole).items() if not p.startswith(head)})


def test_file_passes_by_the_layers_in_front_of_an_input_tensor(file, trained):
    mine = keras.layers.Conv2D(1, 1, name="mine")
    model = create(DIGITS, input_tensor=mine(keras.Input((8, 8, 1))), weights=file)
    assert {p: v.shape for p, v in values(model).items() if p.startswith("mine/")}
    found = {p: v for p, v in values(model).items() if not p.startswith("mine/")}
    assert all(np.array_equal(found[p], v) for p, v in values(trained[0]).items())


def test_file_of_the_published_class_count_leaves_another_classifier_untrained(file, trained):
    with pytest.warns(UserWarning, match="it has 10 classes, and the classifier of 11 is left as it is, untrained$"):
        model = create(DIGITS, classes=11, weights=file)
    features = {p: v for p, v in values(trained[0]).items() if "predictions" not in p}
    assert features and all(np.array_equal(values(model)[p], v) for p, v in features.items())


def test_file_that_does_not_fit_changes_no_layer(target, file, trained):
    model = filled(create(DIGITS, classes=11), seed=1)
    before = values(model)
    with pytest.raises(ValueError, match=one_line(str(file), "does not fit")):
        load_weights(model.layers, file)
    assert_equal(model, before)


def test_file_with_a_value_that_is_not_finite_is_refused(trained, target, tmp_path):
    path = write(tmp_path / "nan.safetensors", trained[1] | {"last_linear.bias": np.full(10, np.nan, "float32")})
    with pytest.raises(ValueError, match=one_line(str(path), "not finite: in last_linear.bias")):
        load_weights(target[0].layers, path)
    assert_equal(*target)


CANNOT_BE_READ = "is not a file of weights that can be read: "


@pytest.mark.parametrize("part", [0, 0.001, 0.5, 0.999])
def test_truncated_file_is_refused_and_changes_nothing(part, file, target):
    whole = file.read_bytes()
    file.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ValueError, match=one_line(str(file), CANNOT_BE_READ)):
        load_weights(target[0].layers, file)
    assert_equal(*target)


@pytest.mark.parametrize(
    "content", [b"not\nweights\n", b"\x00" * 100, b"PK\x03\x04", b"\x89HDF\r\n\x1a\n" + b"\0" * 99]
)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_foreign_file_is_refused(suffix, content, tmp_path):
    if suffix == ".pth":
        pytest.importorskip("torch")
    path = tmp_path / f"foreign{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=one_line(str(path), CANNOT_BE_READ)):
        read_state_dict(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_folder_is_refused(suffix, tmp_path):
    path = tmp_path / f"folder{suffix}"
    path.mkdir()
    for what in (read_state_dict, lambda path: create(DIGITS, weights=path)):
        with pytest.raises(FileNotFoundError, match=one_line("There is no file of weights", str(path))):
            what(path)


def test_keras_file_is_no_state_dict(trained, tmp_path):
    path = tmp_path / "model.weights.h5"
    trained[0].save_weights(path)
    rule = "A state dict is a .safetensors, .pth, .pt, .pth.tar, .bin or .ckpt file. Received: "
    with pytest.raises(ValueError, match=one_line(rule, str(path))):
        read_state_dict(path)


class Code:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parity
@pytest.mark.parametrize("wrapped", [False, True], ids=["pickle", "torch.save"])
def test_code_in_a_file_is_refused_and_not_run(wrapped, tmp_path, target):
    torch = pytest.importorskip("torch")
    path, created = tmp_path / "model.pth", tmp_path / "created"
    if wrapped:
        torch.save({"conv1.weight": Code(created)}, path)
    else:
        path.write_bytes(pickle.dumps({"conv1.weight": Code(created)}))
    part = CANNOT_BE_READ + "it is truncated or not of torch, or it contains pickled code, which is not run"
    with pytest.raises(ValueError, match=one_line(str(path), part)):
        load_weights(target[0].layers, path)
    assert not created.exists()
    assert_equal(*target)
    # The code does run if it is loaded without the check. Otherwise the test would show nothing.
    torch.load(path, weights_only=False) if wrapped else pickle.loads(path.read_bytes())  # noqa: S301
    assert created.exists()


@pytest.mark.parity
@pytest.mark.parametrize("content", [[1.0], {"epoch": 3}, {"state_dict": None}, 3.0])
def test_pth_without_a_state_dict_is_refused(content, tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "model.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=one_line(str(path), CANNOT_BE_READ + "it contains no state dict")):
        read_state_dict(path)


@pytest.mark.parity
def test_state_dict_of_a_checkpoint_is_read(trained, target, tmp_path):
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(np.array(array)) for name, array in trained[1].items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "checkpoint.pth")
    load_weights(target[0].layers, tmp_path / "checkpoint.pth")
    assert_equal(target[0], values(trained[0]))


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["trained", "bfloat16"])
def test_torch_tensors_that_numpy_does_not_take_are_ported(kind, trained, target):
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(np.array(array)) for name, array in trained[1].items()}
    if kind == "bfloat16":
        state = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
        tolerance = 2.0**-8  # of a value in eight bits
    else:
        state = {name: torch.nn.Parameter(tensor, tensor.is_floating_point()) for name, tensor in state.items()}
        tolerance = 0
    port(target[0], state, source="timm")
    for path, value in values(trained[0]).items():
        np.testing.assert_allclose(values(target[0])[path], value, rtol=tolerance, atol=0, err_msg=path)


@pytest.mark.parity
def test_bfloat16_file_is_read(trained, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_file({"a": torch.tensor([1.0, 2.5], dtype=torch.bfloat16)}, path)
    np.testing.assert_array_equal(np.asarray(read_state_dict(path)["a"], "float32"), [1.0, 2.5])
