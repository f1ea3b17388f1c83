"""One of two processes that train the same deltas on halves of the same batches: `python -m tests.distributed.worker RANK FOLDER`.

What it has trained goes to `FOLDER/RANK/MODE/METHOD`. It fails where attaching or detaching does not leave the backbone as it was.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import deltatune as dt
from deltatune.core.stored import values
from tests import tiny

METHODS = {
    "LoRA": dt.LoRA(rank=4),
    "Adapter": dt.Adapter(size=8),
    "PrefixTuning": dt.PrefixTuning(length=5),
    "BitFit": dt.BitFit(),
    "VeRA": dt.VeRA(rank=8),
}
STEPS, ROWS = 20, 4


def train(model: nn.Module, parameters: Iterable[Tensor], rows: slice) -> None:
    """Take the same steps everywhere, on some rows of each batch; the loss is a mean over rows."""
    generator = torch.Generator().manual_seed(3)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(STEPS):
        ids = torch.randint(5, tiny.VOCABULARY, (ROWS, 7), generator=generator)[rows]
        scores = model(input_ids=ids).logits.log_softmax(-1)
        scores[:, :-1].gather(-1, ids[:, 1:, None]).mean().neg().backward()
        optimizer.step()
        optimizer.zero_grad()


def shard(model: Any, **policy: Any) -> nn.Module:
    """Shard each block and what is left over both processes, as FSDP2 is used."""
    for block in model.model.layers:
        fully_shard(block, **policy)
    return fully_shard(model, **policy)


def ddp(model: nn.Module, delta: dt.Delta) -> tuple[dt.Attachment, nn.Module]:
    attachment = dt.attach(model, delta)
    return attachment, DistributedDataParallel(model)


def attach_then_shard(model: nn.Module, delta: dt.Delta) -> tuple[dt.Attachment, nn.Module]:
    attachment = dt.attach(model, delta)
    return attachment, shard(model)


def shard_then_attach(model: nn.Module, delta: dt.Delta) -> tuple[dt.Attachment, nn.Module]:
    return dt.attach(shard(model), delta), model


def offloaded(model: nn.Module, delta: dt.Delta) -> tuple[dt.Attachment, nn.Module]:
    attachment = dt.attach(model, delta)
    return attachment, shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


MODES: dict[str, Callable[[nn.Module, dt.Delta], tuple[dt.Attachment, nn.Module]]] = {
    f.__name__: f for f in (ddp, attach_then_shard, shard_then_attach, offloaded)
}


def check_setting(model: Any, attachment: dt.Attachment) -> None:
    """Other numbers put in place are the ones that act and that are read back, whatever state the shards are in."""
    ids = torch.arange(5, 12)[None]
    trained = attachment.weights
    start = dt.init(attachment.delta, tiny.llama(), seed=7)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        attachment.set(start)
        if isinstance(model, FSDPModule):
            model.reshard()
        assert all(torch.equal(t, start.tensors[n]) for n, t in attachment.weights.tensors.items())
        model(input_ids=ids)
        attachment.set(trained)
        assert torch.equal(model(input_ids=ids).logits, before)
    assert all(torch.equal(t, trained.tensors[n]) for n, t in attachment.weights.tensors.items())


def check_merging(model: nn.Module, weights: dt.Weights) -> None:
    """Merging gives the tensors that it gives one process; sharding keeps the parameters, so nothing is written into it."""
    whole = dt.merge(tiny.llama().double(), weights)
    parts = dt.merge(model, weights)
    assert whole.keys() == parts.keys()
    for path, part in parts.items():
        torch.testing.assert_close(values(part, model), whole[path], rtol=0, atol=0)
    with pytest.raises(dt.DeltaTuneError, match=r"is sharded.*Merge before sharding, or write what merge"):
        dt.merge_(model, weights)


def check_restored(model: nn.Module, before: nn.Module) -> None:
    """The backbone has its parameters, values, freedom to train and classes back; sharding adds a class of its own."""
    theirs = dict(before.named_parameters())
    ours = dict(model.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(values(p, model), theirs[n]) and p.requires_grad for n, p in ours.items())
    for path, module in before.named_modules():
        assert type(model.get_submodule(path)).__name__ in (type(module).__name__, f"FSDP{type(module).__name__}")
        assert "_deltatune_base" not in dir(type(model.get_submodule(path)))


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    rows = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    for mode, prepare in MODES.items():
        for name, method in METHODS.items():
            model = tiny.llama().double()
            attachment, trained = prepare(model, dt.parse(str(method)))
            train(trained, attachment.parameters(), rows)
            dt.save(attachment, folder / str(rank) / mode / name)
            check_setting(trained, attachment)
            weights = attachment.weights
            attachment.detach()
            check_restored(model, tiny.llama().double())
            if name == "LoRA" and isinstance(trained, FSDPModule):
                check_merging(model, weights)
    destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
