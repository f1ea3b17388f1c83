"""In which order windows of the texts are read: an even mix from the first step to the last, a function of the seed."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from deltatune.backbones.pretrain.corpus import TokenFile
from deltatune.backbones.pretrain.settings import Settings
from deltatune.errors import DeltaTuneError


class Mixture:
    """The windows of one split of all texts; pass p has each window `repeat` times, in an order from (seed, p)."""

    def __init__(self, folder: Path, files: list[TokenFile], split: str, window: int, settings: Settings) -> None:
        self.files = [file for file in files if file.split == split]
        self.window = window
        self.seed = settings.seed
        self._tokens = [file.open(folder) for file in self.files]
        self._repeats = [settings.text(file.text).repeat for file in self.files]
        self._counts = [file.tokens // window for file in self.files]
        self.rows = len(self._pass(0))
        if not self.rows:
            raise DeltaTuneError(f"the {split} texts are shorter than one window of {window} tokens; give more text.")
        self._order = lru_cache(maxsize=2)(self._pass)

    def _pass(self, number: int) -> np.ndarray:
        """int64 [rows, 2]: the file and the window of each row of one pass."""
        rng = np.random.default_rng([self.seed, 1000, number])
        chosen = []
        for file, (count, repeat) in enumerate(zip(self._counts, self._repeats, strict=True)):
            whole, part = int(repeat), round((repeat - int(repeat)) * count)
            windows = np.concatenate([np.tile(np.arange(count), whole), rng.permutation(count)[:part]])
            chosen.append(np.stack([np.full_like(windows, file), windows], axis=1))
        rows = np.concatenate(chosen)
        return rows[rng.permutation(len(rows))]

    def read(self, start: int, count: int) -> tuple[np.ndarray, list[str]]:
        """Rows `start` to `start + count` of the endless order: tokens int64 [count, window] and their texts' names."""
        windows, names = [], []
        for position in range(start, start + count):
            file, index = self._order(position // self.rows)[position % self.rows]
            windows.append(self._tokens[file][index * self.window : (index + 1) * self.window].astype(np.int64))
            names.append(self.files[file].text)
        return np.stack(windows), names
