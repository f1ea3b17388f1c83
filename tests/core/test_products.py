"""Products in float32: exact in their scope whatever computes them there, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from deltatune.core.products import (
    LIGHT,
    MATMUL,
    ROUNDED,
    UNSET,
    Light,
    _exact,
    asked,
    few_rows,
    priced,
    products,
    trusted,
)

CPU = torch.device("cpu")
SHAPES = [(512, 768, 768), (512, 2048, 768), (328, 512, 1024), (64, 768, 8), (8, 768, 512), (3, 17, 5)]


@pytest.fixture(autouse=True)
def unset() -> Iterator[None]:
    before = MATMUL.fp32_precision
    MATMUL.fp32_precision = UNSET
    yield
    MATMUL.fp32_precision = before


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_float32(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    A, B, b, g = torch.randn(m, k), torch.randn(n, k), torch.randn(n), torch.randn(m, n)

    def made(A: Tensor, B: Tensor, b: Tensor, g: Tensor) -> list[Tensor]:
        return [A @ B.T, torch.addmm(b, A, B.T), g @ B, g.T @ A, torch.stack([A, A]) @ torch.stack([B, B]).mT]

    with products(CPU):
        found, again = made(A, B, b, g), made(A, B, b, g)
    for one, other, exact in zip(found, again, made(*(t.double() for t in (A, B, b, g))), strict=True):
        assert torch.equal(one, other)
        assert (one - exact).norm() < 2e-6 * exact.norm()


def test_the_scope_leaves_no_setting_behind() -> None:
    for _ in range(2):
        with products(CPU), products(CPU):
            assert priced("fp32", CPU) == asked(), "it is compiled where it is asked for, in the scope as before it"
        assert MATMUL.fp32_precision == UNSET
    with pytest.raises(ZeroDivisionError), products(CPU):
        raise ZeroDivisionError
    assert MATMUL.fp32_precision == UNSET
    assert torch.get_float32_matmul_precision() == "highest"


def test_inside_it_generation_has_torchs_own_choice() -> None:
    with products(CPU):
        before = MATMUL.fp32_precision
        with few_rows():
            assert MATMUL.fp32_precision == UNSET and not asked()
        assert MATMUL.fp32_precision == before


def test_what_a_user_has_set_stays() -> None:
    MATMUL.fp32_precision = "ieee"
    with products(CPU), few_rows():
        assert MATMUL.fp32_precision == "ieee"
    assert not priced("fp32", CPU) and priced("bf16", CPU)


def test_it_is_tried_against_torchs_own_choice_whatever_is_set() -> None:
    found = []
    for precision in (UNSET, ROUNDED):
        _exact.cache_clear()
        MATMUL.fp32_precision = precision
        found.append(priced("fp32", CPU))
    assert found[0] == found[1]


def test_other_devices_are_left_alone() -> None:
    with products(torch.device("cuda")):
        assert MATMUL.fp32_precision == UNSET
    assert not priced("fp32", torch.device("cuda"))


def test_gradients_are_computed_in_the_scope_too() -> None:
    A, B = torch.randn(256, 256, requires_grad=True), torch.randn(256, 256)
    with products(CPU):
        expected = torch.ones(256, 256) @ B.T
        (found,) = torch.autograd.grad((A @ B).sum(), A)
    assert torch.equal(found, expected)


def test_a_product_is_trusted_where_it_is_another_one_and_exact() -> None:
    A, B = torch.randn(64, 512), torch.randn(512, 64)
    usual, exact = A @ B, A.double() @ B.double()
    summed = A[:, ::2] @ B[::2] + A[:, 1::2] @ B[1::2]
    assert trusted(usual, summed, exact)
    assert not trusted(usual, usual, exact), "nothing is gained"
    assert not trusted(usual, (A.bfloat16().float() @ B.bfloat16().float()), exact)
    assert not trusted(usual, (A.bfloat16() @ B.bfloat16()).float(), exact)
    assert ROUNDED != UNSET


def test_products_of_few_numbers_are_float32s_and_torchs_own() -> None:
    few, many = torch.randn(8, 64), torch.randn(8, LIGHT)
    with products(CPU):
        before = MATMUL.fp32_precision
        with Light(few.bfloat16(), few) as (small, same):
            assert small.dtype == torch.float32 and same is few and MATMUL.fp32_precision == UNSET
        assert MATMUL.fp32_precision == before
        with Light(few.bfloat16(), many.bfloat16()) as found:
            assert [t.dtype for t in found] == [torch.bfloat16, torch.bfloat16] and MATMUL.fp32_precision == before
        with Light(few.double()) as (wide,):
            assert wide.dtype == torch.float64
        with pytest.raises(ZeroDivisionError), Light(few):
            raise ZeroDivisionError
        assert MATMUL.fp32_precision == before
    MATMUL.fp32_precision = "ieee"
    with products(CPU), Light(few):
        assert MATMUL.fp32_precision == "ieee"
    assert MATMUL.fp32_precision == "ieee"
