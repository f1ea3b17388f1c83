"""Llama and the families built like it: Mistral, Qwen, Gemma (Touvron et al., 2023)."""

from deltatune.backbones.anatomies import Family, Tower

LLAMA = Family(
    types=("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
    towers=(
        Tower(
            blocks="layers",
            embed="embed_tokens",
            norms=("norm",),
            causal=True,
            positions="rotary",
            roles={
                "attn": "self_attn",
                "attn.q": "self_attn.q_proj",
                "attn.k": "self_attn.k_proj",
                "attn.v": "self_attn.v_proj",
                "attn.o": "self_attn.o_proj",
                "ffn": "mlp",
                "ffn.gate": "mlp.gate_proj",
                "ffn.up": "mlp.up_proj",
                "ffn.down": "mlp.down_proj",
                "norm": (
                    "input_layernorm",
                    "self_attn.q_norm",
                    "self_attn.k_norm",
                    "post_attention_layernorm",
                    "pre_feedforward_layernorm",
                    "post_feedforward_layernorm",
                ),
            },
        ),
    ),
)
