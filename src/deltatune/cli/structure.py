"""The page of `deltatune sites --html`: a backbone as a tree, with what a delta puts where, in one file without a network."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import torch
from torch import nn

from deltatune.core.delta import Placement, SiteTable
from deltatune.core.leaf import Leaf
from deltatune.core.site import anatomy

LEAF_BYTES = 4  # leaves are stored in float32


def page(name: str, model: nn.Module, table: SiteTable, dtype: str) -> str:
    """Return the page; `dtype` is what a parameter of the backbone is stored in."""
    import jinja2

    from deltatune.study.palette import DARK, LIGHT

    loader = jinja2.FileSystemLoader([str(files("deltatune") / part / "templates") for part in ("cli", "study")])
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    content = structure(model, table, dtype)
    inside = json.dumps(content, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    colors = list(zip(LIGHT[:-1], DARK[:-1], strict=True))
    facts = _facts(model, table, content)
    return environment.get_template("sites.html.j2").render(name=name, facts=facts, data=inside, colors=colors)


def structure(model: nn.Module, table: SiteTable, dtype: str) -> dict[str, Any]:
    """Return the backbone as nested modules, with roles, parameters and sites, and the terms of the delta, as JSON."""
    roles: dict[str, list[str]] = {}
    for place in anatomy(model).places:
        roles.setdefault(place.path, []).append(place.role)
    here: dict[str, list[Placement]] = {}
    for placement in table.placements:
        here.setdefault(placement.site.path, []).append(placement)
    owners: dict[int, str] = {}

    def node(path: str, name: str, module: nn.Module) -> list[Any]:
        own = [_parameter(owners, path, key, p) for key, p in module.named_parameters(recurse=False)]
        inner = [(key, child) for key, child in module.named_children() if path or key != "deltas"]
        kids = [node(f"{path}.{key}".lstrip("."), key, child) for key, child in inner]
        return [name, type(module).__name__, roles.get(path, []), own, [_site(p) for p in here.get(path, [])], kids]

    size = torch.empty((), dtype=getattr(torch, dtype)).element_size()
    return {"bytes": size, "dtype": dtype, "terms": _terms(table), "root": node("", "", model)}


def _parameter(owners: dict[int, str], path: str, name: str, parameter: nn.Parameter) -> list[Any]:
    """Return name, shape, and the path of the parameter that it is the same as, if it is another's."""
    full = f"{path}.{name}".lstrip(".")
    owner = owners.setdefault(id(parameter), full)
    return [name, list(parameter.shape), owner if owner != full else ""]


def _site(placement: Placement) -> list[Any]:
    """Return the term, what there is to say about the place, and the leaves that are this site's own."""
    site = placement.site
    notes = [site.role.rpartition(".")[2]] if site.part else []
    notes += [site.tensor] if site.tensor else []
    notes += ["at its input"] if site.side == "in" else []
    notes += [f"to {site.exit}"] if site.exit else []
    notes += [f"shared with {path}" for path, _ in site.ties]
    own = {name: leaf for name, leaf in placement.leaves.items() if leaf.scope == "site"}
    return [placement.term, ", ".join(notes), _leaves(own)]


def _leaves(leaves: dict[str, Leaf]) -> list[Any]:
    return [[name, list(leaf.shape), leaf.kind] for name, leaf in leaves.items()]


def _terms(table: SiteTable) -> list[dict[str, Any]]:
    terms = []
    for index, term in enumerate(table.delta.terms):
        own = SiteTable(table.delta, tuple(p for p in table.placements if p.term == index), 0)
        shared = {name: leaf for p in own.placements for name, leaf in p.leaves.items() if leaf.scope == "delta"}
        words = {"method": str(term.method), "name": type(term.method).__name__, "where": term.where}
        counts = {"sites": len(own.placements), "trained": own.parameters, "shared": _leaves(shared)}
        terms.append({**words, **counts})
    return terms


def _facts(model: nn.Module, table: SiteTable, content: dict[str, Any]) -> dict[str, str]:
    from rich.filesize import decimal

    stored = sum(torch.Size(leaf.shape).numel() for leaf in table.tensors.values() if leaf.kind != "seeded")
    size = decimal(table.backbone_parameters * content["bytes"])
    return {
        "Backbone": f"{type(model).__name__}, {table.backbone_parameters:,} parameters, {size} in {content['dtype']}",
        "Delta": str(table.delta),
        "Acts at": f"{len(table.placements):,} sites",
        "Trains": f"{table.parameters:,} parameters, {table.share:.3g} % of the network",
        "File": f"{decimal(stored * LEAF_BYTES)}",
    }
