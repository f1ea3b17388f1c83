"""One whole training in a process of its own, by deltatune or by transformers' Trainer with peft, and what it took.

The process is a fork of a server that has imported what either of them needs, so what is measured is the training: the backbone
is loaded, the texts are tokenised, a LoRA of rank 8 on every linear of every block is trained and saved.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import deltatune as dt
from benchmarks.twins import ALPHA, RANK
from deltatune.backbones import Backbone, load
from deltatune.backbones.source import find
from deltatune.quiet import quiet
from deltatune.tasks import Example, task
from deltatune.tuning import Recipe, Run, tune
from deltatune.tuning.answers import make_rows
from deltatune.tuning.encode import Codec, Row, collate

OURS, PEER, TUNED, FP32 = "deltatune", "Trainer + peft", "the same, tuned", "the same, in fp32"
LORA = dt.LoRA(rank=RANK, alpha=ALPHA).at("{attn.{q,k,v,o},cross.{q,k,v,o}?,ffn.{gate?,up,down}}")
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "benchmarks.runs",
        "peft",
        "sklearn.metrics",
        "transformers.trainer",
        "transformers.optimization",
        "transformers.models.auto.modeling_auto",
        "transformers.models.llama.modeling_llama",
        "transformers.models.t5.modeling_t5",
        "deltatune.tuning.run",
    ]
)
DEV = 64  # examples that the loss is measured on


@dataclass(frozen=True)
class Job:
    """One training: `steps` batches of `batch` examples, each example once; `task` is the path of one that has no more."""

    who: str
    backbone: str
    task: str
    seed: int
    steps: int
    batch: int
    max_input: int
    device: str = "cpu"

    @property
    def recipe(self) -> Recipe:
        """What both do, and what deltatune does in its own way: hold the frozen backbone in bf16."""
        return Recipe(
            steps=self.steps,
            batch=self.batch,
            max_input=self.max_input,
            warmup=0.0,
            eval_every=0,
            checkpoint_every=0,
            test=False,
            precision="bf16",
        )


def by_deltatune(job: Job, folder: Path) -> None:
    """Train with `tune`."""
    tune(Run(str(LORA), job.backbone, job.task, job.recipe, job.seed), folder)


def by_trainer(job: Job, folder: Path, dtype: str = "auto", **more: Any) -> None:
    """Train with transformers' Trainer and peft, as they come but for what the recipe says too, the backbone held in `dtype`."""
    import peft
    import transformers

    backbone = loaded(job.backbone, dtype)
    rows = [_features(row) for row in _rows(job, backbone, task(job.task).split("train"))]
    kind = "SEQ_2_SEQ_LM" if backbone.kind == "seq2seq" else "CAUSAL_LM"
    transformers.set_seed(job.seed)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type=kind)
    recipe, arguments = job.recipe, transformers.TrainingArguments
    trainer = transformers.Trainer(
        model=peft.get_peft_model(backbone.model, config),  # type: ignore[arg-type]
        args=arguments(
            output_dir=str(folder),
            max_steps=recipe.steps,
            per_device_train_batch_size=recipe.batch,
            learning_rate=recipe.lr,
            seed=job.seed,
            report_to="none",
            disable_tqdm=True,
            use_cpu=job.device == "cpu",
            **more,
        ),
        train_dataset=rows,  # type: ignore[arg-type]
        data_collator=transformers.DataCollatorForSeq2Seq(backbone.tokenizer),
    )
    trainer.train()
    trainer.save_model(str(folder))


WAYS: dict[str, Callable[[Job, Path], None]] = {
    OURS: by_deltatune,
    PEER: by_trainer,
    TUNED: lambda job, folder: by_trainer(job, folder, train_sampling_strategy="group_by_length", bf16=True),
    FP32: lambda job, folder: by_trainer(job, folder, "float32"),
}


def loaded(name: str, dtype: str) -> Backbone:
    """Return a backbone as transformers loads it, by itself ("auto") in the float type it is stored in; fresh ones are in fp32."""
    import transformers

    source = find(name)
    if source.fresh:
        return load(name)
    config = transformers.AutoConfig.from_pretrained(source.folder)
    kind = "seq2seq" if config.is_encoder_decoder else "causal"
    auto: Any = transformers.AutoModelForSeq2SeqLM if kind == "seq2seq" else transformers.AutoModelForCausalLM
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.folder)
    return Backbone(name, auto.from_pretrained(source.folder, dtype=dtype), tokenizer, kind, "")


def _rows(job: Job, backbone: Backbone, examples: list[Example]) -> list[Row]:
    return make_rows(Codec(backbone, job.max_input, job.recipe.max_target), task(job.task), examples)


def _features(row: Row) -> dict[str, list[int]]:
    return {"input_ids": list(row.input), "attention_mask": [1] * len(row.input), "labels": list(row.labels)}


@torch.no_grad()
def dev_loss(job: Job, folder: Path) -> float:
    """Return the loss per token of what was saved, on dev examples, with the backbone in fp32."""
    backbone = load(job.backbone)
    dt.load(backbone.model, folder)
    rows = sorted(_rows(job, backbone, task(job.task).split("dev")), key=lambda row: row.tokens)
    losses = tokens = 0.0
    for first in range(0, len(rows), 16):
        batch = collate(rows[first : first + 16], backbone.tokenizer.pad_token_id)
        labels = batch["labels"] if backbone.kind == "seq2seq" else batch["labels"][:, 1:]
        count = int((labels >= 0).sum())
        losses, tokens = losses + float(backbone.model(**batch).loss) * count, tokens + count
    return losses / tokens


def work(job: Job, pipe: Connection) -> None:
    """Do a job in this process: say when it begins, what it took (seconds of CPU and of the clock, bytes on a GPU), and its loss."""
    torch.set_num_threads(1)
    quiet()
    if job.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with TemporaryDirectory() as place, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)  # Trainer prints what it logs
        pipe.send(None)
        pipe.recv()
        start = time.process_time(), time.perf_counter()
        WAYS[job.who](job, Path(place))
        took = time.process_time() - start[0], time.perf_counter() - start[1]
        pipe.send((*took, torch.cuda.max_memory_allocated() if job.device == "cuda" else None))
        pipe.send(dev_loss(job, Path(place)))


def do(job: Job) -> dict[str, float]:
    """Do a job in a process of its own: seconds of its CPU and of the clock, bytes at its peak beyond its start, and its loss."""
    here, there = PROCESSES.Pipe()
    process = PROCESSES.Process(target=work, args=(job, there))
    process.start()
    there.close()
    here.recv()
    before = high = _own_bytes(process.pid)
    here.send(None)
    while not here.poll(0.002):
        high = max(high, _own_bytes(process.pid))
    cpu, wall, on_gpu = here.recv()
    loss = here.recv()
    process.join()
    return {"seconds": cpu, "wall": wall, "bytes": high - before if on_gpu is None else on_gpu, "loss": loss}


def _own_bytes(pid: int | None) -> int:
    """Return what a process holds in memory, without what it reads from files (its libraries)."""
    resident, shared = Path(f"/proc/{pid}/statm").read_text().split()[1:3]
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def write_part(name: str, folder: Path, train: int) -> str:
    """Write a task with the first `train` training examples of another one and some of its dev examples; returns its name."""
    whole = task(name)
    parts = {"train": whole.split("train")[:train], "dev": whole.split("dev")[:DEV]}
    entry = {
        "name": name,
        "kind": whole.kind,
        "labels": list(whole.labels) or None,
        "metric": whole.metric,
        "definition": whole.definition,
        "category": whole.category,
        "licence": whole.licence,
        "file": f"{name}.jsonl",
    }
    lines = [
        json.dumps({**_record(example), "split": split}) + "\n" for split, some in parts.items() for example in some
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "tasks.json").write_text(json.dumps({"tasks": [entry]}), encoding="utf-8")
    return str(folder / name)


def _record(example: Example) -> dict[str, Any]:
    own = {name: value for name, value in vars(replace(example)).items() if name != "options"}
    return own if not example.options else {**own, "options": list(example.options)}
