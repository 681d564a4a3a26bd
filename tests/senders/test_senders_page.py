"""The page about senders is compared with the tests that it names."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from support.pages import page

TESTS = Path(__file__).parent
PAGE = page("howto/senders")
ROWS = re.findall(r"^\| .+ <!-- `(\w+)` --> \|$", PAGE, re.MULTILINE)


def senders() -> set[str]:
    """The names of all tests of senders."""
    modules = [path for path in TESTS.glob("test_senders*.py") if path != Path(__file__)]
    return {
        node.name
        for path in modules
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_row_of_the_page_names_a_test_and_every_test_has_a_row():
    assert len(ROWS) == len(re.findall(r"^\| ", PAGE, re.MULTILINE)) - 1
    assert set(ROWS) == senders()
