"""The files for TF Serving and its client, with a stand-in that speaks the protocols of TF Serving."""

import base64
import contextlib
import io
import json
import re
import socket
import struct
import subprocess
import sys
import threading
import urllib.request
import zlib
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from export_fixtures import grouped_network, scattered
from google.protobuf import text_format
from keras import layers
from PIL import Image
from serving_stand_in import stand_in
from tensorflow_serving.config import model_server_config_pb2

import se_keras_cli
from se_keras.export import to_savedmodel
from se_keras.export.benchmark import load
from se_keras.export.benchmark.load import serving_load
from se_keras.export.benchmark.programs import serving_session as session
from se_keras.export.serving import client as serving
from se_keras.export.serving.savedmodel import SavedModelRunner
from se_keras.images import evaluation_image

EXAMPLES = Path(__file__).parents[1] / "examples" / "serving"
MEAN, STD = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)
LABELS = tuple(f"class {i}" for i in range(9)) + ("Käse",)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A network with grouped convolutions in the folder models/photos, version 3."""
    keras.utils.set_random_seed(0)
    folder = tmp_path_factory.mktemp("models") / "photos"
    model = scattered(grouped_network())
    return to_savedmodel(model, folder, version=3, labels=LABELS, normalization=(MEAN, STD))


@pytest.fixture(scope="module")
def retrained(saved, tmp_path_factory):
    """The same network with other weights."""
    model = scattered(grouped_network(), seed=5)
    return to_savedmodel(model, tmp_path_factory.mktemp("retrained"), labels=LABELS, normalization=(MEAN, STD))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A network of the same input and outputs that takes no files."""
    images = keras.Input((8, 8, 3), name="images")
    model = keras.Model(images, layers.Dense(10, activation="softmax")(layers.Flatten()(images)))
    return to_savedmodel(model, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def server(saved, retrained, plain):
    """URL and gRPC host of a server with all of them."""
    with stand_in({"photos": saved.path, "retrained": retrained.path, "plain": plain.path}) as addresses:
        yield addresses


@pytest.fixture
def cli(capfd, monkeypatch):
    """`cli(*arguments)`: status, stdout and stderr of the command."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("signal.signal", lambda *_: None)

    def run(*arguments):
        status = se_keras_cli.main([*map(str, arguments)])
        return status, *capfd.readouterr()

    return run


def picture(seed=0, size=(11, 17), channels=3):
    """The pixels of a smooth picture. JPEG changes it little, like photographs."""
    coarse = np.random.default_rng(seed).uniform(0, 255, (3, 3, channels))
    return np.asarray(tf.image.resize(coarse, size, "bicubic")).clip(0, 255).astype("uint8")


def encoded(pixels, kind, **options):
    """The bytes of an image file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def rest(url, model, body):
    """The answer of the REST API to a prediction."""
    request = urllib.request.Request(f"{url}/v1/models/{model}:predict", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def classified(url, contents):
    """Classes and scores of image files, a row for each, by the REST API."""
    instances = [{"b64": base64.b64encode(content).decode()} for content in contents]
    rows = rest(url, "photos", {"signature_name": "image_bytes", "instances": instances})["predictions"]
    return [row["classes"] for row in rows], np.array([row["scores"] for row in rows])


@pytest.fixture(scope="module")
def expected(saved):
    """`expected(contents)`: scores and classes of files, as decoding, evaluation and `serving_default` give them."""
    runner = SavedModelRunner(saved.path)

    def compute(contents):
        images = [evaluation_image(tf.constant(content), size=(8, 8), channels=3) for content in contents]
        probabilities = runner((np.stack(images) - MEAN) / STD)["probabilities"]
        order = np.argsort(-probabilities)[:, :5]
        return np.take_along_axis(probabilities, order, 1), [[LABELS[i] for i in row] for row in order]

    return compute


# A server that has the model.


@pytest.mark.slow
def test_golden_inputs_give_the_golden_outputs_by_both_protocols(saved, server):
    url, host = server
    answers = serving.check(saved.manifest, model="photos", rest=url, grpc=host)
    names = ("serving_default", "image_bytes")
    expected = [(protocol, name, 3) for protocol in ("REST", "gRPC") for name in names]
    assert [(x.protocol, x.signature, x.version) for x in answers] == expected
    # A session optimizes the graph, which changes the order of sums.
    assert all(x.error < 1e-5 and x.agrees for x in answers)


@pytest.mark.slow
def test_model_without_labels_is_asked_for_its_probabilities_alone(plain, server):
    answers = serving.check(plain.manifest, model="plain", rest=server[0])
    assert [x.signature for x in answers] == ["serving_default"]


@pytest.mark.slow
def test_command_prints_a_row_for_each_answer(saved, server, cli):
    status, out, err = cli("serve-check", server[0], "--grpc", server[1], "--manifest", saved.path.parent)
    assert (status, err) == (0, f"asking {server[0]} and {server[1]} for photos\n")
    rows = re.findall(r"^ (REST|gRPC) +(\w+) +3 +\d\.\de[-+]\d\d +0\.0001 *$", out, re.MULTILINE)
    assert rows == [(protocol, name) for protocol in ("REST", "gRPC") for name in ("serving_default", "image_bytes")]


def test_command_prints_json(saved, server, cli):
    status, out, _ = cli("serve-check", "--grpc", server[1], "--manifest", saved.path, "--json")
    printed = json.loads(out)
    assert (status, printed["model"]) == (0, "photos")
    assert [(x["protocol"], x["agrees"]) for x in printed["answers"]] == [("gRPC", True)] * 2


@pytest.mark.slow
def test_other_weights_are_a_disagreement_with_status_1(saved, server, cli):
    status, out, err = cli("serve-check", server[0], "--manifest", saved.path, "--model", "retrained", "--json")
    assert status == 1
    assert [x["agrees"] for x in json.loads(out)["answers"]] == [False, False]
    message = r"retrained does not compute what .*/3 does: REST serving_default by \S+, REST image_bytes by \S+ of"
    assert re.search(message, err.splitlines()[-1])


@pytest.mark.slow
def test_other_class_names_are_a_disagreement(saved, server):
    record = {**saved.manifest, "golden_file": {**saved.manifest["golden_file"], "classes": ["cat"] * 5}}
    answers = serving.check(record, model="photos", grpc=server[1])
    assert [(x.signature, x.agrees) for x in answers] == [("serving_default", True), ("image_bytes", False)]


# A server that has not, or none.


@pytest.fixture
def listener():
    """`listener(answer)`: an address where each connection gets these bytes; None is never answered."""
    sockets = []

    def listen(answer):
        server = socket.create_server(("127.0.0.1", 0))
        sockets.append(server)

        def serve():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                sockets.append(connection)
                if answer is not None:
                    connection.recv(65536)
                    connection.sendall(answer)
                    connection.close()

        threading.Thread(target=serve, daemon=True).start()
        return f"127.0.0.1:{server.getsockname()[1]}"

    yield listen
    for each in sockets:
        each.close()


def http_answer(body, status="200 OK"):
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


def unused():
    """An address where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_refused_connection_is_one_line_with_status_2(saved, cli):
    address = unused()
    status, _, err = cli("serve-check", f"http://{address}", "--manifest", saved.path)
    assert status == 2
    line = f"se-keras: error: http://{address}/v1/models/photos cannot be reached: [Errno 111] Connection refused"
    assert err.splitlines()[-1] == line
    status, _, err = cli("serve-check", "--grpc", address, "--manifest", saved.path)
    assert status == 2
    assert re.search(f"error: photos at {address} cannot be reached by gRPC: .*[Cc]onnect", err.splitlines()[-1])


def test_server_that_is_silent_is_a_timeout(saved, listener, cli):
    address = listener(None)
    for server in ([f"http://{address}"], ["--grpc", address]):
        status, _, err = cli("serve-check", *server, "--manifest", saved.path, "--timeout", "0.3")
        assert status == 2
        assert "has not answered within 0.3 seconds" in err.splitlines()[-1]


def test_server_that_computes_too_long_is_a_timeout(saved):
    with stand_in({"photos": saved.path}, delay=1.0) as (url, host):
        for server in ({"rest": url}, {"grpc": host}):
            with pytest.raises(TimeoutError, match="has not answered within 0.2 seconds"):
                serving.check(saved.manifest, model="photos", **server, timeout=0.2)


@pytest.mark.parametrize("at", [5, 40], ids=["in the status", "in the body"])
def test_server_that_sends_a_byte_at_a_time_is_a_timeout(saved, at):
    answer, ended = http_answer(" " * 1000), threading.Event()

    def drip(server):
        connection, _ = server.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            connection.sendall(answer[:at])
            for byte in answer[at:]:
                connection.sendall(bytes([byte]))
                if ended.wait(0.05):
                    break

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=drip, args=(server,), daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(TimeoutError, match="has not answered within 0.3 seconds"):
            serving.check(saved.manifest, model="photos", rest=url, timeout=0.3)
        ended.set()


def test_answer_without_end_is_refused(saved, listener, monkeypatch):
    monkeypatch.setattr(serving, "_LARGEST", 2**20)
    answer = b"HTTP/1.1 200 OK\r\n\r\n" + b" " * (2**20 + 1)
    with pytest.raises(ValueError, match="answers with more than 1 MiB"):
        serving.check(saved.manifest, model="photos", rest=f"http://{listener(answer)}", timeout=30)


ANSWERS = {
    "one row": (lambda x: x[0], r"\(1, 10\) of float32 .+ Received: \(10,\) of float32"),
    "more axes": (lambda x: [[x]], r"\(1, 10\) of float32 .+ Received: \(1, 1, 1, 10\) of float32"),
    "two samples": (lambda x: x + x, r"\(1, 10\) of float32 .+ Received: \(2, 10\) of float32"),
    "strings": (lambda x: [list(map(str, x[0]))], "answers serving_default without valid probabilities"),
    "true": (lambda x: [[True] * 10], "answers serving_default without valid probabilities"),
    "ragged": (lambda x: [x[0], x[0][:3]], "answers serving_default without valid probabilities"),
    "null": (lambda x: [[None] * 10], "answers serving_default without valid probabilities"),
}


@pytest.mark.parametrize("change, message", ANSWERS.values(), ids=ANSWERS)
def test_answer_of_another_shape_or_type_is_refused(plain, server, monkeypatch, change, message):
    read = serving.Rest._read

    def changed(self, path, shape, body=None):
        answer = read(self, path, shape, body)
        return answer | ({"outputs": change(answer["outputs"])} if path == ":predict" else {})

    monkeypatch.setattr(serving.Rest, "_read", changed)
    with pytest.raises(ValueError, match=message):
        serving.check(plain.manifest, model="plain", rest=server[0])


def test_grpc_answer_of_another_shape_is_refused(plain, server, monkeypatch):
    monkeypatch.setattr(serving.Grpc, "predict", lambda *_: {"probabilities": np.zeros(10, "float32")})
    with pytest.raises(ValueError, match=r"must be \(1, 10\) of float32 .+ Received: \(10,\) of float32"):
        serving.check(plain.manifest, model="plain", grpc=server[1])


@pytest.mark.parametrize("server_of", [lambda x: {"rest": x[0]}, lambda x: {"grpc": x[1]}], ids=["REST", "gRPC"])
def test_model_that_is_not_there_is_an_error(saved, server, server_of):
    with pytest.raises(ValueError, match=r"is refused: Servable not found for request: Latest\(cats\)"):
        serving.check(saved.manifest, model="cats", **server_of(server))


@pytest.mark.parametrize("server_of", [lambda x: {"rest": x[0]}, lambda x: {"grpc": x[1]}], ids=["REST", "gRPC"])
def test_model_with_other_signatures_is_an_error(saved, plain, server, server_of):
    with pytest.raises(ValueError, match="Expected: image_bytes .*Received: only logits, serving_default"):
        serving.check(saved.manifest, model="plain", **server_of(server))
    wider = json.loads(json.dumps(plain.manifest))
    wider["signatures"]["serving_default"]["outputs"]["probabilities"]["shape"] = [None, 1000]
    message = (
        r"Expected: serving_default from images \?x8x8x3 float32 to probabilities \?x1000 float32. Received: .*\?x10 "
    )
    with pytest.raises(ValueError, match=message):
        serving.check(wider, model="photos", **server_of(server))


def test_model_that_is_loading_is_an_error(saved):
    with (
        stand_in({"photos": saved.path}, states=("LOADING",)) as (url, _),
        pytest.raises(ValueError, match="photos is LOADING, not AVAILABLE"),
    ):
        serving.check(saved.manifest, model="photos", rest=url)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (http_answer("<html>It works!</html>"), "is not TF Serving. It answers: b'<html>It works!</html>'"),
        (http_answer("[]"), "is not TF Serving"),
        (http_answer("{}"), "is not TF Serving. It answers: b'{}': it lacks model_version_status"),
        (http_answer("<html></html>", "404 Not Found"), "is not TF Serving. It answers: b'<html></html>'"),
        (http_answer('{"error": "out of memory"}', "500 Error"), "is refused: out of memory"),
        (http_answer("cut"), "is not TF Serving"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "cannot be reached: the program at that port does not speak HTTP"),
        (b"", "cannot be reached: Remote end closed connection without response"),
    ],
    ids=["page", "list", "object", "404", "500", "text", "SSH", "closed"],
)
def test_what_is_no_tf_serving_is_an_error(saved, listener, answer, message):
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        serving.check(saved.manifest, model="photos", rest=f"http://{listener(answer)}", timeout=5)


def test_port_of_the_other_protocol_is_an_error(saved, server):
    url, host = server
    with pytest.raises(OSError, match="the program at that port does not speak HTTP"):
        serving.check(saved.manifest, model="photos", rest=f"http://{host}")
    with pytest.raises(OSError, match="cannot be reached by gRPC"):
        serving.check(saved.manifest, model="photos", grpc=url.removeprefix("http://"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "by REST or gRPC: give a URL, or host and port. Received: neither"),
        ({"rest": "localhost:8501"}, "an address such as http://localhost:8501. Received: 'localhost:8501'"),
        ({"rest": "http://localhost", "timeout": 0}, "timeout must be above 0 seconds. Received: timeout=0"),
    ],
)
def test_bad_arguments_of_a_check_are_errors(saved, arguments, message):
    with pytest.raises(ValueError, match=message):
        serving.check(saved.manifest, model="photos", **arguments)


def test_manifest_without_golden_input_is_an_error(saved):
    with pytest.raises(
        ValueError, match="needs a manifest with reference outputs. Received: the manifest of an older export"
    ):
        serving.check({"network": "photos", "precision": "unknown"}, model="photos", rest="http://localhost")


def test_grpc_without_its_package_says_what_to_install(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_serving.apis", None)
    with pytest.raises(ImportError, match=re.escape('pip install "se-keras[serving]"')):
        serving.check(saved.manifest, model="photos", grpc="localhost:8500")


# Image files.


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
def test_file_is_decoded_by_its_content(expected, server, kind):
    options = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    content = encoded(picture(), kind, **options)
    classes, scores = classified(server[0], [content])
    as_expected, names = expected([content])
    np.testing.assert_allclose(scores, as_expected, rtol=0, atol=1e-5)
    assert classes == names
    # Every format gives the picture, up to the loss of JPEG, WebP and the palette of GIF.
    reference, _ = expected([encoded(picture(), "PNG")])
    np.testing.assert_allclose(scores, reference, rtol=0, atol=0.2)


@pytest.mark.parametrize(
    "pixels", [picture(channels=1)[..., 0], np.dstack([picture(), picture(1)[..., 0]])], ids=["gray", "transparent"]
)
def test_gray_and_transparent_pictures_are_read_as_rgb(server, pixels):
    as_rgb = np.repeat(pixels[..., None], 3, -1) if pixels.ndim == 2 else pixels[..., :3]
    _, scores = classified(server[0], [encoded(pixels, "PNG"), encoded(as_rgb, "PNG")])
    np.testing.assert_allclose(scores[0], scores[1], rtol=0, atol=1e-6)


def damaged():
    """Files that cannot be decoded."""
    jpeg, png, gif, webp = (encoded(picture(size=(64, 64)), kind) for kind in ("JPEG", "PNG", "GIF", "WEBP"))
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 255
    return {
        "empty": b"",
        "text": b"not an image",
        "half a JPEG": jpeg[: len(jpeg) // 2],
        "head of a JPEG": jpeg[:20],
        "half a PNG": png[: len(png) // 2],
        "flipped byte in a PNG": bytes(flipped),
        "half a GIF": gif[: len(gif) // 2],
        "half a WebP": webp[: len(webp) // 2],
        "huge PNG": bomb(),
        "huge JPEG": jpeg.replace(struct.pack(">HH", 64, 64), struct.pack(">HH", 65535, 65535), 1),
        "huge GIF": gif.replace(struct.pack("<HH", 64, 64), struct.pack("<HH", 65535, 65535), 1),
    }


def bomb(side=20_000):
    """A valid PNG of 400 million pixels in 50 kB."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + side)) for _ in range(side)) + packer.flush()
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_damaged_file_fails_alone_among_good_ones(expected, server):
    good = [encoded(picture(seed), "JPEG") for seed in range(2)]
    bad = damaged()
    classes, scores = classified(server[0], [good[0], *bad.values(), good[1]])
    for name, row, score in zip(bad, classes[1:-1], scores[1:-1], strict=True):
        assert row == [""] * 5 and not score.any(), name
    as_expected, names = expected(good)
    np.testing.assert_allclose(scores[[0, -1]], as_expected, rtol=0, atol=1e-5)
    assert [classes[0], classes[-1]] == names


def test_request_of_damaged_files_alone_is_answered(server):
    classes, scores = classified(server[0], [b"", b"x"])
    assert classes == [[""] * 5] * 2 and not scores.any()


def test_large_photograph_is_answered_by_both_protocols(expected, server):
    # 12 million pixels. The message exceeds the 4 MB that gRPC accepts by default.
    content = encoded(np.random.default_rng(0).integers(0, 255, (3000, 4000, 3), dtype="uint8"), "JPEG", quality=80)
    assert len(content) > 4 << 20
    _, scores = classified(server[0], [content])
    client = serving.Grpc(server[1], "photos", 30)
    answer = client.predict("image_bytes", {"image_bytes": np.array([content], object)})
    np.testing.assert_allclose(scores, expected([content])[0], rtol=0, atol=1e-4)
    np.testing.assert_allclose(answer["scores"], scores, rtol=0, atol=1e-6)


def test_columns_and_rows_are_answered_alike(server):
    images = np.random.default_rng(0).normal(size=(3, 8, 8, 3)).astype("float32").tolist()
    columns = rest(server[0], "photos", {"inputs": {"images": images}})["outputs"]
    rows = rest(server[0], "photos", {"instances": images})["predictions"]
    named = rest(server[0], "photos", {"instances": [{"images": image} for image in images]})["predictions"]
    assert columns == rows == named


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"signature_name": "regress", "inputs": []}, 'Serving signature name: "regress" not found'),
        ({"inputs": {"images": [[1.0]]}}, "Cannot feed value of shape"),
        ({"rows": []}, "Missing 'inputs' or 'instances' key"),
        ({"signature_name": "image_bytes", "instances": ["no base64"]}, "not of the expected type"),
    ],
)
def test_bad_request_is_refused_as_tf_serving_does(server, body, message):
    with pytest.raises(urllib.error.HTTPError) as error:
        rest(server[0], "photos", body)
    assert error.value.code == 400
    assert message in json.load(error.value)["error"]


# Examples.


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--grpc"]], ids=["REST", "gRPC"])
def test_python_client_prints_the_classes_of_files(expected, server, tmp_path, options):
    files = {"good.jpg": encoded(picture(), "JPEG"), "bad.jpg": b"x"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    address = [*options, server[1]] if options else [server[0]]
    command = [sys.executable, EXAMPLES / "client.py", *address, "photos", *files]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    good, bad = result.stdout.splitlines()
    scores, ((first, *_),) = expected([files["good.jpg"]])
    assert good.startswith(f"good.jpg: {first} {scores[0, 0]:.3f}, ")
    assert bad == "bad.jpg: cannot be decoded"


def test_curl_client_prints_the_answer(expected, server, tmp_path):
    files = {"a.png": encoded(picture(), "PNG"), "b.png": encoded(picture(1, (200, 300)), "PNG")}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    command = [EXAMPLES / "client.sh", server[0], "photos", *files]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    predictions = json.loads(result.stdout)["predictions"]
    assert [row["classes"] for row in predictions] == expected(list(files.values()))[1]


def flags(path):
    """The flags of TF Serving in a file for it, and the rest of the file as text."""
    return dict(re.findall(r"- --(\w+)=(\S+)", path.read_text()))


@pytest.mark.parametrize("name", ["docker-compose.yml", "kubernetes.yaml"])
def test_examples_start_the_server_with_what_is_written_for_it(name):
    import yaml

    assert all(yaml.safe_load_all((EXAMPLES / name).read_text()))
    assert flags(EXAMPLES / name) == {
        "model_config_file": f"/models/{serving.MODELS}",
        "model_config_file_poll_wait_seconds": "60",
        "monitoring_config_file": f"/models/{serving.MONITORING}",
        "enable_batching": "true",
        "enable_per_model_batching_parameters": "true",
    }


# The server's files.


def folder_of_models(folder, *names):
    for name in names:
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "1" / "saved_model.pb").touch()
    return folder


def test_server_files_name_every_model_of_a_folder(tmp_path, cli):
    folder_of_models(tmp_path, "photos", 'qu"ote')
    (tmp_path / "notes" / "latest").mkdir(parents=True)
    status, out, _ = cli("serve-config", tmp_path, "--root", "/srv/")
    assert (status, out) == (
        0,
        f'wrote {tmp_path}/models.config for photos, qu"ote, and {tmp_path}/monitoring.config\n',
    )
    config = text_format.Parse((tmp_path / "models.config").read_text(), model_server_config_pb2.ModelServerConfig())
    assert [(x.name, x.base_path, x.model_platform) for x in config.model_config_list.config] == [
        (name, f"/srv/{name}", "tensorflow") for name in ("photos", 'qu"ote')
    ]
    assert 'path: "/monitoring/prometheus/metrics"' in (tmp_path / "monitoring.config").read_text()


def test_server_files_of_ones_own_are_kept_unless_they_may_be_replaced(tmp_path):
    folder_of_models(tmp_path, "photos")
    (tmp_path / "models.config").write_text("mine")
    with pytest.raises(FileExistsError, match="models.config' exists with another content: replace=True"):
        serving.write_server_files(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models.config", "photos"]
    assert (tmp_path / "models.config").read_text() == "mine"
    serving.write_server_files(tmp_path, replace=True)
    assert serving.write_server_files(tmp_path) == ["photos"]  # they are as they would be written


def test_folder_without_models_has_no_server_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder of models '.*new'"):
        serving.write_server_files(tmp_path / "new")
    with pytest.raises(ValueError, match="has MODEL/VERSION/saved_model.pb in it. Received: '.*' without"):
        serving.write_server_files(tmp_path)
    assert list(tmp_path.iterdir()) == []


# Load.


@pytest.fixture(scope="module")
def loaded():
    lines = []
    result = serving_load(
        "se_resnet11_digits", callers=(1, 3), batches=(2,), seconds=0.02, blocks=2, progress=lines.append
    )
    return result, lines


@pytest.mark.slow
def test_load_is_of_each_form_for_each_number_of_callers_and_images(loaded):
    result, lines = loaded
    rows = [(x.network, x.variant, x.callers, x.batch) for x in result.loads]
    variants = ("published", "lowered")
    assert rows[:4] == [(name, x, 1, 1) for name in ("se_resnet11_digits", "resnet11_digits") for x in variants]
    assert rows[4:] == [("se_resnet11_digits", x, n, b) for n, b in ((3, 1), (1, 2), (3, 2)) for x in variants]
    assert [(callers, batch) for callers, batch, _ in result.gains] == [(1, 1), (3, 1), (1, 2), (3, 2)]
    assert lines[:2] == ["exporting se_resnet11_digits", "exporting resnet11_digits"]


@pytest.mark.slow
def test_load_counts_every_request(loaded):
    for x in loaded[0].loads:
        assert x.requests >= 2 * x.callers  # each caller at least once in each block
        assert 0 < x.p50_ms <= x.p99_ms
        # Little's law: callers are always waiting, so that they are the rate times the time of a request.
        assert x.images_per_second * x.p50_ms / 1000 < x.callers * x.batch * 3


@pytest.mark.slow
def test_load_has_the_overhead_of_both_forms(loaded):
    assert set(loaded[0].overheads) == {"published", "lowered"}
    assert all(x.low <= x.median <= x.high for x in loaded[0].overheads.values())
    assert json.loads(json.dumps(loaded[0].to_json()))["baseline"] == "resnet11_digits"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"network": "resnet50"}, "resnet50 is a baseline"),
        ({"callers": (0,)}, r"callers must be one or more ints of 1 to 64. Received: callers=\(0,\)"),
        ({"callers": (65,)}, "callers must be"),
        ({"batches": ()}, r"batches must be one or more ints of 1 to 1024. Received: batches=\(\)"),
        ({"batches": (1.5,)}, "batches must be"),
        ({"blocks": 1}, "At least 2 blocks of more than 0 seconds. Received: blocks=1"),
        ({"seconds": 0}, "Received: blocks=10, seconds=0"),
    ],
)
def test_bad_load_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        serving_load(**{"network": "se_resnet11_digits", **arguments})


def test_error_of_one_caller_ends_the_measurement():
    calls = []

    def call():
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("too many at once")

    with pytest.raises(MemoryError, match="too many at once"):
        session.stress(call, callers=4, seconds=0.05)


def test_loaded_process_that_ends_is_told_by_its_status_and_last_line(monkeypatch, tmp_path):
    (tmp_path / "session.py").write_text("import sys; print('first\\nkilled', file=sys.stderr); sys.exit(3)")
    monkeypatch.setattr(session, "__file__", str(tmp_path / "session.py"))
    with pytest.raises(ValueError, match=r"^The stress test ended early \(exit status 3\): killed$"):
        load._measure({}, lambda line: None)


def test_client_in_the_shell_names_a_file_that_is_not_there(tmp_path):
    command = [EXAMPLES / "client.sh", "http://127.0.0.1:1", "photos", str(tmp_path / "none.jpg")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (2, f"client.sh: there is no file {tmp_path}/none.jpg\n")
