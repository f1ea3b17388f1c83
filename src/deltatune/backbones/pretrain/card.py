"""The model card, generated from the settings, the texts' index and the log of the run."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

from deltatune.backbones.pretrain.corpus import TokenFile
from deltatune.backbones.pretrain.log import Line, read_log
from deltatune.backbones.pretrain.settings import Settings
from deltatune.files import read_json

WHAT = {
    "next-token": ("decoder (`LlamaForCausalLM`)", "next-token prediction", "text-generation"),
    "span-corruption": ("encoder-decoder (`T5ForConditionalGeneration`)", "span corruption", "text2text-generation"),
}


def model_card(settings: Settings, out: Path, parameters: int) -> str:
    """Markdown: what the model is, what it read and under which licences, how good it is, how to remake it."""
    corpus, lines = read_json(out / "corpus.json"), read_log(out / "log.jsonl")
    architecture, objective, tag = WHAT[settings.objective.name]
    sections = [
        f"---\npipeline_tag: {tag}\nlanguage: en\n---\n\n# {settings.name}",
        f"A small English {architecture} with {parameters:,} parameters (stored in bf16), pre-trained from scratch "
        f"by {objective} with deltatune. It exists to be a real frozen backbone that needs no network: it has learned "
        "spelling, grammar and some collocations, not knowledge, and it should not be used for anything that matters.",
        _network(settings),
        _training(settings, lines),
        _texts(settings, corpus),
        _licence(settings),
        _remake(settings),
    ]
    return "\n\n".join(sections) + "\n"


def _network(settings: Settings) -> str:
    model, stacks = settings.model, "" if settings.causal else " in each stack"
    begin = (
        "text begins with `<bos>` 1" if settings.causal else "text ends with `<eos>`, the decoder starts with `<pad>`"
    )
    return (
        f"Width {model.width}, {model.layers} layers{stacks}, {model.heads} heads"
        + (f" ({model.kv_heads} for keys and values)" if settings.causal else "")
        + f", feed-forward {model.ffn}, context {model.context}, tied embeddings. Byte-level BPE with "
        f"{settings.tokenizer.size:,} tokens; `<pad>` 0, `<eos>` 2; {begin}."
    )


def _training(settings: Settings, lines: list[Line]) -> str:
    steps = [line for line in lines if "loss" in line]
    validations = [line for line in lines if "validation" in line]
    train = settings.train
    if not steps:
        return "## Training\n\nNot begun."
    last = steps[-1]
    progress = f"{last['step']:,} of {train.steps:,} steps" if last["step"] < train.steps else f"{train.steps:,} steps"
    text = (
        f"## Training\n\n{progress} of {train.batch} rows, {last['tokens']:,} tokens of text, "
        f"{last['seconds'] / 60:.0f} minutes on {_hardware()}; optimiser {train.optimizer}, "
        f"learning rate {train.lr:g}, {train.precision}, torch {torch.__version__}."
    )
    if not validations:
        return text
    return text + "\n\n" + _validation(validations[-1])


def _validation(line: Line) -> str:
    outcome: dict[str, Any] = line["validation"]
    size = f", {outcome['bits_per_byte']:.3f} bits a byte" if "bits_per_byte" in outcome else ""
    rows = "\n".join(f"| {name} | {loss:.3f} |" for name, loss in outcome["texts"].items())
    return (
        f"Validation loss on held-out documents at step {line['step']:,}: **{outcome['loss']:.3f} nats a token{size}** "
        f"({outcome['targets']:,} targets, the texts in the proportions of training).\n\n"
        f"| text | nats a token |\n|---|---|\n{rows}"
    )


def _texts(settings: Settings, corpus: dict[str, Any]) -> str:
    counts = {file.text: file for file in (TokenFile(**entry) for entry in corpus["files"]) if file.split == "train"}
    rows = [
        f"| {text['name']} | {counts[text['name']].tokens:,} | {settings.text(text['name']).repeat:g} | "
        f"{text['origin']} | {text['licence']} |"
        for text in corpus["texts"]
    ]
    head = "| text | tokens | times in a pass | origin | licence |\n|---|---|---|---|---|\n"
    return "## Texts\n\nDocuments were shuffled and packed; a share was held out.\n\n" + head + "\n".join(rows)


def _licence(settings: Settings) -> str:
    stated = f"The weights are published under {settings.licence}. " if settings.licence else ""
    return (
        f"## Licence and attribution\n\n{stated}They were trained on the texts above, whose authors are hereby "
        "credited, each under its own licence; the texts themselves are not part of this folder."
    )


def _remake(settings: Settings) -> str:
    content = json.dumps(settings.to_json(), indent=1)
    return (
        "## How to make it again\n\n"
        f"    deltatune pretrain studies/pretrain/{settings.name}.toml --text TEXTS --out FOLDER\n\n"
        f"with the folder of texts for TEXTS. All settings, defaults included:\n\n```json\n{content}\n```"
    )


def _hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU thread{'s' if torch.get_num_threads() > 1 else ''} ({platform.machine()})"
