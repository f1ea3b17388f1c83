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
READ = """
*merges*: it can be written into the backbone's weights. *routes*: how the rows of one batch have their own in a pool, in one
product (gathered) or one delta after the other (by rows). *needs*: the evidence that it starts from, which `deltatune tune`
measures, and `dt.evidence` for a loop of your own. The last column is what it trains at its default place on the built-in
backbone `{backbone}`. What a combinator does depends on the methods inside it.
"""


def pages(entries: dict[str, Entry], model: nn.Module, backbone: str) -> dict[str, str]:
    """Return file name -> Markdown: a table of all methods, and one page a group."""
    groups = {group: [e for e in entries.values() if e.group == group] for group in TITLES}
    written = {f"{group}.md": _group(TITLES[group], own) for group, own in groups.items()}
    return {"README.md": _index(groups, model, backbone), **written}


def write(folder: Path, entries: dict[str, Entry], model: nn.Module, backbone: str) -> list[Path]:
    """Write the pages into `folder` and return their paths."""
    written = pages(entries, model, backbone)
    for name, text in written.items():
        write_text(folder / name, text)
    return [folder / name for name in sorted(written)]


def _index(groups: dict[str, list[Entry]], model: nn.Module, backbone: str) -> str:
    from deltatune.cli.catalogue import others

    lines = [f"# Methods\n\n{HOW}{READ.format(backbone=backbone)}"]
    for group, own in groups.items():
        lines += [f"\n## [{TITLES[group]}]({group}.md)\n"]
        lines += [
            f"| method | paper | default place | merges | routes | needs | on {backbone} |",
            "|---|---|---|---|---|---|---:|",
        ]
        for e in own:
            counted, needed = e.count(model)
            name = f"[{e.name}]({group}.md#{e.name.lower()})"
            place = f"`{e.place}`" if e.default else e.place
            lines.append(f"| {' | '.join([name, e.paper, place, e.merges, e.routes, needed, counted])} |")
    for title, values in others().items():
        lines += [f"\n## {title}\n", "| written | is |", "|---|---|"]
        lines += [f"| `{_cell(written)}` | {_cell(what)} |" for written, what in values.items()]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _group(title: str, own: list[Entry]) -> str:
    lines = [f"# {title}\n\n{HOW}"]
    for e in own:
        lines.append(f"\n## {e.name}\n\n{e.line}\n\n    {e.settings}\n")
        lines.append(f"Default place: `{e.place}`." if e.default else "Default place: that of the method inside.")
        lines += [f"Law that it does not keep: {law} ({reason})." for law, reason in e.breaks.items()]
        lines.append(f"\n{e.about}")
    return "\n".join(lines) + "\n"
