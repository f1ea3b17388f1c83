"""Dense attention on a CPU, where torch's own kernel takes several times as long as matrix products: backward through bfloat16,
and both ways through short rows of float32 while it asks oneDNN for its many small products (`products.py`).

    S = scale Q K^T + bias + mask    P = softmax(S)    O = P V

It works on a few rows at a time, so that P stays in the cache. Of short rows P is kept for the backward pass; of longer ones,
where it would be larger than all else that a block keeps, it is computed again, as by that kernel. Everything else (other
float types and devices, dropout) is left to transformers' function.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from deltatune.core.products import asked

NAME = "dense"
CACHED = 1 << 20  # numbers in P at a time: 2 MiB in bfloat16
KEPT = 4  # P is kept while it is at most so many times as large as Q; in float32 once, as torch's kernel keeps O
SHORT = 512  # keys, beyond which torch's kernel gains more by leaving out what a causal mask hides


def attend_densely(model: Any) -> None:
    """Let a transformers model that looks its attention function up as `sdpa` find this one."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if NAME not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attend as transformers' `sdpa` does: queries [rows, heads, n, width] to [rows, n, heads, width]."""
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    if not _slow(query, key) or kwargs.get("dropout") or kwargs.get("softcap") or torch.compiler.is_compiling():
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    groups, scale = query.shape[1] // key.shape[1], kwargs.get("scaling")
    bias, mask = kwargs.get("position_bias"), attention_mask
    if mask is None and query.shape[2] > 1 and _is_causal(module, kwargs.get("is_causal")):
        mask = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()[None, None]
    bias = bias if bias is None else bias.contiguous()  # T5's has the heads in its last dimension, which adds slowly
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    mixed = Dense.apply(query, repeat_kv(key, groups), repeat_kv(value, groups), bias, _added(mask, query.dtype), scale)
    return cast(Tensor, mixed).transpose(1, 2).contiguous(), None


def _slow(query: Tensor, key: Tensor) -> bool:
    """Whether torch's own kernel takes longer."""
    if query.device.type != "cpu":
        return False
    return query.dtype == torch.bfloat16 or (query.dtype == torch.float32 and asked() and key.shape[2] <= SHORT)


def _is_causal(module: Any, said: bool | None) -> bool:
    return getattr(module, "is_causal", True) if said is None else said


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a mask as what is added to the scores."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    lowest = torch.finfo(dtype).min / 2  # a score that is added to it stays finite
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, lowest)


class Dense(torch.autograd.Function):
    """softmax(scale Q K^T + bias + mask) V for Q, K, V [rows, heads, ...]; bias and mask have as many rows, or one."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float
    ) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # once, where each product would do it
        o, kept, ctx.scale = q.new_empty(*q.shape[:-1], v.shape[-1]), [], scale
        for rows in _parts(q, k):
            P = _weights(q, k, bias, mask, scale, rows)
            torch.matmul(P, v[rows], out=o[rows])
            kept.append(P)
        most = 1 if q.dtype == torch.float32 else KEPT
        ctx.save_for_backward(q, k, v, bias, mask, *(kept if k.shape[-2] <= most * q.shape[-1] else ()))
        return o

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (q, k, v, bias, mask, *kept) = grads, ctx.saved_tensors
        g = g.contiguous()
        gq, gk, gv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        gb = torch.zeros_like(bias) if ctx.needs_input_grad[3] else None
        for number, rows in enumerate(_parts(q, k)):
            P = kept[number] if kept else _weights(q, k, bias, mask, ctx.scale, rows)
            torch.matmul(P.mT, g[rows], out=gv[rows])
            gS = torch.ops.aten._softmax_backward_data(g[rows] @ v[rows].mT, P, -1, P.dtype)
            if gb is not None:
                own = _own(gb, rows)
                own += gS.sum_to_size(own.shape)
            gS = gS if ctx.scale == 1 else gS.mul_(ctx.scale)
            torch.matmul(gS, k[rows], out=gq[rows])
            torch.matmul(gS.mT, q[rows], out=gk[rows])
        return gq, gk, gv, gb, None, None


def _parts(q: Tensor, k: Tensor) -> list[slice]:
    """Return the rows in parts of equal size, so that their products have few shapes."""
    count, each = q.shape[0], q.shape[1] * q.shape[2] * k.shape[2]
    size = -(-count // -(-count * each // CACHED))
    return [slice(first, first + size) for first in range(0, count, size)]


def _weights(q: Tensor, k: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float, rows: slice) -> Tensor:
    S = q[rows] @ k[rows].mT
    if scale != 1:
        S *= scale
    for more in (bias, mask):
        if more is not None:
            S += _own(more, rows)
    wide = torch.promote_types(S.dtype, torch.float32)  # the kernel of bfloat16 takes twice as long
    return torch.softmax(S, -1, dtype=wide).to(S.dtype)


def _own(held: Tensor, rows: slice) -> Tensor:
    """Return what these rows have of a tensor that has as many rows, or one for all."""
    return held if held.shape[0] == 1 else held[rows]
