"""The texts of a folder: their origins, their documents, and their tokens as memory-mapped uint16 files."""

from __future__ import annotations

import gzip
import hashlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deltatune.backbones.pretrain.settings import Settings, TextSettings
from deltatune.backbones.pretrain.tokenizer import EOS
from deltatune.errors import DeltaTuneError, nearest
from deltatune.files import read_json, write_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPLITS = ("train", "held-out")


@dataclass(frozen=True)
class Text:
    """One text file with where it comes from and what may be done with it."""

    name: str
    file: str
    origin: str = "not stated"
    licence: str = "not stated"
    sha256: str = ""


@dataclass(frozen=True)
class TokenFile:
    """Tokens of one text and split: a flat uint16 file of documents, each ended by `<eos>`."""

    text: str
    split: str
    file: str
    tokens: int
    documents: int

    def open(self, folder: Path) -> np.ndarray:
        """Map the file: uint16 [tokens], read from disk as it is used."""
        return np.memmap(folder / self.file, dtype=np.uint16, mode="r", shape=(self.tokens,))


def find_texts(folder: Path) -> list[Text]:
    """The texts that `index.json` lists, or else every `.txt` and `.txt.gz` file of the folder, sorted by name."""
    if not folder.is_dir():
        raise DeltaTuneError(f"there is no folder of texts {folder}; give --text a folder of .txt or .txt.gz files.")
    if (folder / "index.json").exists():
        texts = [_indexed(folder, entry) for entry in read_json(folder / "index.json")]
    else:
        names = [path.name for path in folder.iterdir() if path.name.endswith((".txt", ".txt.gz"))]
        texts = [Text(_stem(name), name) for name in names]
    if not texts:
        raise DeltaTuneError(f"{folder} holds no .txt or .txt.gz file; put at least one text there.")
    return sorted(texts, key=lambda text: text.name)


def _indexed(folder: Path, entry: dict[str, str]) -> Text:
    try:
        file, origin, licence, digest = (entry[key] for key in ("file", "origin", "licence", "sha256_uncompressed"))
    except (KeyError, TypeError):
        raise DeltaTuneError(
            f"{folder / 'index.json'} has {entry!r}; each entry needs file, origin, licence and sha256_uncompressed."
        ) from None
    return Text(_stem(file), file, origin, licence, digest)


def check_names(texts: list[Text], settings: Settings) -> None:
    """Raise `DeltaTuneError` when the settings speak of a text that the folder does not have."""
    names = [text.name for text in texts]
    for name in settings.texts:
        if name not in names:
            known = ", ".join(names)
            raise DeltaTuneError(f"[texts.{name}]: no such text.{nearest(name, names)} The folder has {known}.")


def documents(folder: Path, text: Text, how: TextSettings) -> list[str]:
    """The documents of one text; raises `DeltaTuneError` when the file is absent, damaged, or not the one indexed."""
    path = folder / text.file
    try:
        raw = gzip.decompress(path.read_bytes()) if text.file.endswith(".gz") else path.read_bytes()
        content = raw.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DeltaTuneError(f"cannot read the text {path}: {error}.") from error
    if text.sha256 and hashlib.sha256(raw).hexdigest() != text.sha256:
        raise DeltaTuneError(f"{path} is not the text that the index describes (sha256 differs); fetch it again.")
    parts = content.split("\n" if how.document == "line" else "\n\n")
    return [part.strip() for part in parts if part.strip()]


def all_documents(folder: Path, texts: list[Text], settings: Settings) -> Iterator[str]:
    """Every document of every text, for the tokenizer's training."""
    for text in texts:
        yield from documents(folder, text, settings.text(text.name))


def tokenize(folder: Path, texts: list[Text], tokenizer: Tokenizer, settings: Settings, out: Path) -> list[TokenFile]:
    """Write (once) the tokens of every text, documents shuffled, a share of them held out; `corpus.json` comes last."""
    record = out / "corpus.json"
    if record.exists():
        return [TokenFile(**entry) for entry in read_json(record)["files"]]
    files = []
    for index, text in enumerate(texts):
        parts = documents(folder, text, settings.text(text.name))
        order = np.random.default_rng([settings.seed, index]).permutation(len(parts))
        held = max(1, round(len(parts) * settings.train.held_out))
        if len(parts) < 2:
            raise DeltaTuneError(
                f"{text.file} is one document; put blank lines between documents so that one can be held out."
            )
        for split, chosen in zip(SPLITS, (order[held:], order[:held]), strict=True):
            name = f"{text.name}.{split}.uint16"
            count = _write_tokens(out / name, tokenizer, [parts[i] for i in chosen])
            files.append(TokenFile(text.name, split, name, count, len(chosen)))
    write_json(record, {"texts": [asdict(text) for text in texts], "files": [asdict(file) for file in files]})
    return files


def _write_tokens(path: Path, tokenizer: Tokenizer, parts: list[str]) -> int:
    end = tokenizer.token_to_id(EOS)
    count = 0
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    with os.fdopen(descriptor, "wb") as file:
        for start in range(0, len(parts), 256):
            for encoding in tokenizer.encode_batch(parts[start : start + 256], add_special_tokens=False):
                ids = np.asarray([*encoding.ids, end], dtype=np.uint16)
                file.write(ids.tobytes())
                count += ids.size
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return count


def _stem(file: str) -> str:
    return file.removesuffix(".gz").removesuffix(".txt")
