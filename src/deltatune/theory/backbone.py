"""An attached backbone as a discrete dynamical system: one step for each call of a block, the leaves of its deltas as controls.

The graph is cut at what goes into the first block of a stack and at what every block puts out, so the embeddings are a
step of their own. What passes between blocks beside the hidden state (the encoder's output in every block of a decoder,
a prompt's own states, a ladder's side state) is not cut: it counts to the steps that read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PretrainedConfig

from deltatune.core.attach import Attachment, edited
from deltatune.core.builders import first_argument
from deltatune.core.calls import Ports
from deltatune.core.ports import PORTS, Call, Edit
from deltatune.core.site import Place, anatomy
from deltatune.core.walk import submodule
from deltatune.errors import DeltaTuneError
from deltatune.theory.dynamics import Cost, Dynamics, Step, begin, no_cost


class Cut:
    """pre and post on a block: hands on states at which a new graph begins, and adds what it cuts to `steps`."""

    method = "cut"

    def __init__(self, place: Place, module: nn.Module, begun: set[str], steps: list[Step], cost: Cost) -> None:
        self.place, self.module, self.begun, self.steps, self.cost = place, module, begun, steps, cost
        self.first = first_argument(module)
        self.call: Call = ((), {})

    def pre(self, here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        self.call = args, kwargs
        if self.place.stack not in self.begun:
            self.begun.add(self.place.stack)
            x, after = self.reads, begin(self.reads)
            self.call = ((after, *args[1:]), kwargs) if args else (args, {**kwargs, self.first: after})
            self.steps.append(
                Step(f"{self.place.stack or 'stack'}: embeddings", torch.empty(0), x, after, None, self.cost)
            )
        return self.call

    @property
    def reads(self) -> Tensor:
        """The hidden state of the call that is running."""
        args, kwargs = self.call
        return args[0] if args else kwargs[self.first]

    def post(self, here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
        h, *rest = y if isinstance(y, tuple) else (y,)
        after = begin(h)
        self.steps.append(Step(self.place.path, self.reads, h, after, self._again(*self.call), self.cost))
        return (after, *rest) if isinstance(y, tuple) else after

    def _again(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Tensor]:
        x = self.reads
        # What a block is given beside its state has a graph of its own, whose leaves may have moved by the time it runs again.
        args, kwargs = tree_map_only(Tensor, lambda t: t if t is x else t.detach(), (args, kwargs))

        def advance() -> Tensor:
            y = self.module(*args, **kwargs)
            return y[0] if isinstance(y, tuple) else y

        return advance


class BackboneDynamics(Dynamics):
    """The backbone of an attachment, whose trained leaves are the controls, under the loss that `call` returns.

    `call()` runs the model forward on one batch and returns Phi, a scalar; `cost` is the running cost R of the controls
    that act at a step. Raises `DeltaTuneError` for a model whose blocks are not known.
    """

    def __init__(self, attachment: Attachment, call: Callable[[], Tensor], cost: Cost = no_cost) -> None:
        self.attachment, self.call, self.cost = attachment, call, cost
        self.model = attachment.model
        self.places = anatomy(self.model).blocks
        if not self.places:
            raise DeltaTuneError(
                "the blocks of this model are not known, so it has no steps; use a transformers model, or a model whose layers "
                "stand in a list."
            )

    @property
    def controls(self) -> dict[str, Tensor]:
        return {name: leaf for name, leaf in self.attachment.named_parameters() if leaf.requires_grad}

    def run(self) -> tuple[list[Step], Tensor]:
        steps: list[Step] = []
        with torch.enable_grad(), self._cut(steps), _uncached(self.model):
            return steps, self.call()

    @contextmanager
    def _cut(self, steps: list[Step]) -> Iterator[None]:
        begun: set[str] = set()
        modules = [(place, submodule(self.model, place.path)) for place in self.places]
        cuts = [(module, Cut(place, module, begun, steps, self.cost)) for place, module in modules]
        with edited(self.model, [Edit(module, "post", cut) for module, cut in cuts]):
            for module, cut in cuts:
                ports = module.__dict__[PORTS]
                ports.pre = (cut, *ports.pre)  # before what the deltas do to the state, which belongs to the step
            yield


@contextmanager
def _uncached(model: Any) -> Iterator[None]:
    """The scope in which the model keeps no keys and values: a block that is run again would find its own among them."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(vars(m).get("config"), PretrainedConfig)}
    before = [(config, config.use_cache) for config in configs.values() if "use_cache" in vars(config)]
    try:
        for config, _ in before:
            config.use_cache = False
        yield
    finally:
        for config, value in before:
            config.use_cache = value
