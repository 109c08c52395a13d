"""Warm-up requests: TF Serving replays them while it loads a model, so that the first caller does not have to wait.

They are a TFRecord file of PredictionLogs. If one fails, TF Serving does not load the model. So they are replayed
before a SavedModel is finished.

Source: tensorflow_serving/apis/ prediction_log.proto, predict.proto and model.proto. Only the fields that are used are
declared here, with their numbers, because tensorflow-serving-api, which has all of them, is an optional dependency.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2

from se_keras import protos

FILE = "assets.extra/tf_serving_warmup_requests"

_TensorProto: Any = tensor_pb2.TensorProto  # pyright: ignore[reportAttributeAccessIssue]: protobuf adds it at run time

_PredictionLog = protos.message(
    "PredictionLog",
    {
        "ModelSpec": {"name": (1, str), "signature_name": (3, str)},
        "Input": {"key": (1, str), "value": (2, bytes)},
        "PredictRequest": {"model_spec": (1, "ModelSpec"), "inputs": (2, ["Input"])},
        "PredictLog": {"request": (1, "PredictRequest")},
        "PredictionLog": {"predict_log": (6, "PredictLog")},
    },
)


def write(path: Path, model: str, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Writes `requests`, a list of `(signature, {input: TensorProto})`, into the SavedModel in the folder `path`."""
    (path / FILE).parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(path / FILE)) as file:
        for signature, inputs in requests:
            log = _PredictionLog()
            request = log.predict_log.request
            request.model_spec.name, request.model_spec.signature_name = model, signature
            for name, tensor in inputs.items():
                request.inputs.add(key=name, value=tensor.SerializeToString())
            file.write(log.SerializeToString())


def replay(path: Path, signatures: Mapping[str, Any]) -> int:
    """Runs the requests of a SavedModel with its loaded signatures, and returns their number. Each must succeed."""
    records = list(tf.data.TFRecordDataset(str(path / FILE)).as_numpy_iterator())
    for record in records:
        request = _PredictionLog.FromString(record).predict_log.request
        inputs = {x.key: tf.constant(tf.make_ndarray(_TensorProto.FromString(x.value))) for x in request.inputs}
        name = request.model_spec.signature_name
        try:
            outputs = signatures[name](**inputs)
        except (KeyError, TypeError, tf.errors.OpError) as error:
            message = " ".join(str(error).split())
            raise ValueError(f"The warm-up request for {name!r} fails: {message}. Nothing was written") from None
        if not all(np.isfinite(x).all() for x in outputs.values() if x.dtype.is_floating):
            raise ValueError(f"The answer to the warm-up request for {name!r} is not finite. Nothing was written")
    return len(records)
