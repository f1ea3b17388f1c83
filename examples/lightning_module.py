"""Lightning: a module around the backbone whose checkpoints hold the leaves alone, resumed by `fit(ckpt_path=...)`.

python examples/lightning_module.py --out out/lightning
"""

import pytorch_lightning as lightning
import torch
from parts import DELTA, batches, die, finish, options
from pytorch_lightning.callbacks import ModelCheckpoint

import deltatune as dt

given = options(__doc__)
backbone = dt.load_backbone("pebble")
attachment = dt.attach(backbone.model, DELTA, name="topic")


class Tuning(lightning.LightningModule):
    """The delta is what trains and what a checkpoint keeps; the rest is loaded by name."""

    def __init__(self):
        super().__init__()
        self.model = backbone.model
        self.strict_loading = False

    def training_step(self, batch):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(attachment.parameters(), lr=1e-3)

    def train_dataloader(self):
        left = batches(backbone, given.steps)[self.trainer.global_step :]
        return torch.utils.data.DataLoader(left, batch_size=None)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"] = {n: t for n, t in checkpoint["state_dict"].items() if n.startswith("model.deltas.")}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        die(self.trainer.global_step == given.die_after)


keep = ModelCheckpoint(given.out, filename="{step}", every_n_train_steps=given.every, save_top_k=-1, save_last=True)
trainer = lightning.Trainer(
    max_steps=given.steps,
    accelerator="cpu",
    callbacks=[keep],
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
last = given.out / "last.ckpt"
trainer.fit(Tuning(), ckpt_path=last if last.exists() else None)

finish(backbone, attachment, given.out)
