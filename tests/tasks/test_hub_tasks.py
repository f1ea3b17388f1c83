"""Hub data sets: rows read by `datasets` from local folders in the hub's formats become checked examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deltatune.errors import DeltaTuneError
from deltatune.tasks import hub_names, score, task

datasets = pytest.importorskip("datasets", reason="needs the hub extra: pip install 'deltatune[hub]'")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def parquet(folder: Path, features: Any = None, **splits: dict[str, list[Any]]) -> Path:
    """Write a data set the way the hub stores it: one parquet file a split, with its features."""
    for split, columns in splits.items():
        rows = datasets.Dataset.from_dict(columns, features=features)
        rows.to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))
    return folder


def sst2(folder: Path) -> Path:
    features = datasets.Features(
        {
            "sentence": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["negative", "positive"]),
            "idx": datasets.Value("int32"),
        }
    )

    def rows(count: int, start: int, label: int | None = None) -> dict[str, list[Any]]:
        numbers = list(range(start, start + count))
        labels = [number % 2 if label is None else label for number in numbers]
        return {"sentence": [f"film {number}" for number in numbers], "label": labels, "idx": numbers}

    return parquet(folder, features, train=rows(40, 0), validation=rows(6, 100), test=rows(5, 200, label=-1))


def test_labels_and_splits_of_glue(tmp_path: Path) -> None:
    found = task(f"hub:glue/sst2@{sst2(tmp_path / 'sst2')}")
    train, dev, test = (found.split(split) for split in ("train", "dev", "test"))
    # The test split of GLUE has no labels, so validation is the test split and dev is carved from train.
    assert [example.input for example in test] == [f"film {n}" for n in range(100, 106)]
    assert [example.target for example in test] == ["negative", "positive"] * 3
    assert (len(train), len(dev)) == (36, 4)
    assert {example.input for example in train + dev} == {f"film {n}" for n in range(40)}
    assert task(f"hub:glue/sst2@{tmp_path / 'sst2'}").split("dev") == dev
    assert len({example.id for example in train + dev + test}) == 46
    assert score(found.metric, [example.target for example in test], test) == 100.0


def test_the_digest_follows_the_files(tmp_path: Path) -> None:
    first = task(f"hub:glue/sst2@{sst2(tmp_path / 'one')}").digest
    assert task(f"hub:glue/sst2@{sst2(tmp_path / 'one')}").digest == first
    parquet(tmp_path / "one", test={"sentence": ["new"], "label": [0], "idx": [0]})
    assert task(f"hub:glue/sst2@{tmp_path / 'one'}").digest != first
    assert task("glue/sst2").digest != first


def test_a_split_without_labels_is_refused(tmp_path: Path) -> None:
    columns = {"sentence": ["a", "b"], "label": [1, -1]}
    folder = parquet(tmp_path / "d", train=columns, validation=columns)
    with pytest.raises(DeltaTuneError, match="validation row 1: the row has no label"):
        task(f"hub:glue/sst2@{folder}").split("test")


def test_rows_without_a_label_are_dropped_where_the_mapping_says_so(tmp_path: Path) -> None:
    columns = {"premise": ["p", "q"], "hypothesis": ["h", "i"], "label": [-1, 2]}
    found = task(f"hub:snli@{parquet(tmp_path / 'd', train=columns, validation=columns, test=columns)}")
    (example,) = found.split("dev")
    assert (example.input, example.target) == ("premise: q\nhypothesis: i", "contradiction")


def test_a_label_outside_the_names_is_refused(tmp_path: Path) -> None:
    columns = {"sentence": ["a"], "label": [7]}
    folder = parquet(tmp_path / "d", train=columns, validation=columns)
    with pytest.raises(DeltaTuneError, match="label 7 is outside the 2 labels"):
        task(f"hub:glue/sst2@{folder}").split("test")


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    columns = {"sentense": ["a"], "label": [1]}
    folder = parquet(tmp_path / "d", train=columns, validation=columns)
    with pytest.raises(DeltaTuneError, match=r"no column 'sentence'; found sentense, label.*Did you mean 'sentense'"):
        task(f"hub:glue/sst2@{folder}").split("test")


def jsonl(folder: Path, **splits: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def one(tmp_path: Path, name: str, row: dict[str, Any], **splits: str) -> Any:
    """The only test example of a data set of one row in every split."""
    folder = jsonl(tmp_path / "d", **{split: [row] for split in ("train", "validation", "test")})
    return task(f"hub:{name}@{folder}").split("test")[0]


def test_multiple_choice_from_a_list_of_options(tmp_path: Path) -> None:
    row = {
        "question": "What is hot?",
        "choices": {"text": ["ice", "fire", "snow"], "label": ["1", "2", "3"]},
        "answerKey": "2",
    }
    example = one(tmp_path, "ai2_arc/easy", row)
    assert example.input == "question: What is hot?\n(A) ice\n(B) fire\n(C) snow"
    assert (example.target, example.options, example.question) == (
        "B",
        ("ice", "fire", "snow"),
        "question: What is hot?",
    )


def test_multiple_choice_from_columns(tmp_path: Path) -> None:
    row = {"premise": "It rained.", "choice1": "He got wet.", "choice2": "He won.", "question": "effect", "label": 0}
    example = one(tmp_path, "super_glue/copa", row)
    assert example.input == "context: It rained.\nquestion: What is the effect?\n(A) He got wet.\n(B) He won."
    assert example.target == "A"


def test_boolean_answers(tmp_path: Path) -> None:
    example = one(tmp_path, "boolq", {"passage": "p", "question": "q", "answer": False})
    assert example.target == "no"


def test_all_accepted_answers_are_references(tmp_path: Path) -> None:
    row = {"context": "c", "question": "q", "answers": {"text": ["in Rome", "Rome"], "answer_start": [0, 3]}}
    example = one(tmp_path, "squad", row)
    assert (example.target, example.references) == ("in Rome", ("in Rome", "Rome"))


def test_braces_in_a_column_are_text(tmp_path: Path) -> None:
    assert one(tmp_path, "imdb", {"text": "a {text} of {label}", "label": 1}).input == "a {text} of {label}"


def test_numbers_are_targets_of_stsb(tmp_path: Path) -> None:
    folder = jsonl(
        tmp_path / "d",
        train=[{"sentence1": "a", "sentence2": "b", "label": 2.5}],
        validation=[{"sentence1": "a", "sentence2": "b", "label": value} for value in (0.0, 2.5, 5.0)],
    )
    examples = task(f"hub:glue/stsb@{folder}").split("test")
    assert score("pearson", ["1", "2", "3"], examples) == pytest.approx(100.0)


def test_a_mapping_of_ones_own(tmp_path: Path) -> None:
    folder = jsonl(tmp_path / "d", train=[{"q": "one?", "a": "1"}], test=[{"q": "two?", "a": "2"}])
    hub = {"path": str(folder), "input": "{q}", "target": "a", "splits": {"train": "train", "test": "test"}}
    entry = {"name": "sums", "kind": "generation", "metric": "exact-match", "hub": hub}
    (tmp_path / "tasks.json").write_text(json.dumps({"tasks": [entry]}))
    (example,) = task(f"{tmp_path}/sums").split("test")
    assert (example.input, example.target) == ("two?", "2")


@pytest.mark.parametrize("file", ["loader.py", "rows.pkl", "rows.pt"])
def test_pickles_and_scripts_are_refused(tmp_path: Path, file: str) -> None:
    folder = sst2(tmp_path / "d")
    (folder / file).write_bytes(b"\x80\x04.")
    with pytest.raises(DeltaTuneError, match=f"{file} is not a data file.*never opened"):
        task(f"hub:glue/sst2@{folder}").split("train")


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DeltaTuneError, match="there is no folder"):
        task(f"hub:glue/sst2@{tmp_path / 'gone'}")


def test_a_folder_without_data_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DeltaTuneError, match=r"cannot load split 'train'.*Without a network"):
        task(f"hub:glue/sst2@{tmp_path / 'empty'}").split("train")


@pytest.mark.parametrize("name", hub_names())
def test_every_known_hub_task_is_well_formed(name: str) -> None:
    found = task(name)
    assert found.name == name
    assert found.definition and found.category
    assert (found.kind == "classification") == bool(found.labels)
