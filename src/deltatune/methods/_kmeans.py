"""k-means: rows in groups around their means (Lloyd, 1982), the same at every call, and those that scikit-learn finds.

That is `KMeans(groups, init="random", n_init=1, max_iter=steps, random_state=SEED)`: peft groups the rows of AdaMSS so,
and keeps no group in its files.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

SEED = 123456789
CLOSE = 1e-4  # centres that move by less than this share of the rows' variance have come to rest


def cluster(rows: Tensor, groups: int, steps: int = 10) -> Tensor:
    """Return the group of each row, int64 [rows], after at most `steps` steps from `groups` of the rows chosen at random."""
    rest = CLOSE * rows.var(0, correction=0).mean()
    rows = rows - rows.mean(0)
    centres, group = rows[chosen(len(rows), groups)], None
    for _ in range(steps):
        before, group = group, _nearest(rows, centres)
        if before is not None and torch.equal(group, before):
            return group
        moved = _means(rows, centres, group)
        still, centres = (moved - centres).square().sum() <= rest, moved
        if still:
            break
    return _nearest(rows, centres)


def chosen(count: int, size: int) -> list[int]:
    """Return `size` different whole numbers below `count`, as numpy's `RandomState(SEED).choice` draws them with weights."""
    state = [SEED]
    for i in range(1, 624):  # the Mersenne twister from one number; Python's own seeding mixes it further
        state.append((1812433253 * (state[-1] ^ (state[-1] >> 30)) + i) & 0xFFFFFFFF)
    twister = random.Random()
    twister.setstate((3, (*state, 624), None))
    found: dict[int, None] = {}
    while len(found) < size:
        left = [i for i in range(count) if i not in found]
        found |= dict.fromkeys([left[int(twister.random() * len(left))] for _ in range(size - len(found))])
    return list(found)


def _nearest(rows: Tensor, centres: Tensor) -> Tensor:
    """Return the number of the centre that each row is nearest to, the first of several."""
    return (centres.square().sum(1) - 2 * rows @ centres.mT).argmin(1)


def _means(rows: Tensor, centres: Tensor, group: Tensor) -> Tensor:
    """Return the means of the groups; a group without rows gets the row that is farthest from the centre of its own."""
    sums, count = torch.zeros_like(centres).index_add(0, group, rows), group.bincount(minlength=len(centres))
    empty = torch.where(count == 0)[0]
    far = (rows - centres[group]).square().sum(1).topk(len(empty)).indices
    for new, row in zip(empty.tolist(), far.tolist(), strict=True):
        sums[group[row]] -= rows[row]
        sums[new] = rows[row]
        count[group[row]] -= 1
        count[new] = 1
    return sums / count.clamp(min=1)[:, None]
