"""Train on a Ray cluster, which starts the workers and restarts them when one is lost.

pip install -e ".[ray]"
python examples/train_on_ray.py /shared/run --workers 2

Ray's TensorflowTrainer gives each worker its TF_CONFIG; the rest is `se_keras.training.fit`, as everywhere. All
machines must see the folder: restarted workers resume from its checkpoint.
"""

import argparse
import sys
from pathlib import Path


def train(config):
    """The work of each worker."""
    from se_keras.training import RECIPES, fit, load, replicas

    strategy = replicas("multi-worker")  # before anything else of TensorFlow

    from dataclasses import replace

    import keras

    import se_keras

    data = load("digits")
    recipe = replace(RECIPES["digits"], epochs=config["epochs"])
    keras.utils.set_random_seed(recipe.seed)
    model = se_keras.create(config["network"], classes=len(data.classes))
    _, figures = fit(model, recipe, data, config["folder"], strategy=strategy)

    import ray.train

    ray.train.report({name: values[-1] for name, values in figures.items()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the run")
    parser.add_argument("--network", default="se_resnet11_digits")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()

    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.tensorflow import TensorflowTrainer

    folder = options.folder.resolve()
    result = TensorflowTrainer(
        train,
        train_loop_config={"network": options.network, "folder": str(folder), "epochs": options.epochs},
        scaling_config=ScalingConfig(num_workers=options.workers),
        run_config=RunConfig(storage_path=str(folder / "ray"), failure_config=FailureConfig(max_failures=3)),
    ).fit()
    if result.error:
        sys.exit(f"Ray gave up: {result.error}")

    from se_keras.training import training_of

    run = training_of(folder / "model.keras")
    accuracy = run["figures"]["val_accuracy"][-1]
    print(f"{folder}/model.keras: test accuracy {accuracy:.1%}, trained by {run['replicas']} replicas")
