"""A byte-level BPE tokenizer trained on the texts; it can write any string, so it needs no unknown token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deltatune.backbones.pretrain.settings import Settings
from deltatune.files import write_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


def special_tokens(settings: Settings) -> list[str]:
    """The special tokens in the order of their ids: padding 0, begin 1, end 2, then T5's sentinels where needed."""
    sentinels = 0 if settings.causal else settings.objective.sentinels
    return [PAD, BOS, EOS, *(f"<extra_id_{index}>" for index in range(sentinels))]


def train_tokenizer(lines: Iterator[str], settings: Settings) -> Tokenizer:
    """Train byte-level BPE (Sennrich et al., 2016; Radford et al., 2019) with single digits kept apart.

    A causal model's input is `<bos> text`, an encoder-decoder's `text <eos>`; the tokenizer adds those by itself.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=settings.tokenizer.size,
        special_tokens=special_tokens(settings),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    form, token = (f"{BOS} $A", BOS) if settings.causal else (f"$A {EOS}", EOS)
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=form, special_tokens=[(token, tokenizer.token_to_id(token))]
    )
    return tokenizer


def load_or_train(path: Path, lines: Iterator[str], settings: Settings) -> Tokenizer:
    """The tokenizer in the file at `path`, trained and written there first when there is none."""
    from tokenizers import Tokenizer

    if not path.exists():
        write_text(path, train_tokenizer(lines, settings).to_str(pretty=True))
    return Tokenizer.from_file(str(path))


def token_bytes(tokenizer: Tokenizer, settings: Settings) -> np.ndarray:
    """How many bytes of text each token id stands for: int64 [vocabulary], 0 for special tokens."""
    special = set(special_tokens(settings))
    lengths = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    for token, index in tokenizer.get_vocab().items():
        lengths[index] = 0 if token in special else len(token)
    return lengths
