"""Training: recipes, data, strategies, and the loop, `fit`."""

from se_keras.runs import training_of
from se_keras.training.distribution import Cluster, replicas
from se_keras.training.loop import Execution, Progress, fit
from se_keras.training.recipes import RECIPES, Augmentation, Recipe
from se_keras.training.sources import load
from se_keras.training.stopping import Preempted

__all__ = [
    "RECIPES",
    "Augmentation",
    "Cluster",
    "Execution",
    "Preempted",
    "Progress",
    "Recipe",
    "fit",
    "load",
    "replicas",
    "training_of",
]
