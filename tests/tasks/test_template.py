"""Templates: what is rendered, what a label becomes, and how a template fits each kind of backbone."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltatune.errors import DeltaTuneError
from deltatune.tasks import Example, Prompt, Template, task

REVIEW = Example("1", "a fine film", "positive", ("positive",))
CHOICE = Example("2", "Who barks?\n(A) the dog\n(B) the cat", "B", ("B",), ("the dog", "the cat"))


def test_the_default_shows_the_input_and_asks_for_the_answer() -> None:
    assert Template().render(REVIEW) == Prompt("a fine film\nanswer:", "positive")


def test_words_stand_for_labels() -> None:
    template = Template("{input} It was {mask}.", {"positive": "great"})
    assert template.render(REVIEW) == Prompt("a fine film It was {mask}.", "great", 19)
    assert template.verbalize("negative") == "negative"


def test_the_definition_is_there_when_asked_for() -> None:
    assert Template("{definition}\n{input}").render(REVIEW, "Judge it.").text == "Judge it.\na fine film"


def test_options_are_answered_by_letter_or_by_text() -> None:
    assert Template().render(CHOICE).target == "B"
    by_text = Template("{question}\nanswer:", choice="text")
    assert by_text.render(CHOICE) == Prompt("Who barks?\nanswer:", "the cat")
    assert [by_text.verbalize(letter, CHOICE) for letter in "AB"] == ["the dog", "the cat"]


def test_an_example_without_an_answer_can_be_rendered() -> None:
    assert Template("{question}", choice="text").render(replace(CHOICE, target="")).text == "Who barks?"


def test_the_candidates_of_a_task_map_back_to_targets() -> None:
    series = task("series")
    for example in series.split("dev"):
        candidates, texts = series.candidates(example), series.texts(example)
        assert candidates == ["A", "B", "C", "D"]
        assert texts == list(example.options)
        assert candidates[texts.index(series.prompt(example).target)] == example.target
        assert not re.search(r"\(A\)", series.prompt(example).text)
    assert task("sentiment").texts(REVIEW) == ["bad", "good"]
    assert task("gist").candidates(REVIEW) == []


@given(st.text(min_size=1).filter(str.strip))
def test_braces_in_the_input_are_left_alone(text: str) -> None:
    prompt = Template("Read: {input} It was {mask}.").render(replace(REVIEW, input=text))
    assert prompt.text == f"Read: {text} It was {{mask}}."
    assert prompt.slot is not None
    assert prompt.text[: prompt.slot] == f"Read: {text} It was "


def test_a_template_fits_each_kind_of_backbone() -> None:
    with_slot = Template("{input} It was {mask}.")
    assert with_slot.fit("masked") == with_slot
    assert with_slot.fit("causal").text == with_slot.fit("seq2seq").text == "{input} It was"
    assert Template().fit("masked").text == "{input}\nanswer: {mask}"
    assert Template().fit("masked").fit("causal") == Template()
    with pytest.raises(DeltaTuneError, match="asks for the answer before it shows the example"):
        Template("{mask}? {input}").fit("causal")


@pytest.mark.parametrize("name", ["sentiment", "series", "question"])
def test_templates_survive_json(name: str) -> None:
    template = task(name).template
    assert Template.from_json(template.to_json()) == template


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"text": "{inptu}"}, "unknown placeholder {inptu}.*Did you mean 'input'"),
        ({"text": "answer:"}, "shows no example"),
        ({"text": "{input} {mask} {mask}"}, "2 {mask} slots"),
        ({"choice": "txt"}, "choice 'txt' is unknown"),
        ({"txet": "{input}"}, "unknown template key 'txet'.*Did you mean 'text'"),
        ({"words": {"yes": 1}}, "'words' is"),
        ({"text": 3}, "'text' is 3"),
        ("{input}", "a template is an object"),
    ],
)
def test_bad_templates_are_refused(data: object, said: str) -> None:
    with pytest.raises(DeltaTuneError, match=said.replace("{", r"\{")):
        Template.from_json(data)
