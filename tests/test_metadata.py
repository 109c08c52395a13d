"""What an app needs to know about a .tflite file is in the file, and the rest of the file stays the same."""

import io
import json
import re
import struct
import zipfile
from dataclasses import replace

import keras
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from ai_edge_litert.tools import flatbuffer_utils
from keras import layers

from se_keras.export import to_litert
from se_keras.export.description import Metadata, describe
from se_keras.export.litert import metadata
from se_keras.export.litert.metadata import attach, check, detach, read
from se_keras.export.litert.packing import packed
from se_keras.layers import SqueezeExcite

LABELS = ("tench", "goldfish", "great white shark", "Köter [1]")
DESCRIPTION = {
    "labels": LABELS,
    "normalization": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    "training": {"data": "digits", "recipe": {"epochs": 3, "seed": 0}, "figures": {"loss": [0.5, 0.25]}},
}
PRECISIONS = ("float32", "int8")


def pixels(samples, seed=0):
    return np.random.default_rng(seed).normal(size=(samples, 8, 8, 3)).astype("float32")


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    images = keras.Input((8, 8, 3), name="images")
    x = SqueezeExcite(4, name="se")(layers.Conv2D(16, 3, activation="relu")(images))
    outputs = layers.Dense(4, activation="softmax")(layers.GlobalAveragePooling2D()(x))
    return keras.Model(images, outputs, name="small")


@pytest.fixture(scope="module")
def exported(model):
    """The model's files, `{precision: LiteRTModel}`; the int8 file gets its description from the float32 file."""
    float32 = to_litert(model, **DESCRIPTION)
    return {"float32": float32, "int8": to_litert(model, precision="int8", calibration=pixels(20), converted=float32)}


def with_weights_after_the_flatbuffer(content):
    """The same model with its weights after the flatbuffer, as ai-edge-quantizer and older versions write them."""
    return packed(flatbuffer_utils.read_model_from_bytearray(content), largest_inside=0)


@pytest.fixture(scope="module", params=[*PRECISIONS, "float32 behind", "int8 behind"])
def plain(request, exported):
    """A file without metadata."""
    precision, *weights_after = request.param.split()
    content = detach(exported[precision].content)
    return with_weights_after_the_flatbuffer(content) if weights_after else content


ABOUT = Metadata(network="small", precision="float32", **DESCRIPTION)


def run(content):
    """Outputs from the runtime itself."""
    interpreter = Interpreter(model_content=content, num_threads=1)
    signature = interpreter.get_signature_runner("serving_default")
    return [signature(images=image[None])["probabilities"] for image in pixels(3, seed=1)]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_exported_file_says_what_it_was_told(exported, precision):
    assert read(exported[precision].content) == replace(ABOUT, precision=precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_file_is_a_zip_archive_with_its_labels(exported, precision, tmp_path):
    exported[precision].save(tmp_path / "small.tflite")
    with zipfile.ZipFile(tmp_path / "small.tflite") as archive:
        assert archive.testzip() is None
        assert archive.read("labels.txt").decode().split("\n") == list(LABELS)
        # MediaPipe reads them in place.
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}


def test_metadata_are_a_flatbuffer_that_the_model_names(exported):
    model = schema.Model.GetRootAs(exported["float32"].content)
    entries = {model.Metadata(i).Name(): model.Metadata(i).Buffer() for i in range(model.MetadataLength())}
    assert b"min_runtime_version" in entries  # the converter's own are still there
    # In the flatbuffer itself: MediaPipe does not read what follows it.
    assert model.Buffers(entries[b"TFLITE_METADATA"]).DataAsNumpy().tobytes()[4:8] == b"M001"


def test_outputs_are_the_same_bit_for_bit(plain):
    for ours, before in zip(run(attach(plain, ABOUT)), run(plain), strict=True):
        np.testing.assert_array_equal(ours, before)


def test_everything_stays_as_aligned_as_it_was(plain):
    attached = attach(plain, ABOUT)
    if b"\1" not in {bytes([schema.Model.GetRootAs(plain).Buffers(i).Offset() > 1]) for i in range(3)}:
        assert attached.count(plain) == 1
    model, before = schema.Model.GetRootAs(attached), schema.Model.GetRootAs(plain)
    moved = {model.Buffers(i)._tab.Pos - before.Buffers(i)._tab.Pos for i in range(before.BuffersLength())}
    assert len(moved) == 1 and moved.pop() % 64 == 0


def test_detach_gives_back_the_file_byte_for_byte(plain):
    assert detach(attach(plain, ABOUT)) == plain
    assert detach(plain) == plain


def test_attach_replaces(plain):
    other = Metadata(network="other", precision="int8", labels=("a", "b", "c", "d"))
    assert attach(attach(plain, ABOUT), other) == attach(plain, other)
    assert read(attach(plain, other)) == other


def test_file_without_metadata_has_none(plain):
    assert read(plain) is None
    assert check(plain) is None


def test_same_model_gives_the_same_bytes(model, exported):
    assert to_litert(model, **DESCRIPTION).content == exported["float32"].content


def test_nothing_told_leaves_the_names(model):
    about = read(to_litert(model).content)
    assert about == Metadata(network="small", precision="float32")


def test_what_is_told_anew_goes_before_what_the_converted_file_says(model, exported):
    labels = ("a", "b", "c", "d")
    again = to_litert(model, converted=exported["float32"], labels=labels)
    assert read(again.content) == replace(ABOUT, labels=labels)


def test_one_number_is_every_channels(plain):
    about = described(normalization=(127.5, 127.5))
    assert about.normalization == ((127.5,), (127.5,))
    assert described(normalization=([127.5] * 3, [127.5] * 3)) == about
    assert read(attach(plain, about)) == about


def test_mean_for_each_channel_may_stand_beside_one_std():
    assert described(normalization=((1, 2, 3), 4)).normalization == ((1.0, 2.0, 3.0), (4.0, 4.0, 4.0))


def test_labels_may_be_numpys():
    assert described(labels=np.array(LABELS)).labels == LABELS


@pytest.fixture
def foreign(plain, monkeypatch):
    """A file with metadata of another program, without our record."""
    with monkeypatch.context() as patch:
        patch.setattr(metadata, "RECORD_FILE", "readme.json")
        return attach(plain, ABOUT)


def test_metadata_of_another_maker_are_read_and_kept(foreign):
    assert read(foreign) == replace(ABOUT, precision="unknown", training=None)
    with pytest.raises(ValueError, match="a file without any. Received: one with metadata of another program"):
        attach(foreign, ABOUT)
    assert detach(foreign) == foreign


# Invalid descriptions.


def described(**arguments):
    return describe(**{"network": "small", "precision": "float32", "channels": 3, "classes": 4} | arguments)


NORMALIZATION = r"normalization must be \(mean, std\), .* of 3 channels, std above zero. Received: normalization="


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"labels": LABELS[:3]}, ValueError, "the network has 4 classes. Received: 3 labels"),
        ({"labels": ()}, ValueError, "the network has 4 classes. Received: 0 labels"),
        ({"labels": LABELS, "classes": None}, ValueError, "the network has no classes. Received: 4 labels"),
        ({"labels": ("a", "b", "c", "b")}, ValueError, "Labels must differ: .* Received: 'b' twice"),
        ({"labels": ("a", "b", "c\nd", "e")}, ValueError, r"one line of text .* Received: 'c\\nd'"),
        ({"labels": ("a", "b", "c\u2028d", "e")}, ValueError, "one line of text"),
        ({"labels": ("a", "b", "c", "")}, ValueError, "one line of text .* Received: ''"),
        ({"labels": ("a", "b", "c", " d")}, ValueError, "without space around it. Received: ' d'"),
        ({"labels": ("a", "b", "c", 4)}, TypeError, "labels must be a sequence of strings. Received: labels="),
        ({"labels": "abcd"}, TypeError, "labels must be a sequence of strings. Received: labels='abcd'"),
        ({"labels": 4}, TypeError, "labels must be a sequence of strings. Received: labels=4"),
        ({"normalization": (0, 0)}, ValueError, NORMALIZATION),
        ({"normalization": (0, (1, 0, 1))}, ValueError, NORMALIZATION),
        ({"normalization": (0, -1)}, ValueError, NORMALIZATION),
        ({"normalization": (0, ())}, ValueError, NORMALIZATION),
        ({"normalization": ((1, 2), 1)}, ValueError, NORMALIZATION),
        ({"normalization": (float("nan"), 1)}, ValueError, NORMALIZATION),
        ({"normalization": (0, float("inf"))}, ValueError, NORMALIZATION),
        ({"normalization": (0, 1, 2)}, TypeError, NORMALIZATION),
        ({"normalization": 255}, TypeError, NORMALIZATION),
        ({"normalization": ("mean", "std")}, TypeError, NORMALIZATION),
        ({"training": ["digits"]}, TypeError, "training must be a dict for JSON. Received: list"),
        ({"training": {"loss": float("nan")}}, ValueError, "training must be a dict for JSON: "),
        ({"training": {"model": {1}}}, TypeError, "training must be a dict for JSON: "),
    ],
    ids=repr,
)
def test_what_cannot_be_said_is_an_error(arguments, error, message):
    with pytest.raises(error, match=message):
        described(**arguments)


def test_labels_that_do_not_fit_are_an_error_before_anything_is_converted(model, monkeypatch):
    monkeypatch.setattr("se_keras.export.litert.conversion._convert", None)
    with pytest.raises(ValueError, match="the network has 4 classes. Received: 1 label"):
        to_litert(model, labels=["cat"])


def test_network_without_classes_takes_no_labels(monkeypatch):
    monkeypatch.setattr("se_keras.export.litert.conversion._convert", None)
    images = keras.Input((8, 8, 3), name="images")
    with pytest.raises(ValueError, match="the network has no classes. Received: 4 labels"):
        to_litert(keras.Model(images, layers.Conv2D(4, 3)(images)), labels=LABELS)


# Damage.


@pytest.fixture(scope="module")
def attached(exported):
    return exported["float32"].content


def flipped(content, place):
    content = bytearray(content)
    content[place] ^= 1
    return bytes(content)


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.6, 0.8])
def test_flipped_bit_of_the_model_is_noticed(attached, share):
    end = zipfile.ZipFile(io.BytesIO(attached)).infolist()[0].header_offset
    with pytest.raises(ValueError, match="not the one that was exported: its SHA-256 is not its metadata's"):
        read(flipped(attached, int(share * end)))


@pytest.mark.parametrize("text", [b"tench", b"great white shark", b'"epochs"', b'"begin"'])
def test_flipped_bit_of_the_metadata_is_noticed(attached, text):
    with pytest.raises(ValueError, match="The metadata of the file are damaged: Bad CRC-32"):
        read(flipped(attached, attached.index(text)))


def repacked(content, name, text, **options):
    """The file with another text in its archive."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        files = {entry.filename: archive.read(entry) for entry in archive.infolist()}
        end = archive.infolist()[0].header_offset
    file = io.BytesIO(content[:end])
    with zipfile.ZipFile(file, "a", **options) as archive:
        for each, old in files.items():
            archive.writestr(each, text if each == name else old)
    return file.getvalue()


@pytest.mark.parametrize(
    "change", [lambda x: x[::-1], lambda x: x[:-1], lambda x: [*x[:-1], x[0]], lambda x: [*x, "x"]]
)
def test_labels_that_are_not_the_exported_ones_are_noticed(attached, change):
    text = "\n".join(change(list(DESCRIPTION["labels"])))
    with pytest.raises(
        ValueError, match="labels.txt is not the one that was exported: its SHA-256 is not the record's"
    ):
        read(repacked(attached, "labels.txt", text))


def older(content, **training):
    """The file without the checksum of its labels, which earlier versions did not write."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        record = json.loads(archive.read("se_keras.json"))
    del record["labels_sha256"]
    return repacked(content, "se_keras.json", json.dumps(record | {"training": training}))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x[::-1], "labels.txt has the classes of the training in another order"),
        (lambda x: x[:-1], "labels.txt must name each of {classes} classes once. Received: {one_less} labels"),
        (lambda x: [*x[:-1], x[0]], "labels.txt must name each of {classes} classes once. Received: {classes} labels"),
    ],
)
def test_labels_in_the_wrong_number_order_or_twice_are_noticed_in_older_files(attached, change, message):
    labels = list(DESCRIPTION["labels"])
    content = older(attached, classes=labels)
    assert read(content).labels == tuple(labels)
    expected = message.format(classes=len(labels), one_less=len(labels) - 1)
    with pytest.raises(ValueError, match=expected):
        read(repacked(content, "labels.txt", "\n".join(change(labels))))


@pytest.mark.parametrize("name", ["labels.txt", "se_keras.json"])
def test_file_of_a_gigabyte_in_a_short_archive_is_not_read(attached, name):
    content = repacked(attached, name, bytes(2**25), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=f"metadata of the file are damaged: {name} says that it has 33,554,432 bytes"):
        read(content)


@pytest.mark.parametrize("record", ["", "[]", "3", "{}", '{"sha256"'])
def test_damaged_record_is_an_error(plain, record, monkeypatch):
    written = attach(plain, ABOUT)
    end = zipfile.ZipFile(io.BytesIO(written)).infolist()[0].header_offset
    file = io.BytesIO(written[:end])
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("se_keras.json", record)
    with pytest.raises(ValueError, match="se_keras.json is not the record of an export"):
        read(file.getvalue())


@pytest.mark.parametrize("seed", range(5))
def test_damaged_metadata_of_another_maker_are_an_error_or_read(foreign, seed):
    packed = foreign.index(b"M001")
    content, random = bytearray(foreign), np.random.default_rng(seed)
    for place in packed + random.integers(4, 300, size=20):
        content[place] = random.integers(256)
    try:
        found = read(bytes(content))
    except ValueError as error:
        assert re.match("The metadata of the file cannot be read: .+", str(error))
    else:
        assert isinstance(found, Metadata)


def test_file_that_lost_its_archive_is_an_error(attached):
    end = zipfile.ZipFile(io.BytesIO(attached)).infolist()[0].header_offset
    for length in (end, len(attached) - 1):
        with pytest.raises(ValueError, match="cannot be read: labels.txt, se_keras.json should follow the model"):
            read(attached[:length])


def test_record_says_where_the_model_was(plain):
    written = attach(plain, ABOUT)
    record = json.loads(zipfile.ZipFile(io.BytesIO(written)).read("se_keras.json"))
    begin, end = record["model"]["begin"], record["model"]["end"]
    assert struct.unpack_from("<I4s", written, begin) == struct.unpack_from("<I4s", plain)
    assert end - begin == len(plain)
    assert record["network"] == "small" and record["training"] == DESCRIPTION["training"]
