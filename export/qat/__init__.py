"""Fine-tuning for export with tensorflow-model-optimization: quantization-aware training, pruning, clustering."""

from ..litert.inspection import compression
from .finetuning import KeepBest, clustered, prunable, quantize_aware, scope, stripped, to_litert

__all__ = [
    "KeepBest",
    "clustered",
    "compression",
    "prunable",
    "quantize_aware",
    "scope",
    "stripped",
    "to_litert",
]
