"""What `deltatune methods` says: complete for every method, and the committed pages are those it makes now."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from deltatune.backbones.load import skeleton
from deltatune.cli import methods as command
from deltatune.cli.catalogue import INNER, catalogue, others
from deltatune.cli.method_pages import pages
from deltatune.core.where import parse

DOCS = Path(__file__).parents[2] / "docs" / "methods"
ENTRIES = catalogue()


@pytest.mark.parametrize("name", ENTRIES)
def test_a_method_states_its_equation_its_paper_and_its_count(name: str) -> None:
    entry = ENTRIES[name]
    assert entry.group in ("addition", "specification", "reparameterization", "combine")
    assert re.search(r"[\w')\]] = ", entry.equation), (
        f"the file of {name} opens without an equation: {entry.equation!r}"
    )
    assert len(entry.equation) < 90, f"put three spaces between the equation of {name} and its shapes"
    assert re.search(r"(19|20)\d\d", entry.paper), f"{name} names no paper with its year: {entry.paper!r}"
    assert entry.formula, f"the docstring of {name} has no sentence 'Parameters: ...'"
    assert entry.line.partition("\n")[0].endswith("."), f"the docstring of {name} does not begin with one sentence"
    assert entry.merges in ("yes", "no", INNER)
    assert entry.routes in ("gathered", "by rows", INNER)
    assert entry.place == INNER or parse(entry.place)


@pytest.mark.parametrize("name", ENTRIES)
def test_a_method_is_explained(name: str) -> None:
    entry = ENTRIES[name]
    text = command.explanation(entry)
    for part in (
        f"{name} ({entry.group})",
        entry.equation,
        f"{name}(",
        "Parameters:",
        "Default place: ",
        "Merges: ",
        "Routes: ",
    ):
        assert part in text
    assert all(reason in text for reason in entry.breaks.values())
    assert max(len(line) for line in text.splitlines()) <= 190


def test_the_counts_on_a_backbone_are_those_of_the_dry_run() -> None:
    import deltatune as dt

    model = skeleton("pebble")
    table = dt.sites(model, dt.LoRA())
    assert ENTRIES["LoRA"].count(model) == (f"{table.parameters:,} (1.0 %)", "")
    assert ENTRIES["FISH"].count(model)[1] == "fisher"
    assert ENTRIES["Scale"].count(model) == (INNER, "")
    assert not [name for name, entry in ENTRIES.items() if entry.count(model)[0] == "no place"]


def test_the_committed_pages_are_those_that_the_command_makes() -> None:
    made = pages(ENTRIES, skeleton(command.COUNTED), command.COUNTED)
    assert {path.name for path in DOCS.glob("*.md")} == set(made)
    for name, text in made.items():
        assert (DOCS / name).read_text() == text, "run: deltatune methods --docs docs/methods"


def test_presets_starts_and_maps_are_listed_with_what_they_are() -> None:
    presets, starts, maps = others().values()
    assert presets["pfeiffer(size=48)"]
    assert {written.partition("(")[0] for written in starts} >= {"PiSSA", "OLoRA", "LoRAPlus"}
    assert {written.partition("(")[0] for written in maps} >= {"MLP", "Subspace"}
    assert all(what.endswith((".", ":")) for kind in (presets, starts, maps) for what in kind.values())


@pytest.mark.parametrize("on", [None, "pebble"])
@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_its_terminal_and_keeps_the_names_whole(width: int, on: str | None, monkeypatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("rich.console.Console", lambda **given: Console(file=stream, width=width, **given))
    command.methods(on=on)
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert set(ENTRIES) <= {line.split()[0] for line in lines if line.split()}


def test_contributors_are_shown_a_method_as_it_is() -> None:
    root = DOCS.parents[1]
    guide = (root / "CONTRIBUTING.md").read_text()
    assert (root / "src/deltatune/methods/addition/ssf.py").read_text().strip() in guide
    shown, reference = guide.split("```python\n")[2].split("```")[0], (root / "tests/reference/test_ssf.py").read_text()
    assert all(piece.strip() in reference for piece in shown.split("\n\n\n"))


@pytest.mark.parametrize("page", [*sorted(DOCS.glob("*.md")), DOCS.parents[1] / "README.md"], ids=lambda p: p.name)
def test_links_to_files_and_headings_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith("http"):
            path, _, heading = target.partition("#")
            found = page.parent / path
            assert found.exists(), target
            titles = (
                [re.sub(r"[^\w -]", "", line.lstrip("# ")) for line in found.read_text().splitlines()]
                if heading
                else []
            )
            assert not heading or heading in [title.lower().replace(" ", "-") for title in titles], target
