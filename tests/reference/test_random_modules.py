"""Chosen places: random modules, and the half of BitFit."""

from __future__ import annotations

import pytest

import deltatune as dt
from deltatune.methods.specification.bitfit import bitfit_subset
from deltatune.methods.specification.random_modules import random_modules
from tests import tiny


@pytest.mark.parametrize("method", [dt.Full(), dt.LoRA(rank=2)])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_the_seed_chooses_a_share_of_the_modules(method, name):
    model = getattr(tiny, name)()
    place = "{attn.{q,k,v,o},ffn.{up,down}}"
    every = {p.site.address for p in dt.sites(model, dt.LoRA(rank=2).at(place)).placements}
    whole = {a.partition("[")[0] for a in every} if method == dt.Full() else every
    delta = random_modules(model, method, place, share=0.5, seed=3)
    found = {p.site.path if method == dt.Full() else p.site.address for p in dt.sites(model, delta).placements}
    assert len(delta.terms) == len(found) == round(0.5 * len(whole)) and found < whole
    assert delta == random_modules(model, method, place, share=0.5, seed=3)
    assert delta != random_modules(model, method, place, share=0.5, seed=4)
    assert random_modules(model, method, place, share=1.0).terms != delta.terms
    assert dt.parse(str(delta)) == delta


def test_every_module_is_as_likely_as_another():
    model, counts = tiny.llama(), {}
    for seed in range(100):
        for term in random_modules(model, dt.Full(), "attn.{q,k,v,o}", share=0.25, seed=seed).terms:
            counts[term.where] = counts.get(term.where, 0) + 1
    assert len(counts) == 12 and min(counts.values()) > 10 and max(counts.values()) < 45  # 25 expected


def test_a_share_that_makes_no_sense_is_refused():
    with pytest.raises(dt.DeltaTuneError, match=r"share=0.*above 0 and up to 1"):
        random_modules(tiny.llama(), dt.Full(), share=0.0)


def test_half_of_bitfit_is_the_biases_of_the_queries_and_of_the_first_ffn_layer():
    model = tiny.bert()
    table = dt.sites(model, bitfit_subset())
    assert {p.site.path.split(".", 4)[-1] for p in table.placements} == {"attention.self.query", "intermediate.dense"}
    assert table.parameters == 2 * (32 + 48)
