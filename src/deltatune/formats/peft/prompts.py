"""PROMPT_TUNING, P_TUNING, CPT and MULTITASK_PROMPT_TUNING: tokens in front of the text, whose positions have to agree.

peft puts prompts in front of the text and counts the text's positions from behind them; deltatune leaves the text's
positions as they are (docs/design/soft-prompts.md). Where positions are rotary, only differences of them matter, and the
two are the same function. T5's encoder has no positions that a prompt could shift. Elsewhere the functions differ, and
reading and writing is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from deltatune.core.delta import Delta, place
from deltatune.core.fit import check_tensors
from deltatune.core.method import Bag, Method
from deltatune.core.site import Stack, anatomy
from deltatune.core.weights import Weights, fingerprint
from deltatune.errors import DeltaTuneError
from deltatune.formats.disk import Tensors
from deltatune.formats.peft.config import Config
from deltatune.formats.seats import Seat
from deltatune.methods.addition.cpt import CPT
from deltatune.methods.addition.multitask_prompt_tuning import MultitaskPromptTuning
from deltatune.methods.addition.prompt_tuning import PromptTuning

KEY = "prompt_embeddings"


class Prompt:
    """How peft keeps a method that has one place in the whole model; a `Prompt` becomes known by being defined."""

    known: ClassVar[dict[str, Prompt]] = {}
    type: ClassVar[str]
    method: ClassVar[type[Method]]
    keys: ClassVar[frozenset[str]] = frozenset({KEY})

    def __init_subclass__(cls) -> None:
        Prompt.known[cls.type] = cls()

    def read(self, model: nn.Module, config: Config, tensors: Mapping[str, Tensor]) -> tuple[Delta, list[Tensors]]:
        """Return the delta, and the leaves of its sites in their order."""
        raise NotImplementedError

    def write(self, model: nn.Module, seats: Sequence[Seat]) -> tuple[dict[str, Any], Tensors]:
        """Return the fields of the config and the tensors."""
        raise NotImplementedError

    def check_keys(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise `DeltaTuneError` for tensors that are not those of this type."""
        if set(tensors) != self.keys:
            raise DeltaTuneError(
                f"the file holds {', '.join(sorted(tensors)[:3])}; a {self.type} of peft holds {', '.join(sorted(self.keys))} alone."
            )


def read_prompt(model: nn.Module, config: Config, tensors: Mapping[str, Tensor]) -> Weights:
    """Return the weights of a prompt or prefix; raises `DeltaTuneError` where it is another function than peft's."""
    form = Prompt.known[config.type]
    form.check_keys(tensors)
    delta, leaves = form.read(model, config, tensors)
    placements = place(model, delta)
    named = [
        (p.leaves[leaf], p.name(leaf), t) for p, own in zip(placements, leaves, strict=True) for leaf, t in own.items()
    ]
    trained = {name: tensor.contiguous() for declared, name, tensor in named if declared.trained}
    fixed = {name: tensor.contiguous() for declared, name, tensor in named if not declared.trained}
    weights = Weights(delta, trained, fingerprint(model), fixed=fixed)
    check_tensors(weights, placements)
    return weights


def write_prompt(model: nn.Module, seats: Sequence[Seat]) -> tuple[dict[str, Any], Tensors]:
    """Return the config and the tensors of a prompt, or of the prefixes of all attentions."""
    form = next(form for form in Prompt.known.values() if isinstance(seats[0].method, form.method))
    fields, tensors = form.write(model, seats)
    return {"peft_type": form.type, **fields}, tensors


def is_prompt(method: Method) -> bool:
    """Whether a method is one that peft has as a prompt."""
    return any(isinstance(method, form.method) for form in Prompt.known.values())


def stack_of(model: nn.Module, kind: str, prefix: bool = False) -> Stack:
    """Return the stack that prompts which move the text act on; raises `DeltaTuneError` where they are another function than ours."""
    parts = anatomy(model)
    stacks = list(parts.stacks)
    if not stacks:
        raise DeltaTuneError(f"the stacks of {parts.family} are not known, so no {kind} can be placed in it.")
    rotary = len(stacks) == 1 and stacks[0].causal and stacks[0].positions == "rotary"
    if rotary or (not prefix and len(stacks) == 2 and stacks[0].positions == "bias"):
        return stacks[0]
    raise DeltaTuneError(
        f"{kind} moves the positions of the text in {parts.family}, and deltatune's does not: on its "
        f"{'two stacks' if len(stacks) > 1 else stacks[0].positions + ' positions'} they are different functions. "
        "Train it with deltatune."
    )


def sizes(stack: Stack, length: int) -> dict[str, Any]:
    """Return the fields that every prompt of peft has."""
    heads = stack.heads.query if stack.heads else 1
    task = "CAUSAL_LM" if stack.causal else "SEQ_2_SEQ_LM"
    counts = {"num_transformer_submodules": 1, "num_layers": stack.layers, "num_attention_heads": heads}
    return {"task_type": task, "num_virtual_tokens": length, "token_dim": stack.width, **counts}


class PromptTuningForm(Prompt):
    type = "PROMPT_TUNING"
    method = PromptTuning

    def read(self, model: nn.Module, config: Config, tensors: Mapping[str, Tensor]) -> tuple[Delta, list[Tensors]]:
        E = tensors[KEY]
        n = self.length(model, config, E)
        return PromptTuning(n).at("input.embed"), [{"P": E[:n]}]

    def length(self, model: nn.Module, config: Config, E: Tensor) -> int:
        """Return the number of tokens; on an encoder-decoder peft has rows that it never uses behind them."""
        stack = stack_of(model, f"peft's {self.type}")
        n = config.whole("num_virtual_tokens", E.shape[0])
        if E.shape not in ((n, stack.width), (2 * n, stack.width)):
            raise DeltaTuneError(
                f"{KEY} has the shape {tuple(E.shape)}; {n} tokens of this model are {(n, stack.width)}."
            )
        return n

    def write(self, model: nn.Module, seats: Sequence[Seat]) -> tuple[dict[str, Any], Tensors]:
        E = self.embeddings(model, seats)
        return {**sizes(stack_of(model, f"peft's {self.type}"), len(E)), "prompt_tuning_init": "RANDOM"}, {KEY: E}

    def embeddings(self, model: nn.Module, seats: Sequence[Seat]) -> Tensor:
        """Return the embeddings that stand in front of the text."""
        stack, seat = stack_of(model, f"peft's {self.type}"), seats[0]
        if seat.site.path != stack.embed or len(seats) > 1:
            raise DeltaTuneError(
                f"peft has prompts at the input of the first stack; this delta has {seat.method} at {seat.site.path!r}."
            )
        return seat.leaves["P"]


class PTuningForm(PromptTuningForm):
    """Read as the prompt that its encoder made, and written as PROMPT_TUNING."""

    type = "P_TUNING"


class CPTForm(PromptTuningForm):
    """peft keeps the context as it has become, from which training would go on."""

    type = "CPT"
    method = CPT

    def read(self, model: nn.Module, config: Config, tensors: Mapping[str, Tensor]) -> tuple[Delta, list[Tensors]]:
        E = tensors[KEY]
        n = self.length(model, config, E)
        ids = config.get("cpt_token_ids", [0] * n)
        if not isinstance(ids, list) or len(ids) != n:
            raise DeltaTuneError(f"{config.source} names the tokens {ids!r} for {n} rows of {KEY}.")
        kinds = tuple(config.get("cpt_tokens_type_mask", []))
        radii = (config.number("opt_projection_epsilon", 0.1), config.number("opt_projection_format_epsilon", 0.1))
        method = CPT(tuple(ids), kinds, *map(float, radii))
        return method.at("input.embed"), [{"E": E, "C": E.new_zeros(E.shape)}]

    def embeddings(self, model: nn.Module, seats: Sequence[Seat]) -> Tensor:
        P = seats[0].method.tokens(Bag(seats[0].leaves))
        return super().embeddings(model, [Seat(seats[0].method, seats[0].site, {"P": P}, seats[0].own), *seats[1:]])

    def write(self, model: nn.Module, seats: Sequence[Seat]) -> tuple[dict[str, Any], Tensors]:
        fields, tensors = super().write(model, seats)
        method = seats[0].method
        own = {
            "cpt_token_ids": list(method.ids),
            "cpt_mask": [1] * len(method.ids),
            "cpt_tokens_type_mask": list(method.types or (1,) * len(method.ids)),
            "opt_projection_epsilon": method.epsilon,
            "opt_projection_format_epsilon": method.format_epsilon,
        }
        return {name: value for name, value in fields.items() if name != "prompt_tuning_init"} | own, tensors


class MultitaskForm(PromptTuningForm):
    """Read for its first task; `of_task` gives the others."""

    type = "MULTITASK_PROMPT_TUNING"
    method = MultitaskPromptTuning
    keys = frozenset({KEY, "prefix_task_cols", "prefix_task_rows"})

    def read(self, model: nn.Module, config: Config, tensors: Mapping[str, Tensor]) -> tuple[Delta, list[Tensors]]:
        P, u, v = tensors[KEY], tensors["prefix_task_cols"], tensors["prefix_task_rows"].mT
        n = self.length(model, config, P)
        if u.dim() != 3 or len(P) != n:
            raise DeltaTuneError(
                f"prefix_task_cols has the shape {tuple(u.shape)} and {KEY} {len(P)} rows for {n} tokens."
            )
        method = MultitaskPromptTuning(n, len(u), 0, u.shape[2])
        return method.at("input.embed"), [{"P": P, "u": u, "v": v}]

    def write(self, model: nn.Module, seats: Sequence[Seat]) -> tuple[dict[str, Any], Tensors]:
        fields, tensors = super().write(model, seats)
        method, leaves = seats[0].method, seats[0].leaves
        factors = {"prefix_task_cols": leaves["u"], "prefix_task_rows": leaves["v"].mT}
        return {**fields, "num_tasks": method.tasks, "num_ranks": method.rank}, tensors | factors
