"""One promise of all readers: whatever a file holds, it is read, or a `DeltaTuneError` says what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from torch import nn

from deltatune.core.weights import Weights
from deltatune.errors import DeltaTuneError

P = ParamSpec("P")
Place = TypeVar("Place")
Reader = Callable[Concatenate[nn.Module, Place, P], Weights]


def reading(library: str) -> Callable[[Reader[Place, P]], Reader[Place, P]]:
    """Return what makes a reader of a library's files raise nothing but `DeltaTuneError` for what they hold."""

    def guard(reader: Reader[Place, P]) -> Reader[Place, P]:
        @wraps(reader)
        def guarded(model: nn.Module, path: Place, /, *args: P.args, **kwargs: P.kwargs) -> Weights:
            try:
                return reader(model, path, *args, **kwargs)
            except DeltaTuneError:
                raise
            except Exception as error:  # a shape, a type, a name that no library writes
                why = " ".join(str(error).split())[:200] or type(error).__name__
                raise DeltaTuneError(
                    f"{path} is not as {library} writes its files, or not for this model ({type(error).__name__}: {why})."
                ) from error

        return guarded

    return guard
