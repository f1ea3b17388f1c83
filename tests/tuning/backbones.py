"""Tiny backbones of the three kinds, with a word-level tokenizer, built in a moment and the same every time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

ADJECTIVES = ["good", "bad", "fine", "poor"]
WORDS = [*"abcde:.,", *ADJECTIVES, "film", "food", "is", "was", "the", "very", "not", "answer", "one", "two", "three"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
SIZE = len(SPECIAL) + len(WORDS)


@dataclass(frozen=True)
class TinyBackbone:
    name: str
    model: Any
    tokenizer: Any
    kind: Any
    digest: str = "tiny"


def tokenizer(template: str) -> Any:
    """A word-level tokenizer whose special tokens lie around a text as in `template`, e.g. `<s> $A`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    used = [(word, vocabulary[word]) for word in template.split() if word != "$A"]
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=128,
    )


def causal() -> TinyBackbone:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        **_common(),
        num_hidden_layers=2,
    )
    return TinyBackbone("tiny-causal", _made(LlamaForCausalLM, config), tokenizer("<s> $A"), "causal")


def positional() -> TinyBackbone:
    """A causal backbone with learned absolute positions, which padding on the wrong side would shift."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=16, n_head=4, n_layer=2, n_positions=128, vocab_size=SIZE, bos_token_id=1, eos_token_id=2
    )
    return TinyBackbone("tiny-positional", _made(GPT2LMHeadModel, config), tokenizer("<s> $A"), "causal")


def seq2seq() -> TinyBackbone:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=16,
        d_kv=4,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.1,
        vocab_size=SIZE,
        pad_token_id=0,
        eos_token_id=2,
    )
    config.decoder_start_token_id = 0
    return TinyBackbone("tiny-seq2seq", _made(T5ForConditionalGeneration, config), tokenizer("$A </s>"), "seq2seq")


def masked() -> TinyBackbone:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(hidden_size=16, intermediate_size=32, num_attention_heads=4, num_hidden_layers=2, **_common())
    return TinyBackbone("tiny-masked", _made(BertForMaskedLM, config), tokenizer("<s> $A </s>"), "masked")


KINDS = {"causal": causal, "positional": positional, "seq2seq": seq2seq, "masked": masked}


def _common() -> dict[str, Any]:
    return {"vocab_size": SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 128}


def _made(family: Any, config: Any) -> nn.Module:
    torch.manual_seed(0)
    model = family(config).eval()
    with torch.no_grad():
        # Standard initialisers make tiny models almost uniform; wider weights give scores that differ.
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    return model
