"""OSF and AdaMSS against peft with the same tensors: function, gradients, parameters, errors."""

from __future__ import annotations

import pytest
import torch

import deltatune as dt
from deltatune.methods._kmeans import SEED, cluster
from deltatune.methods._subspaces import subspaces
from tests.reference.compare import copied
from tests.reference.single import D_IN, D_OUT, assert_same, inputs, leaves_of, peft_single, single, started


def osf_pair(shape):
    """Return our delta moved by a step that peft's hooks would allow, and peft's layer with the same tensors."""
    from peft import OSFConfig

    size = {"d_in": shape[0], "d_out": shape[1]}
    model = single(**size)
    weights = dt.init(dt.OSF().at("path:layer"), model)
    layer = peft_single(OSFConfig(target_modules=["layer"]), **size)
    theirs = layer.osf_svd_params["default"]
    fixed = {n.rpartition(".")[2]: t for n, t in weights.fixed.items()}
    for leaf, name in {"u": "U_low", "s": "S_low", "v": "V_low"}.items():
        torch.testing.assert_close(weights.tensors[f"0.layer.{leaf}"], theirs[name].detach(), rtol=0, atol=1e-5)
    noise = torch.Generator().manual_seed(2)
    for leaf, tensor in weights.tensors.items():
        step = torch.randn(tensor.shape, generator=noise) * 0.3
        if leaf.endswith("u"):
            step -= fixed["Uh"] @ fixed["Uh"].T @ step
        if leaf.endswith("v"):
            step -= step @ fixed["Vh"].T @ fixed["Vh"]
        tensor.add_(step)
    for leaf, name in {"u": "U_low", "s": "S_low", "v": "V_low"}.items():
        copied(theirs[name], weights.tensors[f"0.layer.{leaf}"])
    return model, weights, layer


@pytest.mark.parametrize("shape", [(24, 20), (20, 24), (16, 16)])
def test_osf_equals_peft_and_so_do_the_gradients_that_its_hooks_project(shape):
    model, weights, layer = osf_pair(shape)
    assert_same(model, weights, layer, tolerance=1e-4)
    k = min(shape) - min(shape) // 2
    assert weights.count == k * (sum(shape) + 1) == sum(p.numel() for p in layer.osf_svd_params.parameters())
    attachment, x = dt.attach(model, weights), inputs(shape[0])
    model(x).square().sum().backward()
    layer(x).square().sum().backward()
    gradients = {n: p.grad for n, p in attachment.named_parameters()}
    for leaf, name in {"u": "U_low", "s": "S_low", "v": "V_low"}.items():
        reference = layer.osf_svd_params["default"][name].grad
        torch.testing.assert_close(gradients[f"0.layer.{leaf}"], reference, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_osf_leaves_the_major_directions_alone_wherever_training_goes():
    model, weights = started(dt.OSF(keep=0.25), size=0.5)
    W, new = model.layer.weight, dt.merge(model, weights)["layer.weight"]
    major = weights.fixed["0.layer.Uh"]
    assert major.shape == (D_OUT, 5)
    torch.testing.assert_close(major.T @ new, major.T @ W, rtol=0, atol=1e-4)
    assert (new - W).abs().max() > 0.1


def test_osf_refuses_what_is_not_a_share():
    for keep in (0.0, 1.0, 2.0):
        with pytest.raises(dt.DeltaTuneError, match="write a number between 0 and 1"):
            dt.OSF(keep=keep)
    with pytest.raises(dt.DeltaTuneError, match="keeps none of the 20 directions of 'layer'; write keep=0.05 or more"):
        dt.sites(single(), dt.OSF(keep=0.01).at("path:layer"))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [1, 2])
def test_adamss_equals_peft_with_the_same_groups(bias, rank):
    from peft import AdamssConfig

    model, weights = started(dt.AdaMSS(size=10, groups=3, rank=rank), bias=bias)
    config = AdamssConfig(r=10, num_subspaces=3, subspace_rank=rank, target_modules=["layer"])
    layer, leaves = peft_single(config, bias=bias), leaves_of(model, weights)
    basis = torch.cat([leaves["V"], leaves["c"][:, None]], 1) if bias else leaves["V"]
    copied(layer.adamss_newB["default"], basis)
    rows = [torch.where(leaves["g"] == i)[0] for i in range(3)]
    layer.scatter_index["default"] = torch.cat(rows)
    for i in range(3):
        layer.adamss_A["default"][i].data = leaves["A"][i]
        layer.adamss_B["default"][i].data = leaves["B"][rows[i]]
    assert min(len(r) for r in rows) >= rank
    assert_same(model, weights, layer)
    assert weights.count == 3 * rank * 10 + D_OUT * rank


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_adamss_starts_from_the_directions_and_groups_that_peft_finds(bias):
    from peft import AdamssConfig

    model = single(bias=bias)
    weights = dt.init(dt.AdaMSS(size=10, groups=3, rank=2).at("path:layer"), model)
    held = {n.rpartition(".")[2]: t for n, t in weights.held.items()}
    config = AdamssConfig(r=10, num_subspaces=3, subspace_rank=2, target_modules=["layer"])
    layer = peft_single(config, bias=bias)
    basis = torch.cat([held["V"], held["c"][:, None]], 1) if bias else held["V"]
    torch.testing.assert_close(basis, layer.adamss_newB["default"], rtol=0, atol=1e-6)
    assert torch.equal(layer.scatter_index["default"], torch.cat([torch.where(held["g"] == i)[0] for i in range(3)]))
    U, _ = subspaces(dt.sites(model, weights.delta).placements[0].site, dict(model.layer.named_parameters()), 10)
    for i in range(3):  # peft's A approximates, by another random projection, what this recipe gives
        rows = U[held["g"] == i]
        Q, _ = torch.linalg.qr(rows.T @ torch.linalg.svd(rows @ rows.T).U[:, :2])
        torch.testing.assert_close((held["A"][i] @ Q).abs(), torch.eye(2), rtol=0, atol=1e-3)


@pytest.mark.parametrize("seed", range(8))
def test_groups_are_those_of_scikit_learn(seed):
    from sklearn.cluster import KMeans

    generator = torch.Generator().manual_seed(seed)
    count, width, groups = (
        int(torch.randint(*sizes, (), generator=generator)) for sizes in ((12, 300), (1, 20), (1, 12))
    )
    rows = torch.randn(count, width, generator=generator)
    theirs = KMeans(groups, init="random", n_init=1, max_iter=10, random_state=SEED).fit_predict(rows.numpy())
    assert cluster(rows, groups).tolist() == theirs.tolist()


def test_a_group_without_rows_gets_the_farthest_one():
    rows = torch.tensor([[0.0]] * 9 + [[5.0]])
    assert sorted(cluster(rows, 2).bincount().tolist()) == [1, 9]
    assert cluster(torch.zeros(4, 2), 3).tolist() == [0] * 4


def test_adamss_is_cut_to_the_widths_of_a_site_as_in_peft():
    leaves = dt.sites(single(), dt.AdaMSS().at("path:layer")).placements[0].leaves
    assert {n: leaf.shape for n, leaf in leaves.items()} == {
        "A": (5, 1, 20), "B": (D_OUT, 1), "V": (20, D_IN), "c": (20,), "g": (D_OUT,),
    }  # fmt: skip
    with pytest.raises(dt.DeltaTuneError, match=r"AdaMSS\(groups=0\) cannot be built"):
        dt.AdaMSS(groups=0)
