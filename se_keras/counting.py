"""Parameters and multiply-adds of a model, layer by layer and in total."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
from keras import layers

from se_keras.graph import calls, endpoints, input_shape_of
from se_keras.layers import SqueezeExcite


@dataclass(frozen=True, kw_only=True)
class LayerComplexity:
    """One call of a layer. The parameters of a shared layer count at its first call, its multiply-adds at each call."""

    name: str
    type: str
    output_shape: tuple[int, ...]
    trainable: int
    statistics: int
    macs: int


@dataclass(frozen=True, kw_only=True)
class Complexity:
    """The counts of a whole model, for one image.

    Args:
        trainable: Parameters that training changes: with gamma and beta of BatchNorm, without its moving statistics.
            The parameters of frozen layers count too.
        statistics: Moving means and variances of BatchNorm.
        se_trainable: The part of `trainable` in SqueezeExcite layers.
        macs: Multiply-adds of convolutions and fully connected layers (Dense). One multiply-add counts as 1.
        se_macs: The part of `macs` in SqueezeExcite layers.
        layers: The counts of each call, in order.
    """

    trainable: int
    statistics: int
    se_trainable: int
    macs: int
    se_macs: int
    layers: tuple[LayerComplexity, ...]

    @property
    def parameters(self) -> int:
        """All parameters, with the moving statistics: `count_params()` of Keras."""
        return self.trainable + self.statistics


def complexity(model: keras.Model, *, input_shape: Sequence[int] | None = None) -> Complexity:
    """Counts parameters and multiply-adds of a functional model at any input size.

    Args:
        model: A functional or Sequential model. The layers of models inside it are counted too.
        input_shape: `(height, width, channels)`, for models with one input. Default: the shape of the model; required
            if a size in it is None.

    Raises:
        ValueError, TypeError: If a size is unknown, if the model does not take `input_shape`, or if it has no graph.

    Example: `complexity(se_keras.SEResNet50()).macs` is 3.8605e9: Table 2's 3.87 GFLOPs.
    """
    inputs, _ = endpoints(model)
    first = input_shape_of(model, input_shape)
    shapes = [first, *(tuple(x.shape[1:]) for x in inputs[1:])]
    if any(size is None for shape in shapes for size in shape):
        raise ValueError(f"Multiply-adds need a size: give input_shape. Received: a model of {shapes[0]}")
    images = [keras.KerasTensor((1, *shape), dtype=x.dtype) for shape, x in zip(shapes, inputs, strict=True)]
    rows = []
    try:
        _count(model, images, rows, counted=set())
    except ValueError as error:
        raise ValueError(f"{model.name} does not take input_shape={shapes[0]}: {error}") from error
    se_rows = [row for row in rows if row.type == SqueezeExcite.__name__]
    return Complexity(
        trainable=sum(row.trainable for row in rows),
        statistics=sum(row.statistics for row in rows),
        se_trainable=sum(row.trainable for row in se_rows),
        macs=sum(row.macs for row in rows),
        se_macs=sum(row.macs for row in se_rows),
        layers=tuple(rows),
    )


def _count(model, images, rows, counted):
    """Appends the rows of `model`, called on the symbolic `images`, and returns its outputs."""
    inputs, outputs = endpoints(model)
    values = {id(x): image for x, image in zip(inputs, images, strict=True)}
    for call in calls(model):
        operation = call.operation
        if isinstance(operation, keras.Model):
            results = _count(operation, [values[id(x)] for x in call.input_tensors], rows, counted)
        else:
            args, kwargs = call.arguments.fill_in(values)
            results = keras.tree.flatten(operation.compute_output_spec(*args, **kwargs))
            if isinstance(operation, layers.Layer):
                rows.append(_row(operation, values[id(call.input_tensors[0])].shape, results[0].shape, counted))
        values |= {id(x): result for x, result in zip(call.output_tensors, results, strict=True)}
    return [values[id(x)] for x in outputs]


def _row(layer, input_shape, output_shape, counted):
    weights = [] if layer in counted else layer.weights
    counted.add(layer)
    return LayerComplexity(
        name=layer.name,
        type=type(layer).__name__,
        output_shape=tuple(output_shape[1:]),
        trainable=sum(math.prod(w.shape) for w in weights if w.name not in _STATISTICS),
        statistics=sum(math.prod(w.shape) for w in weights if w.name in _STATISTICS),
        macs=_macs(layer, input_shape, output_shape),
    )


# Weights of BatchNormalization and Normalization that are measured, not trained.
_STATISTICS = ("moving_mean", "moving_variance", "mean", "variance", "count")

_TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose)
_ONE_KERNEL = (layers.Conv1D, layers.Conv2D, layers.DepthwiseConv1D, layers.DepthwiseConv2D, layers.Dense)
_KERNELS: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (SqueezeExcite, ("reduce_kernel", "expand_kernel")),
    ((layers.SeparableConv1D, layers.SeparableConv2D), ("depthwise_kernel", "pointwise_kernel")),
    ((*_ONE_KERNEL, *_TRANSPOSED), ("kernel",)),
)


def _macs(layer, input_shape, output_shape):
    """A kernel is applied once per output position; in a transposed convolution, once per input position."""
    kernels = next((names for types, names in _KERNELS if isinstance(layer, types)), ())
    if not kernels:
        return 0
    positions = math.prod((input_shape if isinstance(layer, _TRANSPOSED) else output_shape)[1:-1])
    if isinstance(layer, SqueezeExcite) and layer.squeeze != "none":
        positions = 1
    return positions * sum(math.prod(getattr(layer, name).shape) for name in kernels)
