"""Deltas: methods at wheres. A delta is a value: it prints, hashes, compares, adds, and travels as text or JSON."""

from __future__ import annotations

import ast
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from deltatune.core.leaf import Leaf
from deltatune.core.method import Method
from deltatune.core.site import Anatomy, Site, anatomy, read_by
from deltatune.core.spec import evaluate, from_json, literal, read
from deltatune.core.stored import Values, device, quantised, shape
from deltatune.core.walk import submodule
from deltatune.core.where import select
from deltatune.errors import DeltaTuneError


@dataclass(frozen=True)
class Term:
    """One method at one where."""

    where: str
    method: Method

    def __str__(self) -> str:
        return str(self.method) if self.where == self.method.where else f"{self.method}.at({literal(self.where)})"


@dataclass(frozen=True)
class Delta:
    """A set of (where, method) pairs. `d1 + d2` does both, at one site in the order written; `Delta()` does nothing."""

    terms: tuple[Term, ...] = ()

    def __add__(self, other: Delta | Method) -> Delta:
        return Delta(self.terms + as_delta(other).terms)

    def __str__(self) -> str:
        return " + ".join(map(str, self.terms)) or "Delta()"

    def to_json(self) -> list[dict[str, Any]]:
        """Return a JSON value that `parse` reads back."""
        return [{"where": term.where, "method": term.method.to_json()} for term in self.terms]


@dataclass(frozen=True)
class Placement:
    """One method at one site of one backbone, with the leaves it declares there; `term` is its index in the delta."""

    term: int
    method: Method
    site: Site
    leaves: dict[str, Leaf]

    def name(self, leaf: str) -> str:
        """Return the name of a leaf's tensor in the weights: `term.address.leaf`, or `term.*.leaf` when shared."""
        return f"{self.term}.{'*' if self.leaves[leaf].scope == 'delta' else self.site.address}.{leaf}"


def as_delta(what: Delta | Method) -> Delta:
    """Return a method as the delta that does it at its default place; a delta as it is."""
    return what if isinstance(what, Delta) else what.at(what.where)


def parse(text: str | list[Any]) -> Delta:
    """Read a delta from its text, e.g. `LoRA(rank=8).at("attn.{q,v}") + BitFit()`, or from its JSON value."""
    if isinstance(text, str):
        return _parse_sum(read(text), text)
    if not isinstance(text, list) or not all(isinstance(t, dict) and t.keys() == {"where", "method"} for t in text):
        raise DeltaTuneError(f'a delta is a list of {{"where": ..., "method": {{...}}}}; found {text!r}.')
    for term in text:
        if not isinstance(term["where"], str):
            raise DeltaTuneError(f"a where is a text such as attn.{{q,v}}; found {term['where']!r}.")
    return Delta(tuple(Term(term["where"], from_json(term["method"], Method)) for term in text))


def _parse_sum(node: ast.expr, text: str) -> Delta:
    match node:
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return _parse_sum(left, text) + _parse_sum(right, text)
        case ast.Call(func=ast.Name(id="Delta"), args=[], keywords=[]):
            return Delta()
        case ast.Call(func=ast.Attribute(value=value, attr="at"), args=[ast.Constant(value=str(where))], keywords=[]):
            return _method(value, text).at(where)
    return as_delta(_method(node, text))


def _method(node: ast.expr, text: str) -> Method:
    value = evaluate(node, text, Method)
    if not isinstance(value, Method):
        raise DeltaTuneError(
            f'{ast.unparse(node)!r} in {text!r} is not a method; write for example LoRA(rank=8).at("attn.q").'
        )
    return value


def place(model: nn.Module, delta: Delta, parts: Anatomy | None = None) -> list[Placement]:
    """Find every site of `delta` in `model` and what each method declares there; touches nothing.

    Raises `DeltaTuneError` when a where matches nothing or finds a site that its method cannot act on.
    """
    parts, placements = parts or anatomy(model), []
    for index, term in enumerate(delta.terms):
        sites = _sites(model, term, parts)
        if not sites:
            raise DeltaTuneError(f"{term.where!r} of {term.method} matches nothing in this {parts.family}.")
        declared = term.method.leaves_at(sites, partial(_own, model))
        placements += [Placement(index, term.method, *at) for at in zip(sites, declared, strict=True)]
    _check_shared(placements)
    return placements


def _own(model: nn.Module, site: Site) -> Values:
    return Values(model.get_submodule(site.path))


def _sites(model: nn.Module, term: Term, parts: Anatomy) -> list[Site]:
    sites = select(model, term.where, parts)
    for site in sites:
        if site.kind not in term.method.kinds:
            wanted = " or ".join(term.method.kinds)
            raise DeltaTuneError(
                f"{type(term.method).__name__} acts on a {wanted}, but {term.where!r} found the {site.kind} {site.path!r}; "
                f"its default place is {term.method.where!r}."
            )
        _check_called(model, term, site)
        if term.method.acts == "stream" and not site.width:
            raise DeltaTuneError(
                f"the width of {site.path!r} is not known; address a linear or a norm inside it instead."
            )
        if term.method.acts == "heads" and site.heads is None:
            raise DeltaTuneError(
                f"{site.path!r} is not an attention whose heads are known; {term.method} needs the role attn or cross."
            )
    if term.method.acts != "tensor":
        return sites
    found = _tensors(model, sites)
    taken = [site for site in found if term.method.takes(site)]
    if found and not taken:
        names = ", ".join(dict.fromkeys(site.tensor or "" for site in found))
        raise DeltaTuneError(f"{term.method} takes none of the parameters that {term.where!r} found: {names}.")
    for site in taken:
        _check_free(model, term, site.path, site.tensor or "")
    return taken


def _check_free(model: nn.Module, term: Term, path: str, name: str) -> None:
    """Raise `DeltaTuneError` for a method that puts a new value in the place of a quantised or offloaded parameter."""
    module = submodule(model, path)
    parameter = module._parameters.get(name)
    if parameter is not None and parameter.is_meta and device(module).type != "meta":
        raise DeltaTuneError(
            f"{term.method} puts a new value in the place of {path}.{name}, which is offloaded and comes back for each call. "
            "Keep that module on its device, or write a method on linear layers, such as LoRA()."
        )
    if parameter is not None and quantised(parameter):
        raise DeltaTuneError(
            f"{term.method} puts a new value in the place of {path}.{name}, which is quantised ({type(parameter).__name__}). "
            "Put it at parameters that are not, such as norms, or write a method on linear layers, such as LoRA()."
        )


def _check_called(model: nn.Module, term: Term, site: Site) -> None:
    """Raise `DeltaTuneError` for a method that needs a call of a linear layer where there is none."""
    over, method = read_by(model, site.path), term.method
    if over is not None and method.acts not in ("linear", "tensor"):
        raise DeltaTuneError(
            f"{method} would have no effect at {site.path!r}: the attention {over!r} reads its weight and never calls it; "
            f"write path:{over}."
        )
    if (
        method.acts == "linear"
        and "merge" in method.breaks
        and (over is not None or site.kind in ("embedding", "conv"))
    ):
        raise DeltaTuneError(
            f"{method} cannot act on {site.path!r}, where a method gives a new weight, as no linear layer is called there: "
            f"{method.breaks['merge']}. Put it at a linear layer."
        )
    if method.acts == "linear" and (over is not None or site.kind in ("embedding", "conv")):
        _check_free(model, term, site.path, "weight")


def _tensors(model: nn.Module, sites: list[Site]) -> list[Site]:
    """Replace each site by one site for every parameter in it, with its ties: all other places that hold the parameter."""
    modules = {p: m for p, m in model.named_modules(remove_duplicate=False) if p.split(".")[0] != "deltas"}
    owners: dict[int, list[tuple[str, str]]] = {}
    for path, module in modules.items():
        for name, tensor in module.named_parameters(recurse=False):
            owners.setdefault(id(tensor), []).append((path, name))
    found: dict[int, Site] = {}
    for site in sites:
        if site.part:
            raise DeltaTuneError(
                f"{site.role} is packed with other roles in {site.path!r}; name the whole module by path:{site.path}."
            )
        inside = tuple(f"{end}." if end else "" for end in (site.path, site.exit) if end is not None)
        for path, module in modules.items():
            if f"{path}.".startswith(inside):
                for name, tensor in module.named_parameters(recurse=False):
                    ties = tuple(place for place in owners[id(tensor)] if place != (path, name))
                    own = replace(site, path=path, exit=None, tensor=name, shape=shape(tensor), ties=ties)
                    found.setdefault(id(tensor), own)
    return list(found.values())


def _check_shared(placements: list[Placement]) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for placement in placements:
        for name, leaf in placement.leaves.items():
            if leaf.scope == "delta" and shapes.setdefault(placement.name(name), leaf.shape) != leaf.shape:
                raise DeltaTuneError(
                    f"{placement.method} shares {name!r} over all its sites, but {placement.site.path!r} needs the shape {leaf.shape} "
                    f"and an earlier site {shapes[placement.name(name)]}; write one term for each width."
                )


@dataclass(frozen=True)
class SiteTable:
    """The dry run of a delta on a backbone: where it would act and what it would train."""

    delta: Delta
    placements: tuple[Placement, ...]
    backbone_parameters: int

    @property
    def tensors(self) -> dict[str, Leaf]:
        """Every leaf by its name in the weights."""
        return {p.name(leaf): declared for p in self.placements for leaf, declared in p.leaves.items()}

    @property
    def parameters(self) -> int:
        """The number of trained parameters |delta|."""
        return sum(_numel(leaf) for leaf in self.tensors.values() if leaf.trained)

    @property
    def share(self) -> float:
        """Trained parameters over all those of the network, inserted ones included, in percent (Ding et al., 2022, table 2)."""
        instead = {p.name(leaf) for p in self.placements if p.method.acts == "tensor" for leaf in p.leaves}
        inserted = sum(_numel(leaf) for name, leaf in self.tensors.items() if leaf.trained and name not in instead)
        return 100 * self.parameters / max(self.backbone_parameters + inserted, 1)

    def rows(self) -> list[tuple[str, str, str, str, int]]:
        """Return (path, role, method, leaf shapes, trained parameters) of each placement; shared leaves count once."""
        seen: Counter[str] = Counter()
        table = []
        for p in self.placements:
            shapes = ", ".join(f"{n} {list(leaf.shape)}" for n, leaf in p.leaves.items())
            new = [n for n in p.leaves if not seen[p.name(n)]]
            seen.update(p.name(n) for n in p.leaves)
            table.append(
                (
                    p.site.address,
                    p.site.role,
                    str(p.method),
                    shapes,
                    sum(_numel(p.leaves[n]) for n in new if p.leaves[n].trained),
                )
            )
        return table

    def __str__(self) -> str:
        rows = [("path", "role", "method", "leaves", "parameters")] + [(*r[:4], f"{r[4]:,}") for r in self.rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = [
            "  ".join(
                c.rjust(w) if i == 4 else c.ljust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))
            ).rstrip()
            for r in rows
        ]
        share = f"{self.share:.3g} % of {self.backbone_parameters:,}"
        total = f"{self.delta}: {len(self.placements)} sites, {self.parameters:,} parameters, {share}"
        return "\n".join([*lines, total])


def _numel(leaf: Leaf) -> int:
    count = 1
    for size in leaf.shape:
        count *= size
    return count


def sites(model: nn.Module, delta: Delta | Method) -> SiteTable:
    """Show where `delta` would act in `model` and how many parameters it would train; touches nothing, works on meta tensors."""
    delta = as_delta(delta)
    own = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("deltas."))
    return SiteTable(delta, tuple(place(model, delta)), own)
