"""Types of peft whose files hold or draw what deltatune draws or computes itself: the same function read, the same file written."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import deltatune as dt
from deltatune.formats.peft import read_peft, write_peft
from tests import tiny
from tests.formats.folders import assert_equal, assert_round_trip, assert_same, edited, loaded, rewritten, saved
from tests.laws.cases import busy

BUILDS = {"llama": tiny.llama, "bert": tiny.bert, "gpt2": tiny.gpt2}
QV = {"target_modules": ["q_proj", "v_proj"]}
BERT = {"target_modules": ["query", "intermediate.dense"]}
CASES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "VeRA": ("llama", "VeraConfig", {"r": 6, **QV}, "VeRA(rank=6)"),
    "VeRA-conv1d": ("gpt2", "VeraConfig", {"r": 6, "target_modules": ["c_fc"], "fan_in_fan_out": True}, "VeRA(rank=6)"),
    "PVeRA": ("llama", "PveraConfig", {"r": 6, **QV}, "PVeRA(rank=6)"),
    "RandLoRA": ("bert", "RandLoraConfig", {"r": 10, "randlora_alpha": 30, **BERT}, "RandLoRA(rank=10, alpha=30.0)"),
    "VBLoRA": (
        "llama",
        "VBLoRAConfig",
        {"r": 2, "num_vectors": 9, "vector_length": 8, "topk": 3, **QV},
        "VBLoRA(rank=2, vectors=9, size=8, top=3)",
    ),
    "UniLoRA": ("llama", "UniLoraConfig", {"r": 2, "theta_d_length": 50, **QV}, "UniLoRA(rank=2, size=50)"),
    "UniLoRA-indices": (
        "bert",
        "UniLoraConfig",
        {"r": 3, "theta_d_length": 3000, "proj_seed": 7, "save_indices": True, **BERT},
        "UniLoRA(rank=3, size=3000)",
    ),
    "UniLoRA-conv1d": (
        "gpt2",
        "UniLoraConfig",
        {"r": 2, "theta_d_length": 9, "target_modules": r".*\.mlp\.c_(fc|proj)", "fan_in_fan_out": True},
        "UniLoRA(rank=2, size=9)",
    ),
    "AdaMSS": ("llama", "AdamssConfig", {"r": 6, "num_subspaces": 2, **QV}, "AdaMSS(size=6, groups=2)"),
    "AdaMSS-bias": (
        "bert",
        "AdamssConfig",
        {"r": 100, "num_subspaces": 12, "subspace_rank": 4, "random_seed": 3, **BERT},
        "AdaMSS(groups=12, rank=4)",
    ),
    "AdaMSS-ranks": (
        "llama",
        "AdamssConfig",
        {"r": 8, "subspace_rank": 3, "use_dynamic_rank": True, "svd_threshold": 0.5, **QV},
        "AdaMSS(size=8, rank=3)",
    ),
    "FRoD": ("llama", "FrodConfig", {"progressbar": False, **QV}, "FRoD()"),
    "FRoD-bert": ("bert", "FrodConfig", {"progressbar": False, "sparse_rate": 0.1, **BERT}, "FRoD(share=0.1)"),
    "FRoD-conv1d": (
        "gpt2",
        "FrodConfig",
        {"progressbar": False, "target_modules": ["c_fc"], "fan_in_fan_out": True},
        "FRoD()",
    ),
    "TinyLoRA": ("llama", "TinyLoraConfig", {"r": 2, "u": 5, **QV}, "TinyLoRA(size=5)"),
    "TinyLoRA-tied": (
        "llama",
        "TinyLoraConfig",
        {"r": 3, "u": 5, "weight_tying": 1.0, **QV},
        'TinyLoRA(rank=3, size=5, share="delta")',
    ),
    "FourierFT": ("llama", "FourierFTConfig", {"n_frequency": 30, "scaling": 40.0, **QV}, "FourierFT(entries=30, scale=40.0)"),
    "WaveFT": ("llama", "WaveFTConfig", {"n_frequency": 30, "random_loc_seed": 5, **QV}, "WaveFT(entries=30)"),
    "DeLoRA": ("llama", "DeloraConfig", {"r": 3, **QV}, "DeLoRA(rank=3)"),
    "GraLoRA": ("llama", "GraloraConfig", {"r": 4, "alpha": 6, **QV}, "GraLoRA(rank=4, alpha=6.0)"),
    "GLoRA": ("llama", "GloraConfig", {"r": 3, **QV}, "GLoRA(rank=3)"),
    "GLoRA-bias": ("bert", "GloraConfig", {"r": 3, "config_D_E": "vector", **BERT}, "GLoRA(rank=3)"),
    "GLoRA-numbers": ("bert", "GloraConfig", {"r": 3, "config_C": "vector", **BERT}, "GLoRA(rank=3)"),
    "PSOFT": ("llama", "PsoftConfig", {"r": 5, **QV}, "PSOFT(rank=5)"),
    "PEANuT": ("llama", "PeanutConfig", {"r": 3, "depth": 2, "scaling": 1.5, **QV}, "PEANuT(rank=3, depth=2, scale=1.5)"),
    "RoAd": ("llama", "RoadConfig", {"variant": "road_2", "group_size": 8, **QV}, "RoAd(variant=2, group=8)"),
    "SuperTuning": ("llama", "SupertuningConfig", {"sparsity": 0.95, **QV}, "SuperTuning(share=0.050000000000000044)"),
    "BEFT": ("llama", "BeftConfig", {"target_modules": ["v_proj"]}, "BitFit()"),
    "DEFT": ("llama", "DeftConfig", {"r": 3, "alpha": 6, **QV}, "DEFT(rank=3, alpha=6.0)"),
}  # fmt: skip
# computed with the backbone's weight
ROUNDED = ("GLoRA-bias", "GLoRA-numbers", "DEFT", "FRoD", "FRoD-bert", "FRoD-conv1d")


def config_of(name: str, fields: dict[str, Any]) -> Any:
    import peft

    return getattr(peft, name)(**fields)


@pytest.mark.parametrize("case", CASES)
def test_a_type_of_peft_is_read_and_written_as_the_same_function(case, tmp_path):
    build, name, fields, text = CASES[case]
    weights = assert_round_trip(tmp_path, BUILDS[build], config_of(name, fields), case not in ROUNDED, size=0.3)
    assert {str(term.method) for term in weights.delta.terms} == {text}


WRITTEN = {
    "VeRA": 'VeRA(rank=6).at("attn.q")',
    "RandLoRA": 'RandLoRA(rank=8).at("{attn.q,attn.o}")',
    "AdaMSS": "AdaMSS(size=10, groups=3, rank=2)",
    "FRoD": 'FRoD(share=0.05).at("attn.q") + FRoD(share=0.05).at("{attn.v,ffn.down}")',
    "FRoD-one": 'FRoD(share=0.05).at("attn.v[1]")',
    "UniLoRA": "UniLoRA(rank=2, size=100)",
    "VBLoRA": "VBLoRA(rank=2, vectors=9, size=8)",
    "TinyLoRA": "TinyLoRA(size=5)",
    "DeLoRA": 'DeLoRA(rank=3) + DeLoRA(rank=2).at("ffn.up")',
    "GLoRA": "GLoRA(rank=3)",
    "PSOFT": "PSOFT(rank=5)",
    "OSF": 'OSF().at("attn.{q,v}")',
    "RoAd": "RoAd(variant=4, group=16)",
    "SuperTuning": "SuperTuning(share=0.03, entries=SmallestWeights())",
    "BitFit": 'BitFit().at("attn.{q,v}")',
    "DEFT": "DEFT(rank=3)",
}


@torch.no_grad()
@pytest.mark.parametrize("case", WRITTEN)
def test_what_is_trained_here_is_the_same_in_peft(case, tmp_path):
    weights = busy(dt.init(dt.parse(WRITTEN[case]), tiny.llama()), size=0.2)
    write_peft(tiny.llama(), weights, tmp_path)
    theirs = loaded(tmp_path, tiny.llama)
    assert_same(tiny.llama, weights, theirs)
    assert_same(tiny.llama, read_peft(tiny.llama(), tmp_path), theirs)


@torch.no_grad()
def test_osf_is_read_where_the_major_directions_are_left_alone(tmp_path):
    from peft import OSFConfig

    theirs = saved(tmp_path / "theirs", tiny.llama, OSFConfig(**QV), size=0.0)
    with pytest.raises(AssertionError):  # the bare model
        assert_same(tiny.llama, read_peft(tiny.llama(), tmp_path / "theirs"), theirs)
    saved(tmp_path / "theirs", tiny.llama, OSFConfig(**QV))
    with pytest.raises(dt.DeltaTuneError, match="in the major directions of the model's weight"):
        read_peft(tiny.llama(), tmp_path / "theirs")
    weights = busy(dt.init(dt.parse('OSF(keep=0.25).at("attn.{q,v}")'), tiny.llama()), size=0.2)
    write_peft(tiny.llama(), weights, tmp_path / "ours")
    again = read_peft(tiny.llama(), tmp_path / "ours")
    write_peft(tiny.llama(), again, tmp_path / "again")
    assert_equal(read_peft(tiny.llama(), tmp_path / "again"), again, exact=False)


@torch.no_grad()
def test_poly_is_read_for_its_first_task(tmp_path):
    from peft import PolyConfig

    fields = {"r": 2, "n_tasks": 3, "n_skills": 4, "n_splits": 2, "task_type": "CAUSAL_LM", **QV}
    theirs = saved(tmp_path / "theirs", tiny.llama, PolyConfig(**fields), size=0.4)
    weights = read_peft(tiny.llama(), tmp_path / "theirs")
    batch = tiny.batch(tiny.llama())
    for task in range(2):
        model = tiny.llama()
        tasks = torch.full((3,), task)
        with dt.attach(model, dt.of_task(weights, task)):
            ours = model(**batch).logits
        torch.testing.assert_close(ours, theirs(**batch, task_ids=tasks).logits, rtol=0, atol=1e-5)
    write_peft(tiny.llama(), weights, tmp_path / "ours")
    assert_equal(read_peft(tiny.llama(), tmp_path / "ours"), weights)


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "projection": ("VeraConfig", {"r": 6, "save_projection": False, **QV}, {}, "save_projection=False"),
    "family": ("WaveFTConfig", {"n_frequency": 9, **QV}, {"wavelet_family": "db2"}, "wavelet_family='db2'.*'db1' alone"),
    "basis": (
        "FrodConfig",
        {"progressbar": False, "save_projection": False, **QV},
        {},
        r"lacks frod_V\.self_attn_q_proj .*save_projection=True",
    ),
    "rounding": (
        "FrodConfig",
        {"progressbar": False, "target_modules": ["layers.1.self_attn.v_proj"]},
        {},
        "next to nothing in 16 directions of its basis",
    ),
    "router": ("LilyConfig", {"r": 3, "num_B": 2, **QV}, {}, r"over all positions of all rows of a call.*each position's own softmax"),
    "layers": (
        "UniLoraConfig",
        {"r": 2, "theta_d_length": 16, "layers_to_transform": [1], **QV},
        {},
        r"layers_to_transform=\[1\].*save_indices=True",
    ),
    "shadow": ("VeraConfig", {"r": 6, **QV}, {"peft_type": "SHADOW"}, "the states of a second transformer"),
    "x-lora": ("VeraConfig", {"r": 6, **QV}, {"peft_type": "XLORA"}, "of a first pass through the whole model"),
    "top": ("VBLoRAConfig", {"r": 2, "num_vectors": 9, "vector_length": 8, **QV}, {"save_only_topk_weights": True}, "save all"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_another_function_is_refused_by_name(case, tmp_path):
    name, fields, changes, words = REFUSED[case]
    saved(tmp_path, tiny.llama, config_of(name, fields))
    edited(tmp_path, **changes)
    with pytest.raises(dt.DeltaTuneError, match=words):
        read_peft(tiny.llama(), tmp_path)


def test_matrices_that_peft_would_cut_from_the_widest_are_not_written(tmp_path):
    weights = dt.init(dt.VeRA(rank=6), tiny.llama())
    with pytest.raises(dt.DeltaTuneError, match="drew one for each width"):
        write_peft(tiny.llama(), weights, tmp_path / "out")
    fourier = dt.init(dt.FourierFT(entries=9), tiny.llama())
    with pytest.raises(dt.DeltaTuneError, match="peft's generator draws other entries"):
        write_peft(tiny.llama(), fourier, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_lily_of_peft_is_no_function_of_a_row(tmp_path):
    from peft import LilyConfig

    theirs = saved(tmp_path / "theirs", tiny.llama, LilyConfig(r=3, num_B=2, **QV), size=0.5)
    ids = tiny.batch(tiny.llama())["input_ids"]
    row, among, first = (theirs(input_ids=some).logits[0, :1] for some in (ids[:1], ids, ids[:1, :1]))
    assert (row - among).abs().max() > 1e-2  # other rows
    assert (row - first).abs().max() > 1e-2  # what follows
    with pytest.raises(dt.DeltaTuneError, match="Lily is not written for peft.*each position's own softmax"):
        write_peft(tiny.llama(), dt.init(dt.Lily(rank=3), tiny.llama()), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_groups_of_another_model_are_neither_read_nor_written(tmp_path):
    saved(tmp_path / "theirs", tiny.llama, config_of("AdamssConfig", {"r": 6, "num_subspaces": 2, **QV}))
    with pytest.raises(dt.DeltaTuneError, match="are not those of the model's weight"):
        read_peft(tiny.llama(seed=1), tmp_path / "theirs")
    edited(tmp_path / "theirs", random_seed=4)
    with pytest.raises(
        dt.DeltaTuneError, match=r"have \[\d+, \d+\] rows in the file|are not those of the model's weight"
    ):
        read_peft(tiny.llama(), tmp_path / "theirs")
    weights = dt.init(dt.AdaMSS(size=6, groups=2), tiny.llama())
    for name, tensor in weights.fixed.items():
        if name.endswith(".g"):
            tensor.copy_(1 - tensor)
    with pytest.raises(dt.DeltaTuneError, match="not those that peft finds in this backbone"):
        write_peft(tiny.llama(), weights, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_basis_that_peft_would_not_find_is_not_written(tmp_path):
    weights = dt.init(dt.FRoD(), tiny.llama())
    with pytest.raises(dt.DeltaTuneError, match=r"peft takes U = W V\^-T of self_attn_q_proj .* has another V"):
        write_peft(tiny.llama(), weights, tmp_path / "out")
    several = dt.init(dt.parse('FRoD().at("attn.q[0]") + FRoD().at("attn.q[1]")'), tiny.llama())
    with pytest.raises(dt.DeltaTuneError, match="one basis and one S for all self_attn_q_proj"):
        write_peft(tiny.llama(), several, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_vector_in_each_term_is_not_written(tmp_path):
    delta = dt.parse('UniLoRA(size=9).at("attn.q") + UniLoRA(size=9).at("attn.v")')
    with pytest.raises(dt.DeltaTuneError, match="has one vector for all modules"):
        write_peft(tiny.llama(), dt.init(delta, tiny.llama()), tmp_path / "out")


def test_singular_vectors_of_another_model_are_not_written(tmp_path):
    weights = dt.init(dt.PSOFT(rank=5), tiny.llama())
    for tensor in weights.fixed.values():
        tensor.mul_(2)
    with pytest.raises(dt.DeltaTuneError, match="not what this backbone gives"):
        write_peft(tiny.llama(), weights, tmp_path / "out")


def test_a_missing_matrix_is_named(tmp_path):
    saved(tmp_path, tiny.llama, config_of("TinyLoraConfig", {"r": 2, "u": 5, **QV}))
    rewritten(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if not n.endswith("tinylora_v.3")})
    with pytest.raises(dt.DeltaTuneError, match=r"lacks tinylora_v\.3"):
        read_peft(tiny.llama(), tmp_path)
