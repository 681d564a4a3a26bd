"""Budgets of first-level folders, through the real daemon: one folder at its budget waits, the others continue."""

from __future__ import annotations

import json
import os
import signal
import sqlite3

import pytest
from support.daemon import Folders, command, until
from support.endpoint import unique_png

from daemon.test_caps import SHIFTED, set_clock, shifted, to_midnight
from imagewatch.config.load import load
from imagewatch.system.errors import ConfigError

PRICE = 30
"""What flux costs at the sandbox, and what is assumed, credits."""


@pytest.fixture
def budgeted(tmp_path, sandbox):
    """Return folders with a configuration file; each budget is a TOML table in it."""

    def make(budgets, **settings):
        settings = {"limits__assumed_credits": str(PRICE), **settings}
        folders = Folders(tmp_path, sandbox.base_url, **settings)
        write(folders, budgets)
        folders.environ["IMAGEWATCH_CONFIG"] = str(folders.root.parent / "imagewatch.toml")
        return folders

    return make


def write(folders, budgets):
    """Replace the budgets in the configuration file."""
    tables = [f"[budgets.{json.dumps(name, ensure_ascii=False)}]\n{keys}\n" for name, keys in budgets.items()]
    (folders.root.parent / "imagewatch.toml").write_text("\n".join(tables))


def page(folders):
    return json.loads(command(folders, "status", "--json").stdout)


def check(folders):
    """The settings that ``check`` lists, with verdict and text."""
    found = json.loads(command(folders, "check", "--json").stdout)["settings"]
    return {line["what"]: (line["verdict"], line["why"]) for line in found}


def done(folders, name):
    """How many prompts of a folder have a receipt."""
    return sum(path.startswith(f"{name}/") and path.endswith(".receipt.toml") for path in folders.names("outbox"))


def waiting(folders, name):
    return sum(path.startswith(f"{name}/") and path.endswith(".prompt.txt") for path in folders.names("inbox"))


def test_of_two_colleagues_the_one_at_her_budget_waits_and_the_other_continues(budgeted, sandbox, run):
    folders = budgeted({"anna": "credits_per_day = 60"})
    for number in range(300):
        folders.prompt(f"anna/p{number:03}", "a cat")
    daemon = run(folders)
    event = daemon.wait_for("held")
    assert (event["kind"], event["folder"], "provider" in event) == ("cap", "anna", False)
    for number in range(5):
        folders.prompt(f"bob/p{number}", "a dog")
    folders.prompt("direct", "a dog")
    until(lambda: [done(folders, name) for name in ("anna", "bob")] == [2, 5] and "direct" in folders.finished())
    assert sandbox.report()["credits"] == 8 * PRICE
    until(lambda: page(folders)["holds"])  # the status is written a moment later than the log
    (hold,) = page(folders)["holds"]
    assert (hold["kind"], hold["provider"], hold["folder"]) == ("cap", None, "anna")
    assert "budgets.anna.credits_per_day is 60: 60 are spent" in hold["reason"]
    assert hold["next_try_at"].endswith("T00:00:00Z")
    assert "prompts of other folders are still sent" in hold["next"]
    assert daemon.stop() == 0
    assert waiting(folders, "anna") == 298
    assert [one["kind"] for one in daemon.events("held")] == ["cap"]
    assert folders.leftovers() == []


def test_with_many_requests_at_the_same_time_no_budget_is_exceeded_in_any_depth_of_its_folder(budgeted, sandbox, start):
    folders = budgeted(
        {"anna": "credits_per_day = 100", "bob": "credits_per_month = 70"},
        limits__concurrency="8",
        limits__credits_per_day="1000",
    )
    for number in range(6):
        for name in ("anna", "anna/deep", "anna/deep/er", "bob/x", "carol"):
            folders.prompt(f"{name}/p{number}", "a cat")
    assert start(folders, "once").wait() == 69
    assert (done(folders, "anna"), done(folders, "bob"), done(folders, "carol")) == (3, 2, 6)
    assert sandbox.report()["credits"] == 11 * PRICE
    assert folders.leftovers() == []


def test_what_is_reserved_for_a_request_in_flight_counts_and_delays_no_other_folder(budgeted, sandbox, run):
    folders = budgeted({"anna": "credits_per_day = 59"}, limits__concurrency="8")
    sandbox.hold()
    for stem in ("anna/a", "anna/b", "bob/a", "bob/b"):
        folders.prompt(stem, "a cat")
    run(folders)
    assert sandbox.wait_for_requests(3, timeout=20)
    assert not sandbox.wait_for_requests(4, timeout=0.5)
    folders.prompt("bob/c", "a cat")
    assert sandbox.wait_for_requests(4, timeout=20)
    until(lambda: page(folders)["budgets"][0]["reserved"] == PRICE)
    assert page(folders)["holds"] == []
    sandbox.release()
    until(lambda: page(folders)["holds"])
    assert (sandbox.report()["requests"], waiting(folders, "anna")) == (4, 1)


def test_a_budget_survives_a_restart_and_counts_what_a_killed_daemon_had_sent(budgeted, sandbox, run, start):
    folders = budgeted({"anna": "credits_per_day = 60"})
    sandbox.hold()
    folders.prompt("anna/a", "a cat")
    daemon = run(folders)
    assert sandbox.wait_for_requests(1, timeout=20)
    daemon.stop(signal.SIGKILL)
    sandbox.release()
    for stem in "bcd":
        folders.prompt(f"anna/{stem}", "a cat")
        folders.prompt(f"bob/{stem}", "a cat")
    assert start(folders, "once").wait() == 69
    assert (waiting(folders, "anna"), done(folders, "bob"), folders.error("anna/a")["charged"]) == (2, 3, "unknown")
    assert start(folders, "once").wait() == 69
    assert sandbox.report()["requests"] == 1 + 1 + 3
    assert check(folders)["budgets.anna.credits_per_day"][1].startswith("60 credits; 60 are spent; the period ends")


def test_at_the_end_of_the_day_the_prompts_of_the_folder_are_sent(budgeted, tmp_path, sandbox, run):
    folders = budgeted({}, budgets__anna__credits_per_day="30", budgets__anna__credits_per_month="3000")
    for stem in "abc":
        folders.prompt(f"anna/{stem}", "a cat")
    first, offset = shifted(tmp_path, folders, run, 0)
    first.wait_for("held")
    assert done(folders, "anna") == 1
    assert first.stop() == 0
    _, offset = shifted(tmp_path, folders, run, to_midnight() - 2)
    until(lambda: done(folders, "anna") == 2, timeout=60)
    set_clock(offset, to_midnight() + 86_400)
    command(folders, "release")
    until(lambda: done(folders, "anna") == 3, timeout=60)
    assert sandbox.report()["requests"] == 3


def test_a_request_that_alone_exceeds_the_budget_is_refused_unpaid_and_names_it(budgeted, sandbox, start):
    folders = budgeted({"anna": "credits_per_month = 50", "Anna M.": "credits_per_day = 20"})
    for stem in ("anna/four", "bob/four", "direct"):
        folders.prompt(stem, "+++\nn = 4\n+++\nfour cats")
    folders.prompt("anna/one", "a cat")
    folders.prompt("Anna M./one", "a cat")
    daemon = start(folders, "once")
    assert (daemon.wait(), "held" in daemon.output) == (1, False)
    error = folders.error("anna/four")
    assert (error["charged"], error["attempts"]) == ("no", 0)
    assert error["message"].startswith("budgets.anna.credits_per_month: is 50 credits, and this request alone may cost")
    assert 'budgets."Anna M.".credits_per_day: is 20 credits' in folders.error("Anna M./one")["message"]
    assert folders.finished() == {"four": "outbox", "direct": "outbox", "one": "outbox"} | folders.finished()
    assert (done(folders, "anna"), done(folders, "bob")) == (1, 1)
    assert sandbox.report()["requests"] == 3


@pytest.mark.parametrize("image", [False, True])
def test_a_folder_with_a_rate_waits_in_the_inbox_for_its_next_minute_and_others_do_not(
    budgeted, tmp_path, sandbox, run, image
):
    folders = budgeted({}, budgets__anna__requests_per_minute="2", limits__concurrency="8")
    for number in range(7):
        if image:
            folders.drop(f"anna/p{number}.png", unique_png(f"p{number}"))
        folders.prompt(f"anna/p{number}", "a cat")
    for number in range(3):
        folders.prompt(f"bob/p{number}", "a dog")
    daemon, offset = shifted(tmp_path, folders, run, 0)
    until(lambda: done(folders, "anna") == 2 and done(folders, "bob") == 3)
    until(lambda: [one["kind"] for one in page(folders)["holds"]] == ["rate"])
    (hold,) = page(folders)["holds"]
    assert (hold["folder"], hold["reason"]) == ("anna", "budgets.anna.requests_per_minute is 2")
    until(lambda: (waiting(folders, "anna"), folders.leftovers()) == (5, []))
    folders.prompt("bob/late", "a dog")
    until(lambda: done(folders, "bob") == 4)
    assert sandbox.report()["requests"] == 6
    set_clock(offset, 61)
    command(folders, "release")  # wakes the daemon, whose own clock continues
    until(lambda: done(folders, "anna") == 4)
    until(lambda: (waiting(folders, "anna"), folders.leftovers()) == (3, []))
    set_clock(offset, -4000)  # what was sent before counts as sent now
    command(folders, "release")
    assert not sandbox.wait_for_requests(9, timeout=0.5)
    set_clock(offset, -4000 + 61)
    command(folders, "release")
    until(lambda: done(folders, "anna") == 6)
    assert (daemon.stop(), daemon.events("held")) == (0, [])


def test_once_waits_for_the_next_minute_of_a_budget(budgeted, tmp_path, sandbox, start):
    folders = budgeted({}, budgets__anna__requests_per_minute="1")
    for stem in ("anna/a", "anna/b", "bob/a"):
        folders.prompt(stem, "a cat")
    offset, script = tmp_path / "offset", tmp_path / "once.py"
    set_clock(offset, 0)
    folders.environ["OFFSET"] = str(offset)
    script.write_text(SHIFTED.replace("clock=clock)", "clock=clock, once=True)"))
    daemon = start(folders, script=str(script))
    assert sandbox.wait_for_requests(2, timeout=20)
    until(lambda: [one["kind"] for one in page(folders)["holds"]] == ["rate"])
    set_clock(offset, 61)
    command(folders, "release")
    assert daemon.wait(80) == 0
    assert (done(folders, "anna"), done(folders, "bob")) == (2, 1)


def test_what_a_stopped_daemon_wrote_earlier_is_not_shown_as_spent_today(budgeted, start):
    folders = budgeted({"anna": "credits_per_day = 90\ncredits_per_month = 900"})
    folders.prompt("anna/a", "a cat")
    assert start(folders, "once").wait() == 0
    assert page(folders)["budgets"][0]["month"] == {"credits": 30.0, "cap": 900.0}
    written = json.loads((folders.state / "status.json").read_text())
    (folders.state / "status.json").write_text(json.dumps({**written, "updated": "2025-01-31T23:59:59Z"}))
    (budget,) = page(folders)["budgets"]
    assert (budget["today"], budget["month"]) == ({"credits": 0, "cap": 90.0}, {"credits": 0, "cap": 900.0})


def test_a_raised_budget_and_a_new_one_apply_after_a_reload(budgeted, sandbox, run):
    folders = budgeted({"anna": "credits_per_day = 30"})
    for stem in "abcd":
        folders.prompt(f"anna/{stem}", "a cat")
    daemon = run(folders)
    daemon.wait_for("held")
    write(folders, {"anna": "credits_per_day = 60", "bob": "credits_per_day = 30"})
    daemon.process.send_signal(signal.SIGHUP)
    until(lambda: done(folders, "anna") == 2)
    for stem in "ab":
        folders.prompt(f"bob/{stem}", "a cat")
    until(lambda: {one["folder"] for one in page(folders)["holds"]} == {"anna", "bob"})
    write(folders, {})
    daemon.process.send_signal(signal.SIGHUP)
    until(lambda: (done(folders, "anna"), done(folders, "bob")) == (4, 2))
    until(lambda: page(folders)["holds"] == [])
    assert (daemon.stop(), page(folders)["budgets"]) == (0, [])


def test_what_was_spent_before_a_budget_was_set_counts(budgeted, sandbox, start):
    folders = budgeted({})
    folders.prompt("anna/a", "a cat")
    assert start(folders, "once").wait() == 0
    write(folders, {"anna": "credits_per_day = 59"})
    folders.prompt("anna/b", "a cat")
    assert start(folders, "once").wait() == 69
    assert sandbox.report()["requests"] == 1


def test_a_prompt_that_is_moved_counts_for_the_folder_out_of_which_it_is_claimed(budgeted, sandbox, run):
    folders = budgeted({"anna": "credits_per_day = 30", "bob": "credits_per_day = 30"})
    for stem in "abc":
        folders.prompt(f"anna/{stem}", "a cat")
    (folders.inbox / "bob").mkdir()
    daemon = run(folders)
    daemon.wait_for("held")
    for path in sorted((folders.inbox / "anna").glob("*.prompt.txt")):
        path.rename(folders.inbox / "bob" / path.name)
    until(lambda: "bob" in [one["folder"] for one in page(folders)["holds"]])
    until(lambda: done(folders, "bob") == 1)
    assert (done(folders, "anna"), done(folders, "bob"), sandbox.report()["requests"]) == (1, 1, 2)
    (path,) = (folders.inbox / "bob").glob("*.prompt.txt")
    path.rename(folders.inbox / "anna" / path.name)
    assert not sandbox.wait_for_requests(3, timeout=1)


def test_names_are_compared_byte_by_byte_and_check_names_the_folder_that_may_be_meant(budgeted, sandbox, start):
    folders = budgeted(
        {"anna": "credits_per_day = 30", "Zoe\u0301": "credits_per_day = 30", "nemo": "credits_per_day = 30"}
    )
    odd = os.fsdecode(b"anna\xff")
    for name in ("Anna", "Zo\u00e9", odd):
        for stem in "ab":
            folders.prompt(f"{name}/{stem}", "a cat")
    assert start(folders, "once").wait() == 0
    assert sandbox.report()["requests"] == 6
    lines = check(folders)
    assert (lines["budgets.anna"][0], 'did you mean "Anna"?' in lines["budgets.anna"][1]) == ("warn", True)
    assert 'did you mean "Zo\u00e9"?' in lines['budgets."Zoe\u0301"'][1]
    assert lines["budgets.nemo"] == (
        "warn",
        "there is no folder of this name in the inbox, so it has no effect yet",
    )
    assert lines["budgets.anna.credits_per_day"][1].startswith("30 credits; 0 are spent")


def test_check_shows_what_is_spent_and_what_has_no_effect(budgeted, sandbox, start):
    folders = budgeted(
        {"anna": "credits_per_day = 60\nrequests_per_minute = 9", "bob": "", "trash": "credits_per_month = 40"}
    )
    for name in ("anna/a", "anna/b", "bob/a"):
        folders.prompt(name, "a cat")
    assert start(folders, "once").wait() == 0
    folders.prompt("anna/c", "a cat")
    result = json.loads(command(folders, "check", "--json").stdout)
    lines = {line["what"]: (line["verdict"], line["why"]) for line in result["settings"]}
    assert lines["budgets.anna.credits_per_day"][:1] == ("ok",)
    assert lines["budgets.anna.credits_per_day"][1].startswith("60 credits; 60 are spent; the period ends ")
    assert lines["budgets.anna.requests_per_minute"] == ("ok", "9 requests in a minute")
    assert lines["budgets.bob"] == ("warn", "sets no cap")
    assert "a folder of the system" in lines["budgets.trash"][1]
    (line,) = [one for one in result["files"] if one["what"] == "anna/c.prompt.txt"]
    assert (line["verdict"], "budgets.anna.credits_per_day is 60" in line["why"]) == ("wait", True)
    folders.environ["IMAGEWATCH_INBOX__RECURSIVE"] = "false"
    assert "inbox.recursive is false" in check(folders)["budgets.anna"][1]
    folders.environ["IMAGEWATCH_LIMITS__ASSUMED_CREDITS"] = "50"
    verdict, why = check(folders)["budgets.trash.credits_per_month"]
    assert (verdict, "it is below limits.assumed_credits (50)" in why) == ("warn", True)


def test_status_shows_how_many_wait_in_each_folder_and_what_of_each_budget_is_spent(budgeted, sandbox, run):
    folders = budgeted({"anna": "credits_per_day = 30\ncredits_per_month = 900", "bob": "requests_per_minute = 60"})
    for stem in ("anna/a", "anna/b", "anna/deep/c"):
        folders.prompt(stem, "a cat")
    folders.drop("bob/empty.prompt.txt", "")
    folders.drop("empty.prompt.txt", "")
    daemon = run(folders)
    daemon.wait_for("held")
    expected = [{"folder": "anna", "waiting": 2}, {"folder": "", "waiting": 1}, {"folder": "bob", "waiting": 1}]
    until(lambda: (found := page(folders))["folders"] == expected and found["holds"])  # not one from before the hold
    assert page(folders)["budgets"][0] == {
        "folder": "anna",
        "today": {"credits": 30.0, "cap": 30.0},
        "month": {"credits": 30.0, "cap": 900.0},
        "reserved": 0.0,
        "requests_per_minute": None,
    }
    shown = command(folders, "status").stdout
    assert "             anna/: 2\n             the inbox itself: 1\n             bob/: 1\n" in shown
    assert "  budget     anna/: 30 of 30 credits today, 30 of 900 credits this month\n" in shown
    assert "  budget     bob/: 60 requests per minute\n" in shown
    assert "  on hold    cap, folder anna: budgets.anna.credits_per_day is 30" in shown
    metrics = command(folders, "status", "--prometheus").stdout
    for name, rest, value in (
        ("budget_credits", 'folder="anna",period="day"', "30"),
        ("budget_cap_credits", 'folder="anna",period="month"', "900"),
        ("budget_held", 'folder="anna"', "1"),
        ("budget_held", 'folder="bob"', "0"),
        ("held", 'reason="cap"', "0"),
    ):
        lines = [line for line in metrics.splitlines() if line.startswith(f"imagewatch_{name}{{") and rest in line]
        assert [line.rpartition(" ")[2] for line in lines] == [value]
    assert daemon.stop() == 0


def test_a_variable_sets_a_budget_and_prevails(budgeted):
    folders = budgeted({"Anna": "credits_per_day = 1", "anna": "credits_per_day = 2"})
    config = folders.environ["IMAGEWATCH_CONFIG"]

    def loaded(**variables):
        return load(config, {**folders.environ, **variables}).budgets

    found = loaded(IMAGEWATCH_BUDGETS__anna__CREDITS_PER_DAY="7", IMAGEWATCH_BUDGETS__BOB__REQUESTS_PER_MINUTE="0.5")
    assert (found["Anna"].credits_per_day, found["anna"].credits_per_day) == (1, 7)
    assert found["bob"].requests_per_minute == 0.5
    with pytest.raises(ConfigError, match="may mean Anna or anna"):
        loaded(IMAGEWATCH_BUDGETS__ANNA__CREDITS_PER_DAY="7")
    with pytest.raises(ConfigError, match="write IMAGEWATCH_BUDGETS__NAME__KEY"):
        loaded(IMAGEWATCH_BUDGETS__ANNA="7")


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("a/b", "credits_per_day = 1", "is not a valid folder name"),
        ("", "credits_per_day = 1", "is not a valid folder name"),
        (".hidden", "credits_per_day = 1", "is not a valid folder name"),
        ("..", "credits_per_day = 1", "is not a valid folder name"),
        ("a\\u0007b", "credits_per_day = 1", "is not a valid folder name"),
        ("@Recycle", "credits_per_day = 1", "never entered"),
        ("$x", "credits_per_day = 1", "never entered"),
        ("h\\\\udcff", "credits_per_day = 1", "the ledger writes a name that is not UTF-8"),
        ("anna", "credits_per_day = -1", "must be a number of at least 0"),
        ("anna", "credits_per_week = 1", 'did you mean "credits_per_day"'),
        ("anna", "concurrency = 1", "unknown key"),
    ],
)
def test_a_budget_that_cannot_apply_is_refused_with_its_name(budgeted, name, keys, message):
    folders = budgeted({})
    path = folders.root.parent / "imagewatch.toml"
    path.write_text(f'[budgets."{name}"]\n{keys}\n')
    with pytest.raises(ConfigError) as caught:
        load(str(path), folders.environ)
    (problem,) = caught.value.problems
    assert (problem.field.startswith("budgets."), message in str(problem) + problem.hint) == (True, True)
    path.write_text("budgets = 3\n")
    with pytest.raises(ConfigError, match="must be a section"):
        load(str(path), folders.environ)


def test_the_ledger_has_the_owner_of_each_prompt_and_the_sum_of_each_folder(budgeted, start):
    folders = budgeted({})
    for stem in ("anna/a", "anna/b/c", "bob/a", "direct"):
        folders.prompt(stem, "a cat")
    assert start(folders, "once").wait() == 0
    with sqlite3.connect(folders.state / "ledger.sqlite3") as database:
        sums = dict(database.execute("SELECT folder, sum(credits) FROM folder_sums GROUP BY folder").fetchall())
    assert sums == {"anna": 2 * PRICE, "bob": PRICE}
    (line,) = command(folders, "history", "--by", "owner", "--csv").stdout.splitlines()[1:]
    assert line.split(",")[1:] == ["4", "0", "0", str(4.0 * PRICE), "0"]
