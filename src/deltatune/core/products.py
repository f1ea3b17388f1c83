"""Matrix products on a CPU, computed by the library that does it in the least time.

torch asks MKL for those in float32, which uses half of the vector unit of an AMD processor with AVX-512, and oneDNN for those in
bfloat16. Allowed to round float32 to bfloat16, it asks oneDNN for both; and oneDNN rounds only where a processor multiplies
bfloat16 in tiles. Whether products are then others, and exact, shows on numbers.

Each product of oneDNN begins with a search for its kernel, which takes five times as long as MKL takes for all of a small one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

ONEDNN: Any = torch.backends.mkldnn
MATMUL = ONEDNN.matmul
UNSET, ROUNDED = "none", "bf16"
AMD = "AuthenticAMD"
TRIED = ((256, 256, 256), (8, 256, 384), (384, 256, 8), (1, 256, 256))  # rows, inner width and columns of products
LIGHT = 1 << 14  # numbers in a factor, up to which its product with one of a few rows is light
CLOSE = 1e-5  # relative error: 4e-7 in float32, 3e-3 when rounded


@contextmanager
def products(device: torch.device) -> Iterator[None]:
    """The scope in which products in float32 are oneDNN's where that is exact; what a user has set stays."""
    with saying(ROUNDED) if _faster(device) else nullcontext():
        yield


@contextmanager
def few_rows() -> Iterator[None]:
    """The scope in which products have a row or two each, as in generation, and are torch's own choice again."""
    with saying(UNSET) if asked() and _exact() else nullcontext():
        yield


class Light:
    """The scope of products of tensors with factors of a few rows: gives them in the float type that is fastest for it.

    That is float32 where a CPU is given bfloat16 and the search for a kernel would take longer than the product. Written out,
    as a scope made of a generator would take as long as such a product too.
    """

    def __init__(self, *tensors: Tensor) -> None:
        few = all(map(_is_light, tensors))
        self.tensors = tuple(x.float() for x in tensors) if few else tensors
        self.asked = few and asked()

    def __enter__(self) -> tuple[Tensor, ...]:
        if self.asked:
            MATMUL.fp32_precision = UNSET
        return self.tensors

    def __exit__(self, *_: object) -> None:
        if self.asked:
            MATMUL.fp32_precision = ROUNDED


def _is_light(x: Tensor) -> bool:
    return x.numel() <= LIGHT and x.is_cpu and x.dtype in (torch.bfloat16, torch.float32)


def priced(precision: str, device: torch.device) -> bool:
    """Whether products in that precision have a price for each shape: oneDNN compiles them."""
    return precision != "fp32" or _faster(device)


def asked() -> bool:
    """Whether oneDNN is asked for products in float32, as it is in the scope of `products`."""
    return MATMUL.fp32_precision == ROUNDED


def _faster(device: torch.device) -> bool:
    return device.type == "cpu" and MATMUL.fp32_precision in (UNSET, ROUNDED) and _exact()


@contextmanager
def saying(precision: str) -> Iterator[None]:
    """The scope in which products in float32 may be of this precision."""
    before = MATMUL.fp32_precision
    MATMUL.fp32_precision = precision
    try:
        yield
    finally:
        MATMUL.fp32_precision = before


@cache
def _exact() -> bool:
    draw = torch.Generator().manual_seed(0)
    with _disable_current_modes(), torch.no_grad():
        return _halved_by_mkl() and all(_trusted(draw, *shape) for shape in TRIED)


def _halved_by_mkl() -> bool:
    """Whether this is a processor of the maker whose wide vector units MKL leaves alone."""
    known = Path("/proc/cpuinfo")
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return wide and known.exists() and AMD in known.read_text(encoding="utf-8")


def _trusted(draw: torch.Generator, rows: int, inner: int, columns: int) -> bool:
    A, B = torch.randn(rows, inner, generator=draw), torch.randn(columns, inner, generator=draw).mT
    with saying(UNSET):
        usual = A @ B
    with saying(ROUNDED):
        other = A @ B
    return trusted(usual, other, A.double() @ B.double())


def trusted(usual: Tensor, other: Tensor, exact: Tensor) -> bool:
    """Whether a product is not the usual one, and as close to the exact one as float32 allows."""
    return not torch.equal(usual, other) and bool((other - exact).norm() < CLOSE * exact.norm())
