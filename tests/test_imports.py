"""Arrows never go back: which module may import what (design rules 2 and 3), read from the source."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import secateur

SOURCE = Path(secateur.__file__).parent
PURE = ("stats", "criteria", "decide", "plans", "placement", "train.phases")
FOUNDATION = ("errors", "files", "version")


def module_name(path: Path) -> str:
    """`train/phases.py` -> `train.phases`, a package being named like its folder."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_in(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def used_names(tree: ast.AST, package: str) -> set[str]:
    """Dotted names of all that is imported, or reached as an attribute of an imported module; aliases resolved."""
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
                names |= {origin, f"{origin}.{entry.name}"}
                alias[entry.asname or entry.name] = f"{origin}.{entry.name}"
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


MODULES = {
    module_name(path): used_names(ast.parse(path.read_text(encoding="utf-8")), package_of(path))
    for path in sorted(SOURCE.rglob("*.py"))
}


def ours(names: set[str]) -> set[str]:
    """The modules of secateur among the names, as in MODULES."""
    inside = {name.removeprefix("secateur.") for name in names if name.startswith("secateur.")}
    return {module for module in MODULES if module and is_in_any(inside, module)}


def is_in_any(names: set[str], module: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for name in names)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import torch.nn as nn", "torch.nn"),
        ("from torch import distributed as dist", "torch.distributed"),
        ("import torch\ndef f(x: torch.nn.Module): ...", "torch.nn.Module"),
        ("import torch as t\nt.distributed.barrier()", "torch.distributed.barrier"),
        ("def f():\n    from transformers.models import llama", "transformers.models"),
        ("from .phases import spearman", "secateur.train.phases"),
        ("from .. import plans", "secateur.plans"),
        ("from ..decide.laep_rule import exact", "secateur.decide.laep_rule"),
    ],
)
def test_the_reader_of_imports_sees_every_spelling(source: str, name: str) -> None:
    assert name in used_names(ast.parse(source), "secateur.train")


def test_every_pure_part_exists() -> None:
    for part in (*PURE, *FOUNDATION):
        assert any(is_in(module, (part,)) for module in MODULES), part


@pytest.mark.parametrize("module", [module for module in MODULES if is_in(module, PURE)])
def test_pure_modules_use_no_model_no_process_group_and_only_each_other(module: str) -> None:
    barred = {name for name in MODULES[module] if is_in(name, ("transformers", "torch.nn", "torch.distributed"))}
    assert not barred
    assert {
        other for other in ours(MODULES[module]) if not is_in(other, PURE + FOUNDATION) and other != "train"
    } == set()


@pytest.mark.parametrize("module", [module for module in MODULES if is_in(module, ("surgery",))])
def test_surgery_knows_no_criterion_and_no_training(module: str) -> None:
    assert not {other for other in ours(MODULES[module]) if is_in(other, ("criteria", "decide", "train"))}


@pytest.mark.parametrize("module", [module for module in MODULES if is_in(module, ("criteria",))])
def test_a_criterion_knows_no_model_family(module: str) -> None:
    assert not {other for other in ours(MODULES[module]) if is_in(other, ("families", "surgery"))}


@pytest.mark.parametrize("module", [module for module in MODULES if not is_in(module, ("train",))])
def test_only_training_knows_torch_distributed(module: str) -> None:
    used = {name for name in MODULES[module] if is_in(name, ("torch.distributed",))}
    if is_in(module, ("training_checkpoint",)):  # a file format lives there, which needs no process group
        used = {name for name in used if not is_in(name, ("torch.distributed.checkpoint",))}
    assert not used


def test_importing_secateur_loads_nothing_heavy() -> None:
    code = "import sys, secateur; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    path = os.pathsep.join([str(SOURCE.parent), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert result.stdout.strip() == "[]"
