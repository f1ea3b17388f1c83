"""Methods: what is done at a site. A method is a frozen dataclass of pure functions; it knows maths, never models.

Throughout, `p` holds the method's tensors at one site as attributes, in the compute dtype; `x` is a module's input,
`y` its output, `h` a hidden state, `W` a weight of shape [d_out, d_in], `b` a bias of shape [d_out].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from torch import Generator, Tensor
from torch.nn import functional as F

from deltatune.core.leaf import Leaf
from deltatune.core.site import Kind, Site
from deltatune.core.spec import Spec, concrete

if TYPE_CHECKING:
    from deltatune.core.delta import Delta

Own = Callable[[Site], Mapping[str, Tensor]]
Law = Literal["identity", "merge", "width", "compile", "route"]


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
    @property
    def plain(self) -> Tensor | None:
        """The weight, where the layer is no more than x W^T + b, frozen, in the type of its output; else None."""
        ...


class Method(Spec):
    """What is done at a site.

    `where` is the default place, `acts` the interface, `kinds` the kinds of site it can act on, and `breaks` names each
    law that cannot hold for it, with the reason. A `batched` method computes with tensors of each row's own too: p holds
    matrices [rows, m, n] and vectors [rows, 1, n] then, and x, y and h are [rows, n, d].
    """

    where: ClassVar[str]
    acts: ClassVar[str]
    kinds: ClassVar[tuple[Kind, ...]]
    breaks: ClassVar[dict[Law, str]] = {}
    batched: ClassVar[bool] = False

    def leaves(self, site: Site) -> dict[str, Leaf]:
        """Declare the tensors of this method at `site`, by name."""
        raise NotImplementedError

    def leaves_at(self, sites: Sequence[Site], own: Own) -> list[dict[str, Leaf]]:
        """Declare the tensors at all sites of a term, in order: by each site alone, unless a start depends on the others.

        `own` gives a site's own tensors, for a start to look at.
        """
        return [self.leaves(site) for site in sites]

    def takes(self, site: Site) -> bool:
        """Whether a method on tensors acts on the parameter `site.tensor` of a chosen place."""
        return True

    def enters(self, site: Site) -> bool:
        """Whether all that a method on linear layers does at `site` is to change the layer's input, by `input`."""
        return False

    def unfold(self, p: Any) -> Any:
        """Return the tensors the method computes with; a reparameterized method computes them from fewer."""
        return p

    def penalty(self, p: Any) -> Tensor | None:
        """Return a scalar that training adds to the loss for this site, or None."""
        return None

    def draw(self, p: Any, generator: Generator) -> dict[str, Tensor]:
        """Return the values of untrained leaves for one training step (noise, random masks); outside it they are as they start."""
        return {}

    def step(self, sites: list[Any], step: int, steps: int) -> list[dict[str, Tensor]] | None:
        """Return new values of leaves, site by site, after optimizer step `step` of `steps`; the gradients are still there."""
        return None

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
    """A method on linear layers, defined by what it does to their weight and bias; mergeable by definition.

    An embedding is the linear map of one-hot tokens, W [d, vocabulary], and a convolution that of patches, W [d_out, d_in
    prod(kernel)]: there `weight` and `bias` are what acts, and `output` is not called. A head tied to an embedding stays
    as it is.
    """

    acts = "linear"
    kinds = ("linear", "embedding", "conv")

    def weight(self, p: Any, W: Tensor) -> Tensor:
        """Return W' [d_out, d_in]: the definition of the method."""
        return W

    def bias(self, p: Any, b: Tensor | None) -> Tensor | None:
        """Return b' [d_out], or None for none."""
        return b

    def output(self, p: Any, x: Tensor, y: Tensor, base: Base) -> Tensor:
        """Return x W'^T + b' [..., d_out] by the cheapest road; `y` is the layer's own output for `x` [..., d_in], to be used up."""
        return F.linear(x, self.weight(p, base.weight), self.bias(p, base.bias))

    def input(self, p: Any, x: Tensor) -> Tensor:
        """Return x' [..., d_in] with x W'^T + b' = x' W^T + b, for methods that enter: the road without a second product."""
        raise NotImplementedError


class OnStream(Method):
    """A method on a hidden state at a module's input or output."""

    acts = "stream"
    kinds = ("linear", "norm", "embedding", "container")
    breaks: ClassVar[dict[Law, str]] = {"merge": "it adds a computation that no weight of the backbone can express"}

    def stream(self, p: Any, h: Tensor) -> Tensor:
        """Return h' [..., d] for the hidden state h [..., d]."""
        raise NotImplementedError


class OnBranch(Method):
    """A method in parallel to a sub-layer: it sees what goes in and changes what comes out."""

    acts = "branch"
    kinds = ("linear", "norm", "container")
    breaks: ClassVar[dict[Law, str]] = {"merge": "it adds a computation that no weight of the backbone can express"}

    def output(self, p: Any, x: Tensor, y: Tensor) -> Tensor:
        """Return y' [..., d_out] for the sub-layer's input x [..., d_in] and output y [..., d_out]."""
        raise NotImplementedError


class OnLadder(Method):
    """A method beside a stack: rungs read the blocks' outputs, and the last one adds to the stack's own (no gradient enters it)."""

    acts = "ladder"
    kinds = ("container",)
    breaks: ClassVar[dict[Law, str]] = {"merge": "a network beside the backbone is not a change of any weight"}

    def rung(self, p: Any, h: Tensor, s: Tensor | None) -> Tensor:
        """Return the side state s' [..., size] after a block's output h [..., d]; s is None at the first rung."""
        raise NotImplementedError

    def top(self, p: Any, h: Tensor, s: Tensor) -> Tensor:
        """Return what the last block hands on, h' [..., d], with the last rung's tensors."""
        raise NotImplementedError


class OnTensor(Method):
    """A method on single parameters of any shape: norms, biases, embeddings, whole layers."""

    acts = "tensor"
    kinds = ("linear", "norm", "embedding", "conv", "grouped conv", "container")

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


class OnQueries(Method):
    """A method that adds to what attention puts out, from its queries."""

    acts = "queries"
    kinds = ("container",)
    breaks: ClassVar[dict[Law, str]] = {"merge": "attention to something beside the text is not a change of any weight"}

    def attend(self, p: Any, q: Tensor, project: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        """Return what is added to the attention's output, [batch, heads, length, head width], before its output projection.

        `q` holds the queries of that shape, scaled as the backbone scales them; `project` makes keys and values
        [heads, n, head width] of states [n, d], as the backbone makes them of the text, without positions.
        """
        raise NotImplementedError


class OnPositions(Method):
    """A method on a hidden state that looks at where its tokens stand in their text."""

    acts = "positions"
    kinds = ("linear", "norm", "container")
    breaks: ClassVar[dict[Law, str]] = {"merge": "it adds a computation that no weight of the backbone can express"}

    @property
    def from_end(self) -> bool:
        """Whether it needs to know where the text ends, which nothing tells while a causal stack is being trained."""
        return False

    def stream(self, p: Any, h: Tensor, at: Tensor) -> Tensor:
        """Return h' [batch, length, d] for the hidden state h; `at` [batch, length] counts from 0, and is -1 for padding."""
        raise NotImplementedError


def group(method: type[Method]) -> str:
    """Return the method's group, which is the folder it lives in: addition, specification or reparameterization."""
    return method.__module__.split(".")[-2]


def registry() -> dict[str, type[Method]]:
    """Return every method that is defined, by name."""
    return concrete(Method)  # type: ignore[return-value]
