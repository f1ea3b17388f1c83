"""What every instrument returns: a frozen value that says in one sentence what was found, and travels as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Finding:
    """The result of one instrument."""

    @property
    def finding(self) -> str:
        """One sentence that says what was found."""
        raise NotImplementedError

    def to_json(self) -> dict[str, Any]:
        """Return the fields, the instrument's name and the sentence; what is infinite or not a number becomes None."""
        return {"instrument": type(self).__name__, **plain(self), "finding": self.finding}


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it: dataclasses and tensors by their contents, None for what is no finite number."""
    if is_dataclass(value):
        return plain(vars(value))
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
