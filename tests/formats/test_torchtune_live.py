"""torchtune itself, in another process: it computes what deltatune wrote, and deltatune what it wrote."""

from __future__ import annotations

from deltatune import formats
from tests.formats.live import Kinds, assert_same, exchange, needs_others

pytestmark = needs_others

FAMILIES = ("llama", "mistral", "qwen2")
KINDS: Kinds = {
    "some": (FAMILIES, 'LoRA(rank=2, alpha=5).at("attn.{q,k}")'),
    "all": (FAMILIES, 'LoRA(rank=2, alpha=5).at("{attn.{q,k,v,o},ffn.{gate,up,down}}")'),
    "head": (("llama",), 'LoRA(rank=3, alpha=5).at("{attn.v,head}")'),
    "dora": (("llama", "mistral"), 'DoRA(rank=2, alpha=5).at("{attn.{q,k,v,o},ffn.{gate,up,down}}")'),
    "unbiased": (("qwen2",), 'DoRA(rank=2, alpha=5).at("{attn.o,ffn.{gate,up,down}}")'),
}


def test_deltatune_and_the_library_compute_the_same_of_each_other_s_folders(tmp_path):
    assert_same(exchange("torchtune", tmp_path, KINDS, formats.write_torchtune, formats.read))
