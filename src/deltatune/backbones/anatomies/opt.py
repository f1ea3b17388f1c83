"""OPT: no module of its own for the feed-forward sub-layer (Zhang et al., 2022)."""

from deltatune.backbones.anatomies import Family, Tower

OPT = Family(
    types=("opt",),
    towers=(
        Tower(
            blocks="decoder.layers",
            embed="decoder.embed_tokens",
            norms=("decoder.final_layer_norm",),
            causal=True,
            positions="learned",
            roles={
                "attn": "self_attn",
                "attn.q": "self_attn.q_proj",
                "attn.k": "self_attn.k_proj",
                "attn.v": "self_attn.v_proj",
                "attn.o": "self_attn.out_proj",
                "ffn.up": "fc1",
                "ffn.down": "fc2",
                "norm": ("self_attn_layer_norm", "final_layer_norm"),
            },
        ),
    ),
)
