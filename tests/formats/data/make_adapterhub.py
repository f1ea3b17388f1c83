"""Make the folders of `adapterhub/` with the library itself: adapters 1.3.0, transformers 4.57.6, torch 2.13.0.

Run from the root of the repository, in an environment that has these: `PYTHONPATH=. python tests/formats/data/make_adapterhub.py`.
Each folder holds what `save_adapter` writes, as safetensors, and `scores.safetensors`, what the library's model computes.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import adapters  # type: ignore[import-not-found]
import torch
from safetensors.torch import save_file

from tests.formats.small import BUILDS, scores

HERE = Path(__file__).parent / "adapterhub"
BN = {"reduction_factor": 4}
CASES: dict[str, tuple[str, Any]] = {
    "bert-houlsby": ("bert", adapters.DoubleSeqBnConfig(**BN)),
    "bert-pfeiffer": ("bert", adapters.SeqBnConfig(**BN, leave_out=[0])),
    "bert-invertible": ("bert", adapters.SeqBnInvConfig(**BN)),
    "bert-parallel": ("bert", adapters.ParBnConfig(**BN)),
    "bert-plus": ("bert", adapters.AdapterPlusConfig(**BN, stochastic_depth=0.0)),
    "bert-compacter": ("bert", adapters.CompacterConfig(reduction_factor=4)),
    "bert-phm": (
        "bert",
        adapters.CompacterPlusPlusConfig(reduction_factor=2, non_linearity="gelu_new", original_ln_before=False),
    ),
    "bert-lora": ("bert", adapters.LoRAConfig(r=2, alpha=6, intermediate_lora=True)),
    "llama-dora": ("llama", adapters.DoRAConfig(r=2, alpha=2)),
    "bert-ia3": ("bert", adapters.IA3Config()),
    "bert-prefix": ("bert", adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=5)),
    "bert-flat": ("bert", adapters.PrefixTuningConfig(prefix_length=3, flat=True)),
    "bert-reft": ("bert", adapters.LoReftConfig(r=2, prefix_positions=2, suffix_positions=1)),
    "bert-mam": (
        "bert",
        adapters.ConfigUnion(
            adapters.PrefixTuningConfig(prefix_length=2, flat=True),
            adapters.ParBnConfig(reduction_factor=8, scaling=2.0),
        ),
    ),
    "llama-houlsby": ("llama", adapters.DoubleSeqBnConfig(**BN)),
    "llama-pfeiffer": ("llama", adapters.SeqBnConfig(**BN)),
    "llama-invertible": ("llama", adapters.SeqBnInvConfig(**BN)),
    "llama-lora": ("llama", adapters.LoRAConfig(r=2, alpha=6, attn_matrices=["q", "k", "v"])),
    "llama-noreft": ("llama", adapters.NoReftConfig(r=2, prefix_positions=2, tied_weights=True)),
    "roberta-pfeiffer": ("roberta", adapters.SeqBnConfig(**BN)),
    "distilbert-parallel": ("distilbert", adapters.ParBnConfig(**BN)),
    "bart-houlsby": ("bart", adapters.DoubleSeqBnConfig(**BN, cross_adapter=True)),
    "gpt2-pfeiffer": ("gpt2", adapters.SeqBnConfig(**BN)),
    "t5-houlsby": ("t5", adapters.DoubleSeqBnConfig(**BN, cross_adapter=True)),
    "t5-pfeiffer": ("t5", adapters.SeqBnConfig(**BN)),
    "t5-lora": ("t5", adapters.LoRAConfig(r=2, alpha=6)),
    "t5-ia3": ("t5", adapters.IA3Config()),
}


@torch.no_grad()
def make(name: str, build: str, config: Any) -> None:
    """Write one folder."""
    model = BUILDS[build]()
    adapters.init(model)
    torch.manual_seed(0)  # from which the library draws the start
    model.add_adapter("foo", config=config)
    model.set_active_adapters("foo")
    generator = torch.Generator().manual_seed(3)
    before = scores(model)
    for key, tensor in model.named_parameters():
        if ".foo." in key or "shared_parameters" in key:
            noise = 0.2 * torch.randn(tensor.shape, generator=generator)
            if key.endswith(".original"):
                noise.fill_diagonal_(0)  # which holds signs, as whole numbers, and is not trained
            tensor.add_(noise)
    model.eval()
    found = scores(model)
    assert (found - before).abs().max() > 1e-2, name
    shutil.rmtree(HERE / name, ignore_errors=True)
    save(model, HERE / name)
    save_file({"scores": found.contiguous()}, HERE / name / "scores.safetensors")


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
    for name, (build, config) in CASES.items():
        make(name, build, config)


if __name__ == "__main__":
    main()
