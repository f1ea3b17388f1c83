"""The loss of the tokens that are asked for: the loss and the gradients of all logits, without them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import deltatune as dt
from deltatune.core.recompute import recompute
from deltatune.core.site import anatomy
from deltatune.tuning import loss as losses
from deltatune.tuning import tokens
from deltatune.tuning.encode import IGNORED
from deltatune.tuning.loss import TokenLoss, cross_entropy, make_loss
from deltatune.tuning.widths import Widths
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


def padded(name: str, delta: Any) -> tuple[Any, Any, dict[str, Tensor]]:
    """A model, a delta on it, and two rows of 24 and 4 tokens."""
    model, attachment, _ = prepared(name, delta)
    ids = torch.randint(3, tiny.VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(24) < torch.tensor([[24], [4]])
    labels = torch.where(mask & (torch.arange(24) % 3 != 0), ids, IGNORED)
    return model, attachment, {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


@contextmanager
def seen(model: Any) -> Iterator[list[int]]:
    """How many tokens come to the first feed-forward layer of the stack that reads the input, at each of its calls."""
    parts, counts = anatomy(model), []
    up = next(p for p in parts.places if p.role == "ffn.up" and (p.stack, p.layer) == (parts.stacks[0].name, 0))
    module = model.get_submodule(up.path)
    hook = module.register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[:-1].numel()))
    try:
        yield counts
    finally:
        hook.remove()


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "mixtral"])
@pytest.mark.parametrize("totals", [(), (32,)])
def test_feed_forward_layers_see_no_padding(
    name: str, totals: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "FEW", 1)
    model, attachment, batch = padded(name, dt.LoRA(rank=2).at("{attn.{q,v},ffn.down?}") + dt.Adapter(size=4))
    found = make_loss(model, batch, widths=Widths(tokens=totals))
    parameters = list(attachment.parameters())
    with seen(model) as counts:
        results = [(value, torch.autograd.grad(value, parameters)) for value in (found(batch), reference(model, batch))]
    assert counts == [totals[0] if totals else 28, 48]
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_without_padding_nothing_is_left_out(name: str) -> None:
    model, _, batch = padded(name, dt.LoRA(rank=2))
    found, short = make_loss(model, batch), {key: value[:1] for key, value in batch.items()}
    with seen(model) as counts:
        for one in (batch, short):  # twenty tokens of padding are not worth it
            found(one)
    assert counts == [48, 24]


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
@pytest.mark.parametrize(
    "delta", [dt.AtPositions(dt.LoReFT(rank=2), first=2).at("ffn.down"), dt.PromptTuning(length=3)], ids=str
)
def test_where_places_count_every_token_is_seen(name: str, delta: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "FEW", 1)
    model, _, batch = padded(name, delta)
    found = make_loss(model, batch)
    with seen(model) as counts:
        values = found(batch).double(), model(**batch).loss.double()
    assert counts[: len(counts) // 2] == counts[len(counts) // 2 :]
    torch.testing.assert_close(*values, rtol=1e-6, atol=1e-6)


def test_a_recomputed_block_sees_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "FEW", 1)
    model, attachment, batch = padded("llama", dt.LoRA(rank=2))
    expected = torch.autograd.grad(model(**batch).loss, list(attachment.parameters()))
    recompute(attachment, ["model.layers.0"])
    with seen(model) as counts:
        found = torch.autograd.grad(make_loss(model, batch)(batch), list(attachment.parameters()))
    assert set(counts) == {48}
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def kept(loss: Callable[[], Tensor]) -> int:
    """How many bytes a forward pass keeps for its backward pass, each storage once."""
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss()
    return sum(sizes.values())


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_what_is_left_out_is_not_kept_either(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "FEW", 1)
    model, _, batch = padded(name, dt.LoRA(rank=2).at("{attn.{q,v},ffn.{gate?,up,down}}"))
    found = make_loss(model, batch)
    assert isinstance(found, TokenLoss)
    whole = dataclasses.replace(found, reading=dataclasses.replace(found.reading, others=()))
    spared = [ours.numel() for ours in (batch["attention_mask"], batch["attention_mask"].nonzero()[:, 0])]
    layers = len(found.reading.others)
    # what a layer keeps at least: the halves of the product or what goes into the activation, in float64
    assert kept(lambda: whole(batch)) - kept(lambda: found(batch)) >= layers * (spared[0] - spared[1]) * tiny.FFN * 8


def test_tokens_that_are_taken_and_spread_have_second_derivatives() -> None:
    x, index = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.tensor([3, 0])

    def f(x: Tensor) -> Tensor:
        return tokens.Spread.apply(tokens.Taken.apply(x, index).sin(), index, x.shape)  # type: ignore[return-value]

    assert torch.autograd.gradcheck(f, (x,)) and torch.autograd.gradgradcheck(f, (x,))
