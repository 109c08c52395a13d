"""The strategies of tf.distribute: the workers of a training, and the share of a batch that each of them reads."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import tensorflow as tf

from se_keras.errors import first_line, require_type

Strategy = Literal["none", "mirrored", "multi-worker", "tpu"]
STRATEGIES = get_args(Strategy)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The workers of a training, and the index of this process among them.

    Args:
        workers: Addresses, `"host:port"`; the first is the chief, which writes the files.
        index: Index of this process among the workers.
    """

    workers: tuple[str, ...]
    index: int

    def __post_init__(self):
        for address in self.workers:
            host, _, port = address.rpartition(":") if isinstance(address, str) else ("", "", "")
            if not host or not port.isdecimal() or not 0 < int(port) < 65536:
                raise ValueError(f"A worker's address is host:port. Received: {address!r}")
        if not self.workers or len(set(self.workers)) < len(self.workers):
            raise ValueError(f"A cluster has workers at different addresses. Received: {list(self.workers)}")
        if type(self.index) is not int or not 0 <= self.index < len(self.workers):
            raise ValueError(f"The index of a worker is 0 to {len(self.workers) - 1}. Received: {self.index!r}")


def cluster_from_environment() -> Cluster:
    """The cluster in TF_CONFIG (https://www.tensorflow.org/guide/distributed_training); ValueError if it has none."""
    variable = os.environ.get("TF_CONFIG")
    if not variable:
        raise ValueError(
            "Several workers need the variable TF_CONFIG, or --workers and --index. Received: no TF_CONFIG"
        )
    try:
        config = json.loads(variable)
        jobs, task = dict(config["cluster"]), dict(config["task"])
        job, index = task["type"], task["index"]
        addresses = {name: tuple(jobs[name]) for name in jobs}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            'TF_CONFIG is {"cluster": {"worker": ["host:port", ...]}, "task": {"type": "worker", "index": 0}}. '
            f"Received: {variable[:200]} ({type(error).__name__}: {first_line(error)})"
        ) from None
    if "ps" in jobs:
        # Parameter servers update variables asynchronously; a Keras 3 optimizer sums gradients over all replicas.
        raise ValueError(
            "Parameter servers are not supported: Keras 3 has no optimizer for ParameterServerStrategy "
            "(https://keras.io/guides/distributed_training_with_tensorflow). Received: TF_CONFIG with the job 'ps'"
        )
    if job not in ("chief", "worker") or job not in jobs or set(jobs) - {"chief", "worker"}:
        raise ValueError(f"TF_CONFIG's jobs are chief and worker. Received: {sorted(jobs)}; this process is {job!r}")
    if job == "worker" and type(index) is int:
        index += len(addresses.get("chief", ()))
    return Cluster(workers=addresses.get("chief", ()) + addresses.get("worker", ()), index=index)


@dataclass(frozen=True, kw_only=True, eq=False)
class Replicas:
    """A strategy, and the index of this process, `worker`, among its `workers` processes."""

    name: Strategy
    strategy: tf.distribute.Strategy
    worker: int = 0
    workers: int = 1

    @property
    def count(self) -> int:
        """Number of replicas in all processes."""
        return self.strategy.num_replicas_in_sync

    @property
    def is_chief(self) -> bool:
        """Whether this process writes the files."""
        return self.worker == 0

    def share(self, batch_size: int) -> int:
        """Number of images of a batch that this process reads; ValueError if replicas cannot share it equally."""
        if batch_size % self.count:
            raise ValueError(
                f"batch_size must be a multiple of the {self.count} replicas. Received: batch_size={batch_size}"
            )
        return batch_size // self.workers

    def agree(self, number: int) -> bool:
        """Whether all processes call this with the same number."""

        @tf.function
        def moments(own):
            own = self.strategy.run(lambda x: tf.stack([x, x * x]), args=(own,))
            return self.strategy.reduce(tf.distribute.ReduceOp.MEAN, own, axis=None)

        mean, square = moments(tf.constant(number, tf.float64)).numpy()
        return mean == number and square == number**2

    def distribute(self, dataset: tf.data.Dataset, batch_size: int) -> Iterator:
        """An iterator over batches of `share(batch_size)` images, split among the replicas of this process."""
        parts = dataset.rebatch(batch_size // self.count) if self.count > self.workers else dataset
        return iter(self.strategy.distribute_datasets_from_function(lambda _: parts))


def replicas(
    strategy: Strategy = "none", *, cluster: Cluster | None = None, tpu: str | None = None, timeout: float = 600
) -> Replicas:
    """Creates a strategy. With several workers, waits until all have connected.

    `"multi-worker"` must be created before anything else of TensorFlow is used.

    Args:
        strategy: `"none"`, one device; `"mirrored"`, all GPUs of this machine, or else its logical CPUs;
            `"multi-worker"`, several machines; `"tpu"`.
        cluster: The workers; default: those in TF_CONFIG.
        tpu: Name or address of a TPU; default: the local one.
        timeout: Seconds to wait for the other workers.

    Raises:
        ValueError: If there is no such strategy, or if the cluster is invalid.
        OSError: If there is no TPU; TimeoutError, if a worker does not connect.
    """
    require_type("strategy", strategy, str)
    if strategy == "none":
        return Replicas(name=strategy, strategy=tf.distribute.get_strategy())
    if strategy == "mirrored":
        kind = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
        names = [device.name for device in tf.config.list_logical_devices(kind)]
        return Replicas(name=strategy, strategy=tf.distribute.MirroredStrategy(names))
    if strategy == "multi-worker":
        return _multi_worker(cluster or cluster_from_environment(), timeout)
    if strategy == "tpu":
        try:
            resolver = tf.distribute.cluster_resolver.TPUClusterResolver.connect(tpu or "local")
            return Replicas(name=strategy, strategy=tf.distribute.TPUStrategy(resolver))
        except (ValueError, tf.errors.OpError, RuntimeError) as error:
            raise OSError(f"The TPU {tpu or 'local'!r} cannot be used: {first_line(error)}") from None
    raise ValueError(f"strategy must be one of {STRATEGIES}. Received: {strategy!r}")


def _multi_worker(cluster, timeout):
    _wait_for_workers(cluster, timeout)
    spec = tf.train.ClusterSpec({"worker": list(cluster.workers)})
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        spec, task_type="worker", task_id=cluster.index, rpc_layer="grpc"
    )
    try:
        strategy = tf.distribute.MultiWorkerMirroredStrategy(resolver)
    except RuntimeError as error:
        raise ValueError(
            f"Several workers must be created before anything else of TensorFlow is used: {first_line(error)}"
        ) from None
    return Replicas(name="multi-worker", strategy=strategy, worker=cluster.index, workers=len(cluster.workers))


def _wait_for_workers(cluster, timeout):
    """Waits until all workers have connected. TensorFlow itself would wait for an hour and ignore signals.

    Each worker listens at its own address and connects to the others until each has answered once, either from this
    function or from TensorFlow, which uses the same address later.
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
                    f"Not all {len(cluster.workers)} workers connected within {timeout:g} s. This is worker "
                    f"{cluster.index} at {own}; it waited for {', '.join(sorted(missing))}"
                )
            time.sleep(0.2 if missing else 0)
