"""BERT, RoBERTa, XLM-R and ELECTRA, as encoders or, with `is_decoder`, as decoders (Devlin et al., 2019)."""

from deltatune.backbones.anatomies import Family, Tower

BERT = Family(
    types=("bert", "roberta", "xlm-roberta", "electra"),
    towers=(
        Tower(
            blocks="encoder.layer",
            embed="embeddings.word_embeddings",
            norms=("embeddings.LayerNorm",),
            causal="is_decoder",
            positions="learned",
            prompt_at=1,
            roles={
                "attn": "attention.self",
                "attn.q": "attention.self.query",
                "attn.k": "attention.self.key",
                "attn.v": "attention.self.value",
                "attn.o": "attention.output.dense",
                "cross": "crossattention.self",
                "cross.q": "crossattention.self.query",
                "cross.k": "crossattention.self.key",
                "cross.v": "crossattention.self.value",
                "cross.o": "crossattention.output.dense",
                "ffn.up": "intermediate.dense",
                "ffn.down": "output.dense",
                "norm": ("attention.output.LayerNorm", "crossattention.output.LayerNorm", "output.LayerNorm"),
            },
        ),
    ),
)
