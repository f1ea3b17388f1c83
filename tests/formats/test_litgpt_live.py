"""litgpt itself, in another process: it computes what deltatune wrote, and deltatune what it wrote."""

from __future__ import annotations

from deltatune.formats import read_litgpt, write_litgpt
from tests.formats.live import Kinds, assert_same, exchange, needs_others

pytestmark = needs_others

GATED = ("llama", "mistral", "qwen2")
PLAIN = ("gpt_neox", "phi")
KINDS: Kinds = {
    "one": ((*GATED, *PLAIN), 'LoRA(rank=2, alpha=5).at("attn.k")'),
    "some": ((*GATED, *PLAIN), 'LoRA(rank=2, alpha=5).at("attn.{q,v,o}")'),
    "gated": (GATED, 'LoRA(rank=2, alpha=6).at("{attn.{q,k,v,o},ffn.{gate,up,down}}")'),
    "plain": (PLAIN, 'LoRA(rank=2, alpha=6).at("{attn.{q,k,v,o},ffn.{up,down}}")'),
    "head": (("llama", "gpt_neox"), 'LoRA(rank=3, alpha=1.5).at("{attn.v,head}")'),
}


def test_deltatune_and_the_library_compute_the_same_of_each_other_s_folders(tmp_path):
    assert_same(exchange("litgpt", tmp_path, KINDS, write_litgpt, read_litgpt))
