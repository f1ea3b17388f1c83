"""UniPELT: LoRA, adapters and a prefix together, each as much as the input asks for (Mao et al., 2022, arXiv:2110.07577)."""

from __future__ import annotations

from deltatune.core.delta import Delta
from deltatune.core.method import Method
from deltatune.core.spec import build


def unipelt(length: int = 10, size: int = 48, rank: int = 8) -> Delta:
    """Gated LoRA and gated adapter behind the FFN, with a prefix (Mao et al., 2022; the prefix has no gate here)."""
    lora, adapter = build("LoRA", {"rank": rank}, Method), build("Adapter", {"size": size}, Method)
    gated = build("Gate", {"inner": lora}, Method).at("attn.{q,v}") + build("Gate", {"inner": adapter}, Method).at(
        "ffn.down:out"
    )
    return gated + build("PrefixTuning", {"length": length}, Method).at("attn")
