"""Imports tensorflow-model-optimization without effects on the rest of the process."""

import os
import warnings
from unittest import mock

import tensorflow as tf

# The library sets an environment variable to select tf_keras, which child processes would inherit. And if tf.keras was
# not used before, this name would mean tf_keras from then on.
with mock.patch.dict(os.environ), warnings.catch_warnings():
    tf.keras.version()
    warnings.filterwarnings("ignore", message="distutils Version classes are deprecated")
    import tensorflow_model_optimization as tfmot

__all__ = ["tfmot"]
