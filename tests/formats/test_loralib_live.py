"""loralib's own layers in place of a model's: they compute what deltatune wrote, and deltatune what they saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import loralib
import pytest
import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.formats import read_loralib, write_loralib
from tests import tiny
from tests.formats.live import moved
from tests.formats.small import scores

ALPHA = 5
# by name: the family, the ends of the paths of the layers, the parts of packed ones that are trained, and the delta
CASES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], str]] = {
    "plain": ("bert", ("self.query", "self.value"), (), "attn.{q,v}"),
    "ffn": ("llama", ("gate_proj", "up_proj", "down_proj"), (), "ffn.{gate,up,down}"),
    "turned": ("gpt2", ("c_proj", "c_fc"), (), "{attn.o,ffn.{up,down}}"),
    "two": ("gpt2", ("c_attn",), ("q", "v"), "attn.{q,v}"),
    "one": ("gpt2", ("c_attn",), ("k",), "attn.k"),
    "all": ("gpt2", ("c_attn",), ("q", "k", "v"), "attn.{q,k,v}"),
    "mixed": ("gpt2", ("c_attn", "c_fc"), ("q", "v"), "{attn.{q,v},ffn.up}"),
}
SAVED = CASES | {"embedding": ("llama", ("embed_tokens", "q_proj"), (), "")}


def layer(old: Any, enabled: Sequence[str]) -> nn.Module:
    """Return loralib's layer with the weights of an embedding, of a linear one, or of one that is stored [in, out]."""
    if isinstance(old, nn.Embedding):
        table = loralib.Embedding(*old.weight.shape, r=2, lora_alpha=ALPHA)
        table.weight.data = old.weight.data
        return table
    turned = not isinstance(old, nn.Linear)
    d_in, d_out = old.weight.shape if turned else old.weight.shape[::-1]
    settings: dict[str, Any] = {"r": 2, "lora_alpha": ALPHA, "fan_in_fan_out": turned, "bias": old.bias is not None}
    if enabled:
        new: Any = loralib.MergedLinear(d_in, d_out, enable_lora=[part in enabled for part in "qkv"], **settings)
    else:
        new = loralib.Linear(d_in, d_out, **settings)
    new.weight.data = old.weight.data
    if old.bias is not None:
        new.bias.data = old.bias.data
    return new


def theirs(case: str) -> nn.Module:
    """Return the model of a case, with loralib's layers in it."""
    family, ends, enabled, _ = SAVED[case]
    model = tiny.FAMILIES[family]()
    for path in [path for path, _ in model.named_modules() if path.endswith(ends)]:
        parent, _, name = path.rpartition(".")
        old = model.get_submodule(path)
        setattr(model.get_submodule(parent), name, layer(old, enabled if name == "c_attn" else ()))
    loralib.mark_only_lora_as_trainable(model)
    return model


@torch.no_grad()
def measured(model: nn.Module, weights: dt.Weights | None = None) -> Tensor:
    given = tiny.batch(model)
    if weights is None:
        return scores(model.eval(), given)  # loralib merges on the way
    bare = scores(model, given)
    with dt.attach(model, weights):
        found = scores(model, given)
    assert (found - bare).abs().max() > 1e-2
    return found


@pytest.mark.parametrize("case", CASES)
def test_loralib_computes_what_deltatune_wrote(case, tmp_path):
    family, _, _, where = CASES[case]
    weights = moved(tiny.FAMILIES[family](), f'LoRA(rank=2, alpha={ALPHA}).at("{where}")')
    write_loralib(tiny.FAMILIES[family](), weights, tmp_path)
    model = theirs(case)
    keys = model.load_state_dict(torch.load(tmp_path / "lora.pt", weights_only=True), strict=False)
    assert not keys.unexpected_keys and not [key for key in keys.missing_keys if "lora_" in key]
    torch.testing.assert_close(measured(model), measured(tiny.FAMILIES[family](), weights), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", SAVED)
def test_deltatune_computes_what_loralib_saved(case, tmp_path):
    family, _, enabled, _ = SAVED[case]
    model, generator = theirs(case), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    torch.save(loralib.lora_state_dict(model), tmp_path / "lora.pt")
    weights = read_loralib(tiny.FAMILIES[family](), tmp_path / "lora.pt", alpha=ALPHA, enabled=enabled)
    torch.testing.assert_close(measured(tiny.FAMILIES[family](), weights), measured(model), rtol=1e-5, atol=1e-5)
