"""The methods, in the paper's three groups; one file is one idea. Importing this package defines them all."""

import pkgutil
from collections.abc import Callable
from importlib import import_module
from inspect import isfunction
from typing import Any

_MODULES = [import_module(found.name) for found in pkgutil.walk_packages(__path__, f"{__name__}.")]


def functions() -> dict[str, Callable[..., Any]]:
    """Return the public functions that methods' files define, by name: presets, and tools for their weights."""
    own = [module for module in _MODULES if not module.__name__.rpartition(".")[2].startswith("_")]
    return {
        name: value
        for module in own
        for name, value in vars(module).items()
        if isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }
