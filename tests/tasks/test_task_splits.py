"""Splits are read when asked for; few-shot subsets obey k and the seed."""

from __future__ import annotations

import pickle
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from deltatune.errors import DeltaTuneError
from deltatune.tasks import Task, task
from deltatune.tasks.example import Example, Split
from tests.tasks.conftest import record


class Reading:
    """A source that notes what is read from it."""

    def __init__(self) -> None:
        self.read_splits: list[str] = []

    def read(self, split: Split) -> list[Example]:
        self.read_splits.append(split)
        return [Example(f"{split}/{n}", f"text {n}", ["no", "yes"][n % 2], ("x",)) for n in range(20)]


def test_training_never_reads_the_test_split(write_task: Any) -> None:
    broken = record(9, "test", target="maybe")
    toy = task(f"{write_task([record(0), record(1, 'dev'), broken])}/toy")
    assert [example.id for example in toy.split("train") + toy.split("dev")] == ["train/0", "dev/1"]
    with pytest.raises(DeltaTuneError, match="line 3: target 'maybe'"):
        toy.split("test")


def test_a_split_is_read_once_and_cannot_be_spoilt() -> None:
    source = Reading()
    toy = replace(task("sentiment"), labels=("no", "yes"), source=source)
    first = toy.split("train")
    first.clear()
    assert len(toy.split("train")) == 20
    toy.few_shot(3, seed=1)
    assert source.read_splits == ["train"]


def test_few_shot_takes_k_of_each_label_by_seed() -> None:
    topic = task("topic")
    chosen = topic.few_shot(4, seed=0)
    assert Counter(example.target for example in chosen) == dict.fromkeys(topic.labels, 4)
    assert {example.id for example in chosen} <= {example.id for example in topic.split("train")}
    assert topic.few_shot(4, seed=0) == chosen == task("topic").few_shot(4, seed=0)
    assert {example.id for example in topic.few_shot(4, seed=1)} != {example.id for example in chosen}
    assert set(chosen) <= set(topic.few_shot(5, seed=0))


def test_few_shot_takes_k_examples_of_a_generation_task() -> None:
    assert len(task("gist").few_shot(16, seed=3)) == 16


def test_few_shot_says_how_many_there_are(write_task: Any) -> None:
    toy = task(f"{write_task([record(0), record(2), record(1)])}/toy")
    assert len(toy.few_shot(1, 0)) == 2
    with pytest.raises(DeltaTuneError, match=r"cannot give 2 shots: label 'yes' has 1 train examples.*at most 1"):
        toy.few_shot(2, 0)
    with pytest.raises(DeltaTuneError, match="k of 1 or more"):
        toy.few_shot(0, 0)


def test_few_shot_choice_does_not_depend_on_the_order_of_the_file(write_task: Any) -> None:
    records = [record(number) for number in range(40)]
    chosen = task(f"{write_task(records)}/toy").few_shot(3, seed=7)
    assert task(f"{write_task(records[::-1])}/toy").few_shot(3, seed=7) == chosen


def test_unknown_and_empty_splits(write_task: Any) -> None:
    toy = task(f"{write_task([record(0)])}/toy")
    with pytest.raises(DeltaTuneError, match="task 'toy' has no dev examples"):
        toy.split("dev")
    with pytest.raises(DeltaTuneError, match=r"unknown split 'tset'.*Did you mean 'test'"):
        toy.split("tset")  # pyright: ignore[reportArgumentType]


def test_a_file_that_changed_is_noticed(write_task: Any) -> None:
    folder = write_task([record(0)])
    toy = task(f"{folder}/toy")
    digest = toy.digest
    write_task([record(0), record(1)])
    with pytest.raises(DeltaTuneError, match="is not the file it was"):
        toy.split("train")
    assert task(f"{folder}/toy").digest != digest


def test_a_task_can_be_sent_to_another_process() -> None:
    sentiment = task("sentiment")
    sentiment.split("dev")
    copy: Task = pickle.loads(pickle.dumps(sentiment))
    assert copy == sentiment
    assert copy.split("train") == sentiment.split("train")
