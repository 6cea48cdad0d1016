"""Ends a test run with a table of the fault cases that it has shown; ``--fault N`` runs the tests of one case only.

A pytest plugin, loaded by ``conftest``. Tests say ``@pytest.mark.fault(number)``, see ``faults.cases``.
Under pytest-xdist the workers run the tests and the controller prints, so the numbers travel in the reports.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pytest

from faults.cases import CASES

_PROPERTY = "fault"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fault",
        action="append",
        type=int,
        default=[],
        metavar="N",
        help="run only the tests of case N of docs/faults.md; may be given several times",
    )


def pytest_configure(config: pytest.Config) -> None:
    if unknown := sorted(set(config.getoption("fault")) - CASES.keys()):
        raise pytest.UsageError(f"--fault: docs/faults.md has no case {unknown}")
    config.pluginmanager.register(_Summary(), "fault-summary")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = set(config.getoption("fault"))
    selected: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        numbers = {number for mark in item.iter_markers("fault") for number in mark.args}
        item.user_properties += [(_PROPERTY, number) for number in sorted(numbers)]
        (selected if not wanted or numbers & wanted else others).append(item)
    if others:
        items[:] = selected
        config.hook.pytest_deselected(items=others)


@dataclass
class Shown:
    """How a test of some cases has ended, so far.

    Attributes:
        seconds: setting up and tearing down included.
        reason: why it was skipped.
    """

    numbers: frozenset[int]
    seconds: float = 0
    outcome: str = "passed"
    reason: str = ""

    def add(self, report: pytest.TestReport) -> None:
        """Count in the report of one phase."""
        self.seconds += report.duration
        if report.failed:
            self.outcome = "failed"
        elif report.skipped and self.outcome != "failed":
            self.outcome, self.reason = "skipped", _reason(report)


class _Summary:
    def __init__(self) -> None:
        self._tests: dict[str, Shown] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        numbers = frozenset(int(str(value)) for name, value in report.user_properties if name == _PROPERTY)
        # The report on a crashed worker has no properties, but those of its test's earlier phases had.
        if numbers or report.nodeid in self._tests:
            self._tests.setdefault(report.nodeid, Shown(numbers)).add(report)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self._tests:
            return
        terminalreporter.section("fault cases")
        for line, is_failed in table(self._tests.values()):
            terminalreporter.write_line(line, red=is_failed)


def table(tests: Iterable[Shown]) -> list[tuple[str, bool]]:
    """The lines of the table, and whether each tells of a failure."""
    by_number: dict[int, list[Shown]] = {}
    for test in tests:
        for number in test.numbers:
            by_number.setdefault(number, []).append(test)
    slugs = {number: CASES[number].slug if number in CASES else "unknown" for number in by_number}
    width = max(map(len, slugs.values()), default=0)
    lines = [(f"  #  {'case':{width}}  tests  seconds  outcome", False)]
    for number, shown in sorted(by_number.items()):
        outcome = _outcome(shown)
        seconds = sum(test.seconds for test in shown)
        line = f"{number:3}  {slugs[number]:{width}}  {len(shown):5}  {seconds:7.1f}  {outcome}"
        lines.append((line, outcome.startswith("FAILED")))
    return lines


def _outcome(tests: list[Shown]) -> str:
    failed = sum(test.outcome == "failed" for test in tests)
    reasons = [test.reason for test in tests if test.outcome == "skipped"]
    why = "; ".join(dict.fromkeys(reasons))
    if failed:
        return "FAILED" if failed == len(tests) else f"FAILED ({failed} of {len(tests)})"
    if len(reasons) == len(tests):
        return f"skipped: {why}"
    return f"passed ({len(reasons)} of {len(tests)} skipped: {why})" if reasons else "passed"


def _reason(report: pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return f"expected to fail: {report.wasxfail}"
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ").partition("\n")[0]
