"""LiteRT files of every family in other programs that read them. The sweep of test_networks.py has every kind."""

import re
import struct

import documents
import keras
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from export_fixtures import images_for, scattered
from readers import NEEDED, PRECISIONS, READERS, UNREAD, assert_read, on_each_reader

from se_keras.catalogue import FAMILIES, create, family_of
from se_keras.export import to_litert
from se_keras.export.litert.inspection import inspect
from se_keras.export.litert.packing import schema

DIGITS = "se_resnet11_digits"
# One of each family, at a size that leaves a few positions to the last stage.
NETWORKS = {
    DIGITS: 8,
    "se_resnet50": 64,
    "se_vgg11_bn": 32,
    "se_bn_inception": 64,
    "se_mobilenet_025": 64,
    "se_shufflenet_g3_025": 64,
    "se_resnet20": 16,
}


def network(name):
    keras.utils.set_random_seed(0)
    channels = 1 if name == DIGITS else 3
    model = create(name, input_shape=(NETWORKS[name], NETWORKS[name], channels), classifier_activation=None)
    return scattered(model, images=images_for(model, samples=16, seed=1), beta=(0.5, 1.5))


@pytest.fixture(scope="module")
def digits():
    return network(DIGITS)


@pytest.fixture(
    scope="module", params=[pytest.param(x, marks=() if x == DIGITS else pytest.mark.slow) for x in NETWORKS]
)
def exported(request, digits):
    """The files of a network, `{precision: content}`, and images for it."""
    model = digits if request.param == DIGITS else network(request.param)
    images = images_for(model, samples=10)
    float32 = to_litert(model, held_out=images)
    files = {"float32": float32.content}
    for precision in PRECISIONS[1:]:
        calibration = images if precision == "int8" else None
        files[precision] = to_litert(
            model, precision=precision, calibration=calibration, held_out=images, converted=float32
        ).content
    return files, images[:4]


def test_every_family_has_a_network():
    assert {family_of(name) for name in NETWORKS} == {family.__name__.rpartition(".")[2] for family in FAMILIES}


@pytest.mark.parametrize("precision", PRECISIONS)
@on_each_reader
def test_reader_computes_what_litert_does(reader, precision, exported, capfd):
    files, images = exported
    if cause := UNREAD.get((reader, precision)):
        with pytest.raises(RuntimeError):
            READERS[reader](files[precision], images)
        assert cause in capfd.readouterr().err
        return
    assert_read(reader, precision, files, images)
    if arena := re.search(r"Arena allocation total (\d+) bytes", capfd.readouterr().err):
        print(f"{len(files[precision]):,} bytes in {precision} take {int(arena[1]):,} bytes of memory")


@NEEDED["tflite-micro"]
@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_microcontroller_takes_and_gives_integers(kind, digits):
    images = images_for(digits, samples=10)
    options = {"precision": "int8", "input_type": kind, "output_type": kind, "normalization": (128, 64)}
    content = to_litert(digits, calibration=images, **options).content
    pixels = np.clip(np.rint(64 * images + 128), 0, 255) - (128 if kind == "int8" else 0)
    assert_read("tflite-micro", "int8", {"int8": content}, pixels.astype(kind)[:4])


@NEEDED["tflite-micro"]
def test_microcontroller_gives_probabilities_in_int8_but_not_in_uint8(capfd):
    model = create(DIGITS, classes=10)
    images = images_for(model, samples=10)
    float32 = to_litert(model, held_out=images)
    int8, uint8 = (
        to_litert(model, precision="int8", calibration=images, output_type=kind, converted=float32).content
        for kind in ("int8", "uint8")
    )
    assert_read("tflite-micro", "int8", {"int8": int8}, images[:4])
    with pytest.raises(RuntimeError):
        READERS["tflite-micro"](uint8, images[:1])
    assert "Input FLOAT32, output UINT8 not supported" in capfd.readouterr().err


def test_interpreter_runs_the_verifier_of_flatbuffers(exported):
    """Else a name that no kernel reads could point anywhere. flatc and its schema are in no wheel of LiteRT."""
    files, _ = exported
    for content in files.values():
        damaged = bytearray(content)
        table = schema.Model.GetRootAs(damaged).Subgraphs(0).Tensors(0)._tab
        struct.pack_into("<I", damaged, table.Pos + table.Offset(10), 2**30)  # the offset of the name
        with pytest.raises(ValueError, match="not a valid Flatbuffer"):
            Interpreter(model_content=bytes(damaged))
        Interpreter(model_content=content)


@pytest.mark.slow
@NEEDED["tflite-micro"]
def test_programs_of_the_guide_run(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    documents.run("docs/guides/microcontroller.md", tmp_path)
    assert (tmp_path / "digits_micro.cc").read_text().startswith("alignas(16) extern const unsigned char")
    (program,) = [x for x in documents.blocks("docs/guides/microcontroller.md") if x.title]
    exec(program.text, {})
    (arena,) = re.findall(r"Arena allocation total (\d+) bytes", capfd.readouterr().err)
    assert int(arena) < 40 * 1024  # as in the guide's C++
    page = (documents.ROOT / "docs/guides/microcontroller.md").read_text()
    registered = set(re.findall(r"operators\.Add(\w+)\(", page))
    operators = inspect(tmp_path / "digits_micro.tflite").operators
    assert {name.replace("_", "").lower() for name in operators} <= {name.lower() for name in registered}
