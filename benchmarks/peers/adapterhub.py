"""Training steps of the library `adapters`, in `.venv-others`: `python -m benchmarks.peers.adapterhub SHAPE` writes JSON.

SHAPE is the shape's JSON. The bare backbone's limit is measured between them, so that their ratios to it compare with
those of another process: {"version", "limit", "rows": {method: {"parameters", "seconds", "saved_bytes", "peak_bytes"}}}.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import adapters  # type: ignore[import-not-found]
import torch

from benchmarks.measure import settle
from benchmarks.shape import LlamaShape
from benchmarks.training import STEP, Contestant, limit, training

LIMIT = "limit"
BOTTLENECK = {"reduction_factor": 16, "non_linearity": "relu"}
CONFIGS: dict[str, Any] = {
    "Houlsby": adapters.DoubleSeqBnConfig(**BOTTLENECK),
    "Pfeiffer": adapters.SeqBnConfig(**BOTTLENECK),
    "PrefixTuning": adapters.PrefixTuningConfig(prefix_length=30, flat=True, dropout=0.0),
}


def with_adapter(shape: LlamaShape, ids: torch.Tensor, config: Any) -> Contestant:
    """Train one adapter of the library."""
    model: Any = shape.model()
    adapters.init(model)
    model.add_adapter("own", config=config)
    model.train_adapter("own")
    model.to(shape.device, next(model.parameters()).dtype).train()  # what was added too
    return training(model, ids, [p for p in model.parameters() if p.requires_grad])


def main() -> None:
    """Measure every method and write what was found."""
    settle()
    given = json.loads(sys.argv[1])
    rows, tokens = given.pop("rows"), given.pop("tokens")
    shape = LlamaShape(**given)
    ids = shape.ids(rows, tokens)
    ways = {LIMIT: limit(shape.model(), ids)}
    ways |= {name: with_adapter(shape, ids, config) for name, config in CONFIGS.items()}
    saved = {name: (way.saved_bytes(), way.peak_bytes(shape.device)) for name, way in ways.items()}
    took = shape.turns({name: way.turn for name, way in ways.items()})
    found = {
        name: {
            "parameters": way.parameters,
            "seconds": took[name].seconds[STEP],
            "saved_bytes": saved[name][0],
            "peak_bytes": saved[name][1],
        }
        for name, way in ways.items()
    }
    print(json.dumps({"version": adapters.__version__, LIMIT: found.pop(LIMIT), "rows": found}))


if __name__ == "__main__":
    main()
