"""From a peft folder to weights: the keys of its tensors say where, its config says how."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from deltatune.core.method import Method
from deltatune.core.site import Anatomy, Site, anatomy
from deltatune.core.weights import Weights
from deltatune.core.where import select
from deltatune.errors import DeltaTuneError, nearest
from deltatune.formats.disk import Tensors
from deltatune.formats.guard import reading
from deltatune.formats.parts import Part, assemble
from deltatune.formats.peft import (  # noqa: F401  (their forms)
    adamss,
    bases,
    factors,
    few,
    frod,
    prefixes,
    projections,
    rotations,
    scalings,
    spectra,
    unilora,
)
from deltatune.formats.peft.config import Config
from deltatune.formats.peft.folder import read_folder
from deltatune.formats.peft.form import Form
from deltatune.formats.peft.prompts import Prompt, read_prompt
from deltatune.formats.peft.values import bias_trap, read_values
from deltatune.methods.addition.trainable_tokens import TrainableTokens

ROOT = "base_model."
PREFIX = f"{ROOT}model."
# types of peft whose function deltatune does not have
OTHERWISE = {
    "BOTTLENECK": "it is of the fork LLM-Adapters, whose files do not say on which side of a layer their adapters act",
    "LILY": "peft's is f(x) + s sum_e m_e B_e^T h with m the mean of softmax(C h) over all positions of all rows of a call, so "
    "that a row depends on the others and on what follows it; deltatune's Lily has each position's own softmax",
    "SHADOW": "peft's is h + alpha W_up W_down (h - s) before every block with s the states of a second transformer, which no "
    "method of deltatune has",
    "XLORA": "peft's is f(x) + sum_e c_e LoRA_e(x) with c from a classifier on the last hidden states of a first pass through "
    "the whole model; read each of its LoRAs by itself",
}


def read_peft(model: nn.Module, folder: Path | str, check: bool = True) -> Weights:
    """Read a folder of peft as weights for `model`; raises `DeltaTuneError` for what deltatune cannot compute in the same way.

    The files carry no fingerprint, so names and shapes are checked instead. `check=False` reads what the tensors say by
    themselves: without the fields of the config that are refused or not known, and without biases that peft did not save.
    """
    with reading("peft", folder):
        return _read_weights(model, Path(folder), check)


def _read_weights(model: nn.Module, folder: Path, check: bool) -> Weights:
    config, tensors = read_folder(folder)
    if config.type in Prompt.known:
        return read_prompt(model, config, tensors)
    form = Form.known.get(config.type)
    if form is None:
        raise _no_form(config)
    if check:
        form.check(config)
    parts = anatomy(model)
    held, common, rest = _split(form, config, tensors)
    held = held or form.untold(model, config, common)
    if not held:
        raise DeltaTuneError(
            f"the file beside {config.source} holds no tensor of a {config.type}; its keys are {sorted(rest)[:3]}."
        )
    apart = form.take(model, config, held)
    sites = _sites(model, parts, config, list(held))
    whole = form.spread(config, {path: held[path] for path in sites}, common)
    adapters = [part for path, site in sites.items() for part in _read(form, config, site, whole[path], model)]
    adapters = apart + _once(model, adapters)
    values, biases = read_values(model, config, rest)
    if check:
        bias_trap(config, [model.get_submodule(path) for path in held], bool(biases))
    return assemble(model, parts, [*values, *adapters, *biases], form.seed(config))


def _no_form(config: Config) -> DeltaTuneError:
    known = sorted({*Form.known, *Prompt.known})
    if config.type in OTHERWISE:
        return DeltaTuneError(f"{config.source} is a {config.type}, which is not read: {OTHERWISE[config.type]}.")
    return DeltaTuneError(
        f"{config.source} is of the type {config.type!r}, which is not read.{nearest(config.type, known)} "
        f"Read are {', '.join(known)}."
    )


def _split(form: Form, config: Config, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensors], Tensors, Tensors]:
    """Return {path: {suffix: tensor}} of the form's own tensors, those it shares, and the others by their names in the model."""
    held: dict[str, Tensors] = {}
    shared: Tensors = {}
    rest: Tensors = {}
    for key, tensor in tensors.items():
        if key.removeprefix(ROOT).split(".")[0] in form.shared:
            shared[key.removeprefix(ROOT)] = tensor
            continue
        if not key.startswith(PREFIX):
            raise DeltaTuneError(
                f"the file holds {key!r}; the tensors of a {config.type} of peft begin with {PREFIX!r}."
            )
        name = key.removeprefix(PREFIX)
        suffix = next((end for end in sorted(form.suffixes, key=len, reverse=True) if name.endswith(f".{end}")), None)
        if suffix is None:
            rest[name] = tensor
        else:
            held.setdefault(name.removesuffix(f".{suffix}"), {})[suffix] = tensor
    return held, shared, rest


def _sites(model: nn.Module, parts: Anatomy, config: Config, paths: list[str]) -> dict[str, Site]:
    """Return the sites of the file's modules, in the order of the model."""
    modules = [path for path, _ in model.named_modules(remove_duplicate=False) if path.split(".")[0] != "deltas"]
    for path in paths:
        if path not in modules:
            near = nearest(path, modules) or " Was it made for this model, with or without its head?"
            raise DeltaTuneError(
                f"the file holds a {config.type} for the module {path!r}, which this {type(model).__name__} does not have.{near}"
            )
    wanted = set(paths)
    return {path: select(model, f"path:{path}", parts)[0] for path in modules if path in wanted}


def _read(form: Form, config: Config, site: Site, held: Tensors, model: nn.Module) -> list[Part]:
    lacking = [suffix for suffix in form.needed if suffix not in held]
    if lacking:
        raise DeltaTuneError(f"the file holds {', '.join(held)} of {site.path!r}, but no {', '.join(lacking)}.")
    return form.read_at(config, site, held, dict(model.get_submodule(site.path).named_parameters(recurse=False)))


def _once(model: nn.Module, parts: list[Part]) -> list[Part]:
    """Return the parts without those whose tokens are another's, where a head is tied to the table."""
    seen: set[tuple[int, Method]] = set()
    kept = []
    for part in parts:
        own = dict(model.get_submodule(part.path).named_parameters(recurse=False))
        key = (id(own.get("weight")), part.method)
        if not isinstance(part.method, TrainableTokens) or key not in seen:
            kept.append(part)
        seen.add(key)
    return kept
