"""accelerate: prepare, train, `save_state` and `load_state`; two hooks keep the backbone out of the checkpoints.

python examples/hf_accelerate.py --out out/accelerate
"""

import torch
from accelerate import Accelerator
from parts import DELTA, batches, die, finish, options

import deltatune as dt

given = options(__doc__)
backbone = dt.load_backbone("pebble")
attachment = dt.attach(backbone.model, DELTA, name="topic")
accelerator = Accelerator(cpu=True)
optimizer = torch.optim.AdamW(attachment.parameters(), lr=1e-3)
whole = batches(backbone, given.steps)
loader = torch.utils.data.DataLoader(whole, collate_fn=lambda items: items[0])
model, optimizer, loader = accelerator.prepare(backbone.model, optimizer, loader)

accelerator.register_for_checkpointing(attachment.leaves)
accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())

folders = sorted(given.out.glob("step-*"), key=lambda folder: int(folder.name.removeprefix("step-")))
first = 0
if folders:
    accelerator.load_state(folders[-1])
    first = int(folders[-1].name.removeprefix("step-"))

for step, batch in enumerate(accelerator.skip_first_batches(loader, first), first + 1):
    accelerator.backward(model(**batch).loss)
    optimizer.step()
    optimizer.zero_grad()
    if step % given.every == 0:
        accelerator.save_state(given.out / f"step-{step}")
    die(step == given.die_after)

finish(backbone, attachment, given.out)
