"""What every library's process does: it computes what deltatune wrote, and writes what deltatune has to compute.

FOLDER/backbones/FAMILY        what transformers saved of a tiny backbone
FOLDER/ours/FAMILY-NAME        a folder that deltatune wrote; the library loads it, and its scores are put beside it
FOLDER/theirs/FAMILY-NAME      what the library makes, moves away from its start and saves, with its scores
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

Make = Callable[[Path, Path], Tensor]  # the folders of a backbone and of a delta -> the scores


class Nothing(type):
    """Of a module that is not there, every attribute: a class to inherit from and to write types with, which does nothing."""

    def __getattr__(cls, name: str) -> Any:
        return _nothing(name)

    def __getitem__(cls, key: Any) -> Any:
        return cls


def _nothing(name: str) -> Nothing:
    if name.startswith("__"):
        raise AttributeError(name)
    return Nothing(name, (), {})


class Absent(MetaPathFinder, Loader):
    """Modules that a library imports and that nothing here uses, so that they need not be installed."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        known = any(f"{fullname}.".startswith(f"{name}.") for name in self.names)
        return ModuleSpec(fullname, self, is_package=True) if known else None

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__getattr__"] = _nothing


def without(*names: str) -> None:
    """Let these modules be imported as empty ones."""
    sys.meta_path.insert(0, Absent(*names))


def backbone(folder: Path) -> Any:
    """Return the model of a folder, of the class that its config names."""
    import transformers

    name = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    return getattr(transformers, name).from_pretrained(folder).eval()


@torch.no_grad()
def move(module: nn.Module) -> None:
    """Move what a module trains away from its start."""
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def run(load: Make, cases: Mapping[str, Make]) -> None:
    """Load every folder of ours, and make one for each case, by its name; keep the scores beside them."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    every = [(load, path) for path in sorted((folder / "ours").iterdir())]
    every += [(make, folder / "theirs" / name) for name, make in cases.items()]
    for make, path in every:
        try:
            found = make(folder / "backbones" / path.name.partition("-")[0], path)
        except Exception as error:
            raise RuntimeError(f"{path.parent.name}/{path.name}: {error}") from error
        save_file({"scores": found.detach().contiguous()}, path / "scores.safetensors")
