"""DID and SAID against a dense projection written out from its definition, H G Pi H B in blocks (Le et al., 2013)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import deltatune as dt
from deltatune.core.delta import place
from deltatune.core.weights import generate
from tests import tiny
from tests.laws.cases import busy


def dense(signs, order, gains, size):
    """The projection as a matrix [size, n], built block by block from the definition of a Walsh-Hadamard matrix."""
    n = signs.shape[1]
    H = np.array([[(-1.0) ** bin(i & j).count("1") for j in range(n)] for i in range(n)])
    permute = np.eye(n)[order]
    rows = [H @ np.diag(g) @ permute @ H @ np.diag(b) for g, b in zip(gains, signs, strict=True)]
    return np.concatenate(rows)[:size] / (np.sqrt(n) * np.sqrt(size))


@pytest.mark.parametrize("method", [dt.DID(dim=6), dt.SAID(dim=6)])
def test_every_parameter_moves_by_its_own_projection_of_one_vector(method):
    model = tiny.plain()
    weights = busy(dt.init(method, model), size=0.5)
    state = dt.merge(model, weights)
    seeded = generate(model, place(model, weights.delta), weights.seed, "seeded", {})
    z = np.pad(weights.tensors["0.*.z"].numpy().astype(float), (0, 2))
    assert len(state) == len(list(model.named_parameters()))
    for name, theta in model.named_parameters():
        leaves = {leaf: seeded[f"0.{name}.{leaf}"].double().numpy() for leaf in ("signs", "gains")}
        order = seeded[f"0.{name}.order"].numpy()
        moved = dense(leaves["signs"], order, leaves["gains"], theta.numel()) @ z
        scale = float(weights.tensors[f"0.{name}.scale"]) if isinstance(method, dt.SAID) else 1.0
        expected = theta.detach().double() + scale * torch.from_numpy(moved).view(theta.shape)
        torch.testing.assert_close(state[name].double(), expected, rtol=0, atol=1e-5)


def test_the_count_is_the_dimension_and_one_scale_a_tensor_and_the_rest_is_never_stored(tmp_path):
    model = tiny.plain()
    tensors = len(list(model.named_parameters()))
    assert dt.init(dt.DID(dim=100), model).count == 100
    weights = dt.init(dt.SAID(dim=100), model)
    assert weights.count == 100 + tensors
    dt.save(weights, tmp_path)
    assert sum(t.numel() for t in dt.Weights.read(tmp_path).held.values()) == 100 + tensors


def test_the_projection_keeps_lengths_on_average():
    model = tiny.plain()
    weights = dt.init(dt.DID(dim=200), model)
    z = torch.randn(200, generator=torch.Generator().manual_seed(0))
    moved = dt.Weights(weights.delta, {"0.*.z": z}, weights.backbone)
    for name, tensor in dt.merge(model, moved).items():
        if tensor.numel() >= 1024:
            change = (tensor - model.get_parameter(name)).norm()
            assert 0.7 < change / z.norm() < 1.4


def test_no_dimension_is_refused():
    with pytest.raises(dt.DeltaTuneError, match="dim=0"):
        dt.DID(dim=0)
