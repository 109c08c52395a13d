"""`weights="imagenet"` with a local stand-in for the hub: downloads, stored files, and failures.

The stand-in serves files of random weights with the names of timm, and the headers that the library of the Hugging Face
hub reads. The library is the real one. Most tests release weights of the network for digits, which takes a second. One
release of SE-ResNet-50, shared by the module, shows the same for a row of the table.
"""

import contextlib
import hashlib
import http.server
import json
import math
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import keras
import numpy as np
import pytest
import tensorflow as tf
from huggingface_hub import constants
from safetensors.numpy import save
from test_catalogue import one_line
from torch_oracles import torchvision_for_import

from se_keras.catalogue import create, names, spec_of
from se_keras.recalibration import SEConfig
from se_keras.weights import released as pretrained
from se_keras.weights.porting import load_weights
from se_keras.weights.released import IMAGENET, Pretrained

DIGITS = "se_resnet11_digits"
REPO = "timm/digits.in1k"
REASON = 'needs torch and timm: pip install -e ".[parity]"'


# The hub.


@dataclass(frozen=True, kw_only=True)
class Release:
    """The answer of the hub for one repository: `model.safetensors`, or a failure.

    Args:
        content: The file.
        status, headers: Status and headers of each answer.
        announced: The SHA-256 that the hub announces. Default: the true one.
        size: The length that the hub announces. Default: the true one.
        cut: The number of bytes after which each connection breaks.
        from_hub: Whether the answer has the headers of the hub.
    """

    content: bytes = b""
    status: int = 200
    headers: tuple = ()
    announced: str | None = None
    size: int | None = None
    cut: int | None = None
    from_hub: bool = True


ABSENT = Release(status=404, headers=(("X-Error-Code", "RepoNotFound"),))


class Hub:
    """A hub on this machine: `releases` by repository, and the `requests` for their files so far."""

    def __init__(self):
        self.releases, self.requests = {}, []
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler(self))
        self.url = f"http://127.0.0.1:{self.server.server_port}"


def handler(hub):
    """The class that answers for `hub`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.answer(with_body=False)

        def do_GET(self):
            self.answer(with_body=True)

        def answer(self, with_body):
            match = re.fullmatch("/(.+)/resolve/main/model.safetensors", self.path)
            if not match:  # the hub's library also asks for optional files
                release = Release(status=404, from_hub=False)
            else:
                hub.requests.append(f"{self.command} {match[1]}")
                release = hub.releases.get(match[1], ABSENT)
            start = int(self.headers.get("Range", "bytes=0-")[len("bytes=") :].rstrip("-"))
            content = release.content[start:]
            self.send_response(206 if start and release.status == 200 else release.status)
            for header in release.headers:
                self.send_header(*header)
            if release.from_hub:
                digest = release.announced or hashlib.sha256(release.content).hexdigest()
                size = len(release.content) if release.size is None else release.size
                self.send_header("X-Repo-Commit", hashlib.sha1(digest.encode()).hexdigest())
                self.send_header("X-Linked-ETag", f'"{digest}"')
                self.send_header("X-Linked-Size", str(size))
                self.send_header("ETag", f'"{digest}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if with_body and release.cut is not None:
                self.wfile.write(content[: max(release.cut - start, 0)])
                self.close_connection = True
            elif with_body:
                self.wfile.write(content)

        def log_message(self, *args):
            pass

    return Handler


@pytest.fixture(scope="module")
def hub():
    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever, daemon=True)
    thread.start()
    yield hub
    huggingface_hub.close_session()
    hub.server.shutdown()
    hub.server.server_close()
    thread.join()


def connect(patch, url, folder):
    """Points the hub's library at `url`, and its cache and the Keras home into `folder`; returns both folders."""
    cache, home = folder / "hub", folder / "keras"
    patch.setenv("KERAS_HOME", str(home))
    patch.setenv("NO_PROXY", "127.0.0.1")
    for name, value in {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": True,
        "HF_HUB_OFFLINE": False,
    }.items():
        patch.setattr(constants, name, value)
    patch.setattr(constants, "AGENT_HARNESSES_PATH", str(folder / "agents.json"), raising=False)  # not in 1.0
    return cache, home / "models" / "se_keras"


def disconnect(patch):
    """Points the hub's library at a local port without a server."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    patch.setattr(constants, "ENDPOINT", url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


# What it releases.


def timm_state(model, *, legacy):
    """The weights of our ResNet with the names of timm and in the layout of torch, by an independent implementation."""
    leaves = {"kernel": "weight", "gamma": "weight", "beta": "bias", "moving_mean": "running_mean"}
    leaves |= {"moving_variance": "running_var", "bias": "bias"}
    state = {}
    for weight in model.weights:
        layer, _, variable = weight.path.rpartition("/")
        array = keras.ops.convert_to_numpy(weight)
        block = re.fullmatch(r"stage(\d)_block(\d+)_(\w+?)(\d?)(_bn)?", layer)
        if layer == "predictions":
            module = "last_linear" if legacy else "fc"
        elif not block:
            module = "layer0." * legacy + {"conv1": "conv1", "conv1_bn": "bn1"}[layer]
        else:
            part = {
                "conv": f"{'bn' if block[5] else 'conv'}{block[4]}",
                "shortcut": f"downsample.{1 if block[5] else 0}",
                "se": f"{'se_module' if legacy else 'se'}.{'fc1' if variable.startswith('reduce') else 'fc2'}",
            }[block[3]]
            module = f"layer{int(block[1]) - 1}.{int(block[2]) - 1}.{part}"
        kind = variable.removeprefix("reduce_").removeprefix("expand_")
        if array.ndim == 4:
            array = array.transpose(3, 2, 0, 1)
        elif array.ndim == 2:
            array = array.T if layer == "predictions" else array.T[:, :, None, None]
        state[f"{module}.{leaves[kind]}"] = np.ascontiguousarray(array)
        if kind == "moving_variance":
            state[f"{module}.num_batches_tracked"] = np.array(1000)
    return state


def random(name, seed=0):
    """A network with random values in all weights."""
    model, rng = create(name), np.random.default_rng(seed)
    for weight in model.weights:
        weight.assign(rng.standard_normal(weight.shape, "float32"))
    return model


def assert_same_weights(model, expected):
    """The weights of `model` are bit-identical to `expected`, by their names."""
    assert {weight.path for weight in model.weights} <= expected.keys()
    for weight in model.weights:
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(weight), expected[weight.path], weight.path)


def by_path(model):
    return {weight.path: keras.ops.convert_to_numpy(weight) for weight in model.weights}


@pytest.fixture(scope="module")
def digits():
    """The weights of the network for digits by their paths, the same as the hub has them, and a network for them."""
    model = random(DIGITS)
    return by_path(model), timm_state(model, legacy=False), model


@pytest.fixture
def place(hub, digits, tmp_path, monkeypatch):
    """A hub where the weights of the network for digits are released; yields the hub's cache and the Keras folder."""
    monkeypatch.setitem(pretrained.IMAGENET, DIGITS, Pretrained(repo=REPO))
    hub.releases = {REPO: Release(content=save(digits[1]))}
    hub.requests.clear()
    return connect(monkeypatch, hub.url, tmp_path)


@pytest.fixture
def hasty(monkeypatch):
    """The hub's library waits between its attempts, up to 8 s; here it does not."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def assert_released(digits):
    """`create(weights="imagenet")` loads the released weights. Builds no network, which would take a second."""
    expected, _, model = digits
    path = pretrained.imagenet(DIGITS, build=lambda: model)
    for weight in model.weights:
        weight.assign(keras.ops.zeros_like(weight))
    load_weights(model.layers, path)
    assert_same_weights(model, expected)


def files_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


KEPT = [f"{DIGITS}.imagenet.weights.h5", f"{DIGITS}.imagenet.weights.h5.json"]
ASKED = [f"HEAD {REPO}"]  # whether the hub sends the file, before its library does, which would retry for half a minute
FETCHED = [*ASKED, f"HEAD {REPO}", f"GET {REPO}"]


# The table.


@pytest.mark.parametrize("name", IMAGENET)
def test_released_weights_are_of_a_network_of_the_catalogue_with_imagenets_classes(name):
    assert name in names()
    spec = spec_of(name)
    assert (spec.classes, spec.input_shape) == (1000, (224, 224, 3))


def test_each_network_has_a_repository_of_its_own():
    repositories = [row.repo for row in IMAGENET.values()]
    assert len(set(repositories)) == len(repositories)


@pytest.mark.parity
@pytest.mark.parametrize("name", IMAGENET)
def test_repository_is_named_after_weights_that_timm_knows(name):
    # timm downloads its legacy weights from their old URLs, although the hub has a copy.
    weights = IMAGENET[name].repo.removeprefix("timm/")
    config = import_timm().get_pretrained_cfg(weights)
    assert weights in import_timm().list_pretrained(f"{weights.partition('.')[0]}.*")
    assert config.hf_hub_id == (None if weights.startswith("legacy_") else IMAGENET[name].repo)


@pytest.mark.parity
@pytest.mark.parametrize("name", IMAGENET)
def test_released_weights_are_of_a_network_of_our_classes_and_as_many_parameters(name):
    torch = pytest.importorskip("torch", reason=REASON)
    timm, architecture = import_timm(), IMAGENET[name].repo.removeprefix("timm/")
    config = timm.get_pretrained_cfg(architecture)
    assert (config.num_classes, config.input_size) == (1000, (3, 224, 224))
    with torch.device("meta"):  # only shapes
        theirs = timm.create_model(architecture.partition(".")[0], pretrained=False)
    with keras.StatelessScope(initialize_variables=False):
        ours = create(name)
    keras.utils.clear_session()  # or the next scope would give the variables values after all
    counted = sum(parameter.numel() for parameter in theirs.parameters())
    assert counted == sum(math.prod(weight.shape) for weight in ours.trainable_weights)


def import_timm():
    pytest.importorskip("torch", reason=REASON)
    with torchvision_for_import():
        return pytest.importorskip("timm", reason=REASON)


@pytest.mark.parity
@pytest.mark.parametrize("name, theirs, legacy", [("se_resnet50", "legacy_seresnet50", True)])
def test_stand_in_has_the_names_and_shapes_of_timms_network(name, theirs, legacy):
    torch = pytest.importorskip("torch", reason=REASON)
    timm = import_timm()
    with torch.device("meta"):
        expected = {key: tuple(x.shape) for key, x in timm.create_model(theirs).state_dict().items()}
    assert {key: array.shape for key, array in timm_state(create(name), legacy=legacy).items()} == expected


# A row of the table.


@pytest.fixture(scope="module")
def se_resnet50(hub, tmp_path_factory):
    """SE-ResNet-50 created once from its release: the released weights, the network, the requests and the folder."""
    name, folder = "se_resnet50", tmp_path_factory.mktemp("se_resnet50")
    source = random(name)
    hub.releases = {IMAGENET[name].repo: Release(content=save(timm_state(source, legacy=True)))}
    with pytest.MonkeyPatch.context() as patch:
        connect(patch, hub.url, folder)
        hub.requests.clear()
        model = create(name, weights="imagenet")
        yield by_path(source), model, list(hub.requests), folder
    keras.utils.clear_session()


@pytest.mark.slow
def test_network_has_the_released_weights(se_resnet50):
    released, model, requests, _ = se_resnet50
    assert_same_weights(model, released)
    assert len(model.weights) == len(released)
    repo = IMAGENET["se_resnet50"].repo
    assert requests == [line.replace(REPO, repo) for line in FETCHED]


@pytest.mark.slow
@pytest.mark.parametrize(
    "keywords", [{}, {"input_shape": (96, 128, 3)}, {"pooling": "avg"}], ids=["free size", "small", "pooled"]
)
def test_network_without_the_top_has_the_released_weights_and_fetches_nothing_more(
    keywords, se_resnet50, hub, monkeypatch
):
    released, _, _, folder = se_resnet50
    connect(monkeypatch, hub.url, folder)
    hub.requests.clear()
    model = create("se_resnet50", weights="imagenet", include_top=False, **keywords)
    assert_same_weights(model, released)
    assert {path for path in released if path.startswith("predictions")} == released.keys() - by_path(model).keys()
    assert hub.requests == []


# What is fetched and kept.


def test_weights_are_fetched_once(place, hub, digits):
    for _ in range(2):
        assert_same_weights(create(DIGITS, weights="imagenet"), digits[0])
    assert hub.requests == FETCHED


def test_kept_file_has_its_checksum_and_where_it_came_from_beside_it(place):
    create(DIGITS, weights="imagenet")
    folder = place[1]
    assert files_in(folder) == KEPT
    digest = hashlib.sha256((folder / KEPT[0]).read_bytes()).hexdigest()
    assert json.loads((folder / KEPT[1]).read_text()) == {"sha256": digest, "repo": REPO}


def test_kept_file_is_one_of_keras_own(place, digits):
    create(DIGITS, weights="imagenet")
    model = create(DIGITS)
    model.load_weights(place[1] / KEPT[0])
    assert_same_weights(model, digits[0])


def test_kept_file_serves_without_a_connection(place, hub, digits, monkeypatch):
    assert_released(digits)
    shutil.rmtree(place[0])
    disconnect(monkeypatch)
    assert_released(digits)


def test_hubs_cache_serves_without_a_connection(place, hub, digits, monkeypatch):
    assert_released(digits)
    shutil.rmtree(place[1])
    disconnect(monkeypatch)
    assert_released(digits)
    assert files_in(place[1]) == KEPT


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def of_another_repository(path):
    path.write_text(path.read_text().replace(REPO, "timm/another.in1k"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, change",
    [
        (KEPT[0], flip),
        (KEPT[0], cut),
        (KEPT[0], Path.unlink),
        (KEPT[1], cut),
        (KEPT[1], Path.unlink),
        (KEPT[1], of_another_repository),
        (KEPT[1], lambda path: path.write_text("[]")),
        (KEPT[1], lambda path: path.write_bytes(b"\xff")),
    ],
    ids=["bit", "cut", "absent", "record cut", "record absent", "another's", "no record", "no text"],
)
def test_kept_file_that_was_changed_is_made_anew(name, change, place, digits):
    assert_released(digits)
    whole = {name: (place[1] / name).read_bytes() for name in KEPT}
    change(place[1] / name)
    assert_released(digits)
    assert {name: (place[1] / name).read_bytes() for name in files_in(place[1])} == whole


def test_file_that_is_made_anew_is_never_absent(place, digits, monkeypatch):
    # Another process may be about to read it.
    assert_released(digits)
    (place[1] / KEPT[1]).unlink()
    there, replace_ = [], os.replace

    def replacing(source, target):
        if Path(target).parent == place[1]:
            there.append((place[1] / KEPT[0]).exists())
        return replace_(source, target)

    monkeypatch.setattr(os, "replace", replacing)
    assert_released(digits)
    assert there == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16"])
def test_kept_file_has_the_released_weights_whatever_the_dtype_policy(policy, place, digits):
    keras.config.set_dtype_policy(policy)
    try:
        model = create(DIGITS, weights="imagenet")
        assert keras.config.dtype_policy().name == policy
    finally:
        keras.config.set_dtype_policy("float32")
    for weight in model.weights:
        expected = digits[0][weight.path].astype(weight.dtype)
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(weight), expected)
    assert_released(digits)


def test_weights_come_into_a_network_that_is_distributed(place, digits):
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        model = create(DIGITS, weights="imagenet")
    assert_same_weights(model, digits[0])


def test_networks_own_se_may_be_said(place, digits):
    assert_same_weights(create(DIGITS, weights="imagenet", se=spec_of(DIGITS).se, classes=10), digits[0])


def test_home_is_that_of_keras(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value, expected in {None: ".keras", "": ".keras", "~/mine": "mine", str(tmp_path / "k"): "k"}.items():
        monkeypatch.delenv("KERAS_HOME", raising=False) if value is None else monkeypatch.setenv("KERAS_HOME", value)
        assert pretrained.home() == tmp_path / expected / "models" / "se_keras"


CREATES = """
import sys, keras, numpy as np
from se_keras.weights import released as pretrained
from se_keras.catalogue import create
pretrained.IMAGENET[sys.argv[1]] = pretrained.Pretrained(repo=sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
model = create(sys.argv[1], weights="imagenet")
np.savez(sys.argv[3], **{weight.path: keras.ops.convert_to_numpy(weight) for weight in model.weights})
"""


@pytest.mark.slow
def test_two_processes_at_once_have_the_same_weights(place, hub, digits, tmp_path):
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "TF_CPP_MIN_LOG_LEVEL": "3"}
    outputs = [tmp_path / f"{n}.npz" for n in range(2)]
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", CREATES, DIGITS, REPO, output],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stack.enter_context(output.with_suffix(".log").open("w")),
                    env=environment,
                    text=True,
                )
            )
            for output in outputs
        ]
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        statuses = [process.wait() for process in processes]
    assert statuses == [0, 0], [output.with_suffix(".log").read_text()[-2000:] for output in outputs]
    for output in outputs:
        with np.load(output) as weights:
            assert set(weights) == digits[0].keys()
            assert all(np.array_equal(weights[path], array) for path, array in digits[0].items())
    assert files_in(place[1]) == KEPT


# The hub's cache.


def blob_of(cache):
    (blob,) = (cache / f"models--{REPO.replace('/', '--')}" / "blobs").iterdir()
    return blob


def test_file_that_the_hubs_cache_shares_among_repositories_is_whole(place, hub, digits):
    # The cache stores downloads by the hub's protocol Xet under the hash of Xet, with a link named by the SHA-256.
    assert_released(digits)
    shutil.rmtree(place[1])
    blob, shared = blob_of(place[0]), place[0] / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(os.path.relpath(shared, blob.parent))
    hub.requests.clear()
    assert_released(digits)
    assert hub.requests == [*ASKED, f"HEAD {REPO}"] and shared.exists()


def test_cache_without_links_serves_too(place, hub, digits):
    assert_released(digits)
    shutil.rmtree(place[1])
    (pointer,) = (path for path in place[0].rglob("model.safetensors"))
    blob_of(place[0]).replace(pointer)
    assert_released(digits)


def test_file_that_was_changed_in_the_hubs_cache_is_fetched_anew(place, hub, digits):
    assert_released(digits)
    shutil.rmtree(place[1])
    flip(blob_of(place[0]))
    hub.requests.clear()
    assert_released(digits)
    assert hub.requests == [*ASKED, f"HEAD {REPO}", *FETCHED]


# What goes wrong.


def without(state, tensor):
    return {name: array for name, array in state.items() if name != tensor}


UNFETCHED = f"The weights of {DIGITS} could not be downloaded from {REPO}: "
FAILURES = {
    "no such repository": (
        lambda state: None,
        OSError,
        (UNFETCHED, "404 Not Found", "weights=PATH (--weights) loads a file"),
    ),
    "404": (lambda state: Release(status=404, from_hub=False), OSError, (UNFETCHED, "404 Not Found")),
    "401": (lambda state: Release(status=401), OSError, (UNFETCHED, "401 Unauthorized")),
    "403": (lambda state: Release(status=403), OSError, (UNFETCHED, "403 Forbidden")),
    "429": (lambda state: Release(status=429), OSError, (UNFETCHED, "429 Too Many Requests")),
    "500": (lambda state: Release(status=500), OSError, (UNFETCHED, "500 Internal Server Error")),
    "503": (lambda state: Release(status=503), OSError, (UNFETCHED, "503 Service Unavailable")),
    "not the hub": (
        lambda state: Release(content=b"<html>Log in to this network</html>", from_hub=False),
        OSError,
        (UNFETCHED, "X-Repo-Commit"),
    ),
    "broken off": (
        lambda state: Release(content=save(state), cut=10_000),
        OSError,
        (UNFETCHED, "peer closed connection"),
    ),
    "cut": (
        lambda state: Release(content=save(state)[:-1], announced="0" * 64, size=len(save(state))),
        OSError,
        (UNFETCHED, "Consistency check failed"),
    ),
    "another checksum": (
        lambda state: Release(content=save(state), announced="0" * 64),
        ValueError,
        (f"The file that {REPO} sent for {DIGITS} does not have the announced SHA-256: try again",),
    ),
    "empty": (lambda state: Release(), ValueError, ("model.safetensors' is not a file of weights that can be read: ",)),
    "not safetensors": (
        lambda state: Release(content=b"<html>\nNot found\n</html>"),
        ValueError,
        ("model.safetensors' is not a file of weights that can be read: ",),
    ),
    "cut before the release": (
        lambda state: Release(content=save(state)[:-1]),
        ValueError,
        ("model.safetensors' is not a file of weights that can be read: ",),
    ),
    "another network": (
        lambda state: Release(content=save({"features.0.weight": np.zeros(3, "float32")})),
        ValueError,
        ("model.safetensors' is of another network: it lacks ", "the network lacks features.0.weight"),
    ),
    "tensor missing": (
        lambda state: Release(content=save(without(state, "layer2.0.se.fc1.bias"))),
        ValueError,
        ("model.safetensors' is of another network: it lacks layer2.0.se.fc1.bias",),
    ),
    "another shape": (
        lambda state: Release(content=save(state | {"fc.bias": np.zeros(11, "float32")})),
        ValueError,
        ("model.safetensors' does not fit: fc.bias has the shape (10,) here and (11,) there",),
    ),
    "not finite": (
        lambda state: Release(content=save(state | {"fc.bias": np.full(10, np.nan, "float32")})),
        ValueError,
        ("model.safetensors' has values that are not finite: in fc.bias",),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("failure", FAILURES)
def test_failure_is_told_in_one_line_leaves_nothing_and_is_over_when_the_hub_is_well(
    failure, place, hub, digits, hasty
):
    release, kind, parts = FAILURES[failure]
    healthy, broken = hub.releases[REPO], release(digits[1])
    hub.releases = {} if broken is None else {REPO: broken}
    with pytest.raises(kind, match=one_line(*parts)):
        create(DIGITS, weights="imagenet")
    assert files_in(place[1]) == []
    assert not [path for path in files_in(place[0]) if "incomplete" in path]
    hub.releases = {REPO: healthy}
    assert_released(digits)
    assert files_in(place[1]) == KEPT


def test_refused_connection_is_told_in_one_line_and_over_with_the_next_one(place, hub, digits, hasty, monkeypatch):
    with monkeypatch.context() as patch:
        disconnect(patch)
        with pytest.raises(
            OSError, match=one_line(UNFETCHED, "Connection refused", "weights=PATH (--weights) loads a file")
        ):
            create(DIGITS, weights="imagenet")
    assert files_in(place[1]) == hub.requests == []
    assert_released(digits)


def test_hub_that_cannot_be_reached_is_tried_twice(place, hub, hasty, monkeypatch):
    attempts = []

    def fails(url):
        attempts.append(url)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fails)
    with pytest.raises(OSError, match=one_line(UNFETCHED, "Name or service not known")):
        create(DIGITS, weights="imagenet")
    assert len(attempts) == 2


def test_hub_that_was_switched_off_is_told_in_one_line(place, hub, hasty, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=one_line(UNFETCHED, "HF_HUB_OFFLINE")):
        create(DIGITS, weights="imagenet")
    assert hub.requests == []


def test_changed_file_of_the_hubs_cache_is_not_used_without_a_connection(place, digits, hasty, monkeypatch):
    assert_released(digits)
    shutil.rmtree(place[1])
    flip(blob_of(place[0]))
    disconnect(monkeypatch)
    with pytest.raises(OSError, match=one_line(UNFETCHED, "Connection refused")):
        create(DIGITS, weights="imagenet")
    assert files_in(place[1]) == []


def test_failed_attempt_leaves_the_network_of_the_caller_alone(place, hub, digits):
    # One tensor does not fit: none is loaded, and none is kept.
    hub.releases = {REPO: FAILURES["another shape"][0](digits[1])}
    model = create(DIGITS)
    before = by_path(model)
    with pytest.raises(ValueError):
        pretrained.imagenet(DIGITS, build=lambda: model)
    assert_same_weights(model, before)


def test_keras_home_that_cannot_be_written_is_told_before_anything_is_fetched(place, hub, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "file"))
    folder = tmp_path / "file" / "models" / "se_keras"
    message = one_line(
        f"The weights of {DIGITS} cannot be stored in {str(folder)!r}: ", "KERAS_HOME sets another folder"
    )
    with pytest.raises(OSError, match=message):
        create(DIGITS, weights="imagenet")
    assert hub.requests == []


def test_full_disk_is_told_in_one_line_and_leaves_nothing(place, digits):
    assert_released(digits)
    shutil.rmtree(place[1])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    message = one_line(f"The weights of {DIGITS} cannot be stored in {str(place[1])!r}: File too large. KERAS_HOME")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # for every file: like a full disk
    try:
        with pytest.raises(OSError, match=message):
            create(DIGITS, weights="imagenet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files_in(place[1]) == []
    assert_released(digits)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, SystemExit])
def test_interrupt_leaves_nothing(failure, place, digits, monkeypatch):
    def interrupted(*args):
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupted)
        with pytest.raises(failure):
            create(DIGITS, weights="imagenet")
    assert files_in(place[1]) == []
    assert_released(digits)


# What cannot fit.

TRAINED_WITH_SE = "was trained with the published squeeze-and-excitation of se_resnet50"


@pytest.mark.parametrize(
    "keywords, parts",
    [
        (
            {"se": None},
            [f"{TRAINED_WITH_SE}: se must be left out, or be {SEConfig()}. Received: se=None"],
        ),
        (
            {"se": SEConfig(site="pre")},
            [f"{TRAINED_WITH_SE}: se must be left out, or be {SEConfig()}. Received: se=SEConfig(", "site='pre'"],
        ),
        (
            {"input_shape": (224, 224, 1), "include_top": False},
            ["takes images with 3 channels. Received: input_shape=(224, 224, 1)"],
        ),
    ],
    ids=["baseline", "site", "channels"],
)
def test_what_the_released_weights_cannot_fill_is_refused_before_anything_is_fetched(
    keywords, parts, place, hub, monkeypatch
):
    with pytest.raises(ValueError, match=one_line("weights='imagenet' ", *parts)):
        create("se_resnet50", weights="imagenet", **keywords)
    assert hub.requests == []


def test_released_weights_fill_a_network_of_other_classes_but_for_its_classifier(place, digits):
    create(DIGITS, weights="imagenet")  # fetched
    with pytest.warns(UserWarning, match="it has 10 classes, and the classifier of 7 is left as it is, untrained$"):
        model = create(DIGITS, weights="imagenet", classes=7)
    assert model.output_shape == (None, 7)
    trunk = keras.Model(model.input, model.get_layer("predictions").input)
    assert_same_weights(trunk, digits[0])


def test_number_of_classes_does_not_matter_without_the_top(place, digits):
    assert_same_weights(create(DIGITS, weights="imagenet", include_top=False, classes=7), digits[0])


@pytest.mark.parametrize("keywords", [{}, {"classes": 10}, {"include_top": False}])
def test_network_without_released_weights_lists_those_that_have_some(keywords, place, hub):
    message = one_line("There are no weights='imagenet' for resnet18. There are for: ", ", ".join(IMAGENET))
    with pytest.raises(ValueError, match=message):
        create("resnet18", weights="imagenet", **keywords)
    assert hub.requests == []
