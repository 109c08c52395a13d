"""The quick start in short: three epochs, exports, agreement, overhead; and a second run in the same folder."""

import json
from dataclasses import dataclass, replace

import keras
import pytest
import tensorflow as tf

import se_keras.quickstart as module
import se_keras_cli
from se_keras.export.benchmark.report import as_html
from se_keras.export.litert.file import load_litert
from se_keras.runs import MODEL_FILE, RUN_FILE
from se_keras.training import checkpoint, record
from se_keras.training.recipes import DIGITS

pytestmark = pytest.mark.slow

NETWORKS = ("resnet11_digits", "se_resnet11_digits")
EXPORTS = ("digits.tflite", "digits_int8.tflite", "savedmodel/1")
SHORT = {"recipe": replace(DIGITS, epochs=3), "measured": "se_resnet11_digits", "blocks": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Report, folder, and the lines of progress of a first run."""
    folder, messages = tmp_path_factory.mktemp("quickstart") / "first", []
    return module.quickstart(folder, **SHORT, progress=messages.append), folder, messages


@pytest.fixture
def report(made):
    return made[0]


@pytest.fixture
def folder(made):
    return made[1]


def test_report_on_the_disk_is_the_one_returned(report, folder):
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(report))


def test_report_has_its_fields(report):
    assert set(report) == {"schema", "environment", "training", "exports", "overhead", "paper", "seconds"}
    assert report["schema"] == 1
    assert report["paper"]["ratio"] == pytest.approx(167 / 164)
    assert report["seconds"] > 0


@pytest.mark.parametrize("field", ["processor", "cores", "system", "python", "runtime", "versions"])
def test_report_tells_where_it_was_measured(report, field):
    assert report["environment"][field]


def test_report_has_the_baseline_then_the_network(report):
    assert tuple(report["training"]) == NETWORKS


@pytest.mark.parametrize("network", NETWORKS)
def test_training_is_in_the_report(report, folder, network):
    run = report["training"][network]
    assert (run["images"], run["test_images"], run["epochs"]) == (1437, 360, 3)
    # A random guess has 0.1.
    assert 0.9 < run["test_accuracy"] <= 1
    assert run["parameters"] == keras.saving.load_model(folder / run["file"]).count_params()


def test_network_has_more_parameters_than_its_baseline(report):
    baseline, network = (report["training"][name]["parameters"] for name in NETWORKS)
    assert baseline < network


def test_report_has_every_export(report):
    assert tuple(report["exports"]) == EXPORTS


@pytest.mark.parametrize("export", EXPORTS)
def test_export_is_where_the_report_says_and_as_large(report, folder, export):
    files = [folder / export] if (folder / export).is_file() else list((folder / export).rglob("*"))
    assert report["exports"][export]["bytes"] == sum(file.stat().st_size for file in files if file.is_file())


@pytest.mark.parametrize("export", ["digits.tflite", "savedmodel/1"])
def test_float32_export_agrees_with_keras_on_every_test_image(report, export):
    agreement = report["exports"][export]["agreement"]
    assert (agreement["samples"], agreement["held_out"], agreement["top1"]) == (360, True, 1)
    # The exporters refuse 1e-3; trained networks are at rounding.
    assert 0 <= agreement["max_error"] < 1e-5


def test_int8_export_agrees_with_keras(report):
    agreement = report["exports"]["digits_int8.tflite"]["agreement"]
    assert (agreement["samples"], agreement["held_out"]) == (360, True)
    assert 0.9 <= agreement["top1"] <= 1
    assert 0.9 <= agreement["cosine"] <= 1


@pytest.mark.parametrize("export", ["digits.tflite", "digits_int8.tflite"])
def test_accuracy_of_an_export_is_that_of_the_network_but_for_the_images_where_they_disagree(report, export):
    made = report["exports"][export]
    apart = abs(made["test_accuracy"] - report["training"]["se_resnet11_digits"]["test_accuracy"])
    assert apart <= 1 - made["agreement"]["top1"] + 1e-6
    assert 0 <= made["test_accuracy"] <= 1


def test_int8_export_is_less_than_half_the_size(report):
    exports = report["exports"]
    assert exports["digits_int8.tflite"]["bytes"] < exports["digits.tflite"]["bytes"] / 2


@pytest.mark.parametrize("export, precision", [("digits.tflite", "float32"), ("digits_int8.tflite", "int8")])
def test_litert_files_are_those_of_their_manifests(folder, export, precision):
    assert load_litert(folder / export).manifest["precision"] == precision


def test_savedmodel_serves_images(folder):
    serve = tf.saved_model.load(str(folder / "savedmodel" / "1")).signatures["serving_default"]
    assert serve(images=tf.zeros((2, 8, 8, 1)))["probabilities"].shape == (2, 10)


def test_overhead_is_measured_in_both_forms_and_precisions(report):
    measured = [(record["form"], record["precision"]) for record in report["overhead"]]
    assert measured == [(form, precision) for form in ("published", "lowered") for precision in ("float32", "int8")]


@pytest.mark.parametrize("index", range(4))
def test_overhead_is_that_of_the_network_beside_its_baseline(report, index):
    record = report["overhead"][index]
    assert (record["baseline"], record["network"]) == NETWORKS
    assert (record["threads"], record["input_shape"], record["undelegated"]) == (1, (1, 8, 8, 1), ())
    comparison = record["comparison"]
    assert comparison["blocks"] == 2
    for ratio in (comparison["ratio"], comparison["null"]):
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]


def test_progress_tells_every_step(made):
    messages = made[2]
    for network in NETWORKS:
        assert [line.partition(",")[0] for line in messages if line.startswith(f"training {network} ")] == [
            f"training {network} on digits: {epoch} of 3 epochs done" for epoch in range(4)
        ]
    assert [line for line in messages if line.startswith("exporting se_resnet11_digits to LiteRT")]
    assert len([line for line in messages if line.startswith("timing ")]) == 4


def test_folder_holds_the_files_of_the_report_and_no_partial_ones(folder):
    assert {path.name for path in folder.iterdir()} == {
        *NETWORKS, "digits.tflite", "digits.tflite.json", "digits_int8.tflite", "digits_int8.tflite.json", "savedmodel",
        "report.json", "report.html",
    }  # fmt: skip
    run = {MODEL_FILE, RUN_FILE, checkpoint.FILE, record.CSV, record.EVENTS, *record.CURVES}
    assert {path.name for network in NETWORKS for path in (folder / network).iterdir()} == run


@dataclass
class Measured:
    """An `Overhead` of the first run."""

    record: dict

    def to_json(self):
        return self.record


@pytest.fixture(scope="module")
def again(made):
    """The report of a second run in the first one's folder, which must not train; nothing is converted or measured."""
    converted = {"float32": load_litert(made[1] / "digits.tflite"), "int8": load_litert(made[1] / "digits_int8.tflite")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "to_litert", lambda _, precision="float32", **__: converted[precision])
        patch.setattr(keras.Model, "fit", lambda *_, **__: pytest.fail("A finished run was trained"))
        patch.setattr(module.Host, "measure", lambda *_: map(Measured, made[0]["overhead"]))
        return module.quickstart(made[1], **SHORT, progress=lambda line: None)


def test_page_shows_the_overhead_of_the_report(report, folder):
    page = (folder / "report.html").read_text()
    assert page == as_html([json.loads((folder / "report.json").read_text())])
    assert "se_resnet11_digits at 8x8" in page


def test_second_run_in_a_folder_takes_the_training_from_there(report, again):
    assert again["training"] == report["training"]


def test_second_run_in_a_folder_writes_the_next_version(again, folder):
    assert tuple(again["exports"]) == ("digits.tflite", "digits_int8.tflite", "savedmodel/2")
    assert {path.name for path in (folder / "savedmodel").iterdir()} == {"1", "2"}


def test_second_run_in_a_folder_replaces_the_report(again, folder):
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(again))


@pytest.fixture
def command(report, tmp_path, capfd, monkeypatch):
    """`command(*arguments)`: stdout of `se-keras quickstart`, which returns the first run's report at once."""
    monkeypatch.setattr(module, "quickstart", lambda folder, progress: report)
    monkeypatch.setenv("COLUMNS", "200")
    # The command would change the handlers of this process.
    monkeypatch.setattr(se_keras_cli.signal, "signal", lambda *_: None)

    def call(*arguments):
        assert se_keras_cli.main(["quickstart", "-o", str(tmp_path), *arguments]) == 0
        return capfd.readouterr().out

    return call


def test_command_prints_the_report_as_json(command, report):
    assert json.loads(command("--json")) == json.loads(json.dumps(report))


def test_command_prints_accuracies_agreement_and_overhead(command, report, tmp_path):
    out = command()
    for run in report["training"].values():
        assert f"{run['test_accuracy']:.1%}" in out
    for export in (*NETWORKS, *EXPORTS, "float32 lowered", "int8 published", "95 % interval", str(tmp_path)):
        assert export in out
    assert f"look at {tmp_path}/report.html" in out
    assert out.endswith(f"Next: se-keras inspect {tmp_path}/digits_int8.tflite\n")
