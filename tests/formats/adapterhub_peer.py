"""The library `adapters` as a process of its own, in `.venv-adapters`: `python -m tests.formats.adapterhub_peer FOLDER`.

FOLDER/backbones/FAMILY        what transformers saved of a tiny backbone
FOLDER/ours/FAMILY-NAME        an adapter that deltatune wrote; it is loaded, and its scores are put beside it
FOLDER/theirs/FAMILY-NAME      an adapter that is made, moved away from its start and saved here, with its scores
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import adapters  # type: ignore[import-not-found]
import torch
import transformers
from safetensors.torch import save_file

from tests import tiny
from tests.formats.data.make_adapterhub import BN, CASES, make
from tests.formats.small import scores

EVERYWHERE: dict[str, Any] = {
    "houlsby": adapters.DoubleSeqBnConfig(**BN),
    "pfeiffer": adapters.SeqBnConfig(**BN),
    "ffn": adapters.LoRAConfig(r=2, alpha=6, selfattn_lora=False, intermediate_lora=True, output_lora=True),
    "loreft": adapters.LoReftConfig(r=2, prefix_positions=2, tied_weights=True),
}


def backbone(folder: Path) -> Any:
    """Return the model of a folder, of the class that its config names."""
    name = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    return getattr(transformers, name).from_pretrained(folder).eval()


def load(model: Any, folder: Path) -> None:
    """Load an adapter and put its scores beside it; a key that the library misses or does not know is an error."""
    adapters.init(model)
    info: dict[str, Any] = {}
    model.load_adapter(str(folder), set_active=True, with_head=False, use_safetensors=True, loading_info=info)
    assert not info["unexpected_keys"], (folder.name, info)
    assert all(".pool." in key for key in info["missing_keys"]), (folder.name, info)
    save_file({"scores": scores(model.eval(), tiny.batch(model)).contiguous()}, folder / "scores.safetensors")


def main(folder: Path) -> None:
    """Load every adapter of ours, then make theirs on every backbone."""
    torch.set_num_threads(1)
    for ours in sorted((folder / "ours").iterdir()):
        load(backbone(folder / "backbones" / ours.name.partition("-")[0]), ours)
    for saved in sorted((folder / "backbones").iterdir()):
        own = {f"{saved.name}-{kind}": config for kind, config in EVERYWHERE.items()}
        own |= {name: config for name, config in CASES.items() if name.startswith(f"{saved.name}-")}
        for name, config in own.items():
            model = backbone(saved)
            make(model, tiny.batch(model), config, folder / "theirs" / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
