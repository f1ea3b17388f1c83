"""CPT against peft: the same scores, and the same context after some steps of projected gradient descent."""

from __future__ import annotations

import pytest
import torch

import deltatune as dt
from deltatune.core.motion import advance
from tests import tiny
from tests.laws.cases import BACKBONES
from tests.reference.compare import TOLERANCE, batch_of, scores

IDS, TYPES = (7, 9, 11, 13, 15), (1, 2, 3, 4, 6)  # 4: the first label, 6: the second input


def peft_cpt(epsilon, format_epsilon):
    from peft import CPTConfig, get_peft_model

    config = CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=list(IDS),
        cpt_mask=[1] * len(IDS),
        cpt_tokens_type_mask=list(TYPES),
        opt_projection_epsilon=epsilon,
        opt_projection_format_epsilon=format_epsilon,
    )
    return get_peft_model(BACKBONES["llama"](), config).eval()


def test_training_goes_the_way_of_peft():
    given, width = batch_of("llama"), len(IDS)
    mask = given["attention_mask"].bool()
    theirs, model = peft_cpt(0.8, 0.3), BACKBONES["llama"]()
    attachment = dt.attach(model, dt.CPT(IDS, TYPES, epsilon=0.8, format_epsilon=0.3))
    moved = theirs.prompt_encoder["default"].delta_embedding.weight
    (ours,) = attachment.parameters()
    assert ours.shape == moved.shape
    theirs.base_model.requires_grad_(False)
    steps = [torch.optim.SGD([tensor], lr=0.5) for tensor in (ours, moved)]
    for step in range(1, 5):
        one = scores(model)
        two = logits(theirs, given)[:, width:][mask]
        torch.testing.assert_close(one, two, **TOLERANCE)
        for optimizer, y in zip(steps, (one, two), strict=True):
            optimizer.zero_grad()
            y.square().mean().backward()
            optimizer.step()
        advance(attachment, step, 4)
    projected = theirs.prompt_encoder["default"].get_projection()
    torch.testing.assert_close(ours.detach(), projected, rtol=1e-4, atol=1e-6)
    radius = 0.3 * (tiny.WIDTH / 2048) ** 0.5
    lengths = ours.detach().norm(dim=1)
    torch.testing.assert_close(lengths[[0, 2]], torch.full((2,), radius), rtol=1e-4, atol=0)  # as far as they may
    assert lengths[3] == 0
    assert all(0 < length <= 0.8 * (tiny.WIDTH / 2048) ** 0.5 + 1e-6 for length in lengths[[1, 4]])


def logits(theirs, given):
    """Return peft's scores without its loss, which its own forward always computes."""
    encoder, base = theirs.prompt_encoder["default"], theirs.base_model
    tokens = encoder(torch.arange(len(IDS))).expand(3, -1, -1)
    words = torch.cat([tokens, base.get_input_embeddings()(given["input_ids"])], 1)
    mask = torch.cat([torch.ones(3, len(IDS), dtype=torch.long), given["attention_mask"]], 1)
    return base(inputs_embeds=words, attention_mask=mask).logits


@torch.no_grad()
def test_the_context_starts_as_its_own_words():
    model, given = BACKBONES["llama"](), batch_of("llama")
    mask = given["attention_mask"].bool()
    longer = torch.cat([torch.tensor(IDS).expand(3, -1), given["input_ids"]], 1)
    ones = torch.cat([torch.ones(3, len(IDS), dtype=torch.long), given["attention_mask"]], 1)
    expected = model(input_ids=longer, attention_mask=ones).logits[:, len(IDS) :][mask]
    with dt.attach(model, dt.CPT(IDS, TYPES)):
        torch.testing.assert_close(scores(model), expected, **TOLERANCE)


def test_a_context_is_written_as_parts():
    class Words:
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [int(word) for word in text.split()]}

    parts = [("input template", "7 8"), ("input", "9"), ("output template", "10"), ("label", "11")]
    assert dt.cpt(Words(), parts, epsilon=0.2) == dt.CPT((7, 8, 9, 10, 11), (1, 1, 2, 3, 0), 0.2, 0.2)
    with pytest.raises(dt.DeltaTuneError, match="no kind 'answer'"):
        dt.cpt(Words(), [("answer", "7")])


def test_nonsense_is_refused():
    with pytest.raises(dt.DeltaTuneError, match="has no context"):
        dt.CPT(ids=())
    with pytest.raises(dt.DeltaTuneError, match="3 ids and 2 types"):
        dt.CPT(ids=(1, 2, 3), types=(1, 2))
    with pytest.raises(dt.DeltaTuneError, match="numbers above 0"):
        dt.CPT(epsilon=0.0)
    with pytest.raises(dt.DeltaTuneError, match="no token 99 in this vocabulary of 64"):
        dt.init(dt.CPT(ids=(99,)), BACKBONES["llama"]())
    assert dt.sites(BACKBONES["llama"](), dt.CPT(IDS, TYPES)).parameters == len(IDS) * tiny.WIDTH
