"""`results.json`, the figures and the page of tables in `docs/results/theory/`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deltatune.files import read_json, write_text
from studies.theory.plots import draw, names, plain, some
from studies.theory.state import State
from studies.theory.tables import TABLES, Rows

FOLDER = Path("docs/results/theory")
WHOLE = ("Full", "residual", "bound", "intrinsic", "spectrum of the gradient")  # what holds or changes all parameters


def report(state: State) -> None:
    """Write everything that is known so far."""
    tables = {name: table(state) for name, table in TABLES.items()}
    FOLDER.mkdir(parents=True, exist_ok=True)
    made = environments(state)
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in {"environments": made, **tables}.items()]
    write_text(FOLDER / "results.json", "{\n" + ",\n".join(lines) + "\n}\n")
    figures = list(draw(FOLDER, tables))
    write_text(FOLDER / "README.md", page(state, tables, made, figures))


def environments(state: State) -> list[dict[str, Any]]:
    """Return the different environments of runs and measurements, and how many of each there are."""
    paths = [*state.runs.glob("*/result.json"), *(state.folder / "measured").glob("*.json")]
    texts = [json.dumps(read_json(path)["environment"], sort_keys=True) for path in paths]
    return [{"files": texts.count(text), **json.loads(text)} for text in sorted(set(texts))]


def page(state: State, tables: dict[str, Rows], made: list[dict[str, Any]], figures: Sequence[str]) -> str:
    """Return the page: where it was made, then one section a table."""
    one, plan = made[0], state.plan
    commits = sorted({f"{m['git'][:12]}{' with changes' if m['dirty'] else ''}" for m in made if m["git"]})
    parts = [
        "# The theories on real runs\n",
        f"Made by `python -m studies.theory` from `studies/theory/plan.toml`; what each number means is in [theory.md](../../theory.md). "
        f"Backbone {plan.backbone}, tasks {', '.join(plan.tasks)}, seeds {', '.join(map(str, plan.seeds))}, "
        f"{plan.recipe.steps} steps of {plan.recipe.batch} examples. Numbers are mean ± standard deviation over seeds; where fewer than "
        f"{len(plan.seeds)} seeds were finished, their number follows in brackets.\n",
        f"- Hardware: {one['cpu']}, {one['cores']} cores, {one['threads']} thread(s); other processes shared the machine",
        f"- Versions: deltatune {one['deltatune']}, torch {one['torch']}, transformers {one['transformers']}, python {one['python']}",
        f"- Code: commits {', '.join(commits)}\n",
    ]
    for name, title in TITLES.items():
        if tables[name]:
            picture = [f"![{title}]({name}.png)\n"] if name in figures else []
            parts += [f"## {title}\n", *picture, SECTIONS[name](tables[name]), ""]
            parts += [f"![{t}]({f}.png)\n" for f, t in MORE.get(name, {}).items() if f in figures]
    return "\n".join(parts)


def told(value: Sequence[float] | None, digits: int = 1) -> str:
    """Return mean ± deviation as text."""
    if not value:
        return "–"
    few = f" ({value[2]})" if value[2] < 3 else ""
    return f"{value[0]:.{digits}f} ± {value[1]:.{digits}f}{few}" if value[2] > 1 else f"{value[0]:.{digits}f}{few}"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"


def crossed(rows: Rows, down: str, across: str, cell: Callable[[dict[str, Any]], str]) -> str:
    """Return a table of one column against another."""
    heads = names(rows, across)

    def found(one: Any, head: Any) -> str:
        own = some(rows, **{down: one, across: head})
        return cell(own[0]) if own else "–"

    body = [[plain(str(one)), *(found(one, head) for head in heads)] for one in names(rows, down)]
    return table([down, *heads], body)


def _runs(rows: Rows) -> str:
    tests = crossed(rows, "method", "task", lambda r: told(r["test"]))
    devs = crossed(rows, "method", "task", lambda r: told(r["dev"]))
    sizes = [
        [r["method"], f"`{r['delta']}`", f"{r['parameters']:,}", f"{r['lr']:g}"]
        for r in some(rows, task=rows[0]["task"])
    ]
    return f"Test:\n\n{tests}\nDev:\n\n{devs}\n{table(['method', 'delta', 'parameters', 'rate'], sizes)}"


def _intrinsic(rows: Rows) -> str:
    dims = sorted({d for row in rows for own in row["scores"].values() for d in own})

    def scores(row: dict[str, Any], d: int) -> str:
        return " / ".join(f"{own[d]:.0f}" if d in own else "–" for own in row["scores"].values())

    body = [
        [
            row["task"],
            " / ".join(f"{one:.0f}" for one in row["full"]),
            *(scores(row, d) for d in dims),
            row["finding"],
            row["half"],
        ]
        for row in rows
    ]
    return table(["task", "Full", *(f"d = {d:,}" for d in dims), "d_90", "d_50"], body)


def _control(rows: Rows) -> str:
    def both(row: dict[str, Any]) -> str:
        (later,) = some(rows, task=row["task"], method=row["method"], side="after")
        slopes = [sum(step["slope"] for step in one["steps"]) for one in (row, later)]
        return f"{row['violation'][0]:.3g} → {later['violation'][0]:.3g}; {slopes[0]:.3g} → {slopes[1]:.3g}"

    text = "Sum of V over blocks, then sum of |grad H| over steps, each before → after training:\n\n"
    return text + crossed(some(rows, side="before"), "method", "task", both)


def _residual(rows: Rows) -> str:
    def left(row: dict[str, Any], family: str) -> str:
        mean, deviation, count = row["left"].get(family, (None, None, 0))
        return told([100 * mean, 100 * deviation, count], 2) if count else "–"

    head = "% of the squared change that is left:\n\n"
    return head + table(
        ["family", *names(rows, "task")], [[plain(f), *(left(row, f) for row in rows)] for f in rows[0]["left"]]
    )


def _size(rows: Rows) -> str:
    ranks = list(rows[0]["dev"])
    body = [
        [row["task"], *(told(row["dev"][r]) for r in ranks), " / ".join(map(str, row["least"]))]
        + [" / ".join(str(own[s]) for own in row["estimates"]["Full"]) for s in ("0.5", "0.9")]
        for row in rows
    ]
    return table(
        ["task", *(f"rank {r}" for r in ranks), "least as good as the best", "50 % of Full", "90 % of Full"], body
    )


def _costs(rows: Rows) -> str:
    def of(part: str) -> dict[str, Any]:
        return next(row for row in rows if row["name"].startswith(f"training step: {part}"))

    body = []
    for row in rows:
        plain_step = of("Full" if any(word in row["name"] for word in WHOLE) else "LoRA")
        own, its = row["peak"] - row["loaded"], plain_step["peak"] - plain_step["loaded"]
        body.append(
            [
                row["name"],
                f"{row['seconds']:.1f}",
                f"{row['peak']:.0f}",
                f"{row['peak'] / plain_step['peak']:.2f}",
                f"{own / its:.2f}",
            ]
        )
    head = (
        "The process's highest memory, over that of four plain training steps: of Full for what holds or changes all parameters, else of "
        "LoRA. The last column leaves out what every process holds once the backbone is loaded.\n\n"
    )
    return head + table(
        ["instrument", "processor seconds", "peak MB", "over training", "beyond the loaded backbone"], body
    )


def _function(rows: Rows) -> str:
    return crossed(rows, "method", "task", lambda r: f"KL {told(r['kl'], 2)}; agree {100 * r['agreement'][0]:.0f} %")


SECTIONS: dict[str, Callable[[Rows], str]] = {
    "runs": _runs,
    "search": lambda rows: table(
        ["for", "delta", "rate", "dev"], [[r["for"], f"`{r['delta']}`", f"{r['lr']:g}", f"{r['dev']:.1f}"] for r in rows]
    ),
    "control": _control,
    "spectrum": lambda rows: "",
    "residual": _residual,
    "intrinsic": _intrinsic,
    "placement": lambda rows: "\n".join(
        f"{task}, test score by budget:\n\n{crossed(some(rows, task=task), 'way', 'budget', lambda r: told(r['test']))}"
        for task in names(rows, "task")
    ),
    "robust": lambda rows: table(
        ["task", "way", "clean", "attacked"], [[r["task"], r["way"], told(r["clean"]), told(r["attacked"])] for r in rows]
    ),
    "size": _size,
    "function": _function,
    "sharpness": lambda rows: table(
        ["method", "task", "largest eigenvalue before", "after"],
        [[r["method"], r["task"], f"{r['before']['largest']:.3g}", f"{r['after']['largest']:.3g}"] for r in rows],
    ),
    "costs": _costs,
}  # fmt: skip
TITLES = {
    "runs": "Scores", "control": "Pontryagin's condition", "spectrum": "Spectra of weight changes",
    "residual": "Solution-space residual of full fine-tuning", "intrinsic": "Intrinsic dimension",
    "placement": "Placement under a budget", "robust": "Closed loop at test time", "size": "Size by the spectrum, and by a sweep",
    "function": "Function-space gap to full fine-tuning", "sharpness": "Sharpness", "search": "Search on another task",
    "costs": "What each instrument costs",
}  # fmt: skip
MORE = {"control": {"violation": "V and slopes by block", "reach": "Controllability by block"}}
