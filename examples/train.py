"""Train a network of the paper on one device or on many machines: a script to start from.

python examples/train.py se_resnet11_digits runs/se
python examples/train.py se_resnet50 runs/se50 --data imagenet/ --recipe paper_imagenet --strategy mirrored

On several machines, run the same command on each, with --strategy multi-worker and all addresses in TF_CONFIG:

TF_CONFIG='{"cluster": {"worker": ["a:2222", "b:2222"]}, "task": {"type": "worker", "index": 0}}' \\
    python examples/train.py se_resnet50 /shared/se50 --data /shared/imagenet --strategy multi-worker

After any interruption the same command resumes with the next step.
"""

import argparse
from dataclasses import replace

import keras

import se_keras
from se_keras.catalogue import spec_of
from se_keras.training import RECIPES, Execution, fit, load, replicas

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("network", help="a name that se-keras list prints")
parser.add_argument("folder", help="of the run; all workers must see the same one")
parser.add_argument("--data", default="digits", help="digits, or a folder of images or of TFRecords")
parser.add_argument("--recipe", default="digits", choices=RECIPES)
parser.add_argument("--batch-size", type=int, help="scales the learning rate too (default: the recipe's)")
parser.add_argument("--epochs", type=int, help="default: the recipe's")
parser.add_argument("--strategy", default="none", help="none, mirrored, multi-worker, or tpu")
options = parser.parse_args()

strategy = replicas(options.strategy)  # several workers must connect before anything else of TensorFlow

recipe = RECIPES[options.recipe]
if options.batch_size:
    recipe = recipe.scaled_to(options.batch_size)
if options.epochs:
    recipe = replace(recipe, epochs=options.epochs)

spec = spec_of(options.network)
data = load(options.data, mean=spec.mean, std=spec.std)
keras.utils.set_random_seed(recipe.seed)
model = se_keras.create(options.network, classes=len(data.classes))


def show(now):
    """Prints a line for each epoch."""
    if now.step == 0 and now.figures:
        accuracy = now.figures["val_accuracy"][-1]
        print(f"epoch {now.epoch} of {now.epochs}: test accuracy {accuracy:.1%}", flush=True)


model, figures = fit(
    model, recipe, data, options.folder, strategy=strategy, execution=Execution(checkpoint_steps=1000), progress=show
)
print(f"{options.folder}/model.keras: test accuracy {figures['val_accuracy'][-1]:.1%}")
