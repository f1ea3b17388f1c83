"""Loading a backbone: a pre-trained model in evaluation mode with its tokenizer; no code in its files ever runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from deltatune.backbones.quantised import quantise as rounded
from deltatune.backbones.source import digest, find, names, weight_files
from deltatune.errors import DeltaTuneError, nearest
from deltatune.files import read_json

__all__ = ["Backbone", "digest", "load", "load_backbone", "names", "skeleton"]

Kind = Literal["causal", "seq2seq", "masked"]
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
AUTO = {"causal": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM", "masked": "AutoModelForMaskedLM"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "*.model", "*.spm", "vocab.*")
SEED = 0


@dataclass(frozen=True)
class Backbone:
    """A pre-trained model ready to be adapted: `digest` identifies the files it was read from."""

    name: str
    model: nn.Module
    tokenizer: Any
    kind: Kind
    digest: str


def load(name: str, dtype: str = "float32", quantise: str | None = None) -> Backbone:
    """Load a backbone by built-in name, folder or hub name; `random:<name>` has fresh weights under a fixed seed.

    `dtype` is float32, bfloat16 or float16 (or fp32, bf16, fp16); `quantise`, int8 or int4, rounds the linear layers with
    torchao. Only safetensors are read and no code of the folder runs. Raises `DeltaTuneError` for an unknown name, dtype
    or quantisation and for files that are missing, truncated or do not fit.
    """
    if dtype not in DTYPES:
        raise DeltaTuneError(f"there is no dtype {dtype!r}.{nearest(dtype, DTYPES)} Write one of {', '.join(DTYPES)}.")
    source = find(name)
    with quiet(), torch.random.fork_rng(devices=[]):
        config = _config(source.folder)
        kind = _kind(config, source.folder)
        tokenizer = _tokenizer(source.folder)
        model = (_fresh if source.fresh else _trained)(source.folder, config, kind, DTYPES[dtype])
    if quantise is not None:
        rounded(model, quantise)
    if model.can_generate() and model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return Backbone(name, model.eval(), tokenizer, kind, digest(name))


# the name under which the package itself offers it, where `load` reads a delta
load_backbone = load


def skeleton(name: str) -> nn.Module:
    """Build a backbone's model on the meta device, without reading or allocating a weight: enough for a dry run."""
    folder = find(name).folder
    with quiet(), torch.device("meta"):
        config = _config(folder)
        return _built(config, _kind(config, folder)).eval()


@contextmanager
def quiet() -> Iterator[None]:
    """What transformers would print while loading is either normal or raised as an error here."""
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _auto(kind: Kind) -> Any:
    import transformers

    return getattr(transformers, AUTO[kind])


def _built(config: Any, kind: Kind) -> Any:
    return _auto(kind).from_config(config, dtype=torch.float32, trust_remote_code=False)


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    written = read_json(folder / "config.json")
    if not isinstance(written, dict) or "model_type" not in written:
        raise DeltaTuneError(f"{folder / 'config.json'} names no model_type, so its architecture is not known.")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        own = " It comes with Python code of its own, which deltatune never runs." if "auto_map" in written else ""
        raise DeltaTuneError(
            f"transformers cannot build a {written['model_type']!r} from {folder / 'config.json'}: {_first(error)}{own}"
        ) from error


def _kind(config: Any, folder: Path) -> Kind:
    from transformers.models.auto import modeling_auto as auto

    mappings: dict[Kind, Any] = {
        "seq2seq": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "masked": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }
    for kind, classes in mappings.items():
        if set(config.architectures or ()) & set(classes.values()):
            return kind
    for kind, classes in mappings.items():
        if config.model_type in classes and not (kind == "masked" and config.is_decoder):
            return kind
    raise DeltaTuneError(
        f"{folder} holds a {config.model_type!r}, which is not a language model; a backbone is a causal, an "
        f"encoder-decoder or a masked language model."
    )


def _trained(folder: Path, config: Any, kind: Kind, dtype: torch.dtype) -> Any:
    for path in weight_files(folder):
        _check_file(path)
    try:
        model, info = _auto(kind).from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise DeltaTuneError(f"the weights in {folder} do not fit its config.json: {_first(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise DeltaTuneError(
            f"the weights in {folder} lack {len(missing)} tensors of {type(model).__name__}, among them {missing[0]}; "
            f"a {kind} language model cannot be read from them."
        )
    return model


def _fresh(folder: Path, config: Any, kind: Kind, dtype: torch.dtype) -> Any:
    from transformers import GenerationConfig

    torch.manual_seed(SEED)
    model = _built(config, kind).to(dtype)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model


def _check_file(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise DeltaTuneError(
            f"{path} is not a whole safetensors file ({_first(error)}); it was cut off or is something else. "
            f"Copy or download it again."
        ) from error


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not any(path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)):
        raise DeltaTuneError(
            f"{folder} has no tokenizer files; a backbone needs them beside its weights, "
            f"for example tokenizer.json and tokenizer_config.json."
        )
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception for a malformed file
        raise DeltaTuneError(f"the tokenizer in {folder} cannot be read: {_first(error)}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise DeltaTuneError(
            f"the tokenizer in {folder} has no vocabulary; its tokenizer.json or vocabulary file is missing."
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise DeltaTuneError(
                f"the tokenizer in {folder} has neither a padding nor an end token; name one in tokenizer_config.json, "
                f'for example "pad_token": "<pad>".'
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") + "." if lines else f"{type(error).__name__}."
