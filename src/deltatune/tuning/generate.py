"""Answering by greedy generation, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from deltatune.core.products import few_rows
from deltatune.errors import DeltaTuneError
from deltatune.tuning.encode import Ids, pad_inputs

if TYPE_CHECKING:
    from deltatune.backbones import Backbone


def generate(backbone: Backbone, prompts: Sequence[Ids], max_tokens: int, batch: int, pad: int) -> list[str]:
    """Return the text that the backbone continues each prompt with: at most `max_tokens` tokens, stripped.

    Raises `DeltaTuneError` on a masked backbone, which fills slots and writes no text.
    """
    if backbone.kind == "masked":
        raise DeltaTuneError(
            f"backbone {backbone.name!r} is masked and writes no text; generation tasks need a causal or "
            "encoder-decoder backbone."
        )
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    texts = [""] * len(prompts)
    for first in range(0, len(order), batch):
        group = order[first : first + batch]
        answers = _greedy(backbone, [prompts[index] for index in group], max_tokens, pad)
        for index, answer in zip(group, answers, strict=True):
            texts[index] = answer
    return texts


def _greedy(backbone: Backbone, prompts: Sequence[Ids], max_tokens: int, pad: int) -> list[str]:
    from transformers import GenerationConfig

    causal, model = backbone.kind == "causal", cast(Any, backbone.model)
    device = next(model.parameters()).device
    data = {name: tensor.to(device) for name, tensor in pad_inputs(prompts, pad, left=causal).items()}
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_tokens,
        pad_token_id=pad,
        bos_token_id=backbone.tokenizer.bos_token_id,
        eos_token_id=backbone.tokenizer.eos_token_id,
        decoder_start_token_id=model.config.decoder_start_token_id if not causal else None,
    )
    with torch.no_grad(), few_rows():
        ids = model.generate(**data, generation_config=config)
    new = ids[:, data["input_ids"].shape[1] :] if causal else ids
    return [text.strip() for text in backbone.tokenizer.batch_decode(new, skip_special_tokens=True)]
