"""``imagewatch status --prometheus``, read by Prometheus's own parser and, where it is installed, its own linter."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.daemon import Folders, command, until

from imagewatch.commands import metrics
from imagewatch.inbox.candidate import Wait
from imagewatch.protocol.reasons import HOLDS

if TYPE_CHECKING:
    from prometheus_client import Metric

HOSTILE = 'a"} 1\n# TYPE evil counter\\'
"""A name that would end a label, a line and a metric."""
PAGE: dict[str, Any] = {
    "schema": 1,
    "version": "1.2.3",
    "is_running": True,
    "inbox": "/srv/imagewatch/inbox",
    "updated": "2026-02-03T04:05:06Z",
    "last_scan": "2026-02-03T04:05:05Z",
    "waiting": {"ready": 3, "not_ready": 2, "why": {Wait.EMPTY.value: 2}, "files": {}},
    "ignored": {"count": 4, "files": {}},
    "in_flight": [{"job": "0123456789abcdef", "source": "cat.prompt.txt"}],
    "stuck": [{"job": "fedcba9876543210", "source": "sub/dog.prompt.txt"}],
    "holds": [],
    "today": {"completed": 5, "refused": 6, "unknown": 7, "credits": 12.25, "cap": None},
    "month": {"completed": 50, "refused": 60, "unknown": 70, "credits": 1234567.5, "cap": 2000000.0},
    "redelivered": 8,
    "balance": {"credits": 93.5, "at": "2026-02-03T04:05:04Z"},
}


def parsed(text: str) -> dict[str, Metric]:
    """The families of a text, as Prometheus's own parser reads them."""
    return {family.name: family for family in text_string_to_metric_families(text)}


def values(text: str) -> dict[str, float]:
    """The value of each series, by its name and labels in one."""
    found = {}
    for family in parsed(text).values():
        for sample in family.samples:
            labels = ",".join(value for name, value in sample.labels.items() if name != "inbox")
            found[f"{sample.name.removeprefix('imagewatch_')}{f'[{labels}]' if labels else ''}"] = sample.value
    return found


def measured(folders: Folders) -> dict[str, float]:
    asked = command(folders, "status", "--prometheus")
    assert (asked.returncode, asked.stderr) == (0, "")
    return values(asked.stdout)


def completed_once(folders: Folders) -> None:
    folders.prompt("cat", "[sandbox: b64] A cat")
    assert command(folders, "once").returncode == 0


def test_every_figure_of_the_status_is_a_metric():
    assert values(metrics.text(PAGE)) == {
        "up": 1,
        "build_info[1.2.3]": 1,
        "last_scan_timestamp_seconds": 1770091505,
        "status_timestamp_seconds": 1770091506,
        "ready_prompts": 3,
        **{
            f"not_ready_prompts[{name}]": 0
            for name in ("settling", "writing", "open", "arriving", "unreadable", "images", "cap", "other")
        },
        "not_ready_prompts[empty]": 2,
        "ignored_files": 4,
        "in_flight_jobs": 1,
        "stuck_jobs": 1,
        **{f"held[{kind}]": 0 for kind in HOLDS},
        "period_jobs[day,completed]": 5,
        "period_jobs[day,refused]": 6,
        "period_jobs[day,unknown]": 7,
        "period_jobs[month,completed]": 50,
        "period_jobs[month,refused]": 60,
        "period_jobs[month,unknown]": 70,
        "period_credits[day]": 12.25,
        "period_credits[month]": 1234567.5,
        "period_cap_credits[month]": 2000000,
        "redelivered_prompts_total": 8,
        "balance_credits": 93.5,
        "balance_timestamp_seconds": 1770091504,
    }


def test_names_types_and_help_follow_the_format():
    for name, family in parsed(metrics.text(PAGE)).items():
        assert name.startswith("imagewatch_")
        assert family.documentation.endswith(".")
        assert family.type in {"gauge", "counter"}
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter")
            assert sample.timestamp is None  # the textfile collector refuses timestamps


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (apt install prometheus)")
def test_the_linter_of_prometheus_finds_nothing():
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=metrics.text(PAGE), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_an_unknown_reason_or_hold_becomes_no_label():
    odd = {**PAGE, "waiting": {"ready": 0, "why": {HOSTILE: 3, Wait.OPEN: 1}}, "holds": [{"kind": HOSTILE}]}
    found = values(metrics.text(odd))
    assert (found["not_ready_prompts[other]"], found["not_ready_prompts[open]"]) == (3, 1)
    assert found.keys() == {*values(metrics.text(PAGE))}


def test_every_series_names_its_inbox_so_that_several_can_be_read():
    one, other = (parsed(metrics.text({**PAGE, "inbox": inbox})) for inbox in ("/srv/cats", f"/srv/{HOSTILE}"))
    assert one.keys() == other.keys()
    for families, inbox in ((one, "/srv/cats"), (other, f"/srv/{HOSTILE}")):
        assert {sample.labels["inbox"] for family in families.values() for sample in family.samples} == {inbox}


def test_a_daemon_that_has_not_scanned_yet_has_no_time_of_a_scan():
    assert "last_scan_timestamp_seconds" not in values(metrics.text({**PAGE, "last_scan": None}))


def test_a_running_daemon_and_a_killed_one_differ_and_no_file_name_is_shown(folders, run, sandbox):
    before = time.time() - 1
    daemon = run(folders)
    sandbox.hold()
    folders.prompt("whiskers", "A cat")
    assert sandbox.wait_for_requests(1, 20)
    folders.drop(f"{HOSTILE}.prompt.txt", "")
    folders.drop(f"{HOSTILE}.prompt.txt.txt", "A near miss")
    until(lambda: measured(folders)["not_ready_prompts[empty]"] == 1 and measured(folders)["in_flight_jobs"] == 1)
    found = measured(folders)
    assert (found["up"], found["ignored_files"], found["ready_prompts"]) == (1, 1, 0)
    assert before <= found["last_scan_timestamp_seconds"] <= time.time()
    text = command(folders, "status", "--prometheus").stdout
    assert "evil" not in text
    assert "whiskers" not in text

    assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
    assert (measured(folders)["up"], measured(folders)["in_flight_jobs"]) == (0, 0)


def test_a_hold_is_a_metric_and_does_not_change_the_exit_code(folders, run):
    daemon = run(folders)
    command(folders, "hold", HOSTILE)
    assert measured(folders)["held[manual]"] == 1
    assert daemon.stop() == 0
    assert (measured(folders)["up"], measured(folders)["held[manual]"]) == (0, 1)
    command(folders, "release")
    assert measured(folders)["held[manual]"] == 0


def test_completed_and_spent_are_those_of_the_ledger_and_of_today(folders, sandbox):
    completed_once(folders)
    found = measured(folders)
    spent = sandbox.report()["credits"]
    assert (found["period_jobs[day,completed]"], found["period_credits[month]"]) == (1, spent)

    file = folders.state / "status.json"
    page = json.loads(file.read_bytes())
    file.write_text(json.dumps({**page, "updated": "2020-02-29T23:59:59Z"}))  # it was stopped long ago
    found = measured(folders)
    assert (found["period_jobs[day,completed]"], found["period_credits[month]"]) == (0, 0)
    assert "0 completed, 0 refused, 0 unknown" in command(folders, "status").stdout


def test_the_caps_are_those_of_the_configuration(tmp_path, sandbox):
    capped = Folders(tmp_path, sandbox.base_url, limits__credits_per_day="900")
    completed_once(capped)
    found = measured(capped)
    assert found["period_cap_credits[day]"] == 900
    assert "period_cap_credits[month]" not in found


@pytest.mark.parametrize("other", ["--json", "--watch"])
def test_only_one_format_may_be_chosen(folders, other):
    asked = command(folders, "status", "--prometheus", other)
    assert (asked.returncode, asked.stdout) == (64, "")
    assert re.search(f"--prometheus and {other} cannot be used together", asked.stderr)


def test_before_the_first_start_there_is_an_error_and_no_metric(folders):
    asked = command(folders, "status", "--prometheus")
    assert (asked.returncode, asked.stdout) == (74, "")
    assert "no daemon has run" in asked.stderr
