"""Recipes: the paper's values, invalid values, the learning rate of each step, and the plan of a training."""

import json
import math
from dataclasses import FrozenInstanceError, asdict, replace

import pytest

from se_keras.training.data import digits
from se_keras.training.recipes import DIGITS, RECIPES, Augmentation, Recipe
from se_keras.training.schedules import after_plateaus, learning_rates, plan

# arXiv:1709.01507: section 5.1 (ImageNet and mobile), appendix (SENet-154), section 6 (ablations).
PAPER = {
    "paper_imagenet": {"epochs": 100, "batch_size": 1024, "learning_rate": 0.6, "momentum": 0.9, "decay": 0.1,
                       "decay_epochs": (30, 60, 90), "schedule": "steps"},
    "paper_mobile": {"epochs": 400, "batch_size": 256, "learning_rate": 0.1, "momentum": 0.9, "schedule": "plateau"},
    "senet154": {"batch_size": 2048, "learning_rate": 1.0, "label_smoothing": 0.1},
    "ablation": {"epochs": 300, "learning_rate": 0.1, "schedule": "plateau", "label_smoothing": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("name", PAPER)
def test_recipe_has_the_papers_figures(name):
    assert {field: getattr(RECIPES[name], field) for field in PAPER[name]} == PAPER[name]


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in ("digits", "modern")])
def test_recipe_of_the_paper_names_it_and_crops_and_mirrors(name):
    recipe = RECIPES[name]
    assert "arXiv:1709.01507" in recipe.source
    assert recipe.augmentation.flip
    assert recipe.augmentation.crop == ("pad" if "cifar" in name else "scale_and_aspect")
    assert recipe.augmentation.cutout == (16 if "shake" in name else 0)


def test_modern_recipe_has_what_is_modern():
    recipe = RECIPES["modern"]
    assert recipe.schedule == "cosine" and recipe.warmup_epochs and recipe.ema and recipe.label_smoothing
    assert recipe.augmentation.mixup and recipe.augmentation.rand_augment


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_json(name):
    again = json.loads(json.dumps(asdict(RECIPES[name])))
    augmentation = {key: tuple(x) if isinstance(x, list) else x for key, x in again.pop("augmentation").items()}
    again["decay_epochs"] = tuple(again["decay_epochs"])
    assert Recipe(**again, augmentation=Augmentation(**augmentation)) == RECIPES[name]


@pytest.mark.parametrize(
    "field, value",
    [
        ("epochs", 0),
        ("epochs", 2.5),
        ("epochs", 10**20),
        ("batch_size", 0),
        ("batch_size", 1.5),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("weight_decay", -1e-4),
        ("label_smoothing", 1.0),
        ("label_smoothing", float("nan")),
        ("schedule", "linear"),
        ("sampling", "random"),
        ("decay_epochs", (60, 30)),
        ("decay", 1.0),
        ("patience", 0),
        ("ema", 1.0),
        ("seed", -1),
    ],
)
def test_recipe_refuses_what_cannot_be_trained_with(field, value):
    with pytest.raises(ValueError, match=rf"{field} is out of its range. Received: {field}="):
        replace(DIGITS, **{field: value})


@pytest.mark.parametrize(
    "field, value",
    [
        ("crop", "centre"),
        ("area", (0.0, 1.0)),
        ("area", (0.5, 1.5)),
        ("aspect", (2, 1)),
        ("padding", -1),
        ("mixup", -1),
    ],
)
def test_augmentation_refuses_what_cannot_be_done(field, value):
    with pytest.raises(ValueError, match=f"{field} is out of its range"):
        Augmentation(**{field: value})


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"warmup_epochs": 5, "schedule": "steps"},
            "warmup_epochs need schedule='cosine'",
        ),
        ({"warmup_epochs": 15}, "warmup_epochs must be fewer than epochs. Received: 15 of 15"),
        (
            {"ema": 0.9, "frozen_batch_norm_epochs": 1},
            "ema and frozen_batch_norm_epochs exclude each other",
        ),
    ],
)
def test_recipe_refuses_what_does_not_go_together(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(DIGITS, **fields)


def test_recipe_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        DIGITS.epochs = 1


def test_recipe_names_its_source():
    with pytest.raises(TypeError, match="source"):
        Recipe(epochs=1, batch_size=32, learning_rate=0.1)


def test_learning_rate_goes_with_the_batch():
    recipe = RECIPES["paper_imagenet"].scaled_to(256)
    assert (recipe.batch_size, recipe.learning_rate) == (256, pytest.approx(0.15))
    with pytest.raises(ValueError, match="batch_size is out of its range. Received: batch_size=0"):
        recipe.scaled_to(0)


# The learning rate of each step.


def rates(recipe, *epochs, steps=10):
    """The learning rate of the first step of each epoch."""
    schedule = learning_rates(recipe, steps)
    return [float(schedule(epoch * steps)) for epoch in epochs]


def test_steps_fall_by_a_tenth_every_thirty_epochs():
    found = rates(RECIPES["paper_imagenet"], 0, 29, 30, 59, 60, 90, 99)
    assert found == pytest.approx([0.6, 0.6, 0.06, 0.06, 0.006, 0.0006, 0.0006])
    last_before = float(learning_rates(RECIPES["paper_imagenet"], 10)(30 * 10 - 1))
    assert last_before == pytest.approx(0.6)


def test_cosine_falls_to_zero():
    found = rates(DIGITS, 0, 5, 10, 15)
    expected = [0.05 * (1 + math.cos(math.pi * epoch / 15)) / 2 for epoch in (0, 5, 10, 15)]
    assert found == pytest.approx(expected, abs=1e-8)


def test_warm_up_rises_in_front_of_the_cosine():
    recipe = replace(DIGITS, epochs=25, warmup_epochs=5)
    found = rates(recipe, 0, 1, 5, 15, 25)
    assert found == pytest.approx([0, 0.01, 0.05, 0.025, 0], abs=1e-8)


@pytest.mark.parametrize(
    "losses, falls",
    [
        ([], 0),
        ([3, 2, 1], 0),
        ([1, 1], 0),
        ([1, 2, 2], 1),
        ([1, 2, 2, 2], 1),
        ([1, 2, 2, 2, 2], 2),
        ([1, 2, 0.5, 2], 0),
    ],
)
def test_learning_rate_falls_when_the_loss_has_not_for_two_epochs(losses, falls):
    recipe = replace(DIGITS, schedule="plateau", patience=2)
    assert after_plateaus(recipe, losses) == pytest.approx(0.05 * 0.1**falls)


# What a training would do


@pytest.mark.parametrize(
    "recipe, rates",
    [
        (
            DIGITS,
            {0: 0.05, 7: 0.05 * (1 + math.cos(math.pi * 7 / 15)) / 2, 14: 0.05 * (1 + math.cos(math.pi * 14 / 15)) / 2},
        ),
        (replace(DIGITS, schedule="steps", decay_epochs=(5, 10, 20)), {0: 0.05, 5: 0.005, 10: 0.0005}),
        (replace(DIGITS, schedule="plateau"), {0: 0.05}),
        (replace(DIGITS, epochs=2, warmup_epochs=1), {0: 0.0, 1: 0.05}),
    ],
    ids=["cosine", "steps", "plateau", "warm-up"],
)
def test_plan_has_the_learning_rate_where_it_differs(recipe, rates):
    found = plan("resnet11_digits", recipe, digits())
    assert list(found["learning_rate_at_epoch"]) == list(rates)
    assert list(found["learning_rate_at_epoch"].values()) == pytest.approx(list(rates.values()), rel=1e-5)  # float32


def test_plan_has_the_sizes_of_the_data_and_the_recipe():
    found = plan("resnet11_digits", DIGITS, digits())
    del found["learning_rate_at_epoch"]
    assert found == {
        "network": "resnet11_digits",
        "data": "digits",
        "training_images": 1437,
        "test_images": 360,
        "classes": 10,
        "steps_per_epoch": 1437 // 32,
        "recipe": asdict(DIGITS),
    }


def test_plan_refuses_a_batch_larger_than_the_data():
    with pytest.raises(
        ValueError, match="batch_size must be at most the 1437 training images of digits. Received: .+=1438"
    ):
        plan("resnet11_digits", replace(DIGITS, batch_size=1438), digits())
