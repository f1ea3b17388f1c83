"""Where a run stands: weights, optimisers, random state and position in one safetensors file, replaced in one step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from deltatune.errors import DeltaTuneError
from deltatune.files import write_bytes


@dataclass(frozen=True)
class Position:
    """How far a run is: updates done, tokens of text read, and seconds spent on them."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def save(path: Path, reached: Position, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Replace the checkpoint at `path`; after a kill at any moment the file is the last whole one."""
    from safetensors.torch import save as to_bytes

    tensors = {f"model.{name}": value.detach() for name, value in model.named_parameters()}
    for number, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"optimizer.{number}.{index}.{key}"] = torch.as_tensor(value)
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    contiguous = {name: value.contiguous().cpu() for name, value in tensors.items()}
    write_bytes(path, to_bytes(contiguous, metadata={"position": json.dumps(asdict(reached))}))


def position(path: Path) -> Position:
    """Where the checkpoint at `path` stands; without a file, the beginning."""
    return _read(path)[0] if path.exists() else Position()


def restore(path: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> Position:
    """Put a checkpoint back into `model`, `optimizers` and the random generators; without a file, the beginning."""
    if not path.exists():
        return Position()
    reached, tensors = _read(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    for number, optimizer in enumerate(optimizers):
        optimizer.load_state_dict(optimizer.state_dict() | {"state": _states(tensors, f"optimizer.{number}.")})
    torch.set_rng_state(tensors["random.cpu"])
    if torch.cuda.is_available() and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"])
    return reached


def _read(path: Path) -> tuple[Position, dict[str, torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            reached = Position(**json.loads(file.metadata()["position"]))
            return reached, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise DeltaTuneError(
            f"{path} is not a checkpoint of this command ({error}); delete it to begin again."
        ) from error


def _states(tensors: dict[str, torch.Tensor], prefix: str) -> dict[int, dict[str, torch.Tensor]]:
    states: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(prefix):
            index, key = name.removeprefix(prefix).split(".", 1)
            states.setdefault(int(index), {})[key] = value
    return states
