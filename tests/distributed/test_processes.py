"""Two processes that split every batch train what one process trains: DDP, FSDP2 around and under the delta, CPU offload."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deltatune as dt
from tests import tiny
from tests.distributed.worker import METHODS, MODES, ROWS, train

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder with what both processes trained, in every mode with every method; they are started once."""
    folder = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "tests.distributed.worker"]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(folder)], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        for process in started:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors
    finally:
        for process in started:
            process.kill()
    return folder


@pytest.fixture(scope="module")
def alone() -> dict[str, dt.Weights]:
    """What one process trains on whole batches."""
    found = {}
    for name, method in METHODS.items():
        attachment = dt.attach(tiny.llama().double(), method)
        train(attachment.model, attachment.parameters(), slice(0, ROWS))
        found[name] = attachment.weights
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_train_what_one_trains(trained, alone, name, mode):
    start = dt.init(METHODS[name], tiny.llama().double())
    one = alone[name]
    assert max((t - start.tensors[n]).abs().max() for n, t in one.tensors.items()) > 0.05
    for rank in ("0", "1"):
        two = dt.Weights.read(trained / rank / mode / name)
        assert (two.delta, two.backbone) == (one.delta, one.backbone)
        torch.testing.assert_close(two.tensors, dict(one.tensors), rtol=0, atol=1e-6)
