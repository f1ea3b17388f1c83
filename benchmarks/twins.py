"""The same methods in deltatune, in peft and in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import deltatune as dt
from benchmarks.shape import LlamaShape
from benchmarks.training import Contestant, training
from deltatune.backbones.fast import lean
from deltatune.core.products import products
from deltatune.tuning.compiled import training_loss

EVERY_LINEAR = "{attn.{q,k,v,o},ffn.{gate,up,down}}"
PEFT_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA = 8, 16
LORA = dt.LoRA(rank=RANK, alpha=ALPHA).at(EVERY_LINEAR)


def deltas(width: int) -> dict[str, Any]:
    """Return deltatune's methods; the bottleneck of an adapter is a sixteenth of the width."""
    adapter = dt.Adapter(size=width // 16, activation="relu")
    return {
        "LoRA": LORA,
        "DoRA": dt.DoRA(rank=RANK, alpha=ALPHA).at(EVERY_LINEAR),
        "Houlsby": adapter,
        "Pfeiffer": adapter.at("ffn.down:out"),
        "PrefixTuning": dt.PrefixTuning(length=30),
        "IA3": dt.IA3(),
        "BitFit": dt.BitFit().at(EVERY_LINEAR),
        "PromptTuning": dt.PromptTuning(length=100),
        "Full": dt.Full(),
    }


def lora(rank: int, blocks: int) -> dt.Delta:
    """Return a LoRA of some rank on every linear of the first blocks."""
    return dt.LoRA(rank=rank, alpha=2 * rank).at(f"{EVERY_LINEAR}[:{blocks}]")


def peft_lora(rank: int = RANK, blocks: int | None = None, dora: bool = False) -> Any:
    """Return peft's configuration of `LORA`, of the same DoRA, or of the same LoRA on the first blocks, without dropout."""
    from peft import LoraConfig

    return LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=PEFT_LINEARS,
        task_type="CAUSAL_LM",
        layers_to_transform=None if blocks is None else list(range(blocks)),
        use_dora=dora,
    )


def peft_configs() -> dict[str, Any]:
    """Return peft's configurations of the methods that it has."""
    from peft import IA3Config, PrefixTuningConfig, PromptTuningConfig

    scaled = ["k_proj", "v_proj", "down_proj"]
    return {
        "LoRA": peft_lora(),
        "DoRA": peft_lora(dora=True),
        "IA3": IA3Config(task_type="CAUSAL_LM", target_modules=scaled, feedforward_modules=scaled[2:]),
        "PrefixTuning": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=30),
        "PromptTuning": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=100),
    }


def with_delta(model: nn.Module, ids: Tensor, delta: Any) -> Contestant:
    """Train a delta with deltatune."""
    return training(model, ids, dt.attach(model, delta).parameters(), str(delta))


def with_tune(model: nn.Module, ids: Tensor, delta: Any, compiler: str = "none") -> Contestant:
    """Train a delta as the loop of `tune` does: on the lean backbone, with its products and the loss of the labels that count."""
    lean(model)
    attachment, batch = dt.attach(model, delta), {"input_ids": ids, "labels": ids}
    loss = training_loss(model, {name: given[:2] for name, given in batch.items()}, compiler)
    scope = partial(products, ids.device)
    return Contestant(lambda: loss(batch), list(attachment.parameters()), model, str(delta), scope)


def with_peft(model: nn.Module, ids: Tensor, config: Any, compiler: str = "none") -> Contestant:
    """Train the same with peft."""
    from peft import get_peft_model

    wrapped: Any = get_peft_model(model, config)  # type: ignore[arg-type]
    called = wrapped if compiler == "none" else torch.compile(wrapped, backend=compiler)
    return training(called, ids, (p for p in wrapped.parameters() if p.requires_grad))


def plain_full(shape: LlamaShape, ids: Tensor) -> Contestant:
    """Train all parameters."""
    model = shape.model()
    return training(model, ids, model.parameters())


def plain_biases(shape: LlamaShape, ids: Tensor) -> Contestant:
    """Train the biases of a model that has one at every linear layer of its blocks."""
    model = shape.model()
    biases = []
    for module in model.get_submodule("model.layers").modules():
        if isinstance(module, nn.Linear):
            module.bias = nn.Parameter(module.weight.new_zeros(module.out_features))
            biases.append(module.bias)
    model.requires_grad_(False)
    return training(model, ids, [bias.requires_grad_() for bias in biases])


PLAIN: dict[str, Callable[[LlamaShape, Tensor], Contestant]] = {"BitFit": plain_biases, "Full": plain_full}
