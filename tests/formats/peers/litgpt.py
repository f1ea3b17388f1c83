"""litgpt as a process of its own: `python -m tests.formats.peers.litgpt FOLDER`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning  # type: ignore[import-not-found]
import torch
from litgpt import GPT, Config  # type: ignore[import-not-found]
from litgpt import lora as loras  # type: ignore[import-not-found]
from litgpt.finetune import lora as finetune  # type: ignore[import-not-found]
from litgpt.parser_config import save_hyperparameters  # type: ignore[import-not-found]
from litgpt.scripts import convert_hf_checkpoint as convert  # type: ignore[import-not-found]
from litgpt.scripts.merge_lora import merge_lora  # type: ignore[import-not-found]
from litgpt.utils import save_config  # type: ignore[import-not-found]
from torch import Tensor

from tests import tiny
from tests.formats.peers.common import backbone, move, run

ROTARY = {
    "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "norm_eps": 1e-6, "rotary_percentage": 1.0, "bias": False,
    "parallel_residual": False, "n_query_groups": 2,
}  # fmt: skip
PHI = {"rotary_percentage": 0.5, "shared_attention_norm": True, "lm_head_bias": True, "gelu_approximate": "tanh"}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": ROTARY | {"n_layer": 3}, "mistral": ROTARY, "qwen2": ROTARY | {"attn_bias": True}, "gpt_neox": {}, "phi": PHI,
}  # fmt: skip
COPY = {
    "gpt_neox": convert.copy_weights_gpt_neox,
    "phi": convert.copy_weights_phi,
    "qwen2": convert.copy_weights_qwen_2_5,
}
ALL = ("query", "key", "value", "projection", "mlp", "head")
CASES = {
    f"{family}-{'-'.join(chosen)}": chosen
    for family in FAMILIES
    for chosen in (("query", "value"), ("key", "mlp"), ALL[:5], ALL)
    if not (family == "qwen2" and "head" in chosen)
}


def settings(family: str) -> dict[str, Any]:
    """Return litgpt's config of a tiny backbone."""
    sizes = {"n_embd": tiny.WIDTH, "n_head": tiny.HEADS, "n_layer": 2, "intermediate_size": tiny.FFN}
    vocabulary = {"vocab_size": tiny.VOCABULARY, "padded_vocab_size": tiny.VOCABULARY, "block_size": tiny.POSITIONS}
    return sizes | vocabulary | FAMILIES[family]


def converted(saved: Path) -> dict[str, Tensor]:
    """Return a backbone's tensors as litgpt has them."""
    config, tensors = Config(**settings(saved.name)), {}
    copy = COPY.get(saved.name, convert.copy_weights_hf_llama)
    held: tuple[Any, ...] = () if saved.name == "gpt_neox" else ({},)
    copy(config, *held, tensors, dict(backbone(saved).state_dict()))
    return tensors


def placed(family: str, folder: Path) -> None:
    """Put beside a checkpoint what litgpt wants to find there."""
    folder.mkdir(parents=True, exist_ok=True)
    save_config(Config(**settings(family)), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).touch()


def measured(model: Any, saved: Path) -> Tensor:
    """Return the scores of the text, which stands before its padding."""
    given = tiny.batch(backbone(saved))
    with torch.no_grad():
        return model.eval()(given["input_ids"])[given["attention_mask"].bool()]


def load(saved: Path, folder: Path) -> Tensor:
    """Merge a folder into the backbone, as litgpt does to use it; a key that is missed or not known is an error."""
    base = saved.parent.parent / "litgpt" / saved.name
    placed(saved.name, base)
    placed(saved.name, folder)
    torch.save(converted(saved), base / "lit_model.pth")
    merge_lora(folder, base)
    model = GPT(Config(**settings(saved.name)))
    model.load_state_dict(torch.load(folder / "lit_model.pth"))
    return measured(model, saved)


def made(chosen: Sequence[str], saved: Path, folder: Path) -> Tensor:
    """Make a LoRA, and save it as litgpt's training does, with what stood on its command line."""
    fields = {"lora_r": 2, "lora_alpha": 5, "lora_dropout": 0.0} | {f"lora_{name}": name in chosen for name in ALL}
    model = loras.GPT(loras.Config(**settings(saved.name), **fields))
    keys = model.load_state_dict(converted(saved), strict=False)
    assert not keys.unexpected_keys, keys
    loras.mark_only_lora_as_trainable(model)
    move(model)
    folder.mkdir(parents=True)
    finetune.save_lora_checkpoint(lightning.Fabric(accelerator="cpu"), model, folder / "lit_model.pth.lora")
    sys.argv[1:] = ["finetune", str(saved), *(f"--{name}={str(value).lower()}" for name, value in fields.items())]
    save_hyperparameters(finetune.setup, folder)
    return measured(model, saved)


if __name__ == "__main__":
    run(load, {name: partial(made, chosen) for name, chosen in CASES.items()})
