"""LiteRT's GPU delegate, on the software GPU that comes with Chromium, compared with the CPU."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import documents
import keras
import pytest
from export_fixtures import images_for, scattered

import se_keras_cli
from se_keras.catalogue import create
from se_keras.export import to_litert, verify
from se_keras.export.litert.conversion import FOR_GPU
from se_keras.export.litert.inspection import inspect
from se_keras.export.verification import ACCELERATORS
from se_keras_cli.screen import EXIT_DISAGREEMENT

CHROMIUM = Path("/usr/lib/chromium")  # Debian's
DRIVER = CHROMIUM / "vk_swiftshader_icd.json"


@pytest.fixture
def gpu(monkeypatch):
    if not DRIVER.exists():
        pytest.skip("needs Chromium's SwiftShader: apt-get install chromium")
    monkeypatch.setenv("VK_ICD_FILENAMES", str(DRIVER))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(CHROMIUM))  # Vulkan's loader


@pytest.fixture(scope="module")
def model():
    """A network with four strided 1x1 convolutions."""
    keras.utils.set_random_seed(0)
    return scattered(create("se_resnet11_digits", classes=10, classifier_activation=None))


@pytest.fixture(scope="module")
def exported(model):
    """`exported(precision)`: the network's file, for a GPU."""
    images, made = images_for(model, samples=20), {}

    def export(precision):
        if precision not in made:
            calibration = images if precision.startswith("int") else None
            converted = made.get("float32")
            made[precision] = to_litert(
                model,
                precision=precision,
                calibration=calibration,
                held_out=images,
                converted=converted,
                for_gpu=precision in FOR_GPU,
            )
        return made[precision]

    export("float32")
    return export


@pytest.fixture(scope="module")
def strided(exported, model):
    """An int8 file with its strided 1x1 convolutions."""
    images = images_for(model, samples=20)
    return to_litert(model, precision="int8", calibration=images, converted=exported("float32"))


# In float32 the kernels sum in another order, which is 1e-6 of the range; a lost bias is beyond 1e-3. Integers are
# equal, and are multiplied by their scale in float32. In dynamic files the GPU does not round values to int8.
BOUNDS = {"float32": 1e-5, "float16": 1e-5, "dynamic": 0.05, "int8": 1e-5}


@pytest.mark.parametrize(
    "precision", [pytest.param(x, marks=() if x in ("float32", "int8") else pytest.mark.slow) for x in BOUNDS]
)
def test_gpu_computes_the_outputs_of_the_cpu(precision, gpu, exported):
    file = exported(precision)
    result = verify(file, file, accelerator="gpu")
    assert result.agreement.max_error <= BOUNDS[precision]
    assert "SwiftShader" in result.gpu


def test_strided_pointwise_convolutions_in_int8_are_wrong_on_the_gpu(gpu, strided):
    # If this fails, LiteRT has mended it: then `with_dense_pointwise` and docs/guides/gpu.md say it of older versions.
    assert verify(strided, strided).agreement.max_error == 0
    assert verify(strided, strided, accelerator="gpu").agreement.max_error > 0.1


def test_inspect_warns_of_strided_pointwise_convolutions(strided, exported, tmp_path, capfd):
    files = {"strided": strided, "dense": exported("int8"), "float32": exported("float32")}
    for name, file in files.items():
        file.save(tmp_path / f"{name}.tflite")
    found = {name: inspect(tmp_path / f"{name}.tflite").wrong_on_gpu for name in files}
    assert (len(found["strided"]), found["dense"], found["float32"]) == (4, (), ())
    assert not se_keras_cli.main(["inspect", str(tmp_path / "strided.tflite")])
    err = capfd.readouterr().err
    assert "warning: LiteRT's GPU delegate computes 4 strided 1x1 convolutions of this file wrongly" in err
    assert found["strided"][0] in err


def test_command_compares_a_file_with_itself_on_the_gpu(gpu, strided, tmp_path, capsys):
    strided.save(tmp_path / "strided.tflite")
    file = str(tmp_path / "strided.tflite")
    assert se_keras_cli.main(["verify", file, "--accelerator", "gpu", "--tolerance", "0.1"]) == EXIT_DISAGREEMENT
    assert "strided.tflite on the GPU, SwiftShader" in capsys.readouterr().out


def test_machine_without_a_gpu_says_so(exported, monkeypatch):
    for name in ("VK_ICD_FILENAMES", "VK_DRIVER_FILES"):
        monkeypatch.setenv(name, "/nowhere.json")
    with pytest.raises(OSError, match=r"^LiteRT finds no GPU here \(docs/guides/gpu.md\): "):
        verify(exported("float32"), exported("float32"), accelerator="gpu")


@pytest.mark.slow
def test_file_that_the_delegate_cannot_compute_is_refused(gpu, exported):
    file = exported("int16x8")
    with pytest.raises(ValueError, match=r"GPU delegate cannot compute the file \(exit status 1\): Some ops are not"):
        verify(file, file, accelerator="gpu")


def test_what_cannot_run_there_is_refused(model, exported):
    with pytest.raises(ValueError, match="accelerator='gpu' runs LiteRT files. Received: se_resnet11_digits"):
        verify(exported("float32"), model, accelerator="gpu")
    with pytest.raises(ValueError, match=r"accelerator must be one of \('cpu', 'gpu'\). Received: accelerator='npu'"):
        verify(model, exported("float32"), accelerator="npu")


def test_command_needs_two_models_or_an_accelerator(capsys):
    assert se_keras_cli.main(["verify", "a.tflite"]) == se_keras_cli.EXIT_ERROR
    assert "verify compares two models, or one with itself on --accelerator" in capsys.readouterr().err


def test_accelerators_of_the_command_are_those_of_the_library():
    assert se_keras_cli.arguments.ACCELERATORS == ACCELERATORS


@pytest.mark.slow
def test_report_for_litert_prints_its_difference(gpu, tmp_path):
    """The program that docs/guides/gpu.md gives to LiteRT's developers."""
    (program,) = [x for x in documents.blocks("docs/guides/gpu.md") if "CompiledModel" in x.text]
    command = [sys.executable, "-c", program.text]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.stdout.endswith("strides 1: 0.0% of the range\nstrides 2: 90.5% of the range\n")


@pytest.mark.slow
def test_commands_of_the_guide_run(gpu, tmp_path):
    documents.run("docs/guides/gpu.md", tmp_path)  # makes the file
    first, second, _ = [x for x in documents.blocks("docs/guides/gpu.md") if x.title]
    installed = replace(second, text=second.text.partition("\n")[2])
    for block in (first, installed):
        documents.run_bash(block, tmp_path)
