"""Agreement of two models' outputs, on arrays that are small enough to calculate by hand."""

import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import tensorflow as tf

from se_keras.export.outputs import agreement, as_integers, in_batches, noise

EXPECTED = {"logits": np.array([[0.0, 1.0], [4.0, 2.0]])}
ACTUAL = {"logits": np.array([[0.0, 3.0], [4.0, 2.0]])}


def test_max_error_is_a_share_of_the_expected_range():
    assert agreement(EXPECTED, ACTUAL).max_error == 2 / 4  # one value is 2 off; the range is 4


def test_mean_error_is_a_share_of_the_expected_range():
    assert agreement(EXPECTED, ACTUAL).mean_error == (2 / 4) / 4  # 2 off in one value of four


def test_cosine_is_that_of_all_values_as_one_vector():
    # (0, 1, 4, 2) and (0, 3, 4, 2): 23 / sqrt(21 * 29)
    assert agreement(EXPECTED, ACTUAL).cosine == pytest.approx(23 / math.sqrt(21 * 29), rel=1e-12)


def test_samples_are_counted():
    assert agreement(EXPECTED, ACTUAL).samples == 2


def test_error_is_relative_to_the_expected_side_not_the_actual_one():
    assert agreement(ACTUAL, {"logits": ACTUAL["logits"] * 10}).max_error == 36 / 4


@pytest.mark.parametrize(
    ("actual", "top1"),
    [([[0, 1], [4, 2]], 1.0), ([[0, 1], [4, 5]], 0.5), ([[1, 0], [4, 5]], 0.0)],
)
def test_top1_is_the_share_of_images_with_the_same_largest_output(actual, top1):
    assert agreement(EXPECTED, {"logits": np.array(actual, "float32")}).top1 == top1


def test_equal_outputs_agree_wholly():
    result = agreement(EXPECTED, EXPECTED)
    assert (result.max_error, result.mean_error, result.top1) == (0.0, 0.0, 1.0)
    assert result.cosine == pytest.approx(1.0, abs=1e-15)  # a product of two square roots


def test_opposite_outputs_have_a_cosine_of_minus_one():
    assert agreement(EXPECTED, {"logits": -EXPECTED["logits"]}).cosine == pytest.approx(-1.0, abs=1e-15)


@pytest.mark.parametrize(("actual", "cosine"), [(0.0, 1.0), (1.0, 0.0)])
def test_cosine_with_the_zero_vector_is_one_for_itself_alone(actual, cosine):
    zeros = {"logits": np.zeros((2, 3))}
    assert agreement(zeros, {"logits": np.full((2, 3), actual)}).cosine == cosine


def test_probabilities_are_compared_as_logits():
    # softmax(0, ln 9) = (0.1, 0.9), softmax(0, ln 3) = (0.25, 0.75); centred logits: -+ln 9 / 2 and -+ln 3 / 2.
    expected, actual = {"p": np.array([[0.1, 0.9]])}, {"p": np.array([[0.25, 0.75]])}
    result = agreement(expected, actual, as_logits=True)
    assert result.max_error == pytest.approx((math.log(9) - math.log(3)) / 2 / math.log(9), rel=1e-12)


def test_a_small_probability_counts_as_much_as_a_large_one():
    expected = {"probabilities": np.array([[1 - 2e-9, 1e-9, 1e-9]])}
    other = {"probabilities": np.array([[1 - 2e-9, 1e-9, 1e-7]])}
    assert agreement(expected, other, as_logits=True).max_error > 0.1
    assert agreement(expected, other).max_error < 1e-6


def test_outputs_of_any_name_are_compared_as_they_are_unless_as_logits():
    result = agreement({"scores": np.array([[0.1, 0.9]])}, {"scores": np.array([[0.25, 0.75]])})
    named = agreement({"probabilities": np.array([[0.1, 0.9]])}, {"probabilities": np.array([[0.25, 0.75]])})
    assert named == result
    assert result.max_error == pytest.approx(0.15 / 0.8, rel=1e-12)


def test_a_probability_of_zero_is_finite():
    result = agreement({"p": np.array([[0.0, 1.0]])}, {"p": np.array([[0.0, 1.0]])}, as_logits=True)
    assert result.max_error == 0.0


def test_several_outputs_count_as_one_long_one():
    expected = {"a": np.array([[0.0, 1.0]]), "b": np.array([[3.0]])}
    actual = {"b": np.array([[3.0]]), "a": np.array([[0.0, 2.0]])}
    result = agreement(expected, actual)
    assert (result.samples, result.max_error, result.mean_error) == (1, 1 / 3, 1 / 9)


def test_feature_maps_are_compared_value_by_value():
    expected = np.arange(24.0).reshape(2, 2, 3, 2)
    actual = expected.copy()
    actual[1, 1, 2, 1] += 2.3
    assert agreement({"x": expected}, {"x": actual}).max_error == pytest.approx(0.1, rel=1e-12)


def test_tensorflow_tensors_are_taken_too():
    assert agreement({"logits": tf.constant(EXPECTED["logits"])}, ACTUAL).max_error == 0.5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["expected", "actual"])
def test_value_that_is_not_finite_is_refused(side, bad):
    sides = {"expected": {"x": np.zeros((1, 3))}, "actual": {"x": np.zeros((1, 3))}}
    sides[side]["x"][0, 1] = bad
    with pytest.raises(ValueError, match=f"The {side} outputs are not finite: 1 value$"):
        agreement(**sides)


def test_probability_that_is_nan_is_refused():
    with pytest.raises(ValueError, match="The actual outputs are not finite"):
        agreement({"probabilities": np.array([[0.5, 0.5]])}, {"probabilities": np.array([[0.5, math.nan]])})


@pytest.mark.parametrize(
    "actual",
    [{"x": np.zeros((2, 4))}, {"x": np.zeros((1, 3))}, {"y": np.zeros((2, 3))}, {}],
    ids=["classes", "samples", "name", "missing"],
)
def test_outputs_of_another_shape_or_name_are_refused(actual):
    with pytest.raises(ValueError, match=r"differ in name or shape. Received: \{'x': \(2, 3\)\} and"):
        agreement({"x": np.zeros((2, 3))}, actual)


def test_agreement_reads_as_a_sentence():
    assert str(agreement(EXPECTED, ACTUAL)) == (
        "max error 5.0e-01 and mean error 1.2e-01 of the range, cosine 0.932007, top-1 agreement 100.0% on 2 images"
    )


def test_agreement_is_frozen():
    with pytest.raises(FrozenInstanceError):
        agreement(EXPECTED, ACTUAL).cosine = 1.0


def test_noise_is_seeded_and_standard_normal():
    images = noise((32, 32, 3), samples=8, seed=1)
    assert images.shape == (8, 32, 32, 3) and images.dtype == "float32"
    assert np.array_equal(images, noise((32, 32, 3), samples=8, seed=1))
    assert not np.array_equal(images, noise((32, 32, 3), samples=8, seed=2))
    # 24,576 values: mean and deviation are known to 1/157 of the deviation; four of those.
    assert abs(images.mean()) < 0.026 and images.std() == pytest.approx(1, abs=0.026)


@pytest.mark.parametrize("size, batches", [(None, [8, 2]), (4, [4, 4, 4]), (10, [10]), (12, [12]), (1, [1] * 10)])
def test_images_are_run_in_batches_of_the_size_that_is_insisted_on(size, batches):
    sizes, images = [], np.arange(20.0).reshape(10, 2)
    results = in_batches(lambda batch: sizes.append(len(batch)) or {"twice": 2 * batch}, images, size=size)
    assert sizes == batches
    np.testing.assert_array_equal(results["twice"], 2 * images)


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [("uint8", 0, 255), ("int8", -128, 127), ("uint16", 0, 65535), ("int16", -32768, 32767)]
    + [(dtype, 0, 255) for dtype in ("uint32", "int32", "uint64", "int64")],  # a byte that was converted
)
def test_noise_of_integers_takes_all_their_values(dtype, low, high):
    images = noise((64, 64, 3), samples=8, dtype=dtype)
    assert images.dtype == dtype
    extent = high - low
    assert low <= images.min() < low + 0.01 * extent and high - 0.01 * extent < images.max() <= high
    assert abs(images.mean() - (low + high) / 2) < 0.01 * extent


def test_images_become_integers_by_rounding_and_clipping():
    values = np.array([-1.0, 0.4, 0.6, 254.6, 300.0])
    np.testing.assert_array_equal(as_integers(values, "uint8"), np.uint8([0, 0, 1, 255, 255]))
    np.testing.assert_array_equal(as_integers(values, np.int8), np.int8([-1, 0, 1, 127, 127]))
    assert as_integers(values, "float32") is values and as_integers(values, "bfloat16") is values
