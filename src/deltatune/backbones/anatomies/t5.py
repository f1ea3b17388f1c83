"""T5, mT5 and UMT5: a plain feed-forward has `wi`, a gated one `wi_0` and `wi_1` (Raffel et al., 2020)."""

from deltatune.backbones.anatomies import Family, Tower

ROLES = {
    "attn": "layer.0.SelfAttention",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "cross": "layer.1.EncDecAttention",
    "cross.q": "layer.1.EncDecAttention.q",
    "cross.k": "layer.1.EncDecAttention.k",
    "cross.v": "layer.1.EncDecAttention.v",
    "cross.o": "layer.1.EncDecAttention.o",
    "ffn": "layer.-1.DenseReluDense",
    "ffn.gate": "layer.-1.DenseReluDense.wi_0",
    "ffn.up": ("layer.-1.DenseReluDense.wi", "layer.-1.DenseReluDense.wi_1"),
    "ffn.down": "layer.-1.DenseReluDense.wo",
    "norm": ("layer.0.layer_norm", "layer.1.layer_norm", "layer.2.layer_norm"),
}


def _tower(name: str, causal: bool) -> Tower:
    return Tower(
        f"{name}.block",
        name=name,
        embed=f"{name}.embed_tokens",
        norms=(f"{name}.final_layer_norm",),
        causal=causal,
        positions="bias",
        width="d_model",
        heads="num_heads",
        head_width="d_kv",
        roles=ROLES,
    )


T5 = Family(types=("t5", "mt5", "umt5"), towers=(_tower("encoder", causal=False), _tower("decoder", causal=True)))
