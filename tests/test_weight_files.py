"""Files of weights as people have them, and damaged ones: read as they are meant, or refused in one line."""

import argparse
import collections
import re
import zipfile

import h5py
import keras
import numpy as np
import pytest

import se_keras
from se_keras.export.verification import load_keras
from se_keras.weights import files, port, read_state_dict
from se_keras.weights.files import read_layers

STATE = {"conv1.weight": np.arange(8, dtype="float32").reshape(2, 1, 2, 2), "bn1.bias": np.array([1.5], "float32")}
READ = r"^'.+' is not a file of weights that can be read: "
OTHER = {name: array + 100 for name, array in STATE.items()}


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="only torch writes its files")


@pytest.fixture
def save(torch, tmp_path):
    """Saves what a function of two state dicts returns, with tensors, and returns the path."""

    def save(content, suffix=".pth", **options):
        own, other = ({name: torch.from_numpy(x) for name, x in state.items()} for state in (STATE, OTHER))
        path = tmp_path / f"weights{suffix}"
        torch.save(content(own, other), path, **options)
        return path

    return save


def require_state(found):
    assert found.keys() == STATE.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, STATE[name])


@pytest.mark.parity
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pth.tar", ".bin", ".ckpt"])
def test_file_of_torch_has_any_of_its_suffixes(save, suffix):
    require_state(read_state_dict(save(lambda own, _: own, suffix)))


@pytest.mark.parity
@pytest.mark.parametrize(
    "content",
    [
        lambda own, _: collections.OrderedDict(own),
        lambda own, _: {"state_dict": own, "epoch": 3, "best": 76.1},
        lambda own, _: {"model": own, "optimizer": {"state": {}}},
        lambda own, _: {"model_state_dict": own, "loss": 0.1},
        lambda own, _: {"state_dict": own, "args": argparse.Namespace(lr=0.1), "metric": 76.0},
        lambda own, _: {"state_dict": own, "log": collections.defaultdict(list, {"loss": [1.0]})},
    ],
)
def test_weights_are_found_where_training_scripts_keep_them(save, content):
    require_state(read_state_dict(save(content)))


@pytest.mark.parity
@pytest.mark.parametrize("key, plain", [("state_dict_ema", "state_dict"), ("model_ema", "model")])
def test_averaged_weights_are_preferred_and_said(save, key, plain):
    path = save(lambda own, other: {plain: other, key: own})
    with pytest.warns(UserWarning, match=f"weights.pth': of its weights, the averaged ones, '{key}', are taken$"):
        require_state(read_state_dict(path))


@pytest.mark.parity
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "model.module."])
def test_prefix_of_every_name_is_removed_and_said(save, prefix):
    path = save(lambda own, _: {"state_dict": {f"{prefix}{name}": x for name, x in own.items()}})
    with pytest.warns(UserWarning, match=f"weights.pth': the names are taken without their prefix '{prefix}'$"):
        require_state(read_state_dict(path))


@pytest.mark.parity
def test_prefix_of_some_names_stays(save):
    found = read_state_dict(save(lambda own, _: {"module.a": own["bn1.bias"], "b": own["bn1.bias"]}))
    assert found.keys() == {"module.a", "b"}


@pytest.mark.parity
def test_whole_module_is_read_without_its_code(torch, tmp_path):
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 2), torch.nn.BatchNorm2d(2))
    network[0].register_buffer("passing", torch.zeros(1), persistent=False)
    torch.save({"model": network, "epoch": 1}, tmp_path / "whole.pt")
    found, expected = read_state_dict(tmp_path / "whole.pt"), network.state_dict()
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name].numpy())


@pytest.mark.parity
def test_changed_byte_of_a_file_of_torch_is_noticed(save):
    path = save(lambda own, _: own)
    content = bytearray(path.read_bytes())
    content[content.index(STATE["conv1.weight"].tobytes()) + 6] ^= 1
    path.write_bytes(content)
    message = (
        "weights.pth' is not a file of weights that can be read: it is damaged: the checksum of .+ does not match$"
    )
    with pytest.raises(ValueError, match=message):
        read_state_dict(path)


@pytest.mark.parity
def test_file_that_torch_wrote_without_checksums_is_read(torch, save):
    torch.serialization.set_crc32_options(False)
    try:
        path = save(lambda own, _: own)
    finally:
        torch.serialization.set_crc32_options(True)
    require_state(read_state_dict(path))


@pytest.mark.parity
def test_complex_numbers_are_refused(torch, save, tmp_path):
    path = save(lambda own, _: {"conv1.weight": own["conv1.weight"] * 1j})
    rule = (
        "A state dict is a dict of arrays by their names, of real numbers. Received: torch.complex64 as 'conv1.weight'"
    )
    with pytest.raises(ValueError, match=f"weights.pth' is not a file of weights that can be read: {rule}"):
        read_state_dict(path)
    with pytest.raises(TypeError, match=rule):
        port(keras.Sequential([keras.Input((4,))]), {"conv1.weight": torch.ones(2) * 1j}, source="timm")


@pytest.fixture(scope="module")
def model():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, name="fc1"), keras.layers.Dense(3, name="fc2")])


def test_file_that_hdf5_reads_for_ever_is_refused(model, tmp_path, monkeypatch):
    path = tmp_path / "x.weights.h5"
    model.save_weights(path)
    assert read_layers(path).keys() == {"fc1", "fc2"}
    # Zeros in the object header of a group, whose messages HDF5 then never gets to the end of.
    content = bytearray(path.read_bytes())
    monkeypatch.setattr(files, "HDF5_SECONDS", 1)
    start = content.index(b"SNOD")
    content[start + 640 : start + 664] = bytes(24)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=READ + "HDF5 fails on it, or is not done after 1 seconds of computing$"):
        read_layers(path)


def test_array_that_is_far_larger_than_its_file_is_refused(tmp_path):
    path = tmp_path / "x.weights.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("layers/dense/vars/0", shape=(1 << 20, 1 << 14), chunks=(1024, 1024), dtype="float32")
    with pytest.raises(ValueError, match=READ + "it says that it holds far more than its size$"):
        read_layers(path)


@pytest.mark.parametrize("damage", [lambda x: x[:-30], lambda x: b"", lambda x: b"\x89HDF\r\n\x1a\n" + bytes(99)])
def test_damaged_weights_of_keras_are_one_line(model, tmp_path, damage):
    path = tmp_path / "x.weights.h5"
    model.save_weights(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"^'.+x.weights.h5' is not a file of weights that can be read: [^\n]+$"):
        read_layers(path)


@pytest.mark.parametrize("read", [load_keras, read_layers])
def test_changed_byte_of_a_keras_file_is_noticed(model, tmp_path, read):
    path = tmp_path / "x.keras"
    model.save(path)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("model.weights.h5").header_offset
    content[start + 2000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape("the checksum of model.weights.h5 does not match")):
        read(path)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The weights of a network with the published number of classes and channels."""
    path = tmp_path_factory.mktemp("published") / "x.weights.h5"
    network = se_keras.create("se_resnet20")
    network.save_weights(path)
    return network, path


def test_file_of_other_classes_leaves_the_classifier_that_was_asked_for(published):
    network, path = published
    with pytest.warns(UserWarning, match="it has 10 classes, and the classifier of 3 is left as it is, untrained$"):
        found = se_keras.create("se_resnet20", classes=3, weights=path)
    np.testing.assert_array_equal(found.get_layer("conv1").kernel, network.get_layer("conv1").kernel)
    with pytest.raises(ValueError, match="does not fit: predictions has the shape"):
        found.save_weights(path.with_name("three.weights.h5"))
        se_keras.create("se_resnet20", weights=path.with_name("three.weights.h5"))


@pytest.mark.parametrize("channels", [1, 4])
def test_file_of_other_channels_gives_an_adapted_kernel(published, channels):
    network, path = published
    with pytest.warns(UserWarning, match=f"it takes 3 channels, and its first kernel is adapted to {channels}$"):
        found = se_keras.create("se_resnet20", input_shape=(32, 32, channels), weights=path)
    kernel, expected = (np.asarray(x.get_layer("conv1").kernel) for x in (found, network))
    # As timm adapts it: summed, or repeated and scaled, here to three quarters.
    adapted = expected.sum(axis=2, keepdims=True) if channels == 1 else expected[:, :, [0, 1, 2, 0]] * 0.75
    np.testing.assert_allclose(kernel, adapted, rtol=1e-6, atol=1e-7)
