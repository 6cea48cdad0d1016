"""Writes docs/faults.md from the table of cases and the tests that show them.

PYTHONPATH=tests python -m faults.write_docs
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from faults.cases import CASES, GROUPS, Case
from faults.marks import TESTS_DIR, MarkedTest, marked_tests

DOCS_PATH = TESTS_DIR.parent / "docs" / "faults.md"

HEADER = """\
<!-- Written by `make faults` from tests/faults/cases.py: change it there. -->

# What goes wrong, and what you can rely on

{count} faults that users of distributed jobs have met. Each is caused on purpose by the tests named at the end of this
page: `tests/run.sh --fault 37` runs those of one case, and every run ends with a table of the cases it has shown.
"""

TESTS_HEADER = """\
## The tests that show it
"""


def document(tests: Mapping[int, Sequence[MarkedTest]]) -> str:
    """The text of docs/faults.md.

    Args:
        tests: of each case that has any.
    """
    tables = [_table(group, [case for case in CASES.values() if case.group == group]) for group in GROUPS]
    lists = "\n".join(line for case in CASES.values() for line in _tests_of(case, tests.get(case.number, ())))
    return "\n".join([HEADER.format(count=len(CASES)), *tables, TESTS_HEADER, lists]) + "\n"


def _table(group: str, cases: Sequence[Case]) -> str:
    rows = "".join(f"| {case.number} | {case.fault} | {case.outcome} |\n" for case in cases)
    return f"## {group}\n\n| | What happens | What you can rely on |\n|---|---|---|\n{rows}"


def _tests_of(case: Case, tests: Sequence[MarkedTest]) -> Iterator[str]:
    yield f"- **{case.number}** {case.slug}" + ("" if tests else ": no test yet")
    for path, in_file in groupby(tests, key=lambda test: test.path):
        names = ", ".join(f"`{test.name}`" for test in in_file)
        yield f"  - [{path}](../tests/{path}): {names}"


def main() -> None:
    """Write the page."""
    DOCS_PATH.parent.mkdir(exist_ok=True)
    DOCS_PATH.write_text(document(marked_tests()), encoding="utf-8")


if __name__ == "__main__":
    main()
