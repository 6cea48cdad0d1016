"""Which tests show which case, read from their source: from ``pytest.mark.fault(number)``, without importing them.

The marker may stand above a test, above its class, in ``pytestmark`` (of the module or class), or on a single
parameter set (``pytest.param(..., marks=...)``), also by way of a name that the module gives to any of these.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

TESTS_DIR = Path(__file__).resolve().parents[1]

MARK = "pytest.mark.fault"


@dataclass(frozen=True, order=True)
class MarkedTest:
    """A test that shows a case.

    Attributes:
        path: of its file below the directory of tests, with slashes.
        name: of the function, behind that of its class, if it has one: ``TestIt::test_that``.
    """

    path: str
    name: str


def marked_tests(tests_dir: Path = TESTS_DIR) -> dict[int, list[MarkedTest]]:
    """The tests of each case that has any, in the order of their files and of their lines there.

    Raises:
        ValueError: a marker gives something else than literal numbers; names file and line.
    """
    found: dict[int, list[MarkedTest]] = {}
    for path in _test_files(tests_dir):
        relative_path = path.relative_to(tests_dir).as_posix()
        for name, numbers in _tests_in(path):
            for number in sorted(numbers):
                found.setdefault(number, []).append(MarkedTest(relative_path, name))
    return dict(sorted(found.items()))


def _test_files(tests_dir: Path) -> list[Path]:
    paths = []
    # Not rglob, which fails when one of the directories vanishes: tests/cluster/.run changes while tests run.
    for directory, folders, names in os.walk(tests_dir):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        paths += [Path(directory, name) for name in names if name.startswith("test_") and name.endswith(".py")]
    return sorted(paths)


def _tests_in(path: Path) -> Iterator[tuple[str, set[int]]]:
    module = ast.parse(path.read_text(encoding="utf-8"), path)
    reader = _Reader(path, _assignments(module.body))
    yield from _tests_of(module.body, "", set(), reader)


def _tests_of(
    body: list[ast.stmt], prefix: str, inherited: set[int], reader: _Reader
) -> Iterator[tuple[str, set[int]]]:
    if pytestmark := _assignments(body).get("pytestmark"):
        inherited = inherited | reader.numbers(pytestmark)
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            yield prefix + node.name, inherited.union(*map(reader.numbers, node.decorator_list))
        elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            own = inherited.union(*map(reader.numbers, node.decorator_list))
            yield from _tests_of(node.body, f"{prefix}{node.name}::", own, reader)


def _assignments(body: list[ast.stmt]) -> dict[str, ast.expr]:
    """The value of each name that these statements bind."""
    values: dict[str, ast.expr] = {}
    for node in body:
        if isinstance(node, ast.Assign):
            values.update({target.id: node.value for target in node.targets if isinstance(target, ast.Name)})
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            values[node.target.id] = node.value
    return values


class _Reader:
    """Finds the markers in the expressions of one module."""

    def __init__(self, path: Path, named: Mapping[str, ast.expr]) -> None:
        self._path, self._named = path, named

    def numbers(self, expression: ast.expr, seen: frozenset[str] = frozenset()) -> set[int]:
        """The numbers of all markers in the expression, or behind a name of the module's in it."""
        found: set[int] = set()
        for node in ast.walk(expression):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == MARK:
                found |= self._arguments(node)
            elif isinstance(node, ast.Name) and node.id in self._named and node.id not in seen:
                found |= self.numbers(self._named[node.id], seen | {node.id})
        return found

    def _arguments(self, call: ast.Call) -> set[int]:
        values = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
        numbers = {value for value in values if isinstance(value, int) and not isinstance(value, bool)}
        if call.keywords or not numbers or len(numbers) < len(call.args):
            raise ValueError(f"{self._path}:{call.lineno}: {ast.unparse(call)} does not give literal numbers")
        return numbers
