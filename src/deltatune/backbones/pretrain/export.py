"""The product of a run: a Hugging Face folder in bf16 with its tokenizer and model card."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from deltatune.backbones.pretrain.card import model_card
from deltatune.backbones.pretrain.settings import Settings
from deltatune.backbones.pretrain.tokenizer import BOS, EOS, PAD, special_tokens
from deltatune.files import write_bytes, write_json, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLACE = "model"


def export(model: PreTrainedModel, settings: Settings, out: Path) -> Path:
    """Write `out`/model: config.json, generation_config.json, model.safetensors, tokenizer files, README.md."""
    folder = out / PLACE
    config = model.config.to_dict() | {"dtype": "bfloat16", "architectures": [type(model).__name__]}
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", _generation(settings))
    write_bytes(folder / "model.safetensors", _weights(model))
    _tokenizer(out / "tokenizer.json", settings, folder)
    write_text(folder / "README.md", model_card(settings, out, sum(p.numel() for p in model.parameters())))
    return folder


def _weights(model: PreTrainedModel) -> bytes:
    """The parameters in bf16, tied ones once, as a safetensors file."""
    from safetensors.torch import save

    tensors = {name: value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in model.named_parameters()}
    return save(tensors, metadata={"format": "pt"})


def _generation(settings: Settings) -> dict[str, int]:
    ids = {"pad_token_id": 0, "eos_token_id": 2}
    return ids | ({"bos_token_id": 1} if settings.causal else {"decoder_start_token_id": 0})


def _tokenizer(source: Path, settings: Settings, folder: Path) -> None:
    """The tokenizer as transformers loads it; a causal model pads on the left, so that generation can go on."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(source),
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens=special_tokens(settings)[3:],
        padding_side="left" if settings.causal else "right",
        model_max_length=settings.model.context,
        clean_up_tokenization_spaces=False,
    )
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer.save_pretrained(temporary)
        for path in sorted(Path(temporary).iterdir()):
            write_bytes(folder / path.name, path.read_bytes())
