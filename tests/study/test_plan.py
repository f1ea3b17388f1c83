"""Plans: what runs they mean, and what they say about a mistake."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from deltatune.errors import DeltaTuneError
from deltatune.study import Plan
from deltatune.study.inputs import check_places, inspect

SEARCH = """
[search]
lr = [1e-3, 3e-3, 1e-2]
tasks = ["sentiment"]
steps = 10
[search.methods]
Full = [1e-4, 3e-4, 1e-3]
"""


def ids(plan: Plan) -> list[str]:
    return [entry.run.id for entry in plan.runs()]


def test_runs_are_the_product_in_the_order_of_the_plan_with_seeds_slowest(plan: Callable[..., Plan]) -> None:
    made = plan()
    cells = [(entry.run.seed, entry.run.task, entry.method) for entry in made.runs()]
    assert cells == [(s, t, m) for s in (0, 1) for t in ("topic", "sentiment") for m in ("LoRA", "Full")]
    assert len(set(ids(made))) == 8


def test_same_plan_gives_same_ids_whatever_the_order_of_keys(plan: Callable[..., Plan], tmp_path: Path) -> None:
    first = plan()
    text = first.text.replace('LoRA = "LoRA(rank=2)"\nFull = "Full()"', 'Full = "Full()"\nLoRA = "LoRA(  rank = 2 )"')
    text = text.replace("steps = 20\neval_every = 5", "eval_every = 5\nsteps = 20").replace("3e-3", "0.003")
    assert text != first.text
    (tmp_path / "other.toml").write_text(text)
    assert sorted(ids(Plan.read(tmp_path / "other.toml"))) == sorted(ids(first))


def test_a_longer_plan_keeps_the_ids_of_the_shorter(plan: Callable[..., Plan]) -> None:
    assert set(ids(plan(seeds="0"))) < set(ids(plan(seeds="0, 1, 2")))


def test_every_method_gets_the_same_search_budget_and_the_best_dev_score_wins(plan: Callable[..., Plan]) -> None:
    made = plan(more=SEARCH)
    search = made.search_runs()
    assert [(e.method, e.run.recipe.lr) for e in search] == [
        ("LoRA", 1e-3), ("LoRA", 3e-3), ("LoRA", 1e-2), ("Full", 1e-4), ("Full", 3e-4), ("Full", 1e-3),
    ]  # fmt: skip
    assert {(e.run.task, e.run.seed, e.run.recipe.steps, e.part) for e in search} == {("sentiment", 0, 10, "search")}
    assert made.runs() == search
    assert len(made.undecided({})) == 8
    dev = dict(zip([e.run for e in search], [10.0, 30.0, 20.0, None, 5.0, 5.0], strict=True))
    final = made.runs(dev)[len(search) :]
    assert {(e.method, e.run.recipe.lr, e.run.recipe.steps) for e in final} == {("LoRA", 3e-3, 20), ("Full", 3e-4, 20)}
    assert made.undecided(dev) == []


def test_a_search_whose_candidates_all_fail_leaves_its_cells_undecided(plan: Callable[..., Plan]) -> None:
    made = plan(more=SEARCH)
    dev = {entry.run: None if entry.method == "Full" else 50.0 for entry in made.search_runs()}
    assert {cell.method for cell in made.undecided(dev)} == {"Full"}
    assert {entry.run.recipe.lr for entry in made.runs(dev) if entry.part == "final"} == {1e-3}


def test_without_tasks_the_search_decides_for_each_task_by_itself(plan: Callable[..., Plan]) -> None:
    made = plan(more="[search]\nlr = [1e-3, 1e-2]")
    dev = {e.run: float((e.run.task == "topic") == (e.run.recipe.lr == 1e-3)) for e in made.search_runs()}
    chosen = {(e.run.task, e.run.recipe.lr) for e in made.runs(dev) if e.part == "final"}
    assert chosen == {("topic", 1e-3), ("sentiment", 1e-2)}


def test_blocks_and_own_recipes_apply_where_they_are_written(
    plan: Callable[..., Plan], write: Callable, tmp_path: Path
) -> None:
    path = write(more='[[extra]]\nbackbones = ["random:tiny"]\ntasks = ["topic"]\nrecipe = {batch = 4}')
    path.write_text(path.read_text().replace('"Full()"', '{delta = "Full()", recipe = {weight_decay = 0.1}}'))
    made = Plan.read(path)
    assert made.backbones == ("tiny", "random:tiny")
    found = {(e.run.backbone, e.run.task, e.method, e.run.recipe.batch, e.run.recipe.weight_decay) for e in made.runs()}
    assert found == {
        (backbone, task, method, batch, decay)
        for backbone, task, batch in (("tiny", "topic", 16), ("tiny", "sentiment", 16), ("random:tiny", "topic", 4))
        for method, decay in (("LoRA", 0.0), ("Full", 0.1))
    }


MISTAKES = [
    ('name = "small"', "name = small", r"plan.toml is not TOML: .*line 2.*'name = small'"),
    ('name = "small"', 'nmae = "small"', r"line 2: nmae: there is no such key here. Did you mean 'name'"),
    ("seeds = [0, 1]", "seeds = [0, 0]", r"line 5: seeds: lists 0 more than once"),
    ("seeds = [0, 1]", "seeds = 0", r"line 5: seeds: must be a list"),
    ("seeds = [0, 1]", "", r"seeds is missing"),
    ('"LoRA(rank=2)"', '"Lora(rank=2)"', r"line 8: \[methods\] LoRA: .*'Lora'.*Did you mean 'LoRA'"),
    ('"LoRA(rank=2)"', '"LoRA(rnk=2)"', r"line 8: \[methods\] LoRA: .*'rnk'.*Did you mean 'rank'"),
    ('"LoRA(rank=2)"', "'LoRA().at(\"attn.qq\")'", r"line 8: \[methods\] LoRA: there is no role 'attn.qq'.*'attn.q'"),
    ('"LoRA(rank=2)"', "3", r"line 8: \[methods\] LoRA: must be text in quotes, but is 3"),
    ('"Full()"', '{dleta = "Full()"}', r"line 9: \[methods.Full\] dleta: .*Did you mean 'delta'"),
    ('"Full()"', '"LoRA(rank=2)"', r"line 9: \[methods\] Full: is the same delta with the same recipe as 'LoRA'"),
    ('"Full()"', '{delta = "Full()", recipe = {bach = 4}}', r"line 9: \[methods.Full.recipe\] bach: .*'batch'"),
    ("steps = 20", "stpes = 20", r"line 12: \[recipe\] stpes: .*Did you mean 'steps'"),
    ("steps = 20", 'steps = "20"', r"line 12: \[recipe\] steps: must be a whole number, but is '20'"),
    ("steps = 20", "steps = 0", r"line 12: \[recipe\] steps: .*1 or more"),
    ("lr = 3e-3", 'optimizer = "adm"', r"line 14: \[recipe\] optimizer: .*'adm'.*'adamw'"),
    ("lr = 3e-3", '[baseline]\nmethod = "Fool"', r"line 15: \[baseline\] method: there is no method 'Fool'.*'Full'"),
    ("lr = 3e-3", "[search]\nlr = [1e-3]\n[search.methods]\nLora = [1e-3]", r"\[search.methods\] Lora: .*'LoRA'"),
    (
        "lr = 3e-3",
        "[search]\nlr = [1e-3]\n[search.methods]\nLoRA = [1e-3, 1]",
        r"'LoRA' has 2 candidates where others have 1",
    ),
    ("lr = 3e-3", "[search]\nlr = [0]", r"line 15: \[search\] lr: .*above 0"),
    ("lr = 3e-3", "eval_every = 0\n[search]\nlr = [1]", r"line 14: \[recipe\] eval_every: is 0, but \[search\]"),
    (
        "lr = 3e-3",
        '[[extra]]\nbackbones = ["tiny"]',
        r"extra: the backbone 'tiny' is already planned on the task 'topic'",
    ),
]


@pytest.mark.parametrize(("old", "new", "message"), MISTAKES)
def test_mistakes_name_line_table_and_key(write: Callable, old: str, new: str, message: str) -> None:
    path = write()
    text = path.read_text()
    assert text.count(old) == 1
    if "eval_every = 0" in new:
        text = text.replace("eval_every = 5\n", "\n")
    path.write_text(text.replace(old, new))
    with pytest.raises(DeltaTuneError, match=message):
        Plan.read(path)


def test_a_plan_that_is_not_there_offers_its_neighbours(write: Callable) -> None:
    path = write()
    with pytest.raises(DeltaTuneError, match="there is no plan .*plam.toml.*plan.toml"):
        Plan.read(path.with_name("plam.toml"))


def test_unknown_tasks_and_backbones_are_all_reported_before_anything_runs(plan: Callable[..., Plan]) -> None:
    made = plan(tasks='"topc", "sentiment"', backbones='"tinny"')
    with pytest.raises(DeltaTuneError) as caught:
        inspect(made)
    assert "'topc'" in str(caught.value) and "'topic'" in str(caught.value)
    assert "'tinny'" in str(caught.value) and "'tiny'" in str(caught.value)


def test_a_delta_without_a_place_is_reported_before_anything_runs(write: Callable) -> None:
    path = write()
    path.write_text(path.read_text().replace('"LoRA(rank=2)"', "'LoRA().at(\"attn.q[7]\")'"))
    with pytest.raises(DeltaTuneError, match=r"LoRA on tiny: .*attn.q\[7\].* matches nothing"):
        check_places(Plan.read(path))
