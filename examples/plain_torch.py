"""Plain PyTorch: a loop of your own over `attachment.parameters()`, and a checkpoint of the leaves and the optimizer.

python examples/plain_torch.py --out out/plain
"""

import torch
from parts import DELTA, batches, die, finish, options

import deltatune as dt

given = options(__doc__)
backbone = dt.load_backbone("pebble")
attachment = dt.attach(backbone.model, DELTA, name="topic")
optimizer = torch.optim.AdamW(attachment.parameters(), lr=1e-3)
saved, first = given.out / "checkpoint.pt", 0
given.out.mkdir(parents=True, exist_ok=True)

if saved.exists():
    state = torch.load(saved, weights_only=True)
    attachment.leaves.load_state_dict(state["leaves"])
    optimizer.load_state_dict(state["optimizer"])
    first = state["step"]

for step, batch in enumerate(batches(backbone, given.steps)[first:], first + 1):
    backbone.model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % given.every == 0:
        state = {"leaves": attachment.leaves.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        torch.save(state, given.out / "unfinished")
        (given.out / "unfinished").replace(saved)  # a kill in between leaves the old one
    die(step == given.die_after)

finish(backbone, attachment, given.out)
