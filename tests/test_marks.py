"""Tests are marked by what they need, as their code says: who starts processes, and who a job of several ranks."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# mark -> names of code that starts such processes; a job of several ranks is the first mark alone
STARTS = {
    "torchrun": {"job", "Runs", "Scenarios", "multiprocessing"},
    "process": {"subprocess", "in_child", "in_fresh", "forked", "changes_of", "memory_limit"},
}
FILES = sorted(path for path in TESTS.rglob("test_*.py") if path.name != Path(__file__).name)


def names_in(node: ast.AST, fixtures: set[str]) -> set[str]:
    """Names that it takes from outside: of other code, and of fixtures where it is a function."""
    names = [one for one in ast.walk(node) if isinstance(one, ast.Name)]
    inner = [one for one in ast.walk(node) if isinstance(one, ast.FunctionDef | ast.ClassDef) and one is not node]
    own = {one.id for one in names if isinstance(one.ctx, ast.Store)} | {one.name for one in inner}
    arguments = {one.arg for one in ast.walk(node) if isinstance(one, ast.arg)}
    return {one.id for one in names} - own - arguments - fixtures | arguments & fixtures


def is_fixture(node: ast.FunctionDef) -> bool:
    return any("fixture" in ast.unparse(decorator) for decorator in node.decorator_list)


def reached(name: str, uses: dict[str, set[str]]) -> set[str]:
    """All names that a function of a file comes to by way of others of it."""
    seen: set[str] = set()
    left = {name}
    while left:
        one = left.pop()
        seen.add(one)
        left |= uses.get(one, set()) - seen
    return seen


def marks_of(node: ast.FunctionDef, everywhere: set[str]) -> set[str]:
    inner = (one for decorator in node.decorator_list for one in ast.walk(decorator))
    return everywhere | {one.attr for one in inner if isinstance(one, ast.Attribute)}


def found_in(path: Path) -> dict[str, tuple[set[str], set[str]]]:
    """{test: (marks that it needs, marks that it has)} of the kinds in STARTS."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    fixtures = {node.name for node in functions if is_fixture(node)}
    definitions = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    uses = {node.name: names_in(node, fixtures) for node in definitions}
    everywhere: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Assign):
            names = {target.id for target in node.targets if isinstance(target, ast.Name)}
            uses |= {name: names_in(node.value, fixtures) for name in names}
            if "pytestmark" in names:
                everywhere = {one.attr for one in ast.walk(node.value) if isinstance(one, ast.Attribute)}
    result = {}
    for node in functions:
        if node.name.startswith("test_"):
            names = reached(node.name, uses)
            needed = {next((mark for mark, starts in STARTS.items() if (names - set(uses)) & starts), "")} - {""}
            result[node.name] = needed, marks_of(node, everywhere) & set(STARTS)
    return result


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_tests_are_marked_by_what_they_start(path: Path) -> None:
    assert {name: marks for name, (needed, marks) in found_in(path).items() if needed != marks} == {}
