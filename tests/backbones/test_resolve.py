"""Finding the backbone in what the user holds: task heads, modules around it, several of them, none at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from torch import nn

import deltatune.backbones  # registers the resolver
from deltatune.core.site import Anatomy, Place, anatomy
from tests import tiny


def places(found: Anatomy, role: str) -> list[Place]:
    return [place for place in found.places if place.role == role]


@pytest.mark.parametrize(
    ("build", "task", "prefix", "head"),
    [
        (tiny.llama, "LlamaModel", "layers", None),
        (tiny.llama, "LlamaForSequenceClassification", "model.layers", "score"),
        (tiny.llama, "LlamaForQuestionAnswering", "transformer.layers", "qa_outputs"),
        (tiny.bert, "BertForSequenceClassification", "bert.encoder.layer", "classifier"),
        (tiny.bert, "BertForPreTraining", "bert.encoder.layer", "cls.predictions.decoder"),
        (tiny.electra, "ElectraForPreTraining", "electra.encoder.layer", "discriminator_predictions"),
        (tiny.t5, "T5Model", "encoder.block", None),
        (tiny.t5, "T5EncoderModel", "encoder.block", None),
        (tiny.t5, "T5ForSequenceClassification", "transformer.encoder.block", "classification_head"),
        (tiny.bart, "BartForCausalLM", "model.decoder.layers", "lm_head"),
        (tiny.opt, "OPTModel", "decoder.layers", None),
    ],
)
def test_the_base_model_is_found_inside_task_heads(build: Any, task: str, prefix: str, head: str | None) -> None:
    model = getattr(transformers, task)(build().config)
    found = anatomy(model)
    assert found.stacks[0].path == prefix
    assert [place.path for place in places(found, "head")] == ([head] if head else [])
    assert len(places(found, "attn.q")) == sum(stack.layers for stack in found.stacks)


def test_a_model_inside_a_users_module_is_found_with_its_full_paths() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = tiny.bert()
            self.out = nn.Linear(tiny.WIDTH, 2)

    found = anatomy(Classifier())
    assert found.stacks[0].path == "body.bert.encoder.layer"
    assert places(found, "embed")[0].path == "body.bert.embeddings.word_embeddings"


def test_the_language_model_inside_a_multimodal_one_is_found() -> None:
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=16
    )
    config = transformers.LlavaConfig(text_config=tiny.llama().config, vision_config=vision)
    found = anatomy(transformers.LlavaForConditionalGeneration(config))
    assert [stack.path for stack in found.stacks] == ["model.language_model.layers"]
    assert [place.path for place in places(found, "head")] == ["lm_head"]


def test_a_model_that_no_table_knows_has_no_roles() -> None:
    found = anatomy(tiny.plain())
    assert (found.family, found.stacks, found.places) == ("Plain", (), ())


def test_two_backbones_in_one_module_are_ambiguous() -> None:
    both = nn.ModuleDict({"left": tiny.bert(), "right": tiny.bert()})
    assert anatomy(both).places == ()


def test_importing_backbones_does_not_import_transformers() -> None:
    code = "import sys, deltatune.backbones; sys.exit('transformers' in sys.modules)"
    source = str(Path(deltatune.__file__).parents[1])
    assert (
        subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": source}, check=False).returncode
        == 0
    )
