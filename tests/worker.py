"""One of several workers, each a process: `worker.py RESULT FOLDER STRATEGY ADDRESSES INDEX`. Not a test itself."""

import json
import sys
from dataclasses import replace
from pathlib import Path

from se_keras.training.distribution import Cluster, replicas

STEPS = 20


def run(folder, strategy):
    """Trains two epochs of ten steps: the loss of each step, the figures, and sums of the weights."""
    import keras
    import numpy as np

    import se_keras
    from se_keras.training import fit
    from se_keras.training.data import Arrays, digits
    from se_keras.training.recipes import DIGITS

    data = digits()
    data = replace(
        data,
        train=Arrays(images=data.train.images[:320], labels=data.train.labels[:320]),
        test=Arrays(images=data.test.images[:101], labels=data.test.labels[:101]),  # no worker has only full batches
    )
    keras.utils.set_random_seed(0)
    model = se_keras.create("se_resnet11_digits", classes=10)
    seen = {}

    def collect(now):
        if now.step:
            seen[now.epoch, now.step] = now.loss * now.step

    model, figures = fit(model, replace(DIGITS, epochs=2), data, folder, strategy=strategy, progress=collect)
    sums = [seen[key] - (seen[key[0], key[1] - 1] if key[1] > 1 else 0) for key in sorted(seen)]
    weights = [float(np.abs(keras.ops.convert_to_numpy(w)).sum()) for w in model.weights]
    return {"losses": sums, "figures": figures, "weights": weights, "replicas": strategy.count}


if __name__ == "__main__":
    result, folder, strategy, addresses, index = sys.argv[1:]
    cluster = Cluster(workers=tuple(addresses.split(",")), index=int(index))
    Path(result).write_text(json.dumps(run(folder, replicas(strategy, cluster=cluster))))
