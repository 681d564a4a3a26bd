"""When ``status.json`` is written."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from support.daemon import until

if TYPE_CHECKING:
    from support.daemon import Folders

RARELY = """
import sys
from imagewatch.daemon import status
status._INTERVAL = 1e9
from imagewatch.commands.main import main
sys.argv[1:] = ["run"]
main()
"""
"""A daemon that writes its status once, and again only for a reason for which it does not wait."""


def page(folders: Folders) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folders.state / "status.json").read_text())
    return found


def test_the_end_of_the_last_job_in_flight_is_in_the_status_without_a_wait(folders, run, sandbox, tmp_path):
    script = tmp_path / "rarely.py"
    script.write_text(RARELY)
    run(folders, script=str(script))
    for number in (1, 2):
        folders.prompt(f"cat{number}", f"Cat {number}")
        until(lambda number=number: page(folders)["today"]["completed"] == number)
        assert page(folders)["in_flight"] == []


def test_while_a_job_is_in_flight_the_end_of_others_is_not_written_immediately(folders, run, sandbox, tmp_path):
    script = tmp_path / "rarely.py"
    script.write_text(RARELY)
    run(folders, script=str(script))
    folders.prompt("slow", "A slow cat [sandbox: slow 60]")
    assert sandbox.wait_for_requests(1, 20)
    for name in ("first", "second"):
        folders.prompt(name, f"The {name} cat")
        until(lambda name=name: folders.finished().get(name) == "outbox")
    assert page(folders)["today"]["completed"] == 0
