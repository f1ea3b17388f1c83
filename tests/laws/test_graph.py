"""Law of the graph: below the lowest trained site autograd keeps nothing, whatever the method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import deltatune as dt
from deltatune.core.delta import place
from deltatune.core.frozen import frozen_blocks
from deltatune.core.method import Method
from deltatune.core.site import anatomy
from tests import tiny
from tests.laws.cases import BACKBONES, busy, cases, delta_of, fresh


def top(method: Method, model: Any, name: str) -> dt.Delta | None:
    """The method at its default roles in the last block alone, of the decoder where there is one; None for prompts and the like."""
    stack = anatomy(model).stacks[-1].name
    sites = [p.site for p in place(model, delta_of(method, name)) if p.site.layer is not None and p.site.stack == stack]
    roles = dict.fromkeys(f"{stack}.{s.role}".lstrip(".") + "[-1]" + (":in" if s.side == "in" else "") for s in sites)
    return method.at("{" + ",".join(roles) + "}") if roles else None


@pytest.mark.parametrize(("method", "name"), cases("llama", "bert", "t5", prefer="t5"))
def test_nothing_is_kept_below_the_lowest_trained_site(method: Method, name: str) -> None:
    model = BACKBONES[name]()
    delta = top(method, model, name)
    if delta is None:
        return  # it acts in front of the blocks, so that nothing lies below
    attachment = dt.attach(model, busy(fresh(delta, model)))
    stack = anatomy(model).stacks[-1]
    reached: list[bool] = []
    below: list[tuple[int, ...]] = []
    last: Any = model.get_submodule(f"{stack.path}.{stack.layers - 1}")
    last.register_forward_pre_hook(lambda module, args: reached.append(True))
    held = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}

    def pack(tensor: Tensor) -> Tensor:
        if not reached and tensor.untyped_storage().data_ptr() not in held:
            below.append(tuple(tensor.shape))
        return tensor

    given = {key: value[:2] for key, value in tiny.batch(model).items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(**given)
    assert reached and below == []
    assert y.logits.requires_grad
    behind = (
        all((p.site.role, p.site.side) == ("block", "out") for p in attachment.placements) and method.acts != "tensor"
    )
    frozen = frozen_blocks(model, lambda: model(**given)).blocks
    assert len(frozen) == sum(s.layers for s in anatomy(model).stacks) - (not behind)
