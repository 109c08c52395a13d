"""How fast training is: its input beside Keras' own, and a step with squeeze-and-excitation beside one without."""

import collections
import itertools
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from se_keras.catalogue import baseline_name, create, spec_of
from se_keras.environment import environment
from se_keras.errors import first_line
from se_keras.timing import Comparison, check_plan, compare
from se_keras.training.augmentation import training_image
from se_keras.training.data import Files, Pass, folder
from se_keras.training.distribution import Trainer, replicas
from se_keras.training.pipeline import AUTO, batches
from se_keras.training.recipes import PAPER_IMAGENET

PAPER_STEP = {"resnet50_ms": 190, "se_resnet50_ms": 209, "ratio": 209 / 190, "source": "arXiv:1709.01507, section 4"}
EPOCH = 20_000


@dataclass(frozen=True, kw_only=True)
class InputSpeed:
    """How fast images come, beside `keras.utils.image_dataset_from_directory` with the same augmentation.

    Args:
        keras: Images a second of Keras' input.
        ours: Images a second of this project's.
        comparison: Of the times, in pairs; A is Keras'.
        images: Of the epoch that the memory was looked at in.
        megabytes: Resident memory of the process after each tenth of it.
    """

    keras: float
    ours: float
    comparison: Comparison
    images: int
    megabytes: tuple[float, ...]

    def to_json(self):
        """The record as a dict for JSON."""
        return asdict(self) | {"comparison": self.comparison.to_json(), "environment": environment()}


def input_speed(path, *, batch=64, size=224, blocks=10, images=EPOCH, progress=None):
    """Measures the input of training from a folder of class folders, cropped, scaled and mirrored as on ImageNet.

    Args:
        path: The folder; its images are seen again and again.
        batch: Images in a batch.
        size: Height and width.
        blocks: Paired measurements, of 40 batches each.
        images: Of the epoch whose memory is looked at.
        progress: Called with what is done next, as a string.

    Raises:
        ValueError, OSError: As `data.folder` does, or if there are fewer than two blocks.
    """
    check_plan(blocks, 1)
    data = folder(path)
    augmentation, per_turn = PAPER_IMAGENET.augmentation, 40

    def of_keras():
        images_and_labels = keras.utils.image_dataset_from_directory(
            path if not (Path(path) / "train").is_dir() else Path(path) / "train",
            label_mode="categorical",
            image_size=(256, 256),
            batch_size=None,
            seed=0,
            verbose=False,
        )

        def augment(image, label):
            seed = tf.random.uniform((2,), maxval=2**31 - 1, dtype="int32")
            how = {"size": (size, size), "channels": 3, "augmentation": augmentation, "seed": seed}
            return (training_image(image, **how) - data.mean) / data.std, label

        augmented = images_and_labels.map(augment, num_parallel_calls=AUTO)
        return augmented.repeat().batch(batch, drop_remainder=True).prefetch(AUTO)

    def of_ours(count):
        # The files over and over, as one pass over a larger folder.
        times = -(-count * batch // len(data.train))
        many = Files(paths=data.train.paths * times, labels=np.tile(data.train.labels, times))
        how = {"size": (size, size), "augmentation": augmentation, "a_pass": Pass(batch=batch, seed=0)}
        return batches(many, data, **how)

    def turn(dataset):
        # Read from its beginning each time: what is read ahead is nobody's while the other side is timed.
        return lambda: collections.deque(itertools.islice(dataset, per_turn), maxlen=0)

    if progress:
        progress("reading images by Keras and by se_keras in turn")
    sides = (turn(dataset) for dataset in (of_keras(), of_ours(per_turn), of_keras()))
    found = compare(*sides, blocks=blocks, runs=1, warmup=1)
    per_second = per_turn * batch * 1000
    steps, memory = images // batch, []
    for step, _ in enumerate(itertools.islice(of_ours(steps), steps)):
        if (step + 1) % -(-steps // 10) == 0 or step + 1 == steps:
            memory.append(_resident_megabytes())
            if progress:
                progress(f"reading an epoch: {(step + 1) * batch:,} of {steps * batch:,} images")
    return InputSpeed(
        keras=per_second / found.a_ms,
        ours=per_second / found.b_ms,
        comparison=found,
        images=steps * batch,
        megabytes=tuple(memory),
    )


def step_time(network="se_resnet50", *, batch=8, size=None, blocks=10, progress=None):
    """Measures a training step of a network beside one of its baseline: forward, backward and update, in pairs.

    Args:
        network: With squeeze-and-excitation.
        batch: Images in a step.
        size: Height and width; default: the network's own.
        blocks: Paired measurements, of one step each.
        progress: Called with what is done next, as a string.

    Returns:
        A `Comparison`; A is the baseline.

    Raises:
        ValueError: If there is no such network, if it is a baseline, or if there are fewer than two blocks.
    """
    check_plan(blocks, 1)
    spec = spec_of(network)
    if spec.se is None:
        raise ValueError(f"{network} is a baseline: name a network with squeeze-and-excitation, such as se_resnet50")
    shape = spec.input_shape if size is None else (size, size, spec.input_shape[-1])
    chance = np.random.default_rng(0)
    one = (
        chance.normal(size=(batch, *shape)).astype("float32"),
        np.eye(spec.classes, dtype="float32")[chance.integers(spec.classes, size=batch)],
        np.ones(batch, "float32"),
    )
    given = replicas("none")

    def side(name, **se):
        if progress:
            progress(f"building {name}")
        keras.utils.set_random_seed(0)
        model = create(network, input_shape=shape, name=name, **se)
        optimizer = keras.optimizers.SGD(1e-3, momentum=PAPER_IMAGENET.momentum)
        trainer = Trainer(model, optimizer, given, weight_decay=PAPER_IMAGENET.weight_decay)
        iterator = given.distribute(tf.data.Dataset.from_tensors(one).repeat(), batch)
        return lambda: trainer.train(iterator, 1)

    baseline, other = baseline_name(network), side(network)
    sides = side(baseline, se=None), other, side(f"{baseline}_again", se=None)
    if progress:
        progress(f"training {network} and {baseline} in turn")
    return compare(*sides, blocks=blocks, runs=1, warmup=2)


def photographs(path, *, count=400):
    """Makes a folder of JPEG files, parts of scikit-learn's two photographs, where there is no other to read.

    Raises:
        OSError: If Pillow, which scikit-learn reads them with, is not there, or the folder cannot be written.
    """
    from sklearn.datasets import load_sample_images

    try:
        pictures = load_sample_images().images
    except ImportError as error:
        raise OSError(f"scikit-learn's photographs cannot be read: {first_line(error)}") from None
    chance = np.random.default_rng(0)
    for number in range(count):
        height, width = chance.integers(300, 400), chance.integers(400, 500)  # ImageNet's are 400 by 500 on average
        top, left = chance.integers(0, 427 - height), chance.integers(0, 640 - width)
        part = pictures[number % 2][top : top + height, left : left + width]
        file = Path(path) / f"class{number % 4}" / f"{number:04}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(tf.io.encode_jpeg(part, quality=90).numpy())


def _resident_megabytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
