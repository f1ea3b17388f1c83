"""The loss of the tokens that are asked for: the loss and the gradients of all logits, without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import deltatune as dt
from deltatune.tuning import loss as losses
from deltatune.tuning.encode import IGNORED
from deltatune.tuning.loss import TokenLoss, cross_entropy, make_loss
from tests import tiny
from tests.laws.cases import busy

FAMILIES = {**tiny.FAMILIES, "mixtral": tiny.mixtral}
# What comes between the head and the logits (a cap, a bias) keeps the product from being done in chunks.
WHOLE = ("gemma2", "bart", "mbart")


def prepared(name: str, delta: Any, dtype: torch.dtype = torch.float64) -> tuple[Any, Any, dict[str, Tensor]]:
    """A model, a delta on it that is not neutral, and a batch in which less than half of the labels count."""
    model: Any = FAMILIES[name]().to(dtype)
    attachment = dt.attach(model, busy(dt.init(delta, model)))
    for parameter in attachment.parameters():
        parameter.data = parameter.data.to(dtype)
    batch = tiny.batch(model)
    ids = batch.pop("decoder_input_ids", batch["input_ids"])
    mask = batch["attention_mask"] if ids.shape == batch["input_ids"].shape else torch.ones_like(ids)
    batch["labels"] = torch.where((torch.arange(ids.shape[1]) % 3 == 2) & (mask != 0), ids, IGNORED)
    return model, attachment, batch


def reference(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The mean over the labels that count, written out over all logits."""
    given = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch["labels"]
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    log_p = model(**given).logits.log_softmax(-1)
    if type(model).__name__.endswith(("CausalLM", "LMHeadModel")):
        log_p, labels = log_p[:, :-1], labels[:, 1:]
    chosen = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return -chosen[labels != IGNORED].mean()


def agrees(model: Any, attachment: Any, batch: dict[str, Tensor]) -> TokenLoss:
    """Compare loss and gradients, and return what computed them."""
    found = make_loss(model, batch)
    assert isinstance(found, TokenLoss)
    parameters = list(attachment.parameters())
    results = [(value, torch.autograd.grad(value, parameters)) for value in (found(batch), reference(model, batch))]
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(results[0][0], model(**batch).loss.double(), rtol=1e-6, atol=1e-6)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_those_of_all_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK", 2 * tiny.VOCABULARY)  # two tokens at a time, of four to seven
    found = agrees(*prepared(name, dt.LoRA(rank=2).at("{attn.{q,v},ffn.down?}")))
    assert found.reading.chunked == (name not in WHOLE)
    assert (found.reading.ffn is None) == (name == "mixtral")  # whose experts are no feed-forward layer of linears


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "opt"])
@pytest.mark.parametrize(
    ("delta", "chunked"),
    [
        (dt.Full(), False),
        (dt.LoRA(rank=2).at("head"), False),
        (dt.ParallelAdapter(size=4).at("ffn"), True),
        (dt.Adapter(size=4).at("ffn.down"), True),
        (dt.Adapter(size=4).at("block[-1]"), True),
    ],
    ids=str,
)
def test_a_delta_may_be_anywhere(name: str, delta: Any, chunked: bool) -> None:
    assert agrees(*prepared(name, delta)).reading.chunked == chunked


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_method_that_counts_tokens_sees_all_of_them(name: str) -> None:
    delta = dt.AtPositions(dt.LoReFT(rank=2), first=2).at("ffn.down")
    assert agrees(*prepared(name, delta)).reading.ffn is None


def test_what_looks_at_the_heads_input_keeps_the_backbones_own_loss() -> None:
    model, _, batch = prepared("llama", dt.ParallelAdapter(size=4).at("head"))
    assert not isinstance(make_loss(model, batch), TokenLoss)


def test_a_backbone_with_a_loss_of_its_own_keeps_it() -> None:
    model, _, batch = prepared("llama", dt.LoRA())
    own = model.loss_function
    model.loss_function = lambda **given: 2 * own(**given)
    found = make_loss(model, batch)
    assert not isinstance(found, TokenLoss)
    assert torch.equal(found(batch), 2 * own(model(**batch).logits, batch["labels"], tiny.VOCABULARY))


class Widest(TorchDispatchMode):
    """The most rows that any tensor over the vocabulary has, the backbone's own and its views left out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.rows = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = function(*args, **(kwargs or {}))
        for tensor in y if isinstance(y, (tuple, list)) else (y,):
            if isinstance(tensor, Tensor) and tensor.shape[-1:] == (tiny.VOCABULARY,):
                known = tensor.untyped_storage().data_ptr() in self.own
                self.rows = max(self.rows, 0 if known else tensor.numel() // tiny.VOCABULARY)
        return y


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_all_logits_are_never_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK", 2 * tiny.VOCABULARY)
    model, _, batch = prepared(name, dt.LoRA(rank=2), torch.float32)
    found = make_loss(model, batch)
    with Widest(model) as ours:
        found(batch).backward()
    with Widest(model) as plain:
        model(**batch).loss.backward()
    assert ours.rows == 2 and plain.rows == batch["labels"].numel()


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_under_autocast_it_is_as_near_to_the_truth_as_the_backbones_own(name: str) -> None:
    model, attachment, batch = prepared(name, dt.LoRA(rank=2), torch.float32)

    def gradient(value: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(attachment.parameters()))])

    truth = gradient(model(**batch).loss)
    with torch.autocast("cpu", torch.bfloat16):
        found = make_loss(model, batch)
        assert isinstance(found, TokenLoss) and found.reading.chunked
        ours, own = found(batch), model(**batch).loss
        errors = [(gradient(value) - truth).norm().item() for value in (ours, own)]
    torch.testing.assert_close(ours, own, rtol=1e-2, atol=1e-2)
    assert 0 < errors[0] < 1.5 * errors[1] < 0.1 * truth.norm().item()


def test_cross_entropy_is_the_mean_over_what_counts() -> None:
    logits = torch.randn(2, 3, 5, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, IGNORED, 4], [IGNORED, IGNORED, 0]])
    p = logits.float().softmax(-1)
    expected = -torch.stack([p[0, 0, 1], p[0, 2, 4], p[1, 2, 0]]).log().mean()
    torch.testing.assert_close(cross_entropy(logits, labels), expected)
