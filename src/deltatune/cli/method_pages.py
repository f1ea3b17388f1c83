"""The pages of docs/methods, generated from the methods' own docstrings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from deltatune.files import write_text

if TYPE_CHECKING:
    from torch import nn

    from deltatune.cli.catalogue import Entry

TITLES = {
    "addition": "Addition: new parameters beside the old ones",
    "specification": "Specification: some of the old parameters",
    "reparameterization": "Reparameterization: the old parameters through fewer new ones",
    "combine": "Combinators: methods made of methods",
}
HOW = "Made by `deltatune methods --docs docs/methods` from the methods' docstrings; do not edit.\n"


def pages(entries: dict[str, Entry], model: nn.Module, backbone: str) -> dict[str, str]:
    """Return file name -> Markdown: a table of all methods, and one page a group."""
    groups = {group: [e for e in entries.values() if e.group == group] for group in TITLES}
    written = {f"{group}.md": _group(TITLES[group], own) for group, own in groups.items()}
    return {"README.md": _index(groups, model, backbone), **written}


def write(folder: Path, entries: dict[str, Entry], model: nn.Module, backbone: str) -> list[Path]:
    """Write the pages into `folder` and return their paths."""
    for name, text in pages(entries, model, backbone).items():
        write_text(folder / name, text)
    return sorted(folder.glob("*.md"))


def _index(groups: dict[str, list[Entry]], model: nn.Module, backbone: str) -> str:
    lines = [f"# Methods\n\n{HOW}"]
    for group, own in groups.items():
        lines += [f"\n## [{TITLES[group]}]({group}.md)\n"]
        lines += [f"| method | paper | default place | merges | needs | on {backbone} |", "|---|---|---|---|---|---:|"]
        for e in own:
            found = e.count(model)
            counted = f"{found[0]:,} ({found[1]:.2g} %)" if found else "-"
            needed = ", ".join(sorted(found[2])) if found else ""
            row = (f"[{e.name}]({group}.md#{e.name.lower()})", e.paper, f"`{e.place}`", "yes" if e.merges else "no")
            lines.append(f"| {' | '.join([*row, needed, counted])} |")
    return "\n".join(lines) + "\n"


def _group(title: str, own: list[Entry]) -> str:
    lines = [f"# {title}\n\n{HOW}"]
    for e in own:
        lines.append(f"\n## {e.name}\n\n{e.line}\n\n    {e.name}({e.settings})\n")
        lines.append(f"Default place: `{e.place}`.")
        lines += [f"Law that it does not keep: {law} ({reason})." for law, reason in sorted(_breaks(e).items())]
        lines.append(f"\n{e.about}")
    return "\n".join(lines) + "\n"


def _breaks(entry: Entry) -> dict[str, str]:
    return {str(law): reason for law, reason in entry.default.breaks.items()} if entry.default else {}
