"""transformers.Trainer: attach, train, resume from its own checkpoint; a callback keeps the delta beside each one.

python examples/hf_trainer.py --out out/trainer
"""

from parts import DELTA, batches, die, finish, options
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import deltatune as dt


class Keep(TrainerCallback):
    """Write the delta into every checkpoint folder, where `dt.load` reads it."""

    def on_save(self, args, state, control, **kwargs):
        dt.save(attachment, f"{args.output_dir}/checkpoint-{state.global_step}/delta")

    def on_step_end(self, args, state, control, **kwargs):
        die(state.global_step == given.die_after)


given = options(__doc__)
backbone = dt.load_backbone("pebble")
backbone.model._keys_to_ignore_on_save = list(backbone.model.state_dict())  # a checkpoint need not repeat the backbone
attachment = dt.attach(backbone.model, DELTA, name="topic")
whole = batches(backbone, given.steps)
arguments = TrainingArguments(
    output_dir=str(given.out),
    max_steps=given.steps,
    save_steps=given.every,
    per_device_train_batch_size=1,
    learning_rate=1e-3,
    lr_scheduler_type="constant",
    use_cpu=True,
    report_to="none",
    disable_tqdm=True,
)
trainer = Trainer(
    backbone.model, arguments, data_collator=lambda items: items[0], train_dataset=whole, callbacks=[Keep()]
)
trainer.train(resume_from_checkpoint=get_last_checkpoint(given.out) if given.out.exists() else None)

finish(backbone, attachment, given.out)
