"""P-tuning v2: prefixes at every layer without a network behind them, and a trained head (Liu et al., 2022, arXiv:2110.07602).

    head_i = softmax(q [K_P; K]^T / sqrt(d_h)) [V_P; V] at every attention        theta'_head = value

Parameters: 2 length d_kv an attention, and those of the head. It is a preset: prefix tuning at every attention is deep
prompt tuning. A head is trained where the task brings one of its own (a classifier); a language-model head, which is often
tied to the embeddings, stays as it is.
"""

from __future__ import annotations

from deltatune.core.delta import Delta, parse
from deltatune.core.spec import literal


def p_tuning_v2(length: int = 20, head: str = "") -> Delta:
    """A prefix at every attention and, with `head="head"` or another where, fine-tuning of what is there (Liu et al., 2022)."""
    prefix = f"PrefixTuning(length={length})"
    return parse(f"{prefix} + Full().at({literal(head)})" if head else prefix)
