"""Whether weights fit a backbone: its fingerprint, and the tensors that the delta declares there."""

from __future__ import annotations

from torch import Tensor

from deltatune.core.delta import Placement
from deltatune.core.leaf import Leaf
from deltatune.core.weights import Fingerprint, Weights
from deltatune.errors import DeltaTuneError, nearest


def check_backbone(wanted: Fingerprint, found: Fingerprint, check: bool) -> None:
    """Raise `DeltaTuneError` when weights were made for another structure or, with `check`, for other values."""
    if wanted.structure != found.structure:
        raise DeltaTuneError(
            f"the weights were made for another backbone: {wanted.family} (structure {wanted.structure}); this is {found.family} "
            f"(structure {found.structure}), whose parameters have other names or shapes."
        )
    if check and wanted.values and found.values and wanted.values != found.values:
        raise DeltaTuneError(
            f"the weights were made for a {wanted.family} of the same shapes but with other values (fingerprint {wanted.values}, "
            f"this one has {found.values}). Load that backbone, or pass check=False if you mean it."
        )


def check_tensors(weights: Weights, placements: list[Placement]) -> None:
    """Raise `DeltaTuneError` when the tensors are not those that the placements declare; seeded ones may be there."""
    declared = {p.name(leaf): d for p in placements for leaf, d in p.leaves.items()}
    for trained, found in ((True, weights.tensors), (False, weights.fixed)):
        wanted = {name: leaf for name, leaf in declared.items() if leaf.trained == trained}
        for name in sorted(name for name in wanted.keys() - found.keys() if wanted[name].kind != "seeded"):
            raise DeltaTuneError(f"the weights lack the tensor {name!r} of {weights.delta}.{nearest(name, found)}")
        for name, tensor in found.items():
            if name not in wanted:
                raise DeltaTuneError(
                    f"the weights hold the tensor {name!r}, which {weights.delta} does not declare.{nearest(name, wanted)}"
                )
            _check_tensor(name, tensor, wanted[name])


def _check_tensor(name: str, tensor: Tensor, wanted: Leaf) -> None:
    if tuple(tensor.shape) != wanted.shape:
        raise DeltaTuneError(
            f"the tensor {name!r} has the shape {tuple(tensor.shape)}; this backbone needs {wanted.shape}."
        )
    if wanted.trained and not tensor.is_floating_point():
        raise DeltaTuneError(f"the tensor {name!r} holds {tensor.dtype}; a delta's tensors are float32.")
