"""The report of a study made by the stand-in: right numbers, self-contained, every number linked, equal from results.json."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean, stdev

import pytest
from typer.testing import CliRunner

from deltatune.cli.study import app
from deltatune.errors import DeltaTuneError
from deltatune.files import write_json
from deltatune.study import Plan, report
from deltatune.study.analyses import tables
from deltatune.study.collect import collect, read
from deltatune.study.inputs import inspect
from deltatune.study.items import item_scores
from deltatune.study.store import Store
from tests.study.conftest import write_plan
from tests.study.fake import fake_tune

SEARCH = '[search]\nlr = [1e-3, 3e-3]\ntasks = ["topic"]\nsteps = 10'
TASKS = '"topic", "sentiment", "pronoun"'


@pytest.fixture(scope="module")
def original(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of two methods, three tasks and two seeds, with a search; one run failed and one is not done."""
    folder = tmp_path_factory.mktemp("original")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTATUNE_MODELS", str(models))
        made, store = Plan.read(write_plan(folder / "plan.toml", tasks=TASKS, more=SEARCH)), Store(folder / "study")
        store.open(made, inspect(made))
        for entry in made.search_runs():
            do(store, entry.run)
        final = [entry for entry in made.runs(store.dev_scores(made)) if entry.part == "final"]
        for entry in final[:-2]:
            do(store, entry.run)
        store.begin(final[-1].run)
        store.fail(final[-1].run.id, "NonFiniteLoss", "the loss is <nan> & more")
    return store.folder


@pytest.fixture(scope="module")
def out(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of its report."""
    return report(original, tmp_path_factory.mktemp("out")).parent


@pytest.fixture
def study(original: Path, tmp_path: Path) -> Path:
    """A copy of the study."""
    return Path(shutil.copytree(original, tmp_path / "study"))


def do(store: Store, run) -> None:
    store.begin(run)
    fake_tune(run, store.run_folder(run.id))


class Page(HTMLParser):
    """What a page refers to, and what it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.others: list[tuple[str, str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes) -> None:
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            elif name in ("href", "xlink:href"):
                self.links.append(value)
            elif name in ("src", "srcset", "data", "action", "poster", "background") and value:
                self.others.append((tag, name, value))


def test_the_page_is_self_contained_and_every_link_has_its_target(study: Path, out: Path) -> None:
    text = (out / "report.html").read_text()
    page = Page(text)
    assert "http://" not in text and "https://" not in text and "@import" not in text
    assert page.others == []
    assert all(link.startswith("#") for link in page.links)
    assert not re.findall(r"url\((?!#)", text)
    targets = set(re.findall(r"url\(#([^)]+)\)", text)) | {link[1:] for link in page.links}
    assert targets <= set(page.ids)
    assert [id for id, times in Counter(page.ids).items() if times > 1] == []
    results = collect(study)
    assert len(results.records) == 4 + 10
    for record in results.records:
        assert f"run-{record.id}" in page.ids
    cells = {link for link in page.links if link.startswith("#cell-")}
    assert len(cells) == 6
    assert "the loss is &lt;nan&gt; &amp; more" in text


def test_scores_are_means_over_seeds_and_of_what_is_there(study: Path) -> None:
    results = collect(study)
    found = tables(results, "tiny")
    by_cell: dict[tuple[str, str], list[float]] = {}
    for path in study.glob("runs/*/result.json"):
        result = json.loads(path.read_text())
        if result["run"]["recipe"]["steps"] == 20:
            method = result["run"]["delta"].split("(")[0]
            by_cell.setdefault((method, result["run"]["task"]), []).append(result["test"])
    assert {key: cell.summary.mean for key, cell in found.scores.items()} == pytest.approx(
        {key: fmean(values) for key, values in by_cell.items()}
    )
    lora = found.scores["LoRA", "topic"]
    assert lora.summary.sd == pytest.approx(stdev(by_cell["LoRA", "topic"]))
    assert lora.over_majority == pytest.approx(lora.summary.mean - 30.0)
    full = fmean(by_cell["Full", "topic"])
    assert lora.percent_of_baseline == pytest.approx(100 * lora.summary.mean / full)
    line = next(line for line in found.lines if line.method == "LoRA")
    assert line.average == pytest.approx(fmean(fmean(by_cell["LoRA", task]) for task in found.common))
    assert line.tunable_percent == pytest.approx(100 * 98_304 / 10_200_000)
    assert line.file_bytes == 4 * 98_304 + 512
    assert (line.runs, found.common) == (5, ("topic", "sentiment", "pronoun"))
    assert all(choice.chosen == 3e-3 for choice in found.search)
    assert {gap.state for gap in results.gaps} == {"failed", "pending"}


def test_candidates_of_the_search_show_no_test_score(study: Path) -> None:
    assert all(record.test is None and not record.items for record in collect(study).search)


def test_the_same_study_gives_the_same_files_and_so_does_its_results_json(
    study: Path, out: Path, tmp_path: Path
) -> None:
    first, second, third = out, tmp_path / "second", tmp_path / "third"
    report(study, second)
    report(first / "results.json", third)
    names = sorted(str(path.relative_to(first)) for path in first.rglob("*") if path.is_file())
    assert {"report.html", "report.md", "results.csv", "results.json", "figures/score-tiny.png"} <= set(names)
    for name in names:
        content = (first / name).read_bytes()
        assert content == (second / name).read_bytes(), name
        assert content == (third / name).read_bytes(), name
    assert (first / "results.json").stat().st_size < 4_000 * 14


def test_the_report_needs_neither_data_nor_models(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTATUNE_MODELS", str(tmp_path / "nowhere"))
    assert len(read(study).records) == 14


def test_csv_and_markdown_name_every_run(study: Path, out: Path) -> None:
    ids = {record.id for record in collect(study).records}
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert {row["id"] for row in rows} == ids
    assert {float(row["recipe.lr"]) for row in rows if row["part"] == "final"} == {3e-3}
    text = (out / "report.md").read_text()
    assert set(re.findall(r'<a id="run-(\w+)">', text)) == ids
    assert set(re.findall(r"\(#run-(\w+)\)", text)) <= ids
    for picture in re.findall(r"\]\((figures/[^)]+)\)", text):
        assert (out / picture).exists()


def test_the_top_says_what_is_missing_and_where_it_was_made(out: Path) -> None:
    text = (out / "report.html").read_text()
    for part in ("2 runs missing (1 failed, 1 pending)", "2 seeds (0, 1)", "A processor of the test", "torch 2.13.0"):
        assert part in text
    assert "commit 0123456789ab with uncommitted changes" in text


def test_the_commands_show_the_state_and_write_the_report(study: Path) -> None:
    shown = CliRunner().invoke(app, ["status", str(study)])
    assert shown.exit_code == 0
    rows = [line.split() for line in shown.output.splitlines()]
    assert ["LoRA", "7", "1"] in rows or ["LoRA", "8"] in rows
    assert "failed: Full on pronoun, tiny, seed 1: NonFiniteLoss: the loss is <nan> & more" in shown.output
    written = CliRunner().invoke(app, ["report", str(study)])
    assert written.exit_code == 0 and str(study / "report" / "report.html") in written.output
    assert (study / "report" / "report.html").exists()


def test_a_study_without_a_finished_run_has_a_report(plan: Callable[..., Plan], tmp_path: Path) -> None:
    made, store = plan(), Store(tmp_path / "study")
    store.open(made, inspect(made))
    assert "8 runs missing (8 pending)" in report(store.folder, tmp_path / "out").read_text()


def test_runs_of_earlier_plans_are_counted_not_shown(study: Path, plan: Callable[..., Plan]) -> None:
    shorter = plan(tasks='"topic"', seeds="0", more=SEARCH)
    Store(study).open(shorter, inspect(shorter))
    results = collect(study)
    assert len(results.records) == 4 + 2
    assert results.unplanned == 9


def test_something_else_is_no_results_json(tmp_path: Path) -> None:
    write_json(tmp_path / "other.json", {"a": 1})
    with pytest.raises(DeltaTuneError, match="is not a results.json"):
        report(tmp_path / "other.json", tmp_path / "out")
    with pytest.raises(DeltaTuneError, match="holds no study"):
        report(tmp_path, tmp_path / "out")


def test_item_scores_follow_the_metric_and_the_order_of_ids() -> None:
    rows = [
        {"id": "b", "prediction": "the red house", "target": "red house"},
        {"id": "a", "prediction": " Yes", "target": "yes"},
    ]
    assert item_scores("accuracy", rows)[1] == item_scores("matthews", rows)[1] == [100, 0]
    assert item_scores("exact-match", rows)[1] == [100, 100]
    assert item_scores("rougeL", rows)[1] == [100, 80]
    assert item_scores("pearson", rows) == ("", [])
    assert item_scores("accuracy", rows)[0] == item_scores("accuracy", rows[::-1])[0] != ""
