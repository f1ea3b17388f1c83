"""What each instrument costs: processor seconds and peak memory on the plan's backbone, each in a process of its own.

`python -m studies.theory.costs NAME STATE` measures one and prints it as JSON. Memory is that of the whole process at its
highest; the row `training step` is the plain training that all are compared with.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import deltatune as dt
from deltatune.core.weights import Weights
from deltatune.theory.backbone import BackboneDynamics
from deltatune.theory.bound import check_bound
from deltatune.theory.control import control_report
from deltatune.theory.controllability import controllability
from deltatune.theory.curvature import sharpness
from deltatune.theory.feedback import loops
from deltatune.theory.function_gap import compare_answers
from deltatune.theory.landscape import interpolate, plane
from deltatune.theory.msa import MSA
from deltatune.theory.neutral import check_neutral
from deltatune.theory.overlap import gradient_overlap, principal_angles
from deltatune.theory.placement import place_by_control
from deltatune.theory.residual import residuals
from deltatune.theory.robust import manifolds, steered
from deltatune.theory.similarity import compare_states
from deltatune.theory.size import smallest_bottleneck, smallest_size
from deltatune.theory.spectrum import gradient_spectra, spectra
from deltatune.tuning.memory import Peak, in_use
from studies.theory.data import Batches, examples_of
from studies.theory.plan import Plan
from studies.theory.state import State

MEGABYTE = 2**20
TASK, SEED = 2, 0  # the plan's task with the longest texts
EVERYWHERE = "{attn.{q,k,v,o},cross.{q,k,v,o},ffn.{gate,up,down}}"


class Subject:
    """What instruments are asked of: the backbone, batches, and the finished runs of one task."""

    def __init__(self, state: State) -> None:
        self.state, self.task = state, state.plan.tasks[TASK]
        self.model: Any = state.backbone.model.eval()
        self.batches: Batches = examples_of(state, self.task, "train", 4 * state.plan.recipe.batch, SEED)

    def weights(self, method: str, seed: int = SEED) -> Weights:
        """Return what a method learned."""
        return self.state.weights(self.state.plan.run(self.state.methods()[method], self.task, seed))

    def attached(self, what: Any) -> dt.Attachment:
        """Attach weights or a delta."""
        return dt.attach(self.model, what)

    def system(self, method: str) -> BackboneDynamics:
        """Return the backbone with what a method learned, as a system."""
        return BackboneDynamics(self.attached(self.weights(method)), lambda: self.model(**self.batches[0]).loss)


def train(s: Subject, delta: Any) -> None:
    """Take four steps of AdamW."""
    optimizer = torch.optim.AdamW(s.attached(delta).parameters(), lr=1e-3)
    for batch in s.batches:
        s.model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def close(s: Subject) -> None:
    """Find the planes of four batches, and adjust a prefix to one."""
    first = torch.zeros(s.state.plan.recipe.batch, 1, dtype=torch.long)
    prompts = [{name: t for name, t in b.items() if name != "labels"} | {"decoder_input_ids": first} for b in s.batches]
    attached = s.attached(s.weights("PrefixTuning"))
    with steered(attached, prompts[0], manifolds(s.model, prompts)):
        pass


def residual(s: Subject, text: str) -> None:
    """Project what Full did on a family."""
    residuals(s.model, s.weights("Full"), [dt.parse(text)])


INSTRUMENTS: dict[str, Callable[[Subject], Any]] = {
    "training step: LoRA, 4 batches": lambda s: train(s, dt.LoRA(rank=8)),
    "training step: Full, 4 batches": lambda s: train(s, dt.Full()),
    "intrinsic dimension: a step of SAID(dim=4096), 4 batches": lambda s: train(s, dt.SAID(dim=4096)),
    "neutral delta: LoRA, 4 batches": lambda s: check_neutral(s.model, dt.LoRA(rank=8), s.batches),
    "spectrum: Full": lambda s: spectra(s.model, s.weights("Full")),
    "spectrum: LoRA": lambda s: spectra(s.model, s.weights("LoRA")),
    "spectrum of the gradient, 4 batches": lambda s: gradient_spectra(s.model, EVERYWHERE, s.batches),
    "residual: LoRA(rank=8) at all linears": lambda s: residual(s, f'LoRA(rank=8).at("{EVERYWHERE}")'),
    "residual: BitFit": lambda s: residual(s, "BitFit()"),
    "residual: DID(dim=1000)": lambda s: residual(s, "DID(dim=1000)"),
    "bound along a segment: LoRA, 1 batch": lambda s: check_bound(
        s.model, s.weights("Full"), dt.LoRA(rank=8).at(EVERYWHERE), s.batches[:1], tolerance=1.0
    ),
    "function gap: Full and LoRA, 4 batches": lambda s: compare_answers(
        s.model, s.weights("Full"), s.weights("LoRA"), s.batches
    ),
    "CKA: Full and LoRA, 4 batches": lambda s: compare_states(s.model, s.weights("Full"), s.weights("LoRA"), s.batches),
    "principal angles: two seeds of LoRA": lambda s: principal_angles(s.weights("LoRA"), s.weights("LoRA", 1), s.model),
    "gradient overlap: LoRA, 4 batches": lambda s: gradient_overlap(
        s.attached(s.weights("LoRA")), s.batches[:2], s.batches[2:]
    ),
    "landscape: 11 x 11 points, LoRA, 1 batch": lambda s: plane(s.attached(s.weights("LoRA")), s.batches[:1]),
    "interpolation: 11 points, LoRA, 4 batches": lambda s: interpolate(
        s.model, dt.init(s.weights("LoRA").delta, s.model, SEED), s.weights("LoRA"), s.batches
    ),
    "sharpness: 5 eigenvalues, LoRA, 1 batch": lambda s: sharpness(s.attached(s.weights("LoRA")), s.batches[:1]),
    "sharpness: 5 eigenvalues, LoRA, half a batch": lambda s: sharpness(
        s.attached(s.weights("LoRA")), [{name: tensor[: len(tensor) // 2] for name, tensor in s.batches[0].items()}]
    ),
    "control report: LoRA, 1 batch": lambda s: control_report(s.system("LoRA")),
    "control report: Full, 1 batch": lambda s: control_report(s.system("Full")),
    "controllability: LoRA, 8 probes, 1 batch": lambda s: controllability(s.system("LoRA")),
    "controllability: Full, 8 probes, 1 batch": lambda s: controllability(s.system("Full")),
    "one step of MSA: LoRA, 1 batch": lambda s: MSA(1e-3).update(s.system("LoRA")),
    "open or closed loop: Adapter": lambda s: loops(s.attached(s.weights("Adapter"))),
    "closed loop: prefix, 10 steps, 1 batch": close,
    "placement by control, 4 batches": lambda s: place_by_control(
        s.model, dt.LoRA(rank=8).at(EVERYWHERE), s.batches, 49152
    ),
    "size: rank, from a finished Full": lambda s: smallest_size(spectra(s.model, s.weights("Full"))),
    "size: bottleneck, 4 batches": lambda s: smallest_bottleneck(s.model, s.weights("Full"), s.batches),
}


def costs(state: State, seed: int) -> None:
    """Measure every instrument once."""
    for name in INSTRUMENTS if seed == state.plan.seeds[0] else ():
        key = "".join(letter if letter.isalnum() else "-" for letter in name)
        state.measured(f"cost-{key}", partial(_alone, state, name))


def _alone(state: State, name: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "studies.theory.costs", name, str(state.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return {"name": name, **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    subject = Subject(State(Plan.read(), Path(sys.argv[2])))
    loaded, peak, started = in_use(torch.device("cpu")), Peak(torch.device("cpu")), time.process_time()
    INSTRUMENTS[sys.argv[1]](subject)
    seconds = time.process_time() - started
    print(json.dumps({"seconds": seconds, "loaded": loaded / MEGABYTE, "peak": peak.note() / MEGABYTE}))


if __name__ == "__main__":
    main()
