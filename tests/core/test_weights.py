"""Weights on disk and the fingerprint: bad files are named, a full disk leaves the old ones, nothing is unpickled."""

from __future__ import annotations

import io
import json
import pickle
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import deltatune as dt
from tests import tiny

PLACE = "path:blocks.*.first"


@pytest.fixture
def weights():
    return dt.init(dt.LoRA(rank=2).at(PLACE), tiny.plain())


@pytest.fixture
def file(weights, tmp_path):
    dt.save(weights, tmp_path / "old")
    return tmp_path / "old" / "delta.safetensors"


def with_header(file: Path, **metadata: str) -> None:
    """Rewrite a safetensors file with other metadata and the same tensors."""
    raw = file.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size]) | {"__metadata__": metadata}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


def test_the_readable_copy_is_the_spec_in_the_header(weights, file):
    assert json.loads((file.parent / "delta.json").read_text()) == weights.spec()
    read = dt.Weights.read(file)
    assert read.spec() == weights.spec() == dt.Weights.read(file.parent).spec()
    assert all(torch.equal(read.tensors[n], t) for n, t in weights.tensors.items())
    assert read.nbytes == 4 * read.count == 4 * (2 * (32 + 48)) * 2


def test_files_are_written_without_the_tensors_names_or_order_changing_the_numbers(weights, file):
    turned = replace(weights, tensors=dict(reversed(weights.tensors.items())))
    dt.save(turned, file.parent / "turned")
    assert (file.parent / "turned" / "delta.safetensors").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("keep", [0, 7, 8, 100, -400, -1])
def test_a_truncated_file_is_named(keep, file):
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(
        dt.DeltaTuneError, match=r"delta\.safetensors is not a whole safetensors file .*copy or save it again"
    ):
        dt.Weights.read(file)


@pytest.mark.parametrize(
    "content",
    [
        b"hello, this is a text of some length",
        struct.pack("<Q", 1 << 60) + b"{}",
        b"\x00" * 64,
        struct.pack("<Q", 0x0580) + b'{"a":',  # truncated, with a header of a length that begins as a pickle does
    ],
)
def test_what_is_not_safetensors_is_named(content, file):
    file.write_bytes(content)
    with pytest.raises(dt.DeltaTuneError, match=r"is not a whole safetensors file"):
        dt.Weights.read(file.parent)


def test_a_foreign_safetensors_file_is_named_with_what_it_holds(tmp_path):
    for metadata in (None, {"format": "pt"}):
        save_file({"lm_head.weight": torch.zeros(2)}, tmp_path / "model.safetensors", metadata)
        with pytest.raises(dt.DeltaTuneError, match=r"deltatune did not write it \(tensors: lm_head\.weight"):
            dt.Weights.read(tmp_path / "model.safetensors")


class Trap:
    """A pickle of it makes a folder when it is opened."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return (Path.mkdir, (Path(self.target),))


def pickled(kind, trap):
    if kind == "torch":
        buffer = io.BytesIO()
        torch.save({"trap": trap}, buffer)
        return buffer.getvalue()
    return pickle.dumps(trap, protocol=int(kind))


@pytest.mark.parametrize("name", ["delta.bin", "delta.pt", "delta.pkl", "delta.safetensors"])
@pytest.mark.parametrize("kind", ["torch", "2", "4", "5"])
def test_a_pickle_under_any_name_is_refused_unopened(kind, name, tmp_path):
    target = tmp_path / "ran"
    (tmp_path / name).write_bytes(pickled(kind, Trap(target)))
    with pytest.raises(
        dt.DeltaTuneError, match="is a pickle, which can run any code when it is opened; deltatune reads safetensors"
    ):
        dt.load(tiny.plain(), tmp_path / name)
    assert not target.exists()


def test_a_missing_file_is_named_with_what_the_folder_holds(tmp_path):
    with pytest.raises(dt.DeltaTuneError, match=r"no file .*nowhere\. Give the folder"):
        dt.Weights.read(tmp_path / "nowhere")
    with pytest.raises(dt.DeltaTuneError, match=r"no file .*delta\.safetensors; .* holds nothing"):
        dt.Weights.read(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(dt.DeltaTuneError, match=r"holds adapter_config\.json"):
        dt.Weights.read(tmp_path)


HEADERS = [
    ({"format": None}, r"format is None; this version of deltatune reads 'deltatune-1'"),
    ({"format": "deltatune-9"}, r"format is 'deltatune-9'"),
    ({"delta": None}, r"'delta' is missing or is not a list"),
    ({"delta": "LoRA()"}, r"'delta' is missing or is not a list; found 'LoRA\(\)'"),
    ({"delta": [{"where": PLACE, "method": {"Lora": {}}}]}, r"no method 'Lora'\. Did you mean 'LoRA'"),
    ({"delta": [{"where": PLACE, "method": {"LoRA": {"rank": "2"}}}]}, r"needs a whole number for rank"),
    ({"delta": [3]}, r"a delta is a list of"),
    ({"backbone": None}, r"'backbone' is missing or is not an object"),
    ({"backbone": {}}, r"fingerprint has the keys family, structure, values; found \{\}"),
    (
        {"backbone": {"family": "x", "structure": 3, "values": None}},
        r"the structure of a backbone's fingerprint is a text; found 3",
    ),
    ({"backbone": {"family": "x", "structure": "y", "values": None, "z": 1}}, r"has the keys family"),
    ({"seed": None}, r"'seed' is missing or is not a whole number"),
    ({"seed": "0"}, r"'seed' is missing or is not a whole number; found '0'"),
    ({"notes": None}, r"'notes' is missing or is not an object"),
]


@pytest.mark.parametrize(("change", "message"), HEADERS, ids=lambda x: str(x)[:40])
def test_a_wrong_spec_in_the_header_is_named(change, message, weights, file):
    spec = {name: value for name, value in (weights.spec() | change).items() if value is not None}
    with_header(file, deltatune=json.dumps(spec))
    with pytest.raises(dt.DeltaTuneError, match=rf"the spec in the header of .*delta\.safetensors: .*{message}"):
        dt.Weights.read(file)


@pytest.mark.parametrize("spec", ["[]", "3", '"LoRA()"', "null"])
def test_a_spec_that_is_no_object_is_named(spec, file):
    with_header(file, deltatune=spec)
    with pytest.raises(dt.DeltaTuneError, match="a spec is a JSON object; found"):
        dt.Weights.read(file)


def test_a_spec_that_is_no_json_is_named(file):
    with_header(file, deltatune="{delta:")
    with pytest.raises(dt.DeltaTuneError, match=r"header of .*delta\.safetensors is not JSON: .*line 1 column"):
        dt.Weights.read(file)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_not_saved(value, weights, file):
    before = file.read_bytes()
    name = next(iter(weights.tensors))
    weights.tensors[name][0, 0] = value
    with pytest.raises(dt.DeltaTuneError, match=rf"tensor '{name}' holds NaN or infinity; nothing was written"):
        dt.save(weights, file.parent)
    assert file.read_bytes() == before


FULL_DISK = """
import resource, sys
import deltatune as dt
from tests import tiny
weights = dt.init(dt.LoRA(rank=9).at("path:blocks.*.first"), tiny.plain())
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for folder in sys.argv[1:]:
    try:
        dt.save(weights, folder)
    except dt.DeltaTuneError as error:
        print(error)
"""


def test_a_full_disk_leaves_the_old_files_and_no_others(weights, file):
    old, new = file.parent, file.parent.parent / "new"
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    command = [sys.executable, "-c", FULL_DISK, str(old), str(new)]
    root = Path(__file__).resolve().parents[2]
    said = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout.splitlines()
    assert "cannot write" in said[0]
    assert "File too large; the file that was there is unchanged" in said[0]
    assert "File too large; nothing was written" in said[1]
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before
    assert list(new.iterdir()) == []


def test_the_fingerprint_is_that_of_the_values_whatever_the_float_type():
    bf16 = tiny.llama().bfloat16()
    same = dt.fingerprint(bf16)
    assert same == dt.fingerprint(tiny.llama().bfloat16().float()) == dt.fingerprint(bf16.double())
    assert len(same.values) == 16
    assert same.structure == dt.fingerprint(tiny.llama(seed=1)).structure
    assert same.values != dt.fingerprint(tiny.llama(seed=1)).values
    assert same.structure != dt.fingerprint(tiny.mistral()).structure


def test_the_fingerprint_survives_attaching_detaching_and_training_of_the_delta():
    model = tiny.llama()
    before = dt.fingerprint(model)
    attachment = dt.attach(model, dt.LoRA() + dt.Full().at("norm"))
    assert dt.fingerprint(model) == before
    with torch.no_grad():
        for leaf in attachment.parameters():
            leaf.add_(1)
    assert dt.fingerprint(model) == before == attachment.weights.backbone
    attachment.detach()
    assert dt.fingerprint(model) == before


def test_one_changed_sampled_value_changes_the_fingerprint_and_no_values_are_no_check():
    model = tiny.plain()
    before = dt.fingerprint(model)
    with torch.no_grad():
        model.blocks[1].scale.bias[3] += 1
    assert dt.fingerprint(model) != before
    with torch.device("meta"):
        hollow = dt.fingerprint(tiny.Plain())
    assert hollow == replace(before, values=None)
