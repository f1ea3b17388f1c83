"""Forms: how one type of peft keeps one method at one module. A form becomes known by being defined."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from deltatune.core.method import Method
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.formats.disk import Tensors
from deltatune.formats.parts import Part
from deltatune.formats.peft.config import Config
from deltatune.formats.seats import Seat


class Form:
    """How peft keeps a method; `suffixes` end the keys of its tensors, behind the module's path.

    Tensors `shared` by all modules stand at the root; `read` gets them beside a module's own.
    """

    known: ClassVar[dict[str, Form]] = {}
    type: ClassVar[str]
    methods: ClassVar[tuple[type[Method], ...]]
    suffixes: ClassVar[tuple[str, ...]]
    needed: ClassVar[tuple[str, ...]] = ()  # suffixes without which a module's tensors are not whole
    shared: ClassVar[tuple[str, ...]] = ()
    repeats: ClassVar[bool] = False  # whether peft writes what is shared at every module as well
    fields: ClassVar[frozenset[str]] = frozenset()
    refused: ClassVar[Mapping[str, str]] = {}
    demands: ClassVar[Mapping[str, Any]] = {}  # fields with the one value that the method can express, peft's default
    kinds: ClassVar[tuple[str, ...]] = ("linear",)  # the sites where peft has it
    beside: ClassVar[tuple[type[Method], ...]] = ()  # methods that it keeps as well, in tensors of another kind
    saves: ClassVar[bool] = True  # whether its config has `modules_to_save`
    transposed: ClassVar[bool] = False  # whether peft has it at weights stored [in, out]

    def __init_subclass__(cls) -> None:
        if "type" in vars(cls):
            Form.known[cls.type] = cls()

    def check(self, config: Config) -> None:
        """Raise `DeltaTuneError` for a config that says what the method cannot express."""
        config.check(self.fields | self.demands.keys(), self.refused)
        for name, value in self.demands.items():
            if config.get(name, value) != value:
                raise DeltaTuneError(
                    f"{config.source} says {name}={config.get(name)!r}; deltatune has {self.type} with {value!r} alone."
                )

    def take(self, model: nn.Module, config: Config, held: dict[str, Tensors]) -> list[Part]:
        """Take out of `held` what is not at a module as a whole, and return what it is in deltatune."""
        return []

    def untold(self, model: nn.Module, config: Config, shared: Tensors) -> dict[str, Tensors]:
        """Return every module's tensors where the file holds only shared ones, because peft makes them again when it loads it."""
        return {}

    def read(self, config: Config, site: Site, held: Tensors) -> list[Part]:
        """Return what a module's tensors are in deltatune."""
        raise NotImplementedError

    def read_at(self, config: Config, site: Site, held: Tensors, own: Tensors) -> list[Part]:
        """Return what a module's tensors are in deltatune where that depends on the module's own."""
        return self.read(config, site, held)

    def spread(self, config: Config, held: Mapping[str, Tensors], shared: Tensors) -> dict[str, Tensors]:
        """Return every module's tensors, in the order of the model, with those that it shares."""
        return {path: shared | own for path, own in held.items()}

    def seed(self, config: Config) -> int:
        """Return the seed of the weights, where the config has one that draws the same."""
        return 0

    def share(self, seats: Sequence[Seat]) -> Tensors:
        """Return the tensors that all modules share, by their names at the root."""
        return {}

    def prepare(self, seats: list[Seat]) -> list[Seat]:
        """Return seats of `methods` as this type can keep them."""
        return seats

    def write_beside(self, model: nn.Module, seats: Sequence[Seat]) -> tuple[Tensors, dict[str, Any]]:
        """Return the tensors by their names in the model, and the fields, of seats of methods `beside`."""
        return {}, {}

    def write(self, seat: Seat) -> Tensors:
        """Return a site's tensors by their suffixes in peft."""
        raise NotImplementedError

    def settings(self, seats: Sequence[Seat]) -> dict[str, Any]:
        """Return the fields of the config that tell peft about the method; all seats, those beside included, are one adapter."""
        raise NotImplementedError

    def one(self, seats: Sequence[Seat]) -> Any:
        """Return the method of all seats; raises `DeltaTuneError` when there are several, which this type does not know."""
        methods = list(dict.fromkeys(seat.method for seat in seats))
        if len(methods) > 1:
            raise DeltaTuneError(
                f"peft's {self.type} has one setting for all modules; this delta has {' and '.join(map(str, methods))}."
            )
        return methods[0]

    def only(self, name: str, values: Iterable[Any]) -> Any:
        """Return the value of all seats; raises `DeltaTuneError` when there are several."""
        found = sorted(set(values))
        if len(found) > 1:
            raise DeltaTuneError(f"peft's {self.type} has one {name} for all modules; this delta has {found}.")
        return found[0]


def agree(config: Config, name: str, path: str, found: int, said: float) -> None:
    """Raise `DeltaTuneError` when the size that a tensor has is not the one that the config says."""
    if found != said:
        raise DeltaTuneError(
            f"the tensors of {path!r} have {name}={found}, but {config.source} says {said:g} for it; they do not belong together."
        )
