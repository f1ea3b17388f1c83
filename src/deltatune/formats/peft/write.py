"""From weights to a peft folder; what peft cannot express is refused by name before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from deltatune.core.weights import Weights
from deltatune.errors import DeltaTuneError
from deltatune.formats.disk import Tensors
from deltatune.formats.peft.folder import write_folder
from deltatune.formats.peft.form import Form
from deltatune.formats.peft.names import targets
from deltatune.formats.peft.prompts import Prompt, is_prompt, write_prompt
from deltatune.formats.peft.read import OTHERWISE, PREFIX, ROOT
from deltatune.formats.peft.values import write_biases, write_values
from deltatune.formats.seats import Seat, seats_of
from deltatune.methods.specification.bitfit import BitFit
from deltatune.methods.specification.full import Full


def write_peft(model: nn.Module, weights: Weights, folder: Path | str, base: str | None = None) -> None:
    """Write weights for `model` as a folder that peft loads; `base` is the name under which it finds the backbone.

    Raises `DeltaTuneError`, before anything is written, for what peft cannot compute in the same way.
    """
    seats = seats_of(model, weights)
    usual = {"base_model_name_or_path": base, "task_type": _task(model), "inference_mode": True}
    prompts = [seat for seat in seats if is_prompt(seat.method)]
    if prompts:
        if len(weights.delta.terms) > 1:
            raise DeltaTuneError(f"peft's prompts and prefixes stand alone; this delta is {weights.delta}.")
        config, tensors = write_prompt(model, prompts)
    else:
        config, tensors = _write(model, seats)
    write_folder(Path(folder), usual | config, tensors)


def _task(model: nn.Module) -> str | None:
    name = type(model).__name__
    return "CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel")) else None


def _write(model: nn.Module, seats: list[Seat]) -> tuple[dict[str, Any], Tensors]:
    values = [seat for seat in seats if isinstance(seat.method, Full)]
    biases = [seat for seat in seats if isinstance(seat.method, BitFit)]
    adapters = [seat for seat in seats if not isinstance(seat.method, Full | BitFit)]
    if not adapters:
        adapters, biases = biases, []  # peft has biases by themselves, as a type of its own
    form = _form(adapters or seats)
    extra = [seat for seat in adapters if not isinstance(seat.method, form.methods)]
    adapters = form.prepare([seat for seat in adapters if isinstance(seat.method, form.methods)])
    _check(form, adapters)
    if (biases and form.type != "LORA") or (values and not form.saves):
        raise DeltaTuneError(
            f"{(biases or values)[0].method} is not written beside {form.type}; write it beside LoRA, or merge it."
        )
    tensors, saved = write_values(model, values)
    config: dict[str, Any] = {"peft_type": form.type, **form.settings([*adapters, *extra])} | (
        {"modules_to_save": saved} if saved else {}
    )
    for seat in adapters:
        places = [
            seat.site.path,
            *(path for path, _ in seat.site.ties),
        ]  # peft keeps what is tied at each of its places
        tensors |= {f"{path}.{suffix}": tensor for suffix, tensor in form.write(seat).items() for path in places}
    if biases:
        found, fields = write_biases(model, biases, {seat.site.path: seat for seat in adapters})
        tensors, config = tensors | found, config | fields
    if extra:
        found, fields = form.write_beside(model, extra)
        tensors, config = tensors | found, config | fields
    shared = form.share(adapters)
    if form.repeats:
        tensors |= {f"{seat.site.path}.{name}": tensor for seat in adapters for name, tensor in shared.items()}
    shared = {f"{ROOT}{name}": tensor for name, tensor in shared.items()}
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}
    return config | _targets(model, form, adapters), shared | tensors


def _form(seats: list[Seat]) -> Form:
    """Return the one type of peft that has all these methods."""
    kinds = dict.fromkeys(type(seat.method) for seat in seats)
    for also in (False, True):
        for form in Form.known.values():
            if all(kind in form.methods or (also and kind in form.beside) for kind in kinds):
                return form
    names = " + ".join(kind.__name__ for kind in kinds)
    for kind in kinds:
        if kind.__name__.upper() in OTHERWISE:
            raise DeltaTuneError(f"{kind.__name__} is not written for peft: {OTHERWISE[kind.__name__.upper()]}.")
    for seat in seats:
        if seat.method.computes is not seat.method:
            raise DeltaTuneError(
                f"{seat.method} has no form in peft; write what dt.flatten(model, weights) leaves of it."
            )
    known = sorted({method.__name__ for form in Form.known.values() for method in form.methods})
    alone = sorted({form.method.__name__ for form in Prompt.known.values()})
    raise DeltaTuneError(
        f"peft has no type for {names}; written are {', '.join(known)}, one at a time and with BitFit and "
        f"Full beside them, and {', '.join(alone)}, alone."
    )


def _check(form: Form, seats: list[Seat]) -> None:
    """Raise `DeltaTuneError` for a site at which peft does not have the method, or has only one of them."""
    seen: set[tuple[str, str | None]] = set()
    for seat in seats:
        site = seat.site
        if (site.path, site.tensor) in seen:
            raise DeltaTuneError(f"peft has one {form.type} at a module; this delta has several at {site.path!r}.")
        seen.add((site.path, site.tensor))
        if site.part is not None and form.type != "LORA":
            raise DeltaTuneError(
                f"{seat.method} acts on a part of {site.path!r}, which packs several roles; peft knows whole modules only."
            )
        kind = f"{site.kind}, stored [in, out]," if site.transposed and site.kind == "linear" else site.kind
        if site.kind not in form.kinds or (site.transposed and site.kind == "linear" and not form.transposed):
            raise DeltaTuneError(
                f"peft's {form.type} does not act on the {kind} {site.path!r}, where this delta has {seat.method}."
            )


def _targets(model: nn.Module, form: Form, seats: list[Seat]) -> dict[str, Any]:
    paths = {seat.site.path for seat in seats}
    turned = any(seat.site.transposed and seat.site.kind == "linear" for seat in seats)
    fields: dict[str, Any] = {"target_modules": targets(model, paths) if paths else []}
    if form.transposed:
        fields["fan_in_fan_out"] = turned
    if form.type == "IA3":
        inner = {seat.site.path for seat in seats if seat.site.side == "in"}
        fields["feedforward_modules"] = targets(model, inner, loose=True) if inner else []
        outer = targets(model, paths - inner) if paths - inner else []
        if isinstance(outer, list) and isinstance(
            fields["feedforward_modules"], list
        ):  # peft wants the one in the other
            fields["target_modules"] = sorted({*outer, *fields["feedforward_modules"]})
    return fields
