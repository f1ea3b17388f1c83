"""What each linear module of an unknown transformer block is for, from its name, its widths and its neighbours."""

from __future__ import annotations

import re
from dataclasses import dataclass

from deltatune.backbones.anatomies import Packed
from deltatune.core.site import Heads, Part

NAMES: dict[str, frozenset[str]] = {
    "q": frozenset({"q_proj", "query", "q", "q_lin", "wq", "query_proj", "q_attn"}),
    "k": frozenset({"k_proj", "key", "k", "k_lin", "wk", "key_proj"}),
    "v": frozenset({"v_proj", "value", "v", "v_lin", "wv", "value_proj"}),
    "o": frozenset({"o_proj", "out_proj", "o", "out_lin", "wo", "dense", "c_proj"}),
    "gate": frozenset({"gate_proj", "wi_0", "gate", "w1"}),
    "up": frozenset({"up_proj", "wi_1", "wi", "w3", "fc1", "lin1", "c_fc", "intermediate.dense"}),
    "down": frozenset({"down_proj", "wo", "w2", "fc2", "lin2", "c_proj", "output.dense"}),
}
CROSS = re.compile(r"cross|enc_?dec|encoder_attn", re.IGNORECASE)
# The packings that are the same in every transformers model that uses the name, when heads and key/value heads agree:
# `c_attn` as a Conv1D and `Wqkv` lay q, k and v one after the other, `query_key_value` does so within each head.
PACKED = {"c_attn": False, "Wqkv": False, "query_key_value": True}
UNKNOWN_PACKINGS = frozenset({"qkv_proj", "qkv"})

Found = tuple[str, str, Part | None]


@dataclass(frozen=True)
class Linear:
    """A linear module of a block: its path in the block, its widths and whether its weight is [d_in, d_out]."""

    path: str
    d_in: int
    d_out: int
    transposed: bool = False

    @property
    def name(self) -> str:
        """The last piece of the path."""
        return self.path.rpartition(".")[2]

    @property
    def parent(self) -> str:
        """The path of the module that holds it."""
        return self.path.rpartition(".")[0]

    def called(self, what: str) -> bool:
        """Whether the path ends in a usual name of `what`."""
        return any(f".{self.path}".endswith(f".{name}") for name in NAMES[what])


def attentions(linears: list[Linear], cross: bool) -> list[str]:
    """Return the paths of the self (or cross) attention modules: those that hold q, or q, k and v together."""
    parents = [m.parent for m in linears if m.called("q") or m.name in PACKED or m.name in UNKNOWN_PACKINGS]
    return [p for p in dict.fromkeys(parents) if p and bool(CROSS.search(p)) is cross]


def block_roles(linears: list[Linear], width: int, heads: Heads | None) -> list[Found]:
    """Return (role, path, part) for every linear module, attention and feed-forward module that is recognised."""
    found: list[Found] = []
    for name, cross in (("attn", False), ("cross", True)):
        parents = attentions(linears, cross)
        if len(parents) == 1:
            found += _attention(linears, name, parents[0], width, heads)
    attention = tuple(f"{parent}." for cross in (False, True) for parent in attentions(linears, cross))
    used = {path for _, path, _ in found}
    rest = [m for m in linears if m.path not in used and not m.path.startswith(attention)]
    return found + _feed_forward(rest, linears, width)


def _attention(linears: list[Linear], role: str, parent: str, width: int, heads: Heads | None) -> list[Found]:
    inside = [m for m in linears if m.path.startswith(f"{parent}.")]
    own = [m for m in inside if m.parent == parent]
    found: list[Found] = [(role, parent, None)]
    for what in "qkv":
        named = [m for m in own if m.called(what)]
        found += [(f"{role}.{what}", named[0].path, None)] if len(named) == 1 else _piece(own, role, what, heads)
    taken = {path for _, path, _ in found}
    rows = heads.query * heads.width if heads else width
    beside = [
        m for m in linears if _grandparent(parent) and m.path.startswith(f"{_grandparent(parent)}.") and m not in inside
    ]
    for near in (own, beside):
        fit = [m for m in near if m.path not in taken and (m.d_in, m.d_out) == (rows, width)]
        outputs = fit if len(fit) == 1 else [m for m in fit if m.called("o")]
        if len(outputs) == 1:
            return [*found, (f"{role}.o", outputs[0].path, None)]
    return found


def _grandparent(path: str) -> str:
    return path.rpartition(".")[0]


def _piece(own: list[Linear], role: str, what: str, heads: Heads | None) -> list[Found]:
    packed = [m for m in own if m.name in PACKED and m.transposed is (m.name == "c_attn")]
    if role != "attn" or len(packed) != 1 or heads is None:
        return []
    module, by_head = packed[0], PACKED[packed[0].name]
    agrees = module.d_out == (heads.query + 2 * heads.key) * heads.width and (not by_head or heads.key == heads.query)
    if not agrees:
        return []
    return [(f"{role}.{what}", module.path, Packed(module.path, "q k v", what, by_head).part(module.d_out, heads))]


def _feed_forward(linears: list[Linear], block: list[Linear], width: int) -> list[Found]:
    # more than three are a mixture of experts or something else with a router
    downs = _downs(linears, width) if len(linears) in (2, 3) else []
    if len(downs) != 1:
        return []
    down = downs[0]
    found: list[Found] = [("ffn.down", down.path, None)]
    if down.parent and [m for m in block if m.path.startswith(f"{down.parent}.")] == linears:
        found.append(("ffn", down.parent, None))
    ups = [m for m in linears if m is not down and (m.d_in, m.d_out) == (width, down.d_in)]
    gates = [m for m in ups if m.called("gate")]
    if len(linears) == 3 and len(ups) == 2 and len(gates) == 1:
        up = next(m for m in ups if m is not gates[0])
        found += [("ffn.gate", gates[0].path, None)] + ([("ffn.up", up.path, None)] if up.called("up") else [])
    if len(linears) == 2 and len(ups) == 1:
        found.append(("ffn.up", ups[0].path, None))
    return found


def _downs(linears: list[Linear], width: int) -> list[Linear]:
    outputs = [m for m in linears if m.d_out == width]
    clear = [m for m in outputs if m.d_in != width]
    return clear if len(clear) == 1 else [m for m in outputs if m.called("down")]
