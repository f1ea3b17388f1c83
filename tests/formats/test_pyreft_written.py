"""Folders of pyreft, written: they hold its tensors and types, and read as the same function."""

from __future__ import annotations

import pytest
import torch

import deltatune as dt
from deltatune import formats
from tests.formats.small import BUILDS, bert, scores
from tests.laws.cases import busy

UNIT = {"weight": (2, 16), "bias": (2,), "rotate_layer": (16, 2)}
SIZES = {"embed_dim": (), "interchange_dim": ()}
BASES = SIZES | {"learned_source.weight": (2, 16), "learned_source.bias": (2,), "proj_layer.weight": (2, 16)}
KINDS = {"LoReFT": ("LoreftIntervention", UNIT), "NoReFT": ("NoreftIntervention", BASES)}
KINDS["DiReFT"] = ("NodireftIntervention", BASES)
CASES = {
    ("bert", "f2+l1"): "AtPositions({}(rank=2), first=2, last=1)",
    ("bert", "f1+l2"): "AtPositions({0}(rank=2), last=2) + AtPositions({0}(rank=2), first=1)",
    ("llama", "f3"): 'AtPositions({}(rank=2), first=3).at("block[1]:out")',
}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_what_is_written_reads_as_the_same_function(case, kind, tmp_path):
    build, (theirs, shapes) = BUILDS[case[0]], KINDS[kind]
    model = build()
    weights = busy(dt.init(dt.parse(CASES[case].format(kind)), model), size=0.3)
    bare = scores(model)
    with dt.attach(model, weights):
        expected = scores(model)
    formats.write("pyreft", model, weights, tmp_path / "out")
    with dt.attach(model, formats.read_pyreft(model, tmp_path / "out", positions=case[1])):
        torch.testing.assert_close(scores(model), expected, rtol=0, atol=1e-6)
    assert (expected - bare).abs().max() > 1e-3
    files = sorted((tmp_path / "out").glob("*.bin"))
    layers, units = ([1] if case[0] == "llama" else [0, 1]), ([0, 1] if "+ At" in CASES[case] else [0])
    at = "layer_{}_comp_block_output" if case[0] == "llama" else "comp_bert_encoder_layer[{}]_output"
    names = [f"intkey_{at.format(n)}_unit_pos_nunit_1#{k}.bin" for n in layers for k in units]
    assert [file.name for file in files] == names
    for file in files:
        assert {n: tuple(t.shape) for n, t in torch.load(file, weights_only=True).items()} == shapes
    assert f"pyreft.interventions.{theirs}" in (tmp_path / "out" / "config.json").read_text()


REFUSED = {
    "method": ("bert", "LoRA(rank=2)", "this delta has LoRA"),
    "everywhere": ("bert", "LoReFT(rank=2)", r"write for example AtPositions\(LoReFT\(\), first=4\)"),
    "kinds": (
        "bert",
        "AtPositions(LoReFT(rank=2), first=1) + AtPositions(NoReFT(rank=2), last=1)",
        "has one kind of ReFT",
    ),
    "spans": (
        "bert",
        'AtPositions(LoReFT(rank=2), first=1).at("block[0]:out") + AtPositions(LoReFT(rank=2), first=2).at("block[1]:out")',
        "one intervention for both ends",
    ),
    "place": ("bert", 'AtPositions(LoReFT(rank=2), first=1).at("ffn.down:out")', "behind the blocks of a single stack"),
    "stacks": ("t5", 'AtPositions(LoReFT(rank=2), first=1).at("encoder.block:out")', "of a single stack"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_pyreft_cannot_say_is_refused_and_nothing_written(case, tmp_path):
    name, text, words = REFUSED[case]
    model = BUILDS[name]()
    with pytest.raises(dt.DeltaTuneError, match=words):
        formats.write_pyreft(model, dt.init(dt.parse(text), model), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_with_files_in_it_is_left_alone(tmp_path):
    model = bert()
    weights = dt.init(dt.parse("AtPositions(LoReFT(rank=2), first=1)"), model)
    (tmp_path / "intkey_layer_9.bin").touch()
    with pytest.raises(dt.DeltaTuneError, match="is there already"):
        formats.write_pyreft(model, weights, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["intkey_layer_9.bin"]
