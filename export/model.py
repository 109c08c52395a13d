"""What every exported model is: names of its inputs and outputs, its graph, its outputs on images that tell."""

import warnings

import keras
import numpy as np
import tensorflow as tf

from se_keras.graph import calls, gives_probabilities, producer, structures

from .outputs import agreement, in_batches, logit_range, noise

SIGNATURE = "serving_default"


_FREE_SIZE = 64  # of images to run, where the model leaves their size free


# Ranges of logits that probabilities tell: float32 resolves those of about 1e-3 to 1e-5 of the first, and 1e-30 is the
# least that is compared.
_TELLING = (0.01, 60)


def trace(model, folder, *, names=None, batch_shape=None, more=None, tracked=()):
    """Writes a functional model as a plain SavedModel with the signature `serving_default`.

    `names` are those of the outputs, which lowering may have changed; default: the model's. `batch_shape` fixes the
    shape of a single input; default: the model's own at any batch size. `more` are further signatures,
    `{name: (function, specification)}`, and `tracked` the tables that they need.
    """

    names = names or output_names(model)
    broken = [layer.name for layer in model.layers if not all(np.isfinite(w).all() for w in layer.get_weights())]
    if broken:
        raise ValueError(f"The weights of {model.name} are not finite: {', '.join(broken)}")

    def serve(*images):
        outputs = model(keras.tree.pack_sequence_as(structures(model)[0], list(images)), training=False)
        return dict(zip(names, keras.tree.flatten(outputs), strict=True))

    archive = keras.export.ExportArchive()
    archive.track(model)
    specs = [
        tf.TensorSpec(batch_shape or (None, *x.shape[1:]), x.dtype, name=name)
        for x, name in zip(model.inputs, input_names(model), strict=True)
    ]
    archive.add_endpoint(SIGNATURE, serve, input_signature=specs)
    for table in tracked:
        archive.track(table)
    for name, (function, spec) in (more or {}).items():
        archive.add_endpoint(name, function, input_signature=[spec])
    archive.write_out(str(folder), verbose=False)


def input_names(model):
    """Names of the inputs, as Keras has them."""
    return [x.name for x in model.inputs]


def output_names(model):
    """Names of the outputs: `probabilities` for a single one behind a softmax, else those that Keras has."""
    return ["probabilities"] if ends_in_softmax(model) else list(model.output_names)


def ends_in_softmax(model: keras.Model) -> bool:
    """Whether a model has one output, and that comes from a softmax."""
    return len(model.outputs) == 1 and gives_probabilities(producer(model.outputs[0]))


def class_count(model):
    """Number of the classes; None for a model that does not end with one vector."""
    shapes = [x.shape for x in model.outputs]
    return shapes[0][-1] if len(shapes) == 1 and len(shapes[0]) == 2 else None


def signature_of(model, *, batch_shape=None):
    """Names, shapes and types of a model's input and outputs, for the manifest; None is free."""
    images = keras.KerasTensor(batch_shape or (None, *model.inputs[0].shape[1:]), dtype=model.inputs[0].dtype)
    outputs = keras.tree.flatten(model.compute_output_spec(images))

    def describe(names, tensors):
        return {name: {"shape": list(x.shape), "dtype": str(x.dtype)} for name, x in zip(names, tensors, strict=True)}

    return {"inputs": describe(input_names(model), [images]), "outputs": describe(output_names(model), outputs)}


def check_images(model, *, shape=None, samples=4, free_size=_FREE_SIZE):
    """Noise to compare a model and its export on, so loud that the outputs tell, and no louder than the model bears.

    In inference nothing has normalized the activations of an untrained network yet. Loud images saturate the gates of
    a deep one, and a difference of 1e-6 becomes one of 1; quiet ones are lost in one without shortcuts, whose gates
    halve them at each block, and all probabilities are equal. A trained network bears standard normal noise.

    Args:
        model: A Keras model with one input.
        shape: `(height, width, channels)`; default: the model's own, free sizes being `free_size`.
        samples: Number of images.
        free_size: See `shape`.
    """
    shape = shape or [size or free_size for size in model.inputs[0].shape[1:]]
    normal = noise(shape, samples=samples)
    exponent, images, as_logits = 0, normal, ends_in_softmax(model)
    for _ in range(8):
        one, nudged = predict(model, images[:1]), predict(model, images[:1] * np.float32(1 + 1e-6))
        finite = all(np.isfinite(x).all() for x in one.values())
        logits = (logit_range(one["probabilities"]) if finite else np.inf) if as_logits else None
        quiet = finite and agreement(one, nudged, as_logits=as_logits).max_error < 1e-5
        if quiet and (logits is None or _TELLING[0] < logits < _TELLING[1]):
            return images
        exponent += 1 if logits is not None and logits <= _TELLING[0] else -1
        images = normal * np.float32(10.0**exponent)
    return normal


def predict(model, images):
    """Outputs of a Keras model in inference: `{name: array}`."""
    names = output_names(model)

    def run(batch):
        outputs = keras.tree.flatten(model(batch, training=False))
        return dict(zip(names, map(keras.ops.convert_to_numpy, outputs), strict=True))

    return in_batches(run, images)


def require_one_input(model):
    """Raises ValueError if a model has several inputs."""
    if len(model.inputs) != 1:
        raise ValueError(f"A model with one input can be exported. Received: {model.name} with {len(model.inputs)}")


def require_equal(result, what):
    """Raises ValueError if an export in float32 is not the model that it was made from."""
    # Sums in another order differ by about 1e-6; a wrong graph or a lost weight by more than 1e-2.
    if result.max_error > 1e-3:
        raise ValueError(f"The {what} disagrees with the Keras model: {result}. Nothing was written")


def warn_of_other_range(model, images):
    """Warns if the images have another range than those that the model was trained on.

    The first BatchNormalization tells: its moving variance is that of what training images gave it. A model without
    one, or one that was not trained, tells nothing.

    Args:
        model: A functional Keras model.
        images: `(samples, height, width, channels)`.

    Warns:
        UserWarning: If values are more than eight times as large or as small as in training.
    """
    batchnorm = next(
        (x.operation for x in calls(model) if isinstance(x.operation, keras.layers.BatchNormalization)), None
    )
    if batchnorm is None:
        return
    trained = keras.ops.convert_to_numpy(batchnorm.moving_variance)
    if np.all(trained == 1):  # as Keras starts
        return
    seen = keras.Model(structures(model)[0], batchnorm.input)(images[:32], training=False)
    variance = keras.ops.convert_to_numpy(keras.ops.var(seen, axis=tuple(range(len(seen.shape) - 1))))
    alive = trained > 1e-6
    factor = float(np.sqrt(np.median(variance[alive] / trained[alive]))) if alive.any() else 1.0
    if not 1 / _OTHER_RANGE < factor < _OTHER_RANGE:
        low, high = float(images.min()), float(images.max())
        warnings.warn(
            f"The images have values in {low:g}..{high:g}. {model.name} was trained on values about "
            f"{max(factor, 1 / factor):.0f} times as {'small' if factor > 1 else 'large'}: "
            f"{low / factor:.2g}..{high / factor:.2g}",
            stacklevel=3,
        )


_OTHER_RANGE = 8  # 0..255 for 0..1 is 255, and for standard normal values about 60; other data sets are within 3
