"""Errors of other libraries become ours, with the line that says what was wrong."""

import keras
import pytest
import tensorflow as tf

from se_keras.errors import first_line, needs_extra, translated
from se_keras.export.model import predict


@pytest.mark.parametrize(
    "message, line",
    [
        ("one\ntwo", "one"),
        ("", "ValueError"),
        ("{{function_node __wrapped__X}} {{node y}} corrupted record at 0 [Op:X]", "corrupted record at 0 [Op:X]"),
        ("Exception encountered when calling A.call().\n\n\x1b[1mWrong shape.\x1b[0m\n\nArguments", "Wrong shape."),
        ("Exception encountered when calling A.call().\n\n\x1b[1m{{function_node x}} Odd.\x1b[0m", "Odd."),
        ("in user code:\n\n  File 'x'\n  ValueError: Exception encountered when calling A.call().\n\n  No.", "No."),
    ],
)
def test_first_line_is_what_was_wrong(message, line):
    assert first_line(ValueError(message)) == line


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("x"), RecursionError("x"), OSError("x"), EOFError("x")])
def test_error_of_any_type_becomes_ours(error):
    with pytest.raises(ValueError, match="^'f' cannot be read: '?x'?$") as raised, translated("'f' cannot be read"):
        raise error
    assert raised.value.__cause__ is error


def test_path_that_the_system_cannot_open_keeps_its_error(tmp_path):
    with pytest.raises(FileNotFoundError), translated("x"):
        open(tmp_path / "missing")


def test_model_whose_call_fails_is_an_error_of_one_line():
    class Failing(keras.layers.Layer):
        def call(self, x):
            return tf.reshape(x, (-1, 7)) if tf.is_tensor(x) else x

        def compute_output_spec(self, x):
            return keras.KerasTensor((None, 10))

    images = keras.Input((3,))
    model = keras.Model(images, Failing()(images), name="failing")
    with pytest.raises(ValueError, match=r"^failing cannot be run: [^\n]*Input to reshape is a tensor with 6 values"):
        predict(model, tf.zeros((2, 3)))


def test_missing_package_of_an_extra_is_one_line_with_the_command():
    message = r"^weights='imagenet' needs the package no-such-package: pip install \"se-keras\[pretrained\]\"$"
    with pytest.raises(ImportError, match=message), needs_extra("pretrained", "weights='imagenet'"):
        import no_such_package.inside  # noqa: F401  # pyright: ignore[reportMissingImports]
