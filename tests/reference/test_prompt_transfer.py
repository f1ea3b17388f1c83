"""Prompts that start from saved ones, and how alike two prompts are."""

from __future__ import annotations

import pytest
import torch

import deltatune as dt
from tests import tiny
from tests.laws.cases import BACKBONES
from tests.reference.compare import moved

P = 4


def saved(folder, delta=None, name="llama"):
    """Write weights of a prompt that was trained on another task, and return it."""
    _, weights = moved(name, delta or dt.PromptTuning(length=P))
    weights.write(folder)
    return weights


def start(folder, name="llama", length=P):
    """Return fresh weights that start from a folder."""
    return dt.init(dt.PromptTuning(length=length, init=dt.FromWeights(str(folder))), BACKBONES[name]())


def test_a_prompt_starts_as_the_saved_one(tmp_path):
    source = saved(tmp_path)
    (theirs,), (ours,) = source.tensors.values(), start(tmp_path).tensors.values()
    assert torch.equal(ours, theirs)
    assert ours is not theirs


def test_a_prompt_behind_a_network_starts_others_once_it_is_flattened(tmp_path):
    source = saved(tmp_path / "through", dt.p_tuning(P, 6))
    with pytest.raises(dt.DeltaTuneError, match="no soft prompts.*flattened"):
        start(tmp_path / "through")
    plain = dt.flatten(BACKBONES["llama"](), source)
    plain.write(tmp_path / "plain")
    assert torch.equal(*plain.tensors.values(), *start(tmp_path / "plain").tensors.values())


def test_what_does_not_fit_is_refused(tmp_path):
    saved(tmp_path)
    with pytest.raises(dt.DeltaTuneError, match=f"has {P} tokens, not 3; write length={P}"):
        start(tmp_path, length=3)
    saved(tmp_path / "two", dt.PromptTuning(length=P) + dt.PromptTuning(length=P))
    with pytest.raises(dt.DeltaTuneError, match="hold 2 soft prompts"):
        start(tmp_path / "two")
    saved(tmp_path / "states", dt.LLaMAAdapter(length=P))
    with pytest.raises(dt.DeltaTuneError, match="hold no soft prompts"):
        start(tmp_path / "states")
    model = tiny.electra()  # embeddings half as wide
    with pytest.raises(dt.DeltaTuneError, match=r"has the width 32, and .* needs 16"):
        dt.init(dt.PromptTuning(length=P, init=dt.FromWeights(str(tmp_path))), model)
    with pytest.raises(dt.DeltaTuneError, match="there is no file"):
        start(tmp_path / "nowhere")


def test_similarity_is_the_cosine_of_the_mean_tokens(tmp_path):
    one, two = saved(tmp_path / "a"), saved(tmp_path / "b", dt.PromptTuning(length=P, init=dt.Normal(1.0)))
    p, q = (next(iter(w.tensors.values())).mean(0) for w in (one, two))
    expected = (p @ q / (p.norm() * q.norm())).item()
    assert dt.prompt_similarity(one, two) == pytest.approx(expected, abs=1e-6)
    assert dt.prompt_similarity(one, one) == pytest.approx(1.0, abs=1e-6)
