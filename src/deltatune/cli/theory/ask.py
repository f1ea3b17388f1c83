"""What all instruments are asked with: folders, the backbone and the task where no run tells them, and which examples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

FOLDER = "Folder that tune or a study wrote; or weights of any format, with --on and --task."
SAMPLE = "Which examples"

Folder = Annotated[Path, typer.Argument(help=FOLDER, show_default=False)]
Task = Annotated[
    str | None,
    typer.Option(help="The task to look at; by default the one the delta was tuned for.", show_default=False),
]
Examples = Annotated[int, typer.Option(min=1, help="Examples that are looked at.", rich_help_panel=SAMPLE)]
Batch = Annotated[int, typer.Option(min=1, help="Examples in a batch.", rich_help_panel=SAMPLE)]
Seed = Annotated[int, typer.Option(help="Seed of the examples, and of random directions.", rich_help_panel=SAMPLE)]
Split = Annotated[str, typer.Option(help="train or dev.", rich_help_panel=SAMPLE)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", help="Folder for the result: a JSON file and a page with the plots that works offline."
    ),
]
