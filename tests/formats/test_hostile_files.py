"""Files of every format truncated, mixed up, rewritten and made hostile: read, or refused in words; nothing runs or stays."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor, nn

import deltatune as dt
from deltatune import formats
from tests.formats.small import bert, llama, t5
from tests.laws.cases import busy

DATA = Path(__file__).parent / "data" / "adapterhub"
MARK = Path(tempfile.gettempdir()) / f"deltatune-ran-{os.getpid()}"
Files = dict[str, bytes]


def written(name: str, text: str, build: Callable[[], nn.Module]) -> Files:
    with tempfile.TemporaryDirectory() as folder:
        formats.write(name, build(), busy(dt.init(dt.parse(text), build()), size=0.2), folder)
        return contents(Path(folder))


def contents(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "scores.safetensors"}


def pickled(**tensors: Any) -> bytes:
    file = io.BytesIO()
    torch.save(tensors, file)
    return file.getvalue()


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


def made() -> dict[str, tuple[Callable[[], nn.Module], Files]]:
    """Return a good folder of every format, and the model that it is for."""
    lora = {"lora_r": 2, "lora_alpha": 4, "delta_type": "lora", "non_linearity": "relu"}
    q, fc = "encoder.block.0.layer.0.SelfAttention.q", "encoder.block.1.layer.1.DenseReluDense.wo"
    down, up = f"{fc}.adapter.modulelist.down_proj", f"{fc}.adapter.modulelist.up_proj"
    opendelta = {f"{q}.lora.lora_A": ones(2, 16), f"{q}.lora.lora_B": ones(16, 2)}
    opendelta |= {
        f"{down}.weight": ones(3, 16),
        f"{down}.bias": ones(3),
        f"{up}.weight": ones(16, 3),
        f"{up}.bias": ones(16),
    }
    tune = {"layers.0.attn.q_proj.lora_a.weight": ones(2, 16), "layers.0.attn.q_proj.lora_b.weight": ones(16, 2)}
    lit = {"transformer.h.0.attn.qkv.lora_A": ones(4, 16), "transformer.h.0.attn.qkv.lora_B": ones(24, 2)}
    seeded = {"peft_type": "UNILORA", "r": 2, "theta_d_length": 20, "target_modules": ["q_proj"]}
    theta = {"base_model.unilora_theta_d": ones(20)}
    yaml = b"lora_r: 2\nlora_alpha: 4\nlora_query: true\nlora_key: false\nlora_value: true\n"
    return {
        "deltatune": (llama, written("deltatune", 'LoRA(rank=2) + VeRA(rank=3).at("attn.o")', llama)),
        "peft-lora": (llama, written("peft", 'LoRA(rank=2) + Full().at("norm")', llama)),
        "peft-vera": (llama, written("peft", 'VeRA(rank=2).at("attn.q")', llama)),
        "peft-oft": (llama, written("peft", 'OFT(block=4).at("attn.q")', llama)),
        "peft-adamss": (llama, written("peft", 'AdaMSS(size=5, groups=2).at("attn.q")', llama)),
        "peft-frod": (llama, written("peft", 'FRoD().at("attn.q")', llama)),
        "peft-unilora": (llama, written("peft", "UniLoRA(rank=2, size=20)", llama)),
        "peft-unilora-seed": (
            llama,
            {"adapter_config.json": json.dumps(seeded).encode(), "adapter_model.safetensors": save(theta)},
        ),
        "peft-prefix": (llama, written("peft", "PrefixTuning(length=2)", llama)),
        "adapterhub-mam": (bert, contents(DATA / "bert-mam")),
        "adapterhub-reft": (bert, contents(DATA / "bert-reft")),
        "adapterhub-lora": (bert, contents(DATA / "bert-lora")),
        "opendelta": (t5, {"config.json": json.dumps(lora).encode(), "pytorch_model.bin": pickled(**opendelta)}),
        "torchtune": (
            llama,
            {"adapter_config.json": b'{"r": 2, "lora_alpha": 4}', "adapter_model.pt": pickled(**tune)},
        ),
        "litgpt": (llama, {"hyperparameters.yaml": yaml, "lit_model.pth.lora": pickled(model=lit)}),
    }


@pytest.fixture(scope="module")
def good() -> dict[str, tuple[Callable[[], nn.Module], Files]]:
    return made()


@pytest.fixture(scope="module")
def models() -> dict[Callable[[], nn.Module], nn.Module]:
    return {build: build() for build in (bert, llama, t5)}


class Hostile:
    """An object whose unpickling makes a folder."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.makedirs, (str(MARK),)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 70) | st.floats(-9, 9) | st.sampled_from(["", "x", "q_proj", "(", "all-linear"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["q_proj", "a", "("]), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip
TENSOR_CHANGES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda t: t.flatten(),
    lambda t: t[..., :-1],
    lambda t: t.mT if t.dim() > 1 else t[None],
    lambda t: t[None],
    lambda t: t.reshape(-1)[:0],
    lambda t: t.to(torch.int64),
    lambda t: t.to(torch.float16),
    lambda t: t.to(torch.bool),
    lambda t: t * float("inf"),
    lambda t: torch.zeros(()),
    lambda t: torch.cat([t, t]) if t.dim() else t,
)
NAME_CHANGES: tuple[Callable[[str], str], ...] = (
    lambda n: n[1:],
    lambda n: f"{n}.x",
    lambda n: n.replace("0", "9"),
    lambda n: n.replace("lora_A", "lora_C").replace("weight", "bias"),
    lambda n: n.replace(".", "", 1),
    lambda n: "../../" + n,
    lambda n: n.replace("q_proj", "mlp").replace("query", "dense"),
    lambda n: "",
)


def with_tensors(name: str, data: bytes, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> bytes:
    """Return a file of tensors with others in it."""
    if name.endswith(".safetensors"):
        return save({key: tensor.contiguous().clone() for key, tensor in change(load(data)).items()})
    held = torch.load(io.BytesIO(data), weights_only=True)
    return pickled(model=change(held["model"])) if "model" in held else pickled(**change(held))


@st.composite
def broken(draw: st.DrawFn, files: Files, others: list[Files]) -> Files:
    """Return files with one to three things wrong with them."""
    files = dict(files)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(files)))
        kind = draw(
            st.sampled_from(["cut", "flip", "json", "tensor", "tensor", "name", "drop", "foreign", "hostile", "gone"])
        )
        files[name] = draw(changed(name, files[name], kind, others))
        if kind == "gone" and len(files) > 1:
            del files[name]
    return files


def changed(name: str, data: bytes, kind: str, others: list[Files]) -> st.SearchStrategy[bytes]:
    """Return ways to damage one file; a way that does not fit the file leaves it as it is."""
    tensors = not name.endswith((".json", ".yaml"))
    if kind == "cut":
        return st.integers(0, len(data)).map(lambda n: data[:n])
    if kind == "flip":
        return st.tuples(st.integers(0, max(len(data) - 1, 0)), st.integers(0, 255)).map(
            lambda at: data[: at[0]] + bytes([at[1]]) + data[at[0] + 1 :]
        )
    if kind == "foreign":
        same = [f[n] for f in others for n in f if n.rpartition(".")[2] == name.rpartition(".")[2]]
        return st.sampled_from([*same, b"", b"\x80\x04.", data[::-1]])
    if kind == "hostile":
        return st.just(pickle.dumps({"a": Hostile()}))
    try:
        if kind == "json" and name.endswith(".json"):
            return edited(json.loads(data)).map(lambda value: json.dumps(value).encode())
        if kind in ("tensor", "name", "drop") and tensors:
            return retold(name, data, kind)
    except Exception:  # damaged before
        return st.just(data)
    return st.just(data)


def edited(value: Any) -> st.SearchStrategy[Any]:
    """Return a JSON value with one field, at any depth, set to something else."""
    if not isinstance(value, dict) or not value:
        return json_values

    def at(key: str) -> st.SearchStrategy[Any]:
        deeper = edited(value[key]) if isinstance(value[key], dict) else json_values
        return (deeper | json_values).map(lambda new: {**value, key: new})

    return st.sampled_from(sorted(value)).flatmap(at)


def retold(name: str, data: bytes, kind: str) -> st.SearchStrategy[bytes]:
    """Return a file of tensors with one of them changed, renamed or left out."""
    keys = sorted(
        load(data) if name.endswith(".safetensors") else (lambda t: t.get("model", t))(torch.load(io.BytesIO(data)))
    )
    ways = {"tensor": TENSOR_CHANGES, "name": NAME_CHANGES, "drop": (None,)}[kind]

    def do(pair: tuple[str, Any]) -> bytes:
        key, way = pair

        def change(held: dict[str, Tensor]) -> dict[str, Tensor]:
            rest = {n: t for n, t in held.items() if n != key}
            return (
                rest
                if way is None
                else {**rest, key: way(held[key])}
                if kind == "tensor"
                else {**rest, way(key): held[key]}
            )

        return with_tensors(name, data, change)

    return st.tuples(st.sampled_from(keys), st.sampled_from(ways)).map(do) if keys else st.just(data)


def trace(model: nn.Module) -> list[object]:
    """Return what a half-attached delta would leave behind."""
    modules = [(name, type(module), tuple(vars(module))) for name, module in model.named_modules()]
    return [*modules, *((name, id(p), p._version, p.requires_grad) for name, p in model.named_parameters())]


def run(model: nn.Module, files: Files) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        try:
            dt.load(model, folder, check=False).detach()
        except dt.DeltaTuneError as error:
            yield str(error)


NAMES = sorted(made())


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_in_words_and_leaves_nothing(name, data, good, models):
    build, files = good[name]
    model = models[build]
    before = trace(model)
    found = data.draw(broken(files, [other for _, other in good.values()]))
    for message in run(model, found):
        assert len(message) > 20
    assert trace(model) == before
    assert not MARK.exists()


def test_the_hostile_object_would_be_noticed(good):
    pickle.loads(pickle.dumps({"a": Hostile()}))
    assert MARK.exists()
    MARK.rmdir()


@pytest.mark.parametrize("name", NAMES)
def test_the_good_files_are_read_whatever_the_order_of_their_tensors(name, good, models, tmp_path):
    build, files = good[name]
    for file, data in files.items():
        turned = data
        if not file.endswith((".json", ".yaml", ".safetensors")):
            turned = with_tensors(file, data, lambda held: dict(reversed(held.items())))
        (tmp_path / file).write_bytes(turned)
    weights = formats.read(models[build], tmp_path)
    with dt.attach(models[build], weights):
        pass
    shutil.rmtree(tmp_path)
    for file, data in files.items():
        tmp_path.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(data)
    assert formats.read(models[build], tmp_path).count == weights.count
