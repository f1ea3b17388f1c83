"""`deltatune tune`, `eval` and `predict` as a user meets them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deltatune.cli.app import main
from tests.tuning import training

QUICK = [
    "--steps",
    "40",
    "--lr",
    "5e-3",
    "--batch",
    "8",
    "--max-target",
    "4",
    "--eval-every",
    "20",
    "--checkpoint-every",
    "10",
]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    return ["--task", training.write_task(folder / "tasks"), "--backbone", training.write_backbone(folder / "model")]


def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str, str]:
    """Run the command line in this process; return its exit code and what it printed."""
    monkeypatch.setattr(sys, "argv", ["deltatune", *words])
    code = 0
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_stopped_by_ctrl_c_the_same_command_goes_on(
    names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    command = ["tune", *names, *QUICK, "--steps", "250", "--out", str(out)]
    process = subprocess.Popen([sys.executable, "-m", "deltatune.cli", *command], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out / "checkpoint.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Issue the same command again and it continues from its last checkpoint" in " ".join(shown.split())
    before = (out / "log.jsonl").read_text().splitlines()
    kept = json.loads((out / "checkpoint.json").read_text())["step"]
    assert 10 <= kept <= len(before) < 250
    code, _, _ = call(capsys, monkeypatch, *command)
    assert code == 0
    after = (out / "log.jsonl").read_text().splitlines()
    assert after[:kept] == before[:kept], "the steps before the checkpoint are not run again"
    assert [line["step"] for line in map(json.loads, after) if "loss" in line] == list(range(1, 251))


def test_tune_then_eval_then_predict(
    names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "run")
    code, shown, _ = call(capsys, monkeypatch, "tune", *names, *QUICK, "--delta", "Full()", "--out", out)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert code == 0
    for part in (
        f"{result['test']:.1f}",
        "always the commonest label",
        f"{result['parameters']:,}",
        "deltatune predict",
    ):
        assert part in shown
    code, shown, _ = call(capsys, monkeypatch, "eval", out, "--out", str(tmp_path / "again.jsonl"))
    assert code == 0 and f"accuracy {result['test']:.1f}" in shown and "24 test examples" in shown
    file = tmp_path / "texts.jsonl"
    file.write_text('{"input": "good film bad"}\n{"input": "bad very film bad"}\n')
    code, shown, _ = call(capsys, monkeypatch, "predict", out, "good film bad", "bad very film bad")
    assert code == 0 and len(shown.split()) == 2
    call(capsys, monkeypatch, "predict", out, "--file", str(file), "--out", str(tmp_path / "answers.jsonl"))
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [answer["prediction"] for answer in answers] == shown.split()
    assert [answer["input"] for answer in answers] == ["good film bad", "bad very film bad"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tune", "--task", "topicc"], "Did you mean 'topic'"),
        (["tune", "--task", "topic", "--delta", "LoRAA()"], "'LoRA'"),
        (["tune", "--task", "topic", "--optimizer", "adamv"], "Did you mean 'adamw'"),
        (["tune", "--task", "topic", "--start", "nowhere"], "no weights to start from in nowhere"),
        (["tune", "--task", "topic", "--lr", "-1"], "lr is -1.0; it cannot be below 0"),
        (["eval", "nowhere"], "there is no folder nowhere"),
        (["eval", "--split", "tests"], "Did you mean 'test'"),
        (["predict", ".", "a", "--file", "b"], "texts and --file are both given"),
        (["predict", ".", "--file", "nowhere.txt"], "cannot read nowhere.txt"),
    ],
)
def test_a_mistake_is_one_message_without_a_traceback(
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, errors = call(capsys, monkeypatch, *words)
    assert code == 2 and message in errors and "Traceback" not in errors
    assert not list(tmp_path.iterdir())


def test_a_bad_line_of_a_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text('{"input": "a"}\n{"text": "b"}\n')
    code, _, errors = call(capsys, monkeypatch, "predict", str(tmp_path), "--file", str(file))
    assert code == 2 and "line 2" in errors and '"input"' in errors


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--cache", "1MB", "--cache-on-disk"], "1 computed once for each of 64 examples (0 MiB)"),
        (["--cache", "0"], "computed in every step, as no room is given to it"),
    ],
)
def test_tune_says_what_it_kept_of_the_blocks_below(
    option: list[str],
    said: str,
    names: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ["tune", *names, *QUICK, "--steps", "10", "--no-test", "--delta", "LastLayers()"]
    code, shown, _ = call(capsys, monkeypatch, *command, *option, "--out", str(tmp_path / "run"))
    assert code == 0 and said in " ".join(shown.split())


def test_a_cache_that_is_no_size_is_refused(
    names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, errors = call(capsys, monkeypatch, "tune", *names, "--cache", "much", "--out", str(tmp_path / "run"))
    assert code != 0 and "'much' is no amount of memory" in " ".join(errors.split()) and not (tmp_path / "run").exists()
