"""`spectrum`: what deltas do to the weights, site by site, and how much of fine-tuning's change families of deltas can express."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean

import deltatune as dt
from deltatune.theory.exhibit import Exhibit, Lines, Table, by_place
from deltatune.theory.residual import Residual, residuals
from deltatune.theory.spectrum import Spectra, Spectrum, spectra
from deltatune.theory.subject import OUTSIDE, Subject, is_full

LINEARS = "{attn.{q,k,v,o},cross.{q,k,v,o}?,ffn.{gate?,up,down}}"
FAMILIES = (*(f"LoRA(rank={rank}).at('{LINEARS}')" for rank in (1, 8, 32)), "LoRA(rank=8)", "LNTuning()")
SHOWN = 1e-6  # singular values below this share of the largest are left out of the plot


def spectrum(subject: Subject, families: Sequence[str] = ()) -> Exhibit:
    """Return the singular values of every matrix that the deltas change, and the residual of the first under each family.

    Without families, a delta of Full alone is measured under a few LoRAs and norms.
    """
    found = {name: spectra(subject.model, weights) for name, weights in subject.deltas.items()}
    asked = list(map(dt.parse, families or (FAMILIES if is_full(subject.first.delta) else ())))
    left = residuals(subject.model, subject.first, asked) if asked else []
    first = next(iter(found.values()))
    ranks, norms = by_layer(subject, first, rank), by_layer(subject, first, lambda s: sum(t.energy for t in s) ** 0.5)
    return Exhibit(
        "spectrum",
        subject.about,
        [*found.values(), *left],
        [_sites(subject, found), *([_residuals(left)] if left else [])],
        [_ranks(subject, found), *_values(subject, found)],
        {"effective rank of the change": ranks, "norm of the change": norms},
    )


def by_layer(
    subject: Subject, found: Spectra, value: Callable[[Sequence[Spectrum]], float | None]
) -> dict[str, float | None]:
    """Return one value for the sites of each block."""
    layers = grouped(found.sites, lambda s: subject.layer(s.address))
    return {layer: value(sites) for layer, sites in layers.items() if layer != OUTSIDE}


def grouped(sites: Iterable[Spectrum], name: Callable[[Spectrum], str]) -> dict[str, list[Spectrum]]:
    """Return the sites by a name of theirs, in their order."""
    groups: dict[str, list[Spectrum]] = {}
    for site in sites:
        groups.setdefault(name(site), []).append(site)
    return groups


def rank(sites: Sequence[Spectrum]) -> float | None:
    """Return the mean effective rank of the sites that change at all."""
    ranks = [site.effective_rank for site in sites if site.energy]
    return fmean(ranks) if ranks else None


def _sites(subject: Subject, found: Mapping[str, Spectra]) -> Table:
    rows = [
        (
            name,
            subject.layer(s.address),
            s.role,
            s.energy**0.5,
            s.effective_rank,
            s.stable_rank,
            s.rank(0.9),
            min(s.shape),
        )
        for name, each in found.items()
        for s in each.sites
    ]
    columns = ("delta", "layer", "role", "norm", "effective rank", "stable rank", "rank for 90 %", "largest possible")
    return Table("The change of each matrix", columns, tuple(rows))


def _residuals(left: Sequence[Residual]) -> Table:
    rows = [(r.family, r.parameters, r.norm, r.total, 100 * r.share**2) for r in left]
    columns = ("family", "parameters", "|eps|", "of a change of", "% of its square")
    return Table("What families of deltas leave of the change", columns, tuple(rows))


def _ranks(subject: Subject, found: Mapping[str, Spectra]) -> Lines:
    """The effective rank by layer, of one delta for each role, of several as the mean over roles."""
    if len(found) > 1:
        series = {name: by_layer(subject, each, rank) for name, each in found.items()}
    else:
        roles = grouped(next(iter(found.values())).sites, lambda s: s.role)
        series = {role: by_layer(subject, Spectra(tuple(sites)), rank) for role, sites in roles.items()}
    return by_place("Effective rank of the change", "effective rank", series)


def _values(subject: Subject, found: Mapping[str, Spectra]) -> list[Lines]:
    """The singular values at each role, a line for each layer, or of several deltas the means over layers."""
    charts: dict[str, dict[str, list[tuple[float, float | None]]]] = {}
    for name, each in found.items():
        for role, sites in grouped(each.sites, lambda s: s.role).items():
            groups = {name: sites} if len(found) > 1 else grouped(sites, lambda s: subject.layer(s.address))
            charts.setdefault(role, {}).update({label: _mean(group) for label, group in groups.items()})
    return [Lines(f"Singular values at {role}", "k", "s_k", series, "y") for role, series in charts.items()]


def _mean(sites: Sequence[Spectrum]) -> list[tuple[float, float | None]]:
    columns = zip(*(site.values for site in sites), strict=False)
    means = [fmean(column) for column in columns]
    return [(k, s) for k, s in enumerate(means, start=1) if s > SHOWN * means[0]]
