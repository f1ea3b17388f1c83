"""`size`: how small a delta may be, read from what a short training of Full, or of a LoRA of high rank, has done."""

from __future__ import annotations

from deltatune.theory.exhibit import Exhibit, Lines, Table
from deltatune.theory.instruments.spectrum import by_layer
from deltatune.theory.size import SHARE, SizeEstimate, output_spectra, smallest_size
from deltatune.theory.spectrum import spectra
from deltatune.theory.subject import Subject


def size(subject: Subject, share: float = SHARE, where: str = "ffn.down") -> Exhibit:
    """Estimate the smallest rank for the change of weights, and with a task the smallest bottleneck for the outputs at a where."""
    model, tuned, about = subject.model, subject.first, subject.about
    changed = spectra(model, tuned)
    found = {"rank": smallest_size(changed, share)}
    if subject.task is not None:
        outputs = output_spectra(model, None, tuned, subject.batches, where)
        found[f"bottleneck at {where}"] = smallest_size(outputs, share)
        about = {**about, **subject.data}
    needs = by_layer(subject, changed, lambda sites: max(site.rank(share) for site in sites))
    series = {name: [(r, 100 * kept) for r, kept in enumerate(each.curve)] for name, each in found.items()}
    return Exhibit(
        "size",
        about,
        list(found.values()),
        [_estimates(found)],
        [Lines("What a size keeps", "size", "% of the squared change", series, level=100 * share)],
        {f"rank that keeps {100 * share:g} %": needs},
    )


def _estimates(found: dict[str, SizeEstimate]) -> Table:
    rows = [
        (name, e.size, min(e.by_site.values()), max(e.by_site.values()), 100 * e.share) for name, e in found.items()
    ]
    return Table("The smallest size", ("of", "size", "least at a site", "most at a site", "% kept"), tuple(rows))
