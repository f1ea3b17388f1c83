"""DistilBERT (Sanh et al., 2019)."""

from deltatune.backbones.anatomies import Family, Tower

DISTILBERT = Family(
    types=("distilbert",),
    towers=(
        Tower(
            blocks="transformer.layer",
            embed="embeddings.word_embeddings",
            norms=("embeddings.LayerNorm",),
            causal=False,
            positions="learned",
            prompt_at=1,
            roles={
                "attn": "attention",
                "attn.q": "attention.q_lin",
                "attn.k": "attention.k_lin",
                "attn.v": "attention.v_lin",
                "attn.o": "attention.out_lin",
                "ffn": "ffn",
                "ffn.up": "ffn.lin1",
                "ffn.down": "ffn.lin2",
                "norm": ("sa_layer_norm", "output_layer_norm"),
            },
        ),
    ),
)
