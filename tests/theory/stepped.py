"""The cases of the laws on backbones whose blocks are known, which are dynamical systems."""

from __future__ import annotations

from tests.laws.cases import cases

STEPPED = [case for case in cases() if case.values[1] != "plain"]
