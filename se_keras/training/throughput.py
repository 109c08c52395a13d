"""Speed of training: our input pipeline compared with Keras', and a training step with SE compared with one without."""

import collections
import itertools
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from se_keras.catalogue import baseline_name, create, spec_of
from se_keras.environment import environment
from se_keras.errors import first_line
from se_keras.timing import Comparison, check_plan, compare
from se_keras.training.augmentation import training_image
from se_keras.training.data import Data, EpochOrder, Files, folder
from se_keras.training.distribution import replicas
from se_keras.training.pipeline import AUTO, batches
from se_keras.training.recipes import PAPER_IMAGENET, Execution
from se_keras.training.step import Trainer
from se_keras.typing import FilePath, Json, OnMessage

PAPER_STEP = {"resnet50_ms": 190, "se_resnet50_ms": 209, "ratio": 209 / 190, "source": "arXiv:1709.01507, section 4"}
_BATCHES = 40  # in a paired measurement
_CROPS = PAPER_IMAGENET.augmentation


@dataclass(frozen=True, kw_only=True)
class InputSpeed:
    """Speed of the input compared with `keras.utils.image_dataset_from_directory` with the same augmentation.

    Args:
        keras, ours: Images per second.
        comparison: Paired comparison of the times; A is Keras.
        images: Number of images of the epoch in which the memory was measured.
        megabytes: Resident memory of the process after each tenth of that epoch.
    """

    keras: float
    ours: float
    comparison: Comparison
    images: int
    megabytes: tuple[float, ...]

    def to_json(self) -> Json:
        """All fields, and the environment."""
        return asdict(self) | {"comparison": self.comparison.to_json(), "environment": environment()}


def input_speed(
    path: FilePath, *, batch: int, size: int, blocks: int, images: int, progress: OnMessage | None = None
) -> InputSpeed:
    """Measures the input of training from a folder of class folders, with ImageNet's random crops and flips.

    Args:
        path: The folder; its images are read repeatedly.
        batch, size: Images in a batch, and their height and width.
        blocks: Number of paired measurements, of 40 batches each.
        images: Number of images of the epoch in which the memory is measured.
        progress: Called before each part.

    Raises:
        ValueError, OSError: For the reasons of `data.folder`, or if there are fewer than two blocks.
    """
    check_plan(blocks, 1)
    data = folder(path)

    def reader(dataset) -> Callable[[], object]:
        # Each turn reads the dataset from its beginning: nothing is prefetched while the other side is timed.
        return lambda: collections.deque(itertools.islice(dataset, _BATCHES), maxlen=0)

    if progress:
        progress("reading images by Keras and by se_keras in turn")
    theirs, control = (_keras_input(path, data, batch, size) for _ in range(2))
    sides = theirs, _our_input(data, batch, size, _BATCHES), control
    found = compare(*map(reader, sides), blocks=blocks, runs=1, warmup=1)
    per_second = _BATCHES * batch * 1000
    steps, memory = images // batch, []
    for step, _ in enumerate(itertools.islice(_our_input(data, batch, size, steps), steps), start=1):
        if step % -(-steps // 10) == 0 or step == steps:
            memory.append(_resident_megabytes())
            if progress:
                progress(f"reading an epoch: {step * batch:,} of {steps * batch:,} images")
    return InputSpeed(
        keras=per_second / found.a_ms,
        ours=per_second / found.b_ms,
        comparison=found,
        images=steps * batch,
        megabytes=tuple(memory),
    )


def _keras_input(path, data, batch, size):
    """Endless batches by `keras.utils.image_dataset_from_directory`."""
    dataset: Any = keras.utils.image_dataset_from_directory(
        Path(path) / "train" if (Path(path) / "train").is_dir() else path,
        label_mode="categorical",
        image_size=(256, 256),
        batch_size=None,  # pyright: ignore[reportArgumentType]  inferred from the default
        seed=0,
        verbose=False,
    )

    def augment(image, label):
        seed = tf.random.uniform((2,), maxval=2**31 - 1, dtype=tf.int32)
        image = training_image(image, size=(size, size), channels=3, augmentation=_CROPS, seed=seed)
        return data.normalization.apply(image), label

    augmented = dataset.map(augment, num_parallel_calls=AUTO)
    return augmented.repeat().batch(batch, drop_remainder=True).prefetch(AUTO)


def _our_input(data: Data[Files], batch, size, count):
    """`count` batches of this project's input. The files are repeated, like one epoch of a larger folder."""
    times = -(-count * batch // len(data.train))
    repeated = Files(paths=data.train.paths * times, labels=np.tile(data.train.labels, times))
    return batches(repeated, data, size=(size, size), augmentation=_CROPS, order=EpochOrder(batch=batch, seed=0))


def step_time(
    network: str, *, batch: int = 8, size: int | None = None, blocks: int = 10, progress: OnMessage | None = None
) -> Comparison:
    """Compares a training step (forward, backward, update) of a network with one of its baseline, A, in pairs.

    Args:
        network: With squeeze-and-excitation.
        batch: Images in a step.
        size: Height and width; default: the network's own.
        blocks: Number of paired measurements, of one step each.
        progress: Called before each part.

    Raises:
        ValueError: If there is no such network, if it is a baseline, or if there are fewer than two blocks.
    """
    check_plan(blocks, 1)
    spec = spec_of(network)
    if spec.se is None:
        raise ValueError(f"{network} is a baseline: name a network with squeeze-and-excitation, such as se_resnet50")
    shape = spec.input_shape if size is None else (size, size, spec.input_shape[-1])
    rng = np.random.default_rng(0)
    examples = (
        rng.normal(size=(batch, *shape)).astype("float32"),
        np.eye(spec.classes, dtype="float32")[rng.integers(spec.classes, size=batch)],
        np.ones(batch, "float32"),
    )
    device = replicas("none")

    def stepper(name, **se):
        if progress:
            progress(f"building {name}")
        keras.utils.set_random_seed(0)
        model = create(network, input_shape=shape, name=name, **se)
        optimizer = keras.optimizers.SGD(1e-3, momentum=PAPER_IMAGENET.momentum)
        trainer = Trainer(model, optimizer, device, PAPER_IMAGENET, Execution())
        iterator = device.distribute(tf.data.Dataset.from_tensors(examples).repeat(), batch)
        return lambda: trainer.train(iterator, 1)

    baseline, other = baseline_name(network), stepper(network)
    sides = stepper(baseline, se=None), other, stepper(f"{baseline}_again", se=None)
    if progress:
        progress(f"training {network} and {baseline} in turn")
    return compare(*sides, blocks=blocks, runs=1, warmup=2)


def photographs(path: FilePath) -> None:
    """Writes a folder of 400 JPEG files, crops of scikit-learn's two photographs; OSError without Pillow."""
    from sklearn.datasets import load_sample_images

    try:
        pictures = load_sample_images().images
    except ImportError as error:
        raise OSError(f"scikit-learn's photographs cannot be read: {first_line(error)}") from None
    rng = np.random.default_rng(0)
    for number in range(400):
        height, width = rng.integers(300, 400), rng.integers(400, 500)  # ImageNet's are 400 by 500 on average
        top, left = rng.integers(0, 427 - height), rng.integers(0, 640 - width)
        part = pictures[number % 2][top : top + height, left : left + width]
        file = Path(path) / f"class{number % 4}" / f"{number:04}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(tf.io.encode_jpeg(part, quality=90).numpy())


def _resident_megabytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
