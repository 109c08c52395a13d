"""Checks that MediaPipe Tasks' ImageClassifier, which apps use, opens our files and returns our labels and scores.

python examples/mediapipe_check.py            # in a temporary folder
python examples/mediapipe_check.py FOLDER     # keeps the files, and MediaPipe's environment for the next time

MediaPipe needs another absl-py than tensorflow-model-optimization, so it gets its own environment. If its graphics
libraries are missing, Debian's are unpacked there. Nothing is installed into the system.
"""

import ctypes.util
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import numpy as np

MEDIAPIPE = "mediapipe==1.2.2"
LIBRARIES = {"GLESv2": "libgles2", "EGL": "libegl1", "GLdispatch": "libglvnd0"}  # Debian's packages
SIZE = 16
# One number each: MediaPipe 1.2 refuses one for each channel, "not available". With 127.5, pixels would be halfway
# between int8's steps, and the last bit of a float32 would decide.
MEAN, STD = 0, 255
TOLERANCE = 1e-5  # float32 sums in another order; int8 is exact


def environment(folder):
    """Python with MediaPipe in `folder`, and the environment variables to run it with."""
    python = folder / "venv" / "bin" / "python"
    if not (folder / "installed").exists():
        venv.create(folder / "venv", with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", MEDIAPIPE], check=True)
        missing = [package for library, package in LIBRARIES.items() if not ctypes.util.find_library(library)]
        for package in missing:
            subprocess.run(["apt-get", "download", package], cwd=folder, check=True)
        for archive in folder.glob("*.deb"):
            subprocess.run(["dpkg", "-x", archive, folder / "debian"], check=True)
        (folder / "installed").touch()
    libraries = {str(path.parent) for path in (folder / "debian").rglob("*.so*")}
    return python, os.environ | ({"LD_LIBRARY_PATH": os.pathsep.join(sorted(libraries))} if libraries else {})


def classify(files, images):
    """In MediaPipe's environment: `{file: {image: {label: score}}}`."""
    import mediapipe
    from mediapipe.tasks import python as tasks
    from mediapipe.tasks.python import vision

    found = {}
    for file in files:
        options = vision.ImageClassifierOptions(base_options=tasks.BaseOptions(model_asset_path=file), max_results=-1)
        with vision.ImageClassifier.create_from_options(options) as classifier:
            found[file] = {}
            for image in images:
                picture = mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=np.load(image))
                (classes,) = classifier.classify(picture).classifications
                found[file][image] = {category.category_name: category.score for category in classes.categories}
    return found


def pictures(digits, size):
    """Digits as RGB images `(samples, size, size, 3)`, uint8."""
    times = size // digits.images.shape[1]
    images = np.rint(digits.images * 255).repeat(times, axis=1).repeat(times, axis=2)
    return images.repeat(3, axis=3).astype("uint8")


def normalized(pixels):
    """The input of the network."""
    return (np.float32(pixels) - np.float32(MEAN)) / np.float32(STD)


def photograph(size):
    """The middle of a photograph of scikit-learn, `(size, size, 3)`, uint8."""
    from sklearn.datasets import load_sample_image

    scene = load_sample_image("china.jpg")[:, 100:527]
    rows, columns = (np.linspace(0, side - 1, size).astype(int) for side in scene.shape[:2])
    return np.ascontiguousarray(scene[rows][:, columns])


def main(folder):
    """Trains, exports, and classifies here and in MediaPipe. Returns whether all results agree."""
    import keras

    import se_keras
    from se_keras.export import to_litert
    from se_keras.training.data import digits

    keras.utils.set_random_seed(0)
    data = digits()
    train, test = ((normalized(pictures(split, SIZE)), split.labels) for split in (data.train, data.test))
    model = se_keras.create("se_resnet11_digits", input_shape=(SIZE, SIZE, 3))
    model.compile(keras.optimizers.Adam(3e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(*train, epochs=3, verbose=0)
    print(f"trained: test accuracy {model.evaluate(*test, return_dict=True, verbose=0)['accuracy']:.3f}")

    labels = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    description = {"labels": labels, "normalization": (MEAN, STD), "training": {"data": "digits", "epochs": 3}}
    exported = {"float32": to_litert(model, held_out=test[0], **description)}
    int8 = {"precision": "int8", "calibration": train[0][:200], "held_out": test[0], "converted": exported["float32"]}
    exported["int8"] = to_litert(model, **int8)
    exported["int8_of_uint8"] = to_litert(model, **int8, input_type="uint8")
    images = {"a digit": pictures(data.test, SIZE)[0], "china.jpg": photograph(SIZE)}
    for name, image in images.items():
        np.save(folder / f"{name}.npy", image)
    for precision, litert in exported.items():
        litert.save(folder / f"{precision}.tflite")

    python, variables = environment(folder)
    files = [str(folder / f"{precision}.tflite") for precision in exported]
    arrays = [str(folder / f"{name}.npy") for name in images]
    command = [python, __file__, "--classify", json.dumps([files, arrays])]
    printed = subprocess.run(command, env=variables, check=True, stdout=subprocess.PIPE, text=True).stdout
    scores_of_mediapipe = json.loads(printed)

    agrees = True
    for precision, litert in exported.items():
        for name, image in images.items():
            scores = litert.runner()(normalized(image)[None])["probabilities"][0]
            ours = dict(zip(labels, map(float, scores), strict=True))
            theirs = scores_of_mediapipe[str(folder / f"{precision}.tflite")][str(folder / f"{name}.npy")]
            difference = max(abs(ours[label] - theirs.get(label, np.inf)) for label in labels)
            agrees &= set(theirs) == set(ours) and difference <= TOLERANCE
            print(f"{precision}, {name}: the largest difference is {difference:.1e}, at most {TOLERANCE:.0e}")
            for side, found in (("here", ours), ("MediaPipe", theirs)):
                best = sorted(found, key=found.get, reverse=True)[:3]
                print(f"  {side:9} {', '.join(f'{label} {found[label]:.6f}' for label in best)}")
    print("MediaPipe gives our labels and scores" if agrees else "MediaPipe gives other labels or scores")
    return agrees


if __name__ == "__main__":
    if sys.argv[1:2] == ["--classify"]:
        print(json.dumps(classify(*json.loads(sys.argv[2]))))
    elif sys.argv[1:]:
        Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
        sys.exit(not main(Path(sys.argv[1]).resolve()))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            sys.exit(not main(Path(temporary)))
