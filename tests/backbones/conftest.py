"""Fixtures for real model folders, made from tiny models and a word tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from deltatune.backbones import source
from tests import tiny
from tests.backbones.folders import Save


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a word tokenizer of 64 pieces: <pad> 0, <s> 1, </s> 2, <mask> 3, w4 ... w63."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<mask>"]
    table = {word: index for index, word in enumerate([*special, *(f"w{i}" for i in range(4, tiny.VOCABULARY))])}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="w4"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("words")
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    return folder


@pytest.fixture
def save(tmp_path: Path, words: Path, monkeypatch: pytest.MonkeyPatch) -> Save:
    """Save a model with the word tokenizer under tmp_path, which is the only place where names are looked up."""
    monkeypatch.setattr(source, "BUILTIN", tmp_path / "none")
    monkeypatch.setenv("DELTATUNE_MODELS", str(tmp_path))

    def save(name: str, model: Any) -> Path:
        shutil.copytree(words, tmp_path / name)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save
