"""Phi-1 to Phi-2: one norm a block, attention and feed-forward side by side (Gunasekar et al., 2023)."""

from deltatune.backbones.anatomies import Family, Tower

PHI = Family(
    types=("phi",),
    towers=(
        Tower(
            blocks="layers",
            embed="embed_tokens",
            norms=("final_layernorm",),
            causal=True,
            positions="rotary",
            roles={
                "attn": "self_attn",
                "attn.q": "self_attn.q_proj",
                "attn.k": "self_attn.k_proj",
                "attn.v": "self_attn.v_proj",
                "attn.o": "self_attn.dense",
                "ffn": "mlp",
                "ffn.up": "mlp.fc1",
                "ffn.down": "mlp.fc2",
                "norm": ("input_layernorm", "self_attn.q_layernorm", "self_attn.k_layernorm"),
            },
        ),
    ),
)
