"""peft folders for the tests: saved by peft with tensors moved away from their start, and loaded by peft."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import deltatune as dt
from deltatune.formats.peft import read_peft, write_peft
from tests import tiny
from tests.reference.compare import TOLERANCE, scores

Build = Callable[[], nn.Module]


def saved(folder: Path, build: Build, config: Any, size: float = 0.2) -> nn.Module:
    """Return peft's model with a moved adapter, which is saved to `folder`."""
    from peft import get_peft_model

    torch.manual_seed(0)  # peft draws its start from the global generator
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(build(), config).eval()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(size * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(str(folder))
    return model


def loaded(folder: Path, build: Build, but: str = "$") -> nn.Module:
    """Return what peft makes of `folder`; a key that it misses or does not know is an error here, except a warning `but`."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="(?i).*(missing|unexpected|did not match|mismatch).*")
        warnings.filterwarnings("ignore", message=f".*{but}.*")
        return PeftModel.from_pretrained(build(), str(folder)).eval()


@torch.no_grad()
def logits(model: nn.Module, host: nn.Module | None = None) -> Tensor:
    """Return the scores at every position that is not padding; of a prompt's positions, none."""
    batch = tiny.batch(host or model)
    y = model(**batch).logits
    if "decoder_input_ids" in batch:
        return y.flatten(0, 1)
    width = batch["input_ids"].shape[1]
    return y[:, -width:][batch["attention_mask"].bool()]


@torch.no_grad()
def assert_same(build: Build, weights: dt.Weights, theirs: nn.Module) -> None:
    """Assert that the weights, attached, give peft's scores, and not those of the bare model."""
    model = build()
    bare = scores(model)
    with dt.attach(model, weights):
        ours = scores(model)
    assert (ours - bare).abs().max() > 5e-3
    torch.testing.assert_close(ours, logits(theirs, model), **TOLERANCE)


def assert_equal(one: dt.Weights, other: dt.Weights, exact: bool = True) -> None:
    """Assert that two weights are the same, deltas and numbers."""
    assert one.delta == other.delta
    assert one.backbone == other.backbone
    for mine, theirs in ((one.tensors, other.tensors), (one.fixed, other.fixed)):
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0 if exact else 1e-6)


def assert_round_trip(folder: Path, build: Build, config: Any, exact: bool = True, size: float = 0.2) -> dt.Weights:
    """Assert the laws on a config: peft's folder read is peft; written again it reads as the same and peft loads it."""
    theirs = saved(folder / "theirs", build, config, size)
    weights = read_peft(build(), folder / "theirs")
    assert_same(build, weights, theirs)
    write_peft(build(), weights, folder / "ours")
    assert_equal(read_peft(build(), folder / "ours"), weights, exact)
    torch.testing.assert_close(logits(loaded(folder / "ours", build), build()), logits(theirs, build()), **TOLERANCE)
    return weights


def edited(folder: Path, **fields: Any) -> None:
    """Change fields of the folder's config."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
    """Replace the tensors of a folder by what `change` makes of them."""
    from safetensors.torch import load_file, save_file

    path = folder / "adapter_model.safetensors"
    save_file({name: t.contiguous() for name, t in change(load_file(path)).items()}, path)
