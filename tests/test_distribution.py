"""Strategies: several processes train as one process with as many replicas does, and a lost worker loses no work."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from worker import STEPS, run

from se_keras.runs import RUN_FILE
from se_keras.training import checkpoint
from se_keras.training.distribution import Cluster, Replicas, cluster_from_environment, replicas

ENVIRONMENT = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}


def free_addresses(count=2):
    with ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [f"127.0.0.1:{server.getsockname()[1]}" for server in servers]


def finished(processes, timeout=180):
    """Standard output and errors of each process; all are killed in the end."""
    try:
        return [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()


def started(*arguments, **options):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


# One process with two replicas, and two processes with one.


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory):
    """The result of one process with two replicas, on two logical CPUs."""
    strategy = replicas("mirrored")
    assert strategy.count == 2
    return run(tmp_path_factory.mktemp("mirrored"), strategy)


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory):
    """The result of each of two processes, and their folder."""
    folder, addresses = tmp_path_factory.mktemp("two"), ",".join(free_addresses())
    results = [folder / f"result{index}.json" for index in range(2)]
    worker = Path(__file__).with_name("worker.py")
    processes = [
        started(worker, result, folder / "run", "multi-worker", addresses, index)
        for index, result in enumerate(results)
    ]
    output = finished(processes)
    assert [process.returncode for process in processes] == [0, 0], output
    return [json.loads(result.read_text()) for result in results], folder / "run"


@pytest.mark.slow
def test_two_workers_have_the_loss_curve_of_one_process_with_two_replicas(mirrored, two_workers):
    for result in two_workers[0]:
        assert len(result["losses"]) == STEPS
        # The same sums of the same numbers, in another order.
        np.testing.assert_allclose(result["losses"], mirrored["losses"], rtol=1e-4)


@pytest.mark.slow
def test_two_workers_end_with_the_same_weights(mirrored, two_workers):
    one, other = two_workers[0]
    assert one == other
    np.testing.assert_allclose(one["weights"], mirrored["weights"], rtol=1e-3)


@pytest.mark.slow
def test_every_test_image_is_judged_once_by_all_workers_together(mirrored, two_workers):
    # 101 images: with one lost or counted twice the accuracy would be no multiple of 1/101.
    for result in (mirrored, *two_workers[0]):
        for accuracy in result["figures"]["val_accuracy"]:
            assert accuracy * 101 == pytest.approx(round(accuracy * 101), abs=1e-9)
    assert two_workers[0][0]["figures"]["val_accuracy"] == mirrored["figures"]["val_accuracy"]


@pytest.mark.slow
def test_the_first_worker_writes_one_run(two_workers):
    results, folder = two_workers
    run_file = json.loads((folder / RUN_FILE).read_text())
    assert (run_file["strategy"], run_file["replicas"]) == ("multi-worker", 2)
    assert run_file["figures"] == results[0]["figures"]
    assert not list(folder.glob(".*partial*"))


# Workers that are lost, or do not connect


@pytest.mark.slow
def test_run_goes_on_after_a_worker_was_killed(tmp_path):
    command = (
        "-c",
        "import se_keras_cli, sys; sys.exit(se_keras_cli.main())",
        "train",
        "se_resnet11_digits",
        "--epochs",
        4,
        "--checkpoint-steps",
        10,
    )
    command = *command, "-o", tmp_path / "run", "--strategy", "multi-worker", "--wait", 60

    def workers():
        addresses = ",".join(free_addresses())
        return [started(*command, "--workers", addresses, "--index", index) for index in range(2)]

    first = workers()
    file = tmp_path / "run" / checkpoint.FILE
    deadline = time.monotonic() + 120
    while checkpoint.position(file) in (None, (0, 10), (0, 20), (0, 30), (0, 40), (1, 0)):
        assert time.monotonic() < deadline and first[1].poll() is None
        time.sleep(0.05)
    first[1].send_signal(signal.SIGKILL)
    output = finished(first)
    position = checkpoint.position(file)
    assert (1, 10) <= position < (4, 0)
    assert first[0].returncode == 2
    line = output[0][1].strip().splitlines()[-1]
    assert line.startswith("se-keras: error: A worker was lost in epoch") and str(file) in line

    output = finished(second := workers())
    assert [process.returncode for process in second] == [0, 0], output
    figures = json.loads((tmp_path / "run" / RUN_FILE).read_text())["figures"]
    assert len(figures["val_accuracy"]) == 4
    # An undisturbed run of four epochs ends at 0.96 to 0.98: one of 360 images is 0.003.
    assert figures["val_accuracy"][-1] > 0.94


def test_worker_that_does_not_come_is_named():
    here, there = free_addresses()
    cluster = Cluster(workers=(here, there), index=0)
    with pytest.raises(
        TimeoutError, match=rf"Not all 2 workers connected within 0.5 s. .+ worker 0 at {here}; .+ {there}$"
    ):
        replicas("multi-worker", cluster=cluster, timeout=0.5)


def test_address_that_is_taken_is_told():
    with socket.create_server(("", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(OSError, match=f"Worker 0 cannot listen at {address}"):
            replicas("multi-worker", cluster=Cluster(workers=(address, *free_addresses(1)), index=0), timeout=1)


# Descriptions


def described(cluster, task):
    return json.dumps({"cluster": cluster, "task": task})


WORKERS = {"worker": ["a:1", "b:2"]}
BAD = {
    "": "Received: no TF_CONFIG",
    "{": r"TF_CONFIG is \{.+ Received: \{ \(JSONDecodeError",
    "[]": r"TF_CONFIG is .+ Received: \[\]",
    described(WORKERS, {"type": "worker"}): "TF_CONFIG is .+KeyError: 'index'",
    described(WORKERS, {"type": "worker", "index": 2}): "The index of a worker is 0 to 1. Received: 2",
    described(WORKERS, {"type": "worker", "index": "0"}): "The index of a worker is 0 to 1. Received: '0'",
    described({"worker": []}, {"type": "worker", "index": 0}): r"A cluster has workers.+ Received: \[\]",
    described({"worker": ["a"]}, {"type": "worker", "index": 0}): "A worker's address is host:port. Received: 'a'",
    described({"worker": ["a:0"]}, {"type": "worker", "index": 0}): "A worker's address is host:port. Received: 'a:0'",
    described(
        {"worker": ["a:1", "a:1"]}, {"type": "worker", "index": 0}
    ): "A cluster has workers at different addresses",
    described(
        WORKERS, {"type": "evaluator", "index": 0}
    ): "jobs are chief and worker. Received: .+; this process is 'evaluator'",
    described({**WORKERS, "ps": ["c:3"]}, {"type": "ps", "index": 0}): "Parameter servers are not supported: .+ 'ps'",
}


@pytest.mark.parametrize("config", BAD)
def test_bad_tf_config_is_refused(config, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(ValueError, match=BAD[config]):
        cluster_from_environment()


def test_chief_of_tf_config_is_the_first_worker(monkeypatch):
    jobs = {"chief": ["c:1"], "worker": ["a:1", "b:2"]}
    monkeypatch.setenv("TF_CONFIG", described(jobs, {"type": "worker", "index": 1}))
    assert cluster_from_environment() == Cluster(workers=("c:1", "a:1", "b:2"), index=2)


def test_unknown_strategy_is_refused():
    with pytest.raises(ValueError, match=r"strategy must be one of \('none', .+\). Received: 'horovod'"):
        replicas("horovod")


def test_tpu_that_is_not_there_is_told():
    with pytest.raises(OSError, match="The TPU 'local' cannot be used"):
        replicas("tpu")


def test_batch_that_replicas_cannot_share_is_refused():
    mirrored = Replicas(name="mirrored", strategy=tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]))
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 2 replicas. Received: batch_size=33"):
        mirrored.share(33)
