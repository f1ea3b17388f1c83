"""Texts become tokens and tokens become windows: nothing is lost, nothing held out is trained on."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from tokenizers import Tokenizer

from deltatune.backbones.pretrain.corpus import (
    TokenFile,
    all_documents,
    check_names,
    documents,
    find_texts,
    tokenize,
)
from deltatune.backbones.pretrain.mixture import Mixture
from deltatune.backbones.pretrain.settings import Settings, TextSettings
from deltatune.backbones.pretrain.tokenizer import load_or_train, token_bytes
from deltatune.errors import DeltaTuneError

Tiny = Callable[..., Settings]


class Prepared(NamedTuple):
    """The made-up texts as tokens."""

    tokenizer: Tokenizer
    files: list[TokenFile]
    folder: Path
    settings: Settings


@pytest.fixture(scope="module")
def prepared(texts: Path, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    settings, out = tiny(), tmp_path_factory.mktemp("tokens")
    found = find_texts(texts)
    tokenizer = load_or_train(out / "tokenizer.json", all_documents(texts, found, settings), settings)
    return Prepared(tokenizer, tokenize(texts, found, tokenizer, settings, out), out, settings)


def test_tokens_decode_to_the_documents(prepared: Prepared, texts: Path) -> None:
    tokenizer, files, out, settings = prepared
    for text in find_texts(texts):
        ids = np.concatenate([file.open(out) for file in files if file.text == text.name])
        decoded = tokenizer.decode(ids.tolist(), skip_special_tokens=False).split("<eos>")
        assert decoded.pop() == ""
        assert Counter(decoded) == Counter(documents(texts, text, settings.text(text.name)))


def test_held_out_documents_are_not_trained_on(prepared: Prepared) -> None:
    tokenizer, files, out, _ = prepared
    texts_of = {
        split: {
            document
            for file in files
            if file.split == split
            for document in tokenizer.decode(file.open(out).tolist(), skip_special_tokens=False).split("<eos>")[:-1]
        }
        for split in ("train", "held-out")
    }
    assert len(texts_of["held-out"]) == 12
    assert not texts_of["train"] & texts_of["held-out"]


def test_any_string_survives_and_bytes_are_counted(prepared: Prepared) -> None:
    tokenizer, _, _, settings = prepared
    lengths = token_bytes(tokenizer, settings)
    for text in ("the cat 7", "Ünïcode ☂ 漢字\n\ttabs", "  two  spaces "):
        encoding = tokenizer.encode(text)
        assert encoding.tokens[0] == "<bos>"
        assert tokenizer.decode(encoding.ids) == text
        assert lengths[encoding.ids].sum() == len(text.encode())


def test_one_pass_reads_each_window_as_often_as_asked(prepared: Prepared) -> None:
    _, files, out, settings = prepared
    mixed = Settings("x", texts={"notes": TextSettings(repeat=2.5)})
    once, more = Mixture(out, files, "train", 16, settings), Mixture(out, files, "train", 16, mixed)
    windows, names = once.read(0, once.rows)
    counted = Counter(names)
    assert len({window.tobytes() for window in windows}) == once.rows
    repeated = Counter(more.read(0, more.rows)[1])
    assert repeated["stories"] == counted["stories"]
    assert repeated["notes"] == round(2.5 * counted["notes"])


def test_reading_is_a_function_of_the_position(prepared: Prepared) -> None:
    _, files, out, settings = prepared
    mixture = Mixture(out, files, "train", 16, settings)
    start = mixture.rows - 3
    whole = mixture.read(start, 8)[0]
    parts = np.concatenate([mixture.read(start + index, 1)[0] for index in range(8)])
    assert np.array_equal(whole, parts)
    assert not np.array_equal(mixture.read(0, mixture.rows)[0], mixture.read(mixture.rows, mixture.rows)[0])


def test_index_is_read_and_a_changed_text_is_refused(tmp_path: Path, tiny: Tiny) -> None:
    raw = b"one\n\ntwo"
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(raw))
    entry = {
        "file": "a.txt.gz",
        "origin": "me",
        "licence": "CC0",
        "sha256_uncompressed": hashlib.sha256(raw).hexdigest(),
    }
    (tmp_path / "index.json").write_text(json.dumps([entry]))
    [text] = find_texts(tmp_path)
    assert (text.origin, text.licence) == ("me", "CC0")
    assert documents(tmp_path, text, TextSettings()) == ["one", "two"]
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(raw + b"!"))
    with pytest.raises(DeltaTuneError, match="is not the text that the index describes"):
        documents(tmp_path, text, TextSettings())
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(raw)[:12])
    with pytest.raises(DeltaTuneError, match="cannot read the text"):
        documents(tmp_path, text, TextSettings())
    with pytest.raises(DeltaTuneError, match=r"\[texts.aa\]: no such text. Did you mean 'a'"):
        check_names([text], tiny(texts={"aa": {"repeat": 2.0}}))


def test_unusable_folders(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text('[{"file": "a.txt"}]')
    with pytest.raises(DeltaTuneError, match="each entry needs file, origin, licence"):
        find_texts(tmp_path)
    (tmp_path / "index.json").unlink()
    with pytest.raises(DeltaTuneError, match=r"holds no .txt or .txt.gz file"):
        find_texts(tmp_path)
    with pytest.raises(DeltaTuneError, match="there is no folder of texts"):
        find_texts(tmp_path / "absent")


def test_texts_too_short_for_a_window(prepared: Prepared) -> None:
    _, files, out, settings = prepared
    short = [TokenFile(file.text, file.split, file.file, 5, 1) for file in files]
    with pytest.raises(DeltaTuneError, match="shorter than one window"):
        Mixture(out, short, "train", 16, settings)
