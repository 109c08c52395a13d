"""Stress test of SavedModels: images per second and waiting times under load, for both variants of a network."""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import keras
import numpy as np

from se_keras.catalogue import baseline_name, create
from se_keras.timing import Ratio, ratio_of
from se_keras.typing import Json, OnMessage

from ..serving.conversion import to_savedmodel
from .overhead import VARIANTS, Variant, config_of
from .programs import run, serving_session


@dataclass(frozen=True, kw_only=True)
class Load:
    """The speed of one SavedModel under one load.

    Args:
        callers: Number of threads that call at the same time; each waits for its answer before it calls again.
        batch: Images in a request.
        images_per_second: Median over the blocks.
        p50_ms, p99_ms: Percentiles of the time of a request, over all blocks.
    """

    network: str
    variant: Variant
    callers: int
    batch: int
    requests: int
    images_per_second: float
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True, kw_only=True)
class ServingLoad:
    """A network and its baseline under load.

    Args:
        input_shape: `(height, width, channels)`.
        loads: The network in both variants, for each number of callers and each batch size; the baseline for one caller
            and one image.
        gains: `(callers, batch, Ratio)`: images per second of the lowered variant over those of the published one.
            Below 1, the lowered variant is slower.
        overheads: By variant: time of the network over time of the baseline, for one caller and one image.
    """

    network: str
    baseline: str
    input_shape: tuple[int, ...]
    loads: tuple[Load, ...]
    gains: tuple[tuple[int, int, Ratio], ...]
    overheads: dict[Variant, Ratio]

    def to_json(self) -> Json:
        """The record as a dict for JSON, where the variant is called `form`."""
        record = asdict(self)
        loads = [{"form" if key == "variant" else key: x for key, x in load.items()} for load in record["loads"]]
        return record | {"loads": loads}


def serving_load(
    network: str,
    *,
    callers: Sequence[int] = (1, 4, 16),
    batches: Sequence[int] = (1, 8, 32),
    seconds: float = 2.0,
    blocks: int = 10,
    input_shape: Sequence[int] | None = None,
    threads: int = 0,
    progress: OnMessage | None = None,
) -> ServingLoad:
    """Sends requests to a network's SavedModels in both variants, in a process without Keras and XLA.

    Args:
        network: A network of the catalogue with squeeze-and-excitation. Its weights are random: times depend on shapes.
        callers: Numbers of threads that call at the same time, of at most 64.
        batches: Numbers of images in a request, of at most 1024.
        seconds: Minimum duration of each measurement.
        blocks: Measurements of each variant and load, in random order within a block.
        input_shape: `(height, width, channels)`; default: the network's own.
        threads: Threads of the operators; default: as many as there are processors.

    Raises:
        ValueError: If the network is a baseline, or if a number is out of range.
    """
    progress = progress or (lambda message: None)
    config, baseline = config_of(network), baseline_name(network)
    for what, values, most in (("callers", callers, 64), ("batches", batches, 1024)):
        if not values or not all(type(x) is int and 1 <= x <= most for x in values):
            raise ValueError(f"{what} must be one or more ints of 1 to {most}. Received: {what}={values!r}")
    if blocks < 2 or not seconds > 0:
        raise ValueError(f"At least 2 blocks of more than 0 seconds. Received: blocks={blocks}, seconds={seconds}")
    # The overhead of SE is measured with one image and one caller.
    cells = [(n, batch) for batch in dict.fromkeys((1, *batches)) for n in dict.fromkeys((1, *callers))]
    with tempfile.TemporaryDirectory() as folder:
        paths, shape = _export(network, {network: config, baseline: None}, Path(folder), input_shape, progress)
        calls = [
            (n, batch, [path for (name, _), path in paths.items() if name == network or n == batch == 1])
            for n, batch in cells
        ]
        plan = {"paths": list(paths.values()), "threads": threads, "seconds": seconds, "blocks": blocks, "cells": calls}
        rows = _measure(plan, progress)
    measured = {
        (n, batch, name, variant): found
        for n, batch in cells
        for (name, variant), path in paths.items()
        if (found := [row for row in rows if (row["callers"], row["batch"], row["path"]) == (n, batch, path)])
    }
    rates = {key: [key[1] * len(row["times"]) / row["seconds"] for row in found] for key, found in measured.items()}
    return ServingLoad(
        network=network,
        baseline=baseline,
        input_shape=shape,
        loads=tuple(_load(*key, found, rates[key]) for key, found in measured.items()),
        gains=tuple(
            (n, batch, ratio_of(rates[n, batch, network, "lowered"], rates[n, batch, network, "published"]))
            for n, batch in cells
        ),
        # With one caller, the time of an image is 1 / images per second.
        overheads={x: ratio_of(rates[1, 1, baseline, x], rates[1, 1, network, x]) for x in VARIANTS},
    )


def _export(network, sides, folder, input_shape, progress):
    """Exports each side, `{name: se}`, in both variants: `{(name, variant): path}`, and the shape of an image."""
    paths = {}
    for name, se in sides.items():
        progress(f"exporting {name}")
        keras.utils.set_random_seed(0)
        model = create(network, se=se, name=name, input_shape=input_shape, classifier_activation=None)
        for variant, lowering in VARIANTS.items():
            paths[name, variant] = str(to_savedmodel(model, folder / name / variant, lowering=lowering).path)
    return paths, tuple(model.inputs[0].shape[1:])


def _load(callers, batch, network, variant, rows, rates):
    """The `Load` of one SavedModel: all blocks of one number of callers and one batch size."""
    times = np.concatenate([row["times"] for row in rows]) * 1000
    p50, p99 = map(float, np.percentile(times, (50, 99)))
    return Load(
        network=network,
        variant=variant,
        callers=callers,
        batch=batch,
        requests=len(times),
        images_per_second=float(np.median(rates)),
        p50_ms=p50,
        p99_ms=p99,
    )


def _measure(plan, progress):
    """Runs a plan in the other process; each measurement is a dict."""
    previous = None

    def on_row(row):
        nonlocal previous
        if previous != (row["callers"], row["batch"]):
            previous = row["callers"], row["batch"]
            progress(f"callers: {row['callers']}, images in a request: {row['batch']}")

    return run(serving_session, plan=plan, on_row=on_row, failure="The stress test ended early")
