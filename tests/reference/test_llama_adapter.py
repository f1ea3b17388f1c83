"""LLaMA-Adapter against peft with the same tensors, and against its formula where the backbone packs, biases or scales otherwise."""

from __future__ import annotations

import pytest
import torch

import deltatune as dt
from tests import tiny
from tests.laws.cases import BACKBONES
from tests.reference.compare import TOLERANCE, batch_of, by_path, copied, moved, scores

P = 4


def test_llama_adapter_equals_peft_with_the_same_tensors():
    from peft import AdaptionPromptConfig, get_peft_model

    model, weights = moved("llama", dt.LLaMAAdapter(length=P), size=0.5)
    config = AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=P, adapter_layers=3)
    theirs = get_peft_model(BACKBONES["llama"](), config).eval()
    for path, leaves in by_path(model, weights).items():
        module = theirs.base_model.model.get_submodule(path)
        copied(module.adaption_prompt, leaves["P"][None])
        copied(module.adaption_gate, leaves["g"])
    given = batch_of("llama")
    bare = scores(model)
    reference = theirs(**given).logits[given["attention_mask"].bool()]
    attachment = dt.attach(model, weights)
    ours = scores(model)
    assert (ours - bare).abs().max() > 1e-2
    torch.testing.assert_close(ours, reference, **TOLERANCE)
    ours.square().mean().backward()
    reference.square().mean().backward()
    assert weights.count == sum(p.numel() for p in theirs.parameters() if p.requires_grad) == 3 * (P * tiny.WIDTH + 1)
    for name, tensor in attachment.named_parameters():
        module = theirs.base_model.model.get_submodule(name[2:-2])
        other = module.adaption_prompt.grad[0] if name.endswith("P") else module.adaption_gate.grad
        torch.testing.assert_close(tensor.grad, other, rtol=1e-4, atol=1e-6)


def attended(x, q, k, v, own, scale):
    """Return the formula's extra output [batch, length, heads width] for queries made of x."""
    heads = [y.unflatten(-1, (tiny.HEADS, -1)).transpose(-3, -2) for y in (q(x), k(own["P"]), v(own["P"]))]
    share = torch.softmax(heads[0] @ heads[1].mT * scale, -1)
    return own["g"] * (share @ heads[2]).transpose(-3, -2).flatten(-2)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "t5", "gpt2"])
def test_llama_adapter_equals_its_formula_on_other_families(name):
    model, weights = moved(name, dt.LLaMAAdapter(length=P), size=0.5)
    reference, leaves = BACKBONES[name](), by_path(model, weights)
    for address, own in leaves.items():
        path, _, end = address.partition("~")  # BERT's attention ends in a module beside it
        module = reference.get_submodule(path)
        inputs = {}
        if name == "gpt2":
            packed = module.c_attn
            q, k, v = (lambda x, i=i, packed=packed: packed(x).chunk(3, -1)[i] for i in range(3))
            module.register_forward_pre_hook(lambda m, args, inputs=inputs: inputs.update(x=args[0]))
            last = module.c_proj
        elif name == "t5":
            q, k, v, last = module.q, module.k, module.v, module.o
            module.register_forward_pre_hook(
                lambda m, args, kwargs, inputs=inputs: inputs.update(x=args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
        else:
            q, k, v = module.query, module.key, module.value
            module.register_forward_pre_hook(lambda m, args, inputs=inputs: inputs.update(x=args[0]))
            last = reference.get_submodule(end)
        scale = 1.0 if name == "t5" else (tiny.WIDTH // tiny.HEADS) ** -0.5
        last.register_forward_pre_hook(
            lambda m, args, q=q, k=k, v=v, own=own, inputs=inputs, scale=scale: (
                args[0] + attended(inputs["x"], q, k, v, own, scale),
            )
        )
    bare = scores(model)
    with dt.attach(model, weights):
        ours = scores(model)
    assert (ours - bare).abs().max() > 1e-3
    torch.testing.assert_close(ours, scores(reference), **TOLERANCE)


@torch.no_grad()
def test_it_sees_a_change_of_the_projections_and_stands_beside_a_prefix():
    model = BACKBONES["llama"]()
    adapter = dt.LLaMAAdapter(length=P)
    _, weights = moved("llama", adapter + dt.PrefixTuning(length=3) + dt.LoRA().at("attn.{k,v}"), size=0.5)
    with dt.attach(model, weights):
        together = scores(model)
    names = {n: t for n, t in weights.tensors.items() if n.startswith("2.")}
    lora = dt.Weights(dt.LoRA().at("attn.{k,v}"), {f"0{n[1:]}": t for n, t in names.items()}, weights.backbone)
    rest = {n: t for n, t in weights.tensors.items() if not n.startswith("2.")}
    others = dt.Weights(adapter + dt.PrefixTuning(length=3), rest, weights.backbone)
    with dt.merge_(model, lora), dt.attach(model, others, check=False):
        torch.testing.assert_close(scores(model), together, **TOLERANCE)


def test_nonsense_is_refused():
    with pytest.raises(dt.DeltaTuneError, match="length=0"):
        dt.LLaMAAdapter(length=0)
    with pytest.raises(dt.DeltaTuneError, match="projections to keys and values.*where with the role attn"):
        dt.attach(BACKBONES["llama"](), dt.LLaMAAdapter().at("block"))
