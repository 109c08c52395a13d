"""Requests that TF Serving replays while it loads a model, so that the first caller does not wait for it.

They stand in `assets.extra/tf_serving_warmup_requests`, a TFRecord file of PredictionLogs. One that fails fails the
whole load: they are replayed before a SavedModel is shipped.

Source: tensorflow_serving/apis/ prediction_log.proto, predict.proto and model.proto. Of their fields the few that are
used are declared here, with their numbers: tensorflow-serving-api, which has them all, is an extra.
"""

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2

from se_keras import protos

FILE = "assets.extra/tf_serving_warmup_requests"

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


def write(path, model, requests):
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


def replay(path, signatures):
    """Answers each request that stands in a SavedModel by its loaded signatures; returns how many there were.

    Raises:
        ValueError: If one cannot be answered, or if an answer is not finite.
    """
    count = 0
    for count, record in enumerate(tf.data.TFRecordDataset(str(path / FILE)).as_numpy_iterator(), start=1):  # noqa: B007
        request = _PredictionLog.FromString(record).predict_log.request
        inputs = {
            x.key: tf.constant(tf.make_ndarray(tensor_pb2.TensorProto.FromString(x.value))) for x in request.inputs
        }
        name = request.model_spec.signature_name
        try:
            outputs = signatures[name](**inputs)
        except (KeyError, TypeError, tf.errors.OpError) as error:
            told = " ".join(str(error).split())
            raise ValueError(f"The warm-up request for {name!r} fails: {told}. Nothing was written") from None
        if not all(np.isfinite(x).all() for x in outputs.values() if x.dtype.is_floating):
            raise ValueError(f"The answer to the warm-up request for {name!r} is not finite. Nothing was written")
    return count
