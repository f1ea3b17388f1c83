"""pyreft as a process of its own: `python -m tests.formats.peers.pyreft FOLDER`. Names end with where an intervention acts."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests import tiny
from tests.formats.peers.common import backbone, move, run, without
from tests.formats.small import scores

without("datasets", "evaluate", "matplotlib", "seaborn")
import pyreft  # type: ignore[import-not-found] # noqa: E402

KINDS = {"Loreft": {}, "Noreft": {"add_bias": True}, "Nodireft": {"add_bias": False}}
PLACES = {
    "llama": ((0, 2), "block_output", ("f1",)),
    "qwen2": ((1,), "model.layers[{}].output", ("f1",)),
    "gpt2": ((0, 1), "block_output", ("f1",)),
    "roberta": ((0, 1), "roberta.encoder.layer[{}].output", ("f1+l1", "l1", "tied+f1+l1")),
}
CASES = {
    f"{family}-{kind}-{positions}": (kind, layers, component, fields)
    for family, (layers, component, spans) in PLACES.items()
    for kind, fields in KINDS.items()
    for positions in spans
}


def model_of(model: Any, units: list[tuple[int, str, Any]]) -> Any:
    """Return pyreft's model with interventions, each in a layer and at a component."""
    found = [{"layer": n, "component": at, "low_rank_dimension": 2, "intervention": made} for n, at, made in units]
    return pyreft.get_reft_model(model, pyreft.ReftConfig(representations=found))


def unit(kind: str, fields: dict[str, Any]) -> Any:
    """Return an intervention in single precision, where pyreft's own default is half."""
    return getattr(pyreft, f"{kind}Intervention")(
        embed_dim=tiny.WIDTH, low_rank_dimension=2, dtype=torch.float32, **fields
    )


def measured(reft: Any, model: Any, name: str) -> Tensor:
    """Return the scores with the interventions at the positions that a name ends with."""
    given, spans = tiny.batch(model), name.partition("-")[2].rpartition("-")[2]
    places = {
        "positions": spans.removeprefix("tied+"),
        "num_interventions": len(reft.interventions),
        "share_weights": spans.startswith("tied"),
    }
    each = [
        pyreft.get_intervention_locations(last_position=int(row), **places) for row in given["attention_mask"].sum(1)
    ]
    where = {"sources->base": (None, torch.tensor(each).permute(1, 0, 2).tolist())}
    with torch.no_grad():
        _, y = reft(given, unit_locations=where)
    return y.logits[given["attention_mask"].bool()]


def load(saved: Path, folder: Path) -> Tensor:
    """Load a folder by pyreft's own `load`; kinds and models that it cannot make by itself are made as for training."""
    model = backbone(saved)
    config = json.loads((folder / "config.json").read_text())
    kinds = [kind.rpartition(".")[2].removesuffix("Intervention'>") for kind in config["intervention_types"]]
    if kinds[0] == "Loreft" and config["representations"][0][1] == "block_output":
        reft = pyreft.ReftModel.load(str(folder), model)
        for intervention in reft.interventions.values():
            intervention.float()  # `load` makes them in half precision, whatever was saved
    else:
        fields = {} if kinds[0] == "Loreft" else {"add_bias": False}
        spots = [(spot[0], spot[1], unit(kinds[0], fields)) for spot in config["representations"]]
        reft = model_of(model, spots)
    for key, intervention in reft.interventions.items():
        intervention.load_state_dict(torch.load(folder / f"intkey_{key}.bin"))
    return measured(reft, model, folder.name)


def made(
    kind: str, layers: tuple[int, ...], component: str, fields: dict[str, Any], saved: Path, folder: Path
) -> Tensor:
    """Make interventions, one for both ends of a text or one for each, and save them."""
    model = backbone(saved)
    bare = scores(model, tiny.batch(model))
    both = "+" in folder.name and "tied" not in folder.name
    units = [(n, component.format(n), unit(kind, fields)) for n in layers * (2 if both else 1)]
    reft = model_of(model, units)
    for intervention in reft.interventions.values():
        move(intervention.learned_source)
        if kind != "Loreft":
            move(intervention.proj_layer)
    reft.save(str(folder))
    found = measured(reft, model, folder.name)
    assert (found - bare).abs().max() > 1e-2
    return found


if __name__ == "__main__":
    run(load, {name: partial(made, *case) for name, case in CASES.items()})
