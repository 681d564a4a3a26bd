"""The table of rules: every state that a job can have on disk, and the steps that must never follow from it."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from imagewatch.job.rules import RULES, State, Step, next_step, retry_delay
from imagewatch.protocol.reasons import Reaction

FLAGS = (
    "recorded",
    "leftovers",
    "claimed",
    "originals",
    "missing",
    "checked",
    "begun",
    "attempts_left",
    "reports",
    "over",
)


@pytest.fixture(scope="module")
def everything():
    """Each combination of facts about a job, possible or not, and the step that follows."""
    reactions = (None, *Reaction)
    seen = []
    for values in itertools.product((False, True), repeat=len(FLAGS)):
        flags = dict(zip(FLAGS, values, strict=True))
        for sent, answered, reaction, decided in itertools.product(
            range(3), range(3), reactions, (None, "outbox", "errors", "discarded")
        ):
            state = State(**flags, sent=sent, answered=answered, reaction=reaction, decided=decided)
            seen.append((state, next_step(state)))
    return seen


@pytest.fixture(scope="module")
def possible(everything):
    """The combinations that the worker can see: it reads only the newest response, and only before a decision."""
    return [
        (e, step)
        for e, step in everything
        if e.answered <= e.sent
        and (e.reaction is not None) == (e.sent > 0 and e.answered == e.sent and e.decided is None)
        and (e.originals or not e.claimed)
    ]


def after(steps, *wanted):
    """The job records from which one of these steps follows."""
    return [e for e, step in steps if step in wanted]


def test_there_is_a_step_for_every_state_of_a_job(everything):
    assert len(everything) == 2**10 * 9 * 7 * 4
    assert all(isinstance(step, Step) for _, step in everything)


def test_every_step_and_every_row_of_the_table_can_be_reached(possible):
    others = (
        State(recorded=True, sent=1, answered=1, reopened=True),
        State(recorded=True, checked=True, fresh=True),
        State(recorded=True, claimed=True, originals=True, returning=True),
        State(recorded=True, sent=1, answered=1, reaction=Reaction.REFUSED, returning=True),
    )
    seen = [*(e for e, _ in possible), *others]
    assert {next_step(e) for e in seen} == set(Step)
    reached = {next(rule.seen for rule in RULES if rule.holds(e)) for e in seen}
    assert reached == {rule.seen for rule in RULES}


def test_nothing_is_sent_while_the_newest_request_has_no_response(everything):
    assert not [e for e in after(everything, Step.SEND) if e.sent > e.answered]


def test_nothing_is_sent_again_after_any_response_but_a_free_and_transient_one(everything):
    assert {e.reaction for e in after(everything, Step.SEND)} <= {None, Reaction.RETRY}


def test_a_second_request_follows_only_a_busy_response_or_a_broken_upload_while_attempts_remain(possible):
    again = [e for e in after(possible, Step.SEND) if e.sent]
    assert again
    assert all(e.reaction is Reaction.RETRY and e.attempts_left and e.answered == e.sent for e in again)


def test_only_a_completely_claimed_and_checked_job_is_sent(everything):
    sends = after(everything, Step.SEND)
    assert sends
    assert all(e.recorded and e.claimed and e.checked and not e.missing for e in sends)


def test_a_decision_is_always_carried_out(everything):
    decided = [(e, step) for e, step in everything if e.recorded and e.decided and not e.over]
    assert {(e.decided, step) for e, step in decided} == {
        ("outbox", Step.PUBLISH),
        ("errors", Step.REJECT),
        ("discarded", Step.DISCARD),
    }


def test_a_job_that_waits_for_its_name_is_not_sent(possible):
    """The journal would refuse it: another job may have its name."""
    returning = {next_step(replace(e, returning=True)) for e, _ in possible if e.recorded and e.claimed}
    assert not returning & {Step.GATHER, Step.CHECK, Step.SEND}
    assert Step.READ in returning, "a paid response is read all the same"


def test_a_job_that_waits_for_its_name_does_not_go_back_with_a_response_that_ends_it(possible):
    final = [e for e, _ in possible if e.recorded and e.reaction in {Reaction.REFUSED, Reaction.UNKNOWN}]
    open_ones = [e for e in final if not (e.over or e.decided) and e.sent == e.answered]
    assert {next_step(replace(e, returning=True)) for e in open_ones} == {Step.REFUSE}


def test_a_reopened_job_first_gets_its_originals_back(everything):
    recorded = [e for e, _ in everything if e.recorded]
    assert {next_step(replace(e, reopened=True)) for e in recorded} == {Step.RECLAIM}


def test_a_finished_job_is_only_removed(everything):
    over = {(e.originals, step) for e, step in everything if e.recorded and e.over}
    assert over == {(True, Step.ARCHIVE), (False, Step.FORGET)}


def test_nothing_is_decided_twice(everything):
    deciding = after(everything, Step.CHECK, Step.READ, Step.REFUSE, Step.UNKNOWN)
    assert not [e for e in deciding if e.decided or e.over]


def test_a_decided_job_is_never_forgotten_while_its_originals_are_in_the_claim(everything):
    assert not [e for e in after(everything, Step.FORGET) if e.recorded and e.decided and e.originals]


def test_a_job_is_never_forgotten_while_its_decision_is_not_carried_out(everything):
    assert not [e for e in after(everything, Step.FORGET) if e.recorded and e.decided and not e.over]


def test_a_job_whose_request_may_have_been_charged_is_never_forgotten_or_given_back_undecided(everything):
    paid = (Reaction.SUCCESS, Reaction.UNKNOWN)
    for e in after(everything, Step.FORGET, Step.GIVE_BACK):
        if e.recorded and not e.over:
            assert e.reaction not in paid
            assert e.sent <= e.answered


def test_without_a_record_a_job_is_only_removed(everything):
    bare = {(e.leftovers, step) for e, step in everything if not e.recorded}
    assert bare == {(False, Step.DONE), (True, Step.FORGET)}


def test_a_job_is_done_only_if_none_of_its_files_remains(everything):
    assert not [e for e in after(everything, Step.DONE) if e.recorded or e.leftovers]


def test_a_charged_response_is_read_before_anything_else_unless_the_job_is_decided(everything):
    for e, step in everything:
        if e.recorded and e.reaction is Reaction.SUCCESS and e.sent == e.answered and not e.decided and not e.over:
            assert step is Step.READ


def test_a_response_that_had_begun_is_saved_and_without_one_the_charge_is_unknown(everything):
    open_ = [(e, s) for e, s in everything if e.recorded and e.sent > e.answered and not e.decided and not e.over]
    assert {(e.begun, step) for e, step in open_} == {(True, Step.SAVE), (False, Step.UNKNOWN)}


def test_a_prompt_that_goes_back_to_the_inbox_was_certainly_free(everything):
    back = after(everything, Step.GIVE_BACK)
    assert {(e.reaction, e.reaction is Reaction.ACCOUNT and e.reports) for e in back} == {
        (Reaction.WAIT, False),
        (Reaction.ACCOUNT, False),
    }


def complete(e):
    """Whether all files of an unfinished claim are in their places."""
    return e.recorded and not e.over and e.claimed and not e.missing


@pytest.mark.parametrize("reaction", [Reaction.WAIT, Reaction.ACCOUNT, Reaction.RETRY])
def test_a_job_that_was_given_back_is_forgotten_and_shows_no_error(reaction):
    for reports in (True, False):
        e = State(recorded=True, sent=1, answered=1, reaction=reaction, reports=reports, attempts_left=False)
        assert next_step(e) is Step.FORGET


def test_a_job_that_was_partly_given_back_is_complete_again_before_its_end(possible):
    half = {step for e, step in possible if e.recorded and not e.over and e.claimed and e.missing and e.reaction}
    assert half <= {Step.GATHER, Step.READ, Step.PUBLISH, Step.REJECT}


def test_an_account_level_refusal_is_shown_by_one_job(possible):
    refused = [(e, step) for e, step in possible if complete(e) and e.reaction is Reaction.ACCOUNT]
    reported = {(e.reports, step) for e, step in refused}
    assert reported == {(True, Step.REFUSE), (False, Step.GIVE_BACK)}


def test_a_job_is_refused_if_the_api_is_busy_at_its_last_attempt(possible):
    spent = {step for e, step in possible if complete(e) and e.reaction is Reaction.RETRY and not e.attempts_left}
    assert spent == {Step.REFUSE}


def test_a_job_that_was_canceled_before_it_was_sent_is_forgotten():
    assert next_step(State(recorded=True)) is Step.FORGET


def test_a_plain_job_goes_from_claim_to_receipt():
    e = State(recorded=True, claimed=True, originals=True, missing=True)
    assert next_step(e) is Step.GATHER
    e = State(recorded=True, claimed=True, originals=True)
    assert next_step(e) is Step.CHECK
    e = State(recorded=True, claimed=True, originals=True, checked=True)
    assert next_step(e) is Step.SEND
    e = State(recorded=True, claimed=True, originals=True, sent=1, answered=1, reaction=Reaction.SUCCESS)
    assert next_step(e) is Step.READ
    e = State(recorded=True, claimed=True, originals=True, sent=1, answered=1, decided="outbox")
    assert next_step(e) is Step.PUBLISH
    e = State(recorded=True, claimed=True, originals=True, sent=1, answered=1, decided="outbox", over=True)
    assert next_step(e) is Step.ARCHIVE
    e = State(recorded=True, sent=1, answered=1, decided="outbox", over=True)
    assert next_step(e) is Step.FORGET
    assert next_step(State()) is Step.DONE


# Waiting


def delay(attempt, retry_after=None, jitter=0.0):
    return retry_delay(attempt, initial=1.0, longest=60.0, retry_after=retry_after, jitter=jitter)


def test_the_wait_doubles_up_to_the_longest():
    assert [delay(attempt) for attempt in range(1, 9)] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert delay(10**9) == 60


def test_a_longer_wait_that_the_api_asks_for_counts_up_to_an_hour():
    assert delay(3, retry_after=2) == 4
    assert delay(3, retry_after=300) == 300
    assert delay(3, retry_after=1e9) == 3600
    assert delay(3, retry_after=-5) == 4
    assert delay(3, retry_after=0) == 4


def test_up_to_a_quarter_is_added_at_random():
    assert delay(3, jitter=1.0) == 5
    assert delay(3, retry_after=100, jitter=0.5) == 112.5


seconds = st.floats(0, 86_400)


@given(st.integers(1, 100), seconds, seconds, st.none() | st.floats(-1e12, 1e12), st.floats(0, 1))
@settings(max_examples=300, deadline=None)
def test_a_wait_is_bounded_and_never_gets_shorter_with_more_attempts(attempt, initial, longest, retry_after, jitter):
    def wait(number):
        return retry_delay(number, initial=initial, longest=longest, retry_after=retry_after, jitter=jitter)

    assert min(initial, longest) <= wait(attempt) <= wait(attempt + 1) <= max(longest, 3600) * 1.25
    asked = min(retry_after or 0, 3600)
    assert wait(attempt) >= asked
