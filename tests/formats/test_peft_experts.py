"""peft's LoRA on the weights of experts, in the layout of 0.19 and later and in that of 0.17 and 0.18."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import deltatune as dt
from deltatune.formats.peft import read_peft, write_peft
from tests import tiny
from tests.formats.folders import assert_equal, assert_round_trip, assert_same, edited, loaded, rewritten, saved
from tests.laws.cases import busy

UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


def square() -> torch.nn.Module:
    """A mixture of experts whose down projections are square, so that no shape tells input from output."""
    return tiny._llama_like("Mixtral", 0, num_local_experts=4, num_experts_per_tok=2, intermediate_size=tiny.WIDTH)


def lora(**given: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": [], **given})


CASES = {
    "one": {"target_parameters": [DOWN]},
    "both": {"target_parameters": [UP, DOWN], "target_modules": ["q_proj"]},
    "alphas": {"target_parameters": [UP, DOWN], "alpha_pattern": {UP: 5}},
    "stable": {"target_parameters": [UP], "use_rslora": True},
}


@pytest.mark.parametrize("case", CASES)
def test_lora_on_experts_is_read_and_written_as_the_same_function(case, tmp_path):
    weights = assert_round_trip(tmp_path, tiny.mixtral, lora(**CASES[case]))
    experts = [term.method for term in weights.delta.terms if isinstance(term.method, dt.PerExpert)]
    assert {method.only for method in experts} == {name[12:] for name in CASES[case]["target_parameters"]}


@torch.no_grad()
def test_ranks_of_parameters_are_patterns(tmp_path):
    theirs = saved(tmp_path / "theirs", tiny.mixtral, lora(target_parameters=[UP, DOWN], rank_pattern={"down_proj": 3}))
    weights = read_peft(tiny.mixtral(), tmp_path / "theirs")
    assert {term.method.inner.rank for term in weights.delta.terms} == {2, 3}
    assert_same(tiny.mixtral, weights, theirs)
    write_peft(tiny.mixtral(), weights, tmp_path / "ours")
    assert_equal(read_peft(tiny.mixtral(), tmp_path / "ours"), weights)
    # peft says that it ignores such patterns, as it looks for modules only, and follows them
    assert_same(tiny.mixtral, weights, loaded(tmp_path / "ours", tiny.mixtral, but="rank_pattern keys"))


def older(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of experts as peft 0.17 and 0.18 write them: input and output exchanged."""
    found = dict(tensors)
    for key, A in tensors.items():
        if "experts" in key and "lora_A" in key:
            B = tensors[key.replace("lora_A", "lora_B")]
            count, rank = 4, len(A) // 4
            mine = A.view(count, rank, -1), B.view(-1, rank, count)
            found[key] = mine[1].permute(2, 1, 0).reshape(count * rank, -1)
            found[key.replace("lora_A", "lora_B")] = mine[0].permute(2, 1, 0).reshape(-1, rank * count)
    return found


@torch.no_grad()
@pytest.mark.parametrize(("build", "version"), [(tiny.mixtral, "0.18.1"), (tiny.mixtral, None), (square, "0.18.1")])
def test_the_exchanged_layout_of_old_versions_is_known(build, version, tmp_path):
    theirs = saved(tmp_path, build, lora(target_parameters=[UP, DOWN]))
    expected = read_peft(build(), tmp_path)
    rewritten(tmp_path, older)
    edited(tmp_path, peft_version=version)
    weights = read_peft(build(), tmp_path)
    assert_equal(weights, expected)
    assert_same(build, weights, theirs)


def test_square_matrices_of_an_unknown_version_are_refused(tmp_path):
    saved(tmp_path, square, lora(target_parameters=[DOWN]))
    edited(tmp_path, peft_version=None)
    with pytest.raises(dt.DeltaTuneError, match=r"are square, and .* does not say which peft wrote it.*0\.17\.0"):
        read_peft(square(), tmp_path)


@torch.no_grad()
def test_what_is_trained_here_is_the_same_in_peft(tmp_path):
    delta = dt.PerExpert(dt.LoRA(rank=2, alpha=5)) + dt.LoRA(rank=3).at("attn.q")
    weights = busy(dt.init(delta, tiny.mixtral()), size=0.2)
    write_peft(tiny.mixtral(), weights, tmp_path)
    assert_same(tiny.mixtral, weights, loaded(tmp_path, tiny.mixtral))
    assert_same(tiny.mixtral, read_peft(tiny.mixtral(), tmp_path), loaded(tmp_path, tiny.mixtral))


def test_what_does_not_belong_to_the_experts_is_refused(tmp_path):
    saved(tmp_path, tiny.mixtral, lora(target_parameters=[UP, DOWN]))
    edited(tmp_path, target_parameters=[UP])
    with pytest.raises(dt.DeltaTuneError, match="2 pairs of factors.*whose parameters are gate_up_proj"):
        read_peft(tiny.mixtral(), tmp_path)
    edited(tmp_path, target_parameters=None)
    assert read_peft(tiny.mixtral(), tmp_path).count
    rewritten(tmp_path, lambda tensors: {n: t[..., :-1] if "lora_A" in n else t for n, t in tensors.items()})
    with pytest.raises(dt.DeltaTuneError, match="for 31 inputs and 96 outputs; this model has 32 and 96"):
        read_peft(tiny.mixtral(), tmp_path)
    moved = dt.init(dt.PerExpert(dt.LoHa(rank=2)), tiny.mixtral())
    with pytest.raises(dt.DeltaTuneError, match="peft has LoRA alone on the weights of experts"):
        write_peft(tiny.mixtral(), moved, tmp_path / "out")


def gpt_oss() -> torch.nn.Module:
    """GptOssForCausalLM, whose experts are stored [experts, in, out]."""
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8}
    model = tiny._llama_like("GptOss", 0, **sizes)
    model.set_experts_implementation("eager")
    return model


def test_experts_that_are_stored_the_other_way_round_are_never_exchanged(tmp_path):
    weights = assert_round_trip(tmp_path, gpt_oss, lora(target_parameters=[UP, DOWN]))
    assert all(term.method.transposed for term in weights.delta.terms)
