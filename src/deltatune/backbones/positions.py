"""Positions for methods that look at them: where each token of a row stands in its text, whatever the padding and the cache.

The module that reads the caller's arguments for a stack has a port that keeps the positions of the running call; the
ports in the stack's blocks look them up. A soft prompt's own pass through a causal stack has no positions of a text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deltatune.backbones.prompts import CausalPrompt, EncoderPrompt
from deltatune.backbones.reader import argument_names, by_name, reader
from deltatune.core.builders import BUILDERS, Built, first_argument
from deltatune.core.calls import Ports
from deltatune.core.delta import Placement
from deltatune.core.leaves import Tensors
from deltatune.core.ports import Call, Edit, StreamPort
from deltatune.core.site import Anatomy, Site
from deltatune.errors import DeltaTuneError


class Positions:
    """pre on the reader of a stack: keep [batch, length] positions, -1 for padding; post: those of the outer call again."""

    def __init__(self, names: tuple[str, ...], method: Any) -> None:
        self.names, self.method = names, method
        self.at: Tensor | None = None
        self.outer: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "at": None, "outer": None}  # the next call brings others

    def pre(self, here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        self.check(here)
        self.keep(by_name(self.names, args, kwargs), prompting(here))
        return args, kwargs

    def check(self, here: Ports) -> None:
        """Raise `DeltaTuneError` where a soft prompt stands in the same rows."""
        if any(isinstance(port, EncoderPrompt) for port in here.pre):
            raise DeltaTuneError(
                f"{self.method} counts the tokens of a text, and a soft prompt in the same rows moves them; "
                "detach one of them, or use the inner method at all positions."
            )

    def keep(self, given: dict[str, Any], prompt: bool) -> None:
        """Keep the positions of a call with these arguments, or none when it is a prompt's own pass."""
        if prompt:
            self.outer = self.at
            rows = given["inputs_embeds"]
            self.at = torch.full(rows.shape[:2], -1, device=rows.device)
        else:
            self.at = text_positions(given)

    def post(self, here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
        if prompting(here):
            self.restore()
        return y  # the positions stay: a checkpointed block is run again when the gradient comes back

    def restore(self) -> None:
        """Put the positions of the call around a prompt's own pass back."""
        self.at, self.outer = self.outer, None


def prompting(here: Ports) -> bool:
    """Whether the running call of a reader is a prompt's own pass."""
    return any(port.prompt.running for port in here.pre if isinstance(port, CausalPrompt))


def text_positions(given: dict[str, Any]) -> Tensor:
    """Return where each token of a call stands in its row's text, [batch, length], and -1 for padding.

    Without a mask of [batch, length] there is nothing to tell padding by, and the cache's length is where the text goes on.
    """
    mask, ids = given.get("attention_mask"), given.get("input_ids")
    rows = ids if ids is not None else given["inputs_embeds"]
    length = rows.shape[1]
    if mask is not None and mask.dim() == 2:
        return torch.where(mask.bool(), mask.long().cumsum(1) - 1, -1)[:, -length:]
    if given.get("position_ids") is not None:
        return given["position_ids"].expand(rows.shape[0], -1)
    past = given.get("past_key_values")
    before = 0 if past is None else past.get_seq_length()
    return (torch.arange(length, device=rows.device) + before)[None].expand(rows.shape[0], -1)


class PositionsPort(StreamPort):
    """pre or post: h -> method.stream(p, h, at)."""

    def __init__(self, site: Site, method: Any, tensors: Tensors, first: str, positions: Positions) -> None:
        super().__init__(site, method, tensors, first)
        self.positions = positions

    def _changed(self, h: Tensor) -> Tensor:
        return self.method.stream(self.tensors(h.dtype), h, self.positions.at)


def _positions(model: nn.Module, anatomy: Anatomy, seats: list[tuple[Placement, Tensors]]) -> Built:
    edits: list[Edit] = []
    kept: dict[str, Positions] = {}
    for placement, tensors in seats:
        site = placement.site
        _check(placement, anatomy)
        if site.stack not in kept:
            over = reader(model, anatomy.stack(site.stack))
            kept[site.stack] = Positions(argument_names(over), placement.method)
            edits += [Edit(over, "pre", kept[site.stack]), Edit(over, "post", kept[site.stack])]
        enter = model.get_submodule(site.path)
        port = PositionsPort(site, placement.method, tensors, first_argument(enter), kept[site.stack])
        if site.side == "in":
            edits.append(Edit(enter, "pre", port))
        else:
            edits.append(Edit(enter if site.exit is None else model.get_submodule(site.exit), "post", port))
    return edits, []


def _check(placement: Placement, anatomy: Anatomy) -> None:
    """Raise `DeltaTuneError` for a place whose hidden states are not one for each token of its stack's text."""
    site, method = placement.site, placement.method
    if site.layer is None or site.part or site.role in ("cross.k", "cross.v") or not anatomy.stacks:
        raise DeltaTuneError(
            f"{method} acts on hidden states of a block, one for each token of the text; {site.address!r} has none. "
            f"Its default place is {method.where!r}."
        )
    if method.from_end and anatomy.stack(site.stack).causal:  # type: ignore[attr-defined]
        raise DeltaTuneError(
            f"{method} counts from the end of the text, and on the causal stack of {site.path!r} nothing tells where the "
            "prompt ends while it is trained; count from its start, with first=..., or act on an encoder."
        )


BUILDERS["positions"] = _positions
