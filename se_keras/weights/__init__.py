"""Weights of files and of other frameworks into a network, and the released ones."""

from se_keras.weights.porting import load_weights, port, read_state_dict

__all__ = ["load_weights", "port", "read_state_dict"]
