"""What every journal guarantees, whatever it is stored in: the right to send is spent once, and durably."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

import pytest

from imagewatch.config.schema import Limits
from imagewatch.journal.journal import Journal
from imagewatch.journal.prices import Asked
from imagewatch.journal.row import Row
from imagewatch.protocol.values import Claim, Decision, Sent, dump
from imagewatch.system.errors import SpoolError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

NOW = 1_700_000_000.0
FLUX = Asked("flux", "kind", 1)
SENT = Sent(
    prompt="a cat", prompt_sha256="", fields={"provider": "flux", "n": 1}, inputs=(), contents={}, endpoint="", at=NOW
)


class Sqlite:
    """Makes a journal in SQLite, and another one to the same file, as another process would."""

    def __init__(self, folder: Path) -> None:
        self._path = str(folder / "ledger.sqlite3")
        self._made: list[Journal] = []

    def __call__(self, **limits: Any) -> Journal:
        self._made.append(Journal(self._path, Limits(assumed_credits=30, **limits), lambda: NOW))
        return self._made[-1]

    def close(self) -> None:
        for journal in self._made:
            journal.close()


@pytest.fixture(params=[Sqlite])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Journal]]:
    with contextlib.closing(request.param(tmp_path)) as made:
        yield made


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
    assert not journal.reopen("a")
    found = journal.job("a")
    assert (found.state, found.decision, found.withdrawn) == ("reopened", None, decision)
    journal.reclaimed("a")
    assert (journal.job("a").withdrawn, journal.unfinished()) == (None, ["a"])


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
    journal.unsent("a", 2)
    assert spend(journal, row(attempt=3)) is None
    assert [one.number for one in journal.job("a").attempts] == [1, 3]


def test_an_attempt_that_was_given_up_is_never_sent(make: Callable[..., Journal]) -> None:
    journal = make()
    journal.open(claim())
    spend(journal, row())
    journal.unsent("a", 1)
    with pytest.raises(SpoolError, match="it has the result unsent"):
        spend(journal, row())


@pytest.mark.parametrize("number", [2, 3])
def test_attempts_are_sent_in_order(make: Callable[..., Journal], number: int) -> None:
    journal = make()
    journal.open(claim())
    if number == 3:
        spend(journal, row())
        journal.unsent("a", 1)
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
    journal.requests.refuse({"credits": "too few"})
    assert (other.requests.held(), other.requests.refused()) == ("out of office", {"credits": "too few"})
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
