"""From a split to the batches of a step: read, decoded, augmented, normalized, and ready before they are asked for."""

import tensorflow as tf

from se_keras.images import evaluation_image
from se_keras.training.augmentation import mix_up, rand_augment, training_image
from se_keras.training.data import Pass

AUTO = tf.data.AUTOTUNE
_AHEAD = 2  # batches that are ready before they are asked for


def batches(split, data, *, size, a_pass, augmentation, corrupt=None, service=None):
    """The steps of a share of a pass over training images.

    What is done to an image by chance follows from the seed of the pass, its epoch and the number of the image: it is
    the same wherever the pass begins, and on whichever worker.

    Args:
        split: Of `data`.
        data: A `Data`.
        size: `(height, width)` of the network.
        a_pass: A `Pass` with a seed.
        augmentation: An `Augmentation`.
        corrupt: A `Corrupt`, which is told of files that cannot be decoded. A service cannot tell it.
        service: Address of a tf.data service that does the work, such as `"grpc://host:5000"`.

    Returns:
        A dataset of images `(batch, height, width, channels)`, normalized, float32; labels `(batch, classes)` as
        probabilities; and weights `(batch,)`, 0 for an image that could not be decoded.
    """
    channels, classes = len(data.mean), len(data.classes)
    operations = rand_augment(augmentation.rand_augment) if augmentation.rand_augment else None
    mix = mix_up(augmentation.mixup) if augmentation.mixup else None
    chance = tf.random.experimental.stateless_fold_in(tf.constant([a_pass.seed, 0], "int64"), a_pass.epoch)

    def read(index, content, label):
        seed = tf.random.experimental.stateless_fold_in(chance, index)
        how = {"size": size, "channels": channels, "augmentation": augmentation, "seed": seed}
        how["mean"] = tf.constant(data.mean, "float32")
        return index, training_image(content, operations=operations, **how), label

    def finish(index, images, labels, weights):
        labels = tf.one_hot(labels, classes)
        if mix is not None:
            images, labels = mix(images, labels, tf.random.experimental.stateless_fold_in(chance, index[0]))
        return normalized(images, data), labels, weights

    examples = split.examples(a_pass)
    dataset = weighted(examples, read, None if service else corrupt, split, a_pass.batch)
    dataset = dataset.map(finish, num_parallel_calls=AUTO)
    if service:
        how = tf.data.experimental.service.ShardingPolicy.OFF
        dataset = dataset.apply(tf.data.experimental.service.distribute(how, service))
    return _in_order(dataset.prefetch(_AHEAD))


def held_out(split, data, *, size, batch, part=0, parts=1, resize=None, cache=False, corrupt=None):
    """The steps of a share of the images that a network is judged by: each image once, in all shares together.

    All shares have as many steps, all full; what is missing at the end has weight 0.

    Args:
        split: Of `data`.
        data: A `Data`.
        size: `(height, width)` of the network.
        batch: Images of a step that the share has.
        part, parts: Which share, of how many.
        resize: Of the shorter side, as of `evaluation_image`.
        cache: Whether to keep all of them in memory.
        corrupt: A `Corrupt`, as of `batches`.

    Returns:
        A dataset of images, labels `(batch,)` as int32, and weights `(batch,)`.
    """
    channels = len(data.mean)

    def read(index, content, label):
        return index, evaluation_image(content, size=size, channels=channels, resize=resize), label

    def finish(index, images, labels, weights):
        return normalized(images, data), labels, weights

    examples = split.examples(Pass(batch=batch, part=part, parts=parts))
    dataset = weighted(examples, read, corrupt, split, batch)
    dataset = dataset.map(finish, num_parallel_calls=AUTO)
    return _in_order((dataset.cache() if cache else dataset).prefetch(_AHEAD))


def normalized(images, data):
    """(pixel - mean) / std of each channel."""
    return (tf.cast(images, "float32") - tf.constant(data.mean)) / tf.constant(data.std)


def weighted(examples, read, corrupt, split, batch):
    """Batches of the examples read, with weight 1; with 0 what stands for none, or could not be decoded and is black.

    What fails in a dataset ends it, or is left out without a word. So each batch is a dataset of its own, whose images
    are put in their places when all are there.
    """

    def weigh(place, index, content, label):
        index, image, label = read(index, content, label)
        return place, index, image, label, tf.cast(index >= 0, "float32")

    def each(index, content, label):
        alone = tf.data.Dataset.from_tensor_slices((tf.range(batch), index, content, label))
        images = alone.map(weigh, num_parallel_calls=AUTO).ignore_errors()
        shapes = tf.data.experimental.get_structure(images)
        none = tf.data.Dataset.from_tensors(tuple(tf.zeros((0, *x.shape), x.dtype) for x in shapes))

        def put(place, _, image, __, weight):
            def filled(x):
                return tf.scatter_nd(place[:, None], x, tf.concat([[batch], tf.shape(x)[1:]], 0))

            def fill():
                missing = tf.sets.difference([tf.range(batch)], [place]).values
                if corrupt is not None:
                    tf.numpy_function(tell, [tf.gather(index, missing)], [])
                return filled(image), filled(weight)

            image, weight = tf.cond(tf.size(place) == batch, lambda: (image, weight), fill)
            return index, tf.ensure_shape(image, (batch, *shapes[2].shape)), label, tf.ensure_shape(weight, (batch,))

        return images.batch(batch).concatenate(none).take(1).map(put)

    def tell(missing):
        for number in missing:
            if number >= 0:
                corrupt.add(split.name_of(number))

    return examples.batch(batch, drop_remainder=True).flat_map(each)


def _in_order(dataset):
    options = tf.data.Options()
    options.deterministic = True
    return dataset.with_options(options)
