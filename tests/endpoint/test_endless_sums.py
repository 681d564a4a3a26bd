"""Sums that are too large for a number: JSON has no infinity, and every program must be able to read the output."""

from __future__ import annotations

import json
import sqlite3
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from support import noon
from support.daemon import Folders, command, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from imagewatch.sandbox import Sandbox


def refuse(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def strict(text: str) -> Any:
    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def rich(folders: Folders) -> Folders:
    """Two jobs of today that each cost the largest possible number, and a similar prompt that waits."""
    noon.day_lasts()
    for number in range(2):
        folders.prompt(f"cat{number}", "a cat")
    assert command(folders, "once").returncode == 0
    with closing(sqlite3.connect(folders.state / "ledger.sqlite3")) as ledger, ledger:
        ledger.execute("UPDATE attempts SET credits = 1.7e308")
    folders.prompt("dog", "+++\nn = 4\n+++\na dog")
    return folders


@pytest.mark.parametrize(
    "arguments",
    ["history", "history --by day", "history --by provider", "history --by folder", "estimate", "status"],
)
def test_output_for_programs_is_json_however_large_the_sums_are(rich: Folders, arguments: str) -> None:
    if arguments == "status":
        command(rich, "once")
    result = command(rich, *arguments.split(), "--json")
    assert result.stderr == ""
    found = strict(result.stdout)
    if arguments == "status":
        assert (found["today"]["credits"], found["month"]["credits"]) == (None, None)
        assert strict((rich.state / "status.json").read_text())["today"]["credits"] is None
        assert " inf\n" in command(rich, "status", "--prometheus").stdout
    if "--by" in arguments:
        assert [one["credits"] for one in found] == [None]
    if arguments == "estimate":
        assert found[0]["high"] == sys.float_info.max
    assert command(rich, *arguments.split()).stderr == ""


@pytest.mark.usefixtures("sandbox")
def test_a_receipt_that_another_user_wrote_cannot_make_submit_print_invalid_json(
    folders: Folders, start: Callable[..., Any], sandbox: Sandbox
) -> None:
    (folders.outbox / "cat.receipt.toml").write_text(
        'schema = 1\njob = "0123456789abcdef"\nsource = "cat.prompt.txt"\ncharged = "yes"\nmodel = nan\n'
        "problems = [inf, -inf]\ncredits_charged = inf\n"
    )
    sandbox.hold()
    waiting = start(folders, "submit", "A cat", "--name", "cat", "--wait", "--json")
    until((folders.inbox / "cat.prompt.txt").exists)
    hidden = folders.outbox / ".tmp"
    hidden.write_text((folders.outbox / "cat.receipt.toml").read_text().replace("0123456789abcdef", "f" * 16))
    hidden.rename(folders.outbox / "cat.7f3a.receipt.toml")
    out, err = waiting.process.communicate(timeout=30)
    sandbox.release()
    (result,) = strict(out)
    assert (waiting.process.returncode, result["model"], result["problems"]) == (0, None, [None, None]), err
