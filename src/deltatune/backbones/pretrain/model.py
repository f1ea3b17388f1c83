"""The network and its optimisers, built from the settings with weights that depend on the seed alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from deltatune.backbones.pretrain.settings import Settings, TrainSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build_model(settings: Settings, vocabulary: int) -> PreTrainedModel:
    """A Llama (next-token) or a gated T5 (span corruption) with tied embeddings, in fp32, initialised from the seed."""
    torch.manual_seed(settings.seed)
    return _llama(settings, vocabulary) if settings.causal else _t5(settings, vocabulary)


def _llama(settings: Settings, vocabulary: int) -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = settings.model
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context,
        attention_dropout=shape.dropout,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def _t5(settings: Settings, vocabulary: int) -> PreTrainedModel:
    from transformers import T5Config, T5ForConditionalGeneration

    shape = settings.model
    values = {
        "vocab_size": vocabulary,
        "d_model": shape.width,
        "d_kv": shape.width // shape.heads,
        "d_ff": shape.ffn,
        "num_layers": shape.layers,
        "num_decoder_layers": shape.layers,
        "num_heads": shape.heads,
        "dropout_rate": shape.dropout,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "decoder_start_token_id": 0,
    }
    return T5ForConditionalGeneration(T5Config.from_dict(values))


def learning_rate(step: int, train: TrainSettings) -> float:
    """The rate of update `step` = 0 .. steps - 1: linear warm-up, `lr`, then a cosine to `final` x `lr`."""
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    start = min(max(train.warmup, round(train.steps * (1.0 - train.decay))), train.steps - 1)
    progress = max(0.0, (step - start) / (train.steps - start))
    return train.lr * (train.final + (1.0 - train.final) * 0.5 * (1.0 + math.cos(math.pi * progress)))


def build_optimizers(model: nn.Module, train: TrainSettings) -> list[torch.optim.Optimizer]:
    """The optimisers of one run; decay applies to matrices only.

    `adamw`: Loshchilov and Hutter (2019). `adamw-rms`: each tensor's rate is lr x RMS(tensor), the parameter scaling of
    Adafactor (Shazeer and Stern, 2018). `muon`: orthogonalised momentum (Jordan et al., 2024) on the matrices inside
    the blocks, with updates of AdamW's size, and AdamW on the rest.
    """
    parameters = list(model.named_parameters())
    if train.optimizer == "adamw-rms":
        groups = [_group([value], train.weight_decay if value.ndim > 1 else 0.0) for _, value in parameters]
        return [_adamw(groups, train)]
    if train.optimizer == "adamw":
        matrices = [value for _, value in parameters if value.ndim > 1]
        vectors = [value for _, value in parameters if value.ndim == 1]
        return [_adamw([_group(matrices, train.weight_decay), _group(vectors, 0.0)], train)]
    inside = {name for name, value in parameters if value.ndim == 2 and not _is_embedding(name)}
    matrices = [value for name, value in parameters if name in inside]
    tables = [value for name, value in parameters if name not in inside and value.ndim > 1]
    vectors = [value for name, value in parameters if value.ndim == 1]
    muon = torch.optim.Muon(
        matrices, lr=train.lr, weight_decay=train.weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, _adamw([_group(tables, train.weight_decay), _group(vectors, 0.0)], train)]


def set_rates(optimizers: Sequence[torch.optim.Optimizer], step: int, train: TrainSettings) -> float:
    """Give every parameter group its learning rate for this step and return the schedule's value."""
    rate = learning_rate(step, train)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            scale = _rms(group["params"][0]) if train.optimizer == "adamw-rms" else 1.0
            group["lr"] = rate * scale
    return rate


def _group(parameters: list[nn.Parameter], decay: float) -> dict[str, object]:
    return {"params": parameters, "weight_decay": decay}


def _adamw(groups: list[dict[str, object]], train: TrainSettings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=train.lr, betas=(train.beta1, train.beta2), fused=True)


def _is_embedding(name: str) -> bool:
    return any(part in name for part in ("embed_tokens", "shared", "lm_head", "relative_attention_bias"))


def _rms(value: torch.Tensor) -> float:
    return max(value.detach().float().pow(2).mean().sqrt().item(), 1e-3)
