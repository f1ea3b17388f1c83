"""How small a delta may be: the rank that a short training's change needs, and the bottleneck that its outputs need.

    rank(share) = min {r : sum_sites sum_(k <= r) s_k^2 >= share * sum_sites sum_k s_k^2}        s: a site's singular values

of the change of weights after a few hundred steps of Full (or a LoRA of high rank), or of the summed gradient. For a bottleneck the
s_k^2 are the eigenvalues of E[d d^T] [d_out, d_out], d = h'(x) - h(x) the change of the output at a site: an adapter of size m adds
at most m directions there. It is an estimate: a full sweep is what it stands for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate, zip_longest
from pathlib import Path

import torch
from torch import Tensor, nn

from deltatune import tuning
from deltatune.backbones import load
from deltatune.core.site import Site
from deltatune.core.weights import Weights
from deltatune.errors import DeltaTuneError
from deltatune.theory.finding import Finding
from deltatune.theory.sides import Batch, Side, check_some
from deltatune.theory.similarity import pairs, states
from deltatune.theory.spectrum import Spectra, Spectrum, spectra
from deltatune.tuning import Run

SHARE = 0.9


@dataclass(frozen=True)
class SizeEstimate(Finding):
    """The smallest size that keeps a `share` of the energy, the size each site needs by itself, and the curve behind them.

    `curve[r]` is the share that size r keeps over all sites.
    """

    size: int
    by_site: Mapping[str, int]
    curve: tuple[float, ...]
    share: float
    of: str

    @property
    def finding(self) -> str:
        each = sorted(self.by_site.values())
        return (
            f"Size {self.size} keeps {100 * self.curve[self.size]:.1f} % of {self.of} (size 1 keeps {100 * self.curve[1]:.1f} %); "
            f"single sites need {each[0]} to {each[-1]}."
        )


def smallest_size(found: Spectra, share: float = SHARE) -> SizeEstimate:
    """Return the smallest rank, one for all sites, that keeps a `share` of the spectra's energy."""
    if not 0 < share <= 1:
        raise DeltaTuneError(f"share={share} is none; write one above 0 and up to 1, e.g. 0.9.")
    sites = [site for site in found.sites if site.energy]
    total = sum(site.energy for site in sites)
    if not total:
        raise DeltaTuneError(
            f"no matrix has any of {found.of}: train Full() for some steps, at linears, before asking."
        )
    squares = [[s * s for s in site.values] for site in sites]
    curve = tuple(kept / total for kept in accumulate(map(sum, zip_longest(*squares, fillvalue=0.0)), initial=0.0))
    size = next(r for r, kept in enumerate(curve) if kept >= share * (1 - 1e-12))
    return SizeEstimate(size, {site.address: site.rank(share) for site in sites}, curve, share, found.of)


def smallest_rank(run: Run, folder: Path | str, share: float = SHARE) -> SizeEstimate:
    """Return the rank that a short run's change needs: `run` trains Full() at the wheres in question for a few hundred steps.

    A finished run in `folder` is not done again. Raises `DeltaTuneError` for a run whose delta is no change of weights.
    """
    if run.start is not None:
        raise DeltaTuneError(
            "the run starts from other weights, whose change would be counted; give one without start."
        )
    tuning.tune(run, folder)
    return smallest_size(spectra(load(run.backbone).model, Weights.read(folder)), share)


@torch.no_grad()
def output_spectra(model: nn.Module, a: Side, b: Side, batches: Iterable[Batch], where: str = "ffn.down") -> Spectra:
    """Return the spectra of what training (from side a to side b) adds to the outputs at `where`, over all tokens.

    values [d_out] are the root mean squares of d = h_b - h_a along its principal directions, not centred. Changes of the
    inputs, from below, are in d too. Keeps one moment [d_out, d_out] a site.
    """
    moments: dict[str, Tensor] = {}
    sites: dict[str, Site] = {}
    count: Counter[str] = Counter()
    for batch in batches:
        first, second = (states(model, side, batch, where) for side in (a, b))
        for address, (site, X, Y) in pairs(first, second).items():
            d = (Y - X).double()
            moments[address] = moments.get(address, 0) + d.mT @ d
            sites[address] = site
            count[address] += d.shape[0]
    check_some(moments)
    found = []
    for address, moment in moments.items():
        site = sites[address]
        roots = torch.linalg.eigvalsh(moment / count[address]).flip(0).clamp(min=0).sqrt().tolist()
        found.append(Spectrum(address, site.role, site.layer, (len(roots), len(roots)), tuple(roots)))
    return Spectra(tuple(found), of="the change of outputs")


def smallest_bottleneck(
    model: nn.Module, tuned: Weights, batches: Iterable[Batch], where: str = "ffn.down", share: float = SHARE
) -> SizeEstimate:
    """Return the adapter size that what `tuned` adds to the outputs at `where` needs."""
    return smallest_size(output_spectra(model, None, tuned, batches, where), share)
