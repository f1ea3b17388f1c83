"""FourierFT and WaveFT against peft's layers with the same coefficients, and the transform written out."""

from __future__ import annotations

import cmath

import pytest
import torch

import deltatune as dt
from deltatune.core.method import Bag
from deltatune.methods.reparameterization.fourierft import FourierFT
from deltatune.methods.reparameterization.waveft import WaveFT
from tests.reference.one_linear import inputs, layer, wrapped


def tensors(entries=30, d_in=24, d_out=40):
    generator = torch.Generator().manual_seed(5)
    idx = torch.randperm(d_in * d_out, generator=generator)[:entries]
    return Bag({"c": torch.randn(entries, generator=generator), "idx": idx})


def check(method, config, names, p, d_in, d_out):
    """Assert that peft, given our coefficients and entries, has our outputs, gradients and merged weight."""
    spectrum, indices = names
    model, reference, x = layer(d_in, d_out), wrapped(config, layer(d_in, d_out)), inputs(d_in)
    theirs = reference.base_model.model.only
    getattr(theirs, spectrum)["default"].data.copy_(p.c)
    getattr(theirs, indices)["default"] = torch.stack([p.idx // d_in, p.idx % d_in])
    p.c.requires_grad_()
    ours, other = method.output(p, x, model(x), model.only), reference(x)
    assert (ours - model(x)).abs().max() > 1e-2
    torch.testing.assert_close(ours, other, rtol=0, atol=1e-5)
    ours.square().mean().backward()
    other.square().mean().backward()
    torch.testing.assert_close(p.c.grad, getattr(theirs, spectrum)["default"].grad, rtol=1e-4, atol=1e-6)
    merged = reference.merge_and_unload().only.weight
    torch.testing.assert_close(method.weight(p, model.only.weight), merged, rtol=0, atol=1e-6)


def test_fourierft_equals_peft_with_the_same_coefficients_and_entries():
    from peft import FourierFTConfig

    config = FourierFTConfig(n_frequency=30, scaling=90.0, target_modules=["only"])
    check(FourierFT(30, scale=90.0), config, ("fourierft_spectrum", "indices"), tensors(), 24, 40)


@pytest.mark.parametrize(("d_in", "d_out"), [(24, 40), (23, 39), (24, 39)])
def test_waveft_equals_peft_with_the_same_coefficients_and_entries(d_in, d_out):
    from peft import WaveFTConfig

    config = WaveFTConfig(n_frequency=30, scaling=5.0, target_modules=["only"])
    p = tensors(30, d_in, d_out)
    check(WaveFT(30, scale=5.0), config, ("waveft_spectrum", "waveft_indices"), p, d_in, d_out)


@torch.no_grad()
def test_the_change_is_the_inverse_transform_written_out():
    p, W = tensors(4, 3, 5), torch.zeros(5, 3)
    expected = torch.zeros(5, 3)
    for k in range(4):
        j, i = divmod(int(p.idx[k]), 3)
        for m in range(5):
            for n in range(3):
                expected[m, n] += 7.0 * float(p.c[k]) * cmath.exp(2j * cmath.pi * (j * m / 5 + i * n / 3)).real / 15
    torch.testing.assert_close(FourierFT(4, scale=7.0).weight(p, W), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", [FourierFT, WaveFT])
def test_the_entries_are_distinct_and_only_the_coefficients_count(method):
    model = layer()
    weights = dt.init(method(entries=960).at("path:only"), model)
    attachment = dt.attach(model, weights)
    (idx,) = attachment.leaves.buffers()
    assert sorted(idx.tolist()) == list(range(960))
    assert weights.count == 960


@pytest.mark.parametrize("method", [FourierFT, WaveFT])
@pytest.mark.parametrize(("entries", "words"), [(0, "entries=1 or more"), (961, "960 entries of 'only': 40 x 24")])
def test_entries_that_do_not_fit_are_refused(method, entries, words):
    with pytest.raises(dt.DeltaTuneError, match=words):
        dt.sites(layer(), method(entries).at("path:only"))
