"""Recipes and runs as values: their checks, their JSON, and what changes a run's id."""

from __future__ import annotations

import dataclasses
import inspect
import json

import pytest

from deltatune.cli import tune as command
from deltatune.errors import DeltaTuneError
from deltatune.tuning import Recipe, Run


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("optimizer", "adamv", "there is no optimizer 'adamv'. Did you mean 'adamw'"),
        ("schedule", "cosin", "there is no schedule 'cosin'. Did you mean 'cosine'"),
        ("precision", "fp64", "there is no precision 'fp64'. Did you mean 'fp32', 'bf16'?"),
        ("lr", -1e-3, "lr is -0.001; it cannot be below 0"),
        ("lr", 0, "lr is 0; a learning rate is above 0"),
        ("lr", float("nan"), "lr is nan; it cannot be below 0 or infinite"),
        ("lr", "fast", "lr is 'fast'; write a number"),
        ("steps", 0, "steps is 0; write 1 or more"),
        ("max_input", 7, "max_input is 7; write 8 or more"),
        ("steps", 1.5, "steps is 1.5; write a whole number"),
        ("steps", float("inf"), "steps is inf"),
        ("batch", True, "batch is True; write a number"),
        ("dropout", 1, "dropout is 1; write true or false"),
        ("warmup", 6, "warmup is 6; it is a share of the steps"),
    ],
)
def test_a_bad_field_is_named_with_its_cure(field: str, value: object, message: str) -> None:
    with pytest.raises(DeltaTuneError) as caught:
        Recipe.from_json({field: value})
    assert message in str(caught.value)


def test_an_unknown_field_offers_the_nearest() -> None:
    with pytest.raises(DeltaTuneError, match="there is no field 'learning_rat'"):
        Recipe.from_json({"learning_rat": 1})
    with pytest.raises(DeltaTuneError, match=r"no field 'stepz'\. Did you mean 'steps'"):
        Recipe.from_json({"stepz": 1})


def test_a_recipe_survives_json_and_a_whole_number_is_a_learning_rate() -> None:
    recipe = Recipe(steps=7, lr=1, schedule="constant", dropout=True)
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    assert recipe == Recipe(steps=7, lr=1.0, schedule="constant", dropout=True) and isinstance(recipe.lr, float)


def test_a_run_survives_json_and_keeps_its_delta_in_canonical_text() -> None:
    run = Run("LoRA( rank = 4 )", "pebble", "topics", Recipe(steps=3), seed=2)
    assert run.delta == "LoRA(rank=4)"
    assert Run.from_json(json.loads(json.dumps(run.to_json()))) == run
    with pytest.raises(DeltaTuneError, match="LoRA"):
        Run("LoRAA(rank=4)", "pebble", "topics")
    with pytest.raises(DeltaTuneError, match="there is no 'task'"):
        Run.from_json({"delta": "LoRA()", "backbone": "pebble"})


def test_the_command_has_an_option_for_every_field_of_a_recipe() -> None:
    options = inspect.signature(command.tune).parameters
    for item in dataclasses.fields(Recipe):
        assert options[item.name].default == item.default
