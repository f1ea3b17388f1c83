"""Forms whose tensors are the leaves under other names, and what several of them need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from deltatune.core.leaf import Given
from deltatune.core.method import Method
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.formats.disk import Tensors
from deltatune.formats.parts import Part
from deltatune.formats.peft.config import Config
from deltatune.formats.peft.form import Form
from deltatune.formats.seats import Seat


class Table(Form):
    """A form that names each leaf's tensor; `turned` are the leaves that peft keeps with their last dimensions swapped."""

    names: ClassVar[Mapping[str, str]]
    turned: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        if "names" in vars(cls):
            cls.suffixes = tuple(cls.names.values())
            cls.needed = cls.needed or cls.suffixes
        super().__init_subclass__()

    def method(self, config: Config, site: Site, held: Tensors) -> Method:
        """Return the method that a module's tensors belong to."""
        raise NotImplementedError

    def read(self, config: Config, site: Site, held: Tensors) -> list[Part]:
        leaves = {leaf: self._turn(leaf, held[name]) for leaf, name in self.names.items() if name in held}
        return [Part(site.path, self.method(config, site, held), leaves)]

    def write(self, seat: Seat) -> Tensors:
        return {name: self._turn(leaf, seat.leaves[leaf]) for leaf, name in self.names.items() if leaf in seat.leaves}

    def _turn(self, leaf: str, tensor: Tensor) -> Tensor:
        return tensor.mT if leaf in self.turned else tensor


def fresh(method: Method, site: Site, own: Mapping[str, Tensor], leaf: str) -> Tensor:
    """Return a leaf that is computed from the site's own tensors, as it starts."""
    declared = method.leaves(site)[leaf]
    return declared.init.fill(declared.shape, Generator(), Given(site, own))


def check_derived(seat: Seat, leaves: tuple[str, ...]) -> None:
    """Raise `DeltaTuneError` when leaves are not those that peft will compute from the same module."""
    for leaf in leaves:
        if not torch.allclose(fresh(seat.method, seat.site, seat.own, leaf), seat.leaves[leaf], atol=1e-4):
            raise DeltaTuneError(
                f"{leaf} of {seat.method} at {seat.site.path!r} is not what this backbone gives; peft computes it again when "
                "it loads the file, so the two would differ. Merge it instead."
            )


def cut(seats: list[Seat] | Any, leaf: str, take: Callable[[Tensor, Tensor], Tensor], what: str) -> Tensor:
    """Return the largest of the seats' matrices called `leaf`, of which `take(largest, other)` has to give every other."""
    found = [next(t for name, t in seat.leaves.items() if name.startswith(f"{leaf}_")) for seat in seats]
    sizes = [max(t.shape[i] for t in found) for i in range(found[0].dim())]
    largest = max(found, key=Tensor.numel)
    if list(largest.shape) != sizes or not all(torch.equal(take(largest, other), other) for other in found):
        raise DeltaTuneError(
            f"peft cuts {what} of narrower layers out of that of the widest; this delta drew one for each width. Write "
            "layers of one width at a time, or dt.to_lora(model, weights)."
        )
    return largest
