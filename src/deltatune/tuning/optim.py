"""Optimizers and learning-rate schedules by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from deltatune.tuning.recipe import Recipe

Groups = list[dict[str, Any]]


def make_optimizer(
    recipe: Recipe, parameters: Iterable[nn.Parameter], rates: Mapping[nn.Parameter, float] | None = None
) -> torch.optim.Optimizer:
    """Return the recipe's optimizer: AdamW (2019), Adafactor (2018) with an outer learning rate, or SGD, momentum 0.9.

    There is one group of parameters for each of `rates`, whose `rate` multiplies the recipe's learning rate.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault((rates or {}).get(parameter, 1.0), []).append(parameter)
    return _MAKERS[recipe.optimizer]([{"params": group, "rate": rate} for rate, group in groups.items()], recipe)


def learning_rate(recipe: Recipe) -> Callable[[int], float]:
    """Return the learning rate as a function of the step, counted from 0; the step is all the state a schedule has."""
    from transformers import get_scheduler

    # The scheduler wants an optimizer, but only its pure factor per step is used.
    carrier = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    name = "constant_with_warmup" if recipe.schedule == "constant" else recipe.schedule
    scheduler: Any = get_scheduler(name, carrier, round(recipe.warmup * recipe.steps), recipe.steps)
    factor = scheduler.lr_lambdas[0]
    return lambda step: recipe.lr * factor(step)


def _adamw(parameters: Groups, recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)


def _adafactor(parameters: Groups, recipe: Recipe) -> torch.optim.Optimizer:
    from transformers.optimization import Adafactor

    return Adafactor(
        parameters,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        scale_parameter=False,
        relative_step=False,
        warmup_init=False,
    )


def _sgd(parameters: Groups, recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, momentum=0.9)


_MAKERS = {"adamw": _adamw, "adafactor": _adafactor, "sgd": _sgd}
