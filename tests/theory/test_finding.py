"""What every instrument returns: a frozen value with a sentence, that travels as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import pkgutil
from collections.abc import Iterator
from importlib import import_module

import deltatune.theory as theory
from deltatune.theory.finding import Finding
from deltatune.theory.intrinsic import IntrinsicDimension
from deltatune.theory.spectrum import Spectra, Spectrum


def kinds(base: type) -> Iterator[type]:
    for kind in base.__subclasses__():
        yield kind
        yield from kinds(kind)


def test_every_result_is_frozen_and_has_a_sentence_of_its_own():
    for module in pkgutil.iter_modules(theory.__path__, "deltatune.theory."):
        import_module(module.name)
    found = [kind for kind in kinds(Finding) if kind.__module__.startswith("deltatune.")]
    assert len(found) >= 12
    for kind in found:
        assert dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen, kind
        assert "finding" in vars(kind), kind


def test_a_result_is_json_whatever_its_numbers():
    site = Spectrum("a", "attn.q", None, (2, 2), (math.inf, math.nan))
    data = Spectra((site,), of="this").to_json()
    text = json.dumps(data, allow_nan=False)
    assert json.loads(text)["sites"][0]["values"] == [None, None]
    data = IntrinsicDimension((1, 2), (0,), ((0.1, 1.0),), (1.0,)).to_json()
    assert data["instrument"] == "IntrinsicDimension" and data["scores"] == [[0.1, 1.0]]
    assert data["finding"].startswith("d_90 is 2") and "\n" not in data["finding"]
