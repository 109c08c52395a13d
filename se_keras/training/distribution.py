"""The strategies of tf.distribute, and the one step that all of them run.

Keras 3's own `fit` fails under MultiWorkerMirroredStrategy: what its `train_step` returns is one value a replica, and
its optimizer's variables are made within the first step, where a strategy with several workers cannot make any
(https://github.com/keras-team/keras/issues/20585). Here both are made before, and sums leave a step reduced over all
replicas. Of Keras only public methods are used: a model's call, and an optimizer's `build`, `scale_loss` and `apply`,
which adds up the gradients of all replicas.
"""

import contextlib
import json
import os
import socket
import time
from dataclasses import dataclass

import keras
import tensorflow as tf

from se_keras.errors import first_line
from se_keras.graph import gives_probabilities, producer

STRATEGIES = ("none", "mirrored", "multi-worker", "tpu")
TOP = 5
LONGEST_WAIT = 600  # seconds for all workers to come


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The workers of a training, and which of them this process is.

    Args:
        workers: Addresses, `"host:port"`; the first is the chief, which writes.
        index: Of this process.

    Raises:
        ValueError: If an address is none, or if the index is not of one of them.
    """

    workers: tuple[str, ...]
    index: int

    def __post_init__(self):
        for address in self.workers:
            host, _, port = address.rpartition(":") if isinstance(address, str) else ("", "", "")
            if not host or not port.isdecimal() or not 0 < int(port) < 65536:
                raise ValueError(f"A worker's address is host:port. Received: {address!r}")
        if not self.workers or len(set(self.workers)) < len(self.workers):
            raise ValueError(f"A cluster has workers, each at an address of its own. Received: {list(self.workers)}")
        if type(self.index) is not int or not 0 <= self.index < len(self.workers):
            raise ValueError(f"The index of a worker is 0 to {len(self.workers) - 1}. Received: {self.index!r}")


def cluster_from_environment():
    """The cluster that the variable TF_CONFIG describes: https://www.tensorflow.org/guide/distributed_training.

    Raises:
        ValueError: If it is not set, not JSON, or describes no cluster of workers.
    """
    given = os.environ.get("TF_CONFIG")
    if not given:
        raise ValueError(
            "Several workers need the variable TF_CONFIG, or --workers and --index. Received: no TF_CONFIG"
        )
    try:
        config = json.loads(given)
        jobs, task = dict(config["cluster"]), dict(config["task"])
        job, index = task["type"], task["index"]
        addresses = {name: tuple(jobs[name]) for name in jobs}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            'TF_CONFIG is {"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", "index": 0}}. '
            f"Received: {given[:200]} ({type(error).__name__}: {first_line(error)})"
        ) from None
    if "ps" in jobs:
        # Its workers update the variables whenever they are done; a Keras 3 optimizer applies sums over all replicas.
        raise ValueError(
            "Parameter servers are not supported: Keras 3 has no optimizer for ParameterServerStrategy "
            "(https://keras.io/guides/distributed_training_with_tensorflow). Received: TF_CONFIG with the job 'ps'"
        )
    if job not in ("chief", "worker") or job not in jobs or set(jobs) - {"chief", "worker"}:
        raise ValueError(f"TF_CONFIG's jobs are chief and worker. Received: {sorted(jobs)}, of which this is {job!r}")
    ahead = len(addresses.get("chief", ())) if job == "worker" else 0
    index = index + ahead if type(index) is int else index
    return Cluster(workers=addresses.get("chief", ()) + addresses.get("worker", ()), index=index)


@dataclass(frozen=True, kw_only=True, eq=False)
class Replicas:
    """A strategy, and this process's place in it.

    Args:
        name: One of `STRATEGIES`.
        strategy: A `tf.distribute.Strategy`.
        worker: Index of this process among `workers`.
        workers: Number of processes.
    """

    name: str
    strategy: tf.distribute.Strategy
    worker: int = 0
    workers: int = 1

    @property
    def count(self):
        """Number of replicas in all processes."""
        return self.strategy.num_replicas_in_sync

    @property
    def is_chief(self):
        """Whether this process writes files."""
        return self.worker == 0

    def share(self, batch_size):
        """Images of a step that this process reads.

        Raises:
            ValueError: If the replicas cannot share them evenly.
        """
        if batch_size % self.count:
            raise ValueError(
                f"{self.count} replicas need a batch that they can share evenly. Received: batch_size={batch_size}"
            )
        return batch_size // self.workers

    def agree(self, number):
        """Whether all processes come with the same number."""

        @tf.function
        def spread(mine):
            mine = self.strategy.run(lambda x: tf.stack([x, x * x]), args=(mine,))
            return self.strategy.reduce(tf.distribute.ReduceOp.MEAN, mine, axis=None)

        mean, square = spread(tf.constant(number, tf.float64)).numpy()
        return mean == number and square == number**2

    def distribute(self, dataset, batch_size):
        """An iterator over this process's part of each step, dealt to its replicas; `batch_size` is of all."""
        parts = dataset.rebatch(batch_size // self.count) if self.count > self.workers else dataset
        return iter(self.strategy.distribute_datasets_from_function(lambda _: parts))


def replicas(strategy="none", *, cluster=None, tpu=None, timeout=LONGEST_WAIT):
    """Makes the strategy of a name; of several workers, waits until all of them are there.

    Under `"multi-worker"` it must be the first that a process asks of TensorFlow.

    Args:
        strategy: `"none"`, one device; `"mirrored"`, all of this machine's GPUs (or logical CPUs);
            `"multi-worker"`, those of several machines; `"tpu"`.
        cluster: A `Cluster`; default: what TF_CONFIG says.
        tpu: Name or address of a TPU; default: the local one.
        timeout: Seconds to wait for the other workers.

    Returns:
        `Replicas`.

    Raises:
        ValueError: If there is no such strategy, or if the cluster is wrongly described.
        TimeoutError: If a worker does not come.
        OSError: If there is no TPU.
    """
    if strategy == "none":
        return Replicas(name=strategy, strategy=tf.distribute.get_strategy())
    if strategy == "mirrored":
        kind = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
        names = [device.name for device in tf.config.list_logical_devices(kind)]
        return Replicas(name=strategy, strategy=tf.distribute.MirroredStrategy(names))
    if strategy == "multi-worker":
        cluster = cluster or cluster_from_environment()
        return Replicas(
            name=strategy,
            strategy=_multi_worker(cluster, timeout),
            worker=cluster.index,
            workers=len(cluster.workers),
        )
    if strategy == "tpu":
        try:
            resolver = tf.distribute.cluster_resolver.TPUClusterResolver.connect(tpu or "local")
            return Replicas(name=strategy, strategy=tf.distribute.TPUStrategy(resolver))
        except (ValueError, tf.errors.OpError, RuntimeError) as error:
            raise OSError(f"There is no TPU {tpu or 'local'!r} that can be used: {first_line(error)}") from None
    raise ValueError(f"strategy must be one of {STRATEGIES}. Received: {strategy!r}")


def _multi_worker(cluster, timeout):
    _meet(cluster, timeout)
    spec = tf.train.ClusterSpec({"worker": list(cluster.workers)})
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        spec, task_type="worker", task_id=cluster.index, rpc_layer="grpc"
    )
    try:
        return tf.distribute.MultiWorkerMirroredStrategy(resolver)
    except RuntimeError as error:
        raise ValueError(
            f"Several workers must be asked for before anything else of TensorFlow: {first_line(error)}"
        ) from None


def _meet(cluster, timeout):
    """Waits until all workers are there: TensorFlow itself would wait for an hour, deaf to signals.

    Each listens at its own address and calls the others, until all have answered once: as here, or as TensorFlow, which
    takes the address over.
    """
    missing = {address for index, address in enumerate(cluster.workers) if index != cluster.index}
    own = cluster.workers[cluster.index]
    deadline = time.monotonic() + timeout
    try:
        listener = socket.create_server(("", int(own.rpartition(":")[2])), backlog=len(cluster.workers))
    except OSError as error:
        raise OSError(f"Worker {cluster.index} cannot listen at {own}: {first_line(error)}") from None
    with listener:
        while missing:
            for address in sorted(missing):
                host, _, port = address.rpartition(":")
                with contextlib.suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), timeout=1):
                    missing.discard(address)
            if missing and time.monotonic() > deadline:
                raise TimeoutError(
                    f"Not all {len(cluster.workers)} workers came within {timeout:g} s. This is worker "
                    f"{cluster.index} at {own}; it waited for {', '.join(sorted(missing))}"
                )
            time.sleep(0.2 if missing else 0)


class Trainer:
    """A classifier, its optimizer and its loss on every replica.

    Args:
        model: A built functional model, made under the strategy's scope; its outputs are probabilities or logits.
        optimizer: Of Keras, made there too.
        replicas: `Replicas`.
        label_smoothing: Share of each label that is spread over all classes.
        weight_decay: L2 regularisation of the kernels.
        accumulate: Parts of a replica's batch that are computed one after the other, their gradients added up: a
            larger batch in the same memory. BatchNorm sees one part at a time.
        jit_compile: Whether XLA compiles the forward and backward pass.
    """

    def __init__(
        self, model, optimizer, replicas, *, label_smoothing=0.0, weight_decay=0.0, accumulate=1, jit_compile=False
    ):
        self.model = model
        self.optimizer = optimizer
        self._replicas = replicas
        self._weight_decay = weight_decay
        self._accumulate = accumulate
        self._jit_compile = jit_compile
        self._loss = keras.losses.CategoricalCrossentropy(
            from_logits=not gives_probabilities(producer(model.outputs[0])),
            label_smoothing=label_smoothing,
            reduction=None,
        )
        with replicas.strategy.scope():
            if not optimizer.built:
                optimizer.build(model.trainable_variables)
        self.trace()

    def trace(self):
        """Makes the step anew, as is needed when layers were frozen."""
        gradients = tf.function(self._gradients, jit_compile=True) if self._jit_compile else self._gradients
        strategy = self._replicas.strategy

        def step(images, labels, weights, stopping):
            losses = tf.zeros(3)
            total = None
            for part in zip(*(tf.split(x, self._accumulate) for x in (images, labels, weights)), strict=True):
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
        def judge(iterator, steps):
            sums = tf.zeros(4)
            for _ in tf.range(steps):
                each = strategy.run(self._judged, args=next(iterator))
                sums += strategy.reduce(tf.distribute.ReduceOp.SUM, each, axis=None)
            return sums

        self._train, self._judge = train, judge

    def train(self, iterator, steps, *, stopping=False):
        """Takes steps.

        Returns:
            Sums over their images: of the loss, of those classified rightly, of those that could be read; and how
            many replicas asked for the end, by `stopping`.
        """
        return self._train(iterator, tf.constant(steps), tf.constant(float(stopping))).numpy().astype("float64")

    def synchronize(self):
        """Gives every replica the mean of what each has gathered on its own images: BatchNorm's statistics."""
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

    def judge(self, iterator, steps):
        """Sums over held-out images: of the loss, of those right, of those right among the first five, of all."""
        sums = 0.0
        for _ in range(steps):
            sums = sums + self._judge(iterator, tf.constant(1)).numpy().astype("float64")
        return sums

    def _gradients(self, images, labels, weights):
        variables = self.model.trainable_variables
        images_in_step = tf.cast(tf.shape(images)[0] * self._accumulate * self._replicas.count, "float32")
        with tf.GradientTape() as tape:
            predicted = tf.cast(self.model(images, training=True), "float32")
            losses = weights * self._loss(labels, predicted)
            loss = tf.reduce_sum(losses) / images_in_step
            if self._weight_decay:
                kernels = [tf.nn.l2_loss(v.value) for v in variables if len(v.shape) > 1]
                # Each replica and part adds its share: the sum of all gradients has the penalty once.
                loss += self._weight_decay * tf.add_n(kernels) / (self._accumulate * self._replicas.count)
            loss = self.optimizer.scale_loss(loss)
        right = weights * tf.cast(tf.argmax(predicted, axis=1) == tf.argmax(labels, axis=1), "float32")
        sums = tf.stack([tf.reduce_sum(losses), tf.reduce_sum(right), tf.reduce_sum(weights)])
        return tape.gradient(loss, [v.value for v in variables]), sums

    def _judged(self, images, labels, weights):
        predicted = tf.cast(self.model(images, training=False), "float32")
        classes = predicted.shape[-1]
        losses = self._loss(tf.one_hot(labels, classes), predicted)
        first = tf.cast(tf.argmax(predicted, axis=1, output_type=tf.int32) == labels, "float32")
        among = tf.cast(tf.math.in_top_k(labels, predicted, min(TOP, classes)), "float32")
        return tf.stack([tf.reduce_sum(weights * x) for x in (losses, first, among, tf.ones_like(weights))])


@contextlib.contextmanager
def averaged(model, optimizer, replicas):
    """Gives the model its averaged weights while the block runs, where the optimizer keeps any."""
    if not getattr(optimizer, "inner_optimizer", optimizer).use_ema:
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
