"""docs/reliability.md promises what the tests show: each promise has its test, and each of these tests its promise."""

from __future__ import annotations

import ast

import pytest

from tests.faults.document import DOCUMENT, TESTS, document, functions
from tests.faults.matrix import MATRIX

NAMED = sorted({test for rows in MATRIX.values() for row in rows for test in row.tests})


def test_the_page_is_that_of_the_tests() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document(), "run: uv run python -m tests.faults.document"


@pytest.mark.parametrize("named", NAMED)
def test_every_row_of_the_matrix_has_its_tests(named: str) -> None:
    file, _, name = named.partition("::")
    module = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    assert name in [test.name for test in functions(module)]


def test_every_test_of_a_fault_is_a_promise_in_words() -> None:
    for file in (TESTS / "faults").glob("test_fault_*.py"):
        module = ast.parse(file.read_text(encoding="utf-8"))
        assert ast.get_docstring(module), file.name
        for test in functions(module):
            assert ast.get_docstring(test), f"{file.name}::{test.name} has no docstring"
