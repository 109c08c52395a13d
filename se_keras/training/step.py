"""The training step that all strategies run, and the optimizer and the averaged weights that belong to it.

Keras 3's own `fit` fails under MultiWorkerMirroredStrategy: its `train_step` returns one value for each replica, and
its optimizer creates variables within the first step, where a strategy with several workers cannot create any
(https://github.com/keras-team/keras/issues/20585). Here the variables exist before the first step, and a step returns
sums over all replicas. Only public methods of Keras are used: the model's call, and the optimizer's `build`,
`scale_loss` and `apply`, which sums the gradients of all replicas.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from se_keras.graph import gives_probabilities, producer
from se_keras.training.distribution import Replicas
from se_keras.training.recipes import Execution, Recipe
from se_keras.training.schedules import learning_rates
from se_keras.typing import Array

TOP = 5


class Trainer:
    """A classifier, its optimizer and its loss on every replica.

    Args:
        model: A built functional model; its outputs are probabilities or logits.
        optimizer: Created, like the model, in the scope of the strategy of `replicas`.
        recipe: Gives the label smoothing and the weight decay.
        execution: Gives the number of parts of a batch, whose gradients are summed, and the use of XLA.
    """

    def __init__(
        self, model: keras.Model, optimizer: keras.Optimizer, replicas: Replicas, recipe: Recipe, execution: Execution
    ):
        self.model, self.optimizer = model, optimizer
        self._replicas, self._execution, self._weight_decay = replicas, execution, recipe.weight_decay
        self._loss = keras.losses.CategoricalCrossentropy(
            from_logits=not gives_probabilities(producer(model.outputs[0])),
            label_smoothing=recipe.label_smoothing,
            reduction="none",
        )
        with replicas.strategy.scope():
            if not optimizer.built:
                optimizer.build(model.trainable_variables)
        self.trace()

    def trace(self) -> None:
        """Traces the step, again whenever layers were frozen."""
        compiled, parts = self._execution.jit_compile, self._execution.accumulate
        gradients: Any = tf.function(self._gradients, jit_compile=True) if compiled else self._gradients
        strategy = self._replicas.strategy

        def step(images, labels, weights, stopping):
            losses, total = tf.zeros(3), None
            for part in zip(*(tf.split(x, parts) for x in (images, labels, weights)), strict=True):
                found, sums = gradients(*part)
                total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
                losses += sums
            self.optimizer.apply(total, self.model.trainable_variables)
            return tf.concat([losses, [stopping]], axis=0)

        @tf.function
        def train(iterator, steps, stopping):
            sums = tf.zeros(4)
            for _ in tf.range(steps):
                each = strategy.run(step, args=(*next(iterator), stopping))
                sums += strategy.reduce(tf.distribute.ReduceOp.SUM, each, axis=None)
            return sums

        @tf.function
        def evaluate(iterator):
            each = strategy.run(self._metrics, args=next(iterator))
            return strategy.reduce(tf.distribute.ReduceOp.SUM, each, axis=None)

        self._train, self._evaluate = train, evaluate

    def train(self, iterator: Iterator, steps: int, *, stopping: bool = False) -> Array:
        """Trains for `steps` steps. Returns sums over their images: loss, correct predictions, number of images.

        The fourth value counts the requests to stop, of all replicas in all steps.
        """
        return self._train(iterator, tf.constant(steps), tf.constant(float(stopping))).numpy().astype("float64")

    def synchronize(self) -> None:
        """Replaces BatchNorm's statistics, which each replica gathers on its own images, by their mean."""
        gathered = [v for v in self.model.non_trainable_variables if "float" in v.dtype]
        if self._replicas.count == 1 or not gathered:
            return
        strategy = self._replicas.strategy

        @tf.function
        def means():
            each = strategy.run(lambda: [tf.identity(v.value) for v in gathered])
            return [strategy.reduce(tf.distribute.ReduceOp.MEAN, values, axis=None) for values in each]

        with strategy.scope():
            for variable, value in zip(gathered, means(), strict=True):
                variable.assign(value)

    def evaluate(self, iterator: Iterator, steps: int) -> Array:
        """Sums over held-out images: loss, top-1 and top-5 correct predictions, number of images."""
        return sum((self._evaluate(iterator).numpy().astype("float64") for _ in range(steps)), np.zeros(4))

    def _gradients(self, images, labels, weights):
        variables = self.model.trainable_variables
        parts = self._execution.accumulate * self._replicas.count
        images_in_step = tf.cast(tf.shape(images)[0] * parts, "float32")
        with tf.GradientTape() as tape:
            predicted = tf.cast(self.model(images, training=True), "float32")
            losses = weights * self._loss(labels, predicted)
            loss = tf.reduce_sum(losses) / images_in_step
            if self._weight_decay:
                kernels = [tf.nn.l2_loss(v.value) for v in variables if len(v.shape) > 1]
                # Each replica and part adds its share: the sum of all gradients has the penalty once.
                loss += self._weight_decay * tf.add_n(kernels) / parts
            loss = self.optimizer.scale_loss(loss)
        correct = weights * tf.cast(tf.argmax(predicted, axis=1) == tf.argmax(labels, axis=1), "float32")
        sums = tf.stack([tf.reduce_sum(losses), tf.reduce_sum(correct), tf.reduce_sum(weights)])
        return tape.gradient(loss, [v.value for v in variables]), sums

    def _metrics(self, images, labels, weights):
        predicted = tf.cast(self.model(images, training=False), "float32")
        classes = predicted.shape[-1]
        losses = self._loss(tf.one_hot(labels, classes), predicted)
        top1 = tf.cast(tf.argmax(predicted, axis=1, output_type=tf.int32) == labels, "float32")
        top5 = tf.cast(tf.math.in_top_k(labels, predicted, min(TOP, classes)), "float32")
        return tf.stack([tf.reduce_sum(weights * x) for x in (losses, top1, top5, tf.ones_like(weights))])


def optimizer_for(model: keras.Model, recipe: Recipe, steps: int) -> keras.Optimizer:
    """The optimizer of a recipe, for epochs of `steps` steps."""
    optimizer = keras.optimizers.SGD(
        learning_rates(recipe, steps),  # pyright: ignore[reportArgumentType]  inferred from a default
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        use_ema=recipe.ema > 0,
        ema_momentum=recipe.ema or 0.99,
    )
    if any(layer.compute_dtype == "float16" for layer in model.layers):
        # Gradients below 6e-8 are 0 in float16: the loss is scaled up, and the gradients are scaled down again.
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    return optimizer


@contextlib.contextmanager
def averaged(model: keras.Model, optimizer: keras.Optimizer, replicas: Replicas) -> Iterator[None]:
    """Assigns the averaged weights to the model in the `with` block, if the optimizer averages them."""
    inner: Any = getattr(optimizer, "inner_optimizer", optimizer)
    if not inner.use_ema:
        yield
        return
    with replicas.strategy.scope():
        own = [keras.ops.convert_to_numpy(v) for v in model.trainable_variables]
        optimizer.finalize_variable_values(model.trainable_variables)
    try:
        yield
    finally:
        with replicas.strategy.scope():
            for variable, value in zip(model.trainable_variables, own, strict=True):
                variable.assign(value)


@contextlib.contextmanager
def batch_norm_frozen(model: keras.Model, *, when: bool) -> Iterator[None]:
    """Freezes BatchNorm in the `with` block: it runs as in inference, and its parameters are not trained."""
    norms = [layer for layer in model.layers if when and isinstance(layer, keras.layers.BatchNormalization)]
    try:
        for layer in norms:
            layer.trainable = False
        yield
    finally:
        for layer in norms:
            layer.trainable = True
