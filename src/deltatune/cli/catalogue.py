"""What there is to say about every method, read from the methods themselves: for `deltatune methods` and docs/methods."""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import MISSING, dataclass
from typing import TYPE_CHECKING

from deltatune.errors import DeltaTuneError

if TYPE_CHECKING:
    from torch import nn

    from deltatune.core.method import Method

GROUPS = ("addition", "specification", "reparameterization", "combine")
NAME, YEAR = r"[A-Z][\w'-]+", r"(?:19|20)\d\d"
PAPER = re.compile(rf"(?:{NAME} )*{NAME}(?: et al\.?| and (?:{NAME} )*{NAME})?,? (?:\({YEAR}\)|{YEAR})")
FORMULA = re.compile(r"Parameters(?: a site|, once, for an even d)?:\s+(.*?)(?:\.(?:\s|$)|$)", re.DOTALL)
BRACKETS = re.compile(rf"\(([^()]*{YEAR}[^()]*)\)")


@dataclass(frozen=True)
class Entry:
    """One method: its names, its words, and what is derived from its defaults (None when it has none)."""

    name: str
    kind: type[Method]
    default: Method | None

    @property
    def group(self) -> str:
        """The folder that its file lies in."""
        folder = self.kind.__module__.split(".")[-2]
        return folder if folder in GROUPS else "other"

    @property
    def about(self) -> str:
        """The docstring that opens its file."""
        return inspect.getdoc(sys.modules[self.kind.__module__]) or ""

    @property
    def line(self) -> str:
        """Its own docstring."""
        return inspect.cleandoc(self.kind.__doc__ or "")

    @property
    def equation(self) -> str:
        """The first indented line of its file's docstring, without the shapes behind it."""
        lines = [line.strip() for line in self.about.splitlines() if line.startswith("    ")]
        return re.split(r"\s{3,}", lines[0])[0] if lines else ""

    @property
    def paper(self) -> str:
        """Authors and year."""
        found = PAPER.search(self.line) or PAPER.search(self.about)
        return found[0] if found else next(iter(BRACKETS.findall(self.about)), "")

    @property
    def formula(self) -> str:
        """The number of trained parameters as its file states it."""
        found = FORMULA.search(self.about)
        return " ".join(found[1].split()) if found else ""

    @property
    def place(self) -> str:
        """The default where."""
        return self.default.where if self.default else "-"

    @property
    def merges(self) -> bool:
        """Whether it can be written into the backbone's weights."""
        return self.default is not None and "merge" not in self.default.breaks

    @property
    def settings(self) -> str:
        """Its fields with their defaults, as they are written."""
        from deltatune.core.spec import fields_of, literal

        fields = fields_of(self.kind)
        return ", ".join(f"{f.name}={'...' if f.default is MISSING else literal(f.default)}" for f in fields)

    def count(self, model: nn.Module) -> tuple[int, float, frozenset[str]] | None:
        """Return trained parameters, their percentage and the evidence needed on a backbone; None where it has no place."""
        from deltatune.core.delta import sites
        from deltatune.core.evidence import needs

        try:
            table = sites(model, self.default) if self.default else None
        except DeltaTuneError:
            return None
        share = 100 * table.parameters / table.backbone_parameters if table else 0.0
        return (table.parameters, share, needs(model, table.delta)) if table else None


def catalogue() -> dict[str, Entry]:
    """Return every method by name, in the order of the groups."""
    import deltatune.methods  # noqa: F401  (a method is known once it is defined)
    from deltatune.core.method import registry

    entries = [Entry(name, kind, _default(kind)) for name, kind in registry().items()]
    order = (*GROUPS, "other")
    return {e.name: e for e in sorted(entries, key=lambda e: (order.index(e.group), e.name))}


def _default(method: type[Method]) -> Method | None:
    """The method with its default settings; None when it has none, as a combinator without its inner method."""
    from deltatune.core.spec import build

    try:
        return build(method.__name__, {})
    except DeltaTuneError:
        return None
