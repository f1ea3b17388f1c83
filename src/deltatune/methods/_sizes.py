"""Checks of the sizes that methods are given, with messages that name the cure."""

from __future__ import annotations

from deltatune.core.method import Method
from deltatune.core.site import Site
from deltatune.errors import DeltaTuneError


def check_least(method: Method, least: int = 1, **sizes: float) -> None:
    """Raise `DeltaTuneError` for a size below `least`."""
    for field, size in sizes.items():
        if size < least:
            name = type(method).__name__
            raise DeltaTuneError(f"{name}({field}={size}) cannot be built; write {field}={least} or more.")


def check_rank(method: Method, rank: int, site: Site) -> None:
    """Raise `DeltaTuneError` for a rank above the widths of a site."""
    if rank > min(site.d_in, site.d_out):
        raise DeltaTuneError(
            f"{type(method).__name__}(rank={rank}) exceeds the dimensions of {site.path!r}: "
            f"{site.d_out} x {site.d_in}; write a rank of at most {min(site.d_in, site.d_out)}."
        )


def fitting(most: int, *widths: int, multiple: int = 1) -> int:
    """Return the largest size up to `most`, a multiple of `multiple`, that divides all widths (`multiple` when none does)."""
    sizes = range(most - most % multiple, 0, -multiple)
    return next((size for size in sizes if all(width % size == 0 for width in widths)), multiple)


def check_divides(method: Method, field: str, size: int, width: int, site: Site) -> None:
    """Raise `DeltaTuneError` when blocks of `size` do not tile a width, with the nearest sizes that do."""
    if width % size == 0:
        return
    sizes = [n for n in range(1, width + 1) if width % n == 0]
    near = [max((n for n in sizes if n < size), default=None), min((n for n in sizes if n > size), default=None)]
    raise DeltaTuneError(
        f"{type(method).__name__}({field}={size}) does not divide the width {width} of {site.path!r}; "
        f"write {field}={' or '.join(str(n) for n in near if n is not None)}."
    )
