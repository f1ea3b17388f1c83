"""HyperFormer: adapters whose weights a shared network makes, task by task and site by site (Karimi Mahabadi et al., 2021,
arXiv:2106.04489).

    h' = h + f(h D^T) U^T                                D = reshape(I G_D^T)   U = reshape(I G_U^T)
    I = relu([z_task, l] H_1^T + h_1) H_2^T + h_2        z: [tasks, e]   l: [e]   H_1: [hidden, 2 e]   H_2: [e, hidden]
                                                         G_D: [size d, e]   G_U: [d size, e]

All but the site's embedding l, which stands for the paper's layer and position, is shared by all sites; sites of unlike
widths have G_D and G_U of their own. z and l start N(0, 1), H_1, H_2 and G_D uniform (Kaiming), G_U at zero, so the delta
starts neutral. `task` says whose adapters act, and `of_task` changes it. The layer norms that the paper generates too are
left out. Parameters: e a site, and tasks e + hidden (3 e + 1) + e + 2 d size e for each width d.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from deltatune.core.leaf import KaimingUniform, Leaf, Normal
from deltatune.core.method import Bag, OnStream
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.methods._sizes import check_least


@dataclass(frozen=True)
class HyperFormer(OnStream):
    """Generated adapters: h' = h + f(h D^T) U^T, D and U made of the task's and the site's embedding (Karimi Mahabadi et al., 2021)."""

    size: int = 24
    embedding: int = 64
    hidden: int = 128
    tasks: int = 1
    task: int = 0

    where = "{attn.o,cross.o?,ffn.down}:out"

    def __post_init__(self) -> None:
        check_least(self, size=self.size, embedding=self.embedding, hidden=self.hidden, tasks=self.tasks)
        if not 0 <= self.task < self.tasks:
            raise DeltaTuneError(
                f"HyperFormer(tasks={self.tasks}) has no task {self.task}; write one of 0 to {self.tasks - 1}."
            )

    def leaves(self, site: Site) -> dict[str, Leaf]:
        e, size = self.embedding, site.width * self.size
        shared = {
            "z": Leaf((self.tasks, e), Normal(1.0), scope="delta"),
            "H1": Leaf((self.hidden, 2 * e), KaimingUniform(), scope="delta"),
            "h1": Leaf((self.hidden,), scope="delta"),
            "H2": Leaf((e, self.hidden), KaimingUniform(), scope="delta"),
            "h2": Leaf((e,), scope="delta"),
            f"GD{site.width}": Leaf((size, e), KaimingUniform(), scope="delta"),
            f"GU{site.width}": Leaf((size, e), scope="delta"),
        }
        return {**shared, "l": Leaf((e,), Normal(1.0))}

    def unfold(self, p: Any) -> Any:
        source = F.pad(p.z[self.task], (0, self.embedding)) + F.pad(p.l, (self.embedding, 0))
        code = F.linear(F.relu(F.linear(source, p.H1, p.h1)), p.H2, p.h2)
        GD, GU = (next(t for name, t in vars(p).items() if name.startswith(kind)) for kind in ("GD", "GU"))
        return Bag({"D": (GD @ code).unflatten(0, (self.size, -1)), "U": (GU @ code).unflatten(0, (-1, self.size))})

    def stream(self, p: Any, h: Tensor) -> Tensor:
        return h + F.linear(F.gelu(F.linear(h, p.D)), p.U)
