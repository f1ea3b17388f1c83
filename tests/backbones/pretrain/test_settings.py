"""Settings files: the committed one is read, and every mistake is named."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from deltatune.backbones.pretrain.model import learning_rate
from deltatune.backbones.pretrain.settings import TrainSettings, parse_settings, read_settings
from deltatune.errors import DeltaTuneError

STUDIES = Path(__file__).resolve().parents[3] / "studies" / "pretrain"


def test_committed_settings_are_valid_and_survive_json() -> None:
    settings = read_settings(STUDIES / "pebble.toml")
    assert settings.name == "pebble"
    assert parse_settings(settings.to_json()) == settings


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "there is no name"),
        ({"name": "x", "modle": {}}, "unknown key modle. Did you mean 'model'"),
        ({"name": "x", "train": {"stesp": 3}}, "unknown key train.stesp. Did you mean 'steps'"),
        ({"name": "x", "train": {"steps": "many"}}, "train.steps is 'many', a str; write a value of type int"),
        ({"name": "x", "train": {"steps": True}}, "train.steps is True"),
        ({"name": "x", "train": 3}, r"train is 3; write a table, \[train\]"),
        ({"name": "x", "train": {"optimizer": "adam"}}, "train.optimizer is 'adam'. Did you mean 'adamw'"),
        ({"name": "x", "objective": {"name": "next"}}, "Write one of 'next-token', 'span-corruption'"),
        ({"name": "x", "model": {"heads": 5}}, "model.width must be a multiple of model.heads"),
        ({"name": "x", "tokenizer": {"size": 70000}}, "65536"),
        ({"name": "x", "texts": {"books": {"repeats": 2}}}, "unknown key texts.books.repeats. Did you mean 'repeat'"),
    ],
)
def test_mistakes_are_named(content: dict, message: str) -> None:
    with pytest.raises(DeltaTuneError, match=message):
        parse_settings(content)


def test_bad_toml_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text('name = "x"\nsteps = = 3\n')
    with pytest.raises(DeltaTuneError, match="line 2"):
        read_settings(tmp_path / "bad.toml")
    with pytest.raises(DeltaTuneError, match="there is no settings file"):
        read_settings(tmp_path / "absent.toml")


def test_schedule_warms_up_holds_and_decays() -> None:
    train = TrainSettings(steps=100, warmup=10, decay=0.3, lr=1.0, final=0.1)
    rates = [learning_rate(step, train) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    assert rates[10:71] == pytest.approx([1.0] * 61)
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[70:]))
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
