"""`inspect` says what a file contains, and whether it and its outputs agree with its manifest."""

import json
import random
from collections import Counter

import keras
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from keras import layers

from se_keras.export import description, inspect, to_litert
from se_keras.export.litert import file
from se_keras.export.litert.file import LiteRTRunner
from se_keras.export.litert.inspection import ReferenceCheck
from se_keras.export.litert.metadata import detach
from se_keras.layers import SqueezeExcite

PRECISIONS = ("float32", "int8")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The path of a small SE network's file in each precision."""
    keras.utils.set_random_seed(0)
    folder = tmp_path_factory.mktemp("files")
    images = keras.Input((8, 8, 3), name="images")
    x = SqueezeExcite(4, name="se")(layers.Conv2D(16, 3, activation="relu")(images))
    outputs = layers.Dense(4, activation="softmax")(layers.GlobalAveragePooling2D()(x))
    model = keras.Model(images, outputs, name="small")
    calibration = np.random.default_rng(0).normal(size=(20, 8, 8, 3)).astype("float32")
    float32 = to_litert(model, labels=list("abcd"), normalization=(127.5, 64), training={"epochs": 3})
    float32.save(folder / "float32.tflite")
    to_litert(model, precision="int8", calibration=calibration, converted=float32).save(folder / "int8.tflite")
    return {precision: folder / f"{precision}.tflite" for precision in PRECISIONS}


@pytest.fixture
def copy(files, tmp_path):
    """A copy of a file and its manifest, to be damaged: its path."""

    def copied(precision="float32"):
        for path in (files[precision], manifest_of(files[precision])):
            (tmp_path / path.name).write_bytes(path.read_bytes())
        return tmp_path / files[precision].name

    return copied


def manifest_of(path):
    return path.with_name(path.name + ".json")


def edit(path, change):
    """Changes the record of the reference output in the manifest of a file."""
    manifest = json.loads(manifest_of(path).read_text())
    change(manifest["golden"])
    manifest_of(path).write_text(json.dumps(manifest))


def interpreter(path, **options):
    opened = Interpreter(model_content=path.read_bytes(), **options)
    opened.allocate_tensors()
    return opened


PLAIN = {"experimental_op_resolver_type": OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES}


def ends(operators, side):
    """The input or output tensors of operators; -1 stands for none."""
    return {int(tensor) for operator in operators for tensor in operator[side]} - {-1}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_operators_tensors_and_weights_are_the_runtimes(files, precision):
    found, opened = inspect(files[precision]), interpreter(files[precision], **PLAIN)
    operators = opened._get_ops_details()
    inputs, outputs = ends(operators, "inputs"), ends(operators, "outputs")
    assert found.operators == Counter(operator["op_name"] for operator in operators)
    assert found.tensors == len(inputs | outputs)
    sizes = Counter()
    for index in inputs - outputs - {opened.get_input_details()[0]["index"]}:
        values = opened.get_tensor(index)
        sizes[values.dtype.name] += values.nbytes
    assert found.weights == sizes


@pytest.mark.parametrize("precision", PRECISIONS)
def test_signature_size_and_checks(files, precision):
    found = inspect(files[precision])
    assert [(x.name, x.shape, x.dtype, x.scale) for x in found.inputs] == [("images", (1, 8, 8, 3), "float32", None)]
    assert [(x.name, x.shape, x.dtype) for x in found.outputs] == [("probabilities", (1, 4), "float32")]
    assert found.bytes == files[precision].stat().st_size
    assert found.manifest == json.loads(manifest_of(files[precision]).read_text())
    assert (found.checked, found.sha256) == ("manifest", found.manifest["sha256"])
    assert found.undelegated == ()
    # The same kernels on the same machine.
    assert found.reference == ReferenceCheck(error=0.0, tolerance={"float32": 1e-4, "int8": 0.1}[precision])
    assert found.reference.agrees
    assert (found.metadata.network, found.metadata.precision) == ("small", precision)
    assert (found.metadata.labels, found.metadata.training) == (tuple("abcd"), {"epochs": 3})


def test_operators_that_fell_off_xnnpack_are_named(tmp_path):
    images = keras.Input((4, 4, 2), name="images")
    to_litert(keras.Model(images, keras.ops.cumsum(images, axis=1))).save(tmp_path / "slow.tflite")
    found = inspect(tmp_path / "slow.tflite")
    assert found.undelegated == ("CUMSUM",)


def test_it_is_json(files):
    found = inspect(files["int8"])
    read = json.loads(json.dumps(found.to_json()))
    assert read["golden"] == {"error": 0.0, "tolerance": 0.1, "agrees": True}
    assert read["metadata"]["labels"] == list("abcd")
    assert read["operators"] == found.operators


def test_quantized_input_and_output_have_scale_and_zero_point(files, monkeypatch):
    from ai_edge_litert import schema_py_generated as schema

    from se_keras.export.litert import inspection

    model = schema.Model.GetRootAs(files["int8"].read_bytes())
    graph = model.Subgraphs(0)
    quantized = [i for i in range(graph.TensorsLength()) if graph.Tensors(i).Type() == schema.TensorType.INT8]
    monkeypatch.setattr(inspection.metadata, "tensor_names", lambda _: {i: f"t{i}" for i in quantized})
    details = {tensor["index"]: tensor for tensor in interpreter(files["int8"], **PLAIN).get_tensor_details()}
    for index, found in zip(quantized, inspection._tensors(model, quantized), strict=True):
        scales, zeros = (details[index]["quantization_parameters"][name] for name in ("scales", "zero_points"))
        assert (found.dtype, found.scale, found.zero_point) == ("int8", scales[0], zeros[0])


# Without a manifest, and without metadata.


def test_without_manifest_the_metadata_have_the_checksum(copy):
    path = copy()
    manifest_of(path).unlink()
    found = inspect(path)
    assert (found.checked, found.manifest, found.reference) == ("metadata", None, None)
    assert found.metadata.precision == "float32"


def test_without_both_it_still_says_what_is_in_the_file(copy):
    path = copy("int8")
    manifest_of(path).unlink()
    path.write_bytes(detach(path.read_bytes()))
    found = inspect(path)
    assert (found.checked, found.manifest, found.reference, found.metadata) == (None, None, None, None)
    assert [x.name for x in found.inputs] == ["images"]


def test_manifest_of_an_older_version_has_no_golden_output(copy):
    path = copy()
    manifest = json.loads(manifest_of(path).read_text())
    del manifest["golden"]
    manifest_of(path).write_text(json.dumps(manifest))
    found = inspect(path)
    assert (found.checked, found.reference) == ("manifest", None)


# The reference output.


def test_golden_input_is_made_by_its_rule(files):
    record = json.loads(manifest_of(files["float32"]).read_text())["golden"]["input"]
    x, values = record["seed"], []
    for _ in range(8 * 8 * 3):
        x = (1664525 * x + 1013904223) % 2**32
        values.append(record["low"] + (record["high"] - record["low"]) * x / 2**32)
    images = np.array(values, "<f4").reshape(record["shape"])
    np.testing.assert_array_equal(description._images(record), images)
    assert description.sha256(images.tobytes()) == record["sha256"]


def test_golden_input_of_integers_takes_all_of_them():
    recipe = {"shape": [1, 64, 64, 3], "dtype": "uint8", "seed": 0, "low": 0, "high": 256}
    images = description._images(recipe)
    assert images.dtype == np.uint8 and set(images.reshape(-1)) == set(range(256))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_output_that_is_no_number_is_infinitely_far(value):
    def ones(images):
        return {"x": np.ones((1, 3), "float32")}

    def broken(images):
        return {"x": np.array([[1, value, 1]], "float32")}

    ones.input_dtype = np.dtype("float32")
    record = description.reference_outputs(ones, low=0.0, high=1.0, precision="float32", shape=(1, 2, 2, 1))
    assert (description.reference_error(ones, record), description.reference_error(broken, record)) == (0, np.inf)


def test_golden_output_of_many_values_is_every_nth(files):
    class Wide:
        input_shape, input_dtype = (1, 2, 2, 1), np.dtype("float32")

        def __call__(self, images):
            return {"features": np.arange(200, dtype="float32").reshape(1, 200)}

    record = description.reference_outputs(Wide(), low=0, high=1, precision="float32")
    assert record["outputs"]["features"] == {"every": 4, "values": [float(i) for i in range(0, 200, 4)]}
    assert description.reference_error(Wide(), record) == 0


@pytest.mark.parametrize("precision", PRECISIONS)
def test_other_kernels_are_within_the_tolerance(files, precision):
    """LiteRT's reference kernels represent those of another machine."""
    runner = LiteRTRunner(files[precision].read_bytes())
    options = {"experimental_op_resolver_type": OpResolverType.BUILTIN_REF}
    runner._interpreter = interpreter(files[precision], **options)
    record = json.loads(manifest_of(files[precision]).read_text())["golden"]
    assert description.reference_error(runner, record) <= record["tolerance"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_other_golden_output_is_found(copy, precision):
    path = copy(precision)

    def change(record):
        values = record["outputs"]["probabilities"]["values"]
        values[1] += 2 * record["tolerance"] * max(values)

    edit(path, change)
    found = inspect(path)
    assert not found.reference.agrees
    assert found.reference.error > found.reference.tolerance
    assert found.to_json()["golden"]["agrees"] is False


def test_file_that_computes_something_else_is_found(copy, files):
    """The reference output of one network next to the file of another, with the right checksum."""
    path, other = copy(), to_litert(small())
    manifest = json.loads(manifest_of(path).read_text())
    path.write_bytes(other.content)
    manifest_of(path).write_text(json.dumps({**manifest, "sha256": other.manifest["sha256"]}))
    assert not inspect(path).reference.agrees


def small():
    keras.utils.set_random_seed(1)
    images = keras.Input((8, 8, 3), name="images")
    return keras.Model(images, layers.Dense(4, activation="softmax")(layers.Flatten()(images)), name="other")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda record: record["input"].update(seed=1), "The reference input cannot be reproduced"),
        (lambda record: record["input"].update(shape="eight"), "of a LiteRT file: golden.input.shape must be a list"),
        (lambda record: record["input"].update(shape=[1, 9**9]), "is damaged: The reference input has more than "),
        (lambda record: record["input"].update(dtype="?!"), "reference output in the manifest of .* is damaged"),
        (lambda record: record["input"].clear(), "of a LiteRT file: golden.input lacks dtype, high, low, seed, sha256"),
        (lambda record: record.clear(), "of a LiteRT file: golden lacks input, outputs, tolerance"),
        (lambda record: record.update(outputs=3), "of a LiteRT file: golden.outputs must be an object. Received: 3"),
        (lambda record: record.update(tolerance=None), "golden.tolerance must be a number. Received: null"),
        (lambda record: record.update(outputs={}), r"reference outputs are \[\]. Received: \['probabilities'\]"),
        (lambda record: record["outputs"]["probabilities"]["values"].pop(), "has 3 reference values. Received: 4"),
    ],
)
def test_damaged_golden_record_is_an_error(copy, change, message):
    path = copy()
    edit(path, change)
    with pytest.raises(ValueError, match=message):
        inspect(path)


# Bad files.


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no LiteRT file '.*missing.tflite'"):
        inspect(tmp_path / "missing.tflite")


def test_foreign_file_is_an_error(tmp_path):
    (tmp_path / "text.tflite").write_text("not a model at all")
    with pytest.raises(ValueError, match="text.tflite' is not a LiteRT file"):
        inspect(tmp_path / "text.tflite")


@pytest.mark.parametrize("seed", range(20))
def test_flipped_bit_is_found_before_anything_runs(copy, seed, monkeypatch):
    monkeypatch.setattr(file, "LiteRTRunner", None)
    path = copy()
    content = bytearray(path.read_bytes())
    place = random.Random(seed).randrange(8, len(content))
    content[place] ^= 1 << seed % 8
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not the file that was exported: its SHA-256 is not its manifest's"):
        inspect(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("has_manifest", [True, False])
def test_truncated_file_is_an_error(copy, share, has_manifest):
    path = copy()
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    message = "SHA-256 is not its manifest's"
    if not has_manifest:
        manifest_of(path).unlink()
        message = "float32.tflite': (Not a LiteRT file that can be run here|The metadata of the file cannot be read)"
    with pytest.raises(ValueError, match=message):
        inspect(path)
