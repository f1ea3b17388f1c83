"""Whole runs, tiny but real: both objectives learn and export, and a killed process ends with the same weights."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from deltatune.backbones.pretrain import Settings, pretrain
from deltatune.backbones.pretrain.log import read_log
from deltatune.errors import DeltaTuneError

Tiny = Callable[..., Settings]
SPANS = {"name": "span-corruption", "prefix_share": 0.5, "prefix": 8, "sentinels": 8}
COMMAND = "import typer; from deltatune.cli.pretrain import pretrain; typer.run(pretrain)"


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def toml(settings: Settings) -> str:
    """The settings as a TOML file; JSON's strings, numbers and booleans are TOML's."""
    tree = settings.to_json()
    lines = [f"{key} = {json.dumps(value)}" for key, value in tree.items() if not isinstance(value, dict)]
    for table in ("tokenizer", "model", "objective", "train"):
        lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in tree[table].items())]
    return "\n".join(lines) + "\n"


def test_next_token_run_learns_and_exports(texts: Path, tiny: Tiny, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    seen: list[dict] = []
    folder = pretrain(tiny(train={"steps": 40}), texts, tmp_path, "cpu", seen.append)
    lines = read_log(tmp_path / "log.jsonl")
    assert lines == seen
    last = lines[-1]["validation"]
    assert last["loss"] < lines[0]["loss"] - 1.0
    assert 0 < last["bits_per_byte"] < 8
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id) == (0, 1, 2)
    assert model.get_input_embeddings().weight is model.lm_head.weight
    batch = tokenizer(["the cat", "a dog sat on the mat"], return_tensors="pt", padding=True)
    assert batch["attention_mask"][0, 0] == 0
    assert model.generate(**batch, max_new_tokens=4).shape[1] == batch["input_ids"].shape[1] + 4
    card = (folder / "README.md").read_text()
    for fact in ("40 steps of 4 rows", "nats a token", "stories", "notes", "deltatune pretrain"):
        assert fact in card


def test_exported_weights_have_the_logged_loss(texts: Path, tiny: Tiny, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from deltatune.backbones.pretrain.corpus import TokenFile
    from deltatune.backbones.pretrain.mixture import Mixture

    settings = tiny(train={"precision": "fp32"})
    folder = pretrain(settings, texts, tmp_path, "cpu")
    logged = read_log(tmp_path / "log.jsonl")[-1]["validation"]
    files = [TokenFile(**entry) for entry in json.loads((tmp_path / "corpus.json").read_text())["files"]]
    held_out = Mixture(tmp_path, files, "held-out", 23, settings)
    windows = torch.from_numpy(held_out.read(0, held_out.rows)[0])
    ids = torch.nn.functional.pad(windows, (1, 0), value=1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(logged["loss"], rel=0.01)
    assert logged["targets"] == windows.numel()


def test_span_corruption_run_learns_and_exports(texts: Path, tiny: Tiny, tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    settings = tiny(objective=SPANS, train={"steps": 40, "optimizer": "adamw-rms", "lr": 0.05})
    folder = pretrain(settings, texts, tmp_path, "cpu")
    lines = read_log(tmp_path / "log.jsonl")
    assert lines[-1]["validation"]["loss"] < lines[0]["loss"] - 0.5
    assert "bits_per_byte" not in lines[-1]["validation"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert tokenizer("the cat")["input_ids"][-1] == tokenizer.eos_token_id == model.config.eos_token_id == 2
    assert tokenizer.convert_tokens_to_ids("<extra_id_7>") == 10
    assert model.config.decoder_start_token_id == tokenizer.pad_token_id == 0
    assert model.generate(**tokenizer("the cat <extra_id_0>", return_tensors="pt"), max_new_tokens=3).shape[0] == 1


@pytest.mark.parametrize("tables", [{}, {"objective": SPANS, "train": {"optimizer": "muon"}}], ids=["llama", "t5"])
def test_killed_process_continues_to_the_same_weights(tables: dict, texts: Path, tiny: Tiny, tmp_path: Path) -> None:
    """SIGKILL at random moments of the real command, then on to the end: the same files, bit for bit."""
    settings = tiny(**tables)
    (tmp_path / "settings.toml").write_text(toml(settings))
    whole = pretrain(settings, texts, tmp_path / "whole", "cpu")
    arguments = [str(tmp_path / "settings.toml"), "--text", str(texts), "--out", str(tmp_path / "killed")]
    rng = random.Random(1)
    for after in (0, 14):
        with running(arguments) as process:
            wait_for_step(process, tmp_path / "killed" / "log.jsonl", after)
            time.sleep(rng.random() * 0.1)
            process.send_signal(signal.SIGKILL)
            assert process.wait(timeout=60) == -signal.SIGKILL
    with running(arguments) as process:
        assert process.wait(timeout=120) == 0
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert sha(tmp_path / "killed" / "model" / name) == sha(whole / name), name
    timeless = [
        [{key: value for key, value in line.items() if key != "seconds"} for line in read_log(folder / "log.jsonl")]
        for folder in (tmp_path / "whole", tmp_path / "killed")
    ]
    assert timeless[0] == timeless[1]


@contextmanager
def running(arguments: list[str]) -> Iterator[subprocess.Popen]:
    """The real command in a process of its own, gone when the block ends."""
    source = Path(__file__).resolve().parents[3] / "src"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(source)}
    command = [sys.executable, "-c", COMMAND, *arguments]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_step(process: subprocess.Popen, log: Path, step: int) -> None:
    end = time.monotonic() + 100
    while time.monotonic() < end:
        assert process.poll() is None, "the command ended before it could be killed"
        if log.exists() and max((line["step"] for line in read_log(log)), default=0) >= step:
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} was never logged")


def test_a_longer_run_equals_one_that_was_long_from_the_start(texts: Path, tiny: Tiny, tmp_path: Path) -> None:
    short = tiny(train={"steps": 8, "decay": 0.01})
    long = tiny(train={"steps": 16, "decay": 0.4})
    pretrain(short, texts, tmp_path / "grown", "cpu")
    grown = pretrain(long, texts, tmp_path / "grown", "cpu")
    whole = pretrain(long, texts, tmp_path / "whole", "cpu")
    assert sha(grown / "model.safetensors") == sha(whole / "model.safetensors")
    steps = [line["step"] for line in read_log(tmp_path / "grown" / "log.jsonl") if line.get("final")]
    assert steps[-1] == 16


def test_a_finished_run_is_left_alone(texts: Path, tiny: Tiny, tmp_path: Path) -> None:
    folder = pretrain(tiny(train={"steps": 8}), texts, tmp_path, "cpu")
    before = {path.name: sha(path) for path in [*folder.iterdir(), tmp_path / "log.jsonl"]}
    pretrain(tiny(train={"steps": 8}), texts, tmp_path, "cpu")
    assert {path.name: sha(path) for path in [*folder.iterdir(), tmp_path / "log.jsonl"]} == before


def test_mistakes_are_explained(texts: Path, tiny: Tiny, tmp_path: Path) -> None:
    pretrain(tiny(train={"steps": 8}), texts, tmp_path / "run", "cpu")
    with pytest.raises(DeltaTuneError, match=r"other settings \(they differ in seed, train.lr\)"):
        pretrain(Settings(**vars(tiny(train={"steps": 8, "lr": 0.1})) | {"seed": 5}), texts, tmp_path / "run", "cpu")
    (tmp_path / "run" / "checkpoint.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(DeltaTuneError, match="is not a checkpoint of this command"):
        pretrain(tiny(train={"steps": 8}), texts, tmp_path / "run", "cpu")
    with pytest.raises(DeltaTuneError, match="--device is 'gpu'; write auto, cpu or cuda"):
        pretrain(tiny(), texts, tmp_path / "other", "gpu")
    with pytest.raises(DeltaTuneError, match=r"lower train\.lr"):
        pretrain(tiny(train={"lr": 1e30, "precision": "fp32"}), texts, tmp_path / "hot", "cpu")
