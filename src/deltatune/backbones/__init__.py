"""Backbones: loading pre-trained models, and knowing where in them each role is.

Importing this package makes transformers models known to `deltatune.core`; it does not import transformers.
"""

from deltatune.backbones import attention, offload, positions, prompts, quantised, together
from deltatune.backbones.anatomies import families
from deltatune.backbones.load import Backbone, digest, load, load_backbone, names, skeleton
from deltatune.backbones.resolve import resolve
from deltatune.core.site import RESOLVERS

__all__ = [
    "Backbone",
    "attention",
    "digest",
    "load",
    "load_backbone",
    "names",
    "offload",
    "positions",
    "prompts",
    "quantised",
    "skeleton",
    "together",
]

families()
RESOLVERS.append(resolve)
