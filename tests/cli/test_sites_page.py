"""`deltatune sites --html`: a page by itself, whose tree adds up to what the dry run says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

import deltatune as dt
from deltatune.backbones.load import skeleton
from deltatune.cli.structure import page, structure
from tests import tiny
from tests.laws.cases import METHODS, fits

DELTA = 'LoRA(rank=2) + VeRA(rank=4).at("ffn.down") + PrefixTuning(length=3).at("attn[1:]") + Full().at("norm")'


def flat(node: list[Any], path: str = "") -> list[tuple[str, list[Any]]]:
    """Every node of the tree with its path."""
    kids = [kid for inner in node[5] for kid in flat(inner, f"{path}.{inner[0]}".lstrip("."))]
    return [(path, node), *kids]


def size(shape: list[int]) -> int:
    return prod(shape)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "plain"])
def test_the_tree_adds_up_to_the_dry_run(name):
    model = getattr(tiny, name)()
    for method in (m for m in METHODS.values() if fits(m, name)):
        try:
            table = dt.sites(model, method)
        except dt.DeltaTuneError:
            continue
        made = structure(model, table, "bfloat16")
        nodes = dict(flat(made["root"]))
        assert nodes.keys() == {path for path, _ in model.named_modules()}
        own = [size(shape) for node in nodes.values() for _, shape, tied in node[3] if not tied]
        assert sum(own) == table.backbone_parameters
        found = [(path, *site) for path, node in nodes.items() for site in node[4]]
        assert sorted(path for path, *_ in found) == sorted(p.site.path for p in table.placements)
        leaves = [leaf for *_, own in found for leaf in own] + [
            leaf for term in made["terms"] for leaf in term["shared"]
        ]
        assert sum(size(shape) for _, shape, kind in leaves if kind == "trained") == table.parameters
        assert sum(term["trained"] for term in made["terms"]) == table.parameters


def test_roles_ties_and_parts_are_told():
    model = tiny.gpt2()
    made = structure(model, dt.sites(model, dt.LoRA(rank=2) + dt.Full().at("head")), "float32")
    nodes = dict(flat(made["root"]))
    packed = nodes["transformer.h.0.attn.c_attn"]
    assert packed[2] == ["attn.q", "attn.k", "attn.v"] and [note for _, note, _ in packed[4]] == ["q", "v"]
    assert nodes["lm_head"][3] == [["weight", [tiny.VOCABULARY, tiny.WIDTH], "transformer.wte.weight"]]
    assert [note for _, note, _ in nodes["lm_head"][4]] == ["weight, shared with transformer.wte"]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A page of a backbone that is only a config, of 8 billion parameters."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("big")
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    config = LlamaConfig(**sizes, num_attention_heads=32, num_key_value_heads=8, architectures=["LlamaForCausalLM"])
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    return folder


def test_a_page_of_a_large_backbone_needs_no_weights_and_no_network(written, call, tmp_path):
    file = tmp_path / "pages" / "sites.html"
    code, shown, message = call("sites", written, "--delta", DELTA, "--html", file)
    assert code == 0, message
    text = file.read_text()
    made = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert made["dtype"] == "bfloat16" and len(flat(made["root"])) > 400 and len(text) < 200_000
    assert "8,030,261,248 parameters, 16.1 GB in bfloat16" in text
    assert "trained parameters" in shown
    assert not re.findall(r"https?://|\bsrc=|\bhref=|@import|url\(|fetch\(|XMLHttp", text)


def test_a_name_cannot_end_the_script():
    model = tiny.plain()
    model.add_module("</script><b>", torch.nn.Identity())
    text = page("<i>&", model, dt.sites(model, dt.LoRA(rank=2).at("path:blocks.*.first")), "float32")
    assert "</script><b>" not in text and "<i>&" not in text and "<h1>&lt;i&gt;&amp;</h1>" in text


@pytest.mark.parametrize(("words", "said"), [
    (("sites", "peble", "--html", "x.html"), "there is no backbone 'peble'"),
    (("sites", "pebble", "--delta", "LoRA().at('atn.q')", "--html", "x.html"), "there is no role 'atn.q'"),
    (("sites", "pebble", "--html", "file/x.html"), "cannot write file/x.html"),
])  # fmt: skip
def test_a_mistake_leaves_no_page(words, said, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    code, _, message = call(*words)
    assert code == 2 and said in message
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ASK = """
const say = [];
const labels = () => [...tree.querySelectorAll("[data-key]")].map(row => row.dataset.key);
const set = (query, acts, folding) => { search.value = query; only.checked = acts; fold.checked = folding; render(); };
say.push(labels().join(" "));
set("layers.30", false, true); say.push(labels().join(" "));
set("", true, true); openAll(); render(); say.push(labels().join(" "));
set("", false, false); openAll(); render(); say.push(String(labels().length));
document.body.innerHTML = `<pre>${say.join("\\n")}</pre>`;
"""


@pytest.mark.skipif(BROWSER is None, reason="needs a browser (chromium) to run the page's script")
def test_the_script_draws_folds_filters_and_finds(written, call, tmp_path):
    file = tmp_path / "sites.html"
    call("sites", written, "--delta", 'LoRA(rank=2) + IA3().at("attn.k[16:]")', "--html", file)
    file.write_text(file.read_text().replace("</body>", f"<script>{ASK}</script></body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    options += ["--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000"]
    done = subprocess.run([str(BROWSER), *options, "--dump-dom", f"file://{file}"], capture_output=True, text=True)
    first, found, acting, everything = re.search(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)[1].split("\n")
    assert "model.layers.0|16" in first.split() and "model.layers.16|16" in first.split()
    assert "model.layers.0.self_attn.q_proj|1" in first.split() and "model.layers.0.mlp.up_proj|1" not in first.split()
    assert found.split() == ["model|1", "model.layers|1", "model.layers.30|1"]
    assert not any("mlp" in key or "norm" in key for key in acting.split()) and "self_attn.k_proj|1" in acting
    assert int(everything) == len(list(skeleton(str(written)).modules())) - 1
