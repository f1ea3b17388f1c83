"""Hidden states as they pass: the last port of each module, which looks and changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from deltatune.core.attach import edited
from deltatune.core.calls import Ports
from deltatune.core.ports import Edit
from deltatune.core.site import Site, anatomy
from deltatune.core.where import select
from deltatune.errors import DeltaTuneError

Seen = dict[str, tuple[Site, Tensor]]  # by address


class Watch:
    """pre or post: keep the hidden state [rows, length, d] that goes in or comes out."""

    def __init__(self, site: Site, seen: Seen) -> None:
        self.site, self.seen = site, seen

    def pre(self, here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        self.seen[self.site.address] = self.site, args[0] if args else next(iter(kwargs.values()))
        return args, kwargs

    def post(self, here: Ports, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> Any:
        h = y[0] if isinstance(y, tuple) else y
        self.seen[self.site.address] = self.site, h if self.site.part is None else self.site.part.take(h, -1)
        return y


@contextmanager
def watching(model: nn.Module, where: str) -> Iterator[Seen]:
    """The scope in which a call of the model leaves the hidden states at `where` in what is yielded, with all deltas' doing in them.

    Raises `DeltaTuneError` for a sub-layer that is no module of its own.
    """
    seen: Seen = {}
    sites = select(model, where, anatomy(model))
    for site in sites:
        if site.exit:
            raise DeltaTuneError(
                f"{site.address!r} is a sub-layer that no single module is, so nothing passes that could be looked at; "
                "ask at its last linear (ffn.down, attn.o) or at block."
            )
    edits = [Edit(model.get_submodule(s.path), "pre" if s.side == "in" else "post", Watch(s, seen)) for s in sites]
    with edited(model, edits):
        yield seen
