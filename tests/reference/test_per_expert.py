"""PerExpert against the inner method on each expert's own matrix, against peft's target parameters, and on real expert layers."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import deltatune as dt
from deltatune.core.leaves import tensors_of
from deltatune.core.method import Bag
from deltatune.core.motion import advance, drawn, penalty
from tests import tiny
from tests.laws.cases import METHODS, busy, output

EXPERTS, D_IN, D_OUT = 3, 24, 40
INNER = {n: m for n, m in METHODS.items() if m.acts == "linear" and "merge" not in m.breaks}
INNER |= {"LoRA(PiSSA)": dt.LoRA(rank=2, init=dt.PiSSA()), "LoRA(LoRAGA)": dt.LoRA(rank=2, init=dt.LoRAGA())}
BIASED = ("AdapterBias", "BitFit", "SSF", "Average(LoRA, BitFit)")


class Experts(nn.Module):
    """Experts that all answer: x [..., d_in] -> y [experts, ..., d_out]."""

    def __init__(self, transposed):
        super().__init__()
        self.transposed = transposed
        self.w = nn.Parameter(torch.randn(EXPERTS, *((D_IN, D_OUT) if transposed else (D_OUT, D_IN))))
        self.bias = nn.Parameter(torch.zeros(EXPERTS, D_OUT))

    def forward(self, x):
        return torch.stack([x @ (w if self.transposed else w.mT) for w in self.w]) + self.bias[:, None, None]


class Layer(nn.Module):
    def __init__(self, transposed=False):
        super().__init__()
        self.experts = Experts(transposed)

    def forward(self, x):
        return self.experts(x)


def layer(transposed=False):
    return tiny.seeded(lambda: Layer(transposed)).double()


def inputs():
    return torch.randn(2, 5, D_IN, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def fresh(delta, model):
    rows = [{"x": x[None]} for x in inputs()]
    found = dt.evidence(model, delta, rows, loss=lambda y: y.square().mean()) if dt.needs(model, delta) else {}
    return dt.init(delta, model, evidence=found)


@torch.no_grad()
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("label", [n for n in INNER if n not in BIASED])
def test_every_expert_is_the_inner_method_on_its_own_matrix(label, transposed):
    method, model, x = INNER[label], layer(transposed), inputs()
    delta = dt.PerExpert(method, only="w", transposed=transposed).at("path:experts")
    weights = fresh(delta, model)
    if "identity" not in method.breaks:
        bare = model(x)
        with dt.attach(model, weights):
            torch.testing.assert_close(model(x), bare, rtol=0, atol=1e-5)
    with dt.attach(model, busy(weights)) as attachment:
        found = model(x)
        placement = attachment.placements[0]
        live = tensors_of(placement, attachment.leaves).live()
    for e in range(EXPERTS):
        own = {n.removeprefix("shared/"): t if n.startswith("shared/") else t[e] for n, t in live.items()}
        p = method.unfold(Bag({n: t.double() if t.is_floating_point() else t for n, t in own.items()}))
        W, b = model.experts.w[e].mT if transposed else model.experts.w[e], model.experts.bias[e]
        wanted = method.computes.output(p, x, F.linear(x, W), SimpleNamespace(weight=W, bias=None)) + b
        torch.testing.assert_close(found[e], wanted, rtol=0, atol=1e-9)
    with dt.merge_(model, busy(weights)):
        torch.testing.assert_close(model(x), found, rtol=0, atol=1e-9)


@pytest.mark.parametrize("label", [n for n in INNER if n not in BIASED])
def test_the_count_is_that_of_one_linear_for_every_expert(label):
    one = nn.Sequential(nn.Linear(D_IN, D_OUT, bias=False))
    alone = dt.sites(one, INNER[label].at("path:0")).tensors.values()
    own = sum(torch.Size(leaf.shape).numel() for leaf in alone if leaf.trained and leaf.scope == "site")
    shared = sum(torch.Size(leaf.shape).numel() for leaf in alone if leaf.trained and leaf.scope == "delta")
    table = dt.sites(layer(), dt.PerExpert(INNER[label], only="w").at("path:experts"))
    assert table.parameters == EXPERTS * own + shared


def test_every_expert_starts_by_itself():
    weights = dt.init(dt.PerExpert(dt.LoRA(rank=2), only="w").at("path:experts"), layer())
    A = weights.tensors["0.experts.w.A"]
    assert A.shape == (EXPERTS, 2, D_IN)
    assert not torch.equal(A[0], A[1])
    assert A.abs().max() <= 1 / D_IN**0.5
    dora = dt.init(dt.PerExpert(dt.DoRA(rank=2), only="w", transposed=True).at("path:experts"), layer(True))
    norms = layer(True).experts.w.float().norm(dim=1)
    torch.testing.assert_close(dora.tensors["0.experts.w.m"].flatten(1), norms)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize(
    "method", [dt.PerExpert(dt.LoRA(rank=4)), dt.PerExpert(dt.DoRA(rank=4), only="down_proj")], ids=str
)
def test_the_experts_of_transformers_are_reached_and_merged(method, implementation):
    double = implementation != "grouped_mm"  # whose kernel knows no float64
    model, tolerance = (tiny.mixtral().double(), 1e-10) if double else (tiny.mixtral(), 1e-5)
    model.set_experts_implementation(implementation)
    weights, bare = busy(dt.init(method, model), size=0.2), output(model)
    with dt.attach(model, weights):
        attached = output(model)
        assert dt.trace(model, tiny.batch(model)).silent == ()
    assert (attached - bare).abs().max() > 1e-3
    state = dt.merge(model, weights)
    names = ("down_proj",) if method.only else ("gate_up_proj", "down_proj")
    assert set(state) == {f"model.layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in names}
    with dt.merge_(model, weights):
        torch.testing.assert_close(output(model), attached, rtol=0, atol=tolerance)
    assert torch.equal(output(model), bare)


@torch.no_grad()
def test_other_expert_layers_of_transformers_are_found():
    import transformers

    usual = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    usual |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    qwen = transformers.Qwen3MoeConfig(**usual, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    oss = transformers.GptOssConfig(**usual, num_local_experts=4, num_experts_per_tok=2)
    model = tiny.seeded(lambda: transformers.Qwen3MoeForCausalLM(qwen))
    assert dt.sites(model, dt.PerExpert(dt.LoRA(rank=2))).parameters == 2 * 4 * 2 * ((32 + 32) + (16 + 32))
    model = tiny.seeded(lambda: transformers.GptOssForCausalLM(oss)).double()
    model.set_experts_implementation("batched_mm")
    with pytest.raises(dt.DeltaTuneError, match=r"gate_up_proj_bias' is \[4, 96\]\. Write only="):
        dt.sites(model, dt.PerExpert(dt.LoRA(rank=2), transposed=True))
    delta = dt.PerExpert(dt.LoRA(rank=2), only="gate_up_proj", transposed=True)
    assert dt.sites(model, delta).parameters == 2 * 4 * 2 * (32 + 96)
    weights, ids = busy(dt.init(delta, model), size=0.2), torch.arange(7)[None]
    with dt.attach(model, weights):
        attached = model(ids).logits
    with dt.merge_(model, weights):
        torch.testing.assert_close(model(ids).logits, attached, rtol=0, atol=1e-10)


def test_lora_of_every_expert_is_that_of_peft():
    from peft import LoraConfig, get_peft_model

    model, x = layer(), inputs()
    delta = dt.PerExpert(dt.LoRA(rank=2, alpha=4.0), only="w").at("path:experts")
    weights = busy(dt.init(delta, model), size=0.3)
    A, B = (weights.tensors[f"0.experts.w.{leaf}"].double() for leaf in "AB")
    config = LoraConfig(r=2, lora_alpha=4, target_modules=[], target_parameters=["experts.w"])
    reference = get_peft_model(layer(), config)
    theirs = {n.split(".")[-3]: p for n, p in reference.named_parameters() if p.requires_grad}
    theirs["lora_A"].data.copy_(A.flatten(0, 1))  # [experts rank, d_in], expert by expert
    theirs["lora_B"].data.copy_(B.permute(1, 2, 0).flatten(1))  # [d_out, rank experts], rank by rank
    attachment = dt.attach(model, weights)
    ours, wanted = model(x), reference(x)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-8)
    ours.square().mean().backward()
    wanted.square().mean().backward()
    grads = {name[-1]: p.grad.double() for name, p in attachment.named_parameters()}
    torch.testing.assert_close(grads["A"].flatten(0, 1), theirs["lora_A"].grad.double(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        grads["B"].permute(1, 2, 0).flatten(1), theirs["lora_B"].grad.double(), rtol=1e-5, atol=1e-7
    )
    assert weights.count == sum(p.numel() for p in theirs.values())


def live(attachment):
    return tensors_of(attachment.placements[0], attachment.leaves).live()


def test_a_budget_of_ranks_is_kept_over_all_experts():
    model, x = layer(), inputs()
    inner = dt.AdaLoRA(rank=2, extra=2)
    attachment = dt.attach(model, busy(dt.init(dt.PerExpert(inner, only="w").at("path:experts"), model), size=0.3))
    apart = nn.ModuleList([nn.Linear(D_IN, D_OUT, bias=False) for _ in range(EXPERTS)]).double()
    for e in range(EXPERTS):
        apart[e].weight.data.copy_(model.experts.w[e])
    alone = list(apart)
    other = dt.attach(apart, dt.init(inner.at("path:*"), apart))
    for placement, e in zip(other.placements, range(EXPERTS), strict=True):
        for name, tensor in tensors_of(placement, other.leaves).live().items():
            tensor.data.copy_(live(attachment)[name][e])
    for step in range(1, 5):
        attachment.leaves.zero_grad()
        other.leaves.zero_grad()
        model(x).square().mean().backward()
        (torch.stack([one(x) for one in alone]) + model.experts.bias[:, None, None]).square().mean().backward()
        advance(attachment, step, 4)
        advance(other, step, 4)
    left = live(attachment)["lam"]
    assert (left != 0).sum() == EXPERTS * 2
    for placement, e in zip(other.placements, range(EXPERTS), strict=True):
        for name, tensor in tensors_of(placement, other.leaves).live().items():
            torch.testing.assert_close(live(attachment)[name][e], tensor, rtol=0, atol=1e-9)


def test_penalties_and_draws_are_those_of_every_expert():
    model = layer()
    inner = dt.AdaLoRA(rank=2, extra=2)
    attachment = dt.attach(model, busy(dt.init(dt.PerExpert(inner, only="w").at("path:experts"), model), size=0.3))
    one_by_one = [inner.penalty(Bag({n: t[e] for n, t in live(attachment).items()})) for e in range(EXPERTS)]
    found = penalty(attachment)
    torch.testing.assert_close(found, torch.stack(one_by_one).sum())
    found.backward()
    attachment.detach()
    assert penalty(dt.attach(model, dt.PerExpert(dt.LoRA(rank=2), only="w").at("path:experts"), name="plain")) is None
    drawing = dt.attach(model, dt.PerExpert(dt.PVeRA(rank=4), only="w").at("path:experts"), name="drawing")
    before = {n: t.detach().clone() for n, t in live(drawing).items()}
    with drawn(drawing, seed=1):
        moved = {n for n, t in live(drawing).items() if not torch.equal(t, before[n])}
        assert moved
        assert all(not torch.equal(live(drawing)[n][0], live(drawing)[n][1]) for n in moved)
    assert all(torch.equal(t, before[n]) for n, t in live(drawing).items())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: dt.PerExpert(dt.Adapter()), "PerExpert makes new weights; Adapter.* is no method on linear layers"),
        (lambda: dt.PerExpert(dt.Gate(dt.LoRA())), "PerExpert makes new weights, and Gate.* has none: how much"),
        (lambda: dt.PerExpert(dt.LoRA(rank=2)), r"acts on parameters \[experts, d_out, d_in\]; 'experts.bias' is \[3, 40\]"),
        (lambda: dt.PerExpert(dt.LoRA(rank=2), only="v"), r"takes none of the parameters .*: w, bias"),
        (lambda: dt.PerExpert(dt.LoRA(rank=25), only="w"), r"LoRA\(rank=25\) exceeds the dimensions of 'experts': 40 x 24"),
        (lambda: dt.PerExpert(dt.LoRA(rank=2, init=dt.EVA()), only="w"), "not known for one expert of 'experts.w'"),
    ]
    + [(lambda m=INNER[n]: dt.PerExpert(m, only="w"), r"changes a bias, and 'experts\.w' has none") for n in BIASED],
)  # fmt: skip
def test_what_experts_cannot_have_is_refused(build, message):
    with pytest.raises(dt.DeltaTuneError, match=message):
        dt.sites(layer(), build().at("path:experts"))


def test_linear_layers_are_left_to_the_method_itself():
    with pytest.raises(dt.DeltaTuneError, match="put the inner method at the linear layers themselves"):
        dt.sites(tiny.llama(), dt.PerExpert(dt.LoRA()).at("path:**.mlp"))
    with pytest.raises(
        dt.DeltaTuneError, match=r"no module of this LlamaForCausalLM has the path '\*\*\.experts'|path"
    ):
        dt.sites(tiny.llama(), dt.PerExpert(dt.LoRA()))


def test_it_travels_and_combines():
    method = dt.PerExpert(dt.LoRA(rank=2), only="w", transposed=True)
    assert dt.parse(str(method.at("path:experts"))) == method.at("path:experts")
    model, x = layer(), inputs()
    delta = dt.Scale(dt.PerExpert(dt.LoRA(rank=2), only="w"), by=0.5).at("path:experts")
    weights = busy(dt.init(delta, model), size=0.3)
    plain = dt.PerExpert(dt.LoRA(rank=2), only="w").at("path:experts")
    renamed = {n.replace("0/", ""): t for n, t in weights.tensors.items()}
    with torch.no_grad():
        bare = model(x)
        with dt.attach(model, weights):
            half = model(x)
        with dt.attach(model, replace(weights, delta=plain, tensors=renamed)):
            torch.testing.assert_close(half - bare, (model(x) - bare) / 2, rtol=0, atol=1e-12)
