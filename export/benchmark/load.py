"""What a SavedModel bears: images a second and waiting times under load, as published beside lowered."""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import keras
import numpy as np

from se_keras.catalogue import baseline_name, create, spec_of
from se_keras.timing import Ratio, ratio_of
from se_keras.typing import Json, OnMessage

from ..serving.savedmodel import to_savedmodel
from .overhead import VARIANTS
from .programs import run, serving_session


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one SavedModel bears under one load.

    Args:
        network: Its name.
        variant: `"published"` or `"lowered"`.
        callers: Threads that call at once; each waits for its answer before it calls again.
        batch: Images in a request.
        requests: Number of requests.
        images_per_second: Median over the blocks.
        p50_ms, p99_ms: Percentiles of the time of a request, of all blocks together.
    """

    network: str
    variant: str
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
        network, baseline: Names.
        input_shape: `(height, width, channels)`.
        loads: Of the network, in both variants, for each number of callers and batch; of the baseline for one caller
            and one image.
        gains: `(callers, batch, Ratio)`: images a second lowered over as published. Below 1, lowering has cost time.
        overheads: By variant: time of the network over that of the baseline, for one caller and one image.
    """

    network: str
    baseline: str
    input_shape: tuple[int, ...]
    loads: tuple[Load, ...]
    gains: tuple[tuple[int, int, Ratio], ...]
    overheads: dict[str, Ratio]

    def to_json(self):
        """The record as a dict for JSON."""
        loads = [
            {"form" if field == "variant" else field: value for field, value in asdict(load).items()}
            for load in self.loads
        ]
        return asdict(self) | {"loads": loads}


def serving_load(
    network,
    *,
    callers=(1, 4, 16),
    batches=(1, 8, 32),
    seconds=2.0,
    blocks=10,
    input_shape=None,
    threads=0,
    progress=None,
):
    """Loads a network's SavedModels, in a process without Keras and XLA, with requests: both forms in turns.

    Args:
        network: A network of the catalogue with squeeze-and-excitation. Its weights are random, which costs as much
            time as trained ones.
        callers: Numbers of threads that call at once, of at most 64.
        batches: Numbers of images in a request, of at most 1024.
        seconds: How long each measurement takes at least.
        blocks: Measurements of each form and load, in random order within a block.
        input_shape: `(height, width, channels)`; default: the network's own.
        threads: Of the operators; default: as many as there are processors.
        progress: Called with what is done next, as a string.

    Returns:
        A `ServingLoad`.

    Raises:
        ValueError: If the network has no squeeze-and-excitation, or if a number is not one of the above.
    """
    told = progress or (lambda line: None)
    if spec_of(network).se is None:
        raise ValueError(f"{network} is a baseline: name a network with squeeze-and-excitation, such as se_resnet50")
    for what, values, most in (("callers", callers, 64), ("batches", batches, 1024)):
        if not values or not all(type(x) is int and 1 <= x <= most for x in values):
            raise ValueError(f"{what} must be one or more ints of 1 to {most}. Received: {what}={values!r}")
    if blocks < 2 or not seconds > 0:
        raise ValueError(f"At least 2 blocks of more than 0 seconds. Received: blocks={blocks}, seconds={seconds}")
    baseline = baseline_name(network)
    # SE's overhead is that of one image and one caller.
    cells = [(n, batch) for batch in dict.fromkeys((1, *batches)) for n in dict.fromkeys((1, *callers))]
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for name, arguments in {network: {}, baseline: {"se": None, "name": baseline}}.items():
            told(f"exporting {name}")
            keras.utils.set_random_seed(0)
            model = create(network, input_shape=input_shape, classifier_activation=None, **arguments)
            for variant, lowering in VARIANTS.items():
                paths[name, variant] = str(to_savedmodel(model, Path(folder, name, variant), lowering=lowering).path)
        plan = {
            "paths": list(paths.values()),
            "threads": threads,
            "seconds": seconds,
            "blocks": blocks,
            "cells": [
                (n, batch, [path for (name, _), path in paths.items() if name == network or n == batch == 1])
                for n, batch in cells
            ],
        }
        rows = _measure(plan, told)
    loads, rates = [], {}
    for n, batch in cells:
        for (name, variant), path in paths.items():
            found = [row for row in rows if (row["callers"], row["batch"], row["path"]) == (n, batch, path)]
            if found:
                rates[n, batch, name, variant] = [batch * len(row["times"]) / row["seconds"] for row in found]
                times = np.concatenate([row["times"] for row in found]) * 1000
                p50, p99 = map(float, np.percentile(times, (50, 99)))
                measured = {"requests": len(times), "p50_ms": p50, "p99_ms": p99}
                rate = float(np.median(rates[n, batch, name, variant]))
                how = {"network": name, "variant": variant, "callers": n, "batch": batch}
                loads.append(Load(**how, **measured, images_per_second=rate))
    return ServingLoad(
        network=network,
        baseline=baseline,
        input_shape=tuple(model.inputs[0].shape[1:]),
        loads=tuple(loads),
        gains=tuple(
            (n, batch, ratio_of(rates[n, batch, network, "lowered"], rates[n, batch, network, "published"]))
            for n, batch in cells
        ),
        # With one caller, the time of an image is 1 over the images a second.
        overheads={
            variant: ratio_of(rates[1, 1, baseline, variant], rates[1, 1, network, variant]) for variant in VARIANTS
        },
    )


def _measure(plan: Json, progress: OnMessage) -> list[Json]:
    """Runs a plan; each measurement is a dict."""
    previous = None

    def on_row(row):
        nonlocal previous
        if previous != (row["callers"], row["batch"]):
            previous = row["callers"], row["batch"]
            progress(f"callers: {row['callers']}, images in a request: {row['batch']}")

    return run(serving_session, plan=plan, on_row=on_row, failure="The stress test ended early")
