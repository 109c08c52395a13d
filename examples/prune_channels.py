"""Does squeeze-and-excitation know which channels can be removed? Rankings of channels, compared on the digits.

python examples/prune_channels.py                     # five seeds: about ten minutes
python examples/prune_channels.py --seeds 2 --shares 0.75 --json

For each seed, se_resnet11_digits with SE at the 3x3 site is trained once. Then each ranking removes the same share of
each layer's channels, so that the numbers of multiply-adds are equal, and the smaller network is fine-tuned. Channels
are ranked on the training images. Accuracy is measured on the 360 test images.
"""

import argparse
import json
import sys
from dataclasses import replace

import keras
import numpy as np

import se_keras
from se_keras.export.pruning import RANKINGS, prune_channels
from se_keras.training.data import digits
from se_keras.training.recipes import DIGITS

UNPRUNED = "none"  # nothing is removed, but the network is fine-tuned too: the effect of the epochs alone
REFERENCE = "magnitude"


def create():
    """The network, with random weights."""
    return se_keras.create("se_resnet11_digits", classes=10, se=se_keras.SEConfig(site="3x3"))


def learner(model, recipe, data):
    """Compiles `model` once, and returns a function `learn(weights, seed)` that trains it from these weights.

    `learn` returns the trained weights, and the accuracy on the test images in % before and after.
    """
    steps = -(-len(data.train) // recipe.batch_size)
    optimizer = keras.optimizers.SGD(
        keras.optimizers.schedules.CosineDecay(recipe.learning_rate, recipe.epochs * steps), momentum=recipe.momentum
    )
    loss = keras.losses.CategoricalCrossentropy(label_smoothing=recipe.label_smoothing)
    # Without XLA: its compilation takes longer than the training.
    model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=False)
    optimizer.build(model.trainable_variables)
    labels = keras.utils.to_categorical(data.train.labels)
    test = data.test.images, keras.utils.to_categorical(data.test.labels)

    def learn(weights, seed):
        model.set_weights(weights)
        for variable in optimizer.variables:  # the number of steps, and the momenta
            variable.assign(keras.ops.zeros_like(variable))
        before = model.evaluate(*test, verbose=0, return_dict=True)["accuracy"]
        for epoch in range(recipe.epochs):
            order = np.random.default_rng((seed, epoch)).permutation(len(labels))
            images = data.train.images[order]
            model.fit(images, labels[order], batch_size=recipe.batch_size, shuffle=False, verbose=0)
        after = model.evaluate(*test, verbose=0, return_dict=True)["accuracy"]
        return model.get_weights(), 100 * before, 100 * after

    return learn


def study(*, seeds, shares, recipe, fine_tuning, progress):
    """A record of each network: seed, share, ranking, multiply-adds, and accuracy before and after fine-tuning."""
    data, records = digits(), []
    train = learner(create(), recipe, data)
    learners = {0.0: learner(create(), fine_tuning, data)}
    cases = [(0.0, UNPRUNED), *((share, ranking) for share in shares for ranking in RANKINGS)]
    for seed in range(seeds):
        keras.utils.set_random_seed(seed)
        network = create()
        weights, _, accuracy = train(network.get_weights(), seed)
        network.set_weights(weights)
        progress(f"seed {seed + 1} of {seeds}: trained to {accuracy:.1f} %")
        for share, ranking in cases:
            model = network
            if share:
                model = prune_channels(network, share=share, ranking=ranking, images=data.train.images, seed=seed)
            if share not in learners:
                learners[share] = learner(keras.models.clone_model(model), fine_tuning, data)
            _, before, after = learners[share](model.get_weights(), seed)
            progress(f"seed {seed + 1} of {seeds}: {share:.0%} by {ranking}: {before:.1f} %, then {after:.1f} %")
            macs = se_keras.complexity(model).macs
            records.append(
                {"seed": seed, "share": share, "ranking": ranking, "macs": macs, "before": before, "after": after}
            )
    return records


def table(records):
    """Means and standard deviations over the seeds: of the accuracy, and of the paired differences to the reference."""
    rows = [
        f"| removed | ranking | k MACs | % at once | % fine-tuned | less {REFERENCE}'s, at once | fine-tuned |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for share, ranking in dict.fromkeys((record["share"], record["ranking"]) for record in records):
        mine, reference = (
            [record for record in records if (record["share"], record["ranking"]) == (share, name)]
            for name in (ranking, REFERENCE)
        )
        cells = [f"{share:.0%}", ranking, f"{mine[0]['macs'] / 1000:.0f}"]
        cells += [spread([record[key] for record in mine]) for key in ("before", "after")]
        for key in ("before", "after"):
            pairs = zip(mine, reference, strict=True) if share and ranking != REFERENCE else ()
            cells.append(spread([record[key] - other[key] for record, other in pairs], sign="+"))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def spread(values, *, sign=""):
    """Mean and standard deviation as text."""
    if not values:
        return ""
    deviation = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{round(np.mean(values), 1) + 0:{sign}.1f}{deviation}"  # + 0 makes 0.0 of -0.0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="how many networks are trained (%(default)s)")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5, 0.75], help="of channels to remove")
    parser.add_argument("--epochs", type=int, default=DIGITS.epochs, help="of training (%(default)s)")
    parser.add_argument("--fine-tuning", type=int, default=3, help="epochs of fine-tuning (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the records instead of the table")
    options = parser.parse_args()
    found = study(
        seeds=options.seeds,
        shares=options.shares,
        recipe=replace(DIGITS, epochs=options.epochs),
        # A fifth of the epochs and of the learning rate, chosen before any result was known.
        fine_tuning=replace(DIGITS, epochs=options.fine_tuning, learning_rate=DIGITS.learning_rate / 5),
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(json.dumps(found, indent=2) if options.json else table(found))
