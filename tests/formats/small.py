"""Backbones whose numbers depend on the names of their parameters alone, so that any version of transformers builds the same."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}


@torch.no_grad()
def filled(model: nn.Module) -> nn.Module:
    """Fill every parameter from a generator that its name seeds, norms around one, and return the model for evaluation."""
    for name, tensor in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(1 + 0.1 * noise if "norm" in name.lower() and name.endswith("weight") else 0.2 * noise)
    return model.eval()


def bert() -> nn.Module:
    """BertForMaskedLM: norms behind the sub-layers."""
    from transformers import BertConfig, BertForMaskedLM

    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return filled(BertForMaskedLM(BertConfig(**SIZES, **quiet, max_position_embeddings=16)))


def llama() -> nn.Module:
    """LlamaForCausalLM: norms before the sub-layers, rotary positions, one key/value head for two queries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return filled(LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, max_position_embeddings=16)))


def t5() -> nn.Module:
    """T5ForConditionalGeneration: two stacks, norms before the sub-layers, position biases."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 2,
        "num_heads": 2,
        "vocab_size": 32,
        "dropout_rate": 0.0,
    }
    return filled(T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)))


def roberta() -> nn.Module:
    """RobertaForMaskedLM."""
    from transformers import RobertaConfig, RobertaForMaskedLM

    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return filled(RobertaForMaskedLM(RobertaConfig(**SIZES, **quiet, max_position_embeddings=18, pad_token_id=1)))


def distilbert() -> nn.Module:
    """DistilBertForMaskedLM."""
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    sizes = {"vocab_size": 32, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 16}
    return filled(DistilBertForMaskedLM(DistilBertConfig(**sizes, dropout=0.0, attention_dropout=0.0)))


def bart() -> nn.Module:
    """BartForConditionalGeneration: two stacks, norms behind the sub-layers."""
    from transformers import BartConfig, BartForConditionalGeneration

    sizes: dict[str, Any] = {"vocab_size": 32, "d_model": 16, "max_position_embeddings": 16, "dropout": 0.0}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 2, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 24}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    return filled(BartForConditionalGeneration(BartConfig(**sizes, **ids, forced_eos_token_id=None)))


def gpt2() -> nn.Module:
    """GPT2LMHeadModel: norms before the sub-layers, learned positions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return filled(GPT2LMHeadModel(GPT2Config(**sizes, **quiet, bos_token_id=1, eos_token_id=2)))


class Experts(nn.Module):
    """One matrix for each of three experts, whose outputs are added up."""

    def __init__(self, d_out: int, d_in: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, d_out, d_in))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eoi,bi->bo", self.w, x)


class Mixed(nn.Module):
    """Experts beside a linear layer."""

    def __init__(self, d_out: int, d_in: int) -> None:
        super().__init__()
        self.experts, self.line = Experts(d_out, d_in), nn.Linear(d_in, d_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x) + self.line(x)


def experts() -> nn.Module:
    """Experts whose matrices have more rows than columns."""
    return filled(Mixed(6, 4))


def square() -> nn.Module:
    """Experts whose matrices are square."""
    return filled(Mixed(5, 5))


BUILDS: dict[str, Callable[[], nn.Module]] = {
    build.__name__: build for build in (bert, llama, t5, roberta, distilbert, bart, gpt2, experts, square)
}


def batch(model: nn.Module) -> dict[str, Tensor]:
    """Return two rows of six and four tokens, and decoder inputs where needed."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 32, (2, 6), generator=generator)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    given = {"input_ids": torch.where(mask.bool(), ids, 0), "attention_mask": mask}
    config: Any = model.config
    if config.is_encoder_decoder:
        given["decoder_input_ids"] = torch.randint(3, 32, (2, 3), generator=generator)
    return given


@torch.no_grad()
def scores(model: nn.Module, given: dict[str, Tensor] | None = None) -> Tensor:
    """Return the scores of a batch at every position that is not padding; of experts, the output for four rows."""
    if not hasattr(model, "config"):
        found = next(module for module in model.modules() if isinstance(module, Experts))
        return model(torch.randn(4, found.w.shape[2], generator=torch.Generator().manual_seed(0)))
    given = given or batch(model)
    y = model(**given).logits
    return y.flatten(0, 1) if "decoder_input_ids" in given else y[given["attention_mask"].bool()]
