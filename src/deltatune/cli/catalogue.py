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
FORMULA = re.compile(r"Parameters:\s+(.*?)(?:\.(?:\s|$)|$)", re.DOTALL)
BRACKETS = re.compile(rf"\(([^()]*{YEAR}[^()]*)\)")
INNER = "as inside"  # what a combinator does not have of its own


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
        """The indented line of its file's docstring that begins with its name, or the first one, without the shapes behind it."""
        lines = [line.strip() for line in self.about.splitlines() if line.startswith("    ")]
        own = [line.removeprefix(f"{self.name}: ") for line in lines if line.startswith(f"{self.name}: ")]
        return re.split(r"\s{3,}", (own or lines)[0])[0] if lines else ""

    @property
    def paper(self) -> str:
        """Authors and year."""
        found = PAPER.search(self.line) or PAPER.search(self.about)
        return found[0] if found else next(iter(BRACKETS.findall(self.about)), "")

    @property
    def formula(self) -> str:
        """The number of trained parameters as its own docstring states it, or else its file."""
        found = FORMULA.search(self.line) or FORMULA.search(self.about)
        return " ".join(found[1].split()) if found else ""

    @property
    def place(self) -> str:
        """The default where."""
        return self.default.where if self.default else INNER

    @property
    def merges(self) -> str:
        """Whether it can be written into the backbone's weights."""
        return INNER if self.default is None else "no" if "merge" in self.default.breaks else "yes"

    @property
    def routes(self) -> str:
        """How rows of a batch have their own: gathered into one product, one delta after the other, or not at all."""
        if self.default is None:
            return INNER
        return "no" if "route" in self.default.breaks else "gathered" if self.default.batched else "by rows"

    @property
    def breaks(self) -> dict[str, str]:
        """The laws that it does not keep, with the reasons."""
        return {str(law): reason for law, reason in sorted(self.default.breaks.items())} if self.default else {}

    @property
    def settings(self) -> str:
        """How it is written, with its fields and their defaults."""
        from deltatune.core.spec import fields_of, literal

        fields = fields_of(self.kind)
        given = ", ".join(f"{f.name}={'...' if f.default is MISSING else literal(f.default)}" for f in fields)
        return f"{self.name}({given})"

    def count(self, model: nn.Module) -> tuple[str, str]:
        """Return the parameters that it trains on a backbone and the evidence that it needs there, in words."""
        from deltatune.core.delta import sites
        from deltatune.core.evidence import needs

        if self.default is None:
            return INNER, ""
        try:
            table = sites(model, self.default)
        except DeltaTuneError:
            return "no place", ""
        share = 100 * table.parameters / table.backbone_parameters
        counted = f"{table.parameters:,} ({share:.{0 if share >= 10 else 1 if share >= 1 else 3}f} %)"
        return counted, ", ".join(sorted(needs(model, table.delta)))


def catalogue() -> dict[str, Entry]:
    """Return every method by name, in the order of the groups."""
    import deltatune.methods  # noqa: F401  (a method is known once it is defined)
    from deltatune.core.method import registry

    entries = [Entry(name, kind, _default(kind)) for name, kind in registry().items()]
    order = (*GROUPS, "other")
    return {e.name: e for e in sorted(entries, key=lambda e: (order.index(e.group), e.name))}


def others() -> dict[str, dict[str, str]]:
    """Return what goes with the methods, by title: how each is written -> its docstring's first line."""
    from deltatune.core.spec import concrete
    from deltatune.methods import functions
    from deltatune.methods._maps import Map
    from deltatune.methods._starts import Start

    presets = {f"{name}{_arguments(f)}": _first(f) for name, f in sorted(functions().items())}
    values = {
        title: {Entry(name, value, None).settings: _first(value) for name, value in concrete(base).items()}  # type: ignore[arg-type]
        for title, base in (("Starts of LoRA: `LoRA(init=...)`", Start), ("Maps: `Reparam(..., through=...)`", Map))
    }
    return {"Presets and tools": presets, **values}


def _arguments(function: object) -> str:
    from deltatune.core.spec import literal

    given = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return f"({', '.join(p.name if p.default is p.empty else f'{p.name}={literal(p.default)}' for p in given)})"


def _first(value: object) -> str:
    return (inspect.getdoc(value) or "").partition("\n")[0]


def _default(method: type[Method]) -> Method | None:
    """The method with its default settings; None when it has none, as a combinator without its inner method."""
    from deltatune.core.spec import build

    try:
        return build(method.__name__, {})
    except DeltaTuneError:
        return None
