"""GPT-NeoX and Pythia: each head's q, k and v follow one another in one module (Black et al., 2022)."""

from deltatune.backbones.anatomies import Family, Packed, Tower

GPT_NEOX = Family(
    types=("gpt_neox",),
    towers=(
        Tower(
            blocks="layers",
            embed="embed_in",
            norms=("final_layer_norm",),
            causal=True,
            positions="rotary",
            roles={
                "attn": "attention",
                "attn.q": Packed("attention.query_key_value", "q k v", "q", by_head=True),
                "attn.k": Packed("attention.query_key_value", "q k v", "k", by_head=True),
                "attn.v": Packed("attention.query_key_value", "q k v", "v", by_head=True),
                "attn.o": "attention.dense",
                "ffn": "mlp",
                "ffn.up": "mlp.dense_h_to_4h",
                "ffn.down": "mlp.dense_4h_to_h",
                "norm": ("input_layernorm", "post_attention_layernorm"),
            },
        ),
    ),
)
