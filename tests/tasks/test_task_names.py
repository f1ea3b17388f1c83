"""Finding tasks: built-in, in the data folder, in folders with and without an index; and what a wrong name says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deltatune.errors import DeltaTuneError
from deltatune.tasks import task, task_names
from tests.tasks.conftest import record

BUILTIN = ["topic", "sentiment", "pronoun", "agreement", "series", "gist", "question"]


@pytest.fixture(autouse=True)
def _no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DELTATUNE_DATA", raising=False)


def test_built_in_tasks_need_nothing() -> None:
    assert task_names() == BUILTIN


def test_the_data_folder_adds_its_tasks(write_task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTATUNE_DATA", str(write_task([record(0)])))
    assert task_names() == [*BUILTIN, "toy"]
    assert task("toy").split("train")[0].input == "text 0"


def test_a_data_folder_that_is_none_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTATUNE_DATA", str(tmp_path / "gone"))
    with pytest.raises(DeltaTuneError, match=r"\$DELTATUNE_DATA.*not a folder"):
        task("topic")


def test_a_task_is_found_by_folder_and_by_file(write_task: Any) -> None:
    folder = write_task([record(0)], file="toy.jsonl")
    assert task(f"{folder}/toy") == task(f"{folder}/toy.jsonl")
    with pytest.raises(DeltaTuneError, match=r"there is no task 'toi' in .*Did you mean 'toy'"):
        task(f"{folder}/toi")


def test_files_may_lie_in_tasks_below_the_index(write_task: Any) -> None:
    folder = write_task([record(0)])
    (folder / "tasks").mkdir()
    (folder / "toy.jsonl").rename(folder / "tasks" / "toy.jsonl")
    assert task(f"{folder}/tasks/toy") == task(f"{folder}/toy")


def lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(one) + "\n" for one in records)


def test_a_bare_file_tells_its_kind(tmp_path: Path) -> None:
    (tmp_path / "few.jsonl").write_text(lines([record(n) for n in range(20)] + [record(0, "test", target="maybe")]))
    few = task(f"{tmp_path}/few")
    assert (few.kind, few.labels, few.metric) == ("classification", ("no", "yes"), "accuracy")
    with pytest.raises(DeltaTuneError, match="line 21: target 'maybe'"):
        few.split("test")
    many = [record(n, target=f"word {n}", references=[f"word {n}"]) for n in range(20)]
    (tmp_path / "many.jsonl").write_text(lines(many))
    assert (task(f"{tmp_path}/many").kind, task(f"{tmp_path}/many").metric) == ("generation", "rougeL")
    choice = [record(n, target="A", options=["x", "y", "z"]) for n in range(3)]
    (tmp_path / "choice.jsonl").write_text(lines(choice))
    assert task(f"{tmp_path}/choice").labels == ("A", "B", "C")


def test_unknown_names_offer_the_nearest() -> None:
    with pytest.raises(DeltaTuneError, match=r"no task 'sentimnt'.*Did you mean 'sentiment'") as caught:
        task("sentimnt")
    assert "$DELTATUNE_DATA" in str(caught.value)
    with pytest.raises(DeltaTuneError, match=r"'glue/sst3'.*Did you mean 'glue/sst2'"):
        task("glue/sst3")
    with pytest.raises(DeltaTuneError, match=r"columns of the hub data set 'squat'.*Did you mean 'squad'"):
        task("hub:squat")


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"kind": "clasification"}, "'kind' 'clasification' is unknown.*Did you mean 'classification'"),
        ({"metric": None}, "'metric' None is unknown; expected one of accuracy"),
        ({"labels": None}, "a classification task needs 'labels'"),
        ({"labels": ["no", "no"]}, "holds a label twice"),
        ({"labels": "yes"}, "'labels' is 'yes'; expected a list"),
        ({"kind": "generation"}, "a generation task has no 'labels'"),
        ({"file": "gone.jsonl"}, "there is no file 'gone.jsonl'"),
        ({"template": {"text": "{imput}"}}, "unknown placeholder {imput}"),
        ({"sha256": "0" * 64}, "the index says 000000000000"),
        ({"hub": {"path": "x"}}, "'hub' needs 'input'"),
        ({"hub": {"pth": "x"}}, "unknown key 'pth' in 'hub'.*Did you mean 'path'"),
    ],
)
def test_a_bad_index_entry_is_named(write_task: Any, entry: dict[str, Any], said: str) -> None:
    folder = write_task([record(0)], **entry)
    with pytest.raises(DeltaTuneError, match=said.replace("{", r"\{")) as caught:
        task(f"{folder}/toy")
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[]", "expected an object with 'tasks'"),
        ('{"tasks": [{}]}', "entry 1: 'name' is missing"),
        ('{"tasks": [{"name": "a"}, {"name": "a"}]}', "entry 2: a task named 'a' is already listed"),
    ],
)
def test_a_bad_index_is_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "tasks.json").write_text(text)
    with pytest.raises(DeltaTuneError, match=said):
        task(f"{tmp_path}/a")
