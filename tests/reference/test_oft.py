"""OFT and BOFT against peft's, and the rotation against Cayley's formula."""

from __future__ import annotations

import pytest
import torch

import deltatune as dt
from deltatune.methods.reparameterization.boft import BOFT
from deltatune.methods.reparameterization.oft import OFT
from tests.reference.one_linear import check_peft, inputs, layer, moved, wrapped


@pytest.mark.parametrize("share", [False, True])
def test_oft_equals_peft_with_the_same_tensors(share):
    from peft import OFTConfig

    config = OFTConfig(r=0, oft_block_size=8, block_share=share, use_cayley_neumann=False, target_modules=["only"])
    check_peft(OFT(8, share), config, {"Q": "oft_R.default.weight"})


@torch.no_grad()
def test_a_layer_rotated_by_oft_keeps_the_angles_between_its_rows():
    model = layer()
    weights, _ = moved(OFT(8), model, size=1.0)
    before, after = model.only.weight, dt.merge(model, weights)["only.weight"]
    torch.testing.assert_close(after @ after.T, before @ before.T, rtol=0, atol=1e-5)
    assert (after - before).abs().max() > 1e-1
    assert weights.count == 24 * (8 - 1) // 2


@pytest.mark.parametrize(
    ("block", "words"), [(1, "block=2 or more"), (16, r"width 24 of 'only'; write block=12 or 24")]
)
def test_a_block_that_does_not_fit_is_refused(block, words):
    with pytest.raises(dt.DeltaTuneError, match=words):
        dt.sites(layer(), OFT(block).at("path:only"))


@pytest.fixture(autouse=True)
def _without_a_compiler(monkeypatch):
    """Keep peft from building its CUDA extension, without which it has one factor."""
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)


def filled(triangles, size):
    """Return the skew matrices [..., size, size] whose upper triangles, row by row, are given."""
    full = torch.zeros(*triangles.shape[:-1], size, size)
    rows, columns = torch.triu_indices(size, size, 1)
    full[..., rows, columns] = triangles
    return full - full.mT


def test_boft_with_one_factor_equals_peft_with_the_same_tensors():
    from peft import BOFTConfig

    targets = {"Q": ("boft_R.default", lambda Q: filled(Q, 4)), "s": ("boft_s.default", lambda s: s[:, None])}
    check_peft(BOFT(4, factors=1), BOFTConfig(boft_block_size=4, target_modules=["only"]), targets)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor")
@pytest.mark.parametrize("factors", [2, 3])
def test_boft_is_the_product_of_its_permuted_factors(factors):
    from peft import BOFTConfig

    model, x = layer(), inputs()
    theirs = wrapped(BOFTConfig(boft_block_size=2, target_modules=["only"]), layer()).base_model.model.only
    weights, p = moved(BOFT(2, factors), model, size=0.5)
    product = torch.eye(24)
    for level in range(factors):
        Q = filled(p["Q"][level], 2)
        blocks = torch.block_diag(*[(torch.eye(2) - q) @ torch.linalg.inv(torch.eye(2) + q) for q in Q])
        P = theirs.perm2mat(theirs.block_butterfly_perm(24, 12 // 2**level, 1, factors - 1))
        product = P @ blocks @ P.T @ product
    expected = p["s"][:, None] * (model.only.weight @ product.T)
    torch.testing.assert_close(dt.merge(model, weights)["only.weight"], expected, rtol=0, atol=1e-5)
    with dt.attach(model, weights):
        torch.testing.assert_close(model(x), x @ expected.T + model.only.bias, rtol=0, atol=1e-5)
    assert weights.count == factors * 24 * (2 - 1) // 2 + 40


@pytest.mark.parametrize(
    ("block", "factors", "words"),
    [
        (3, 1, "even block"),
        (4, 0, "factors=1 or more"),
        (4, 3, "blocks of 16, which do not divide the width 24 of 'only'"),
    ],
)
def test_a_butterfly_that_does_not_fit_is_refused(block, factors, words):
    with pytest.raises(dt.DeltaTuneError, match=words):
        dt.sites(layer(), BOFT(block, factors).at("path:only"))
