"""Phi-3: Llama with q, k and v in one module, and the gate and up projections in another (Abdin et al., 2024)."""

from deltatune.backbones.anatomies import Family, Packed, Tower

PHI3 = Family(
    types=("phi3",),
    towers=(
        Tower(
            blocks="layers",
            embed="embed_tokens",
            norms=("norm",),
            causal=True,
            positions="rotary",
            roles={
                "attn": "self_attn",
                "attn.q": Packed("self_attn.qkv_proj", "q k v", "q"),
                "attn.k": Packed("self_attn.qkv_proj", "q k v", "k"),
                "attn.v": Packed("self_attn.qkv_proj", "q k v", "v"),
                "attn.o": "self_attn.o_proj",
                "ffn": "mlp",
                "ffn.gate": Packed("mlp.gate_up_proj", "gate up", "gate"),
                "ffn.up": Packed("mlp.gate_up_proj", "gate up", "up"),
                "ffn.down": "mlp.down_proj",
                "norm": ("input_layernorm", "post_attention_layernorm"),
            },
        ),
    ),
)
