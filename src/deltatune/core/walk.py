"""Walking through a model: what torch's own `named_modules` and `get_submodule` tell, at a tenth of their cost.

Attaching asks for the module of every site; a generator for each level of depth is most of what that costs in torch.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def submodule(model: nn.Module, path: str) -> nn.Module:
    """Return the module at a path that is known to exist."""
    for name in path.split(".") if path else ():
        model = model._modules[name]  # type: ignore[assignment]
    return model


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return all modules by path, the model itself as "", a module above what is inside it; shared ones under every path."""
    found: dict[str, nn.Module] = {}
    ahead: list[tuple[str, nn.Module]] = [("", model)]
    while ahead:
        path, module = ahead.pop()
        found[path] = module
        before = f"{path}." if path else ""
        inside = [(before + name, child) for name, child in module._modules.items() if child is not None]
        ahead += reversed(inside)
    return found


def parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield all parameters by path; shared ones under every path."""
    for path, module in modules(model).items():
        before = f"{path}." if path else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield before + name, parameter
