"""Changes of weights, measured and written as another delta.

    Delta = W' - W        what weights do to one parameter of the backbone, computed in float64

`to_full` writes changes as new values and `to_lora` as the best product of rank r, which is what the largest singular
values keep (Eckart and Young, 1936):

    Delta = U S V^T ~ B A        A = sqrt(S_r) V_r^T   B = U_r sqrt(S_r)        |Delta - B A|^2 = sum_(k > r) S_k^2

Changed biases become BitFit's in both. What is written is merged again and compared: the report has the error of every
parameter, and above its tolerance nothing is returned.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core.delta import Delta, Term, place
from deltatune.core.fit import check_backbone
from deltatune.core.merge import merge, precisely
from deltatune.core.method import Method
from deltatune.core.report import TOLERANCE, Report, refuse
from deltatune.core.site import Site, anatomy, describe
from deltatune.core.spec import build
from deltatune.core.stored import values
from deltatune.core.weights import Weights, fingerprint
from deltatune.core.where import select
from deltatune.errors import DeltaTuneError

Changes = dict[str, Tensor]  # float64, by the path of the parameter
CANCELLED = 1e-3  # where terms cancel to less of their size, the error is relative to this share of it


@torch.no_grad()
def changes(model: nn.Module, weights: Weights, check: bool = True) -> Changes:
    """Return W' - W in float64 for every parameter that the weights change; the model is not touched.

    Raises `DeltaTuneError` for a method that no weight can express, for weights of another backbone (`check=False`
    allows other values), and for a backbone whose values are not numbers that can be computed with.
    """
    for term in weights.delta.terms:
        if "merge" in term.method.breaks:
            raise DeltaTuneError(
                f"{term.method} has no change of a weight to compute with: {term.method.breaks['merge']}."
            )
    exact = _in_float64(model, weights.delta)
    check_backbone(weights.backbone, fingerprint(model), check)
    merged = merge(
        exact, weights, untie=True, check=False
    )  # the values of a quantised backbone are not its fingerprint
    for name, new in merged.items():
        before = _parameter(exact, name)
        merged[name] = new.detach() if before is None else new.detach() - before.detach()
    return merged


def _in_float64(model: nn.Module, delta: Delta) -> nn.Module:
    """Return the model with what the delta can change in float64 on the CPU, room for biases, and all else shared."""
    memo: dict[int, Any] = {id(t): t for t in chain(model.parameters(), model.buffers())}
    paths = dict.fromkeys(placement.site.path for placement in place(model, delta))
    for path in paths:
        module = model.get_submodule(path)
        for name, tensor in module.named_parameters(recurse=False):
            theta = tensor.detach() if tensor.is_meta else values(tensor, module).detach()
            if theta.is_meta or not theta.is_floating_point():
                kind = "on the meta device" if theta.is_meta else f"stored as {theta.dtype}"
                raise DeltaTuneError(
                    f"{path}.{name} is {kind}, so its change cannot be computed; load the backbone in a float type."
                )
            memo[id(tensor)] = nn.Parameter(theta.to("cpu", torch.float64, copy=True), requires_grad=False)
    exact = copy.deepcopy(model, memo)
    for path in paths:
        exact.get_submodule(path)._parameters.setdefault("bias", None)  # the copy measures, and is never called
    return exact


def _parameter(model: nn.Module, name: str) -> Tensor | None:
    owner, _, leaf = name.rpartition(".")
    return model.get_submodule(owner)._parameters.get(leaf)


def measure(
    model: nn.Module, weights: Weights, exact: Changes, tolerance: float, sizes: Mapping[str, float] | None = None
) -> Report:
    """Return how far the changes that the weights make are from `exact` ones.

    `sizes` has the sum of the norms of the terms that an exact change was added up from.
    """
    made, errors, none = changes(model, weights, check=False), {}, torch.zeros((), dtype=torch.float64)
    for name in dict.fromkeys([*exact, *made]):
        wanted = exact.get(name, none)
        off = float((made.get(name, none) - wanted).norm())
        base = max(float(wanted.norm()), CANCELLED * (sizes or {}).get(name, 0.0))
        errors[name] = off / base if base else (0.0 if off == 0 else float("inf"))
    return Report(errors, tolerance)


def to_full(
    model: nn.Module, weights: Weights, tolerance: float = TOLERANCE, check: bool = True
) -> tuple[Weights, Report]:
    """Return weights of any mergeable delta as new values of the parameters that they change: theta + Delta."""
    return written(model, changes(model, weights, check), [weights], None, tolerance)


def to_lora(
    model: nn.Module, weights: Weights, rank: int, tolerance: float = TOLERANCE, check: bool = True
) -> tuple[Weights, Report]:
    """Return weights of any mergeable delta on linear layers as a LoRA: the rank-r part of Delta = U S V^T, A = sqrt(S) V^T, B = U sqrt(S).

    Of a LoRA it changes the rank. Changed biases become a BitFit beside it. Raises `DeltaTuneError` above the tolerance,
    with the rank that would do, and for changes that are not of a linear layer.
    """
    return written(model, changes(model, weights, check), [weights], rank, tolerance)


@torch.no_grad()
def written(
    model: nn.Module,
    exact: Changes,
    sources: Sequence[Weights],
    rank: int | None,
    tolerance: float,
    sizes: Mapping[str, float] | None = None,
) -> tuple[Weights, Report]:
    """Return changes as weights, of Full or of a LoRA of a rank, with their measured errors."""
    if rank is None:
        delta, tensors = _as_values(model, exact)
        cure = "float32 values cannot hold a change this small beside the value; write rank=..., or allow more."
    else:
        delta, tensors, spectra = _as_products(model, exact, sources, rank)
        cure = _rank_that_does(spectra, tolerance)
    first = sources[0]
    weights = Weights(delta, tensors, first.backbone, first.seed)
    report = measure(model, weights, exact, tolerance, sizes)
    refuse(report, cure)
    return weights, report


def _as_values(model: nn.Module, exact: Changes) -> tuple[Delta, dict[str, Tensor]]:
    new = [name for name in exact if _parameter(model, name) is None]
    delta, tensors = Delta(), {}
    owners = _owners(name for name in exact if name not in new)
    if owners:
        delta += Delta((Term(_paths(owners), build("Full", {}, Method)),))
        by_place = {(id(model.get_submodule(_owner(name))), name.rpartition(".")[2]): name for name in exact}
        for placement in place(model, delta):
            theta = _parameter(model, _name(placement.site.path, placement.site.tensor or ""))
            assert theta is not None
            precise = precisely(theta, model.get_submodule(placement.site.path))
            change = _of_one_value(model, placement.site, by_place, exact)
            value = precise if change is None else (precise.double() + change).to(precise.dtype)
            tensors[placement.name("value")] = value.clone()
    return _with_biases(model, delta, tensors, {name: exact[name] for name in new})


def _of_one_value(model: nn.Module, site: Site, by_place: dict[tuple[int, str], str], exact: Changes) -> Tensor | None:
    """Return the change of a parameter, which all places that share it have to agree on."""
    places = dict.fromkeys((id(model.get_submodule(p)), name) for p, name in [(site.path, site.tensor), *site.ties])
    found = [exact[by_place[p]] for p in places if p in by_place]
    if found and not (len(found) == len(places) and all(torch.equal(change, found[0]) for change in found)):
        raise DeltaTuneError(
            f"{site.path}.{site.tensor} is shared with {'.'.join(site.ties[0])}, and they change differently, which new values "
            "cannot hold; write rank=... for a LoRA."
        )
    return found[0] if found else None


def _as_products(
    model: nn.Module, exact: Changes, sources: Sequence[Weights], rank: int
) -> tuple[Delta, dict[str, Tensor], dict[Site, Tensor]]:
    matrices, biases = _sorted(model, exact)
    spectra: dict[Site, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    delta = Delta()
    if matrices:
        method = lora(rank, float(rank))
        delta += Delta((Term(_where(model, list(matrices), sources, method), method),))
        for placement in place(model, delta):
            site = placement.site
            U, S, Vt = torch.linalg.svd(site.matrix(exact[_name(site.path, "weight")]), full_matrices=False)
            spectra[site], root = S, S[:rank].sqrt()
            tensors[placement.name("A")] = (root[:, None] * Vt[:rank]).float().contiguous()
            tensors[placement.name("B")] = (U[:, :rank] * root).float().contiguous()
    return *_with_biases(model, delta, tensors, biases), spectra


def lora(rank: int, alpha: float) -> Method:
    """Return a LoRA, which the core knows by its name alone."""
    return build("LoRA", {"rank": rank, "alpha": alpha}, Method)


def _sorted(model: nn.Module, exact: Changes) -> tuple[Changes, Changes]:
    """Return the changes of matrices and those of biases; raises `DeltaTuneError` for any others."""
    matrices: Changes = {}
    biases: Changes = {}
    for name, change in exact.items():
        path, _, leaf = name.rpartition(".")
        kind = describe(Site("path", path), model.get_submodule(path), 0).kind
        if leaf == "weight" and kind in ("linear", "embedding", "conv"):
            matrices[name] = change
        elif leaf == "bias" and kind in ("linear", "norm"):
            biases[name] = change
        else:
            raise DeltaTuneError(
                f"{name!r} changes too, and it is neither the weight nor the bias of a linear layer (it belongs to a {kind}), so "
                "no LoRA can hold it; keep the method, or write it as new values: to_full(model, weights)."
            )
    return matrices, biases


def _where(model: nn.Module, names: list[str], sources: Sequence[Weights], method: Method) -> str:
    """Return where the matrices are: as the sources say it, so that packed roles stay apart, or else by their paths."""
    wheres = list(dict.fromkeys(term.where for source in sources for term in source.delta.terms))
    said = wheres[0] if len(wheres) == 1 else "{" + ",".join(wheres) + "}"
    sites = select(model, said, anatomy(model))
    whole = {site.path for site in sites if site.part is None}
    split = {site.path for site in sites if site.part is not None}
    plain = all(site.kind in method.kinds and site.side == "out" for site in sites)
    owners = _owners(names)
    return said if plain and not whole & split and whole | split == set(owners) else _paths(owners)


def _with_biases(
    model: nn.Module, delta: Delta, tensors: dict[str, Tensor], biases: Changes
) -> tuple[Delta, dict[str, Tensor]]:
    if biases:
        delta += Delta((Term(_paths(_owners(biases)), build("BitFit", {}, Method)),))
        for placement in (p for p in place(model, delta) if p.term == len(delta.terms) - 1):
            change = biases[_name(placement.site.path, "bias")]
            tensors[placement.name("b")] = change.float()
    return delta, tensors


def _name(owner: str, leaf: str) -> str:
    return f"{owner}.{leaf}" if owner else leaf


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _owners(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(map(_owner, names)))


def _paths(owners: list[str]) -> str:
    wheres = [f"path:{owner}" for owner in owners]
    return wheres[0] if len(wheres) == 1 else "{" + ",".join(wheres) + "}"


def _rank_that_does(spectra: dict[Site, Tensor], tolerance: float) -> str:
    """Say which rank keeps the tail of every spectrum within the tolerance."""
    needed = {site: least_rank(S, tolerance) for site, S in spectra.items()}
    most = max(needed, key=lambda site: needed[site], default=None)
    if most is None:
        return "allow more."
    narrow = min(spectra, key=lambda site: min(site.d_in, site.d_out))
    words = f"rank={needed[most]}, which {most.address!r} needs, would do"
    if needed[most] > min(narrow.d_in, narrow.d_out):
        return f"{words}, but {narrow.address!r} is only {narrow.d_out} x {narrow.d_in}; convert such places apart, or allow more."
    return f"{words}."


def least_rank(S: Tensor, tolerance: float) -> int:
    """Return the least r with sum_(k > r) S_k^2 <= tolerance^2 sum_k S_k^2, at least 1."""
    tail = S.square().flip(0).cumsum(0).flip(0).sqrt()  # tail[r] is what a rank of r loses
    return max(1, int((tail > tolerance * tail[0]).sum()))
