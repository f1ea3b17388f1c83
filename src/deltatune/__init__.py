"""deltatune: adapt a frozen pre-trained model by a delta, a value of methods at wheres.

Every method is a public name (`LoRA`, `Adapter`, ...), and so are the initialisers and maps; see `deltatune methods`.
Names are looked up when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltatune.backbones.fast import lean
    from deltatune.backbones.load import Backbone, load_backbone
    from deltatune.core.arithmetic import combine, negate, slerp
    from deltatune.core.attach import Attachment, attach, attachments
    from deltatune.core.compare import Comparison, compare
    from deltatune.core.contents import contents
    from deltatune.core.convert import changes, to_full, to_lora
    from deltatune.core.delta import Delta, SiteTable, parse, sites
    from deltatune.core.evidence import evidence, needs
    from deltatune.core.flatten import flatten
    from deltatune.core.join import join
    from deltatune.core.merge import Merged, merge, merge_
    from deltatune.core.products import products
    from deltatune.core.report import Report
    from deltatune.core.route import Pool, pool
    from deltatune.core.store import load, save
    from deltatune.core.task_vectors import dare, magnitude_prune, task_arithmetic, ties
    from deltatune.core.trace import Trace, trace
    from deltatune.core.weights import Fingerprint, Weights, fingerprint, init
    from deltatune.errors import DeltaTuneError
    from deltatune.formats.hub import push
    from deltatune.methods.addition.adapter import Adapter, adapterdrop, houlsby, pfeiffer
    from deltatune.methods.addition.prefix_tuning import PrefixTuning
    from deltatune.methods.addition.prompt_tuning import PromptTuning, Vocabulary
    from deltatune.methods.combine.reparam import MLP, Reparam
    from deltatune.methods.reparameterization.lora import LoRA
    from deltatune.methods.specification.bitfit import BitFit
    from deltatune.methods.specification.full import Full, LastLayers

__version__ = "0.1.0"

# verbs and nouns by the module that has them; methods, their presets and other values are found by their own name
_HOMES = {
    "core.arithmetic": ("combine", "negate", "slerp"),
    "core.attach": ("Attachment", "attach", "attachments"),
    "core.compare": ("Comparison", "compare"),
    "core.contents": ("contents",),
    "core.convert": ("changes", "to_full", "to_lora"),
    "core.delta": ("Delta", "SiteTable", "parse", "sites"),
    "core.route": ("Pool", "pool"),
    "core.merge": ("Merged", "merge", "merge_"),
    "core.report": ("Report",),
    "core.store": ("load", "save"),
    "core.task_vectors": ("dare", "magnitude_prune", "task_arithmetic", "ties"),
    "core.trace": ("Trace", "trace"),
    "core.flatten": ("flatten",),
    "core.join": ("join",),
    "backbones.keys_values": ("keys_values",),
    "tuning.structure": ("Structure", "search_structure"),
    "core.weights": ("Fingerprint", "Weights", "fingerprint", "init"),
    "errors": ("DeltaTuneError",),
    "backbones.load": ("Backbone", "load_backbone"),
    "backbones.fast": ("lean",),
    "core.products": ("products",),
    "core.evidence": ("evidence", "needs"),
    "core.motion": ("advance", "drawn", "penalty", "rates"),
}


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    import_module("deltatune.methods")
    import_module("deltatune.backbones")
    import_module("deltatune.formats")
    for home, names in _homes().items():
        if name in names:
            return vars(import_module(f"deltatune.{home}"))[name]
    from deltatune.errors import nearest

    values = _values()
    if name in values:
        return values[name]
    known = [*values, *(n for names in _homes().values() for n in names)]
    raise AttributeError(f"deltatune has no {name!r}.{nearest(name, known)}")


def __dir__() -> list[str]:
    return sorted([*_values(), *(n for names in _homes().values() for n in names), "__version__"])


def _homes() -> dict[str, tuple[str, ...]]:
    from deltatune.formats import PUBLIC

    return {**_HOMES, "formats": PUBLIC}


def _values() -> dict[str, Any]:
    from deltatune.core.spec import concrete
    from deltatune.methods import functions

    return {**functions(), **concrete()}
