"""A stand-in for TF Serving: its REST and gRPC APIs for SavedModels in sessions, with the real protos.

It follows the documents and source of TF Serving (api_rest.md, json_tensor.cc, http_server.cc), also in its error
messages. pip cannot install TF Serving.
"""

import base64
import contextlib
import http.server
import json
import re
import threading
import time
from concurrent import futures
from pathlib import Path

import grpc
import numpy as np
import tensorflow as tf
from google.protobuf.json_format import MessageToDict
from tensorflow_serving.apis import get_model_metadata_pb2, predict_pb2, prediction_service_pb2_grpc

from se_keras.export.benchmark.programs.serving_session import Session

PATH = re.compile(r"/v1/models/([^/:]+)(?:/versions/(\d+))?(/metadata|:predict)?")
STATUS = {grpc.StatusCode.NOT_FOUND: 404, grpc.StatusCode.INVALID_ARGUMENT: 400}


class Refusal(Exception):
    """An error that a server answers with."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code, self.message = code, message


@contextlib.contextmanager
def stand_in(models, *, delay=0.0, states=("AVAILABLE",)):
    """Serves versions, `{name: path}`, on 127.0.0.1 until the block ends; yields the REST URL and the gRPC host.

    Each answer is delayed by `delay` seconds, and the versions have the `states`.
    """
    server = Models(models, delay, states)
    handler = type("Handler", (RestHandler,), {"models": server})
    rest = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    rest.daemon_threads = True
    thread = threading.Thread(target=rest.serve_forever)
    thread.start()
    rpc = grpc.server(futures.ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", -1)])
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(Prediction(server), rpc)
    port = rpc.add_insecure_port("127.0.0.1:0")
    rpc.start()
    try:
        yield f"http://127.0.0.1:{rest.server_port}", f"127.0.0.1:{port}"
    finally:
        rest.shutdown()
        rest.server_close()
        thread.join()
        rpc.stop(None).wait()


class Models:
    """The models that a server has."""

    def __init__(self, models, delay, states):
        self._paths = {name: Path(path) for name, path in models.items()}
        self._sessions = {name: Session(path) for name, path in self._paths.items()}
        self.delay, self.states = delay, states

    def find(self, name, version=None):
        """The session of a model, and its version."""
        if name not in self._sessions or version not in (None, self._paths[name].name):
            asked = f"Latest({name})" if version is None else f"Specific({name}, {version})"
            raise Refusal(grpc.StatusCode.NOT_FOUND, f"Servable not found for request: {asked}")
        time.sleep(self.delay)
        return self._sessions[name], int(self._paths[name].name)

    def metadata(self, name, version=None):
        """A GetModelMetadataResponse."""
        session, found = self.find(name, version)
        answer = get_model_metadata_pb2.GetModelMetadataResponse()
        answer.model_spec.name, answer.model_spec.version.value = name, found
        signatures = get_model_metadata_pb2.SignatureDefMap(signature_def=session.signatures)
        answer.metadata["signature_def"].Pack(signatures)
        return answer

    def predict(self, name, signature, inputs, version=None):
        """Outputs of a signature, and the version. `inputs` is a function from the declared inputs to arrays."""
        session, found = self.find(name, version)
        signature = signature or "serving_default"
        if signature not in session.signatures:
            message = f'Serving signature name: "{signature}" not found in signature def'
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, message)
        expected = session.signatures[signature].inputs
        inputs = inputs(expected)
        if set(inputs) != set(expected):
            message = f"input size does not match signature: {len(inputs)}!={len(expected)}"
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, message)
        try:
            return session.predict(signature, inputs), found
        except (ValueError, tf.errors.OpError) as error:  # of another shape, or refused by an operator
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from error


class RestHandler(http.server.BaseHTTPRequestHandler):
    """The REST API."""

    models = None

    def do_GET(self):
        """Status and metadata."""
        self._answer(self._get)

    def do_POST(self):
        """Predictions."""
        self._answer(self._post)

    def log_message(self, *_):
        """Prints nothing."""

    def _answer(self, function):
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        found = PATH.fullmatch(self.path)
        try:
            if not found:
                message = f"Malformed request: {self.command} {self.path}"
                raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, message)
            code, body = 200, function(*found.groups(), content)
        except Refusal as refusal:
            code, body = STATUS[refusal.code], {"error": refusal.message}
        with contextlib.suppress(ConnectionError):  # the caller may have gone
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

    def _get(self, name, version, what, _):
        if what == "/metadata":
            return MessageToDict(self.models.metadata(name, version), preserving_proto_field_name=True)
        _, number = self.models.find(name, version)
        status = {"error_code": "OK", "error_message": ""}
        return {
            "model_version_status": [
                {"version": str(number), "state": state, "status": status} for state in self.models.states
            ]
        }

    def _post(self, name, version, what, content):
        try:
            request = json.loads(content)
        except ValueError as error:
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, f"JSON Parse error: {error}") from error
        if len({"instances", "inputs"} & set(request)) != 1 or what != ":predict":
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "Missing 'inputs' or 'instances' key")
        inputs = rows(request["instances"]) if "instances" in request else columns(request["inputs"])
        outputs, _ = self.models.predict(name, request.get("signature_name"), inputs, version)
        outputs = {
            key: np.vectorize(text)(x).tolist() if x.dtype == object else x.tolist() for key, x in outputs.items()
        }
        if "inputs" in request:
            return {"outputs": outputs if len(outputs) > 1 else next(iter(outputs.values()))}
        predictions = [dict(zip(outputs, row, strict=True)) for row in zip(*outputs.values(), strict=True)]
        return {"predictions": predictions if len(outputs) > 1 else [next(iter(x.values())) for x in predictions]}


def text(value):
    """A string in an answer: TF Serving uses base64 only for outputs whose names end in _bytes."""
    return value.decode()


def columns(given):
    """Inputs of the columnar format."""
    return lambda expected: {
        name: array(x, expected[name])
        for name, x in (given if isinstance(given, dict) and "b64" not in given else {only(expected): given}).items()
    }


def rows(given):
    """Inputs of the row format."""
    if all(isinstance(row, dict) and "b64" not in row for row in given):
        return lambda expected: {name: array([row[name] for row in given], x) for name, x in expected.items()}
    return lambda expected: {only(expected): array(given, expected[only(expected)])}


def only(expected):
    """The name of the one input."""
    (name,) = expected
    return name


def array(values, about):
    """A tensor from JSON."""
    try:
        if about.dtype == tf.string.as_datatype_enum:
            return np.array([base64.b64decode(x["b64"], validate=True) for x in values], dtype=object)
        return np.array(values, tf.as_dtype(about.dtype).as_numpy_dtype)
    except (KeyError, TypeError, ValueError) as error:
        raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, f"JSON Value: is not of the expected type: {error}") from error


class Prediction(prediction_service_pb2_grpc.PredictionServiceServicer):
    """The gRPC API."""

    def __init__(self, models):
        self._models = models

    def Predict(self, request, context):
        """Predictions."""
        name, signature = request.model_spec.name, request.model_spec.signature_name
        inputs = {key: tf.make_ndarray(x) for key, x in request.inputs.items()}
        try:
            outputs, version = self._models.predict(name, signature, lambda _: inputs)
        except Refusal as refusal:
            context.abort(refusal.code, refusal.message)
        answer = predict_pb2.PredictResponse(outputs={key: tf.make_tensor_proto(x) for key, x in outputs.items()})
        answer.model_spec.name, answer.model_spec.version.value = name, version
        return answer

    def GetModelMetadata(self, request, context):
        """Metadata."""
        try:
            return self._models.metadata(request.model_spec.name)
        except Refusal as refusal:
            context.abort(refusal.code, refusal.message)
