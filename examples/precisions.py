"""A network for the digits in every precision: size, accuracy, and agreement with the Keras model on the test images.

python examples/precisions.py                  # trains a network first: about a minute
python examples/precisions.py model.keras      # uses a network that `se-keras train` trained on the digits
"""

import sys
import tempfile

import keras

import se_keras
from se_keras.export import to_litert
from se_keras.export.litert.conversion import PRECISIONS
from se_keras.training.data import digits
from se_keras.training.loop import fit
from se_keras.training.recipes import DIGITS

data = digits()
if sys.argv[1:]:
    model = keras.saving.load_model(sys.argv[1])
else:
    keras.utils.set_random_seed(DIGITS.seed)
    with tempfile.TemporaryDirectory() as folder:
        model, _ = fit(se_keras.create("se_resnet11_digits", classes=10), DIGITS, data, folder)

# The last rows: with the bytes of a camera, and with squeeze-and-excitation in float32.
rows = {precision: {"precision": precision} for precision in PRECISIONS} | {
    "int8, uint8 in and out": {"precision": "int8", "input_type": "uint8", "output_type": "uint8"},
    "int8, SE in float32": {"precision": "int8", "keep_float": ".*_se_.*"},
}
float32 = to_litert(model, held_out=data.test.images, normalization=(0, 255))
print("| precision | kB | accuracy | top-1 as Keras | max error | on XNNPACK |")
print("| --- | ---: | ---: | ---: | ---: | --- |")
for name, options in rows.items():
    made = to_litert(model, calibration=data.train.images, held_out=data.test.images, converted=float32, **options)
    runner = made.runner()
    (outputs,) = runner(data.test.images).values()
    accuracy = (outputs.argmax(axis=1) == data.test.labels).mean()
    agreement, undelegated = made.manifest["agreement"], sorted(set(runner.undelegated()))
    delegated = "all" if not undelegated else f"all but {', '.join(undelegated)}" if len(undelegated) < 4 else "no"
    size, top1, error = f"{len(made.content) / 1e3:.0f}", f"{agreement['top1']:.1%}", f"{agreement['max_error']:.0e}"
    print(f"| {name} | {size} | {accuracy:.1%} | {top1} | {error} | {delegated} |")
