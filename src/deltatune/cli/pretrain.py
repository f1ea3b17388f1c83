"""`deltatune pretrain`: train a small backbone from scratch on a folder of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def pretrain(
    settings: Annotated[Path, typer.Argument(help="TOML file with the sizes, the objective and the schedule.")],
    text: Annotated[Path, typer.Option(help="Folder of .txt or .txt.gz files, documents separated by blank lines.")],
    out: Annotated[Path, typer.Option(help="Folder for the tokens, the log, the checkpoint and the product.")],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Pre-train a backbone from scratch: a tokenizer, then a Llama (next-token) or a T5 (span corruption).

    Stop it whenever you like, even by kill -9: the same command continues from the last checkpoint. The product, a
    Hugging Face folder with its model card, is OUT/model.
    """
    from deltatune.backbones import pretrain as library

    product = library.pretrain(library.read_settings(settings), text, out, device, _show)
    typer.echo(f"wrote {product}")


def _show(line: dict[str, Any]) -> None:
    if "validation" in line:
        outcome = line["validation"]
        size = f", {outcome['bits_per_byte']:.3f} bits/byte" if "bits_per_byte" in outcome else ""
        typer.echo(f"step {line['step']}: validation {outcome['loss']:.4f} nats/token{size}")
    else:
        pace = f"{line['tokens']:,} tokens, {line['seconds']:.0f} s"
        typer.echo(f"step {line['step']}: loss {line['loss']:.4f}, lr {line['lr']:.2e}, {pace}")
