"""The shape of the repository: imports point one way, files and functions stay small, nothing is passed through."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "deltatune"
# A package may import what stands to the left of it, and itself.
ORDER = ("core", "methods", "backbones", "formats", "tasks", "tuning", "study", "theory", "serve", "cli")
BESIDE = {("formats", "backbones"), ("serve", "theory"), ("serve", "study"), ("theory", "study")}
SHARED = {"errors", "files", "hub", "quiet"}
# These stand in for a function of somebody else's, so they take what it takes.
STAND_INS = {
    ("core/calls.py", "_call"),
    ("core/calls.py", "_generate"),
    ("backbones/attention.py", "attention"),
    ("backbones/dense.py", "attention"),
}
FILE_LINES, METHOD_LINES, METHOD_MEDIAN, FUNCTION_LINES = 300, 150, 60, 40
CODE = sorted(path for part in ("src", "tests", "benchmarks", "examples") for path in (ROOT / part).rglob("*.py"))
MODULES = sorted(SOURCE.rglob("*.py"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def package(path: Path) -> str:
    """The package of a source file: `core` for core/attach.py, an empty string for the public module."""
    inner = path.relative_to(SOURCE).with_suffix("").as_posix().split("/")
    return "" if inner == ["__init__"] else inner[0]


def dotted(path: Path) -> list[str]:
    parts = ["deltatune", *path.relative_to(SOURCE).with_suffix("").parts]
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported(path: Path) -> Iterator[str]:
    """Every name that a file imports, as `module.name`, wherever in the file; `import_module("...")` included."""
    for node in ast.walk(tree(path)):
        match node:
            case ast.Import(names=names):
                yield from (text for alias in names for text in [alias.name, *attributes(path, alias.asname)])
            case ast.ImportFrom(module=module, names=names, level=level):
                up = dotted(path) if path.name == "__init__.py" else dotted(path)[:-1]
                before = up[: len(up) - level + 1] if level else []
                yield from (".".join([*before, *([module] if module else []), alias.name]) for alias in names)
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(text)), *_]):
                yield text


def attributes(path: Path, name: str | None) -> list[str]:
    """What a file takes from the public module that it imports as `name`."""
    used = (
        node for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    )
    return [f"deltatune.{node.attr}" for node in used if name == "dt" and node.value.id == name]


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]


@cache
def kept_files() -> tuple[Path, ...]:
    """The files that git keeps or would keep."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout: which files are kept is not known")
    return tuple(path for line in listed.stdout.splitlines() if (path := ROOT / line).is_file())


def home(module: str) -> str:
    """The package that `deltatune.x.y` lies in; a public name counts as the package that defines it."""
    head = [*module.split("."), "errors"][1]
    if head in (*ORDER, *SHARED):
        return head
    value = getattr(importlib.import_module("deltatune"), head)
    return "errors" if isinstance(value, str) else value.__module__.split(".")[1]


def allowed(user: str, used: str) -> bool:
    if used in (*SHARED, user) or user == "":
        return True
    return user in ORDER and ORDER.index(used) < ORDER.index(user) and (user, used) not in BESIDE


def test_every_package_has_its_place() -> None:
    packages = {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert packages <= set(ORDER)


def test_imports_point_one_way() -> None:
    wrong = [
        f"{name(path)} imports {module}"
        for path in MODULES
        for module in imported(path)
        if module.split(".")[0] == "deltatune"
        if not allowed(package(path), home(module))
    ]
    assert wrong == []


def test_the_core_and_the_methods_know_only_torch() -> None:
    forbidden = {"transformers", "accelerate", "datasets", "peft", "sklearn", "scipy", "typer", "rich"}
    wrong = [
        f"{name(path)} imports {module}"
        for path in MODULES
        if package(path) in ("core", "methods")
        for module in imported(path)
        if module.split(".")[0] in forbidden
    ]
    assert wrong == []


def test_no_method_imports_another() -> None:
    from deltatune.core.method import registry

    importlib.import_module("deltatune.methods")
    homes = {method.__module__ for method in registry().values() if method.__module__.startswith("deltatune.")}
    wrong = [
        f"{name(path)} imports {module}"
        for path in (SOURCE / "methods").rglob("*.py")
        if path.name != "__init__.py"
        for module in imported(path)
        if any(module == home or module.startswith(f"{home}.") for home in homes - {".".join(dotted(path))})
    ]
    assert homes
    assert wrong == []


def test_nothing_is_probed_in_the_core_and_the_methods() -> None:
    wrong = [
        f"{name(path)}:{call.lineno} calls {call.func.id}"
        for path in MODULES
        if package(path) in ("core", "methods")
        for call in calls(path)
        if isinstance(call.func, ast.Name) and call.func.id in ("hasattr", "getattr")
    ]
    assert wrong == []


def passes_through(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    if function.args.kwarg is None:
        return False
    extra = function.args.kwarg.arg
    inner = (node for node in ast.walk(function) if isinstance(node, ast.Call))
    return any(
        keyword.arg is None and isinstance(keyword.value, ast.Name) and keyword.value.id == extra
        for call in inner
        for keyword in call.keywords
    )


def test_no_function_passes_its_keywords_through() -> None:
    wrong = [
        f"{name(path)}:{function.lineno} {function.name}"
        for path in MODULES
        for function in functions(path)
        if passes_through(function) and (path.relative_to(SOURCE).as_posix(), function.name) not in STAND_INS
    ]
    assert wrong == []


def test_files_stay_small() -> None:
    lengths = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in CODE}
    assert {path: lines for path, lines in lengths.items() if lines > FILE_LINES} == {}


def test_methods_stay_small() -> None:
    from deltatune.core.method import registry

    importlib.import_module("deltatune.methods")
    homes = {method.__module__ for method in registry().values()}
    lengths = [
        (len(path.read_text(encoding="utf-8").splitlines()), name(path))
        for path in (SOURCE / "methods").rglob("*.py")
        if ".".join(dotted(path)) in homes
    ]
    assert [line for line in lengths if line[0] > METHOD_LINES] == []
    assert sorted(lengths)[len(lengths) // 2][0] <= METHOD_MEDIAN


def test_functions_stay_small() -> None:
    lengths = {
        f"{name(path)}:{function.lineno} {function.name}": (function.end_lineno or 0) - function.lineno + 1
        for path in CODE
        for function in functions(path)
    }
    assert {function: lines for function, lines in lengths.items() if lines > FUNCTION_LINES} == {}


def test_public_names_are_documented() -> None:
    public = importlib.import_module("deltatune")
    values = {word: getattr(public, word) for word in dir(public)}
    documented = {word: value for word, value in values.items() if inspect.isclass(value) or inspect.isroutine(value)}
    assert {"LoRA", "attach", "sites"} <= set(documented)
    assert [word for word, value in documented.items() if not own_doc(value)] == []


def own_doc(value: object) -> str:
    """The docstring that was written for `value`: not a base class's, not the signature that dataclasses put there."""
    text = (value.__doc__ or "").strip()
    return "" if inspect.isclass(value) and text.startswith(f"{value.__name__}(") and text.endswith(")") else text


def test_nothing_is_left_over() -> None:
    words = re.compile("|".join(("TO" + "DO", "FIX" + "ME", "X" * 3)))
    texts = (
        path for path in kept_files() if path.suffix in (".py", ".toml", ".md") or path.name in ("Makefile", "run")
    )
    assert [name(path) for path in texts if words.search(path.read_text(encoding="utf-8"))] == []


def test_no_file_names_a_machine() -> None:
    places = re.compile(r"(?<![\w.~/-])/(?:work|root|home|Users|opt)/\w|\bpypi\.org|pythonhosted", re.IGNORECASE)
    kinds = (".py", ".toml", ".md", ".json", ".csv", ".html", ".lock", ".txt", ".yml", ".yaml")
    texts = (path for path in kept_files() if path.suffix in kinds or path.name in ("Makefile", "run", ".gitignore"))
    wrong = [
        name(path)
        for path in texts
        if "builtin" not in path.parts and path != Path(__file__)
        if places.search(path.read_text(encoding="utf-8"))
    ]
    assert wrong == []


@pytest.mark.parametrize("file", ["requirements.lock", "requirements-others.lock"])
def test_a_lock_leaves_the_torch_build_to_the_machine(file: str) -> None:
    lock = (ROOT / file).read_text(encoding="utf-8")
    pinned = re.findall(r"^([a-z0-9-]+)==", lock, re.MULTILINE)
    assert "transformers" in pinned
    assert [package for package in pinned if re.match(r"(torch|triton|nvidia-.*|cuda-.*)$", package)] == []
    assert re.findall(r"https?://|--(?:extra-)?index|--find-links", lock) == []
