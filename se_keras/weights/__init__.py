"""Loading weights into networks: from files, from state dicts of timm and pytorchcv, and the released ones."""

from se_keras.weights.files import read_state_dict
from se_keras.weights.porting import load_weights, port

__all__ = ["load_weights", "port", "read_state_dict"]
