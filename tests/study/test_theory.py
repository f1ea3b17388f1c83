"""Instruments in a study: asked for by the plan, done once beside each final run, continued after a kill, shown in the report."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deltatune.errors import DeltaTuneError
from deltatune.study import Plan, Status, report, run_study, status
from deltatune.study.collect import collect
from deltatune.study.inputs import inspect
from deltatune.study.store import Store
from deltatune.study.worker import Measure, serve
from deltatune.theory.instruments import MEASURE
from deltatune.tuning import Run
from tests.study.conftest import write_plan
from tests.study.fake import fake_tune

SEARCH = '[search]\nlr = [1e-3, 3e-3]\ntasks = ["topic"]\nsteps = 10'
ASKED = ("depth", "picky")


@dataclass(frozen=True)
class StandIn:
    """Two instruments, of which one refuses LoRA; the first time that it looks at the run of KILL_MEASURE the process is killed."""

    names: Sequence[str] = ASKED

    def __call__(self, folder: Path, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        run = json.loads((folder / "run.json").read_text())
        lora, seed = run["delta"].startswith("LoRA"), run["seed"]
        for name in names:
            with (folder / "measured").open("a") as file:
                file.write(f"{name}\n")
            if (
                os.environ.get("KILL_MEASURE") == run["task"]
                and lora
                and not seed
                and lines(folder).count("picky") == 1
            ):
                os.kill(os.getpid(), 9)
            if name == "picky" and lora:
                yield name, {"instrument": name, "refused": "LoRA has no <depth>; take Full"}
            else:
                values = {"block[0]": 1.0 + seed, "block[1]": 5.0}
                yield name, {"instrument": name, "finding": f"Seed {seed} is deep.", "profiles": {"depth": values}}


def lines(folder: Path) -> list[str]:
    return (folder / "measured").read_text().split()


def asking(path: Path, names: Sequence[str] = ASKED) -> Path:
    """The same plan with instruments."""
    path.write_text(f"theory = {json.dumps(list(names))}\n{path.read_text()}")
    return path


def do(plan: Path, folder: Path, measure: Measure | None = None, execute: Any = fake_tune) -> Status:
    return run_study(plan, folder, workers=1, execute=execute, measure=measure)


@pytest.fixture(scope="module")
def original(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study whose first runs are of a plan without instruments, and one of whose instruments was killed once."""
    folder = tmp_path_factory.mktemp("original")
    plan, store = folder / "plan.toml", Store(folder / "study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTATUNE_MODELS", str(models))
        patch.setenv("KILL_MEASURE", "sentiment")
        before = Plan.read(write_plan(plan, seeds="0", more=SEARCH))
        store.open(before, inspect(before))
        for entry in before.search_runs():
            train(store, entry.run)
        for entry in before.runs(store.dev_scores(before)):
            train(store, entry.run)
        assert "theory" not in json.loads((report(store.folder, folder / "out").parent / "results.json").read_text())
        assert do(asking(write_plan(plan, more=SEARCH)), store.folder, StandIn()).complete
    return store.folder


def train(store: Store, run: Run) -> None:
    store.begin(run)
    fake_tune(run, store.run_folder(run.id))


def test_the_key_is_no_part_of_a_run(write: Callable[..., Path]) -> None:
    before = Plan.read(write())
    after = Plan.read(asking(write()))
    assert before.theory == () and after.theory == ASKED
    assert [entry.run.id for entry in after.runs()] == [entry.run.id for entry in before.runs()]


@pytest.mark.parametrize(
    ("names", "measure", "said"),
    [
        (["dept"], StandIn(), "theory: there is no instrument 'dept'. Did you mean 'depth'? Known: depth, picky."),
        (["intrinsic"], MEASURE, "Known: control, gap, landscape, size, spectrum."),
        (["control"], None, "None was given: run_study(..., measure=...) takes them."),
        (["depth", "depth"], StandIn(), "line 1: theory: lists 'depth' more than once."),
        ([], StandIn(), "line 1: theory: must be a list with at least one item"),
    ],
)
def test_a_wrong_instrument_is_named_before_anything_runs(
    names: list[str], measure: Measure | None, said: str, write: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(DeltaTuneError, match=re.escape(said)):
        do(asking(write(), names), tmp_path / "study", measure)
    assert not (tmp_path / "study").exists()


def test_each_final_run_is_measured_once_and_what_is_there_is_neither_trained_nor_measured_again(
    original: Path,
) -> None:
    seen: dict[tuple[str, str, int], list[str]] = {}
    for path in original.glob("runs/*"):
        run = json.loads((path / "run.json").read_text())
        assert len((path / "starts").read_text().split()) == 1
        if run["recipe"]["test"]:  # the others are candidates of the search
            seen[run["delta"].split("(")[0], run["task"], run["seed"]] = lines(path)
            assert {each.name for each in (path / "theory").iterdir()} == {"depth.json", "picky.json"}
        else:
            assert not (path / "measured").exists()
    assert seen.pop(("LoRA", "sentiment", 0)) == [
        "depth",
        "picky",
        "picky",
    ]  # killed at the first picky; depth's is kept
    assert all(each == list(ASKED) for each in seen.values()) and len(seen) == 7


def test_a_plan_that_asks_for_less_shows_less_and_does_nothing(
    original: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "study"))
    assert do(asking(write(more=SEARCH), ["depth"]), folder, StandIn()).complete
    assert {measured.instrument for measured in collect(folder).theory} == {"depth"}


def test_what_is_trained_and_not_measured_is_pending(original: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "study"))
    next(folder.glob("runs/*/theory/picky.json")).unlink()
    now = status(folder)
    assert (now.counts["done"], now.counts["pending"], now.complete) == (11, 1, False)
    (gap,) = collect(folder).gaps
    assert gap.reason == "trained, but not measured yet"
    assert len(collect(folder).final) == 8


class Broken(StandIn):
    def __call__(self, folder: Path, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        raise RuntimeError("out of luck")


def test_an_instrument_that_breaks_fails_its_run_which_keeps_its_result(
    original: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELTATUNE_MODELS", str(models))
    folder = Path(shutil.copytree(original, tmp_path / "study"))
    lost = next(folder.glob("runs/*/theory/picky.json"))
    lost.unlink()
    monkeypatch.setattr("signal.signal", lambda *_: None)
    store = Store(folder, ASKED)
    for measure, expected in ((Broken(), "failed"), (StandIn(), "done")):
        store.forgive(lost.parent.parent.name)
        ours, theirs = multiprocessing.Pipe()
        ours.send(Run.of_record(json.loads((lost.parent.parent / "run.json").read_text())))
        ours.send(None)
        serve(theirs, store, 1, fake_tune, measure)
        assert ours.recv() == (expected, None)
        assert [line.reason for line in status(folder).failures] == ["RuntimeError: out of luck"] * (
            expected == "failed"
        )
        assert len(collect(folder).final) == 8
    assert lost.exists() and status(folder).complete


def test_the_report_has_means_sentences_and_refusals_and_comes_back_from_its_json(
    original: Path, tmp_path: Path
) -> None:
    page = report(original, tmp_path / "out")
    text, markdown = page.read_text(), (tmp_path / "out" / "report.md").read_text()
    assert "| block[0] | 1.5 | 1.5 |\n| block[1] | 5 | 5 |" in markdown
    assert "<tr><td>block[0]</td><td>1.5</td><td>1.5</td></tr>" in text
    assert text.count("Seed 0 is deep.") >= 2 and "LoRA is not measured: LoRA has no <depth>; take Full" in markdown
    assert "LoRA has no &lt;depth&gt;; take Full" in text and "https://" not in text
    assert (tmp_path / "out" / "figures" / "theory-depth-tiny.png").read_bytes().startswith(b"\x89PNG")
    again = report(tmp_path / "out" / "results.json", tmp_path / "again")
    names = ("report.html", "report.md", "results.json", "figures/theory-depth-tiny.png")
    assert all((page.parent / name).read_bytes() == (again.parent / name).read_bytes() for name in names)


def test_real_instruments_measure_real_runs(write: Callable[..., Path], tmp_path: Path) -> None:
    plan = asking(write(tasks='"topic"', seeds="0"), ["spectrum", "control"])
    plan.write_text(plan.read_text().replace('Full = "Full()"', 'Prompt = "PromptTuning(length=2)"'))
    plan.write_text(plan.read_text().replace("steps = 20", "steps = 2\nmax_input = 32\ndev_limit = 4\ntest_limit = 4"))
    assert do(plan, tmp_path / "study", MEASURE, execute=None).complete
    found = {(m.instrument, bool(m.refused)): m for m in collect(tmp_path / "study").theory}
    assert set(found) == {(name, refused) for name in ("spectrum", "control") for refused in (True, False)}
    ranks = found["spectrum", False].profiles["effective rank of the change"]
    assert set(ranks) == {"block[0]", "block[1]"} and all(value and 1 <= value <= 2 for value in ranks.values())
    assert "Pontryagin" in found["control", False].finding
    assert "PromptTuning(length=2) has no change of a weight" in found["spectrum", True].refused
    assert "Theory: control" in report(tmp_path / "study", tmp_path / "out").read_text()
