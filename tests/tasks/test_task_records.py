"""Bad records are refused with the file, the line, what was found and what is expected."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from deltatune.errors import DeltaTuneError
from deltatune.tasks import task

GOOD: dict[str, Any] = {"id": "a", "split": "train", "input": "i", "target": "yes", "references": ["yes"]}
LETTERS = {"labels": ["A", "B"]}


def bad(**changes: Any) -> dict[str, Any]:
    return {**GOOD, "id": "b", **changes}


def lacking(field: str) -> dict[str, Any]:
    return {key: value for key, value in bad().items() if key != field}


CASES: list[tuple[Any, list[str], dict[str, Any]]] = [
    (lacking("target"), ["'target' is missing", "id, split, input, target"], {}),
    (lacking("split"), ["'split' is missing"], {}),
    (bad(split="tarin"), ["unknown split 'tarin'", "train, dev or test", "Did you mean 'train'"], {}),
    (bad(target="yess"), ["target 'yess' is not a label", "'no', 'yes'", "Did you mean 'yes'"], {}),
    (bad(target=1), ["'target' is 1", "expected a text"], {}),
    (bad(input="  "), ["'input' is", "not empty"], {}),
    (bad(refrences=["yes"]), ["unknown field 'refrences'", "Did you mean 'references'"], {}),
    (bad(references="yes"), ["'references' is \"yes\"", "expected a list"], {}),
    (bad(references=[]), ["'references' is empty"], {}),
    (bad(id="a"), ["id 'a' was already used in line 1"], {}),
    ("{not json", ["not JSON", "column 2", "{not json"], {}),
    ("[1, 2]", ["found [1, 2]", "expected an object"], {}),
    ('{"id": "b", "split": "train", "input": "i", "target": NaN}', ["NaN is not JSON"], {}),
    (bad(target="C", options=["x", "y"]), ["'C' is not a letter of the 2 options", "A, B"], LETTERS),
    (bad(target="A", options=["x"]), ["1 options", "expected 2"], LETTERS),
    (bad(target="A", options=["x", 2]), ["'options' holds 2"], LETTERS),
    (
        bad(options=["x", "y"]),
        ["'options' found in a generation task"],
        {"kind": "generation", "labels": None, "metric": "rougeL"},
    ),
]


@pytest.mark.parametrize(("line", "said", "entry"), CASES, ids=[case[1][0] for case in CASES])
def test_a_bad_record_is_named(write_task: Any, line: Any, said: list[str], entry: dict[str, Any]) -> None:
    first = {**GOOD, "target": "A", "options": ["x", "y"]} if entry == LETTERS else GOOD
    folder = write_task([first, line], **entry)
    with pytest.raises(DeltaTuneError) as caught:
        task(f"{folder}/toy").split("train")
    message = str(caught.value)
    assert message.startswith(f"{folder / 'toy.jsonl'}, line 2: ")
    for part in said:
        assert part in message


def test_a_line_that_is_not_utf8_is_named(write_task: Any) -> None:
    folder = write_task([GOOD])
    (folder / "toy.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n\xff\xfe")
    with pytest.raises(DeltaTuneError, match="line 2: not UTF-8"):
        task(f"{folder}/toy").split("train")


class Trap:
    """Unpickling this would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "executed")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_pickled_file_is_refused_and_never_opened(write_task: Any, tmp_path: Path, suffix: str) -> None:
    folder = write_task([GOOD], file=f"toy{suffix}")
    data = pickle.dumps(Trap(tmp_path / "executed"))
    (folder / f"toy{suffix}").write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    with pytest.raises(DeltaTuneError, match="pickled or binary"):
        task(f"{folder}/toy").split("train")
    assert not (tmp_path / "executed").exists()


def test_a_truncated_gzip_is_refused(write_task: Any) -> None:
    folder = write_task([GOOD], file="toy.jsonl.gz")
    (folder / "toy.jsonl.gz").write_bytes(gzip.compress(json.dumps(GOOD).encode() * 50)[:-20])
    with pytest.raises(DeltaTuneError, match=r"toy\.jsonl\.gz is not a whole gzip file"):
        task(f"{folder}/toy").split("train")


def test_unicode_line_separators_do_not_break_lines(write_task: Any) -> None:
    text = "one\u2028two\u0085three"
    folder = write_task([json.dumps(bad(input=text), ensure_ascii=False)])
    assert task(f"{folder}/toy").split("train")[0].input == text
