"""The where language: what it selects, and that every error names what was written and what to write instead."""

from __future__ import annotations

import fnmatch
import itertools
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import deltatune as dt
from deltatune.core.site import anatomy
from deltatune.core.where import expand, parse, select
from tests import tiny

dt.LoRA  # noqa: B018  (defines the anatomies)

LLAMA, T5, PLAIN = tiny.llama(), tiny.t5(), tiny.plain()


def paths(where, model=LLAMA):
    return [site.path for site in select(model, where, anatomy(model))]


def blocks(where, model=LLAMA):
    return [site.layer for site in select(model, where, anatomy(model))]


@pytest.mark.parametrize(
    ("where", "same"),
    [
        ("attn.{q,v}", ["attn.q", "attn.v"]),
        ("{attn.q,ffn.down}", ["attn.q", "ffn.down"]),
        ("{attn.{q,v},ffn.{up,down}}", ["attn.q", "attn.v", "ffn.up", "ffn.down"]),
        ("{attn.o,ffn.down}:in", ["attn.o:in", "ffn.down:in"]),
        (
            "{attn,ffn}{[0],[2:]}:{in,out}",
            [f"{r}{i}:{s}" for r in ("attn", "ffn") for i in ("[0]", "[2:]") for s in ("in", "out")],
        ),
        ("{{attn.q}}", ["attn.q"]),
        (" { attn.q , attn.v } ", ["attn.q", "attn.v"]),
        ("{attn.q,cross.q}?", ["attn.q?", "cross.q?"]),
        ("{attn.q,cross.q?}:in", ["attn.q:in", "cross.q:in?"]),
        ("ffn.{gate?,up}[1:]", ["ffn.gate[1:]?", "ffn.up[1:]"]),
        ("path:a.{b,c.*}.d", ["path:a.b.d", "path:a.c.*.d"]),
    ],
)
def test_a_set_is_the_list_of_its_members(where, same):
    assert [atom.text for atom in parse(where)] == same


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[0]", [0]),
        ("[2]", [2]),
        ("[-1]", [2]),
        ("[-3]", [0]),
        ("[1:]", [1, 2]),
        ("[:2]", [0, 1]),
        ("[-2:]", [1, 2]),
        ("[::2]", [0, 2]),
        ("[::-1]", [0, 1, 2]),
        ("[2:0:-1]", [1, 2]),
        ("[:]", [0, 1, 2]),
        ("[1:99]", [1, 2]),
    ],
)
def test_layers_are_a_python_index_or_slice_in_the_order_of_the_blocks(text, expected):
    assert blocks(f"attn.q{text}") == expected
    assert blocks(f"block{text}") == expected


def test_layers_count_within_each_stack_and_leave_out_what_is_in_no_block():
    assert paths("norm[-1]", T5) == [f"encoder.block.1.layer.{i}.layer_norm" for i in (0, 1)] + [
        f"decoder.block.1.layer.{i}.layer_norm" for i in (0, 1, 2)
    ]
    assert "encoder.final_layer_norm" in paths("norm", T5)


def test_a_stack_selects_one_tower_and_input_is_the_one_that_reads():
    both = paths("attn.q", T5)
    assert paths("encoder.attn.q", T5) + paths("decoder.attn.q", T5) == both
    assert paths("input.attn.q", T5) == paths("encoder.attn.q", T5)
    assert paths("input.attn.q") == paths("attn.q")
    assert paths("decoder.cross.{k,v}[1]", T5) == [f"decoder.block.1.layer.1.EncDecAttention.{p}" for p in "kv"]


def test_sides_are_kept_apart_and_the_output_is_the_usual_one():
    sites = select(LLAMA, "ffn.down[0]{,:in,:out}", anatomy(LLAMA))
    assert [(s.side, s.width) for s in sites] == [("out", tiny.WIDTH), ("in", tiny.FFN)]


def test_a_site_found_twice_is_one_site_in_the_order_written():
    assert paths("{attn.v,attn.{q,v},attn.v[1]}") == paths("attn.v") + paths("attn.q")


def test_what_may_be_missing_selects_nothing_and_the_rest_counts():
    assert paths("cross.q?") == []
    assert paths("{attn.q,cross.q?}") == paths("{attn.q,cross.q}?") == paths("attn.q")
    assert paths("path:nothing.here?") == []
    with pytest.raises(dt.DeltaTuneError, match=r"'cross\.q\?' of LoRA\(\) matches nothing in this llama"):
        dt.sites(LLAMA, dt.LoRA().at("cross.q?"))


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("path:blocks.*.first", ["blocks.0.first", "blocks.1.first"]),
        ("path:blocks.0.*", ["blocks.0.scale", "blocks.0.first", "blocks.0.second"]),
        ("path:blocks.1.s*", ["blocks.1.scale", "blocks.1.second"]),
        ("path:*.1", ["blocks.1"]),
        ("path:*", ["table", "blocks", "scores"]),
        ("path:**.second", ["blocks.0.second", "blocks.1.second"]),
        ("path:**.scores", ["scores"]),
        ("path:blocks.**.first", ["blocks.0.first", "blocks.1.first"]),
        ("path:**.0.**", ["blocks.0.scale", "blocks.0.first", "blocks.0.second"]),
        ("path:blocks.{0,1}.second:in", ["blocks.0.second", "blocks.1.second"]),
        ("path:scores?", ["scores"]),
    ],
)
def test_paths_are_globs_of_names(where, expected):
    assert paths(where, PLAIN) == expected


def test_two_stars_alone_are_every_module_and_no_leaf():
    model = tiny.plain()
    everything = [path for path, _ in model.named_modules()]
    with dt.attach(model, dt.LoRA().at("path:**.first")):
        assert paths("path:**", model) == everything


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            "attn.qq",
            r"no role 'attn\.qq' \(in the where 'attn\.qq'\)\. Did you mean 'attn\.q'.*Roles: embed, block.*or path:",
        ),
        ("{attn.q,fnn}", r"no role 'fnn' \(in the where '\{attn\.q,fnn\}'\)\. Did you mean 'ffn'"),
        ("decodr.attn.q", r"no role 'decodr\.attn\.q'.*Did you mean 'attn\.q'"),
        ("attn.q:up", r"no role 'attn\.q:up'.*Did you mean 'attn\.q'"),
        ("attn.q,attn.v", r"no role 'attn\.q,attn\.v'.*Did you mean"),
        ("{attn.q,}", r"no role '' \(in the where '\{attn\.q,\}'\)"),
        ("{attn.q,attn.v", r"braces in '\{attn\.q,attn\.v' do not match; write sets as \{a,b\}"),
        ("attn.q}", r"braces in 'attn\.q\}' do not match"),
        ("{attn.q}}", r"braces in '\{attn\.q\}\}' do not match"),
        ("}attn.q{", r"braces in '\}attn\.q\{' do not match"),
        ("at}tn.{q,v}", r"braces in 'at\}tn\.\{q,v\}' do not match"),
        ("attn.{q,{v}", r"braces in 'attn\.\{q,\{v\}' do not match"),
        ("attn.q[1:2:3:4]", r"\[1:2:3:4\] in 'attn\.q\[1:2:3:4\]' is not a Python index or slice; write \[3\]"),
        ("attn.q[--1]", r"\[--1\] in 'attn\.q\[--1\]' is not a Python index"),
        ("attn.q[::0]", r"\[::0\] in 'attn\.q\[::0\]' is not a Python index"),
        ("attn.q[1-2]", r"\[1-2\] in 'attn\.q\[1-2\]' is not a Python index"),
        ("attn.q[x]", r"no role 'attn\.q\[x\]'.*Did you mean 'attn\.q'"),
        ("", "a where is empty; write for example"),
        (" ", "a where is empty; write for example"),
        (
            "attn.q[3]",
            r"'attn\.q\[3\]' \(in the where 'attn\.q\[3\]'\) matches nothing in this llama: the stack has 3 layers",
        ),
        ("attn.q[-4]", r"matches nothing in this llama: the stack has 3 layers"),
        ("attn.q[5:]", r"matches nothing in this llama: the stack has 3 layers"),
        (
            "{attn.q,cross.k}",
            r"'cross\.k' \(in the where '\{attn\.q,cross\.k\}'\) matches nothing.*its roles are embed, block, attn, ",
        ),
        ("encoder.attn.q", r"'encoder\.attn\.q'.*matches nothing in this llama"),
        ("head[0]", r"'head\[0\]'.*matches nothing"),
        (
            "path:model.layer.0.mlp",
            r"no module of this llama has the path 'model\.layer\.0\.mlp'.*Did you mean 'model\.layers\.\d\.mlp'",
        ),
        (
            "path:{lm_head,lm_haed}",
            r"has the path 'lm_haed' \(in the where 'path:\{lm_head,lm_haed\}'\)\. Did you mean 'lm_head'",
        ),
        ("path:deltas.mine", r"has the path 'deltas\.mine'"),
    ],
)
def test_errors_name_what_was_written_and_what_to_write(where, message):
    with pytest.raises(dt.DeltaTuneError, match=message):
        select(LLAMA, where, anatomy(LLAMA))


def test_the_stacks_of_an_encoder_decoder_are_named_with_their_layers():
    with pytest.raises(dt.DeltaTuneError, match=r"encoder has 2 layers, decoder has 2 layers"):
        select(T5, "attn.q[2]", anatomy(T5))


def test_roles_of_an_unknown_model_are_refused_with_paths_to_write():
    with pytest.raises(
        dt.DeltaTuneError, match=r"the roles of Plain are not known; address its modules by path, e\.g\. path:table"
    ):
        select(PLAIN, "attn.q", anatomy(PLAIN))


NAMES = st.text("ab", min_size=1, max_size=2)
SETS = st.recursive(
    NAMES.map(lambda name: ("name", name)),
    lambda inner: st.lists(inner, min_size=1, max_size=3).flatmap(
        lambda items: st.sampled_from([("set", items), ("chain", items)])
    ),
    max_leaves=6,
)


def written(tree):
    kind, inner = tree
    if kind == "name":
        return inner
    pieces = map(written, inner)
    return "{" + ",".join(pieces) + "}" if kind == "set" else "".join(pieces)


def meant(tree):
    kind, inner = tree
    if kind == "name":
        return [inner]
    if kind == "set":
        return [text for item in inner for text in meant(item)]
    return ["".join(choice) for choice in itertools.product(*map(meant, inner))]


@given(SETS)
@settings(deadline=None)
def test_nested_sets_expand_to_every_choice_in_order(tree):
    assert expand(written(tree)) == meant(tree)


@given(st.text("{},ab?", max_size=8))
@settings(deadline=None)
def test_unmatched_braces_are_named_whatever_is_around_them(text):
    depths = list(itertools.accumulate((c == "{") - (c == "}") for c in text))
    if depths and (depths[-1] != 0 or min(depths) < 0):
        with pytest.raises(dt.DeltaTuneError, match=re.escape(repr(text))):
            expand(text)
    else:
        assert all("{" not in t and "}" not in t for t in expand(text))


@given(st.text("ateqnv.{},[]:0-?*", max_size=10))
@settings(deadline=None)
def test_whatever_is_written_is_selected_or_refused_with_a_cure(text):
    assume(text.strip())
    try:
        select(PLAIN, text, anatomy(PLAIN))
    except dt.DeltaTuneError as error:
        assert repr(text.strip())[1:-1] in str(error)


class Tree(nn.Module):
    """A model of nested names, for globs."""

    def __init__(self, shape):
        super().__init__()
        for name, inner in shape.items():
            self.add_module(name, Tree(inner))


SHAPES = st.recursive(st.just({}), lambda inner: st.dictionaries(NAMES, inner, max_size=3), max_leaves=6)


@given(SHAPES, st.lists(st.one_of(NAMES, st.sampled_from(["*", "a*", "*b", "**"])), min_size=1, max_size=3))
@settings(deadline=None)
def test_a_star_is_within_one_name_and_two_are_any_number_of_names(shape, pieces):
    assume(pieces[-1] != "**")
    model = Tree(shape)

    def matches(names, pattern):
        if not pattern:
            return not names
        if pattern[0] == "**":
            return any(matches(names[i:], pattern[1:]) for i in range(len(names) + 1))
        return bool(names) and fnmatch.fnmatchcase(names[0], pattern[0]) and matches(names[1:], pattern[1:])

    everything = [path for path, _ in model.named_modules()][1:]
    expected = [path for path in everything if matches(path.split("."), pieces)]
    assert paths(f"path:{'.'.join(pieces)}?", model) == expected
