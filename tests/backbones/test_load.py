"""Loading backbones from real files: names, kinds, dtypes, fresh weights, digests."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deltatune.backbones import digest, load, names, skeleton, source
from deltatune.core.site import anatomy
from deltatune.errors import DeltaTuneError
from tests import tiny
from tests.backbones.folders import Save, edit


@pytest.mark.parametrize("name", ["t5-seed", "stories260k", "babyllama-tok105"])
def test_real_models_load_know_their_anatomy_and_generate(name: str, shared_models: Path) -> None:
    found = load(str(shared_models / name))
    model: Any = found.model
    assert found.kind == ("seq2seq" if name == "t5-seed" else "causal")
    assert not found.model.training
    assert {parameter.dtype for parameter in found.model.parameters()} == {torch.float32}
    stacks = anatomy(found.model).stacks
    assert len(stacks) == (2 if found.kind == "seq2seq" else 1)
    batch = found.tokenizer(["Once upon a time"], return_tensors="pt", return_token_type_ids=False)
    given = batch["input_ids"].shape[1] if found.kind == "causal" else 1
    made = model.generate(**batch, min_new_tokens=4, max_new_tokens=4, do_sample=False)
    assert made.shape == (1, given + 4)
    assert found.tokenizer.decode(made[0, given:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", sorted(path.parent.name for path in source.BUILTIN.glob("*/config.json")))
def test_built_in_backbones_load_by_name(name: str) -> None:
    assert name in names()
    found = load(name)
    assert found.digest == digest(str(source.BUILTIN / name))
    model: Any = found.model
    assert len(found.tokenizer) <= model.get_input_embeddings().num_embeddings
    assert {place.role for place in anatomy(model).places} >= {"attn.q", "attn.v", "ffn", "head"}


def test_real_weights_arrive_unchanged(shared_models: Path) -> None:
    from safetensors.torch import load_file

    folder = shared_models / "t5-seed"
    model, stored = load(str(folder)).model, load_file(folder / "model.safetensors")
    held = model.state_dict()
    assert len(stored) > 50
    assert all(torch.equal(held[key], tensor.float()) for key, tensor in stored.items() if key in held)
    assert torch.equal(held["shared.weight"], stored["shared.weight"].float())


@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (tiny.llama, "causal"),
        (tiny.gpt2, "causal"),
        (tiny.t5, "seq2seq"),
        (tiny.bart, "seq2seq"),
        (tiny.bert, "masked"),
    ],
)
def test_the_kind_and_the_weights_come_from_the_folder(build: Any, kind: str, save: Save) -> None:
    model = build()
    save("small", model)
    found = load("small")
    assert (found.name, found.kind, type(found.model).__name__) == ("small", kind, type(model).__name__)
    batch = tiny.batch(model)
    assert torch.equal(found.model(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize(("build", "kind"), [(tiny.bert, "masked"), (tiny.gpt2, "causal"), (tiny.t5, "seq2seq")])
def test_without_architectures_the_model_type_decides(build: Any, kind: str, save: Save) -> None:
    edit(save("small", build()) / "config.json", architectures=None)
    assert load("small").kind == kind


def test_the_architecture_goes_before_the_model_type(save: Save) -> None:
    from transformers import BertLMHeadModel

    config = tiny.bert().config
    config.is_decoder = True
    save("small", BertLMHeadModel(config))
    assert load("small").kind == "causal"


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("float32", torch.float32), ("bf16", torch.bfloat16), ("bfloat16", torch.bfloat16), ("fp16", torch.float16)],
)
@pytest.mark.parametrize("prefix", ["", "random:"])
def test_dtype_is_that_of_every_parameter(dtype: str, expected: torch.dtype, prefix: str, save: Save) -> None:
    save("small", tiny.llama())
    assert {parameter.dtype for parameter in load(f"{prefix}small", dtype).model.parameters()} == {expected}


def test_an_unknown_dtype_is_an_error_with_the_nearest(save: Save) -> None:
    save("small", tiny.llama())
    with pytest.raises(DeltaTuneError, match=r"no dtype 'float23'.*'float32'"):
        load("small", "float23")


def test_random_weights_are_fixed_and_leave_the_global_generator_alone(save: Save) -> None:
    model = tiny.llama()
    save("small", model)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = load("random:small")
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(6)
    second = load("random:small")
    held, again = first.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(held[key], again[key]) for key in held)
    drawn = {key: tensor for key, tensor in model.state_dict().items() if tensor.dim() > 1}
    assert set(held) == set(model.state_dict())
    assert not any(torch.equal(held[key], tensor) for key, tensor in drawn.items())
    assert first.tokenizer.get_vocab() == load("small").tokenizer.get_vocab()
    assert first.model.generation_config.eos_token_id == 2


def test_loading_pretrained_weights_leaves_the_global_generator_alone(save: Save) -> None:
    save("small", tiny.bert())
    before = torch.get_rng_state()
    load("small")
    assert torch.equal(before, torch.get_rng_state())


def test_random_needs_no_weights(save: Save) -> None:
    (save("small", tiny.llama()) / "model.safetensors").unlink()
    assert load("random:small").kind == "causal"
    assert len(digest("random:small")) == 64


def test_the_digest_changes_with_config_and_weights_and_nothing_else(save: Save) -> None:
    folder = save("small", tiny.llama())
    first, fresh = digest("small"), digest("random:small")
    assert load("small").digest == first == digest(str(folder)) != fresh
    (folder / "README.md").write_text("about")
    assert digest("small") == first
    other = save("other", tiny.llama(seed=1))
    assert digest("other") != first
    assert digest("random:other") == fresh
    edit(folder / "config.json", rms_norm_eps=1e-3)
    changed = digest("small")
    assert changed != first and digest("random:small") != fresh
    shutil.copy(other / "model.safetensors", folder / "model.safetensors")
    assert digest("small") != changed


def test_names_lists_built_in_backbones_and_those_of_the_environment(
    save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save("small", tiny.llama())
    assert names() == ["small"]
    monkeypatch.setattr(source, "BUILTIN", folder.parent)
    monkeypatch.delenv("DELTATUNE_MODELS")
    assert names() == ["small"]
    assert load("small").digest == digest(str(folder))


def test_a_skeleton_has_the_shapes_and_no_storage(save: Save) -> None:
    model = tiny.t5()
    (save("small", model) / "model.safetensors").unlink()
    bones = skeleton("small")
    assert {parameter.device.type for parameter in bones.parameters()} == {"meta"}
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert {key: tensor.shape for key, tensor in bones.state_dict().items()} == shapes
    assert anatomy(bones) == anatomy(model)


def test_sharded_weights_load_and_a_missing_shard_is_named(save: Save) -> None:
    model: Any = tiny.llama()
    folder = save("small", model)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    batch = tiny.batch(model)
    assert torch.equal(load("small").model(**batch).logits, model(**batch).logits)
    shards[-1].unlink()
    with pytest.raises(DeltaTuneError, match=f"lacks {shards[-1].name}"):
        load("small")


def test_padding_falls_back_to_the_end_token(save: Save) -> None:
    folder = save("small", tiny.llama())
    edit(folder / "tokenizer_config.json", pad_token=None)
    found = load("small")
    assert (found.tokenizer.pad_token, found.tokenizer.pad_token_id) == ("</s>", 2)
    edit(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(DeltaTuneError, match="neither a padding nor an end token"):
        load("small")


def test_generation_pads_with_the_tokenizers_padding_token(save: Save) -> None:
    model = tiny.llama()
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    save("small", model)
    assert load("small").model.generation_config.pad_token_id == 0


def test_hub_names_load_from_the_cache_and_are_explained_offline(
    save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    folder = save("tyni", tiny.llama())
    commit = "0" * 40
    repository = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = load("org/tiny")
    assert (found.kind, found.digest) == ("causal", digest(str(folder)))
    with pytest.raises(DeltaTuneError, match=r"there is no backbone 'org/tin' here.*local cache \(HF_HOME\)"):
        load("org/tin")
    with pytest.raises(DeltaTuneError, match=r"Did you mean 'tyni'\?"):
        load("tiny")


def test_what_transformers_prints_while_loading_stays_silent_and_its_settings_come_back(
    save: Save, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    save("small", tiny.bert())
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    capfd.readouterr()
    load("small")
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (level, bars)


def test_nothing_of_a_loaded_model_is_shared_between_two_loads(save: Save) -> None:
    save("small", tiny.llama())
    first, second = load("small").model, load("small").model
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(1.0)
    assert not any(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert isinstance(second, nn.Module)
