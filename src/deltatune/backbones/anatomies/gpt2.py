"""GPT-2: q, k and v follow one another in one transposed Conv1D (Radford et al., 2019)."""

from deltatune.backbones.anatomies import Family, Packed, Tower

GPT2 = Family(
    types=("gpt2",),
    transposed=("transformers.pytorch_utils.Conv1D",),
    towers=(
        Tower(
            blocks="h",
            embed="wte",
            norms=("ln_f",),
            causal=True,
            positions="learned",
            roles={
                "attn": "attn",
                "attn.q": Packed("attn.c_attn", "q k v", "q"),
                "attn.k": Packed("attn.c_attn", "q k v", "k"),
                "attn.v": Packed("attn.c_attn", "q k v", "v"),
                "attn.o": "attn.c_proj",
                "cross": "crossattention",
                "cross.q": "crossattention.q_attn",
                "cross.k": Packed("crossattention.c_attn", "k v", "k"),
                "cross.v": Packed("crossattention.c_attn", "k v", "v"),
                "cross.o": "crossattention.c_proj",
                "ffn": "mlp",
                "ffn.up": "mlp.c_fc",
                "ffn.down": "mlp.c_proj",
                "norm": ("ln_1", "ln_cross_attn", "ln_2"),
            },
        ),
    ),
)
