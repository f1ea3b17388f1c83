"""What the edits of a hidden state in a low-rank subspace share."""

from __future__ import annotations

import torch
from torch import Tensor

from deltatune.core.leaf import Init, KaimingUniform, Leaf
from deltatune.core.method import Method, OnStream
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError
from deltatune.methods._sizes import check_least


def check_width(method: Method, rank: int, site: Site) -> None:
    """Raise `DeltaTuneError` for a rank above the width of a site."""
    if rank > site.width:
        raise DeltaTuneError(
            f"{type(method).__name__}(rank={rank}) exceeds the width {site.width} of {site.path!r}; "
            f"write a rank of at most {site.width}."
        )


def orthonormal_rows(R: Tensor) -> Tensor:
    """Return an orthonormal basis of the rows of R [rank, d], by QR; rows that are orthonormal stay as they are."""
    tall = R.mT.to(torch.promote_types(R.dtype, torch.float32))  # there is no QR in half precision
    Q, upper = torch.linalg.qr(tall)
    signs = torch.where(upper.diagonal() < 0, -1.0, 1.0).to(Q.dtype)
    return (Q * signs).mT.to(R.dtype)


class TwoBases(OnStream):
    """An edit that reads a hidden state by W_1 and writes it by W_2, two bases without constraints; `init` starts W_2."""

    rank: int
    init: Init

    where = "block:out"

    def __post_init__(self) -> None:
        check_least(self, rank=self.rank)

    def leaves(self, site: Site) -> dict[str, Leaf]:
        check_width(self, self.rank, site)
        shape = (self.rank, site.width)
        return {"W1": Leaf(shape, KaimingUniform()), "W2": Leaf(shape, self.init), "b": Leaf((self.rank,))}
