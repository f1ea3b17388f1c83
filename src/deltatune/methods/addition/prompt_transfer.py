"""Prompt transfer: a soft prompt that starts as one trained before, on another task or on text (SPoT: Vu et al., 2022,
arXiv:2110.07904; PPT: Gu et al., 2022, arXiv:2109.04332).

    P_0 = P of other weights        similarity(P, Q) = cos(mean_i P_i, mean_i Q_i)

`PromptTuning(init=FromWeights("folder"))` starts from what was saved there. SPoT trains on a source task, and picks the
source whose prompt is most similar to one trained briefly on the target (`prompt_similarity`). PPT trains the first prompt
on unlabelled text, made into a task: a folder task whose rows are pairs of sentences, labelled as next to one another or
not. Both are two runs of one delta:

    deltatune tune --delta "PromptTuning(length=100)" --task source ...
    deltatune tune --delta 'PromptTuning(length=100, init=FromWeights("the folder of that run"))' --task target ...
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from deltatune.core.leaf import Given, Init, Shape
from deltatune.core.weights import Weights
from deltatune.errors import DeltaTuneError


@dataclass(frozen=True)
class FromWeights(Init):
    """The prompt of weights that were saved in a folder: P_0 = P (Vu et al., 2022). Saved weights do not need it any more."""

    folder: str

    def fill(self, shape: Shape, generator: Generator, given: Given) -> Tensor:
        tensor = prompt_of(Weights.read(self.folder), self.folder)
        if tensor.shape[1:] != shape[1:]:
            raise DeltaTuneError(
                f"the prompt in {self.folder} has the width {tensor.shape[1]}, and {given.site.path!r} needs {shape[1]}; "
                "it was trained for another backbone."
            )
        if tensor.shape != shape:
            raise DeltaTuneError(
                f"the prompt in {self.folder} has {tensor.shape[0]} tokens, not {shape[0]}; write length={tensor.shape[0]}."
            )
        return tensor.to("cpu", torch.float32)


def prompt_of(weights: Weights, name: str = "these weights") -> Tensor:
    """Return the one soft prompt [length, d] in weights; raises `DeltaTuneError` when there is none or more than one.

    A prompt behind a network has to be flattened first.
    """
    terms = {str(i) for i, term in enumerate(weights.delta.terms) if term.method.acts == "tokens"}
    named = ((*name.partition("."), tensor) for name, tensor in weights.tensors.items())
    found = [tensor for term, _, leaf, tensor in named if term in terms and leaf.rpartition(".")[2] == "P"]
    if len(found) != 1:
        raise DeltaTuneError(
            f"{name} hold {len(found) or 'no'} soft prompts ({weights.delta}); a prompt starts from the weights of one "
            "PromptTuning, flattened where a network computes it."
        )
    return found[0]


def prompt_similarity(one: Weights, other: Weights) -> float:
    """Return the cosine of the mean tokens of two soft prompts, SPoT's measure of how alike their tasks are (Vu et al., 2022)."""
    P, Q = prompt_of(one), prompt_of(other)
    if P.shape[1] != Q.shape[1]:
        raise DeltaTuneError(
            f"the prompts have the widths {P.shape[1]} and {Q.shape[1]}; compare those of one backbone."
        )
    return F.cosine_similarity(P.float().mean(0), Q.float().mean(0), dim=0).item()
