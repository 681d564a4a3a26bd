"""What the database enforces of the holds of an account, whatever the daemons remember."""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING

import pytest
from journal.makers import NOON, Clock, Maker, postgres
from journal.test_journal import FLUX, row

from imagewatch.protocol.reasons import Reason
from imagewatch.protocol.values import Claim, Decision

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imagewatch.journal.journal import Journal

DAY = 86_400.0
TOO_FEW = Reason("credits", "too few")


@pytest.fixture
def daemons(database: str) -> Iterator[tuple[Journal, Journal]]:
    """The journals of two daemons of one account."""
    made = [Maker(postgres(database, inbox=name, instance=name), Clock(NOON)) for name in ("one", "two")]
    with contextlib.ExitStack() as stack:
        journals = [stack.enter_context(contextlib.closing(one))() for one in made]
        for journal in journals:
            journal.account.first_seconds, journal.account.probe_seconds = 0.0, 600.0
        yield journals[0], journals[1]


def test_what_another_daemon_has_finished_is_known_for_longer_than_what_is_own(
    daemons: tuple[Journal, Journal],
) -> None:
    """That one may be off, and files of its jobs may turn up again when it is back."""
    one, two = daemons
    for job in ("a", "b"):
        assert spend(one, job) is None
        one.finish(job)
    for clock in {one.clock, two.clock}:
        clock.now += 8 * DAY  # type: ignore[attr-defined]
    two.forget_old()
    assert [one.is_over("a"), one.is_over("b")] == [True, True]
    one.forget_old()
    assert [one.is_over("a"), one.is_over("b")] == [False, False]
    assert spend(one, "c") is None
    one.finish("c")
    two.clock.now += 366 * DAY  # type: ignore[attr-defined]
    two.forget_old()
    assert not one.is_over("c")


def test_the_text_of_a_prompt_whose_charge_is_unknown_is_removed_after_a_year(daemons: tuple[Journal, Journal]) -> None:
    one, _ = daemons
    assert spend(one, "a") is None
    decision = Decision(destination="errors", name="a.error.toml", result_file="x")
    one.decide(Claim(job="a", folder="", stem="a", at=NOON), decision, row("a", outcome="unknown"))
    one.finish("a", is_unknown=True)

    def kept() -> str:
        return str(one.ledger.ask("SELECT request FROM attempts WHERE job = 'a'")[0]["request"])

    one.clock.now += 364 * DAY  # type: ignore[attr-defined]
    one.forget_old()
    assert "a cat" in kept()
    one.clock.now += 2 * DAY  # type: ignore[attr-defined]
    one.forget_old()
    assert kept() == ""


def test_a_job_of_an_earlier_version_waits_for_a_name_only_in_its_own_inbox(daemons: tuple[Journal, Journal]) -> None:
    one, two = daemons
    for job in ("a", "b"):
        one.claim(Claim(job=job, folder="", stem=job, at=NOON))
    for journal, job, stem in ((two, "c", "a"), (one, "d", "b")):
        journal.adopt(Claim(job=job, folder="", stem=stem, at=NOON), "open", None, {})
    found = two.job("c"), one.job("d")
    assert [job and job.state for job in found] == ["open", "returning"]


def spend(journal: Journal, job: str) -> Reason | None:
    """Claim a prompt and record its attempt."""
    claim = Claim(job=job, folder="", stem=job, at=NOON)
    return journal.spend(row(job), FLUX, skip_repeated=False, claim=claim)


def kind(reason: Reason | None) -> str:
    return reason.kind if reason else ""


def attempts(journal: Journal) -> list[str]:
    return sorted(one["job"] for one in journal.ledger.rows())


def test_after_hold_account_has_returned_no_daemon_records_an_attempt(daemons: tuple[Journal, Journal]) -> None:
    one, two = daemons
    one.account.hold("the invoice is checked")
    assert [kind(spend(one, "a")), kind(spend(two, "b"))] == ["manual_account", "manual_account"]
    assert attempts(one) == []
    one.account.release()
    assert (spend(two, "b"), attempts(one)) == (None, ["b"])


def test_before_its_next_try_a_hold_lets_no_daemon_record_an_attempt(daemons: tuple[Journal, Journal]) -> None:
    one, two = daemons
    assert one.account.refused(Reason("credits", "too few", seconds=500.0), "a")
    for journal in daemons:
        refused = spend(journal, "b")
        assert refused is not None
        assert (refused.kind, refused.message) == ("credits", "too few")
        assert 400 < (refused.seconds or 0.0) <= 500
    two.account.probe_now()
    assert (spend(two, "b"), attempts(one)) == (None, ["b"])


def test_one_job_over_all_daemons_is_the_probe_until_it_has_a_result(daemons: tuple[Journal, Journal]) -> None:
    one, two = daemons
    one.account.refused(TOO_FEW, "a")
    assert spend(one, "b") is None
    assert [kind(spend(one, "c")), kind(spend(two, "d"))] == ["credits", "credits"]
    one.account.over("b", is_answered=False)
    assert [kind(spend(two, "d")), kind(spend(one, "c"))] == ["", "credits"]
    two.account.over("d", is_answered=True)
    assert (one.account.holds(), spend(one, "c")) == ([], None)


def test_what_is_asked_before_a_connection_is_made_begins_no_probe(daemons: tuple[Journal, Journal]) -> None:
    one, two = daemons
    one.account.refused(TOO_FEW, "a")
    for journal in (one, two, one):
        assert journal.refusal(row("b"), FLUX, skip_repeated=False) is None
    assert spend(two, "c") is None
    assert kind(one.refusal(row("b"), FLUX, skip_repeated=False)) == "credits"


def test_a_probe_without_a_result_is_given_up_after_its_time(daemons: tuple[Journal, Journal]) -> None:
    one, two = daemons
    one.account.refused(TOO_FEW, "a")
    one.account.probe_seconds = 0.0
    assert [spend(one, "b"), spend(two, "c")] == [None, None]
    one.account.over("b", is_answered=False)  # it ends late, and does not end the other probe
    assert kind(spend(one, "d")) == "credits"


def test_a_response_to_a_request_from_before_the_refusal_ends_nothing(daemons: tuple[Journal, Journal]) -> None:
    one, two = daemons
    assert spend(two, "earlier") is None
    one.account.refused(TOO_FEW, "a")
    two.account.over("earlier", is_answered=True)
    assert [hold.kind for hold in one.account.holds()] == ["credits"]


def test_one_refusal_begins_a_hold_and_only_that_of_the_probe_doubles_its_interval(
    daemons: tuple[Journal, Journal],
) -> None:
    one, two = daemons
    one.account.first_seconds = two.account.first_seconds = 100.0
    assert [one.account.refused(TOO_FEW, "a"), two.account.refused(TOO_FEW, "b")] == [True, False]
    assert [hold.interval for hold in two.account.holds()] == [100.0]
    two.account.probe_now()
    assert spend(two, "c") is None
    one.account.refused(TOO_FEW, "late")  # sent before the hold, and refused while the probe is in flight
    assert [(hold.interval, hold.prober) for hold in one.account.holds()] == [(100.0, "c")]
    assert not two.account.refused(TOO_FEW, "c")
    (hold,) = one.account.holds()
    assert (hold.interval, hold.prober, math.ceil(hold.seconds / 10)) == (200.0, "", 20)


def test_a_refusal_that_could_not_be_reported_is_reported_by_the_next_one(daemons: tuple[Journal, Journal]) -> None:
    one, two = daemons
    assert one.account.refused(TOO_FEW, "a")
    one.account.not_reported("credits")
    assert one.account.holds() == []
    assert two.account.refused(TOO_FEW, "b")


def test_a_daemon_that_remembers_its_own_holds_ends_none_of_the_account(daemons: tuple[Journal, Journal]) -> None:
    one, two = daemons
    one.account.refused(TOO_FEW, "a")
    one.account.hold("")
    two.requests.refuse({"key": "not accepted"})
    two.requests.refuse({})
    two.requests.release()
    assert [hold.kind for hold in one.account.holds()] == ["credits", "manual_account"]
    assert (two.requests.refused(), one.requests.refused()) == ({}, {})


def test_release_account_asks_every_daemon(daemons: tuple[Journal, Journal]) -> None:
    one, two = daemons
    for journal, name in zip(daemons, ("one", "two"), strict=True):
        journal.file.register("host", f"/srv/{name}", name, 60.0)  # type: ignore[attr-defined]
    two.requests.hold("only here")
    one.account.release()
    assert [one.requests.release_pending(), two.requests.release_pending()] == [True, True]
    assert two.requests.held() == "only here"
    assert [member.name for member in one.account.members()] == ["one", "two"]
