"""`deltatune predict`: answers to texts from the command line, a file or standard input."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltatune.errors import DeltaTuneError

if TYPE_CHECKING:
    from deltatune.tasks import Example


def predict(
    weights: Annotated[Path, typer.Argument(help="Folder that tune wrote.", show_default=False)],
    texts: Annotated[
        list[str] | None,
        typer.Argument(help="Texts to answer; without any they are read from --file or standard input."),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            "-f",
            help="One text a line; a .jsonl file has objects with `input`, and `options` for multiple choice.",
        ),
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="The frozen model; by default the one the delta was tuned on.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Answer as in this task; by default the one the delta was tuned for.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write input and prediction as JSON lines here.")
    ] = None,
) -> None:
    """Answer texts with a tuned delta, one answer a line."""
    questions = _questions(texts or [], file)
    from deltatune.tuning import predict

    answers = predict(backbone, weights, questions, task)
    if out is None:
        for answer in answers:
            typer.echo(answer)
        return
    _write(out, questions, answers)


def _write(out: Path, questions: list[str | Example], answers: list[str]) -> None:
    from deltatune.files import write_text

    inputs = [question if isinstance(question, str) else question.input for question in questions]
    lines = [
        json.dumps({"input": text, "prediction": answer}, ensure_ascii=False)
        for text, answer in zip(inputs, answers, strict=True)
    ]
    write_text(out, "".join(line + "\n" for line in lines))
    typer.echo(f"Wrote {len(lines)} answers to {out}.")


def _questions(texts: list[str], file: Path | None) -> list[str | Example]:
    if texts and file is not None:
        raise DeltaTuneError("texts and --file are both given; give one of them.")
    if texts:
        return list(texts)
    if file is None:
        return [line.rstrip("\n") for line in sys.stdin if line.strip()]
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DeltaTuneError(f"cannot read {file}: {error}.") from error
    if file.suffix != ".jsonl":
        return [line for line in lines if line.strip()]
    return [_record(line, f"{file}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]


def _record(line: str, where: str) -> Example:
    from deltatune.tasks import Example

    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise DeltaTuneError(f"{where}: not JSON ({error.msg} at column {error.colno}).") from error
    if not isinstance(record, dict) or not isinstance(record.get("input"), str):
        raise DeltaTuneError(f'{where}: expected an object with the text in "input"; found {line[:60]!r}.')
    return Example(str(record.get("id", where)), record["input"], "", (), tuple(record.get("options", ())))
