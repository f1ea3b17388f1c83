"""BitFit against a copy of the model whose own biases are changed, and against training those biases by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deltatune as dt
from tests.laws.cases import BACKBONES
from tests.reference.compare import TOLERANCE, by_path, moved, scores

HEADS = ("cls", "lm_head")  # behind the last block and its norm: they belong to no stack


def biased(module):
    """Whether the paper's formula f(x) + b is for this module: a linear layer or a norm."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D" or "Norm" in type(module).__name__


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_a_bias_is_added_to_every_linear_and_every_norm(name):
    model, weights = moved(name, dt.BitFit())
    reference, leaves = BACKBONES[name](), by_path(model, weights)
    expected = {p for p, m in reference.named_modules() if biased(m) and p.split(".")[0] not in HEADS}
    assert {path.partition("[")[0] for path in leaves} == expected
    for path, own in leaves.items():
        where, _, role = path.removesuffix("]").partition("[")
        module, b = reference.get_submodule(where), own["b"]
        if role:  # q, k or v of GPT-2's packed module
            b = torch.cat([b if role == piece else torch.zeros_like(b) for piece in "qkv"])
        if module._parameters.get("bias") is not None:
            module.bias.add_(b)
        else:
            module.register_forward_hook(lambda m, args, y, b=b: y + b)
    bare = scores(model)
    with dt.attach(model, weights):
        ours = scores(model)
    assert (ours - bare).abs().max() > 1e-2
    torch.testing.assert_close(ours, scores(reference), **TOLERANCE)


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_three_steps_of_bitfit_are_three_steps_on_the_parameters_called_bias(name):
    model, reference = BACKBONES[name](), BACKBONES[name]()
    attachment = dt.attach(model, dt.BitFit())
    reference.requires_grad_(False)
    trained = [p for n, p in reference.named_parameters() if n.endswith("bias") and n.split(".")[0] not in HEADS]
    for parameter in trained:
        parameter.requires_grad_(True)
    assert sum(p.numel() for p in trained) == sum(p.numel() for p in attachment.parameters())
    steps = [(model, torch.optim.SGD(attachment.parameters(), lr=0.5)), (reference, torch.optim.SGD(trained, lr=0.5))]
    before = scores(model).detach()
    for _ in range(3):
        for each, optimizer in steps:
            optimizer.zero_grad()
            scores(each).square().mean().backward()
            optimizer.step()
    with torch.no_grad():
        assert (scores(model) - before).abs().max() > 1e-2
        torch.testing.assert_close(scores(model), scores(reference), **TOLERANCE)
