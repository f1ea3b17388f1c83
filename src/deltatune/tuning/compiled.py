"""Training with compiled stacks: their blocks, with all deltas in them, as one graph that a compiler of torch's writes code for.

The embeddings and the head stay outside, so that the loss is read as without a compiler. Answers are computed without one:
generation would ask for code of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltatune.core.attach import edited
from deltatune.core.calls import Ports
from deltatune.core.ports import Edit
from deltatune.core.site import anatomy
from deltatune.errors import DeltaTuneError
from deltatune.tuning.loss import Batch, Loss, OwnLoss, make_loss
from deltatune.tuning.widths import EXACT, Widths


class Compiled:
    """around a module: its call as a compiler writes it, for batches of every shape."""

    method = "compiled"

    def __init__(self, compiler: str) -> None:
        self.compiler = compiler
        self.call: Callable[..., Any] = torch.compile(_call, dynamic=True, backend=compiler)

    def around(self, here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from torch._dynamo.exc import TorchDynamoException

        try:
            return self.call(here.module, args, kwargs)
        except TorchDynamoException as error:
            why = " ".join(str(error).strip().partition("\n\n")[0].split())  # advice for torch's developers follows
            raise DeltaTuneError(
                f"compiler {self.compiler!r} could not compile the {type(here.module).__name__}: {why}. Write compiler = 'none'."
            ) from error


def _call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return type(module)._deltatune_base.__call__(module, *args, **kwargs)


@dataclass(frozen=True)
class CompiledLoss:
    """A loss that is computed with compiled stacks."""

    model: nn.Module
    loss: Loss
    edits: list[Edit]

    def __call__(self, batch: Batch) -> Tensor:
        with edited(self.model, self.edits):
            return self.loss(batch)


def training_loss(model: Any, batch: Batch, compiler: str = "none", widths: Widths = EXACT) -> Loss:
    """Return the cheapest loss that is the model's own on this batch of two rows, its stacks compiled unless `compiler` is none."""
    if compiler == "none":
        return make_loss(model, batch, widths=widths)
    torch.compiler.reset()  # what an earlier run compiled counts against the few forms that torch keeps of a function
    paths = dict.fromkeys(stack.path.rpartition(".")[0] for stack in anatomy(model).stacks)
    whole = not all(paths)  # where nothing is known of the model, or it is the stack itself
    modules = [model] if whole else [model.get_submodule(path) for path in paths]
    edits = [Edit(module, "around", Compiled(compiler)) for module in modules]
    return CompiledLoss(model, OwnLoss(model) if whole else make_loss(model, batch, inside=False), edits)
