"""The Hugging Face hub: weights from its cache layout without a network, and what is sent there, at the client's boundary."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml

import deltatune as dt
from deltatune import formats
from tests import tiny
from tests.laws.cases import busy, output

huggingface_hub = pytest.importorskip("huggingface_hub", reason="needs the hub extra: pip install 'deltatune[hub]'")
DELTA = dt.LoRA(rank=2) + dt.VeRA(rank=4).at("ffn.down")


@pytest.fixture
def model():
    return tiny.llama()


@pytest.fixture
def weights(model):
    return busy(dt.init(DELTA, model, 3))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache that holds what it is given, as the client lays it out, and a client that is offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def put(name: str, folder: Path) -> Path:
        repository, commit = tmp_path / "hub" / f"models--{name.replace('/', '--')}", "a1" * 20
        snapshot = repository / "snapshots" / commit
        for kind in ("blobs", "refs"):
            (repository / kind).mkdir(parents=True)
        snapshot.mkdir(parents=True)
        for path in folder.iterdir():
            shutil.copyfile(path, repository / "blobs" / path.name)
            (snapshot / path.name).symlink_to(repository / "blobs" / path.name)
        (repository / "refs/main").write_text(commit)
        return snapshot

    return put


@pytest.mark.parametrize("form", ["deltatune", "peft"])
def test_weights_are_loaded_by_name_from_the_cache(form, model, cache, tmp_path):
    weights = busy(dt.init(dt.LoRA(rank=2).at("attn.{q,v}"), model))
    formats.write(form, model, weights, tmp_path / "saved")
    cache("someone/sst2", tmp_path / "saved")
    with dt.attach(model, weights), torch.no_grad():
        wanted = output(model)
    with dt.load(model, "someone/sst2"), torch.no_grad():
        torch.testing.assert_close(output(model), wanted, rtol=0, atol=0)


@pytest.fixture
def remote(cache, tmp_path, monkeypatch):
    """A hub that puts into the cache what a client's patterns let through, and a list of what it sent."""
    folders: dict[str, Path] = {}
    sent: list[str] = []

    def download(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        names = [path.relative_to(folders[name]).as_posix() for path in folders[name].rglob("*") if path.is_file()]
        sent.extend(
            huggingface_hub.utils.filter_repo_objects(
                names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
            )
        )
        part = tmp_path / "part"
        for file in sent:
            (part / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folders[name] / file, part / file)
        shutil.rmtree(tmp_path / "hub", ignore_errors=True)
        return str(cache(name, part))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return folders, sent


def test_a_folder_of_opendelta_comes_whole_though_its_tensors_are_called_as_a_model_s(model, remote, tmp_path):
    folders, sent = remote
    weights = busy(dt.init(dt.LoRA(rank=2).at("attn.{q,v}"), model))
    formats.write("opendelta", model, weights, tmp_path / "saved")
    folders["someone/sst2"] = tmp_path / "saved"
    with dt.attach(model, weights), torch.no_grad():
        wanted = output(model)
    with dt.load(model, "someone/sst2"), torch.no_grad():
        torch.testing.assert_close(output(model), wanted, rtol=0, atol=0)
    assert {*sent} == {"config.json", "pytorch_model.bin"}


def test_a_whole_model_is_not_fetched_where_a_delta_is_meant(model, weights, remote, tmp_path):
    folders, sent = remote
    dt.save(weights, tmp_path / "saved")
    for name in ("pytorch_model.bin", "model.safetensors", "epoch/delta.safetensors", "config.json"):
        (tmp_path / "saved" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "saved" / name).write_text("{}")
    folders["someone/sst2"] = tmp_path / "saved"
    assert formats.read(model, "someone/sst2").spec() == weights.spec()
    assert sorted(sent) == ["config.json", "delta.json", "delta.safetensors"]


def test_what_is_there_under_the_name_comes_first(model, weights, cache, tmp_path, monkeypatch):
    dt.save(dt.init(DELTA, model), tmp_path / "other")
    cache("someone/sst2", tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    dt.save(weights, "someone/sst2")
    assert formats.read(model, "someone/sst2").spec() == weights.spec() != formats.read(model, "other").spec()


def test_a_name_that_is_not_in_the_cache_is_explained(model, cache):
    with pytest.raises(
        dt.DeltaTuneError, match=r"no file or folder 'someone/gone' here, and the .* hub did not give one"
    ):
        dt.load(model, "someone/gone")
    with pytest.raises(dt.DeltaTuneError, match="no file"):
        dt.load(model, "./someone/gone")


class Client:
    """Stands in for `HfApi`: keeps what would be sent."""

    sent: dict[str, bytes]

    def __init__(self, calls):
        self.calls = calls

    def create_repo(self, name, private, exist_ok):
        self.calls.append(("create", name, private, exist_ok))
        return f"hub:{name}"

    def upload_folder(self, repo_id, folder_path, commit_message):
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        self.calls.append(("upload", repo_id, commit_message, files))


@pytest.fixture
def calls(monkeypatch):
    calls: list[tuple] = []
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Client(calls))
    return calls


def test_push_sends_the_weights_and_a_card(model, weights, calls, tmp_path):
    with dt.attach(model, weights) as attachment:
        assert dt.push(attachment, "me/topic", model="org/base", license="apache-2.0", private=True) == "hub:me/topic"
    (created, uploaded) = calls
    assert created == ("create", "me/topic", True, True) and uploaded[:3] == ("upload", "me/topic", "Upload a delta")
    files = uploaded[3]
    assert files.keys() == {"delta.safetensors", "delta.json", "README.md"}
    (tmp_path / "delta.safetensors").write_bytes(files["delta.safetensors"])
    again = dt.Weights.read(tmp_path)
    assert again.spec() == weights.spec() and all(torch.equal(again.held[n], t) for n, t in weights.held.items())
    text = files["README.md"].decode()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "org/base",
        "library_name": "deltatune",
        "license": "apache-2.0",
        "tags": ["delta-tuning", "parameter-efficient-fine-tuning", "lora", "vera"],
    }
    assert huggingface_hub.ModelCard(text).data.base_model == "org/base"
    table = dt.sites(model, DELTA)
    assert f"trains {table.parameters:,} parameters, {weights.nbytes:,} bytes" in body
    lora, vera = [line for line in body.splitlines() if line.startswith("| `")]
    assert lora == "| `LoRA(rank=2)` | `{attn.{q,v},cross.{q,v}?}` | 6 | 672 |" and "`ffn.down` | 3 |" in vera
    for part in ("dt.load(backbone.model, 'me/topic')", "dt.load_backbone('org/base')", weights.backbone.structure):
        assert part in body


def test_what_was_pushed_is_loaded_by_its_name(model, weights, calls, cache, tmp_path):
    dt.push(weights, "me/topic")
    (tmp_path / "sent").mkdir()
    for name, content in calls[1][3].items():
        (tmp_path / "sent" / name).write_bytes(content)
    cache("me/topic", tmp_path / "sent")
    assert formats.read(model, "me/topic").spec() == weights.spec()
    front = yaml.safe_load((tmp_path / "sent/README.md").read_text().split("---\n")[1])
    assert front.keys() == {"library_name", "tags"}, "a local backbone and no licence are left out"


def test_a_name_that_is_none_and_a_hub_that_refuses_are_explained(weights, cache, tmp_path):
    for name in ("topic", "a/b/c", "./me/topic", "me/", ""):
        with pytest.raises(dt.DeltaTuneError, match="no name of the Hugging Face hub; write user/name"):
            dt.push(weights, name)
    with pytest.raises(dt.DeltaTuneError, match=r"the Hugging Face hub did not take 'me/topic'.*hf auth login"):
        dt.push(weights, "me/topic")  # the client is offline
