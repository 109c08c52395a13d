"""Weights of files and of other frameworks into a network, and the released ones."""

from se_keras.weights.porting import load, port, read

__all__ = ["load", "port", "read"]
