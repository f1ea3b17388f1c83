"""Make the folders of `peft/` with the version of peft that is installed, transformers 4.57.6 and torch 2.13.0.

Run from the root of the repository in one environment for each version of CASES: `PYTHONPATH=. python
tests/formats/data/make_old_peft.py`. Each folder is called by the version, the model and the case; `scores.safetensors`
holds what peft's model computes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file

from tests.formats.small import BUILDS, scores

HERE = Path(__file__).parent / "peft"
LORA = {"r": 2, "lora_alpha": 6}
EXPERTS = {**LORA, "target_modules": ["line"], "target_parameters": ["experts.w"]}
CASES: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "0.6.2": {
        "bert-biases": ("LoraConfig", {**LORA, "target_modules": ["query"], "bias": "all"}),
        "llama-ranks": ("LoraConfig", {**LORA, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 1}}),
    },
    "0.7.1": {"bert-biases": ("LoraConfig", {**LORA, "target_modules": ["query"], "bias": "all"})},
    "0.13.2": {"llama-lokr": ("LoKrConfig", {"r": 2, "alpha": 5, "target_modules": ["q_proj"]})},
    "0.15.2": {
        "llama-bone": ("BoneConfig", {"r": 4, "target_modules": ["q_proj"]}),
        "llama-oft": ("OFTConfig", {"r": 2, "target_modules": ["q_proj"]}),
    },
    "0.17.1": {"experts-lora": ("LoraConfig", EXPERTS), "square-lora": ("LoraConfig", EXPERTS)},
    "0.18.1": {"experts-lora": ("LoraConfig", EXPERTS), "square-lora": ("LoraConfig", EXPERTS)},
    "0.20.0": {"square-lora": ("LoraConfig", EXPERTS)},
}


@torch.no_grad()
def make(name: str, kind: str, fields: dict[str, Any]) -> None:
    """Write one folder."""
    torch.manual_seed(0)
    model: Any = peft.get_peft_model(BUILDS[name.partition("-")[0]](), vars(peft)[kind](**fields)).eval()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    folder = HERE / f"{peft.__version__}-{name}"
    model.save_pretrained(str(folder), safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)
    save_file({"scores": scores(model.base_model.model).contiguous()}, folder / "scores.safetensors")


if __name__ == "__main__":
    for case, (kind, fields) in CASES[peft.__version__].items():
        make(case, kind, fields)
