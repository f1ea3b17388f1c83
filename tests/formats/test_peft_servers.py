"""What vLLM and LoRAX need of a LoRA in peft's format, in what is written here."""

from __future__ import annotations

import json
import re

import pytest
from safetensors import safe_open

import deltatune as dt
from deltatune import formats
from tests import tiny
from tests.laws.cases import busy

TEXTS = [
    "LoRA(rank=3)",
    'LoRA(rank=4, alpha=9).at("{attn.{q,k,v,o},ffn.{gate,up,down}}")',
    'LoRA(rank=2).at("attn.q[1:]")',
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_written_lora_has_what_servers_read(text, tmp_path):
    model = tiny.llama()
    weights = busy(dt.init(dt.parse(text), model))
    formats.write("peft", model, weights, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    method = weights.delta.terms[0].method
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", method.rank, method.alpha)
    assert (config["bias"], config["use_rslora"], config["use_dora"]) == ("none", False, False)
    assert not config.get("modules_to_save")
    assert isinstance(config["target_modules"], list)
    shapes = {}
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            found = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
            assert found, key
            shapes.setdefault(found[1], {})[found[2]] = tuple(file.get_tensor(key).shape)
    sites = {p.site.path: p.site for p in dt.sites(model, weights.delta).placements}
    assert shapes.keys() == sites.keys()
    for path, own in shapes.items():
        assert own == {"A": (method.rank, sites[path].d_in), "B": (sites[path].d_out, method.rank)}
        assert any(f".{path}".endswith(f".{target}") for target in config["target_modules"])
