"""Every example, killed without warning and started again, ends where it ends undisturbed; the backbone is what it was."""

from __future__ import annotations

import multiprocessing
import runpy
import signal
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

import deltatune as dt

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LIBRARIES = {
    "plain_torch": "torch",
    "hf_trainer": "transformers.trainer",
    "hf_accelerate": "accelerate",
    "lightning_module": "pytorch_lightning",
}


def _run(script: Path, arguments: list[str], log: Path) -> None:
    """What one process does: the script, as `python examples/x.py` runs it."""
    torch.set_num_threads(1)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    with log.open("w") as out, redirect_stdout(out), redirect_stderr(out):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except Exception:
            traceback.print_exc()
            raise


@pytest.fixture(scope="module")
def start():
    """Start an example in a process of its own, from a server that has the libraries loaded; returns (exit code, output)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [*LIBRARIES.values(), "deltatune.tuning.run", "deltatune.methods", "tests.examples.test_examples"]
    )

    def start(name: str, out: Path, *arguments: str) -> tuple[int | None, str]:
        options = ["--steps", "6", "--every", "2", "--out", str(out), *arguments]
        log = out.parent / f"{out.name}.log"
        process = context.Process(target=_run, args=(EXAMPLES / f"{name}.py", options, log))
        process.start()
        process.join(240)
        process.kill()
        return process.exitcode, log.read_text()

    return start


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*LIBRARIES, "parts"}


@pytest.mark.parametrize("name", LIBRARIES)
def test_killed_and_resumed_it_ends_where_it_ends_undisturbed(start, tmp_path, name):
    pytest.importorskip(LIBRARIES[name])
    ended, said = start(name, tmp_path / "whole")
    assert ended == 0, said
    killed, said_before = start(name, tmp_path / "killed", "--die-after", "5")
    assert killed == -signal.SIGKILL, said_before
    kept = [path.stat().st_size for path in (tmp_path / "killed").rglob("*") if path.is_file()]
    ended, said_after = start(name, tmp_path / "killed")
    assert ended == 0, said_after
    whole, resumed = (dt.Weights.read(tmp_path / folder / "delta") for folder in ("whole", "killed"))
    assert whole.tensors.keys() == resumed.tensors.keys()
    assert all(torch.equal(t, resumed.tensors[n]) for n, t in whole.tensors.items())
    assert kept and max(kept) < 3.5 * whole.nbytes  # leaves and two moments of Adam, and no backbone
    first = dt.init(whole.delta, dt.load_backbone("pebble").model)
    assert any(not torch.equal(t, first.tensors[n]) for n, t in whole.tensors.items())
    for text in (said, said_after):
        assert "accuracy: " in text and "the backbone is as it was: True" in text
