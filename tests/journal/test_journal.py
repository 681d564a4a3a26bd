"""What every journal guarantees, whatever it is stored in: the right to send is spent once, and durably."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import replace

from imagewatch.config.schema import Limits
from imagewatch.journal.books import SqlBooks
from imagewatch.journal.budget import Budget
from imagewatch.journal.events import page_of
from imagewatch.journal.prices import Asked
from imagewatch.journal.row import Row
from imagewatch.protocol.values import Claim, Decision, Sent, dump
from imagewatch.system.errors import NameTakenError, SpoolError
from journal.makers import STORES, Maker, postgres, sqlite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from imagewatch.journal.journal import Journal

NOW = 1_700_000_000.0
FLUX = Asked("flux", "kind", 1)
SENT = Sent(
    prompt="a cat", prompt_sha256="", fields={"provider": "flux", "n": 1}, inputs=(), contents={}, endpoint="", at=NOW
)


@pytest.fixture(params=STORES)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Journal]]:
    new = sqlite(tmp_path) if request.param == "sqlite" else postgres(request.getfixturevalue("database"))
    with contextlib.closing(Maker(new, lambda: NOW)) as made:
        yield lambda **limits: made(Limits(assumed_credits=30, **limits))


def claim(job: str = "a", stem: str = "cat", folder: str = "") -> Claim:
    return Claim(job=job, folder=folder, stem=stem, at=NOW)


def row(job: str = "a", attempt: int = 1, nonce: str = "mine", **more: Any) -> Row:
    given = {"outcome": "sent", "charged": "unknown", "sent_at": NOW, "fields": '{"provider":"flux"}', **more}
    return Row(
        job=job,
        attempt=attempt,
        nonce=nonce,
        source="cat.prompt.txt",
        claimed_at=NOW,
        request=dump(SENT).decode(),
        **given,
    )


def spend(journal: Journal, one: Row, **more: Any) -> Any:
    return journal.spend(one, FLUX, **{"skip_repeated": True, **more})


# Jobs


def test_an_open_job_is_known_to_other_processes_until_it_is_finished(make: Callable[..., Journal]) -> None:
    journal, other = make(), make()
    assert journal.open(claim()) is None
    assert other.unfinished() == ["a"]
    assert other.job("a").claim == claim()
    journal.finish("a")
    assert (other.unfinished(), other.job("a"), other.is_over("a")) == ([], None, True)


def test_the_name_of_an_open_job_is_taken_and_free_when_it_is_over(make: Callable[..., Journal]) -> None:
    journal, other = make(), make()
    journal.open(claim())
    with pytest.raises(SpoolError, match="is still being processed, as job a"):
        other.open(claim("b"))
    assert other.open(claim("c", stem="dog")) is None
    assert other.open(claim("d", folder="sub")) is None
    journal.finish("a")
    assert other.open(claim("b")) is None


def test_a_name_that_is_not_utf_8_is_kept(make: Callable[..., Journal]) -> None:
    journal = make()
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    journal.open(claim(stem=name))
    assert make().job("a").claim.stem == name


def test_a_job_that_waits_for_its_name_does_not_take_it(make: Callable[..., Journal]) -> None:
    journal = make()
    journal.open(claim())
    journal.set_state("a", "returning")
    assert journal.open(claim("b")) is None
    assert journal.unfinished() == ["a", "b"]


def test_a_kept_job_is_not_carried_on_until_it_is_opened_again(make: Callable[..., Journal]) -> None:
    journal = make()
    journal.open(claim())
    spend(journal, row())
    decision = Decision(destination="errors", name="cat.error.toml")
    journal.decide(claim(), decision, row(outcome="completed", charged="yes"))
    journal.keep("a")
    assert journal.unfinished() == []
    assert journal.reopen("a")
    assert journal.reopen("a")  # whether an earlier try was recorded may not be known
    found = journal.job("a")
    assert (found.state, found.decision, found.withdrawn) == ("reopened", None, decision)
    journal.reclaimed("a")
    assert (journal.job("a").withdrawn, journal.unfinished()) == (None, ["a"])


def test_how_a_job_ends_that_was_over_is_not_decided_while_a_newer_one_has_its_name(
    make: Callable[..., Journal],
) -> None:
    journal = make()
    journal.open(claim())
    spend(journal, row())
    journal.set_state("a", "returning")
    journal.open(claim("b"))
    result = row(outcome="completed", charged="yes", credits=30.0)
    with pytest.raises(NameTakenError, match="as job b"):
        journal.decide(claim(), Decision(destination="outbox"), result)
    assert journal.ledger.ask("SELECT outcome FROM attempts WHERE job = 'a'")[0]["outcome"] == "sent"
    journal.finish("b")
    journal.decide(claim(), Decision(destination="outbox"), result)
    assert journal.job("a").state == "decided"


# The right to send


def test_an_attempt_is_spent_once(make: Callable[..., Journal]) -> None:
    journal, other = make(), make()
    journal.open(claim())
    assert spend(journal, row()) is None
    with pytest.raises(SpoolError, match="must not be sent"):
        spend(other, row(nonce="another"))


def test_of_many_that_spend_the_same_attempt_at_the_same_time_one_may_send_it(make: Callable[..., Journal]) -> None:
    journals = [make() for _ in range(4)]
    journals[0].open(claim())
    begin, may_send = threading.Barrier(8), []

    def try_it(number: int) -> None:
        begin.wait()
        with contextlib.suppress(SpoolError):
            if spend(journals[number % 4], row(nonce=str(number))) is None:
                may_send.append(number)

    threads = [threading.Thread(target=try_it, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(may_send) == 1
    assert [one.nonce for one in journals[0].job("a").attempts] == [str(may_send[0])]


@pytest.mark.parametrize("outcome", ["sent", "completed", "refused", "unknown"])
def test_after_an_attempt_that_may_have_been_charged_nothing_is_sent(
    make: Callable[..., Journal], outcome: str
) -> None:
    journal = make()
    journal.open(claim())
    spend(journal, row())
    if outcome != "sent":
        journal.record(row(outcome=outcome, charged="unknown"))
    with pytest.raises(SpoolError, match=f"attempt 1 has the result {outcome}"):
        spend(journal, row(attempt=2))


def test_after_a_free_attempt_the_next_one_may_be_sent(make: Callable[..., Journal]) -> None:
    journal = make()
    journal.open(claim())
    spend(journal, row())
    journal.record(row(outcome="busy", charged="no"), synced=False)
    assert spend(journal, row(attempt=2)) is None
    journal.unsent("a", 2, "mine")
    assert spend(journal, row(attempt=3)) is None
    assert [one.number for one in journal.job("a").attempts] == [1, 3]


def test_an_attempt_that_was_given_up_is_never_sent(make: Callable[..., Journal]) -> None:
    journal = make()
    journal.open(claim())
    spend(journal, row())
    journal.unsent("a", 1, "mine")
    with pytest.raises(SpoolError, match="it has the result unsent"):
        spend(journal, row())


@pytest.mark.parametrize("number", [2, 3])
def test_attempts_are_sent_in_order(make: Callable[..., Journal], number: int) -> None:
    journal = make()
    journal.open(claim())
    if number == 3:
        spend(journal, row())
        journal.unsent("a", 1, "mine")
    with pytest.raises(SpoolError, match="must not be sent"):
        spend(journal, row(attempt=number))


@pytest.mark.parametrize("state", ["returning", "decided", "kept", "reopened", "done", None])
def test_only_an_open_job_may_send(make: Callable[..., Journal], state: str | None) -> None:
    journal = make()
    if state is not None:
        journal.open(claim())
        journal.set_state("a", state)
    with pytest.raises(SpoolError, match="its job is"):
        spend(journal, row())


def test_the_result_of_an_attempt_is_written_only_by_the_process_that_sent_it(make: Callable[..., Journal]) -> None:
    journal = make()
    journal.open(claim())
    spend(journal, row())
    with pytest.raises(SpoolError, match="another process has sent it"):
        journal.record(row(nonce="another", outcome="completed", charged="yes"))
    assert journal.ledger.job("a")["outcome"] == "sent"


def test_files_that_were_requested_before_are_not_requested_again(make: Callable[..., Journal]) -> None:
    journal = make()
    for job, stem in (("a", "cat"), ("b", "dog")):
        journal.open(claim(job, stem))
    assert spend(journal, row(contents='{"cat.prompt.txt":"x"}')) is None
    again = row("b", contents='{"cat.prompt.txt":"x"}')
    assert spend(journal, again).kind == "repeated"
    assert spend(journal, again, skip_repeated=False) is None


def test_a_prompt_is_noted_together_with_its_first_attempt(make: Callable[..., Journal]) -> None:
    journal, other = make(), make()
    assert spend(journal, row(), claim=claim()) is None
    known = other.job("a")
    assert (known.claim, [one.outcome for one in known.attempts]) == (claim(), ["sent"])
    with pytest.raises(SpoolError, match="still being processed"):
        spend(other, row("b"), claim=claim("b"))
    assert (other.job("b"), other.ledger.job("b")) == (None, None)


# What commands ask for


def test_during_a_manual_hold_no_process_records_an_attempt(make: Callable[..., Journal]) -> None:
    journal, other = make(), make()
    journal.open(claim())
    other.requests.hold("out of office")
    refusal = spend(journal, row())
    assert (refusal.kind, refusal.message) == ("manual", "out of office")
    assert journal.job("a").attempts == ()
    other.requests.release()
    assert spend(journal, row()) is None


def test_what_a_command_asks_for_is_known_to_other_processes_until_it_is_done(make: Callable[..., Journal]) -> None:
    journal, other = make(), make()
    journal.requests.hold("out of office")
    journal.requests.refuse({"key": "not accepted"})
    assert (other.requests.held(), other.requests.refused()) == ("out of office", {"key": "not accepted"})
    journal.requests.release()
    journal.requests.retry("a")
    journal.requests.retry("a")
    assert (other.requests.held(), other.requests.release_pending(), other.requests.retries()) == (None, True, ["a"])
    other.requests.released(NOW)
    other.requests.retried("a")
    assert (journal.requests.release_pending(), journal.requests.retries()) == (False, [])
    assert journal.requests.passed() == NOW


# Limits


def test_caps_count_what_other_processes_reserve(make: Callable[..., Journal]) -> None:
    journal, other = make(credits_per_day=60), make(credits_per_day=60)
    assert journal.open(claim("a", "1"), FLUX) is None
    assert other.open(claim("b", "2"), FLUX) is None
    assert journal.open(claim("c", "3"), FLUX).kind == "reserved"
    spend(journal, row("a"))
    journal.record(row("a", outcome="completed", charged="yes", credits=60.0))
    assert other.open(claim("c", "3"), FLUX).kind == "cap"


@pytest.mark.parametrize("most", [30, 50, 60])
def test_a_result_that_another_process_records_meanwhile_counts_once(make: Callable[..., Journal], most: int) -> None:
    limits = Limits(credits_per_day=most, assumed_credits=30)
    journal, other = make(), make()
    asked = 0
    for before in range(6):
        job = f"job{before}"
        other.open(claim(job, job))
        spend(other, row(job))
        answered, asked = replace(row(job), outcome="completed", charged="yes", credits=30.0), 0

        def ask(question: str, *values: Any, before: int = before, answered: Row = answered) -> Any:
            nonlocal asked
            if asked == before:
                other.record(answered)
            asked += 1
            return journal.ledger.ask(question, *values)

        refusal = Budget(SqlBooks(ask), limits, NOW).over_cap(FLUX)
        assert (refusal is None) == (most == 60)
        other.record(replace(answered, outcome="refused", charged="no", credits=0.0))
        other.finish(job)
    assert 0 < asked < before, "it is recorded before each question, and after all"


def test_a_job_that_was_let_in_is_asked_for_the_caps_again_when_it_is_sent(make: Callable[..., Journal]) -> None:
    journal = make(credits_per_day=60)
    journal.open(claim("a", "1"), FLUX)
    journal.open(claim("b", "2"), FLUX)
    spend(journal, row("a"))
    journal.record(row("a", outcome="completed", charged="yes", credits=60.0))
    assert spend(journal, row("b")).kind == "cap"
    assert journal.job("b").attempts == ()


def test_the_rate_counts_what_other_processes_send(make: Callable[..., Journal]) -> None:
    journal, other = make(requests_per_minute=1), make(requests_per_minute=1)
    journal.open(claim("a", "1"))
    other.open(claim("b", "2"))
    assert spend(journal, row("a")) is None
    assert spend(other, row("b")).kind == "rate"


def test_sums_follow_from_the_rows(make: Callable[..., Journal]) -> None:
    journal = make(credits_per_day=1000)
    journal.open(claim())
    spend(journal, row())
    assert spent(journal) == 0.0
    journal.record(row(outcome="completed", charged="yes"))
    assert spent(journal) == 30.0
    journal.record(row(outcome="completed", charged="yes", credits=12.5))
    assert spent(journal) == 12.5
    journal.record(row(outcome="completed", charged="yes", credits=12.5))
    assert spent(journal) == 12.5


def spent(journal: Journal) -> float:
    return journal.budget().spent()["limits.credits_per_day"][0]


# Together


def test_a_decision_and_the_result_are_written_together_or_not_at_all(make: Callable[..., Journal]) -> None:
    journal = make()
    journal.open(claim())
    spend(journal, row())
    decision = Decision(destination="outbox", name="cat.receipt.toml", result_file="x")
    with pytest.raises(SpoolError):
        journal.decide(claim(), decision, row(nonce="another", outcome="completed", charged="yes"))
    assert (journal.job("a").decision, journal.ledger.job("a")["outcome"]) == (None, "sent")
    journal.decide(claim(), decision, row(outcome="completed", charged="yes"))
    assert (journal.job("a").decision, journal.ledger.job("a")["outcome"]) == (decision, "completed")


def test_what_this_process_knows_of_a_job_is_written_to_a_journal_that_does_not(make: Callable[..., Journal]) -> None:
    journal = make()
    journal.restore(claim(), row())
    journal.restore(claim(), row())
    assert [one.outcome for one in journal.job("a").attempts] == ["sent"]
    journal.decide(claim("b", "dog"), Decision(destination="errors"), row("b", outcome="unknown"))
    assert journal.job("b").decision == Decision(destination="errors")


def test_an_error_of_one_thread_undoes_nothing_of_another(make: Callable[..., Journal]) -> None:
    journal = make()
    journal.open(claim())
    begin, failed = threading.Barrier(12), []

    def work(number: int) -> None:
        begin.wait()
        try:
            journal.open(claim(f"job{number}", "cat" if number % 3 == 0 else str(number)))
        except SpoolError:
            failed.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(failed) == [0, 3, 6, 9]
    assert set(journal.unfinished()) == {"a", *(f"job{number}" for number in range(12) if number % 3)}


# Events


def notifying(make: Callable[..., Journal], *targets: str, **limits: Any) -> Journal:
    journal = make(**limits)
    journal.events.configure(targets or ("url",))
    return journal


def decision(destination: str = "outbox", text: str = "job = 'a'\n", charged: str = "yes") -> Decision:
    return Decision(destination=destination, name="cat.receipt.toml", result_file=text, facts={"charged": charged})


def ended(journal: Journal, job: str = "a", how: Decision | None = None, **more: Any) -> None:
    """A job is sent, decided and published."""
    journal.claim(claim(job, stem=job))
    spend(journal, row(job))
    given = {"outcome": "completed", "charged": "yes", "credits": 30.0, **more}
    journal.decide(claim(job, stem=job), how or decision(), row(job, **given))
    journal.set_state(job, "published")


def test_an_event_is_written_with_its_decision_and_due_when_that_is_published(make: Callable[..., Journal]) -> None:
    journal = notifying(make)
    journal.claim(claim())
    journal.decide(claim(), decision(), row(attempt=0, outcome="invalid", charged="no"))
    assert journal.events.due("url") is None
    assert make().events.counts().pending == 1
    journal.set_state("a", "published")
    event = journal.events.due("url")
    assert event is not None
    assert (event.name, event.job, event.content, event.at, event.tries) == ("completed", "a", "job = 'a'\n", NOW, 0)


def test_a_decision_that_is_not_written_has_no_event(make: Callable[..., Journal]) -> None:
    journal, other = notifying(make), make()
    ended(journal)
    journal.claim(claim("b", stem="b"))
    spend(journal, row("b"))
    other.record(row("b", outcome="unknown", message="by hand"))
    foreign = row("b", nonce="another", outcome="completed", charged="yes")
    with pytest.raises(SpoolError, match="another process has sent it"):
        journal.decide(claim("b", stem="b"), decision(), foreign)
    assert journal.events.counts().pending == 1


@pytest.mark.parametrize(
    ("destination", "charged", "name"),
    [
        ("outbox", "yes", "completed"),
        ("errors", "no", "failed"),
        ("errors", "yes", "failed"),
        ("errors", "unknown", "unknown"),
    ],
)
def test_the_name_of_an_event_is_how_its_job_ended(
    make: Callable[..., Journal], destination: str, charged: str, name: str
) -> None:
    journal = notifying(make)
    ended(journal, how=decision(destination, charged=charged), charged=charged)
    event = journal.events.due("url")
    assert event is not None
    assert event.name == name


def test_a_redelivery_has_no_event(make: Callable[..., Journal]) -> None:
    journal = notifying(make)
    journal.claim(claim())
    journal.decide(claim(), Decision(destination="discarded"), None, repeated="b")
    assert journal.events.counts().pending == 0


def test_a_decision_that_replaces_another_has_the_same_event(make: Callable[..., Journal]) -> None:
    journal = notifying(make, "command", "url")
    journal.claim(claim())
    journal.decide(claim(), decision(text="name = 1\n"), None)
    journal.decide(claim(), decision(text="name = 2\n"), None)
    journal.set_state("a", "published")
    found = [journal.events.due(target) for target in ("command", "url")]
    assert [event.content for event in found if event] == ["name = 2\n"] * 2
    assert len({event.id for event in found if event}) == 1
    assert journal.events.counts().pending == 2


def test_a_job_that_is_read_again_has_another_event(make: Callable[..., Journal]) -> None:
    journal = notifying(make)
    ended(journal, how=decision("errors", text="name = 1\n"))
    journal.keep("a")
    journal.reopen("a")
    journal.reclaimed("a")
    journal.decide(claim(stem="a"), decision(text="name = 2\n"), None)
    journal.set_state("a", "published")
    first = journal.events.due("url")
    assert first is not None
    journal.events.delivered(first)
    second = journal.events.due("url")
    assert second is not None
    assert (first.name, second.name) == ("failed", "completed")
    assert first.id != second.id


def test_events_are_due_in_their_order_until_they_are_delivered(make: Callable[..., Journal]) -> None:
    journal = notifying(make, "command", "url")
    for job in ("a", "b", "c"):
        ended(journal, job)
    jobs = []
    while event := journal.events.due("url"):
        jobs.append(event.job)
        journal.events.delivered(event)
    assert jobs == ["a", "b", "c"]
    other = make().events
    assert [other.due("url"), (found := other.due("command")) and found.job] == [None, "a"]


def test_an_event_that_failed_waits_longer_each_time_and_others_are_due_meanwhile(
    make: Callable[..., Journal],
) -> None:
    journal = notifying(make)
    ended(journal, "a")
    ended(journal, "b")
    event = journal.events.due("url")
    waits = []
    for _ in range(12):
        assert event is not None
        event = journal.events.failed(event, "no\nway")
        waits.append(event.next_at - NOW)
    assert waits == [5, 10, 20, 40, 80, 160, 320, 640, 900, 900, 900, 900]
    other = journal.events.due("url")
    assert other is not None
    assert other.job == "b"
    journal.events.delivered(other)
    assert journal.events.due("url") is None
    assert journal.events.next_due("url") == 900
    counts = make().events.counts()
    assert (counts.pending, counts.failed, counts.since, counts.message) == (1, 0, NOW, "no\\nway")


def test_a_clock_that_is_set_back_does_not_make_an_event_wait_for_long(make: Callable[..., Journal]) -> None:
    journal = notifying(make)
    ended(journal)
    event = journal.events.due("url")
    assert event is not None
    journal.events.failed(event, "no")
    journal.events._clock = lambda: NOW - 86_400
    assert journal.events.due("url") is not None


def test_an_event_that_is_delivered_from_memory_while_it_is_written_is_not_delivered_again(
    make: Callable[..., Journal],
) -> None:
    journal = notifying(make)
    journal.events.stage("held", "hold:disk::", {"kind": "disk"})
    journal.events.unwritable()
    event = journal.events.due_unwritten("url")
    assert event is not None
    staged = journal.events.staged()
    journal.events.delivered(event)
    journal.requests.refuse({}, staged)
    journal.events.written(staged)
    assert journal.events.due("url") is None
    assert "hold:disk::" in journal.events.announced()


def test_an_event_is_given_up_after_seven_days_and_counted_for_thirty(make: Callable[..., Journal]) -> None:
    journal = notifying(make)
    ended(journal)
    event = journal.events.due("url")
    assert event is not None
    journal.events._clock = lambda: NOW + 7 * 86_400 - 1
    assert not journal.events.failed(event, "no").is_over
    journal.events._clock = lambda: NOW + 7 * 86_400
    assert journal.events.failed(event, "still no").is_over
    assert journal.events.due("url") is None
    counts = journal.events.counts()
    assert (counts.pending, counts.failed, counts.message) == (0, 1, "still no")
    journal.events._clock = lambda: NOW + 38 * 86_400
    counts = journal.events.counts()
    assert (counts.failed, counts.message) == (0, "")
    journal.events.take_over()
    assert journal.ledger.ask("SELECT count(*) AS rows FROM events")[0]["rows"] == 0


def test_what_waits_for_a_receiver_that_was_removed_goes_to_the_other_one_once(make: Callable[..., Journal]) -> None:
    journal = notifying(make, "command", "url")
    ended(journal, "a")
    journal.events.configure(["command"])
    ended(journal, "b")
    journal.events.configure(["url"])
    journal.events.take_over()
    jobs = []
    while event := journal.events.due("url"):
        jobs.append(event.job)
        journal.events.delivered(event)
    assert jobs == ["a", "b"]
    assert journal.events.counts().pending == 0


def test_an_event_of_a_hold_that_is_not_written_yet_goes_to_the_new_receiver(make: Callable[..., Journal]) -> None:
    journal = notifying(make, "command")
    journal.events.stage("held", "hold:disk::", {"kind": "disk"})
    journal.events.configure(["url"])
    journal.events.unwritable()
    event = journal.events.due_unwritten("url")
    staged = journal.events.staged()
    journal.requests.refuse({}, staged)
    journal.events.written(staged)
    assert event is not None
    assert event == replace(journal.events.due("url"), subject=event.subject)
    assert journal.events.counts().pending == 1


@pytest.mark.parametrize("make", ["sqlite"], indirect=True)  # the time of a server is not that of this thread
def test_thousands_of_events_that_wait_do_not_slow_down_what_is_asked_for_each_job(
    make: Callable[..., Journal], tmp_path: Path
) -> None:
    journal = notifying(make)
    journal.events.counts()
    insert = (
        "INSERT INTO events (id, target, name, content, at, tries, next_at, message) "
        "VALUES (?, 'url', 'failed', ?, ?, 3, ?, 'refused')"
    )

    def seconds(count: int) -> float:
        with contextlib.closing(sqlite3.connect(tmp_path / "ledger.sqlite3")) as other, other:
            rows = ((f"{count}-{number}", "x" * 6000, NOW, NOW + 500) for number in range(count))
            other.executemany(insert, rows)
        began = time.thread_time()
        for _ in range(100):
            assert journal.events.next_due("url") == 500
        return time.thread_time() - began

    few = seconds(5)
    assert seconds(5000) < 20 * few


def test_without_a_receiver_there_are_no_events(make: Callable[..., Journal]) -> None:
    journal = make(credits_per_day=31)
    ended(journal)
    assert journal.events.counts().pending == 0
    assert not journal.events.is_on


def test_a_cap_that_is_nearly_spent_has_one_event_in_its_period(make: Callable[..., Journal]) -> None:
    journal = notifying(make, credits_per_day=100, credits_per_month=1000)
    ended(journal, "a", credits=79.0)
    assert caps(journal) == []
    ended(journal, "b", credits=1.0)
    ended(journal, "c", credits=1.0)
    (page,) = caps(journal)
    assert page == {
        "setting": "limits.credits_per_day",
        "credits": 100.0,
        "spent": 80.0,
        "ends": "2023-11-15T00:00:00Z",
    }
    journal._clock = journal.events._clock = lambda: NOW + 86_400
    ended(journal, "d", credits=90.0, sent_at=NOW + 86_400)
    assert [page["ends"] for page in caps(journal)] == ["2023-11-15T00:00:00Z", "2023-11-16T00:00:00Z"]


def caps(journal: Journal) -> list[dict[str, object]]:
    rows = journal.ledger.ask("SELECT id, content FROM events WHERE name = 'cap' ORDER BY number")
    return [json.loads(row["content"]) for row in rows]


def test_a_charge_that_is_recorded_before_the_decision_counts_for_the_cap(make: Callable[..., Journal]) -> None:
    journal = notifying(make, credits_per_day=100)
    journal.claim(claim())
    spend(journal, row())
    journal.record(row(outcome="completed", charged="yes", credits=80.0))
    assert len(caps(journal)) == 1


def test_the_begin_and_the_end_of_a_hold_are_written_once_with_the_hold(make: Callable[..., Journal]) -> None:
    journal = notifying(make)
    for _ in range(2):
        journal.events.stage("held", "hold:key:", {"kind": "key"})
        staged = journal.events.staged()
        journal.requests.refuse({"key": "none left"}, staged)
        journal.events.written(staged)
    assert journal.events.staged() == []
    assert (make().requests.refused(), make().events.announced()) == ({"key": "none left"}, {"hold:key:": NOW})
    for _ in range(2):
        journal.events.stage("released", "hold:key:", {"kind": "key"})
        staged = journal.events.staged()
        journal.requests.refuse({}, staged)
        journal.events.written(staged)
    assert (make().requests.refused(), make().events.announced()) == ({}, {})
    names = []
    while event := journal.events.due("url"):
        names.append((event.name, page_of(event)))
        journal.events.delivered(event)
    assert names == [("held", {"kind": "key"}), ("released", {"kind": "key"})]


def test_an_event_of_a_hold_that_cannot_be_written_is_due_from_memory_and_not_again_from_the_journal(
    make: Callable[..., Journal],
) -> None:
    journal = notifying(make, "command", "url")
    journal.events.stage("held", "hold:disk:", {"kind": "disk"})
    assert journal.events.due_unwritten("url") is None  # it may still be written
    journal.events.unwritable()
    event = journal.events.due_unwritten("url")
    assert event is not None
    journal.events.delivered(event)
    assert journal.events.due_unwritten("url") is None
    staged = journal.events.staged()
    journal.requests.refuse({}, staged)
    journal.events.written(staged)
    assert journal.events.due("url") is None
    other = journal.events.due("command")
    assert other is not None
    assert other.id == event.id
    assert set(journal.events.announced()) == {"hold:disk:"}
