"""From a split to the batches of a step: read, decoded, augmented, normalized and prefetched."""

import contextlib
import re
import socket
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

from se_keras.errors import first_line
from se_keras.images import evaluation_image
from se_keras.training.augmentation import fold_in, mix_up, rand_augment, training_image
from se_keras.training.data import Data, EpochOrder, SkippedFiles, Split
from se_keras.training.recipes import Augmentation
from se_keras.waiting import within

AUTO = tf.data.AUTOTUNE
PREFETCHED = 2  # batches
_REACHED, _REGISTERED = 10, 60  # seconds to wait for a tf.data service: for its port, and for its first answer


def batches(
    split: Split,
    data: Data,
    *,
    size: tuple[int, int],
    order: EpochOrder,
    augmentation: Augmentation,
    skipped: SkippedFiles | None = None,
    service: str | None = None,
) -> tf.data.Dataset:
    """The batches of training images of an epoch, or of one worker's share of it.

    The augmentation of an image depends only on the seed and the epoch of the order and on the index of the image. It
    is the same for every worker, and after resuming.

    Args:
        split: Images of `data`, which has the classes and the normalization.
        size: `(height, width)` of the network.
        order: The order of the images; it needs a seed.
        skipped: Collects the files that cannot be decoded; a service cannot report them.
        service: Address of a tf.data service that prepares the images, such as `"grpc://host:5000"`.

    Raises:
        ValueError: If `service` is no such address.
        ConnectionError: If no service answers there.

    Returns:
        Normalized float32 images `(batch, height, width, channels)`; labels `(batch, classes)` as probabilities; and
        weights `(batch,)`, 0 for an image that could not be decoded.
    """
    channels, classes = len(data.mean), len(data.classes)
    operations = rand_augment(augmentation.rand_augment) if augmentation.rand_augment else None
    mix = mix_up(augmentation.mixup) if augmentation.mixup else None
    epoch_seed = fold_in(np.array([order.seed, 0], "int64"), order.epoch)

    def read(index, content, label):
        image = training_image(
            content,
            size=size,
            channels=channels,
            augmentation=augmentation,
            seed=fold_in(epoch_seed, index),
            operations=operations,
            mean=tf.constant(data.mean, "float32"),
        )
        return index, image, label

    def finish(index, images, labels, weights):
        labels = tf.one_hot(labels, classes)
        if mix is not None:
            images, labels = mix(images, labels, fold_in(epoch_seed, index[0]))
        return data.normalization.apply(images), labels, weights

    dataset = read_batches(split, order, read, None if service else skipped).map(finish, num_parallel_calls=AUTO)
    if service:
        dataset = _prepared_by(service, dataset)
    return _deterministic(dataset.prefetch(PREFETCHED))


def _prepared_by(service, dataset):
    """The dataset, prepared by a tf.data service. TensorFlow itself would wait for one for ever, deaf to signals."""
    match = re.fullmatch(r"grpc://(.+):(\d{1,5})", service)
    if not match:
        raise ValueError(f"service must be an address such as grpc://host:5000. Received: service={service!r}")
    try:
        with socket.create_connection((match[1].strip("[]"), int(match[2])), timeout=_REACHED):
            pass
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"No tf.data service can be reached at {service}: {first_line(error)}") from None
    unsharded = tf.data.experimental.service.ShardingPolicy.OFF
    try:
        return within(_REGISTERED, lambda: dataset.apply(tf.data.experimental.service.distribute(unsharded, service)))
    except TimeoutError:
        answer = f"has not answered as a tf.data service for {_REGISTERED} s"
        raise ConnectionError(f"The program at {service} {answer}") from None
    except tf.errors.OpError as error:
        raise ConnectionError(f"The tf.data service at {service} fails: {first_line(error)}") from None


def held_out(
    split: Split,
    data: Data,
    *,
    size: tuple[int, int],
    order: EpochOrder,
    cache: bool = False,
    skipped: SkippedFiles | None = None,
) -> tf.data.Dataset:
    """The batches of images to evaluate on, or one worker's share of them. All shares together have each image once.

    Batches are like those of `batches`, but with int32 labels `(batch,)`. All shares have the same number of full
    batches; padding at the end has weight 0. The order must have no seed. `cache` keeps all images in memory.
    """

    def read(index, content, label):
        return index, evaluation_image(content, size=size, channels=len(data.mean)), label

    dataset = normalized(read_batches(split, order, read, skipped), data)
    return _deterministic((dataset.cache() if cache else dataset).prefetch(PREFETCHED))


@contextlib.contextmanager
def read_errors(split: Split, skipped: SkippedFiles) -> Iterator[None]:
    """Turns errors of TensorFlow while images are read into those of their causes: bad files, a damaged shard."""
    try:
        yield
    except tf.errors.OpError as error:
        skipped.check()
        if isinstance(error, tf.errors.DataLossError):
            getattr(split, "check", lambda: None)()
        raise ValueError(f"The images cannot be read: {first_line(error)}") from error


def normalized(dataset: tf.data.Dataset, data: Data) -> tf.data.Dataset:
    """Turns the batches of `read_batches` into normalized images, labels and weights."""

    def finish(_, images, labels, weights):
        return data.normalization.apply(images), labels, weights

    return dataset.map(finish, num_parallel_calls=AUTO)


def read_batches(split: Split, order: EpochOrder, read: Callable, skipped: SkippedFiles | None) -> tf.data.Dataset:
    """Batches of index, image, label and weight: 0 for padding, and for a black image that could not be decoded.

    `read` maps an example of the split to index, image and label. In a dataset, an error ends the iteration, or the
    element is dropped silently. So each batch is a separate dataset, whose images are scattered to their positions
    once all are read.
    """
    batch = order.batch

    def weigh(position, index, content, label):
        index, image, label = read(index, content, label)
        return position, index, image, label, tf.cast(index >= 0, "float32")

    def one_batch(index, content, label):
        examples = tf.data.Dataset.from_tensor_slices((tf.range(batch), index, content, label))
        images = examples.map(weigh, num_parallel_calls=AUTO).ignore_errors()
        shapes = tf.data.experimental.get_structure(images)
        none = tf.data.Dataset.from_tensors(tuple(tf.zeros((0, *x.shape), x.dtype) for x in shapes))

        def fill(position, _, image, __, weight):
            def scattered(x):
                return tf.scatter_nd(position[:, None], x, tf.concat([[batch], tf.shape(x)[1:]], 0))

            def filled():
                missing = tf.sets.difference([tf.range(batch)], [position]).values
                if skipped is not None:
                    tf.numpy_function(report, [tf.gather(index, missing)], [])
                return scattered(image), scattered(weight)

            image, weight = tf.cond(tf.size(position) == batch, lambda: (image, weight), filled)
            return index, tf.ensure_shape(image, (batch, *shapes[2].shape)), label, tf.ensure_shape(weight, (batch,))

        return images.batch(batch).concatenate(none).take(1).map(fill)

    def report(missing):
        for index in missing:
            if index >= 0 and skipped is not None:
                skipped.add(split.name_of(index))

    examples = split.examples(order).batch(batch, drop_remainder=True)
    return examples.flat_map(one_batch)  # pyright: ignore[reportArgumentType]  the stubs pass one argument


def _deterministic(dataset):
    options = tf.data.Options()
    options.deterministic = True
    return dataset.with_options(options)
