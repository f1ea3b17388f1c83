"""What the edits of a hidden state in a low-rank subspace share."""

from __future__ import annotations

import torch
from torch import Tensor

from deltatune.core.method import Method
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError


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
