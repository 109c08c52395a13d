"""Export to LiteRT and TF Serving. The folder export/ of the checkout, installed as `se_keras.export`."""

if __name__ != "se_keras.export":
    raise ImportError(f"This package is se_keras.export: install se_keras and import that. Received: {__name__}")

from se_keras.export.agreement import Agreement, agreement
from se_keras.export.benchmark import compare
from se_keras.export.channels import ChannelPruning, excitations, prune_channels
from se_keras.export.images import load_images
from se_keras.export.inspection import Inspection, inspect
from se_keras.export.litert import LiteRTModel, to_litert
from se_keras.export.lower import Lowering, lower
from se_keras.export.metadata import Metadata
from se_keras.export.savedmodel import SavedModel, to_savedmodel
from se_keras.export.verify import Verification, verify

__all__ = [
    "Agreement",
    "ChannelPruning",
    "Inspection",
    "LiteRTModel",
    "Lowering",
    "Metadata",
    "SavedModel",
    "Verification",
    "agreement",
    "compare",
    "excitations",
    "load_images",
    "inspect",
    "lower",
    "prune_channels",
    "to_litert",
    "to_savedmodel",
    "verify",
]
