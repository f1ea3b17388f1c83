"""OpenDelta as a process of its own: `python -m tests.formats.peers.opendelta FOLDER`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests import tiny
from tests.formats.peers.common import backbone, move, run, without
from tests.formats.small import scores

without("DeltaCenter", "opendelta.utils.interactive.web", "transformers.deepspeed", "turtle")
import opendelta  # type: ignore[import-not-found] # noqa: E402

CASES: dict[str, dict[str, Any]] = {
    "t5-lora": {"delta_type": "lora"},
    "bert-lora": {"delta_type": "lora", "lora_r": 3, "lora_alpha": 5, "modified_modules": ["key", "1.output.dense"]},
    "t5-adapter": {"delta_type": "adapter", "bottleneck_dim": 5},
    "gpt2-adapter": {"delta_type": "adapter", "bottleneck_dim": 5, "non_linearity": "relu"},
    "llama-adapter": {"delta_type": "adapter", "non_linearity": "leakyrelu", "modified_modules": ["mlp"]},
    "bert-gelu": {"delta_type": "adapter", "non_linearity": "gelu_orig"},
    "bert-parallel": {"delta_type": "parallel_adapter"},
    "t5-parallel": {"delta_type": "parallel_adapter", "modified_modules": ["wi_0", "wo"]},
    "bert-around": {"delta_type": "parallel_adapter", "modified_modules": ["attention.self", "attention.self"]},
    "t5-compacter": {"delta_type": "compacter", "reduction_factor": 4},
    "bert-factored": {"delta_type": "compacter", "reduction_factor": 4, "factorized_phm_rule": True, "phm_rank": 2},
    "bert-whole": {
        "delta_type": "compacter", "reduction_factor": 2, "hypercomplex_division": 2, "factorized_phm": False,
        "use_bias_up_sampler": False, "non_linearity": "swish",
    },
    "t5-low": {"delta_type": "low_rank_adapter", "reduction_factor": 4},
    "bert-low": {"delta_type": "low_rank_adapter", "reduction_factor": 4, "non_linearity": "tanh"},
    "bert-bitfit": {"delta_type": "bitfit"},
    "gpt2-bitfit": {"delta_type": "bitfit", "modified_modules": ["c_attn", "c_proj", "ln_1"]},
    "t5-norms": {"delta_type": "bitfit", "modified_modules": ["layer_norm"]},
    "t5-prompt": {"delta_type": "soft_prompt", "soft_token_num": 3},
    "llama-prompt": {"delta_type": "soft_prompt", "soft_token_num": 3},
}  # fmt: skip


def measured(model: Any) -> Tensor:
    """Return the scores of the text; OpenDelta's prompt lengthens the mask of whoever calls, and a decoder's scores."""
    given = tiny.batch(model)
    mask = given["attention_mask"].clone()
    with torch.no_grad():
        y = model(**given).logits
    return y.flatten(0, 1) if "decoder_input_ids" in given else y[:, -mask.shape[1] :][mask.bool()]


def load(saved: Path, folder: Path) -> Tensor:
    """Load a folder; whatever of it the model has no place for is an error, where the library says nothing."""
    model = backbone(saved)
    opendelta.AutoDeltaModel.from_finetuned(str(folder), backbone_model=model)
    lost = torch.load(folder / "pytorch_model.bin").keys() - model.state_dict().keys()
    assert not lost, lost
    return measured(model)


def made(config: dict[str, Any], saved: Path, folder: Path) -> Tensor:
    """Make a delta of a config, and save it."""
    model = backbone(saved)
    bare = scores(model, tiny.batch(model))
    kind = opendelta.AutoDeltaConfig.from_dict({"common_structure": "modified_modules" not in config, **config})
    delta = opendelta.AutoDeltaModel.from_config(kind, backbone_model=model)
    measured(model)  # from which biases of modules without one learn their size
    for parameter in delta.parameters():
        parameter._is_delta = True
    delta.freeze_module()
    move(model)
    delta.save_finetuned(str(folder))
    found = measured(model)
    assert (found - bare).abs().max() > 1e-2
    return found


if __name__ == "__main__":
    run(load, {name: partial(made, config) for name, config in CASES.items()})
