"""Make the folders of `adapterhub/` with the library itself: adapters 1.3.0, transformers 4.57.6, torch 2.13.0.

Run from the root of the repository: `PYTHONPATH=. .venv-others/bin/python tests/formats/data/make_adapterhub.py`.
Each folder holds what `save_adapter` writes, as safetensors, and `scores.safetensors`, what the library's model computes; its
name begins with the backbone's in `small.py`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import adapters  # type: ignore[import-not-found]
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.formats.small import BUILDS, batch, scores

HERE = Path(__file__).parent / "adapterhub"
BN = {"reduction_factor": 4}
CASES: dict[str, Any] = {
    "bert-houlsby": adapters.DoubleSeqBnConfig(**BN),
    "bert-pfeiffer": adapters.SeqBnConfig(**BN, leave_out=[0]),
    "bert-invertible": adapters.SeqBnInvConfig(**BN),
    "bert-parallel": adapters.ParBnConfig(**BN),
    "bert-plus": adapters.AdapterPlusConfig(**BN, stochastic_depth=0.0),
    "bert-compacter": adapters.CompacterConfig(reduction_factor=4),
    "bert-phm": adapters.CompacterPlusPlusConfig(
        reduction_factor=2, non_linearity="gelu_new", original_ln_before=False
    ),
    "bert-lora": adapters.LoRAConfig(r=2, alpha=6, intermediate_lora=True),
    "llama-dora": adapters.DoRAConfig(r=2, alpha=2),
    "bert-ia3": adapters.IA3Config(),
    "bert-prefix": adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=5),
    "bert-flat": adapters.PrefixTuningConfig(prefix_length=3, flat=True),
    "bert-reft": adapters.LoReftConfig(r=2, prefix_positions=2, suffix_positions=1),
    "bert-mam": adapters.ConfigUnion(
        adapters.PrefixTuningConfig(prefix_length=2, flat=True),
        adapters.ParBnConfig(reduction_factor=8, scaling=2.0),
    ),
    "llama-houlsby": adapters.DoubleSeqBnConfig(**BN),
    "llama-pfeiffer": adapters.SeqBnConfig(**BN),
    "llama-invertible": adapters.SeqBnInvConfig(**BN),
    "llama-lora": adapters.LoRAConfig(r=2, alpha=6, attn_matrices=["q", "k", "v"]),
    "llama-noreft": adapters.NoReftConfig(r=2, prefix_positions=2, tied_weights=True),
    "roberta-pfeiffer": adapters.SeqBnConfig(**BN),
    "distilbert-parallel": adapters.ParBnConfig(**BN),
    "bart-houlsby": adapters.DoubleSeqBnConfig(**BN, cross_adapter=True),
    "gpt2-pfeiffer": adapters.SeqBnConfig(**BN),
    "t5-houlsby": adapters.DoubleSeqBnConfig(**BN, cross_adapter=True),
    "t5-pfeiffer": adapters.SeqBnConfig(**BN),
    "t5-lora": adapters.LoRAConfig(r=2, alpha=6),
    "t5-ia3": adapters.IA3Config(),
}


@torch.no_grad()
def make(model: Any, given: dict[str, Tensor], config: Any, folder: Path) -> Tensor:
    """Add an adapter to a model, move it away from its start, write its folder with the scores of a batch, and return these."""
    adapters.init(model)
    torch.manual_seed(0)  # from which the library draws the start
    model.add_adapter("foo", config=config)
    model.set_active_adapters("foo")
    generator = torch.Generator().manual_seed(3)
    before = scores(model, given)
    for key, tensor in model.named_parameters():
        if ".foo." in key or "shared_parameters" in key:
            noise = 0.2 * torch.randn(tensor.shape, generator=generator)
            if key.endswith(".original"):
                noise.fill_diagonal_(0)  # which holds signs, as whole numbers, and is not trained
            tensor.add_(noise)
    model.eval()
    found = scores(model, given)
    assert (found - before).abs().max() > 1e-2, folder.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(exist_ok=True)
    save(model, folder)
    save_file({"scores": found.contiguous()}, folder / "scores.safetensors")
    return found


def save(model: Any, folder: Path) -> None:
    """Save as safetensors; of prefixes, which the library keeps under several names, the pickle's tensors one by one."""
    try:
        model.save_adapter(str(folder), "foo", with_head=False, use_safetensors=True)
    except RuntimeError:
        model.save_adapter(str(folder), "foo", with_head=False)
        pickle = folder / "pytorch_adapter.bin"
        tensors = torch.load(pickle, weights_only=True)
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "adapter.safetensors")
        pickle.unlink()


def main() -> None:
    """Write every folder."""
    for name, config in CASES.items():
        model = BUILDS[name.partition("-")[0]]()
        make(model, batch(model), config, HERE / name)


if __name__ == "__main__":
    main()
