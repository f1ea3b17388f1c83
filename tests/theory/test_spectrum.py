"""Spectra of planted changes, and the sizes read from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import deltatune as dt
from deltatune.theory.size import output_spectra, smallest_bottleneck, smallest_rank, smallest_size
from deltatune.theory.spectrum import Spectra, Spectrum, gradient_spectra, spectra
from tests import tiny
from tests.theory.planted import batches, busy, changed, low_rank, matrix


def spectrum(*values):
    return Spectrum("here", "attn.q", 0, (len(values), len(values)), values)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_planted_rank_is_recovered(rank):
    model = tiny.llama()
    tuned = changed(model, "attn.q", matrix(lambda t: low_rank(*t.shape, [0.5] * rank)))
    found = spectra(model, tuned)
    assert len(found.sites) == 3 and {s.role for s in found.sites} == {"attn.q"}
    for site in found.sites:
        assert site.effective_rank == pytest.approx(rank, rel=1e-3) and site.stable_rank == pytest.approx(
            rank, rel=1e-3
        )
    assert smallest_size(found, 0.999).size == rank
    assert f"{rank}.0 at attn.q" in found.finding


def test_a_tied_matrix_counts_once_under_the_name_that_has_a_role():
    model = tiny.t5()  # embeddings of both stacks and head are one parameter, which `shared` owns
    found = spectra(model, changed(model, "path:shared", matrix(lambda t: low_rank(*t.shape, [2.0, 1.0]))))
    assert [site.role for site in found.sites] == ["embed"]
    assert found.sites[0].energy == pytest.approx(5.0, rel=1e-3)


def test_ranks_are_those_of_the_formulas():
    site = spectrum(2.0, 1.0, 1.0)
    p = np.array([0.5, 0.25, 0.25])
    assert site.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert site.stable_rank == pytest.approx(6 / 4)
    assert [site.rank(share) for share in (0.5, 4 / 6, 0.7, 5 / 6, 1.0)] == [1, 1, 2, 2, 3]
    nothing = spectrum(0.0, 0.0)
    assert (nothing.effective_rank, nothing.stable_rank, nothing.rank(0.9)) == (0, 0, 0)


def test_one_size_for_all_sites_keeps_the_share_of_the_sum():
    found = smallest_size(Spectra((spectrum(3.0, 0.0), spectrum(1.0, 1.0))), 0.9)
    assert found.curve == pytest.approx((0.0, 10 / 11, 1.0))
    assert found.size == 1 and smallest_size(Spectra((spectrum(3.0, 0.0), spectrum(1.0, 1.0))), 0.95).size == 2
    assert "keeps 90.9 %" in found.finding


def test_a_lora_has_the_spectrum_of_its_product_and_what_is_no_matrix_is_the_rest():
    model = tiny.bert()
    weights = busy(dt.LoRA(rank=2).at("attn.v") + dt.BitFit().at("norm"), model)
    found = spectra(model, weights)
    exact = dt.changes(model, weights)
    assert found.rest == pytest.approx(sum(float(c.square().sum()) for n, c in exact.items() if n.endswith("bias")))
    for site in found.sites:
        expected = np.linalg.svd(exact[f"{site.address}.weight"].numpy(), compute_uv=False)
        np.testing.assert_allclose(site.values, expected, atol=1e-10)
        assert smallest_size(found, 0.9999).by_site[site.address] == 2


def test_the_gradient_is_the_sum_over_batches():
    model = tiny.llama()
    data = batches(model, 3)
    found = gradient_spectra(model, "attn.v", data)
    paths = [f"model.layers.{layer}.self_attn.v_proj.weight" for layer in range(3)]
    weights = [model.get_parameter(path).requires_grad_() for path in paths]
    grads = torch.autograd.grad(sum(model(**b).loss for b in data), weights)
    for site, grad in zip(found.sites, grads, strict=True):
        np.testing.assert_allclose(site.values, torch.linalg.svdvals(grad).numpy(), atol=1e-5)
    assert "gradient of 3 batches" in found.finding


def test_a_planted_bottleneck_is_recovered():
    model = tiny.llama()
    down = changed(model, "ffn.down[-1]", matrix(lambda t: low_rank(*t.shape, [0.5] * 3)))
    found = output_spectra(model, None, down, batches(model), "ffn.down[-1]")
    values = np.array(found.sites[0].values)
    assert (values[:3] > 1e-3).all() and (values[3:] < 1e-6).all()
    assert smallest_bottleneck(model, down, batches(model), "ffn.down[-1]", 0.99999).size == 3


def test_deltas_that_change_no_weights_are_refused():
    model = tiny.llama()
    with pytest.raises(dt.DeltaTuneError, match="compare_answers"):
        spectra(model, dt.init(dt.PrefixTuning(length=2), model))
    with pytest.raises(dt.DeltaTuneError, match=r"train Full\(\)"):
        smallest_size(spectra(model, dt.init(dt.LoRA(rank=2), model)))
    with pytest.raises(dt.DeltaTuneError, match="share"):
        smallest_size(Spectra((spectrum(1.0),)), 0.0)


def test_the_rank_that_an_ordinary_run_needs(tmp_path):
    from deltatune.tuning import Recipe, Run

    recipe = Recipe(steps=3, batch=2, eval_every=0, test=False, checkpoint_every=0, shots=4)
    found = smallest_rank(Run('LoRA(rank=4).at("attn.q")', "pebble", "sentiment", recipe), tmp_path, 0.999)
    assert 1 <= found.size <= 4 and len(found.by_site) > 1
    with pytest.raises(dt.DeltaTuneError, match="without start"):
        smallest_rank(Run("Full()", "pebble", "sentiment", recipe, start=str(tmp_path)), tmp_path)
