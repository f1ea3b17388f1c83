"""The text and JSON forms of deltas: they round-trip for every method, and the grammar is closed."""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

import deltatune as dt
from deltatune.core.leaf import Init
from deltatune.core.method import registry
from deltatune.core.spec import Spec, concrete, from_json, literal

dt.LoRA  # noqa: B018  (defines the methods)


def values(name: str, hint: Any) -> st.SearchStrategy[Any]:
    """Random values of a field, as its annotation says."""
    if hint in PLAIN:
        return st.sampled_from(["relu", "tanh"]) if name == "activation" else PLAIN[hint]
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return st.one_of([values(name, choice) for choice in get_args(hint)])
    if get_origin(hint) is tuple:
        item, *rest = get_args(hint)
        fixed = st.tuples(*(values(name, each) for each in (item, *rest) if each is not ...))
        return st.lists(values(name, item), max_size=3).map(tuple) if rest == [...] else fixed
    return st.sampled_from(
        [cls() for cls in concrete(hint).values() if all(f.default is not MISSING for f in fields(cls))]
    )


PLAIN = {
    int: st.integers(min_value=1, max_value=10**6),
    float: st.floats(allow_nan=False, allow_infinity=False),
    str: st.text(),
    bool: st.booleans(),
    NoneType: st.none(),
}


def built(cls: type[Any]) -> st.SearchStrategy[Any]:
    """Random values of a class, some fields left at their defaults."""
    hints, chosen = get_type_hints(cls), {}
    for field in fields(cls):
        drawn = values(field.name, hints[field.name])
        chosen[field.name] = drawn if field.default is MISSING else st.one_of(st.just(field.default), drawn)
    return st.fixed_dictionaries(chosen).map(lambda given: valid(cls, given))


def valid(cls: type[Any], given: dict[str, Any]) -> Any:
    """Build the value, or draw another one when the method refuses these fields."""
    try:
        return cls(**given)
    except dt.DeltaTuneError:
        reject()


@pytest.mark.parametrize("name", registry())
@given(st.data())
@settings(deadline=None, max_examples=8, suppress_health_check=list(HealthCheck))
def test_text_and_json_of_random_deltas_round_trip(name, data):
    method = data.draw(built(registry()[name]))
    delta = method.at(data.draw(st.text())) + data.draw(built(dt.LoRA)).at(data.draw(st.text()))
    assert dt.parse(str(delta)) == delta
    assert dt.parse(json.loads(json.dumps(delta.to_json()))) == delta
    again = dt.parse(str(delta))
    assert str(again) == str(delta)
    assert hash(again) == hash(delta)
    assert again.to_json() == delta.to_json()


@given(st.text())
@settings(deadline=None)
def test_any_text_is_a_literal_that_reads_back(text):
    assert dt.parse(f"PromptTuning(init=Text({literal(text)}))").terms[0].method.init == dt.Text(text)


def test_json_holds_the_defaults_and_text_leaves_them_out():
    assert str(dt.LoRA(rank=8)) == "LoRA()"
    assert dt.LoRA().to_json() == {"LoRA": {"rank": 8, "alpha": 16.0, "init": {"KaimingUniform": {}}}}
    assert str(dt.LoRA(rank=4).at("attn.{q,v}")) == 'LoRA(rank=4).at("attn.{q,v}")'
    assert str(dt.LoRA(rank=4).at(dt.LoRA.where)) == "LoRA(rank=4)"
    assert str(dt.Delta()) == "Delta()"
    assert dt.parse("Delta() + BitFit() + Delta()") == dt.Delta() + dt.BitFit()


@pytest.mark.parametrize(
    "text", ["LoRA(4, 8)", "LoRA(4, alpha=8)", "LoRA(alpha=8.0, rank=4)", " LoRA(rank=4,alpha=0.8e1)"]
)
def test_equal_values_read_the_same_whatever_was_written(text):
    assert str(dt.parse(text)) == str(dt.LoRA(rank=4, alpha=8).at(dt.LoRA.where)) == "LoRA(rank=4, alpha=8.0)"
    assert json.dumps(dt.parse(text).to_json()) == json.dumps(dt.LoRA(4, 8.0).at(dt.LoRA.where).to_json())


@pytest.mark.parametrize("text", ["LoRA", "LoRA()", "(LoRA())"])
def test_a_bare_name_is_the_method_with_its_defaults(text):
    assert dt.parse(text) == dt.LoRA().at(dt.LoRA.where)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Lora(8)", r"no method 'Lora'\. Did you mean 'LoRA'.*Known: A"),
        ("LoRA(rnk=8)", r"LoRA has no field 'rnk'\. Did you mean 'rank'\? Its fields: rank, alpha, init"),
        ("BitFit(3)", r"BitFit has no field '0'.*Its fields: none"),
        ("LoRA(1, 2, 3, 4)", r"LoRA takes at most 3 values; 4 are written in 'LoRA\(1, 2, 3, 4\)'"),
        ("LoRA(8, rank=4)", r"LoRA is given rank twice in 'LoRA\(8, rank=4\)'"),
        ("LoRA(rank=8, rank=4)", r"LoRA is given rank twice"),
        ("Reparam()", r"Reparam needs a value for inner"),
        ("PromptTuning(init=Text())", r"Text needs a value for text"),
        ('LoRA(rank="8")', r'LoRA needs a whole number for rank; found rank="8"'),
        ("LoRA(rank=8.5)", r"LoRA needs a whole number for rank; found rank=8\.5"),
        ("LoRA(rank=True)", r"LoRA needs a whole number for rank; found rank=True"),
        ("LoRA(rank=None)", r"LoRA needs a whole number for rank; found rank=None"),
        ("LoRA(rank=(1, 2))", r"LoRA needs a whole number for rank; found rank=\(1, 2\)"),
        ("LoRA(alpha=1e999)", r"LoRA needs a finite number for alpha; found alpha=inf"),
        ("LoRA(init=BitFit())", r"LoRA needs one of C.*Zeros for init; found init=BitFit\(\)"),
        ("Reparam(3)", r"Reparam needs one of A.*Reparam, .* for inner; found inner=3"),
        ("LoRA(rank=0)", r"LoRA\(rank=0\) has no rank; write a rank of at least 1"),
        ("Adapter(activation='rely')", r"no activation 'rely'\. Did you mean 'relu'"),
        ("Zeros()", r"there is no method 'Zeros'"),
        ("LoRA() + 3", r"'3' in 'LoRA\(\) \+ 3' is not a method"),
        ("LoRA(", r"cannot read 'LoRA\(': .*never closed at column 5"),
        ("", r"cannot read ''"),
        ("LoRA() LoRA()", r"cannot read 'LoRA\(\) LoRA\(\)'.*column"),
        ("LoRA()\x00", r"cannot read 'LoRA\(\)\\x00'.*null bytes\."),
        ("LoRA(\ud800)", r"cannot read .*not Unicode"),
        (" + ".join(["BitFit()"] * 5000), r"cannot read 'BitFit\(\) \+ .*too long or too deep"),
        ("-" * 50000 + "1", r"cannot read '-+'.*too long or too deep"),
    ],
    ids=lambda text: text[:24],
)
def test_what_cannot_be_read_is_named_with_the_nearest(text, message):
    with pytest.raises(dt.DeltaTuneError, match=message):
        dt.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        '__import__("os").mkdir({target})',
        'open({target}, "w")',
        'eval("open({target}, \\"w\\")")',
        '(lambda: open({target}, "w"))()',
        'f"{{open({target})}}"',
        'LoRA(rank=open({target}, "w"))',
        "LoRA(rank=[open(p, 'w') for p in ({target},)])",
        "LoRA(*[open({target}, 'w')])",
        "LoRA(**{{'rank': open({target}, 'w')}})",
        "LoRA(rank=(x := open({target}, 'w')))",
        "LoRA().__class__",
        "LoRA().where",
        "LoRA.at('attn.q').terms",
        "().__class__.__bases__[0].__subclasses__()",
        "LoRA(rank=1 + 1)",
        "LoRA(rank=8 if 1 else 9)",
        "LoRA() - BitFit()",
        "LoRA() and BitFit()",
        "LoRA(init={{'Normal': {{}}}})",
        "LoRA(rank=1j)",
        "LoRA(rank=...)",
        'LoRA().at(f"attn.q")',
        'LoRA().at("attn" + ".q")',
        'LoRA().at("attn.q", "attn.v")',
        'LoRA().at(where="attn.q")',
        'LoRA().at("attn.q").at("attn.v")',
        "LoRA().to_json()",
        "Spec()",
        "Method()",
        "OnLinear()",
        "DeltaTuneError()",
    ],
)
def test_the_grammar_has_no_code_in_it(text, tmp_path):
    text = text.format(target=repr(str(tmp_path / "ran")))
    with pytest.raises(dt.DeltaTuneError, match=r"is not a (value|method)|there is no (spec|method)|no field"):
        dt.parse(text)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "a delta is a list of .*found None"),
        ({}, "a delta is a list of"),
        ([3], r"a delta is a list of .*found \[3\]"),
        ([{"where": "attn.q"}], "a delta is a list of"),
        ([{"where": "attn.q", "method": {"LoRA": {}}, "more": 1}], "a delta is a list of"),
        ([{"where": 3, "method": {"LoRA": {}}}], "a where is a text such as .*found 3"),
        ([{"where": "attn.q", "method": "LoRA"}], "a method is written .*found 'LoRA'"),
        ([{"where": "attn.q", "method": {"LoRA": 3}}], "a method is written"),
        ([{"where": "attn.q", "method": {"LoRA": {}, "BitFit": {}}}], "a method is written"),
        ([{"where": "attn.q", "method": {"Lora": {}}}], "no method 'Lora'.*Did you mean 'LoRA'"),
        ([{"where": "attn.q", "method": {"Zeros": {}}}], "no method 'Zeros'"),
        ([{"where": "attn.q", "method": {"LoRA": {"rnk": 8}}}], "no field 'rnk'.*Did you mean 'rank'"),
        ([{"where": "attn.q", "method": {"LoRA": {"rank": "8"}}}], "needs a whole number for rank"),
        ([{"where": "attn.q", "method": {"LoRA": {"rank": float("nan")}}}], "needs a whole number for rank"),
        ([{"where": "attn.q", "method": {"LoRA": {"alpha": float("inf")}}}], "needs a finite number for alpha"),
        ([{"where": "attn.q", "method": {"LoRA": {"init": {"LoRA": {}}}}}], "needs one of .*Copy"),
        ([{"where": "attn.q", "method": {"LoRA": {"init": {"Norml": {}}}}}], "no spec 'Norml'.*Did you mean 'Normal'"),
    ],
)
def test_json_of_another_form_is_named(value, message):
    with pytest.raises(dt.DeltaTuneError, match=message):
        dt.parse(value)


def test_fields_of_choices_tuples_and_unions_are_checked(monkeypatch):
    monkeypatch.setattr(Spec, "known", dict(Spec.known))

    @dataclass(frozen=True)
    class Strange(Init):
        mode: Literal["fast", "slow"] = "fast"
        sizes: tuple[int, ...] = ()
        pair: tuple[int, str] = (1, "a")
        cap: float | None = None

    assert from_json(Strange("slow", (1, 2), (3, "b"), 0.5).to_json()) == Strange("slow", (1, 2), (3, "b"), 0.5)
    for field, value, message in [
        ("mode", "quick", 'needs "fast" or "slow" for mode; found mode="quick"'),
        ("sizes", [1, "x"], "sizes"),
        ("sizes", 1, "sizes"),
        ("pair", [1], "pair"),
        ("cap", "high", "needs a finite number or None for cap"),
    ]:
        with pytest.raises(dt.DeltaTuneError, match=message):
            from_json({"Strange": {field: value}})
