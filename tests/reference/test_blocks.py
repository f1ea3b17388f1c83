"""C3A, RoAd, MiSS, Bat and GraLoRA against peft's with the same tensors: outputs, gradients, merged weight, count."""

from __future__ import annotations

import pytest

import deltatune as dt
from deltatune.methods.reparameterization.bat import Bat
from deltatune.methods.reparameterization.c3a import C3A
from deltatune.methods.reparameterization.gralora import GraLoRA
from deltatune.methods.reparameterization.miss import MiSS, bone
from deltatune.methods.reparameterization.road import RoAd
from tests.reference.one_linear import check_peft, layer


@pytest.mark.parametrize("block", [1, 4, 8])
def test_c3a_equals_peft_with_the_same_tensors(block):
    from peft import C3AConfig

    check_peft(C3A(block), C3AConfig(block_size=block, target_modules=["only"]), {"w": "c3a_kernel.default"})


@pytest.mark.parametrize("variant", [1, 2, 4])
def test_road_equals_peft_with_the_same_tensors(variant):
    from peft import RoadConfig

    config = RoadConfig(variant=f"road_{variant}", group_size=8, target_modules=["only"])
    check_peft(RoAd(variant, group=8), config, {"angle": "road_theta.default", "scale": "road_alpha.default"})


@pytest.mark.parametrize("rank", [6, 7])  # 7 does not divide the input's width
def test_miss_equals_peft_with_the_same_tensors(rank):
    from peft import MissConfig

    check_peft(MiSS(rank), MissConfig(r=rank, target_modules=["only"]), {"M": "miss_block.default"})


def test_miss_with_few_columns_equals_the_mini_form_of_peft():
    from peft import MissConfig

    config = MissConfig(r=6, mini_r=10, init_weights="mini", target_modules=["only"])
    check_peft(MiSS(6, columns=10), config, {"M": "miss_block.default"})


def test_bat_equals_the_affine_form_of_peft():
    from peft import MissConfig

    check_peft(Bat(8), MissConfig(r=8, init_weights="bat", target_modules=["only"]), {"M": "miss_block.default"})


def test_bone_is_miss():
    assert bone(32) == MiSS(32).at(MiSS.where)


@pytest.mark.parametrize(("rank", "grid"), [(6, 1), (6, 2), (8, 4)])
def test_gralora_equals_peft_with_the_same_tensors(rank, grid):
    from peft import GraloraConfig

    config = GraloraConfig(r=rank, alpha=5, gralora_k=grid, target_modules=["only"])
    targets = {name: (f"gralora_{name}.default", lambda tensor: tensor.mT) for name in "AB"}
    check_peft(GraLoRA(rank, alpha=5.0, grid=grid), config, targets)


@pytest.mark.parametrize(
    ("method", "count"),
    [
        (C3A(8), 24 * 40 // 8),
        (RoAd(1, 8), 40),
        (RoAd(2, 8), 80),
        (RoAd(4, 8), 160),
        (MiSS(6), 6 * 40),
        (MiSS(6, 10), 6 * 10),
        (Bat(8), 40 * 8),
        (GraLoRA(8), 8 * (24 + 40)),
    ],
    ids=str,
)
def test_the_count_is_the_formulas(method, count):
    assert dt.sites(layer(), method.at("path:only")).parameters == count


@pytest.mark.parametrize(
    ("method", "fields", "words"),
    [
        (C3A, {"block": 5}, r"width 24 of 'only'; write block=4 or 6"),
        (C3A, {"block": 256}, r"width 24 of 'only'; write block=24\."),
        (C3A, {"block": 0}, "block=1 or more"),
        (RoAd, {"group": 64}, r"width 40 of 'only'; write group=40\."),
        (RoAd, {"group": 5}, "even group"),
        (RoAd, {"variant": 3}, "variant=1, 2 or 4"),
        (MiSS, {"rank": 25}, "width 24"),
        (MiSS, {"rank": 4, "columns": 7}, r"width 40 of 'only'; write columns=5 or 8"),
        (Bat, {"block": 64}, r"width 24 of 'only'; write block=24\."),
        (GraLoRA, {"rank": 5}, "a rank that 2 divides"),
        (GraLoRA, {"rank": 10, "grid": 5}, r"width 24 of 'only'; write grid=4 or 6"),
        (GraLoRA, {"rank": 32}, "40 x 24; write a rank of at most 24"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(method, fields, words):
    with pytest.raises(dt.DeltaTuneError, match=words):
        dt.sites(layer(), method(**fields).at("path:only"))
