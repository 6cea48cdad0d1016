"""The table of cases, the tests that show them, and the page that tells users of both: they agree."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults.cases import ALL_CASES, CASES, GROUPS
from faults.marks import MarkedTest, marked_tests
from faults.write_docs import DOCS_PATH, document


def test_numbers_and_slugs_are_unique_and_no_number_is_left_out() -> None:
    assert sorted(case.number for case in ALL_CASES) == list(range(1, len(ALL_CASES) + 1))
    assert len({case.slug for case in ALL_CASES}) == len(ALL_CASES)


def test_texts_are_sentences_that_fit_into_a_table() -> None:
    for case in ALL_CASES:
        assert case.group in GROUPS
        for text in (case.fault, case.outcome):
            assert text.endswith(".") and not set("|\n") & set(text), text


def test_every_case_has_a_test() -> None:
    tests = marked_tests()  # parses all test files
    missing = [f"{number} {case.slug}" for number, case in CASES.items() if number not in tests]
    assert not missing, f"{len(missing)} cases without a test under pytest.mark.fault(number): {', '.join(missing)}"


def test_no_marker_names_an_unknown_case() -> None:
    unknown = {number: tests for number, tests in marked_tests().items() if number not in CASES}
    assert not unknown, "not in tests/faults/cases.py"


def test_the_page_is_what_would_be_written() -> None:
    is_current = DOCS_PATH.read_text(encoding="utf-8") == document(marked_tests())
    assert is_current, "docs/faults.md is out of date; run: make faults"


def test_a_case_without_a_test_says_so_on_the_page() -> None:
    text = document({1: [MarkedTest("a/test_b.py", "test_c"), MarkedTest("a/test_b.py", "test_d")]})
    assert "- **1** cut-with-length\n  - [a/test_b.py](../tests/a/test_b.py): `test_c`, `test_d`\n" in text
    assert "- **2** cut-without-length: no test yet\n" in text


SOURCE = """
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.fault(1)]
broken = pytest.mark.fault(2)
VALUES = [1, pytest.param(2, marks=pytest.mark.fault(3))]


@pytest.mark.fault(4)
@pytest.mark.fault(5)
def test_two(): ...


@broken
def test_by_name(): ...


@pytest.mark.parametrize("value", VALUES)
def test_one_parameter(value): ...


@pytest.mark.fault(6)
class TestIt:
    pytestmark = pytest.mark.fault(7)

    def test_method(self):
        code = "@pytest.mark.fault(8)"


@pytest.mark.fault(9)
def no_test(): ...
"""


def test_markers_are_found_wherever_they_may_stand(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for directory in (folder, tmp_path / ".run"):
        directory.mkdir()
        (directory / "test_it.py").write_text(SOURCE)
    found = {number: [test.name for test in tests] for number, tests in marked_tests(tmp_path).items()}
    assert found == {
        1: ["test_two", "test_by_name", "test_one_parameter", "TestIt::test_method"],
        2: ["test_by_name"],
        3: ["test_one_parameter"],
        4: ["test_two"],
        5: ["test_two"],
        6: ["TestIt::test_method"],
        7: ["TestIt::test_method"],
    }
    assert {test.path for test in marked_tests(tmp_path)[1]} == {"folder/test_it.py"}


@pytest.mark.parametrize("arguments", ["", "NUMBER", "'1'", "True", "1, number=2"])
def test_a_marker_without_a_literal_number_is_an_error(tmp_path: Path, arguments: str) -> None:
    (tmp_path / "test_it.py").write_text(f"import pytest\n@pytest.mark.fault({arguments})\ndef test_it(): ...\n")
    with pytest.raises(ValueError, match=r"test_it\.py:2: pytest\.mark\.fault\(.*does not give literal numbers"):
        marked_tests(tmp_path)
