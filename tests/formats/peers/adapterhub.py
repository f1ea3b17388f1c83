"""The library `adapters` as a process of its own: `python -m tests.formats.peers.adapterhub FOLDER`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import adapters  # type: ignore[import-not-found]
from torch import Tensor

from tests import tiny
from tests.formats.data.make_adapterhub import BN, CASES, make
from tests.formats.peers.common import Make, backbone, run
from tests.formats.small import scores

EVERYWHERE: dict[str, Any] = {
    "houlsby": adapters.DoubleSeqBnConfig(**BN),
    "pfeiffer": adapters.SeqBnConfig(**BN),
    "ffn": adapters.LoRAConfig(r=2, alpha=6, selfattn_lora=False, intermediate_lora=True, output_lora=True),
    "loreft": adapters.LoReftConfig(r=2, prefix_positions=2, tied_weights=True),
}


def load(saved: Path, folder: Path) -> Tensor:
    """Load an adapter; a key that the library misses or does not know is an error."""
    model = backbone(saved)
    adapters.init(model)
    info: dict[str, Any] = {}
    model.load_adapter(str(folder), set_active=True, with_head=False, use_safetensors=True, loading_info=info)
    assert not info["unexpected_keys"], info
    assert all(".pool." in key for key in info["missing_keys"]), info
    return scores(model.eval(), tiny.batch(model))


def made(config: Any, saved: Path, folder: Path) -> Tensor:
    """Make an adapter of a config."""
    model = backbone(saved)
    return make(model, tiny.batch(model), config, folder)


def cases(families: list[str]) -> dict[str, Make]:
    """Return what is made, by family and kind."""
    found = {f"{family}-{kind}": config for family in families for kind, config in EVERYWHERE.items()}
    found |= {name: config for name, config in CASES.items() if name.partition("-")[0] in families}
    return {name: partial(made, config) for name, config in found.items()}


if __name__ == "__main__":
    run(load, cases(sorted(path.name for path in (Path(sys.argv[1]) / "backbones").iterdir())))
