"""The tables of responses and of reasons to wait match those in the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.pages import page

from imagewatch.inbox.candidate import Wait
from imagewatch.protocol.reasons import HOLDS, KINDS, LIMITS, RESPONSES, Kind, Others, Reaction

ROOT = Path(__file__).parents[2]
MONEY = page("explanation/money").partition("## When a prompt is charged\n")[2].partition("\n#")[0]
ON_HOLD = page("reference/holds")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in MONEY.splitlines() if line.startswith("| ")]


def test_the_page_on_money_has_the_rows_of_the_code_in_the_same_order():
    assert ROWS[0] == ["what happens", "charged", "this prompt", "other prompts"]
    assert ROWS[1:] == [[kind.cause, kind.charged, kind.reaction.value, kind.others.value] for kind in RESPONSES]


@pytest.mark.parametrize("kind", RESPONSES, ids=lambda kind: kind.name)
def test_a_status_that_a_row_names_is_classified_as_this_row(kind: Kind):
    for status in map(int, re.findall(r"\b[1-5][0-9]{2}\b", kind.cause)):
        assert status in kind.statuses


def test_every_kind_that_stops_other_prompts_says_what_to_do():
    stopping = {kind.name for kind in KINDS.values() if kind.others is not Others.CONTINUE}
    assert set(HOLDS) == stopping - {"lost"}  # its hold is that of the disk


def test_the_table_of_holds_has_each_kind_once_with_its_statuses():
    rows = re.findall(r"^\| (`.+?`) \| (.+?) \|", ON_HOLD, re.MULTILINE)
    names = [(name, cause) for kinds, cause in rows for name in re.findall(r"`(\w+)`", kinds)]
    assert sorted(name for name, _ in names) == sorted(HOLDS)
    for name, cause in names:
        assert set(map(int, re.findall(r"\b[1-5][0-9]{2}\b", cause))) <= set(HOLDS[name].statuses)


def test_the_protocol_has_each_reason_why_a_prompt_is_not_ready():
    table = page("reference/json-output").partition("| key of `waiting.why` |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.MULTILINE) == [wait.value for wait in Wait]


def test_a_request_that_was_or_may_have_been_charged_is_never_sent_again_automatically():
    paid = {kind.reaction for kind in KINDS.values() if kind.charged != "no"}
    assert paid == {Reaction.SUCCESS, Reaction.UNKNOWN}
    assert {kind.charged for kind in KINDS.values() if kind.reaction is Reaction.UNKNOWN} == {"yes", "unknown"}
    assert all(kind.charged == "no" for kind in LIMITS)
