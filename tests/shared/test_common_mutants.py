"""Each precaution of a common inbox is needed: without it, a prompt is sent twice or may be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from shared import test_common_faults as faults
from shared import test_handing_over as handing
from shared.test_shared_mutants import fails_without

if TYPE_CHECKING:
    from support.peers import Peers

    from imagewatch.sandbox import Sandbox

member, replaced, peers = faults.member, faults.replaced, handing.peers
TAKEN_OVER = "a daemon whose job was taken over may not send it"
OWN_RESULT = "only its own process can say that an attempt was not sent"
WITNESS = "a witness is beside the claimed prompt before the first byte"


def no_check_of_the_holder(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("imagewatch.journal.common.Common.require_held", lambda *_: None)


def no_nonce(patch: pytest.MonkeyPatch) -> None:
    from imagewatch.journal import common, journal  # noqa: PLC0415

    for module in (common, journal):
        assert "nonce = ?" in module._UNSENT
        patch.setattr(module, "_UNSENT", module._UNSENT.replace("nonce = ?", "nonce || ? <> ''"))


def no_witness(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("imagewatch.job.common_steps.CommonSteps.testify", lambda *_: None)


PRECAUTIONS = {TAKEN_OVER: no_check_of_the_holder, OWN_RESULT: no_nonce, WITNESS: no_witness}


def take_over_after_a_loss(peers: Peers, sandbox: Sandbox) -> None:
    """A daemon is killed after it has sent; the database loses the row of that; another daemon takes the job over."""
    one, two = peers.add("one"), peers.add("two")
    one.prompt("cat", "a cat")
    one.killed(one.start, "replace|answer.1")
    peers.lose("DELETE FROM imagewatch.attempts")
    two.finish(peers.let_take_over(two))
    assert sandbox.report()["requests"] == 1


def play(precaution: str, request: pytest.FixtureRequest) -> None:
    """Let happen what a precaution is for."""
    get = request.getfixturevalue
    if precaution == TAKEN_OVER:
        faults.test_the_right_to_send_is_not_spent_by_a_daemon_whose_job_was_taken_over(get("replaced"))
    elif precaution == OWN_RESULT:
        faults.test_only_its_own_process_can_say_that_an_attempt_was_not_sent(
            get("replaced"), get("database"), get("postgres")
        )
    else:
        take_over_after_a_loss(get("peers"), get("sandbox"))


@pytest.mark.parametrize("precaution", PRECAUTIONS)
def test_with_each_precaution_nothing_is_sent_twice(request: pytest.FixtureRequest, precaution: str) -> None:
    play(precaution, request)


@pytest.mark.parametrize("precaution", PRECAUTIONS)
def test_without_a_precaution_that_fails(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, precaution: str
) -> None:
    fails_without(PRECAUTIONS[precaution], request, monkeypatch, lambda: play(precaution, request))
