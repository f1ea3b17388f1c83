"""OpenDelta itself, in another process: it computes what deltatune wrote, and deltatune what it wrote."""

from __future__ import annotations

from deltatune.formats import read_opendelta, write_opendelta
from tests.formats.live import Kinds, assert_same, exchange, needs_others

pytestmark = needs_others

KINDS: Kinds = {
    "lora": (("t5", "bert", "llama"), "LoRA(rank=2, alpha=6)"),
    "some": (("t5", "llama"), 'LoRA(rank=2, alpha=3).at("{attn.k[0],ffn.up[1:]}")'),
    "adapter": (("t5", "bert", "gpt2", "llama"), 'Adapter(size=5, activation="gelu_tanh")'),
    "leaky": (("bert",), 'Adapter(size=5, activation="leaky_relu").at("attn.o[1:]")'),
    "block": (("llama", "gpt2"), 'Adapter(size=5, activation="silu").at("block:out")'),
    "parallel": (("t5", "bert", "gpt2"), "ParallelAdapter(size=5, scale=2.0)"),
    "branch": (("t5", "bert", "gpt2"), 'ParallelAdapter(size=5).at("{attn,cross?}")'),
    "around": (("bert",), 'ParallelAdapter(size=5).at("path:bert.encoder.layer.*.attention")'),
    "both": (("t5", "bert"), 'ParallelAdapter(size=5, activation="gelu").at("{attn,cross?,ffn}")'),
    "upper": (("t5", "bert"), 'ParallelAdapter(size=5, scale=2.0).at("ffn[1:]")'),
    "scale": (("bert",), "ParallelAdapter(size=5, scale=Ones())"),
    "compacter": (("t5", "bert"), "Compacter(size=8, n=4)"),
    "ranked": (("bert",), "Compacter(size=8, n=2, rank=2)"),
    "low": (("t5", "bert"), "LowRankAdapter(size=8, rank=1)"),
    "bitfit": (("bert", "gpt2"), 'BitFit().at("{attn.o,ffn.{up,down}}")'),
    "prompt": (("t5", "llama"), "PromptTuning(length=3)"),
}


def test_deltatune_and_the_library_compute_the_same_of_each_other_s_folders(tmp_path):
    assert_same(exchange("opendelta", tmp_path, KINDS, write_opendelta, read_opendelta))
