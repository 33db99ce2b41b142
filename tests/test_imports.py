"""Who may import whom: the source is what the table of rooms says, and docs/design.md shows that table."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.fresh import in_fresh
from support.rooms import GROUND, MAX_TOP_LEVEL_FILES, PURE, ROOMS, SOURCE, table_lines

DESIGN = Path(__file__).parents[1] / "docs" / "design.md"
MODELS_AND_PROCESSES = ("transformers", "torch.nn", "torch.distributed")


def module_name(path: Path) -> str:
    """`train/phases.py` -> `train.phases`, a package being named like its folder, and the root `__init__`."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "__init__"


def is_in(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def used_names(tree: ast.AST, package: str) -> set[str]:
    """Dotted names of all that is imported, or reached as an attribute of an imported module; aliases resolved.

    A text that is a dotted name counts as well: modules that are imported at first use are named so.
    """
    names: set[str] = set()
    alias: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for entry in node.names:
                names.add(entry.name)
                top = entry.name.split(".", maxsplit=1)[0]
                alias[entry.asname or top] = entry.name if entry.asname else top
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (base, node.module or "") if part)
            for entry in node.names:
                names.add(f"{origin}.{entry.name}")
                alias[entry.asname or entry.name] = f"{origin}.{entry.name}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("secateur."):
            names.add(node.value.partition(":")[0])
    for node in ast.walk(tree):
        parts: list[str] = []
        inner = node
        while isinstance(inner, ast.Attribute):
            parts.insert(0, inner.attr)
            inner = inner.value
        if parts and isinstance(inner, ast.Name) and inner.id in alias:
            names.add(".".join([alias[inner.id], *parts]))
    return names


def package_of(path: Path) -> str:
    return ".".join(("secateur", *path.relative_to(SOURCE).parent.parts))


PATHS = {module_name(path): path for path in sorted(SOURCE.rglob("*.py"))}


@functools.cache
def used_by(module: str) -> set[str]:
    path = PATHS[module]
    return used_names(ast.parse(path.read_text(encoding="utf-8")), package_of(path))


def module_of(name: str) -> str | None:
    """The module of secateur that a dotted name is, or is in: the longest that fits. None for other packages."""
    if name != "secateur" and not name.startswith("secateur."):
        return None
    parts = name.split(".")[1:]
    while parts and ".".join(parts) not in PATHS:
        parts.pop()
    return ".".join(parts) or "__init__"


def room_of(module: str) -> str:
    """The room of a module: a file or folder at the top, or a folder of model_folder."""
    parts = module.split(".")
    inner = ".".join(parts[:2])
    return (
        inner
        if parts[0] == "model_folder" and len(parts) > 1 and (SOURCE / "model_folder" / parts[1]).is_dir()
        else parts[0]
    )


@functools.cache
def imported_modules(module: str) -> set[str]:
    return {found for name in used_by(module) if (found := module_of(name)) is not None}


def imported_rooms(room: str) -> set[str]:
    modules = [module for module in PATHS if room_of(module) == room]
    return {room_of(other) for module in modules for other in imported_modules(module)} - {room}


def docstring_of(module: str) -> str:
    docstring = ast.get_docstring(ast.parse(PATHS[module].read_text(encoding="utf-8")))
    assert docstring, f"{module} has no docstring"
    return docstring


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import torch.nn as nn", "torch.nn"),
        ("from torch import distributed as dist", "torch.distributed"),
        ("import torch\ndef f(x: torch.nn.Module): ...", "torch.nn.Module"),
        ("import torch as t\nt.distributed.barrier()", "torch.distributed.barrier"),
        ("def f():\n    from transformers.models import llama", "transformers.models.llama"),
        ("from .phases import spearman", "secateur.train.phases.spearman"),
        ("from .. import plans", "secateur.plans"),
        ("from ..decide.laep_rule import exact", "secateur.decide.laep_rule.exact"),
        ("HOMES = {'Plan': 'secateur.plans'}", "secateur.plans"),
        ("COMMAND = 'secateur.commands.plan:plan'", "secateur.commands.plan"),
    ],
)
def test_the_reader_of_imports_sees_every_spelling(source: str, name: str) -> None:
    assert name in used_names(ast.parse(source), "secateur.train")


@pytest.mark.parametrize(
    ("name", "module", "room"),
    [
        ("secateur.plans.Plan", "plans", "plans"),
        ("secateur.train.phases.spearman", "train.phases", "train"),
        ("secateur.model_folder.read.load.text_model", "model_folder.read.load", "model_folder.read"),
        ("secateur.model_folder.read", "model_folder.read", "model_folder.read"),
        ("secateur.model_folder.prune.prune_folder", "model_folder.prune", "model_folder"),
        ("secateur.Plan", "__init__", "__init__"),
        ("secateur", "__init__", "__init__"),
    ],
)
def test_a_name_belongs_to_the_longest_module_that_fits(name: str, module: str, room: str) -> None:
    assert module_of(name) == module
    assert room_of(module) == room


def test_the_table_has_every_room_and_no_other() -> None:
    assert set(ROOMS) == {room_of(module) for module in PATHS}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_the_table_allows_and_uses_every_permission(room: str) -> None:
    assert imported_rooms(room) == set(ROOMS[room].may_import)


@pytest.mark.parametrize("room", ROOMS)
def test_permissions_lead_down_the_table_so_that_there_is_no_circle(room: str) -> None:
    order = list(ROOMS)
    places = [order.index(other) for other in ROOMS[room].may_import]
    assert all(place > order.index(room) for place in places)
    assert places == sorted(set(places)), "not in the order of the table, or twice"


@pytest.mark.parametrize("module", [module for module in PATHS if module != "__init__"])
def test_no_module_imports_the_package_itself(module: str) -> None:
    assert "__init__" not in imported_modules(module)


@pytest.mark.parametrize("room", ROOMS)
def test_the_first_line_of_a_room_is_its_question(room: str) -> None:
    assert docstring_of(room).splitlines()[0] == ROOMS[room].question


def test_the_top_level_has_few_files() -> None:
    assert 0 < len(list(SOURCE.glob("*.py"))) <= MAX_TOP_LEVEL_FILES


def test_the_design_page_shows_the_table_and_its_rules() -> None:
    text = DESIGN.read_text(encoding="utf-8")
    lines = text.splitlines()
    start = lines.index(table_lines()[0])
    assert lines[start : start + len(table_lines()) + 1] == [*table_lines(), ""]
    assert f"At most {MAX_TOP_LEVEL_FILES} files at the top level" in text
    assert "a checkpoint is what training leaves; a model folder is what others load" in text


@pytest.mark.parametrize("part", [*PURE, *GROUND])
def test_every_pure_part_exists(part: str) -> None:
    assert part in PATHS


@pytest.mark.parametrize("module", [module for module in PATHS if is_in(module, PURE)])
def test_pure_modules_use_no_model_no_process_group_and_only_each_other(module: str) -> None:
    assert not {name for name in used_by(module) if is_in(name, MODELS_AND_PROCESSES)}
    assert not {other for other in imported_modules(module) if not is_in(other, PURE + GROUND)}


@pytest.mark.parametrize("module", [module for module in PATHS if room_of(module) != "train"])
def test_only_training_knows_torch_distributed(module: str) -> None:
    used = {name for name in used_by(module) if is_in(name, ("torch.distributed",))}
    if room_of(module) == "training_checkpoint":  # a file format lives there, which needs no process group
        used = {name for name in used if not is_in(name, ("torch.distributed.checkpoint",))}
    assert not used


def run(code: str, *arguments: str) -> str:
    """What a fresh interpreter prints that takes secateur from where this one has it."""
    path = os.pathsep.join([str(SOURCE.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


@pytest.mark.process
def test_importing_secateur_loads_nothing_heavy() -> None:
    code = "import sys, secateur; print([name for name in ('torch', 'transformers', 'msgspec') if name in sys.modules])"
    assert run(code) == "[]"


@pytest.mark.parametrize(
    ("module", "free_of"),
    [
        ("secateur.cli", ("torch", "transformers")),
        ("secateur.model_folder.read.inspect", ("torch", "transformers")),
        ("secateur.model_folder.rewrite.undo", ("torch", "transformers")),
        ("secateur.model_folder.checks.claims", ("torch", "transformers")),
        ("secateur.model_folder.choice", ("transformers",)),
    ],
)
@pytest.mark.process
def test_what_headers_alone_refuse_is_refused_without_model_classes(module: str, free_of: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([name for name in {free_of} if name in sys.modules])"
    assert run(code) == "[]"


def import_all_and_name_the_public(modules: list[str]) -> dict[str, list[str]]:
    """{public name: [its kind, the module that defines it, whether it is that module's]} once all are imported."""
    import importlib
    import types

    for module in modules:
        importlib.import_module(module)
    import secateur

    found = {}
    for name in secateur.__all__:
        value = getattr(secateur, name)
        if isinstance(value, types.ModuleType):
            found[name] = ["module", value.__name__]
            continue
        home = importlib.import_module(value.__module__)
        found[name] = [type(value).__name__, value.__module__, str(getattr(home, name, None) is value)]
    return found


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True], ids=["alphabetical", "reversed"])
def test_public_names_stay_themselves_whatever_modules_are_imported_in_whatever_order(reverse: bool) -> None:
    modules = sorted((f"secateur.{module}" for module in PATHS if module != "__init__"), reverse=reverse)
    assert {"secateur.commands.inspect", "secateur.model_folder.stages", "secateur.__main__"} <= set(modules)
    code = (
        "from __future__ import annotations\nimport json, sys\n"
        + inspect.getsource(import_all_and_name_the_public)
        + "print(json.dumps(import_all_and_name_the_public(sys.argv[1:])))"
    )
    found = json.loads(in_fresh(code, *modules).splitlines()[-1])
    assert len(found) >= 10
    for name, (kind, home, *same) in found.items():
        assert kind in ("type", "function"), f"secateur.{name} is a {kind}, {home}"
        assert home.startswith("secateur."), name
        assert same == ["True"], f"secateur.{name} is not what {home} has under that name"


def test_every_public_name_has_a_home_and_no_home_is_nameless() -> None:
    import secateur

    assert set(secateur.__all__) == {*secateur._HOMES, "SecateurError"}
