"""Data sets that everybody has: Fashion-MNIST from Debian's package, which .ci/run installs, and what is missing."""

import gzip
import shutil

import numpy as np
import pytest

from se_keras.training import datasets, sources
from se_keras.training.data import limited, sized

needs_files = pytest.mark.skipif(
    not datasets.FASHION_FOLDER.is_dir(), reason="needs Debian's package dataset-fashion-mnist"
)


@pytest.fixture(scope="module")
def fashion():
    return sources.load("fashion_mnist")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Keras' folder of Fashion-MNIST, with nothing in it."""
    folder = tmp_path / "datasets" / "fashion-mnist"
    folder.mkdir(parents=True)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    return folder


@needs_files
def test_fashion_mnist_has_each_class_equally_often(fashion):
    assert fashion.train.images.shape == (60_000, 28, 28, 1) and fashion.train.images.dtype == "uint8"
    assert np.bincount(fashion.train.labels).tolist() == [6_000] * 10
    assert np.bincount(fashion.test.labels).tolist() == [1_000] * 10
    assert fashion.classes[9] == "Ankle boot"


@needs_files
def test_normalization_is_that_of_the_training_images(fashion):
    images = fashion.normalization.apply(fashion.train.images[::7])
    assert (images.mean(), images.std()) == (pytest.approx(0, abs=0.01), pytest.approx(1, abs=0.01))


@needs_files
def test_cache_of_keras_comes_first_and_damage_is_said(cache):
    for name in ("train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        shutil.copy(datasets.FASHION_FOLDER / name, cache)
    assert len(datasets.fashion_mnist().train) == 60_000
    path = cache / "t10k-labels-idx1-ubyte.gz"
    for content in (path.read_bytes()[:-9], b"", gzip.compress(b"other"), b"no gzip"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte.gz' is damaged: delete it. .+ SHA-256 0402a96"):
            datasets.fashion_mnist()


def test_without_files_and_network_both_ways_to_get_them_are_said(cache, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(datasets, "FASHION_FOLDER", tmp_path / "none")
    monkeypatch.setattr(datasets, "_FASHION_ORIGIN", "https://localhost:1/")
    with pytest.raises(
        OSError, match="fashion_mnist is not in .+ use a network once, install Debian's package .+ or put train-images"
    ):
        sources.load("fashion_mnist")
    assert capfd.readouterr().out == ""
    assert list(cache.iterdir()) == []


def test_classes_of_cifar_are_distinct_and_sorted():
    for classes, count in ((datasets.CIFAR10_CLASSES, 10), (datasets.CIFAR100_CLASSES, 100)):
        assert len(classes) == count and list(classes) == sorted(set(classes))


@needs_files
def test_limit_takes_the_same_training_images_each_time(fashion):
    one, other = limited(fashion, 500), limited(fashion, 500)
    np.testing.assert_array_equal(one.train.images, other.train.images)
    assert (len(one.train), len(one.test)) == (500, 10_000)
    assert np.bincount(one.train.labels).min() >= 30  # 50 of each class are expected, with a deviation of 7
    with pytest.raises(ValueError, match="limit must be 1 to 60000, the images to train on. Received: limit=60001"):
        limited(fashion, 60_001)


@needs_files
def test_larger_images_get_a_border_and_smaller_ones_are_scaled(fashion):
    few = limited(fashion, 20)
    larger, smaller = (sized(few, size).train.images for size in ((32, 32), (14, 14)))
    np.testing.assert_array_equal(larger[:, 2:30, 2:30], few.train.images)
    assert larger.sum(dtype="int64") == few.train.images.sum(dtype="int64")
    assert smaller.shape == (20, 14, 14, 1)
    assert smaller.mean() == pytest.approx(few.train.images.mean(), rel=0.02)
    assert sized(few, (28, 28)).train is few.train


@needs_files
def test_images_for_a_model_have_its_size_and_normalization(fashion):
    found = sources.images(
        "fashion_mnist", split="test", shape=(32, 32, 1), normalization=fashion.normalization, limit=9
    )
    assert (found.shape, found.dtype) == ((9, 32, 32, 1), "float32")
    np.testing.assert_allclose(found[:, 2:30, 2:30], fashion.normalization.apply(fashion.test.images[:9]))
    with pytest.raises(ValueError, match=r"has images of 1 channel\(s\). Received: a model of 3"):
        sources.images("fashion_mnist", split="test", shape=(32, 32, 3), normalization=fashion.normalization)
