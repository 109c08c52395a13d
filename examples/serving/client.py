"""Asks TF Serving what is in image files: `python client.py URL MODEL FILE...`, with Python alone.

With the package tensorflow-serving-api, `python client.py --grpc HOST:PORT MODEL FILE...` asks by gRPC.
"""

import base64
import json
import sys
import urllib.request
from pathlib import Path


def by_rest(url, model, contents):
    """The classes and scores of image files, a dict for each, by the REST API."""
    instances = [{"b64": base64.b64encode(content).decode()} for content in contents]
    body = json.dumps({"signature_name": "image_bytes", "instances": instances}).encode()
    with urllib.request.urlopen(f"{url}/v1/models/{model}:predict", body, timeout=30) as response:
        return json.load(response)["predictions"]


def by_grpc(host, model, contents):
    """The same by gRPC."""
    import grpc
    import tensorflow as tf
    from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

    request = predict_pb2.PredictRequest(inputs={"image_bytes": tf.make_tensor_proto(contents)})
    request.model_spec.name, request.model_spec.signature_name = model, "image_bytes"
    with grpc.insecure_channel(host) as channel:
        outputs = prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request, timeout=30).outputs
    classes, scores = (tf.make_ndarray(outputs[name]).tolist() for name in ("classes", "scores"))
    return [{"classes": [name.decode() for name in row], "scores": column}
            for row, column in zip(classes, scores, strict=True)]  # fmt: skip


def main(arguments):
    """Prints the classes of each file; an empty class says that it could not be decoded."""
    ask = by_grpc if arguments[0] == "--grpc" else by_rest
    server, model, *files = arguments[1:] if ask is by_grpc else arguments
    for file, answer in zip(files, ask(server, model, [Path(file).read_bytes() for file in files]), strict=True):
        if not answer["classes"][0]:
            print(f"{file}: cannot be decoded")
        else:
            pairs = zip(answer["classes"], answer["scores"], strict=True)
            print(f"{file}: " + ", ".join(f"{name} {score:.3f}" for name, score in pairs))


if __name__ == "__main__":
    main(sys.argv[1:])
