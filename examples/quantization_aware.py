"""Four int8 files of one network: by post-training quantization, by fine-tuning, pruned, and with clustered weights.

python examples/quantization_aware.py
"""

import tempfile
from dataclasses import replace

import keras
import tensorflow as tf
import tf_keras

import se_keras
from se_keras.export import qat, to_litert
from se_keras.training.data import digits
from se_keras.training.loop import fit
from se_keras.training.recipes import DIGITS


def learn(tf_keras_model, data, *, rate, epochs):
    """Fits a tf_keras model to a tf.data.Dataset."""
    tf_keras.utils.set_random_seed(0)
    dataset = tf.data.Dataset.from_tensor_slices((data.train.images, data.train.labels))
    tf_keras_model.compile(tf_keras.optimizers.Adam(rate), "sparse_categorical_crossentropy")
    tf_keras_model.fit(dataset.shuffle(len(data.train)).batch(32), epochs=epochs, verbose=0)
    return tf_keras_model


def post_training(model, data):
    """Post-training quantization, with ranges from a hundred images."""
    return to_litert(model, precision="int8", calibration=data.train.images[:100], held_out=data.test.images)


def fine_tuned(model, data, **options):
    """Quantization-aware fine-tuning: training continues with weights and activations rounded as in the file."""
    tf_keras_model = qat.quantize_aware(model, data.train.images[:100], **options)
    return qat.to_litert(learn(tf_keras_model, data, rate=1e-4, epochs=2), model, held_out=data.test.images)


def pruned(model, data):
    """Three quarters of the weights become zero step by step. Quantization-aware fine-tuning keeps them zero."""
    tf_keras_model = learn(qat.prunable(model, sparsity=0.75, steps=90), data, rate=1e-3, epochs=3)
    return fine_tuned(qat.stripped(tf_keras_model, model), data, keep_zeros=True)


def clustered(model, data):
    """Sixteen different weights in each kernel, which stay different after post-training quantization."""
    return post_training(qat.stripped(learn(qat.clustered(model, clusters=16), data, rate=1e-3, epochs=1), model), data)


if __name__ == "__main__":
    keras.utils.set_random_seed(0)
    data = digits()
    with tempfile.TemporaryDirectory() as folder:
        network = se_keras.create("se_resnet11_digits", classes=len(data.classes))
        model, _ = fit(network, replace(DIGITS, epochs=5), data, folder)
    expected = model.predict(data.test.images, verbose=0).argmax(axis=1)
    files = {
        "float32": to_litert(model),
        "int8, post-training": post_training(model, data),
        "int8, quantization-aware": fine_tuned(model, data),
        "int8, pruned, quantization-aware": pruned(model, data),
        "int8, clustered, post-training": clustered(model, data),
    }
    print(f"{'':34}accuracy  as float    bytes  compressed  zeros")
    for name, file in files.items():
        found = file.runner()(data.test.images)["probabilities"].argmax(axis=1)
        size = qat.compression(file.content)
        accuracy, same = (found == data.test.labels).mean(), (found == expected).mean()
        print(f"{name:34}{accuracy:8.1%}{same:10.1%}{size.bytes:9,}{size.compressed_bytes:12,}{size.sparsity:7.1%}")
