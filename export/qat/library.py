"""tensorflow-model-optimization, imported so that nothing else in the process changes."""

import os
import warnings
from unittest import mock

import tensorflow as tf

# It asks for tf_keras by an environment variable, which the user's other processes would inherit; and if nobody has used
# tf.keras before, that name would mean tf_keras from then on.
with mock.patch.dict(os.environ), warnings.catch_warnings():
    tf.keras.version()
    warnings.filterwarnings("ignore", message="distutils Version classes are deprecated")
    import tensorflow_model_optimization as tfmot

__all__ = ["tfmot"]
