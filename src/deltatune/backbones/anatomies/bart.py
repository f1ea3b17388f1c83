"""BART and mBART (Lewis et al., 2020)."""

from deltatune.backbones.anatomies import Family, Tower

ROLES = {
    "attn": "self_attn",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.out_proj",
    "cross": "encoder_attn",
    "cross.q": "encoder_attn.q_proj",
    "cross.k": "encoder_attn.k_proj",
    "cross.v": "encoder_attn.v_proj",
    "cross.o": "encoder_attn.out_proj",
    "ffn.up": "fc1",
    "ffn.down": "fc2",
    "norm": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
}


def _tower(name: str, causal: bool) -> Tower:
    return Tower(
        f"{name}.layers",
        name=name,
        embed=f"{name}.embed_tokens",
        norms=(f"{name}.layernorm_embedding", f"{name}.layer_norm"),
        causal=causal,
        positions="learned",
        width="d_model",
        heads=f"{name}_attention_heads",
        roles=ROLES,
    )


BART = Family(types=("bart", "mbart"), towers=(_tower("encoder", causal=False), _tower("decoder", causal=True)))
