"""Further signatures of a SavedModel: the logits, and the classes of image files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from se_keras import decoding
from se_keras.graph import calls, gives_probabilities
from se_keras.images import evaluation_image
from se_keras.normalization import Normalization

LOGITS, IMAGE_BYTES = "logits", "image_bytes"
# Pixels of a request, which take up to ten seconds. Files beyond are answered as damaged ones are.
MOST_PIXELS = 2**30
AT_ONCE = 2**24  # pixels of a file to decode together with others, 48 MB; larger ones are decoded one after the other


def logits(model: keras.Model) -> Callable[[Any], Any] | None:
    """A function from images to the logits of a functional model, with the model's weights.

    None if the model does not end in a softmax, as a layer or as the activation of a Dense layer.
    """
    last = calls(model)[-1]
    layer = last.operation
    if len(model.outputs) != 1 or not gives_probabilities(layer):
        return None
    body = keras.Model(model.inputs, last.input_tensors[0])
    if isinstance(layer, (keras.layers.Softmax, keras.layers.Activation)):
        return lambda images: body(images, training=False)
    if not isinstance(layer, keras.layers.Dense):
        return None

    def dense(images):
        values = keras.ops.matmul(body(images, training=False), layer.kernel)
        return values if layer.bias is None else values + layer.bias

    return dense


def classify(
    scores_of: Callable[[Any], Any], *, shape: Sequence[int], labels: Path, normalization: Normalization, top: int
) -> tuple[Callable[[Any], dict[str, Any]], tf.lookup.StaticHashTable]:
    """A function from image files to the classes with the highest scores, and the table of the names of the classes.

    A file is decoded by its content (JPEG, PNG, GIF, BMP or WebP) and resized as in evaluation. A file that cannot be
    decoded, or has too many pixels, alone or together with those before it, gets the classes "" and the scores 0; the
    other files of the batch are not affected.

    Args:
        scores_of: Function from normalized images to scores, a tensor `(batch, classes)`.
        shape: `(height, width, channels)` of the images; 3 channels for RGB, 1 for gray.
        labels: A text file with the name of one class per line. It becomes an asset of the SavedModel.
        normalization: Normalization of the pixels.
        top: Number of classes to return.
    """
    number, line = tf.lookup.TextFileIndex.LINE_NUMBER, tf.lookup.TextFileIndex.WHOLE_LINE
    names = tf.lookup.StaticHashTable(
        tf.lookup.TextFileInitializer(str(labels), tf.int64, number, tf.string, line), default_value=""
    )

    def image_bytes(contents):
        images, decoded = _images(contents, shape)
        scores, classes = tf.math.top_k(scores_of(normalization.apply(images)), top)
        return {
            "classes": tf.where(decoded, names.lookup(tf.cast(classes, "int64")), ""),
            "scores": tf.where(decoded, scores, 0.0),
        }

    return image_bytes, names


def _images(contents, shape):
    """Pixels of files, `(batch, *shape)`, and whether each file could be decoded, `(batch, 1)`.

    An operation that fails would fail the whole batch. A dataset can skip failures, and a graph can read it with
    `tf.data.Dataset.get_single_element`.
    """
    count = tf.shape(contents)[0]

    def read(index, content, *_):
        return index, evaluation_image(content, size=shape[:2], channels=shape[2])

    def add_up(total, file):
        index, content, pixels = file
        return total + pixels, (index, content, pixels, total + pixels)

    files = tf.data.Dataset.from_tensor_slices((tf.range(count), contents))
    files = files.map(lambda index, content: (index, content, decoding.pixels_in(content))).ignore_errors()
    files = files.filter(lambda _, __, pixels: pixels <= decoding.MOST_PIXELS)
    files = files.scan(tf.constant(0, "int64"), add_up)
    files = files.filter(lambda _, __, ___, total: total <= MOST_PIXELS)
    small = files.filter(lambda _, __, pixels, ___: pixels <= AT_ONCE).map(read, num_parallel_calls=tf.data.AUTOTUNE)
    large = files.filter(lambda _, __, pixels, ___: pixels > AT_ONCE).map(read)
    # An extra image after the last one: the dataset must not be empty, even if no file can be decoded.
    blank = tf.data.Dataset.from_tensors((count, tf.zeros(shape)))
    images = small.ignore_errors().concatenate(large.ignore_errors()).concatenate(blank)
    indices, images = images.batch(tf.cast(count, "int64") + 1).get_single_element()
    images = tf.scatter_nd(indices[:, None], images, (count + 1, *shape))[:count]
    decoded = tf.scatter_nd(indices[:, None], tf.ones_like(indices), (count + 1,))[:count]
    return images, decoded[:, None] > 0
