"""The figures of `docs/results/theory/`, each from one table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes

from deltatune.study.palette import PRINT, Palette
from studies.theory.canvas import counted, line, save
from studies.theory.measuring import RANKS
from studies.theory.tables import Rows

METHODS = Palette(("Adapter", "LoRA", "BitFit", "PrefixTuning", "Full"), "Full", PRINT)
WAYS = Palette(("control", "S3Delta", "even", "random"), None, PRINT)
LOOPS = Palette(("LoRA", "PrefixTuning", "closed loop"), None, PRINT)
ROLES = (
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.o",
    "cross.q",
    "cross.k",
    "cross.v",
    "cross.o",
    "ffn.gate",
    "ffn.up",
    "ffn.down",
)
Draw = Callable[..., None]


def names(rows: Rows, key: str) -> list[Any]:
    """Return the different values of a column in their order."""
    return list(dict.fromkeys(row[key] for row in rows))


def some(rows: Rows, **wanted: Any) -> Rows:
    """Return the rows that have these values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def by_task(rows: Rows, draw: Draw) -> list[tuple[str, Callable[[Axes], None]]]:
    """One panel a task."""
    return [(task, partial(draw, rows=some(rows, task=task))) for task in names(rows, "task")]


def intrinsic(axes: Axes, rows: Rows) -> None:
    """SAID's dev score against d by seed, and what is read from it."""
    (row,) = rows
    for own in row["scores"].values():
        axes.plot(
            list(own), list(own.values()), "o-", color=PRINT.methods[0], markersize=3, alpha=0.6, label="SAID, by seed"
        )
    axes.axhline(0.9 * fmean(row["full"]), color=PRINT.methods[-1], linestyle="--", label="90 % of Full")
    axes.axhline(0.5 * fmean(row["full"]), color=PRINT.methods[-1], linestyle=":", label="50 % of Full")
    counted(axes, row["dims"], "dimensions d")
    axes.set_ylabel("dev score")
    axes.set_ylim(bottom=0)


def ranks(axes: Axes, rows: Rows, place: int, label: str) -> None:
    """One number of a spectrum by role: one small mark a layer, a large one for their mean."""
    for method in ("Full", "LoRA"):
        sites = [site for row in some(rows, method=method) for site in row["sites"]]
        at = [role for role in ROLES if any(site[1] == role for site in sites)]
        color, marker = METHODS.color(method), METHODS.marker(method)
        for role in at:
            values = [site[place] for site in sites if site[1] == role]
            axes.plot([ROLES.index(role)] * len(values), values, marker, color=color, markersize=2.5, alpha=0.35)
        means = [fmean(site[place] for site in sites if site[1] == role) for role in at]
        axes.plot([ROLES.index(r) for r in at], means, marker, color=color, markersize=7, label=method)
    axes.set_xticks(range(len(ROLES)), ROLES, rotation=60)
    axes.set_yscale("log")
    axes.set_ylabel(label)


def kept(axes: Axes, rows: Rows) -> None:
    """The share of Full's squared change that the best rank r keeps, over all linear layers."""
    for index, task in enumerate(names(rows, "task")):
        own = [size["linear"]["kept"] for row in some(rows, task=task, method="Full") for size in row["size"]]
        means = [100 * fmean(values) for values in zip(*own, strict=True)]
        axes.plot(RANKS, means, "o-", color=PRINT.methods[index], markersize=4, label=task)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("rank r")
    axes.set_ylabel("% of Full's change kept")


def residual(axes: Axes, rows: Rows) -> None:
    """What families leave of Full's squared change."""
    families = list(dict.fromkeys(family for row in rows for family in row["left"]))
    height = 0.8 / len(rows)
    for index, row in enumerate(rows):
        at = [place + height * index for place, family in enumerate(families) if family in row["left"]]
        left = [100 * row["left"][family][0] for family in families if family in row["left"]]
        axes.barh(at, left, height=height * 0.9, color=PRINT.methods[index], label=row["task"])
    axes.set_yticks([place + height for place in range(len(families))], [plain(family) for family in families])
    axes.invert_yaxis()
    axes.set_xlabel("% of the squared change left")


def plain(family: str) -> str:
    """Return a family's text without the list of all linear layers."""
    method, _, where = family.partition(".at(")
    return method.replace("LoRA()", "LoRA(rank=8)").replace("DID()", "DID(dim=1000)") + (
        " at all linears" if where else ""
    )


def steps(axes: Axes, rows: Rows, part: str, value: str) -> None:
    """One number of every block by method, means over tasks."""
    for method in names(rows, "method"):
        own = some(rows, method=method)
        places = [one["name"] for one in own[0][part] if value in one and "embeddings" not in one["name"]]
        found = [[one[value] for row in own for one in row[part] if one["name"] == place] for place in places]
        labels = [place.replace("encoder.block.", "e").replace("decoder.block.", "d") for place in places]
        line(axes, METHODS, method, labels, [fmean(values) for values in found])
    axes.set_yscale("log")
    axes.set_xlabel("block (e: encoder, d: decoder)")


def gramian(axes: Axes, rows: Rows) -> None:
    """The seen spectrum of the last block's Gramian, each over its largest value, means over tasks."""
    for method in names(rows, "method"):
        spectra = [row["reach"][-1]["spectrum"] for row in some(rows, method=method)]
        own = [[value / max(values[0], 1e-30) for value in values] for values in spectra]
        means = [fmean(values) for values in zip(*own, strict=True)]
        line(axes, METHODS, method, range(1, len(means) + 1), means)
    axes.set_yscale("log")
    axes.set_xlabel("direction")


def placement(axes: Axes, rows: Rows) -> None:
    """Test score against the budget by way."""
    for way in names(rows, "way"):
        own = some(rows, way=way)
        line(axes, WAYS, way, [r["budget"] for r in own], [r["test"][0] for r in own], [r["test"][1] for r in own])
    counted(axes, names(rows, "budget"), "trained parameters")
    axes.set_ylabel("test score")


def size(axes: Axes, rows: Rows) -> None:
    """LoRA's dev score by rank, and the ranks that Full's spectrum calls for."""
    (row,) = rows
    values = list(row["dev"].values())
    line(axes, METHODS, "LoRA", list(map(int, row["dev"])), [v[0] for v in values], [v[1] for v in values])
    for share, look in (("0.5", ":"), ("0.9", "--")):
        found = [own[share] for own in row["estimates"]["Full"]]
        if found:
            axes.axvline(
                fmean(found),
                color=PRINT.methods[-1],
                linestyle=look,
                label=f"rank for {100 * float(share):g} % of Full's change",
            )
    counted(axes, list(map(int, row["dev"])), "rank")
    axes.set_ylabel("dev score")


def function(axes: Axes, rows: Rows) -> None:
    """CKA with Full by block, means over tasks; Full itself stands for the bare backbone."""
    for method in names(rows, "method"):
        own = [row["cka"] for row in some(rows, method=method)]
        labels = [place.replace("encoder.block.", "e").replace("decoder.block.", "d") for place in own[0]]
        means = [fmean(one[place] for one in own) for place in own[0]]
        line(axes, METHODS, method, labels, means)
    axes.set_ylabel("CKA")
    axes.set_ylim(0, 1)


def divergence(axes: Axes, rows: Rows) -> None:
    """KL from Full by method, one mark a task."""
    for place, method in enumerate(names(rows, "method")):
        values = [row["kl"][0] for row in some(rows, method=method)]
        axes.plot([place] * len(values), values, METHODS.marker(method), color=METHODS.color(method))
    axes.set_xticks(range(len(names(rows, "method"))), names(rows, "method"), rotation=30)
    axes.set_yscale("log")
    axes.set_ylabel("KL(Full || method), nats")


def robust(axes: Axes, rows: Rows) -> None:
    """Accuracy on clean and on mistyped texts."""
    for index, row in enumerate(rows):
        color = LOOPS.color(row["way"])
        values, errors = ([row[kind][part] for kind in ("clean", "attacked")] for part in (0, 1))
        axes.bar([index * 0.27, 1 + index * 0.27], values, 0.25, yerr=errors, color=color, capsize=2, label=row["way"])
    axes.set_xticks([0.27, 1.27], ["clean", "attacked"])
    axes.set_ylabel("test accuracy")


def draw(folder: Path, tables: dict[str, Rows]) -> Iterable[str]:
    """Write every figure that there is data for; yield their names."""
    after, before = (some(tables["control"], side=side) for side in ("after", "before"))
    control = [
        (f"{label}, {side}", lambda axes, rows=rows, part=part, value=value: steps(axes, rows, part, value))
        for part, value, label in (("steps", "violation", "V"), ("steps", "slope", "|grad H|"), ("reach", "trace", "trace of the Gramian"),
                                   ("reach", "per_parameter", "the same a parameter"))
        for side, rows in (("before", before), ("after", after))
    ]  # fmt: skip
    share = ("|u| over the block's own step, after", lambda axes: steps(axes, after, "steps", "share"))
    spectra = tables["spectrum"]
    figures = {
        "intrinsic": (tables["intrinsic"], by_task(tables["intrinsic"], intrinsic), (3.1, 2.8)),
        "spectrum": (
            spectra,
            [
                ("effective rank", lambda axes: ranks(axes, spectra, 4, "effective rank")),
                ("norm", lambda axes: ranks(axes, spectra, 3, "|change of W|")),
                ("energy", lambda axes: kept(axes, spectra)),
            ],
            (3.3, 3.3),
        ),
        "residual": (
            tables["residual"],
            [("left by each family", lambda axes: residual(axes, tables["residual"]))],
            (6.2, 3.6),
        ),
        "violation": (after, [*control[:4], share], (2.8, 2.8)),
        "reach": (
            after,
            [*control[4:], ("Gramian's spectrum, last block, after", lambda axes: gramian(axes, after))],
            (2.8, 2.8),
        ),
        "placement": (tables["placement"], by_task(tables["placement"], placement), (3.1, 2.8)),
        "size": (tables["size"], by_task(tables["size"], size), (3.1, 2.8)),
        "function": (
            tables["function"],
            [
                (
                    "states: CKA with Full\n(Full: with the bare backbone)",
                    lambda axes: function(axes, tables["function"]),
                ),
                (
                    "answers: KL from Full\n(Full: of the bare backbone)",
                    lambda axes: divergence(axes, tables["function"]),
                ),
            ],
            (3.6, 3.2),
        ),
        "robust": (tables["robust"], by_task(tables["robust"], robust), (3.1, 2.6)),
    }
    for name, (rows, panels, inches) in figures.items():
        if rows:
            save(folder, name, panels, inches)
            yield name
