"""The real tasks: every one loads, all their records are valid, and they render."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltatune.files import read_json
from deltatune.tasks import task, task_names
from deltatune.tasks.example import SPLITS


@pytest.fixture(autouse=True)
def _data_folder(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTATUNE_DATA", str(shared_data))


def test_every_record_of_every_task_is_valid(shared_data: Path) -> None:
    listed = read_json(shared_data / "tasks.json")["tasks"]
    assert {entry["name"] for entry in listed} <= set(task_names())
    for entry in listed:
        found = task(entry["name"])
        assert found.digest == entry["sha256"]
        assert {split: len(found.split(split)) for split in SPLITS} == entry["sizes"]


def test_the_options_are_cut_from_every_question(shared_data: Path) -> None:
    listed = read_json(shared_data / "tasks.json")["tasks"]
    names = [entry["name"] for entry in listed if entry["has_options"]]
    assert len(names) == 23
    for name in names:
        found = task(name)
        for example in found.split("dev"):
            assert "\n(B) " in example.input
            assert "\n(B) " not in example.question
            assert found.candidates(example) == list(example.letters)


@pytest.mark.parametrize(
    "name", ["glue-sst2", "arc_easy", "blimp-ellipsis_n_bar_1", "sni1340_msr_text_compression_compression"]
)
def test_real_prompts(name: str) -> None:
    found = task(name)
    for example in found.split("train")[:50]:
        prompt = found.prompt(example)
        assert prompt.text == example.input.strip() + "\nanswer:"
        assert prompt.target == example.target
        assert prompt.target in (found.texts(example) or [prompt.target])


def test_few_shot_of_a_real_task() -> None:
    chosen = task("trec").few_shot(8, seed=1)
    assert len(chosen) == 8 * len(task("trec").labels)
