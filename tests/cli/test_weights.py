"""`deltatune inspect`, `convert`, `merge` and `diff` on real files."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import deltatune as dt
from deltatune import formats
from tests.laws.cases import busy
from tests.tuning import training

PAIR = dt.LoRA(rank=2).at("attn.{q,v}") + dt.Adapter(size=4).at("ffn.down[1:]")


@dataclass
class Files:
    """A backbone folder, and weights of it by name."""

    folder: Path
    backbone: str
    other: str

    @property
    def model(self):
        return dt.load_backbone(self.backbone).model

    def __getitem__(self, name: str) -> Path:
        return self.folder / name

    def weights(self, name: str) -> dt.Weights:
        return formats.read(self.model, self[name])


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    folder = tmp_path_factory.mktemp("files")
    files = Files(folder, training.write_backbone(folder / "base"), training.write_backbone(folder / "t5", "seq2seq"))
    model = files.model
    made = {
        "pair": PAIR, "lora": dt.LoRA(rank=2), "wide": dt.LoRA(rank=3), "vera": dt.VeRA(rank=4), "bias": dt.BitFit(),
        "nothing": dt.Delta(), "full": dt.Full().at("ffn.down"), "prefix": dt.PrefixTuning(length=3), "head": dt.Full().at("head"),
    }  # fmt: skip
    for seed, (name, delta) in enumerate(made.items()):
        dt.save(busy(dt.init(delta, model, seed), seed), files[name])
    formats.write("peft", model, dt.Weights.read(files["lora"]), files["peft"])
    (folder / "empty").mkdir()
    (folder / "broken").mkdir()
    whole = (files["lora"] / "delta.safetensors").read_bytes()
    (folder / "broken/delta.safetensors").write_bytes(whole[: len(whole) // 2])
    return files


def test_inspect_tells_all_that_the_file_holds(files, call):
    code, shown, _ = call("inspect", files["pair"], "--json")
    said, weights = json.loads(shown), dt.Weights.read(files["pair"])
    assert code == 0 and (said["delta"], said["seed"]) == (str(PAIR), weights.seed)
    assert said["backbone"] == weights.backbone.to_json() and said["fits"] is None
    assert (said["parameters"], said["bytes"], said["tensors"]) == (weights.count, weights.nbytes, len(weights.held))
    entries = {
        f"{index}.{address}.{entry['leaf']}": entry
        for index, term in enumerate(said["terms"])
        for address, own in term["sites"].items()
        for entry in own
    }
    assert entries.keys() == weights.held.keys()
    for name, tensor in weights.held.items():
        assert entries[name]["shape"] == list(tensor.shape)
        assert entries[name]["norm"] == pytest.approx(float(tensor.norm()), rel=1e-6)
    assert [term["where"] for term in said["terms"]] == ["attn.{q,v}", "ffn.down[1:]"]


def test_inspect_draws_the_same_as_a_tree(files, call):
    code, shown, _ = call("inspect", files["pair"], "--on", files.backbone)
    assert code == 0
    weights = dt.Weights.read(files["pair"])
    parts = ["LoRA(rank=2) at attn.{q,v}", "model.layers.1.self_attn.v_proj", "2 x 16", weights.backbone.structure]
    for part in [*parts, f"{weights.count:,} trained parameters", f"fits  yes ({files.backbone})"]:
        assert part in shown
    assert "no: the weights were made for another backbone" in call("inspect", files["pair"], "--on", files.other)[1]
    code, shown, _ = call("inspect", files["vera"])
    assert "not trained" not in shown and "follow" not in shown


def test_a_delta_of_nothing_is_shown_as_such(files, call):
    assert "0 sites, 0 tensors, 0 trained parameters" in call("inspect", files["nothing"])[1]


def test_inspect_reads_other_libraries_with_their_backbone(files, call):
    said = json.loads(call("inspect", files["peft"], "--on", files.backbone, "--json")[1])
    assert said["parameters"] == dt.Weights.read(files["lora"]).count and said["fits"] == "yes"


def test_convert_to_another_library_and_back_is_the_same(files, call, tmp_path):
    on = ("--on", files.backbone)
    assert call("convert", files["lora"], tmp_path / "peft", "--to", "peft", *on)[0] == 0
    assert {path.name for path in (tmp_path / "peft").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert call("convert", tmp_path / "peft", tmp_path / "back", *on)[0] == 0
    for name, distance in dt.compare(
        dt.Weights.read(tmp_path / "back"), dt.Weights.read(files["lora"])
    ).modules.items():
        assert distance.relative < 1e-6, name


def test_convert_to_a_lora_prints_the_error_of_every_parameter(files, call, tmp_path):
    code, shown, _ = call("convert", files["vera"], tmp_path / "lora", "--lora", "4", "--on", files.backbone)
    result, report = dt.to_lora(files.model, dt.Weights.read(files["vera"]), 4)
    assert code == 0 and str(result.delta) in shown
    for name, error in report.errors.items():
        assert f"{name}   {error:.2e}".split() in [line.split() for line in shown.splitlines()]
    made = dt.Weights.read(tmp_path / "lora")
    assert made.delta == result.delta and all(torch.equal(made.tensors[n], t) for n, t in result.tensors.items())


def test_a_lora_made_of_another_method_goes_to_other_libraries_too(files, call, tmp_path):
    options = ("--lora", "4", "--to", "peft", "--on", files.backbone)
    code, shown, message = call("convert", files["vera"], tmp_path / "peft", *options)
    assert code == 0 and "as peft" in shown, message
    model, wanted = files.model, dt.changes(files.model, dt.Weights.read(files["vera"]))
    for name, change in dt.changes(model, formats.read(model, tmp_path / "peft")).items():
        assert (change - wanted[name]).norm() < 1e-6 * wanted[name].norm()


def merged(files: Files, folder: Path) -> dict[str, torch.Tensor]:
    return dict(dt.load_backbone(str(folder)).model.named_parameters())


@pytest.mark.parametrize("name", ["lora", "peft", "full", "vera"])
def test_merge_writes_a_backbone_that_computes_what_the_attached_one_did(files, call, tmp_path, name):
    code, shown, message = call("merge", files.backbone, files[name], tmp_path / "out")
    assert code == 0, message
    model, weights = files.model, files.weights(name)
    plain = dt.load_backbone(str(tmp_path / "out")).model
    with dt.attach(model, weights), torch.no_grad():
        ids = torch.arange(5, 12)[None]
        torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)
    for path, tensor in dt.merge(model, weights).items():
        torch.testing.assert_close(plain.get_parameter(path), tensor, rtol=0, atol=0)
        assert path in shown
    for path in Path(files.backbone).glob("*token*"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert json.loads((tmp_path / "out/merged.json").read_text())["deltas"] == [
        {"delta": str(weights.delta), "weight": 1.0}
    ]


def test_merge_says_what_rounding_costs_and_refuses_above_the_tolerance(files, call, tmp_path):
    small = files.weights("lora")
    dt.save(dt.Weights(small.delta, {n: t / 30 for n, t in small.tensors.items()}, small.backbone), tmp_path / "small")
    words = ("merge", files.backbone, tmp_path / "small", tmp_path / "out", "--dtype", "bfloat16")
    code, shown, message = call(*words)
    assert code == 2 and "more than the tolerance 0.05: bfloat16 cannot hold it; write --dtype float32" in message
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    code, shown, _ = call(*words, "--tolerance", "1e9")
    assert code == 0
    before, after = files.model, load_file(tmp_path / "out/model.safetensors")
    exact = dt.changes(before, dt.Weights.read(tmp_path / "small"))
    for name, change in exact.items():
        lost = (
            after[name].double() - before.get_parameter(name).detach().bfloat16().double() - change
        ).norm() / change.norm()
        said = next(float(line.split()[1]) for line in shown.splitlines() if line.split()[:1] == [name])
        assert after[name].dtype == torch.bfloat16 and said == pytest.approx(float(lost), rel=0.05)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_a_backbone_keeps_the_dtype_that_it_is_stored_in(files, call, tmp_path):
    half = shutil.copytree(files.backbone, tmp_path / "half")
    tensors = {n: t.bfloat16() for n, t in load_file(half / "model.safetensors").items()}
    save_file(tensors, half / "model.safetensors", {"format": "pt"})
    weights = busy(dt.init(dt.LoRA(rank=2), dt.load_backbone(str(half)).model), size=1.0)
    dt.save(weights, tmp_path / "weights")
    code, _, message = call("merge", half, tmp_path / "weights", tmp_path / "out")
    assert code == 0, message
    assert {t.dtype for t in load_file(tmp_path / "out/model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("how", ["linear", "ties", "dare", "prune"])
def test_merge_combines_several_by_the_arithmetic_of_the_library(files, call, tmp_path, how):
    names, options = ("lora", "full"), ("--weight", "0.5", "--weight", "-0.25", "--density", "0.3", "--seed", "4")
    code, _, message = call(
        "merge", files.backbone, *(files[n] for n in names), tmp_path / "out", "--combine", how, *options
    )
    assert code == 0, message
    model, each, factors = files.model, [files.weights(n) for n in names], [0.5, -0.25]
    wanted = {
        "linear": lambda: dt.task_arithmetic(model, each, factors),
        "ties": lambda: dt.ties(model, each, factors, 0.3),
        "dare": lambda: dt.dare(model, each, factors, 0.3, 4),
        "prune": lambda: dt.magnitude_prune(model, each, factors, 0.3),
    }[how]()[0]
    found = merged(files, tmp_path / "out")
    for path, tensor in dt.merge(model, wanted).items():
        torch.testing.assert_close(found[path], tensor, rtol=0, atol=0)


def test_merge_unties_what_is_shared_only_when_told(call, tmp_path):
    from tests.tuning import backbones

    tied = backbones.causal()
    tied.model.config.tie_word_embeddings = True
    tied.model.tie_weights()
    tied.model.save_pretrained(tmp_path / "base")
    tied.tokenizer.save_pretrained(tmp_path / "base")
    model = dt.load_backbone(str(tmp_path / "base")).model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    weights = busy(dt.init(dt.LoRA(rank=2).at("head"), model))
    dt.save(weights, tmp_path / "head")
    words = ("merge", tmp_path / "base", tmp_path / "head", tmp_path / "out")
    code, _, message = call(*words)
    assert code == 2 and "lm_head.weight is shared" in message and not (tmp_path / "out").exists()
    assert call(*words, "--untie")[0] == 0
    again = dt.load_backbone(str(tmp_path / "out")).model
    with dt.attach(model, weights), torch.no_grad():
        ids = torch.arange(5, 12)[None]
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)


def test_diff_prints_the_distance_of_every_module(files, call):
    found = dt.compare(files.weights("lora"), files.weights("wide"))
    said = json.loads(call("diff", files["lora"], files["wide"], "--json")[1])
    assert said["by"] == "changes" and said["modules"].keys() == found.modules.keys()
    for name, distance in found.modules.items():
        assert said["modules"][name]["distance"] == distance.distance
        assert said["modules"][name]["inputs"] == list(distance.inputs)
    code, shown, _ = call("diff", files["lora"], files["wide"])
    assert code == 0 and all(name in shown for name in found.modules) and f"{found.total.relative:.3f}" in shown
    assert call("diff", files["lora"], files["peft"], "--on", files.backbone)[0] == 0
    assert (
        "model.layers.0.mlp.down_proj.weight" in call("diff", files["vera"], files["full"], "--on", files.backbone)[1]
    )


MISTAKES = [
    (("inspect", "{none}"), ("there is no file", "Give the folder")),
    (("inspect", "{empty}"), ("holds nothing", "Give the folder that deltatune saved to")),
    (("inspect", "{broken}"), ("not a whole safetensors file",)),
    (("inspect", "{base}"), ("holds config.json",)),
    (("inspect", "{peft}"), ("is a folder of peft", "--on BACKBONE")),
    (("inspect", "someone/gone"), ("no file or folder 'someone/gone' here", "local cache (HF_HOME)")),
    (("inspect", "{lora}", "--on", "peble"), ("there is no backbone 'peble'", "'pebble'")),
    (("convert", "{lora}", "{out}", "--to", "pefd", "--on", "{base}"), ("no format 'pefd'", "'peft'", "Known are")),
    (("convert", "{lora}", "{out}", "--to", "peft"), ("name the backbone with --on",)),
    (("convert", "{none}", "{out}", "--to", "peft", "--on", "{base}"), ("there is no file",)),
    (("convert", "{lora}", "{out}", "--to", "peft", "--on", "{t5}"), ("made for another backbone",)),
    (("convert", "{vera}", "{out}", "--lora", "1", "--on", "{base}"), ("off by", "rank=")),
    (("convert", "{prefix}", "{out}", "--lora", "8", "--on", "{base}"), ("no change of a weight",)),
    (("convert", "{lora}", "{full}", "--to", "peft", "--on", "{base}"), ("is there already",)),
    (("merge", "{base}", "{prefix}", "{out}"), ("PrefixTuning", "cannot be merged", "Keep it attached")),
    (("merge", "{base}", "{bias}", "{out}"), ("BitFit() gives", "a bias")),
    (("merge", "{t5}", "{lora}", "{out}"), ("made for another backbone",)),
    (("merge", "{base}", "{lora}", "{wide}", "{out}"), ("write --combine and one of linear, prune, ties, dare",)),
    (("merge", "{base}", "{lora}", "{wide}", "{out}", "--combine", "tise"), ("'tise'", "'ties'")),
    (("merge", "{base}", "{lora}", "{wide}", "{out}", "--combine", "ties", "--weight", "1"), ("2 weights and 1 factors",)),
    (("merge", "{base}", "{lora}", "{wide}", "{out}", "--combine", "ties", "--density", "0"), ("density=0.0",)),
    (("merge", "{base}", "{lora}", "{out}", "--dtype", "float17"), ("no dtype 'float17'", "'float16'")),
    (("merge", "{base}", "{lora}", "{full}"), ("is there already",)),
    (("diff", "{lora}", "{none}"), ("there is no file",)),
    (("diff", "{lora}", "{vera}"), ("are unlike", "name the backbone")),
    (("diff", "{lora}", "{prefix}", "--on", "{base}"), ("no change of a weight",)),
    (("diff", "{lora}", "{wide}", "--on", "{t5}"), ("made for another backbone",)),
]  # fmt: skip


@pytest.mark.parametrize(("words", "said"), MISTAKES, ids=lambda value: " ".join(value))
def test_a_mistake_is_named_with_its_cure_and_nothing_is_written(files, call, words, said, tmp_path):
    places = {path.name: path for path in files.folder.iterdir()} | {"out": tmp_path / "out", "none": tmp_path / "none"}
    before = sorted(files.folder.rglob("*"))
    code, _, message = call(*(word.format(**places) for word in words))
    assert code == 2, message
    assert all(part in " ".join(message.split()) for part in said), message
    assert not list(tmp_path.iterdir()) and sorted(files.folder.rglob("*")) == before
