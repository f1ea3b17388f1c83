"""Every kind of broken model folder or wrong name: the error says what was found and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deltatune.backbones import load
from deltatune.errors import DeltaTuneError
from tests import tiny
from tests.backbones.folders import Save, edit


@pytest.mark.parametrize("keep", [4, 1000, -100])
def test_truncated_weights_name_the_file(keep: int, save: Save) -> None:
    path = save("small", tiny.llama()) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DeltaTuneError, match=rf"{path} is not a whole safetensors file"):
        load("small")


def test_pickled_weights_are_refused_with_the_way_to_convert_them(save: Save) -> None:
    model = tiny.llama()
    folder = save("small", model)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(DeltaTuneError, match=r"pytorch_model.bin, a pickle.*save_pretrained"):
        load("small")


def test_a_pickle_under_the_name_of_safetensors_is_refused(save: Save) -> None:
    model = tiny.llama()
    torch.save(model.state_dict(), save("small", model) / "model.safetensors")
    with pytest.raises(DeltaTuneError, match="not a whole safetensors file"):
        load("small")


def test_code_in_the_folder_never_runs(save: Save) -> None:
    folder = save("small", tiny.llama())
    (folder / "modeling_own.py").write_text("raise SystemExit('the code ran')\n")
    classes = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    edit(folder / "config.json", model_type="own", auto_map=classes)
    with pytest.raises(DeltaTuneError, match=r"cannot build a 'own'.*never runs"):
        load("small")
    edit(folder / "config.json", model_type="llama")
    assert type(load("small").model).__name__ == "LlamaForCausalLM"


def test_weights_that_lack_the_head_are_an_error(save: Save) -> None:
    save("small", tiny.bert().bert)
    with pytest.raises(DeltaTuneError, match=r"lack \d+ tensors of BertForMaskedLM, among them cls"):
        load("small")


def test_weights_of_another_shape_are_an_error(save: Save) -> None:
    edit(save("small", tiny.llama()) / "config.json", intermediate_size=40)
    with pytest.raises(DeltaTuneError, match=r"do not fit its config\.json"):
        load("small")


def test_a_model_that_is_no_language_model_is_an_error(save: Save) -> None:
    from transformers import ViTConfig, ViTModel

    save(
        "small",
        ViTModel(
            ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32)
        ),
    )
    with pytest.raises(DeltaTuneError, match="'vit', which is not a language model"):
        load("small")


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not JSON"), ("{}", "names no model_type"), ('{"model_type": "lama"}', "cannot build a 'lama'")],
)
def test_a_bad_config_is_an_error(content: str, message: str, save: Save) -> None:
    (save("small", tiny.llama()) / "config.json").write_text(content)
    with pytest.raises(DeltaTuneError, match=message):
        load("small")


def test_missing_tokenizer_files_are_an_error(save: Save) -> None:
    folder = save("small", tiny.llama())
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(DeltaTuneError, match="has no tokenizer files"):
        load("small")


@pytest.mark.parametrize(("content", "message"), [("", "cannot be read"), (None, "cannot be read|has no vocabulary")])
def test_a_broken_tokenizer_is_an_error(content: str | None, message: str, save: Save) -> None:
    path = save("small", tiny.llama()) / "tokenizer.json"
    path.write_text(content) if content is not None else path.unlink()
    with pytest.raises(DeltaTuneError, match=message):
        load("small")


def test_an_adapter_folder_is_not_a_backbone(save: Save, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(DeltaTuneError, match=r"no config.json.*an adapter, a delta"):
        load(str(tmp_path / "adapter"))
    (save("small", tiny.llama()) / "adapter_config.json").write_text("{}")
    with pytest.raises(DeltaTuneError, match="holds an adapter"):
        load("small")


@pytest.mark.parametrize("name", ["./smal", "/no/such/folder", "a/b/c", "~/no-such-folder", "smal!", ""])
def test_a_name_that_cannot_be_on_the_hub_lists_the_known_ones(name: str, save: Save) -> None:
    save("small", tiny.llama())
    with pytest.raises(DeltaTuneError, match=r"there is no backbone.*Known here: small"):
        load(name)
