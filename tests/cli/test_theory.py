"""`deltatune theory` on short real runs of the built-in backbone: what it prints, writes, refuses, and continues after a kill."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import deltatune as dt
from deltatune.theory.spectrum import spectra
from deltatune.tuning import Recipe, Run, tune

Call = Callable[..., tuple[int, str, str]]
METHODS = {"lora": "LoRA(rank=2)", "full": "Full()", "prompt": "PromptTuning(length=2)"}
TINY = Recipe(steps=2, batch=2, lr=1e-3, eval_every=2, dev_limit=4, test_limit=4, max_input=32)
FEW = ("--examples", "4", "--batch", "2")
SWEEP = ("--on", "pebble", "--task", "topic", "--family", "Reparam(PromptTuning(length=2), through=Subspace(dim={d}))")
SWEEP += ("--dims", "5,20", "--seeds", "3", "--share", "0.5", "--steps", "4", "--batch", "2", "--eval-every", "2")
SWEEP += ("--dev-limit", "4", "--max-input", "32", "--lr", "1e-3", "--subspace-lr", "1e-2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a short run of each method, and one of LoRA for another task."""
    folder = tmp_path_factory.mktemp("runs")
    for name, delta in METHODS.items():
        tune(Run(delta, "pebble", "topic", TINY), folder / name)
    tune(Run(METHODS["lora"], "pebble", "sentiment", TINY), folder / "other")
    return folder


def start(*words: object, folder: Path) -> subprocess.Popen[str]:
    """Begin the command in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "250"}
    command = [sys.executable, "-m", "deltatune.cli", "theory", *map(str, words)]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Let the command end well, and return what it printed."""
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return out


ASKED = [
    (("spectrum", "lora", "full", "--family", "LoRA(rank=2)"), {"effective rank", "stable rank"}),
    (("gap", "full", "lora", *FEW, "--points", "3"), {"quantity", "linear CKA"}),
    (("landscape", "lora", "full", "--task", "topic", *FEW, "--points", "3", "--eigenvalues", "2", "--steps", "3"), {"residual", "t"}),
    (("control", "lora", *FEW, "--probes", "2"), {"Hamiltonian", "violation", "energy", "|co-state|", "Gramian's trace"}),
    (("size", "full", *FEW), {"size", "% kept"}),
]  # fmt: skip

ALONE = ("control",)  # in a process of their own; a sweep is too


@pytest.mark.parametrize(("words", "columns"), ASKED, ids=[words[0] for words, _ in ASKED])
def test_an_instrument_answers_with_json_and_a_page(
    words: tuple[str, ...], columns: set[str], runs: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = (*words, "--json", "--out", tmp_path / "out")
    monkeypatch.chdir(runs)
    found = json.loads(finish(start(*asked, folder=runs)) if words[0] in ALONE else call("theory", *asked)[1])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"{words[0]}.json", f"{words[0]}.html"}
    assert json.loads((tmp_path / "out" / f"{words[0]}.json").read_text()) == found
    assert found["instrument"] == words[0]
    assert found["finding"] == found["findings"][0]["finding"] and found["finding"].endswith(".")
    assert found["about"]["Backbone"] == "pebble"
    assert columns <= {column for table in found["tables"] for column in table["columns"]}
    assert all(len(row) == len(table["columns"]) for table in found["tables"] for row in table["rows"])
    page = (tmp_path / "out" / f"{words[0]}.html").read_text()
    assert page.count("<svg ") == len(found["charts"]) > 0
    assert not re.findall(r"https?://|\ssrc=|@import|url\((?!#)|href=\"(?!#)", page)
    assert all(f"<th>{column}</th>" in page.replace("&#39;", "'") for column in columns)


def test_the_terminal_has_tables_and_one_sentence(runs: Path, call: Call) -> None:
    code, out, error = call("theory", "spectrum", runs / "lora")
    assert code == 0, error
    model = dt.load_backbone("pebble").model
    found = spectra(model, dt.Weights.read(runs / "lora"))
    lines = out.splitlines()
    assert lines[-1] == found.finding
    rows = [line.split() for line in lines if line.split()[:1] == ["lora"]]
    assert [row[2:5] for row in rows] == [
        [s.role, f"{s.energy**0.5:.4g}", f"{s.effective_rank:.4g}"] for s in found.sites
    ]


def test_a_delta_has_no_gap_to_its_copy_and_needs_no_run_json(runs: Path, tmp_path: Path, call: Call) -> None:
    shutil.copytree(runs / "lora", tmp_path / "copy")
    (tmp_path / "copy" / "run.json").unlink()
    on = ("--on", "pebble", "--task", "topic")
    code, out, error = call("theory", "gap", runs / "lora", tmp_path / "copy", *on, *FEW, "--points", "2", "--json")
    assert code == 0, error
    values = {row[0]: row[1] for table in json.loads(out)["tables"] for row in table["rows"]}
    assert values["KL divergence of the answers, nats"] == values["|eps|, the distance of the weights"] == 0.0
    assert values["block[5]"] == pytest.approx(1.0)


def test_what_does_not_fit_is_left_out_with_the_reason(runs: Path, call: Call) -> None:
    code, out, error = call("theory", "gap", runs / "full", runs / "prompt", *FEW, "--json")
    assert code == 0, error
    (note,) = json.loads(out)["notes"]
    assert "the bound is left out: PromptTuning(length=2) has no change of a weight" in note


REFUSED = [
    (("control", "prompt", *FEW), ("run by itself", "take LoRA", "gap")),
    (("spectrum", "prompt"), ("PromptTuning(length=2) has no change of a weight", "deltatune theory gap")),
    (("spectrum", "full", "--family", "DoRA(rank=2)"), ("DoRA(rank=2) is not linear", "Ask of LoRA")),
    (("size", "prompt"), ("no change of a weight", "take a delta such as LoRA or Full")),
    (("landscape", "full", "prompt", *FEW), ("no change of a weight", "deltatune theory gap")),
    (("control", "lora", "--task", "topc"), ("there is no task 'topc'", "'topic'")),
    (("gap", "lora", "other"), ("the deltas are of topic, sentiment", "--task")),
    (("gap", "lora", "lora"), ("named twice",)),
    (("gap", "lora", "--where", "atn"), ("there is no role 'atn'", "'attn'")),
    (("gap", "lora", "--split", "test"), ("final evaluation alone", "train or dev")),
    (("control", "missing"), ("there is no folder missing", "tune wrote")),
    (("control", "empty"), ("empty is no run", "--on BACKBONE")),
    (("control", "empty", "--on", "pebble", "--task", "topic"), ("delta.safetensors",)),
    (("control", "study"), ("holds a whole study", "runs")),
    (("control", "begun"), ("is not finished",)),
    (("gap", "lora", "foreign"), ("lora is of pebble", "foreign is of elsewhere", "deltatune eval")),
    (("intrinsic", "lora"), ("a run of LoRA(rank=2)", "give a run of Full()", "--on pebble --task topic")),
    (("intrinsic",), ("what to train is not known", "--task NAME")),
    (("intrinsic", "full", "--dims", "5,x"), ("--dims is '5,x'", "10,30,100")),
    (("intrinsic", "full", "--family", "SAID(dim=5)"), ("has no {d}", "SAID(dim={d})")),
]  # fmt: skip


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=[" ".join(words) for words, _ in REFUSED])
def test_what_an_instrument_does_not_fit_is_refused_with_a_cure(
    words: tuple[str, ...], said: tuple[str, ...], runs: Path, call: Call, tmp_path: Path, monkeypatch: Any
) -> None:
    for name in ("empty", "study", "begun", "foreign"):
        (runs / name).mkdir(exist_ok=True)
    (runs / "study" / "study.json").write_text("{}")
    shutil.copy(runs / "lora" / "run.json", runs / "begun")
    foreign = json.loads((runs / "lora" / "run.json").read_text()) | {"backbone": "elsewhere"}
    (runs / "foreign" / "run.json").write_text(json.dumps(foreign))
    (runs / "foreign" / "result.json").write_text("{}")
    monkeypatch.chdir(runs)
    code, out, error = call("theory", *words, "--out", tmp_path / "out")
    assert (code, out) == (2, ""), error
    assert all(part in error for part in said), error
    assert not (tmp_path / "out").exists()


def test_a_killed_sweep_goes_on_and_ends_as_an_undisturbed_one(tmp_path: Path, call: Call) -> None:
    killed = start("intrinsic", *SWEEP, "--out", "killed", folder=tmp_path)
    results = tmp_path / "killed" / "runs"
    until = time.monotonic() + 120
    while not list(results.glob("*/result.json")) and time.monotonic() < until:
        time.sleep(0.005)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    done = {path: path.stat().st_mtime_ns for path in results.glob("*/result.json")}
    assert 1 <= len(done) < 3 and not list((tmp_path / "killed").glob("intrinsic.*"))
    continued = json.loads(finish(start("intrinsic", *SWEEP, "--json", "--out", "killed", folder=tmp_path)))
    assert {path: path.stat().st_mtime_ns for path in done} == done
    code, out, _ = call("theory", "intrinsic", *SWEEP, "--json", "--out", tmp_path / "whole")
    assert code == 0 and json.loads(out) == continued
    (sweep,) = continued["findings"]
    assert sweep["dims"] == [5, 20] and sweep["seeds"] == [3] and len(sweep["scores"][0]) == 2
    (chart,) = continued["charts"]
    assert chart["log"] == "x" and chart["level"] == pytest.approx(0.5 * sweep["full"][0])
