"""What a served model offers beside its probabilities: logits, and the classes of image files."""

import keras
import tensorflow as tf

from se_keras.graph import calls, gives_probabilities
from se_keras.images import evaluation_image

LOGITS, IMAGE_BYTES = "logits", "image_bytes"
# A file of some kilobytes can say that it holds an image of gigabytes. Cameras have up to 2^27 pixels.
MOST_PIXELS = 2**27


def logits(model):
    """A function from images to the logits of a functional model, with its own weights.

    None where the model does not end in one softmax, alone or in a fully connected layer.
    """
    last = calls(model)[-1]
    layer = last.operation
    if len(model.outputs) != 1 or not gives_probabilities(layer):
        return None
    body = keras.Model(model.inputs, last.input_tensors[0])
    if isinstance(layer, (keras.layers.Softmax, keras.layers.Activation)):
        return lambda images: body(images, training=False)
    if isinstance(layer, keras.layers.Dense):

        def dense(images):
            values = keras.ops.matmul(body(images, training=False), layer.kernel)
            return values if layer.bias is None else values + layer.bias

        return dense
    return None


def classify(scores_of, *, size, channels, labels, normalization, top):
    """A function from image files to the classes with the highest scores, and the table of the classes' names.

    A file is decoded by its content, JPEG, PNG, GIF (its first frame), BMP or WebP, and brought to the network's size
    as in evaluation. One that cannot be decoded has classes "" and scores 0; the others of its batch are answered.

    Args:
        scores_of: From normalized images to scores, a tensor `(batch, classes)`.
        size: `(height, width)`.
        channels: 3 for RGB, 1 for gray.
        labels: Path of a text file with the name of a class a line; it becomes an asset of the SavedModel.
        normalization: A `Normalization`.
        top: Number of classes to give.
    """
    line, whole = tf.lookup.TextFileIndex.LINE_NUMBER, tf.lookup.TextFileIndex.WHOLE_LINE
    names = tf.lookup.StaticHashTable(
        tf.lookup.TextFileInitializer(str(labels), tf.int64, line, tf.string, whole), default_value=""
    )

    def image_bytes(contents):
        images, decoded = _images(contents, size, channels)
        scores, classes = tf.math.top_k(scores_of(normalization.apply(images)), top)
        return {
            "classes": tf.where(decoded, names.lookup(tf.cast(classes, "int64")), ""),
            "scores": tf.where(decoded, scores, 0.0),
        }

    return image_bytes, names


def _images(contents, size, channels):
    """Pixels `(batch, height, width, channels)` of files, and `(batch, 1)`: whether each could be decoded.

    An operator that fails would fail the whole batch. A dataset leaves out what fails, and may be read within a graph
    (`tf.data.Dataset.get_single_element`).
    """
    count = tf.shape(contents)[0]

    def read(place, content):
        with tf.control_dependencies([_check_pixels(content)]):
            return place, evaluation_image(content, size=size, channels=channels)

    files = tf.data.Dataset.from_tensor_slices((tf.range(count), contents))
    images = files.map(read, num_parallel_calls=tf.data.AUTOTUNE).ignore_errors()
    # Behind the last place: there has to be an element even where no file can be decoded.
    blank = tf.data.Dataset.from_tensors((count, tf.zeros((*size, channels))))
    places, images = images.concatenate(blank).batch(tf.cast(count, "int64") + 1).get_single_element()
    images = tf.scatter_nd(places[:, None], images, (count + 1, *size, channels))[:count]
    decoded = tf.scatter_nd(places[:, None], tf.ones_like(places), (count + 1,))[:count]
    return images, decoded[:, None] > 0


def _check_pixels(content):
    """Fails where the head of a JPEG, PNG or GIF file tells of more than `MOST_PIXELS`; reads nothing else of it."""

    def told(begin, length, dtype, **order):
        return lambda: tf.cast(tf.io.decode_raw(tf.strings.substr(content, begin, length), dtype, **order), "int64")

    sides = tf.case(
        [
            (tf.io.is_jpeg(content), lambda: tf.image.extract_jpeg_shape(content, "int64")[:2]),
            (tf.strings.substr(content, 0, 4) == b"\x89PNG", told(16, 8, "int32", little_endian=False)),
            (tf.strings.substr(content, 0, 4) == b"GIF8", told(6, 4, "uint16")),
        ],
        default=lambda: tf.zeros(2, "int64"),  # BMP is not compressed, and WebP ends at 2^28 pixels
    )
    return tf.debugging.assert_less_equal(tf.reduce_prod(sides), tf.constant(MOST_PIXELS, "int64"))
