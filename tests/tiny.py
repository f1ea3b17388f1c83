"""Tiny seeded models of every family, and a padded batch for each: the backbones of the fast tests.

Width 32, two blocks (Llama: three), 64 pieces, no dropout, evaluation mode. Every parameter, biases and norms
included, is moved away from its constant start, so that no term is neutral by accident.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

VOCABULARY = 64
WIDTH = 32
HEADS = 4
FFN = 48
POSITIONS = 64


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Build a model under `seed`, roughen all its parameters, and leave the global generator as it was."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = build()
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def _build(name: str, head: str, seed: int, config: dict[str, Any]) -> nn.Module:
    import transformers

    made = getattr(transformers, f"{name}Config")(vocab_size=VOCABULARY, **config)
    return seeded(lambda: getattr(transformers, name.removesuffix("Text") + head)(made), seed)


def _llama_like(name: str, seed: int, **special: Any) -> nn.Module:
    usual = {"hidden_size": WIDTH, "intermediate_size": FFN, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    usual |= {"num_key_value_heads": 2, "max_position_embeddings": POSITIONS}
    return _build(
        name, "ForCausalLM", seed, usual | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | special
    )


def llama(seed: int = 0) -> nn.Module:
    """LlamaForCausalLM with grouped-query attention (4 query, 2 key/value heads) and three blocks."""
    return _llama_like("Llama", seed, num_hidden_layers=3)


def mistral(seed: int = 0) -> nn.Module:
    """MistralForCausalLM with grouped-query attention."""
    return _llama_like("Mistral", seed)


def qwen2(seed: int = 0) -> nn.Module:
    """Qwen2ForCausalLM: biases at q, k and v only, tied head."""
    return _llama_like("Qwen2", seed, tie_word_embeddings=True)


def qwen3(seed: int = 0) -> nn.Module:
    """Qwen3ForCausalLM: norms on q and k, heads wider than width / heads."""
    return _llama_like("Qwen3", seed, head_dim=16)


def mixtral(seed: int = 0) -> nn.Module:
    """MixtralForCausalLM: four experts a block, whose weights are 3-D parameters; two of them answer each token."""
    model = _llama_like("Mixtral", seed, num_local_experts=4, num_experts_per_tok=2)
    model.set_experts_implementation("batched_mm")  # without a loop over the experts, which no graph can hold
    return model


def gemma(seed: int = 0) -> nn.Module:
    """GemmaForCausalLM: one key/value head, heads wider than width / heads, tied head."""
    return _llama_like("Gemma", seed, head_dim=16, num_key_value_heads=1)


def gemma2(seed: int = 0) -> nn.Module:
    """Gemma2ForCausalLM: four norms a block, capped logits."""
    return _llama_like("Gemma2", seed, head_dim=16)


def gemma3(seed: int = 0) -> nn.Module:
    """Gemma3ForCausalLM (text only): norms on q and k and four norms a block."""
    return _llama_like("Gemma3Text", seed, head_dim=16)


def phi(seed: int = 0) -> nn.Module:
    """PhiForCausalLM: one norm a block, attention and feed-forward side by side."""
    return _llama_like("Phi", seed, num_key_value_heads=HEADS)


def phi3(seed: int = 0) -> nn.Module:
    """Phi3ForCausalLM: packed q, k, v with grouped-query attention, packed gate and up."""
    return _llama_like("Phi3", seed)


def gpt2(seed: int = 0) -> nn.Module:
    """GPT2LMHeadModel: q, k and v packed in a transposed Conv1D, learned positions."""
    config = {"n_embd": WIDTH, "n_layer": 2, "n_head": HEADS, "n_positions": POSITIONS}
    config |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return _build("GPT2", "LMHeadModel", seed, config | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2})


def gpt_neox(seed: int = 0) -> nn.Module:
    """GPTNeoXForCausalLM: q, k and v packed head by head, attention and FFN in parallel."""
    config = {"hidden_size": WIDTH, "intermediate_size": FFN, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    config |= {"max_position_embeddings": POSITIONS, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    return _build("GPTNeoX", "ForCausalLM", seed, config | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2})


def opt(seed: int = 0) -> nn.Module:
    """OPTForCausalLM: learned positions, FFN without a module of its own."""
    config = {"hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "ffn_dim": FFN, "num_hidden_layers": 2}
    config |= {"num_attention_heads": HEADS, "max_position_embeddings": POSITIONS}
    config |= {"dropout": 0.0, "attention_dropout": 0.0, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
    return _build("OPT", "ForCausalLM", seed, config)


def _bert_like(name: str, seed: int, **special: Any) -> nn.Module:
    usual = {"hidden_size": WIDTH, "intermediate_size": FFN, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    usual |= {"max_position_embeddings": POSITIONS, "type_vocab_size": 2}
    usual |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return _build(name, "ForMaskedLM", seed, usual | special)


def bert(seed: int = 0) -> nn.Module:
    """BertForMaskedLM."""
    return _bert_like("Bert", seed)


def roberta(seed: int = 0) -> nn.Module:
    """RobertaForMaskedLM: positions counted from the padding token's id."""
    return _bert_like("Roberta", seed, pad_token_id=1, bos_token_id=0, eos_token_id=2)


def xlm_roberta(seed: int = 0) -> nn.Module:
    """XLMRobertaForMaskedLM."""
    return _bert_like("XLMRoberta", seed, pad_token_id=1, bos_token_id=0, eos_token_id=2)


def electra(seed: int = 0) -> nn.Module:
    """ElectraForMaskedLM: embeddings half as wide as the blocks."""
    return _bert_like("Electra", seed, embedding_size=WIDTH // 2)


def distilbert(seed: int = 0) -> nn.Module:
    """DistilBertForMaskedLM."""
    config = {"dim": WIDTH, "hidden_dim": FFN, "n_layers": 2, "n_heads": HEADS, "max_position_embeddings": POSITIONS}
    return _build("DistilBert", "ForMaskedLM", seed, config | {"dropout": 0.0, "attention_dropout": 0.0})


def _t5_like(name: str, seed: int) -> nn.Module:
    config = {"d_model": WIDTH, "d_kv": WIDTH // HEADS, "d_ff": FFN, "num_layers": 2, "num_decoder_layers": 2}
    config |= {"num_heads": HEADS, "dropout_rate": 0.0, "feed_forward_proj": "gated-gelu"}
    config |= {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    return _build(name, "ForConditionalGeneration", seed, config)


def t5(seed: int = 0) -> nn.Module:
    """T5ForConditionalGeneration: gated FFN, position biases, tied embeddings."""
    return _t5_like("T5", seed)


def mt5(seed: int = 0) -> nn.Module:
    """MT5ForConditionalGeneration."""
    return _t5_like("MT5", seed)


def umt5(seed: int = 0) -> nn.Module:
    """UMT5ForConditionalGeneration: a position bias in every block."""
    return _t5_like("UMT5", seed)


def _bart_like(name: str, seed: int) -> nn.Module:
    config: dict[str, Any] = {"d_model": WIDTH, "max_position_embeddings": POSITIONS}
    for side in ("encoder", "decoder"):
        config |= {f"{side}_layers": 2, f"{side}_attention_heads": HEADS, f"{side}_ffn_dim": FFN}
    config |= {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "forced_eos_token_id": None}
    config |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    return _build(name, "ForConditionalGeneration", seed, config)


def bart(seed: int = 0) -> nn.Module:
    """BartForConditionalGeneration."""
    return _bart_like("Bart", seed)


def mbart(seed: int = 0) -> nn.Module:
    """MBartForConditionalGeneration: BART with norms before the sub-layers and a final norm in each stack."""
    return _bart_like("MBart", seed)


class PlainBlock(nn.Module):
    """x + W_b gelu(W_a norm(x)), mixed over positions by a running mean."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.LayerNorm(WIDTH)
        self.first = nn.Linear(WIDTH, FFN)
        self.second = nn.Linear(FFN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype, device=x.device)[:, None]
        return x + self.second(nn.functional.gelu(self.first(self.scale(x.cumsum(1) / count))))


class Plain(nn.Module):
    """An ordinary torch model that no anatomy table knows: token ids [B, T] -> scores [B, T, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([PlainBlock(), PlainBlock()])
        self.scores = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.scores(x)


def plain(seed: int = 0) -> nn.Module:
    """A `Plain` model: embedding `table`, `blocks.{0,1}.{scale,first,second}`, head `scores`."""
    return seeded(Plain, seed)


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    f.__name__: f
    for f in (
        llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3, phi, phi3, gpt2, gpt_neox, opt,
        bert, roberta, xlm_roberta, electra, distilbert, t5, mt5, umt5, bart, mbart,
    )
}  # fmt: skip


def batch(model: nn.Module, padding: Literal["right", "left"] = "right") -> dict[str, Tensor]:
    """Three rows of 7, 5 and 3 tokens padded to 7, and decoder inputs where needed, as keyword arguments of `model`."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([7, 5, 3])[:, None]
    ids = torch.randint(5, VOCABULARY, (3, 7), generator=generator)
    if isinstance(model, Plain):
        return {"input_ids": ids}
    steps = torch.arange(7) if padding == "right" else torch.arange(6, -1, -1)
    mask = (steps < lengths).long()
    config: Any = model.config
    given = {"input_ids": torch.where(mask.bool(), ids, config.pad_token_id), "attention_mask": mask}
    if config.is_encoder_decoder:
        given["decoder_input_ids"] = torch.randint(5, VOCABULARY, (3, 4), generator=generator)
        given["decoder_input_ids"][:, 0] = config.decoder_start_token_id
    return given
