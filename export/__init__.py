"""Export to LiteRT and TF Serving. In a checkout, its files are in the folder export/."""

if __name__ != "se_keras.export":
    raise ImportError(f"This package is se_keras.export: install se_keras and import that. Received: {__name__}")

from se_keras.images import load_images
from se_keras.timing import compare

from .description import Metadata
from .freezing import Freezing, freeze_gates
from .gates import Gate, measure_gates
from .litert.conversion import to_litert
from .litert.file import LiteRTModel
from .litert.inspection import Inspection, inspect
from .lowering import Lowering, lower
from .outputs import Agreement, agreement
from .pruning import ChannelPruning, excitations, prune_channels
from .serving.conversion import to_savedmodel
from .serving.savedmodel import SavedModel
from .verification import Verification, verify

__all__ = [
    "Agreement",
    "ChannelPruning",
    "Freezing",
    "Gate",
    "Inspection",
    "LiteRTModel",
    "Lowering",
    "Metadata",
    "SavedModel",
    "Verification",
    "agreement",
    "compare",
    "excitations",
    "freeze_gates",
    "load_images",
    "inspect",
    "lower",
    "measure_gates",
    "prune_channels",
    "to_litert",
    "to_savedmodel",
    "verify",
]
