"""The command line as a user meets it: real processes, their output and their exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

HEAVY = ("torch", "transformers", "datasets", "sklearn", "matplotlib", "torchmetrics", "accelerate")
SETTINGS = {"COLUMNS": "250", "NO_COLOR": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
HELPS = [
    (), ("tune",), ("eval",), ("predict",), ("pretrain",), ("methods",), ("sites",),
    ("inspect",), ("convert",), ("merge",), ("diff",), ("place",),
    ("theory",), ("theory", "gap"), ("theory", "intrinsic"),
    ("study",), ("study", "run"), ("study", "status"), ("study", "report"),
]  # fmt: skip
WITH_EXAMPLE = [("sites",), ("place",), ("inspect",), ("tune",), ("convert",), ("merge",), ("diff",)]


def run(*words: str, folder: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a wide terminal without colours."""
    environment = {k: v for k, v in os.environ.items() if k != "DELTATUNE_DEBUG"} | SETTINGS | variables
    command = [sys.executable, "-m", "deltatune.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=300)


@pytest.mark.parametrize("words", HELPS, ids=" ".join)
def test_help_says_what_a_command_does(words: tuple[str, ...]) -> None:
    done = run(*words, "--help")
    assert done.returncode == 0, done.stderr
    assert f"Usage: {' '.join(['deltatune', *words])}" in done.stdout
    assert len(done.stdout.splitlines()) > 8
    assert words not in WITH_EXAMPLE or f"Example: deltatune {words[0]} " in " ".join(done.stdout.split())


def test_help_loads_no_heavy_library() -> None:
    code = f"""
import sys
import time
from deltatune.cli import main
for name in ("tune", "merge", "convert", "diff", "inspect", "sites"):
    sys.argv = ["deltatune", name, "--help"]
    try:
        main()
    except SystemExit as end:
        print(end.code, [name for name in {HEAVY} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines().count("0 []") == 6, done.stderr


def test_the_installed_script_is_the_same_command() -> None:
    done = subprocess.run([Path(sys.executable).with_name("deltatune"), "--version"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("deltatune ")


def test_methods_lists_every_method_with_its_equation_and_paper() -> None:
    from deltatune.core.method import registry

    import_module("deltatune.methods")

    done = run("methods")
    assert done.returncode == 0, done.stderr
    lines = {cells[0]: line for line in done.stdout.splitlines() if (cells := line.split())}
    for name in registry():
        assert any(sign in lines[name] for sign in "=:"), f"the file of {name} opens without an indented equation"
        assert any(year in lines[name] for year in (" 19", " 20")), f"{name} names no paper"


def test_methods_explains_one() -> None:
    done = run("methods", "--explain", "LoRA")
    assert done.returncode == 0, done.stderr
    assert "W' = W + (alpha / rank) B A" in done.stdout
    assert "LoRA(rank=8, alpha=16.0, init=KaimingUniform())" in done.stdout


def test_methods_counts_on_a_backbone() -> None:
    done = run("methods", "--on", "pebble")
    assert done.returncode == 0, done.stderr
    line = next(text for text in done.stdout.splitlines() if text.split()[:1] == ["LoRA"])
    assert "{attn.{q,v},cross.{q,v}?}" in line
    assert "rank (d_in + d_out) a site" in line
    assert line.rstrip().endswith("%)")


def test_place_prints_a_delta_that_fits_the_budget() -> None:
    done = run("place", "pebble", "topic", "--budget", "20000", "--examples", "8", "--json")
    found = json.loads(done.stdout)
    assert found["parameters"] <= 20000
    sites = run("sites", "pebble", "--delta", found["delta"])
    assert f"{found['parameters']:,} trained parameters" in sites.stdout
    refused = run("place", "pebble", "topic", "--budget", "10")
    assert refused.returncode == 2
    assert "a budget of 10 parameters holds no candidate" in refused.stderr


def test_sites_counts_what_the_library_would_train() -> None:
    import deltatune as dt

    done = run("sites", "pebble", "--delta", "LoRA(rank=2) + BitFit()")
    assert done.returncode == 0, done.stderr
    table = dt.sites(dt.load_backbone("pebble").model, dt.parse("LoRA(rank=2) + BitFit()"))
    assert f"{table.parameters:,} trained parameters" in done.stdout
    assert f"of the {table.backbone_parameters:,} in the backbone" in done.stdout
    assert all(path in done.stdout for path, *_ in table.rows())


def test_a_mistake_ends_the_process_with_its_message() -> None:
    done = run("methods", "--explain", "Lora")
    assert done.returncode == 2
    assert done.stderr.startswith("Error: there is no method 'Lora'. Did you mean 'LoRA'")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("methods", "--on", "peble"), ("there is no backbone 'peble'", "'pebble'")),
        (("sites", "peble"), ("there is no backbone 'peble'", "'pebble'")),
        (("sites", "pebble", "--delta", "LoRa(rank=2)"), ("there is no", "'LoRa'", "'LoRA'")),
        (("sites", "pebble", "--delta", "LoRA(rnk=2)"), ("LoRA has no field 'rnk'", "'rank'")),
        (("sites", "pebble", "--delta", "LoRA(rank=2).at('atn.q')"), ("there is no role 'atn.q'", "'attn.q'")),
        (("sites", "pebble", "--delta", "LoRA(rank=2).at('attn.q[99]')"), ("matches nothing", "layers")),
        (("sites", "pebble", "--delta", "LoRA(rank="), ("cannot read", "column")),
        (("sites", "pebble", "--delta", "__import__('os')"), ("__import__",)),
        (("sits",), ("No such command 'sits'", "'sites'")),
        (("study", "rn"), ("No such command 'rn'", "'run'")),
        (("tune", "--task", "no-such-task"), ("no-such-task",)),
        (("study", "run", "missing.toml"), ("missing.toml",)),
        (("predict", "missing", "a text"), ("missing",)),
        (("eval", "missing", "--split", "tset"), ("there is no split 'tset'", "'test'")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_mistake_is_named_with_its_cure(
    words: tuple[str, ...], said: tuple[str, ...], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    from deltatune.cli import main

    for variable, value in SETTINGS.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.delenv("DELTATUNE_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["deltatune", *words])
    with pytest.raises(SystemExit) as end:
        main()
    message = capsys.readouterr().err
    assert end.value.code == 2, message
    assert all(part in message for part in said), message


def test_debug_shows_the_traceback() -> None:
    asked = run("--debug", "methods", "--explain", "Lora")
    by_environment = run("methods", "--explain", "Lora", DELTATUNE_DEBUG="1")
    for done in (asked, by_environment):
        assert done.returncode == 1
        assert "Traceback" in done.stderr
        assert "there is no method 'Lora'" in done.stderr


WAITING = """
import time
from deltatune.cli import app

@app.app.command()
def wait():
    print("ready", flush=True)
    time.sleep(60)

app.main()
"""


def test_ctrl_c_ends_with_one_line() -> None:
    command = [sys.executable, "-c", WAITING, "wait"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as waiting:
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == "ready\n"
        waiting.send_signal(signal.SIGINT)
        _, message = waiting.communicate(timeout=60)
    assert waiting.returncode == 130
    assert message == "Stopped.\n"
