"""TF Serving: the configuration files of a server, and a check of its answers against a manifest."""

import base64
import http.client
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import tensorflow as tf
from google.protobuf.json_format import MessageToDict

from se_keras import storage
from se_keras.errors import first_line, needs_extra
from se_keras.records import parse_json
from se_keras.typing import Array, FilePath, Json, Outputs
from se_keras.waiting import within

from ..description import reference_error
from ..model import SIGNATURE
from .signatures import IMAGE_BYTES

MODELS, MONITORING = "models.config", "monitoring.config"
_LARGEST = 2**28  # bytes of an answer


class StateError(TypedDict):
    """Why a version is in its state."""

    error_message: NotRequired[str]


class VersionState(TypedDict):
    """The state of a version."""

    state: str
    status: NotRequired[StateError]


class Status(TypedDict):
    """What TF Serving answers about a model's versions, a GetModelStatusResponse."""

    model_version_status: list[VersionState]


class Predictions(TypedDict):
    """What TF Serving answers to the inputs of a signature."""

    outputs: Any


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer of a server to a reference input, compared with the reference output.

    Args:
        protocol: `"REST"` or `"gRPC"`.
        signature: Name of the signature that was called.
        version: The version of the model that the server reports.
        error: The largest difference from the reference output, as a share of its largest value; 1 if top-1 differs.
        tolerance: The largest accepted error.
    """

    protocol: str
    signature: str
    version: int
    error: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance


def check(
    record: Json, *, model: str, rest: str | None = None, grpc: str | None = None, timeout: float = 30.0
) -> tuple[Answer, ...]:
    """Sends the reference inputs in the manifest of a SavedModel to TF Serving, for each protocol and signature.

    Args:
        record: The manifest.
        model: Name of the model on the server.
        rest: URL of the server's REST API, such as `http://localhost:8501`.
        grpc: Host and port of its gRPC API, such as `localhost:8500`. Needs the package tensorflow-serving-api.
        timeout: Seconds to wait for an answer.

    Raises:
        OSError: If the server cannot be reached (ConnectionError), or does not answer in time (TimeoutError).
        ValueError: If an argument is not valid, if the server is not TF Serving, or if it has another model.
    """
    if not {"golden", "signatures"} <= set(record):
        raise ValueError("A check needs a manifest with reference outputs. Received: the manifest of an older export")
    if rest is None and grpc is None:
        raise ValueError("A server is reached by REST or gRPC: give a URL, or host and port. Received: neither")
    if not 0 < timeout <= threading.TIMEOUT_MAX:
        raise ValueError(f"timeout must be above 0 seconds. Received: timeout={timeout!r}")
    clients = [Rest(rest, model, timeout)] if rest is not None else []
    clients += [Grpc(grpc, model, timeout)] if grpc is not None else []
    return tuple(answer for client in clients for answer in _answers(client, record))


def _answers(client: "Rest | Grpc", record: Json) -> Iterator[Answer]:
    version, signatures = client.metadata()
    for name, expected in record["signatures"].items():
        if signatures.get(name) != expected:
            found = _format(signatures[name]) if name in signatures else f"only {', '.join(sorted(signatures))}"
            raise ValueError(
                f"{client} is not the model of the manifest. Expected: {name} {_format(expected)}. Received: {found}"
            )
    (image_name,) = record["signatures"][SIGNATURE]["inputs"]
    answer = partial(Answer, protocol=client.protocol, version=version, tolerance=record["golden"]["tolerance"])
    predict = partial(_predict, client, record["signatures"])
    error = reference_error(lambda images: predict(SIGNATURE, {image_name: images}), record["golden"])
    yield answer(signature=SIGNATURE, error=error)
    if expected := record.get("golden_file"):
        file = np.array([base64.b64decode(expected["base64"])], dtype=object)
        outputs = predict(IMAGE_BYTES, {IMAGE_BYTES: file})
        scores, classes = np.array(expected["scores"]), outputs["classes"].tolist()
        error = float(np.abs(outputs["scores"] - scores).max() / np.abs(scores).max())
        # Rounding can change the order of the classes after the first.
        same = classes[0][0] == expected["classes"][0].encode()
        yield answer(signature=IMAGE_BYTES, error=error if same else 1.0)


def _format(signature):
    """A signature in a few words, such as "from images ?x8x8x3 float32 to probabilities ?x10 float32"."""

    def tensors(side):
        shapes = {name: "x".join("?" if n is None else str(n) for n in x["shape"]) for name, x in side.items()}
        return ", ".join(f"{name} {shapes[name]} {x['dtype']}" for name, x in side.items())

    return f"from {tensors(signature['inputs'])} to {tensors(signature['outputs'])}"


class Rest:
    """A model that TF Serving offers by its REST API: https://www.tensorflow.org/tfx/serving/api_rest."""

    protocol = "REST"

    def __init__(self, url: str, model: str, timeout: float):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"A REST API has an address such as http://localhost:8501. Received: {url!r}")
        self._url, self._timeout = f"{url.rstrip('/')}/v1/models/{model}", timeout

    def __str__(self) -> str:
        return self._url

    def metadata(self) -> tuple[int, Json]:
        """The version that the server has, and the signatures as in a manifest."""
        states = self._read("", Status)["model_version_status"]
        if not states:
            raise ValueError(f"{self._url} is not TF Serving: it reports no versions")
        if not any(state["state"] == "AVAILABLE" for state in states):
            message = states[0].get("status", {}).get("error_message") or "no error message"
            raise ValueError(f"{self._url} is {states[0]['state']}, not AVAILABLE: {message}")
        version, self._signatures = _metadata(self._read("/metadata", dict[str, Any]))
        return version, self._signatures

    def predict(self, signature: str, inputs: Mapping[str, Array]) -> Outputs:
        """Outputs of a signature, `{name: array}`. Strings are bytes."""
        values = {name: _listed(x) for name, x in inputs.items()}
        outputs: Any = self._read(":predict", Predictions, {"signature_name": signature, "inputs": values})["outputs"]
        described = self._signatures[signature]["outputs"]
        if len(described) == 1:  # then the answer does not contain the name
            outputs = {name: outputs for name in described}
        try:
            return {name: _array(outputs[name], x["dtype"]) for name, x in described.items()}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError(f"{self._url} answers {signature} without valid {', '.join(described)}") from None

    def _read(self, path, shape, body=None):
        url = self._url + path
        request = urllib.request.Request(url, data=None if body is None else json.dumps(body).encode())

        def ask():
            try:
                with urllib.request.urlopen(request, timeout=self._timeout) as response:
                    return response.read(_LARGEST + 1), False
            except urllib.error.HTTPError as error:
                return error.read(_LARGEST + 1), True

        try:
            content, refused = within(self._timeout, ask)  # urlopen's limit is for each packet
        except OSError as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise TimeoutError(f"{url} has not answered within {self._timeout:g} seconds") from None
            raise ConnectionError(f"{url} cannot be reached: {first_line(reason)}") from None
        except http.client.HTTPException:
            raise ConnectionError(f"{url} cannot be reached: the program at that port does not speak HTTP") from None
        if len(content) > _LARGEST:
            raise ValueError(f"{url} answers with more than {_LARGEST >> 20} MiB")
        refusal = f"{url} is not TF Serving. It answers: {content[:60]!r}"
        answer = parse_json(content, dict[str, Any], refusal=refusal)
        if refused or "error" in answer:
            raise ValueError(f"{url} is refused: {first_line(answer.get('error', 'no error message'))}")
        return parse_json(content, shape, refusal=refusal)


class Grpc:
    """A model that TF Serving offers by its gRPC API: tensorflow_serving/apis/prediction_service.proto."""

    protocol = "gRPC"

    def __init__(self, host: str, model: str, timeout: float):
        with needs_extra("serving", "gRPC"):
            import grpc
            from tensorflow_serving.apis import get_model_metadata_pb2, predict_pb2, prediction_service_pb2_grpc
        # By default, answers of more than 4 MB are refused.
        self._channel = grpc.insecure_channel(host, options=[("grpc.max_receive_message_length", _LARGEST)])
        self._stub = prediction_service_pb2_grpc.PredictionServiceStub(self._channel)
        self._grpc, self._host, self._model, self._timeout = grpc, host, model, timeout
        self._metadata_request, self._predict_request = get_model_metadata_pb2, predict_pb2

    def __str__(self) -> str:
        return f"{self._model} at {self._host}"

    def metadata(self) -> tuple[int, Json]:
        """The version that the server has, and the signatures as in a manifest."""
        request = self._metadata_request.GetModelMetadataRequest(metadata_field=["signature_def"])
        request.model_spec.name = self._model
        return _metadata(MessageToDict(self._call("GetModelMetadata", request), preserving_proto_field_name=True))

    def predict(self, signature: str, inputs: Mapping[str, Array]) -> Outputs:
        """Outputs of a signature, `{name: array}`. Strings are bytes."""
        request = self._predict_request.PredictRequest(
            inputs={name: tf.make_tensor_proto(values) for name, values in inputs.items()}
        )
        request.model_spec.name, request.model_spec.signature_name = self._model, signature
        return {name: tf.make_ndarray(x) for name, x in self._call("Predict", request).outputs.items()}

    def _call(self, method, request):
        try:
            return getattr(self._stub, method)(request, timeout=self._timeout)
        except self._grpc.RpcError as error:
            code, details = error.code(), first_line(error.details() or error.code().name)
        if code is self._grpc.StatusCode.DEADLINE_EXCEEDED:
            raise TimeoutError(f"{self} has not answered within {self._timeout:g} seconds")
        if code is self._grpc.StatusCode.UNAVAILABLE:
            raise ConnectionError(f"{self} cannot be reached by gRPC: {details}")
        if code is self._grpc.StatusCode.UNIMPLEMENTED:
            raise ValueError(f"{self._host} is not TF Serving: {details}")
        raise ValueError(f"{self} is refused: {details}")


def _metadata(answer):
    """Version and signatures in a GetModelMetadataResponse as JSON. Both protocols return this proto."""
    try:
        entries = answer["metadata"]["signature_def"]["signature_def"].items()
        signatures = {name: _signature(entry) for name, entry in entries if entry.get("inputs")}
        return int(answer["model_spec"]["version"]), signatures
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError("TF Serving reports the signatures of a model. Received: another answer") from None


def _signature(entry):
    def tensor(spec):
        sizes = [int(side["size"]) for side in spec["tensor_shape"].get("dim", ())]
        dtype = tf.as_dtype(spec["dtype"].removeprefix("DT_").lower()).name
        return {"shape": [None if size < 0 else size for size in sizes], "dtype": dtype}

    return {side: {x: tensor(spec) for x, spec in sorted(entry[side].items())} for side in ("inputs", "outputs")}


def _listed(values):
    """An array in the JSON of TF Serving. Bytes are in base64."""
    if values.dtype == object:
        return [{"b64": base64.b64encode(value).decode()} for value in values]
    return values.tolist()


def _array(values, dtype):
    """An array of JSON's numbers or strings: numpy would take a string for a number, and a number for a string."""
    found = np.array(values, object)
    kinds = (str,) if dtype == "string" else (int, float)
    if not all(type(value) in kinds for value in found.flat):
        raise TypeError("values of another type")
    return np.vectorize(str.encode, otypes=[object])(found) if dtype == "string" else found.astype(dtype)


def _predict(client, signatures, signature, inputs):
    """The outputs of a signature, each of the shape and type that it is described with."""
    (samples,), outputs = {len(values) for values in inputs.values()}, client.predict(signature, inputs)
    for name, about in signatures[signature]["outputs"].items():
        if name not in outputs:
            raise ValueError(f"{client} answers without {name}")
        expected, found = (samples, *about["shape"][1:]), outputs[name]
        kinds = "OS" if about["dtype"] == "string" else np.dtype(about["dtype"]).kind
        fits = found.ndim == len(expected) and all(map(lambda a, b: b in (None, a), found.shape, expected))
        if not fits or found.dtype.kind not in kinds:
            rule = f"{name} must be {expected} of {about['dtype']} in the answer of {client}"
            raise ValueError(f"{rule}. Received: {found.shape} of {found.dtype}")
    return outputs


def write_server_files(folder: FilePath, *, root: str = "/models", replace: bool = False) -> list[str]:
    """Writes `models.config` and `monitoring.config` of TF Serving for a folder of models. Returns the models' names.

    The batching parameters of a model are in its versions (`batching_params.pbtxt`).

    Args:
        folder: Has a folder for each model, with a folder for each version.
        root: Path of the folder on the machine of the server.
        replace: Whether to replace existing files, which somebody may have edited.

    Raises:
        FileNotFoundError, ValueError: If there is no such folder, or no model in it.
        FileExistsError: If one of the files exists with another content.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder of models {str(folder)!r}")
    versions = [path.parent for path in folder.glob("*/*/saved_model.pb") if path.parent.name.isdecimal()]
    names = sorted({version.parent.name for version in versions})
    if not names:
        rule = "A folder of models has MODEL/VERSION/saved_model.pb in it"
        raise ValueError(f"{rule}. Received: {str(folder)!r} without")
    root = str(root).rstrip("/")
    configs = "".join(
        f"  config {{\n    name: {json.dumps(name)}\n    base_path: {json.dumps(f'{root}/{name}')}\n"
        '    model_platform: "tensorflow"\n  }\n'
        for name in names
    )
    contents = {
        folder / MODELS: f"model_config_list {{\n{configs}}}\n".encode(),
        folder / MONITORING: b'prometheus_config {\n  enable: true\n  path: "/monitoring/prometheus/metrics"\n}\n',
    }
    other = [path for path, content in contents.items() if path.exists() and path.read_bytes() != content]
    if other and not replace:
        raise FileExistsError(f"{str(other[0])!r} exists with another content: replace=True (--replace) replaces it")
    storage.write_in_order([*contents.items()])
    return names
