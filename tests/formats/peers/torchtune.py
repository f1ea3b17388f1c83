"""torchtune as a process of its own: `python -m tests.formats.peers.torchtune FOLDER`."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests import tiny
from tests.formats.peers.common import backbone, move, run, without

without(
    "blobfile", "datasets", "kagglehub", "omegaconf", "PIL", "sentencepiece", "tiktoken", "torchdata", "torchvision"
)
without("torchtune.data", "torchtune.datasets")
from torchtune import training  # type: ignore[import-not-found] # noqa: E402
from torchtune.models.llama3 import lora_llama3  # type: ignore[import-not-found] # noqa: E402
from torchtune.models.mistral import lora_mistral  # type: ignore[import-not-found] # noqa: E402
from torchtune.models.qwen2 import lora_qwen2  # type: ignore[import-not-found] # noqa: E402
from torchtune.modules import peft  # type: ignore[import-not-found] # noqa: E402
from torchtune.training.checkpointing._utils import safe_torch_load  # type: ignore[import-not-found] # noqa: E402

BUILDERS = {"llama": (lora_llama3, "LLAMA3"), "mistral": (lora_mistral, "MISTRAL"), "qwen2": (lora_qwen2, "QWEN2")}
ATTENTION = ("q_proj", "k_proj", "v_proj", "output_proj")
CASES: dict[str, Any] = {
    f"{family}-{kind}": config
    for family in BUILDERS
    for kind, config in {
        "some": {"modules": ["q_proj", "v_proj"], "mlp": False, "output": False, "dora": False},
        "all": {"modules": list(ATTENTION), "mlp": True, "output": family != "qwen2", "dora": False},
        "dora": {"modules": ["output_proj"], "mlp": True, "output": False, "dora": True},
    }.items()
}
CASES |= {f"{family}-turned": CASES[f"{family}-all"] | {"dora": True} for family in ("llama", "mistral")}


def built(saved: Path, rank: int, alpha: float, modules: list[str], mlp: bool, output: bool, dora: bool) -> Any:
    """Return torchtune's model of a backbone, with adapters in it."""
    config = json.loads((saved / "config.json").read_text())
    tied = {"tie_word_embeddings": config["tie_word_embeddings"]} if config["model_type"] == "qwen2" else {}
    rope = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    return BUILDERS[saved.name][0](
        modules, mlp, output, vocab_size=config["vocab_size"], num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"], num_kv_heads=config["num_key_value_heads"],
        embed_dim=config["hidden_size"], max_seq_len=config["max_position_embeddings"],
        intermediate_dim=config["intermediate_size"], norm_eps=config["rms_norm_eps"], lora_rank=rank, lora_alpha=alpha,
        use_dora=dora, rope_base=rope, **tied,
    ).eval()  # fmt: skip


def checkpointer(saved: Path, out: Path) -> Any:
    """Return what reads a backbone and writes adapters into a folder."""
    return training.FullModelHFCheckpointer(str(saved), ["model.safetensors"], BUILDERS[saved.name][1], str(out))


def measured(model: Any, saved: Path) -> Tensor:
    """Return the scores of the text, which stands before its padding."""
    given = tiny.batch(backbone(saved))
    with torch.no_grad():
        return model(given["input_ids"])[given["attention_mask"].bool()]


def load(saved: Path, folder: Path) -> Tensor:
    """Load a folder as torchtune's recipes do, its settings from the config; a key that is missed or not known is an error."""
    config = json.loads((folder / "adapter_config.json").read_text())
    held, keys = checkpointer(saved, folder).load_checkpoint(), safe_torch_load(folder / "adapter_model.pt")
    modules = [name for name in ATTENTION if any(f".{name}." in key for key in keys)]
    mlp, output = any(".mlp." in key for key in keys), any(key.startswith("output.") for key in keys)
    model = built(
        saved, config["r"], config["lora_alpha"], modules, mlp, output, any("magnitude" in key for key in keys)
    )
    base = model.load_state_dict(held[training.MODEL_KEY], strict=False)
    adapter = model.load_state_dict(keys, strict=False)
    peft.validate_missing_and_unexpected_for_lora(
        modules, mlp, output, base.missing_keys, base.unexpected_keys, adapter.missing_keys, adapter.unexpected_keys
    )
    return measured(model, saved)


def made(config: dict[str, Any], saved: Path, folder: Path) -> Tensor:
    """Make an adapter, and save it as torchtune's recipes do."""
    kept = checkpointer(saved, folder.with_name("out"))
    model = built(saved, 2, 5, **config)
    model.load_state_dict(kept.load_checkpoint()[training.MODEL_KEY], strict=False)
    for module in model.modules():
        if hasattr(module, "initialize_dora_magnitude"):
            module.initialize_dora_magnitude()
    peft.set_trainable_params(model, peft.get_adapter_params(model))
    move(model)
    names = peft.get_lora_module_names(config["modules"], config["mlp"], config["output"])
    settings = {"r": 2, "lora_alpha": 5, "target_modules": names, "peft_type": "LORA"}
    state = {
        training.ADAPTER_KEY: peft.get_adapter_state_dict(model.state_dict()),
        training.ADAPTER_CONFIG: settings,
    }
    kept.save_checkpoint(state, epoch=0, adapter_only=True)
    shutil.move(folder.with_name("out") / "epoch_0", folder)
    shutil.rmtree(folder.with_name("out"))
    return measured(model, saved)


if __name__ == "__main__":
    run(load, {name: partial(made, config) for name, config in CASES.items()})
