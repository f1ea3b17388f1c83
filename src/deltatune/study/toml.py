"""Reading a plan from TOML, with errors that name the line, the table and the key, and offer the nearest valid name."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from deltatune.errors import DeltaTuneError, nearest
from deltatune.study.plan import Block, MethodPlan, Plan, Search

if TYPE_CHECKING:
    from deltatune.tuning import Recipe


@dataclass(frozen=True)
class Table:
    """One table of a TOML file that knows where it stands, so that every error can say it."""

    file: Path
    text: str
    name: str
    values: Mapping[str, Any]

    def wrong(self, key: str, problem: str) -> NoReturn:
        """Raise the error of a key: file, line, table, key, problem."""
        line = find_line(self.text, self.name, key)
        place = f"{self.file}, line {line}" if line else str(self.file)
        table = f"[{self.name}] " if self.name else ""
        raise DeltaTuneError(f"{place}: {table}{key}: {problem}")

    def only(self, known: Iterable[str]) -> None:
        """Refuse keys that mean nothing here."""
        known = list(known)
        for key in self.values:
            if key not in known:
                offer = nearest(key, known) or f" Known keys: {', '.join(known)}."
                self.wrong(key, f"there is no such key here.{offer}")

    def table(self, key: str) -> Table:
        """The table below `key`, empty when it is absent."""
        values = self.values.get(key, {})
        if not isinstance(values, dict):
            self.wrong(key, f"must be a table, but is {values!r}.")
        return Table(self.file, self.text, f"{self.name}.{key}" if self.name else key, values)

    def tables(self, key: str) -> list[Table]:
        """The tables written as `[[key]]`."""
        values = self.values.get(key, [])
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            self.wrong(key, f"must be written as [[{key}]] tables, but is {values!r}.")
        return [Table(self.file, self.text, key, value) for value in values]

    def get(self, key: str, hint: Any, default: Any = None) -> Any:
        """The value of `key` with the type `hint`, or the default when it is absent."""
        if key not in self.values:
            return default
        return self.typed(key, self.values[key], hint)

    def typed(self, key: str, value: Any, hint: Any) -> Any:
        """`value` as the type `hint` (str, int, float, bool or a Literal); whole numbers are accepted as floats."""
        if get_origin(hint) is Literal:
            if value not in get_args(hint):
                offer = nearest(str(value), map(str, get_args(hint)))
                self.wrong(key, f"must be one of {', '.join(map(repr, get_args(hint)))}, but is {value!r}.{offer}")
            return value
        if hint is float and type(value) is int:
            return float(value)
        if type(value) is not hint:
            names = {str: "text in quotes", int: "a whole number", float: "a number", bool: "true or false"}
            self.wrong(key, f"must be {names[hint]}, but is {value!r}.")
        return value

    def several(self, key: str, hint: Any, required: bool = False) -> tuple[Any, ...]:
        """The list at `key`: not empty, every item of the type `hint`, none twice; absent gives an empty tuple."""
        if key not in self.values:
            if required:
                raise DeltaTuneError(f"{self.file}: {f'[{self.name}] ' if self.name else ''}{key} is missing.")
            return ()
        values = self.values[key]
        if not isinstance(values, list) or not values:
            self.wrong(key, f"must be a list with at least one item, but is {values!r}.")
        items = tuple(self.typed(key, value, hint) for value in values)
        for item in items:
            if items.count(item) > 1:
                self.wrong(key, f"lists {item!r} more than once.")
        return items


def find_line(text: str, table: str, key: str) -> int | None:
    """The number of the line that defines `key` in `table` ("" for the top), or None where the text does not tell."""
    current = ""
    inside = re.compile(rf"""(^|[\s{{,."'])["']?{re.escape(key)}["']?\s*(=|\.|\])""")
    for number, line in enumerate(text.splitlines(), start=1):
        header = re.match(r"\s*\[+([^\[\]]+)\]+", line)
        if header:
            current = ".".join(part.strip().strip("\"'") for part in header[1].split("."))
            if current == (f"{table}.{key}" if table else key):
                return number
            continue
        parts = table.split(".") if table else []
        here = current.split(".") if current else []
        if here == parts[: len(here)] and all(part in line for part in parts[len(here) :]) and inside.search(line):
            return number
    return None


def read_plan(path: Path) -> Plan:
    """Read and validate a plan without touching data or models; see `Plan.read`."""
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text)
    except FileNotFoundError:
        raise DeltaTuneError(f"there is no plan {path}.{_plans_beside(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DeltaTuneError(f"cannot read the plan {path}: {error}.") from error
    except tomllib.TOMLDecodeError as error:
        raise DeltaTuneError(f"{path} is not TOML: {error}.{_quote(text, str(error))}") from None
    return _plan(Table(path, text, "", values), text)


def _plans_beside(path: Path) -> str:
    return nearest(str(path), (str(other) for other in path.parent.glob("*.toml"))) if path.parent.is_dir() else ""


def _quote(text: str, message: str) -> str:
    found = re.search(r"line (\d+)", message)
    lines = text.splitlines()
    return f" The line is: {lines[int(found[1]) - 1].strip()!r}." if found and int(found[1]) <= len(lines) else ""


def _plan(top: Table, text: str) -> Plan:
    top.only(["name", "backbones", "tasks", "seeds", "methods", "recipe", "search", "extra", "baseline", "theory"])
    methods = _methods(top)
    tasks = top.several("tasks", str, required=True)
    blocks = [Block(top.several("backbones", str, required=True), tasks)]
    blocks += [_block(extra, tasks) for extra in top.tables("extra")]
    recipe = _recipe(top.table("recipe"))
    return Plan(
        name=top.get("name", str, top.file.stem),
        methods=methods,
        blocks=tuple(_distinct(top, blocks)),
        seeds=top.several("seeds", int, required=True),
        recipe=recipe,
        search=_search(top, methods, recipe),
        baseline=_baseline(top, methods),
        text=text,
        theory=top.several("theory", str),
    )


def _block(table: Table, tasks: tuple[str, ...]) -> Block:
    table.only(["backbones", "tasks", "recipe"])
    backbones = table.several("backbones", str, required=True)
    return Block(backbones, table.several("tasks", str) or tasks, _settings(table.table("recipe")))


def _distinct(top: Table, blocks: list[Block]) -> list[Block]:
    seen: set[tuple[str, str]] = set()
    for block in blocks:
        for pair in ((backbone, task) for backbone in block.backbones for task in block.tasks):
            if pair in seen:
                top.wrong("extra", f"the backbone {pair[0]!r} is already planned on the task {pair[1]!r}.")
            seen.add(pair)
    return blocks


def _methods(top: Table) -> dict[str, MethodPlan]:
    table = top.table("methods")
    if not table.values:
        raise DeltaTuneError(f'{top.file}: [methods] is missing or empty; write for example LoRA = "LoRA(rank=8)".')
    methods: dict[str, MethodPlan] = {}
    for label, value in table.values.items():
        plan = _method(table, label, value)
        for other, known in methods.items():
            if known == plan:
                table.wrong(label, f"is the same delta with the same recipe as {other!r}.")
        methods[label] = plan
    return methods


def _method(table: Table, label: str, value: Any) -> MethodPlan:
    if isinstance(value, dict):
        own = table.table(label)
        own.only(["delta", "recipe"])
        expression = own.get("delta", str)
        if expression is None:
            table.wrong(label, f'has no delta; write {label} = {{delta = "LoRA(rank=8)"}}.')
        return MethodPlan(
            _located(own, "delta", partial(_canonical, expression)), _settings(own.table("recipe")), expression
        )
    expression = table.typed(label, value, str)
    return MethodPlan(_located(table, label, partial(_canonical, expression)), {}, expression)


def _canonical(expression: str) -> str:
    import deltatune as dt
    from deltatune.core.where import parse

    delta = dt.parse(expression)
    for term in delta.terms:
        parse(term.where)
    return str(delta)


def _located(table: Table, key: str, action: Callable[[], Any]) -> Any:
    """The result of `action`, its error prefixed by where in the plan it comes from."""
    try:
        return action()
    except DeltaTuneError as error:
        table.wrong(key, str(error))


def _settings(table: Table) -> dict[str, Any]:
    """The keys of a recipe table that are written, each checked against the type of the recipe's field."""
    from deltatune.tuning import Recipe

    hints = get_type_hints(Recipe)
    fields = [item.name for item in dataclasses.fields(Recipe)]
    table.only(fields)
    settings = {key: table.get(key, hints[key]) for key in fields if key in table.values}
    for key, value in settings.items():
        _located(table, key, partial(Recipe, **{key: value}))
    return settings


def _recipe(table: Table) -> Recipe:
    from deltatune.tuning import Recipe

    return Recipe(**_settings(table))


def _search(top: Table, methods: Mapping[str, MethodPlan], recipe: Recipe) -> Search | None:
    from deltatune.tuning import Recipe

    if "search" not in top.values:
        return None
    if not recipe.eval_every:
        top.table("recipe").wrong("eval_every", "is 0, but [search] chooses by the dev score; write for example 50.")
    table = top.table("search")
    table.only(["lr", "tasks", "steps", "seed", "methods"])
    rates = _rates(table, methods)
    for label, method in methods.items():
        if "lr" in method.recipe:
            top.table("methods").wrong(
                label, "sets lr in its recipe, but [search] is to find it; leave one of them out."
            )
    steps = table.get("steps", int, recipe.steps)
    _located(table, "steps", partial(Recipe, steps=steps))
    return Search(rates, table.several("tasks", str), steps, table.get("seed", int, 0))


def _rates(table: Table, methods: Mapping[str, MethodPlan]) -> dict[str, tuple[float, ...]]:
    """The learning rates of each method: its own list or the common one, all of one length."""
    from deltatune.tuning import Recipe

    own = table.table("methods")
    own.only(methods)
    common = table.several("lr", float, required=not set(methods) <= set(own.values))
    rates = {label: own.several(label, float) or common for label in methods}
    budget = len(common) or max(map(len, rates.values()))
    for label, values in rates.items():
        place, key = (own, label) if label in own.values else (table, "lr")
        if len(values) != budget:
            place.wrong(
                key,
                f"{label!r} has {len(values)} candidates where others have {budget}; every method gets the same number.",
            )
        for value in values:
            _located(place, key, partial(Recipe, lr=value))
    return rates


def _baseline(top: Table, methods: Mapping[str, MethodPlan]) -> str | None:
    table = top.table("baseline")
    table.only(["method"])
    name = table.get("method", str)
    if name is None:
        return "Full" if "Full" in methods else None
    if name not in methods:
        table.wrong("method", f"there is no method {name!r} in [methods].{nearest(name, methods)}")
    return name
