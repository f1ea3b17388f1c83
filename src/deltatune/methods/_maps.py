"""Maps: ways to compute a method's leaves from others, for `Reparam`."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from deltatune.core.leaf import Leaf
from deltatune.core.method import Law
from deltatune.core.spec import Spec


class Map(Spec):
    """A way to compute a method's leaves from others; `breaks` as for methods."""

    breaks: ClassVar[dict[Law, str]] = {}

    def leaves(self, inner: dict[str, Leaf]) -> dict[str, Leaf]:
        """Declare the leaves that are trained instead of `inner`."""
        raise NotImplementedError

    def unfold(self, p: Any) -> dict[str, Tensor]:
        """Return the inner leaves by name."""
        raise NotImplementedError
