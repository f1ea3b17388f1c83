"""What a training step costs, against the frozen-backbone limit: every method on a four-layer Llama, one thread, fp32.

    python -m benchmarks.step [--quick] [--out FOLDER]

A step is the forward and backward pass of the language modelling loss, without an optimizer. The limit trains nothing:
the same frozen model, whose loss is differentiated with respect to the output of the embeddings alone. No method whose
delta begins in the first block can do with much less.

`step.json` holds `benchmark`, `quick`, `rounds`, `machine`, `shape`, and `rows`: `what`, `delta` (its text, or null),
`parameters` (trained), `milliseconds` (median), `ratio` (to the limit inside each round: median, low, high),
`saved_bytes` (what autograd keeps for the backward pass, each storage counted once and parameters not counted) and
`saved_ratio` (to the limit); and `pairs`: `what`, `over`, `ratio` of two ways to do the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import deltatune as dt
from benchmarks.measure import (
    ALPHA,
    EVERY_LINEAR,
    RANK,
    Clock,
    Figures,
    Spread,
    llama,
    machine,
    options,
    peft_lora,
    publish,
    ratios,
    show,
    take_turns,
)

LIMIT, LORA, PEFT, FULL, PLAIN = (
    "frozen-backbone limit",
    "deltatune LoRA",
    "peft LoRA",
    "deltatune Full",
    "plain full fine-tuning",
)
DELTAS: dict[str, Any] = {
    LORA: dt.LoRA(rank=RANK, alpha=ALPHA).at(EVERY_LINEAR),
    "deltatune Adapter": dt.Adapter(),
    "deltatune BitFit": dt.BitFit(),
    "deltatune PrefixTuning": dt.PrefixTuning(),
    "deltatune PromptTuning": dt.PromptTuning(),
    FULL: dt.Full(),
}
PAIRS = {LORA: PEFT, FULL: PLAIN}


@dataclass(frozen=True)
class Shape:
    """The model, the batch and how long to measure."""

    layers: int
    width: int
    ffn: int
    heads: int
    rows: int
    tokens: int
    rounds: int

    def model(self) -> nn.Module:
        """Build the model, always the same, in training mode."""
        return llama(self.layers, self.width, self.ffn, self.heads).train()

    def batch(self) -> Tensor:
        """Return token ids [rows, tokens]."""
        return torch.randint(0, 1000, (self.rows, self.tokens), generator=torch.Generator().manual_seed(0))


REAL = Shape(layers=4, width=768, ffn=2048, heads=12, rows=4, tokens=128, rounds=15)
QUICK = Shape(layers=1, width=64, ffn=96, heads=2, rows=2, tokens=8, rounds=2)


@dataclass(frozen=True)
class Contestant:
    """One way to train: its loss for a batch, the tensors that get gradients, and all tensors that are not activations."""

    loss: Callable[[], Tensor]
    trained: list[nn.Parameter]
    model: nn.Module
    delta: str | None = None

    def turn(self, clock: Clock) -> None:
        """Take one step and drop its gradients."""
        with clock("step"):
            self.loss().backward()
        for parameter in self.trained:
            parameter.grad = None

    def saved_bytes(self) -> int:
        """Count what one forward pass keeps for its backward pass."""
        known = {storage(t) for t in self.model.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if storage(tensor) not in known:
                kept[storage(tensor)] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.loss()
        loss.backward()
        for parameter in self.trained:
            parameter.grad = None
        return sum(kept.values())


def storage(tensor: Tensor) -> int:
    """Name the memory that a tensor lies in."""
    return tensor.untyped_storage().data_ptr()


def training(model: Any, ids: Tensor, trained: Iterable[nn.Parameter], delta: str | None = None) -> Contestant:
    """Train `trained` inside `model`."""
    return Contestant(lambda: model(input_ids=ids, labels=ids).loss, list(trained), model, delta)


def limit(model: Any, ids: Tensor) -> Contestant:
    """Train nothing: the gradient flows to the output of the embeddings and stops there."""
    model.requires_grad_(False)
    embedded = model.get_input_embeddings()(ids)

    def loss() -> Tensor:
        return model(inputs_embeds=embedded.detach().requires_grad_(), labels=ids).loss

    return Contestant(loss, [], model)


def with_delta(model: nn.Module, ids: Tensor, delta: Any) -> Contestant:
    """Train a delta with deltatune."""
    return training(model, ids, dt.attach(model, delta).parameters(), str(delta))


def with_peft(model: nn.Module, ids: Tensor) -> Contestant:
    """Train the same LoRA with peft."""
    from peft import get_peft_model

    wrapped = get_peft_model(model, peft_lora())  # type: ignore[arg-type]
    return training(wrapped, ids, (p for p in wrapped.parameters() if p.requires_grad))


def contestants(shape: Shape) -> dict[str, Contestant]:
    """Build every contestant on its own copy of the model."""
    ids, plain = shape.batch(), shape.model()
    ways = {
        LIMIT: limit(shape.model(), ids),
        PEFT: with_peft(shape.model(), ids),
        PLAIN: training(plain, ids, plain.parameters()),
    }
    return ways | {name: with_delta(shape.model(), ids, delta) for name, delta in DELTAS.items()}


def row(name: str, way: Contestant, saved: dict[str, int], took: dict[str, Clock]) -> dict[str, Any]:
    """Return one row of the result."""
    own = took[name].seconds["step"]
    return {
        "what": name,
        "delta": way.delta,
        "parameters": sum(p.numel() for p in way.trained),
        "milliseconds": 1e3 * took[name].median("step"),
        "ratio": ratios(own, took[LIMIT].seconds["step"]).to_json(),
        "saved_bytes": saved[name],
        "saved_ratio": saved[name] / saved[LIMIT],
    }


def pair(name: str, over: str, took: dict[str, Clock]) -> dict[str, Any]:
    """Compare two ways to do the same."""
    ratio = ratios(took[name].seconds["step"], took[over].seconds["step"])
    return {"what": name, "over": over, "ratio": ratio.to_json()}


def tables(result: dict[str, Any]) -> list[Figures]:
    """Return the result for people."""
    rows = [
        (
            r["what"],
            f"{r['parameters']:,}",
            f"{r['milliseconds']:.0f} ms",
            show(Spread(**r["ratio"])),
            f"{r['saved_bytes'] / 2**20:.1f} MiB",
            f"{r['saved_ratio']:.2f}",
        )
        for r in result["rows"]
    ]
    title = "Training step of a Llama ({layers} layers, d={width}, ffn={ffn}, batch {rows} x {tokens})".format(
        **result["shape"]
    )
    pairs = [(r["what"], r["over"], show(Spread(**r["ratio"]))) for r in result["pairs"]]
    return [
        Figures(title, ("", "trained", "step", "step / limit", "saved", "saved / limit"), rows),
        Figures("The same step, done by another", ("", "over", "ratio"), pairs),
    ]


def main() -> None:
    """Measure, print and write."""
    quick, out = options("Time a training step and count what it keeps, against the frozen-backbone limit and peft.")
    shape, at = QUICK if quick else REAL, machine()
    ways = contestants(shape)
    saved = {name: way.saved_bytes() for name, way in ways.items()}
    took = take_turns({name: way.turn for name, way in ways.items()}, shape.rounds)
    order = [LIMIT, LORA, PEFT, *(n for n in DELTAS if n not in (LORA, FULL)), FULL, PLAIN]
    rows = [row(name, ways[name], saved, took) for name in order]
    pairs = [pair(name, over, took) for name, over in PAIRS.items()]
    size = {key: value for key, value in asdict(shape).items() if key != "rounds"}
    result = {"quick": quick, "rounds": shape.rounds, "machine": at, "shape": size, "rows": rows, "pairs": pairs}
    publish("step", out, result, tables(result))


if __name__ == "__main__":
    main()
