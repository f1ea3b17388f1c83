"""The memory ledger: what training a delta takes at its peak, by component, and how long a step takes, before anything runs.

    peak = process + backbone + delta + max(a training step, an evaluation)

A step is not described by formulas: the model, the delta, the loss, the optimizer and the evaluation run on fake tensors
(`tuning.tally`), and the ledger is what was alive when the most was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from deltatune.core.delta import Delta, as_delta
from deltatune.core.method import Method
from deltatune.core.motion import penalty
from deltatune.core.motion import rates as factors
from deltatune.core.recompute import recompute
from deltatune.core.site import anatomy
from deltatune.core.weights import Weights, fingerprint
from deltatune.errors import DeltaTuneError
from deltatune.tuning.deterministic import deterministic
from deltatune.tuning.fake import attach_fake
from deltatune.tuning.loss import Loss, OwnLoss, TokenLoss, read_loss
from deltatune.tuning.optim import make_optimizer
from deltatune.tuning.precision import cast_to, hold_in, kernels_kept
from deltatune.tuning.recipe import Recipe
from deltatune.tuning.tally import Tally, Work, fakes, tally

COMPONENTS = ("gradients", "optimizer", "activations", "logits", "cache", "workspace", "kernels")
KERNEL = 290 << 10  # bytes of a product that oneDNN has compiled, measured on a CPU with AVX-512


@dataclass(frozen=True)
class Shape:
    """The longest batch: rows, tokens of an input, tokens of an answer, whether shorter rows are padded, and of how many widths
    batches are."""

    rows: int
    length: int
    answer: int = 0
    padded: bool = True
    widths: int = 1


@dataclass(frozen=True)
class Ledger:
    """Bytes at the peak by component, and the seconds of a step where prices are known.

    `process` is what is there before: interpreter and libraries. `evaluation` is what an evaluation takes above backbone,
    delta and optimizer at its own peak; `blocks` has the bytes that each block keeps for the backward pass, by path.
    """

    backbone: int
    delta: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int
    kernels: int = 0
    cache: int = 0
    evaluation: int = 0
    process: int = 0
    peak_in: str = "training"
    seconds: float | None = None
    recomputed: tuple[str, ...] = ()
    blocks: tuple[tuple[str, int], ...] = ()

    @property
    def growth(self) -> int:
        """The bytes above what is there once backbone and delta are: what training adds at its peak."""
        return sum(getattr(self, name) for name in COMPONENTS)

    @property
    def peak(self) -> int:
        """The bytes at the peak."""
        return self.process + self.backbone + self.delta + self.growth

    def to_json(self) -> dict[str, Any]:
        """Return all fields, growth and peak as plain values."""
        return {**dataclasses.asdict(self), "blocks": dict(self.blocks), "growth": self.growth, "peak": self.peak}


Evaluate = Callable[[Any], object]
Price = Callable[[Iterable[Work]], float]  # the seconds of operations


def ledger(
    model: nn.Module,
    delta: Delta | Method,
    shape: Shape,
    recipe: Recipe | None = None,
    evaluate: Evaluate | None = None,
    recomputed: Iterable[str] = (),
    price: Price | None = None,
    device: torch.device | str = "cpu",
) -> Ledger:
    """Return what training `delta` on `model` takes; the model may be on the meta device, and nothing of it is touched.

    `evaluate` is called with a model of fakes after a step; `recomputed` are the paths of blocks whose activations are
    computed anew in the backward pass. Raises `DeltaTuneError` where a computation depends on values.
    """
    recipe, device, paths = recipe or Recipe(), torch.device(device), tuple(recomputed)
    weights = Weights(as_delta(delta), {}, fingerprint(model), 0)
    with deterministic(device), tally(_vocabulary(model)) as counted:
        copy = fakes(model, device, cast_to(model, recipe.precision))
        hold_in(copy, recipe.precision)
        trial = Trial(counted, copy, weights, recipe, device, paths)
        trial.step(shape)
        work = list(counted.work)
        if evaluate is not None:
            trial.evaluate(evaluate)
    return trial.ledger(None if price is None else price(work), paths)


class Trial:
    """A model of fakes with a delta attached, taking steps under a tally."""

    def __init__(
        self,
        counted: Tally,
        model: Any,
        weights: Weights,
        recipe: Recipe,
        device: torch.device,
        recomputed: Sequence[str],
    ) -> None:
        self.counted, self.model, self.recipe, self.device = counted, model, recipe, device
        counted.mark([*model.parameters(), *model.buffers()], "backbone")
        self.attachment = attach_fake(model, weights, device)
        held = self.attachment.leaves
        counted.mark([*held.parameters(), *held.buffers()], "delta")
        self.saved: dict[str, int] = {}
        recompute(self.attachment, recomputed)
        self.parameters = list(self.attachment.parameters())
        self.optimizer = make_optimizer(recipe, self.parameters, factors(self.attachment))
        model.train(recipe.dropout)
        for parameter in self.parameters:  # the optimizer makes its state in its first step, and has it in all others
            parameter.grad = torch.empty_like(parameter)
            counted.mark([parameter.grad], "gradients")
        self.update()
        counted.phase = "setup"

    def step(self, shape: Shape) -> None:
        """Take the step that `Loop` takes."""
        counted, self.widths = self.counted, shape.widths
        batch = batch_of(self.model, shape, self.device)
        read = self._loss(batch, shape)
        counted.work.clear()
        counted.phase = "forward"
        with self._watched():
            loss = read(batch)
        for block in counted.alive("forward"):
            block.kind = "activations" if block.kind == "forward" else block.kind
        extra = penalty(self.attachment)
        counted.phase = "backward"
        (loss if extra is None else loss + extra).backward()
        counted.mark([p.grad for p in self.parameters if p.grad is not None], "gradients")
        self.update()

    def _loss(self, batch: dict[str, Tensor], shape: Shape) -> Loss:
        """Return the loss that `Loop` finds, for as many tokens as have labels that count."""
        with torch.no_grad():
            found = read_loss(self.model, batch)
        if found is None:
            return OwnLoss(self.model)
        asked = torch.zeros(shape.rows * (shape.answer or shape.length), dtype=torch.long, device=self.device)
        return TokenLoss(self.model, found[0], lambda labels: (asked, asked))

    def update(self) -> None:
        """Take the optimizer's step as `Loop.update` does."""
        self.counted.phase = "update"
        torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip or torch.inf)
        self.optimizer.step()
        self.counted.mark(_tensors(list(self.optimizer.state.values())), "optimizer")
        self.optimizer.zero_grad()

    def evaluate(self, evaluate: Evaluate) -> None:
        """Evaluate as `Loop.judge` does; what the first forward pass leaves behind is the cache."""
        counted, read = self.counted, []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if not read and output.get("past_key_values") is not None:
                for block in counted.alive("evaluate"):
                    block.kind = "cache" if block.kind == "evaluate" else block.kind
            read.append(module)

        counted.phase = "evaluate"
        handle = self.model.register_forward_hook(keep)
        self.model.eval()
        evaluate(self.model)
        handle.remove()

    def ledger(self, seconds: float | None, recomputed: tuple[str, ...]) -> Ledger:
        """Return the ledger of the larger of the two peaks."""
        training = self._named(self.counted.peak("forward", "backward", "update"))
        evaluation = self._named(self.counted.peak("evaluate")) if self.counted.phase == "evaluate" else None
        more = 0
        if evaluation is not None:
            more = sum(evaluation.values()) - evaluation["backbone"] - evaluation["delta"] - evaluation["optimizer"]
        larger = evaluation if evaluation and sum(evaluation.values()) > sum(training.values()) else training
        return Ledger(
            **{**larger, "kernels": self.kernels()},
            evaluation=more,
            peak_in="evaluation" if larger is evaluation else "training",
            seconds=seconds,
            recomputed=recomputed,
            blocks=tuple(self.saved.items()),
        )

    def kernels(self) -> int:
        """Return the bytes of the products that are compiled, one for each shape, of which the last few are kept."""
        shapes = {one.shapes for one in self.counted.work if one.compiled}
        return KERNEL * min(self.widths * len(shapes), kernels_kept())

    def _named(self, bytes: dict[str, int]) -> dict[str, int]:
        named: dict[str, int] = dict.fromkeys(("backbone", "delta", *COMPONENTS), 0)
        for kind, value in bytes.items():
            named[kind if kind in named else "workspace"] += value
        return named

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """The scope of a forward pass, after which `saved` has what each block of the backbone keeps for the backward pass."""
        counted, spans = self.counted, dict[str, list[int]]()
        handles = []
        for path in block_paths(self.model):
            module, times = self.model.get_submodule(path), spans.setdefault(path, [])
            handles.append(module.register_forward_pre_hook(lambda *_, times=times: times.append(counted.time)))
            handles.append(module.register_forward_hook(lambda *_, times=times: times.append(counted.time)))
        yield
        for handle in handles:
            handle.remove()
        alive = counted.alive("forward")
        for path, times in spans.items():
            pairs = list(zip(times[::2], times[1::2], strict=False))
            self.saved[path] = sum(b.bytes for b in alive if any(start < b.born <= end for start, end in pairs))


def batch_of(model: Any, shape: Shape, device: torch.device) -> dict[str, Tensor]:
    """Return a batch of this shape as `collate` makes it; without padding there is no mask to keep."""
    ids = torch.zeros((shape.rows, shape.length), dtype=torch.long, device=device)
    answer = shape.answer if model.config.is_encoder_decoder else shape.length
    labels = torch.zeros((shape.rows, answer), dtype=torch.long, device=device)
    mask = {"attention_mask": torch.ones_like(ids)} if shape.padded else {}
    return {"input_ids": ids, **mask, "labels": labels}


def block_paths(model: nn.Module) -> list[str]:
    """Return the paths of the backbone's blocks, from its input to its output."""
    return [place.path for place in anatomy(model).blocks]


def _vocabulary(model: Any) -> int:
    config = getattr(model, "config", None)
    if config is None:
        raise DeltaTuneError(
            f"a {type(model).__name__} has no config that says what it reads; give a transformers model, whose loss is known."
        )
    return getattr(config, "vocab_size", 0)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
