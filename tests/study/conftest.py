"""A tiny backbone made on the fly, and plans on it and on the built-in tasks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from deltatune.study import Plan

Write = Callable[..., Path]

PLAN = """
name = "small"
backbones = [{backbones}]
tasks = [{tasks}]
seeds = [{seeds}]

[methods]
LoRA = "LoRA(rank=2)"
Full = "Full()"

[recipe]
steps = 20
eval_every = 5
lr = 3e-3
{more}
"""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the backbone "tiny": a Llama of two blocks, width 16, and a tokenizer of letters."""
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    pieces = ["<pad>", "<s>", "</s>", "<unk>", *map(chr, range(32, 127))]
    inner = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    folder = tmp_path_factory.mktemp("models")
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder / "tiny")
    config = LlamaConfig(
        vocab_size=len(pieces), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "tiny")
    return folder


def write_plan(
    path: Path, tasks: str = '"topic", "sentiment"', seeds: str = "0, 1", backbones: str = '"tiny"', more: str = ""
) -> Path:
    """Write a plan on the tiny backbone: two methods, by default two tasks and two seeds."""
    path.write_text(PLAN.format(tasks=tasks, seeds=seeds, backbones=backbones, more=more))
    return path


@pytest.fixture
def write(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write `plan.toml` with changes, where the tiny backbone is known by its name."""
    monkeypatch.setenv("DELTATUNE_MODELS", str(models))
    return partial(write_plan, tmp_path / "plan.toml")


@pytest.fixture
def plan(write: Write) -> Callable[..., Plan]:
    """The same plan, read."""
    return lambda **changes: Plan.read(write(**changes))
