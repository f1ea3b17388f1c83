"""What the examples share, so that each of them shows nothing but its own library: data, score, command line."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.tasks import score, task
from deltatune.tuning import Recipe
from deltatune.tuning.answers import answer, make_questions, make_rows
from deltatune.tuning.encode import Codec, collate

TASK, BATCH = task("topic"), 16
DELTA = dt.LoRA(rank=8).at("{attn.{q,k,v,o},ffn.{gate,up,down}}")


def options(about: str) -> argparse.Namespace:
    """Read the command line: how long, where to, and when to die for the sake of the example."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--steps", type=int, default=100, help="steps to train")
    parser.add_argument("--every", type=int, default=25, help="steps between checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoints and of the trained delta")
    parser.add_argument("--die-after", type=int, help="kill the process after so many steps; start again to go on")
    return parser.parse_args()


def die(now: bool) -> None:
    """End like a machine that lost its power."""
    if now:
        os.kill(os.getpid(), signal.SIGKILL)


def batches(backbone: dt.Backbone, count: int) -> list[dict[str, Tensor]]:
    """Return so many batches of the training split, always the same in the same order."""
    codec = Codec(backbone, max_input=96, max_target=8)
    rows = make_rows(codec, TASK, TASK.split("train"))
    starts = [BATCH * step % len(rows) for step in range(count)]
    return [collate(rows[start : start + BATCH], codec.pad) for start in starts]


def finish(backbone: dt.Backbone, attachment: dt.Attachment, out: Path) -> None:
    """Save the delta, print its score on the dev split, take it off, and see that the backbone is what it was."""
    dt.save(attachment, out / "delta")
    codec = Codec(backbone, max_input=96, max_target=8)
    questions = make_questions(codec, TASK, TASK.split("dev")[:64])
    attachment.model.eval()
    said = answer(backbone, questions, codec, Recipe())
    print(f"{TASK.metric}: {score(TASK.metric, said, questions.examples):.1f}")
    attachment.detach()
    print("the backbone is as it was:", same(backbone.model, dt.load_backbone(backbone.name).model))


def same(one: nn.Module, two: nn.Module) -> bool:
    """Whether two models have the same state, bit for bit."""
    ours: dict[str, Any] = one.state_dict()
    theirs: dict[str, Any] = two.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
