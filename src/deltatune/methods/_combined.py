"""What all combinators share: several methods at one site, and a mixture of what they make of it."""

from __future__ import annotations

from typing import Any

from torch import Generator, Tensor

from deltatune.core.leaf import Leaf
from deltatune.core.method import Bag, Base, Method
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError


class Combined(Method):
    """A method made of `children` at one site: `mix` says what becomes of their results.

    Leaves are those of the children, named `i/leaf`, and the combinator's own.
    """

    @property
    def children(self) -> tuple[Method, ...]:
        """The methods that are combined."""
        raise NotImplementedError

    def own(self, site: Site) -> dict[str, Leaf]:
        """Declare the combinator's own leaves."""
        return {}

    def mix(self, p: Any, x: Tensor, before: Tensor, after: list[Tensor]) -> Tensor:
        """Return what replaces `before`, given what each child makes of it; `x` is what the decision may look at."""
        raise NotImplementedError

    @property
    def where(self) -> str:  # type: ignore[override]
        """The first child's default place."""
        return self.children[0].where

    @property
    def acts(self) -> str:  # type: ignore[override]
        """The children's interface, which they share."""
        acts = {child.acts for child in self.children}
        if len(acts) != 1:
            raise DeltaTuneError(
                f"{type(self).__name__} combines methods of one interface; found {', '.join(map(str, self.children))}. "
                "Write a + b to have unlike ones at one place."
            )
        return acts.pop()

    @property
    def kinds(self) -> Any:  # type: ignore[override]
        """The kinds of site that every child can act on."""
        first, *others = (child.kinds for child in self.children)
        return tuple(kind for kind in first if all(kind in kinds for kinds in others))

    @property
    def breaks(self) -> Any:  # type: ignore[override]
        """The laws that a child breaks."""
        return {law: reason for child in self.children for law, reason in child.breaks.items()}

    def leaves(self, site: Site) -> dict[str, Leaf]:
        mine = {f"{i}/{n}": leaf for i, child in enumerate(self.children) for n, leaf in child.leaves(site).items()}
        return {**mine, **self.own(site)}

    def takes(self, site: Site) -> bool:
        return all(child.takes(site) for child in self.children)

    def unfold(self, p: Any) -> Any:
        own: Any = Bag({name: tensor for name, tensor in vars(p).items() if "/" not in name})
        own.kids = [child.unfold(Bag(leaves)) for child, leaves in self._split(p)]
        return own

    def draw(self, p: Any, generator: Generator) -> dict[str, Tensor]:
        drawn = [child.draw(Bag(leaves), generator) for child, leaves in self._split(p)]
        return {f"{i}/{name}": tensor for i, tensors in enumerate(drawn) for name, tensor in tensors.items()}

    def step(self, sites: list[Any], step: int, steps: int) -> list[dict[str, Tensor]] | None:
        changed: list[dict[str, Tensor]] = [{} for _ in sites]
        split = [self._split(p) for p in sites]
        for i, child in enumerate(self.children):
            found = child.step([Bag(own[i][1]) for own in split], step, steps) or []
            for all_of_site, change in zip(changed, found, strict=False):
                all_of_site.update({f"{i}/{name}": tensor for name, tensor in change.items()})
        return changed

    def penalty(self, p: Any) -> Tensor | None:
        found = [child.penalty(q) for child, q in zip(self.children, p.kids, strict=True)]
        some = [term for term in found if term is not None]
        return sum(some[1:], some[0]) if some else None

    def stream(self, p: Any, h: Tensor) -> Tensor:
        return self.mix(p, h, h, [c.stream(q, h) for c, q in self._kids(p)])

    def output(self, p: Any, x: Tensor, y: Tensor, *base: Base) -> Tensor:
        return self.mix(p, x, y, [c.output(q, x, y.clone(), *base) for c, q in self._kids(p)])  # each uses it up

    def value(self, p: Any, theta: Tensor) -> Tensor:
        return self.mix(p, theta, theta, [c.value(q, theta) for c, q in self._kids(p)])

    def weight(self, p: Any, W: Tensor) -> Tensor:
        if "merge" in self.breaks:
            raise DeltaTuneError(f"{self} has no weight: {self.breaks['merge']}.")
        return self.mix(p, W, W, [c.weight(q, W) for c, q in self._kids(p)])

    def bias(self, p: Any, b: Tensor | None) -> Tensor | None:
        after = [c.bias(q, b) for c, q in self._kids(p)]
        some = [new for new in after if new is not None]
        if not some:
            return None
        zero = some[0].new_zeros(some[0].shape)
        return self.mix(p, zero, zero if b is None else b, [zero if new is None else new for new in after])

    def _kids(self, p: Any) -> list[tuple[Any, Any]]:
        return list(zip(self.children, p.kids, strict=True))

    def _split(self, p: Any) -> list[tuple[Method, dict[str, Tensor]]]:
        named = [(*name.partition("/"), tensor) for name, tensor in vars(p).items() if "/" in name]
        return [
            (child, {rest: tensor for head, _, rest, tensor in named if head == str(i)})
            for i, child in enumerate(self.children)
        ]
