"""Methods: what is done at a site. A method is a frozen dataclass of pure functions; it knows maths, never models.

Throughout, `p` holds the method's tensors at one site as attributes, in the compute dtype; `x` is a module's input,
`y` its output, `h` a hidden state, `W` a weight of shape [d_out, d_in], `b` a bias of shape [d_out].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from torch import Tensor
from torch.nn import functional as F

from deltatune.core.leaf import Leaf
from deltatune.core.site import Kind, Site
from deltatune.core.spec import Spec, concrete

if TYPE_CHECKING:
    from deltatune.core.delta import Delta

Law = Literal["identity", "merge", "width", "compile"]


class Bag:
    """A method's tensors at one site, as attributes."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            setattr(self, name, tensor)


class Base(Protocol):
    """The layer under a method: its weight [d_out, d_in] and bias [d_out] as they are before this method acts."""

    @property
    def weight(self) -> Tensor: ...
    @property
    def bias(self) -> Tensor | None: ...


class Method(Spec):
    """What is done at a site.

    `where` is the default place, `acts` the interface, `kinds` the kinds of site it can act on, and `breaks` names each
    law that cannot hold for it, with the reason.
    """

    where: ClassVar[str]
    acts: ClassVar[str]
    kinds: ClassVar[tuple[Kind, ...]]
    breaks: ClassVar[dict[Law, str]] = {}

    def leaves(self, site: Site) -> dict[str, Leaf]:
        """Declare the tensors of this method at `site`, by name."""
        raise NotImplementedError

    def unfold(self, p: Any) -> Any:
        """Return the tensors the method computes with; a reparameterized method computes them from fewer."""
        return p

    @property
    def computes(self) -> Method:
        """The method that acts at the port with the unfolded tensors: this one, unless it wraps another."""
        return self

    def at(self, where: str) -> Delta:
        """Return the delta that does this at `where`."""
        from deltatune.core.delta import Delta, Term

        return Delta((Term(where, self),))

    def __add__(self, other: Delta | Method) -> Delta:
        return self.at(self.where) + other


class OnLinear(Method):
    """A method on linear layers, defined by what it does to their weight and bias; mergeable by definition."""

    acts = "linear"
    kinds = ("linear",)

    def weight(self, p: Any, W: Tensor) -> Tensor:
        """Return W' [d_out, d_in]: the definition of the method."""
        return W

    def bias(self, p: Any, b: Tensor | None) -> Tensor | None:
        """Return b' [d_out], or None for none."""
        return b

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        """Return x W'^T + b' [..., d_out] by the cheapest road; `y` is the layer's own output for `x` [..., d_in]."""
        return F.linear(x, self.weight(p, base.weight), self.bias(p, base.bias))


class OnStream(Method):
    """A method on a hidden state at a module's input or output."""

    acts = "stream"
    kinds = ("linear", "norm", "embedding", "container")
    breaks: ClassVar[dict[Law, str]] = {"merge": "it adds a computation that no weight of the backbone can express"}

    def stream(self, p: Any, h: Tensor) -> Tensor:
        """Return h' [..., d] for the hidden state h [..., d]."""
        raise NotImplementedError


class OnTensor(Method):
    """A method on single parameters of any shape: norms, biases, embeddings, whole layers."""

    acts = "tensor"
    kinds = ("linear", "norm", "embedding", "container")

    def value(self, p: Any, theta: Tensor) -> Tensor:
        """Return the parameter's new value, of the shape of `theta`."""
        raise NotImplementedError


class OnHeads(Method):
    """A method that adds keys and values to attention, in front of the batch's own."""

    acts = "heads"
    kinds = ("container",)
    breaks: ClassVar[dict[Law, str]] = {"merge": "extra keys and values are not a change of any weight"}

    def prefix(self, p: Any, heads: int) -> tuple[Tensor, Tensor]:
        """Return keys and values, each [heads, length, head width]."""
        raise NotImplementedError


class OnTokens(Method):
    """A method that adds input embeddings in front of the batch's own."""

    acts = "tokens"
    kinds = ("embedding",)
    breaks: ClassVar[dict[Law, str]] = {"merge": "extra tokens are not a change of any weight"}

    def tokens(self, p: Any) -> Tensor:
        """Return input embeddings [length, d]."""
        raise NotImplementedError


def group(method: type[Method]) -> str:
    """Return the method's group, which is the folder it lives in: addition, specification or reparameterization."""
    return method.__module__.split(".")[-2]


def registry() -> dict[str, type[Method]]:
    """Return every method that is defined, by name."""
    return concrete(Method)  # type: ignore[return-value]
