"""Quantised backbones: what torchao's and bitsandbytes' weights are worth, and rounding the linears of a backbone.

A quantised layer is called as it is, so a delta acts on it like on any other. Only what looks at a weight itself (a start, a
method defined by W, a merge, a fingerprint) comes here; neither library has to be installed for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltatune.core.stored import STORAGES, Storage, quantised
from deltatune.errors import DeltaTuneError, nearest

GROUP = 32  # neighbouring weights of a row that share a scale in 4 bits
WAYS = ("int8", "int4")
NOT_YET = (
    "bitsandbytes rounds a weight when it is moved to its device, and this one was not yet: call model.to(device)."
)


def quantise(model: Any, how: str) -> None:
    """Round the linear layers of a backbone, in place, with torchao: int8 with a scale a row, int4 with one a group of 32.

    The head and the embeddings stay as they are. Raises `DeltaTuneError` for another `how`, without torchao, and for a
    backbone without `nn.Linear`.
    """
    if how not in WAYS:
        raise DeltaTuneError(f"there is no quantisation {how!r}.{nearest(how, WAYS)} Write one of {', '.join(WAYS)}.")
    head = model.get_output_embeddings()
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    if not linears:
        raise DeltaTuneError(f"{type(model).__name__} has no nn.Linear beside its head, and nothing else is quantised.")
    try:
        from torchao.quantization import quantize_
    except ImportError:
        raise DeltaTuneError('quantise= needs torchao: pip install "deltatune[quantised]".') from None
    for linear in linears:
        quantize_(linear, _config(how, linear.in_features))
        linear.__class__ = RoundedLinear


class RoundedLinear(nn.Linear):
    """A linear layer that makes its weight out of whole numbers again in the backward pass; autograd would keep it."""

    def forward(self, input: Tensor) -> Tensor:
        """Return input W^T + b [..., d_out]."""
        if torch.is_grad_enabled() and quantised(self.weight) and not torch.compiler.is_compiling():
            return Product.apply(input, self.weight, self.bias)  # type: ignore[return-value]
        return super().forward(input)


class Product(torch.autograd.Function):
    """x W^T + b for a frozen, rounded W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        gx = g @ ctx.weight.dequantize() if ctx.needs_input_grad[0] else None
        gb = g.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return gx, None, gb


def _config(how: str, d_in: int) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerAxis, PerGroup

    if how == "int8":
        return Int8WeightOnlyConfig(set_inductor_config=False)
    four: Any = torch.int4  # type: ignore[attr-defined]
    return IntxWeightOnlyConfig(four, PerAxis(0) if d_in % GROUP else PerGroup(GROUP))


def _rounded(new: Tensor, like: Any) -> Tensor | None:
    """Round new values of a weight as torchao rounded the old ones; it keeps what that takes for weight-only integers."""
    new = new.to(like.device, like.dtype)
    match type(like).__name__:
        case "Int8Tensor" if like.act_quant_kwargs is None and list(like.block_size) == [1, new.shape[1]]:
            from torchao.quantization import Int8Tensor, PerRow

            return Int8Tensor.from_hp(new, PerRow())
        case "IntxUnpackedToInt8Tensor" if like.activation_quantization is None and not like.zero_point.any():
            from torchao.quantization import IntxUnpackedToInt8Tensor

            return IntxUnpackedToInt8Tensor.from_hp(new, tuple(like.block_size), like.target_dtype)
    return None


def _of_4_bits(weight: Any, module: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(_codes_of_4_bits(weight), _state(weight))


def _state(weight: Any) -> Any:
    if weight.quant_state is None:
        raise DeltaTuneError(NOT_YET)
    return weight.quant_state


def _codes_of_4_bits(weight: Any) -> Tensor:
    if getattr(_state(weight), "packing_format_for_cpu", False):
        raise DeltaTuneError(
            "bitsandbytes has packed its 4-bit weights for inference on this processor, which happens at the first call "
            "in evaluation mode, and no gradient passes them any more. Load the backbone again and attach before calling it."
        )
    return weight.data


def _of_8_bits(weight: Any, module: Any) -> Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    scale = module.state.SCB if weight.SCB is None else weight.SCB  # the first call hands the scales on
    return int8_vectorwise_dequant(_codes_of_8_bits(weight), scale)


def _codes_of_8_bits(weight: Any) -> Tensor:
    if weight.dtype != torch.int8:
        raise DeltaTuneError(NOT_YET)
    return weight.data


def _refused(new: Tensor, like: Any) -> None:
    """bitsandbytes keeps a layer's scales in several places, so new values cannot simply take the old ones' place."""
    return None


STORAGES["torchao.utils.TorchAOBaseTensor"] = Storage(
    values=lambda weight, module: weight.dequantize(),
    codes=lambda weight: getattr(weight, weight.tensor_data_names[0]),
    store=_rounded,
)
STORAGES["bitsandbytes.nn.modules.Params4bit"] = Storage(
    values=_of_4_bits,
    codes=_codes_of_4_bits,
    store=_refused,
    shape=lambda weight: tuple(_state(weight).shape),
    settings=(("support_avx512bf16_for_cpu", False),),
)
STORAGES["bitsandbytes.nn.modules.Int8Params"] = Storage(values=_of_8_bits, codes=_codes_of_8_bits, store=_refused)
