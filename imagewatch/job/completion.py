"""How a job ends: the result of its last attempt and the decision, in one transaction."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any, Final

import msgspec
import structlog

from imagewatch.job.outcome import End, Outcome
from imagewatch.job.receipts import compose, with_files
from imagewatch.job.result_files import result_file
from imagewatch.job.rows import row_of
from imagewatch.job.running import NO_ATTEMPT
from imagewatch.journal.budget import CAPS
from imagewatch.protocol.names import ERROR, RECEIPT, SUFFIX, tagged
from imagewatch.protocol.reasons import KINDS
from imagewatch.protocol.values import Decision, Move
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from imagewatch.endpoint.api import Verdict
    from imagewatch.endpoint.decode import Reading
    from imagewatch.endpoint.pictures import Picture, Pictures
    from imagewatch.job.result_files import ResultFile
    from imagewatch.job.running import Attempt, RunningJob
    from imagewatch.job.spool import Spool
    from imagewatch.journal.row import Row
    from imagewatch.protocol.values import Claim, Destination
    from imagewatch.system.errors import Problem

_WITHOUT_PROMPT = {
    "unknown": "check the balance (imagewatch check --balance); the prompt is missing, so nothing can be sent again",
    "no": "the prompt is missing; drop it again",
}
"""Next step by charge, where the prompt is not among the files in the errors folder."""
_RAW = "state/raw"
_ENDINGS: Final[dict[str, str]] = {"outbox": RECEIPT, "errors": ERROR}
_PROVEN = (
    *("credits", "provider", "model", "got", "status", "code", "message"),
    *("answered_at", "transaction_id", "new_credit_balance"),
)
"""Columns of an attempt with a result that its result file has, too."""
DECODED_AFTERWARDS = "image."
"""How the names of images begin that were not decoded while their response arrived."""
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]*")
"""Names that can be typed after a command as they are."""
_log = structlog.get_logger()


class Completion:
    """Ends jobs. What it writes can be written again without harm; it sends nothing.

    Args:
        spool: The folders.
        pictures: Gets the images out of responses.
        clock: Wall clock, seconds since the epoch.
    """

    def __init__(self, spool: Spool, pictures: Pictures, clock: Callable[[], float]) -> None:
        self._spool = spool
        self._pictures = pictures
        self._clock = clock

    def _date(self, job: RunningJob) -> None:
        """Choose a new mtime for the prompt: the journal has it before the file gets it."""
        job.mtime_ns = int(self._clock() * 1e9)

    # Without an image

    def redelivered(self, job: RunningJob, twin: str) -> None:
        """End a job whose files are those of a finished job: nothing is sent, nothing is published."""
        job.record.decide(Decision(destination="discarded"), repeated=twin)
        reason = "a sync tool delivered a finished prompt again; skipped, not charged"
        _log.info("redelivered", finished=twin, reason=reason)

    def invalid(
        self, job: RunningJob, problems: list[Problem], contents: dict[str, str], kind: str = "invalid"
    ) -> None:
        """End a job that our own checks refuse: no call was made.

        Args:
            job: The job.
            problems: What is wrong.
            contents: Hash of each file as dropped, by name.
            kind: Row of the table of reasons.
        """
        self._date(job)
        texts = [printable(str(problem)) for problem in problems]
        message = texts[0] if len(texts) == 1 else f"{len(texts)} problems: {texts[0]} …"
        row = row_of(job, NO_ATTEMPT, "invalid", "no", message="; ".join(texts), contents=contents)
        if all(problem.field in CAPS for problem in problems):
            kind = "too_expensive"
        top = {"message": message, "problems": texts, "next": KINDS[kind].retry}
        self._reject(job, NO_ATTEMPT, row, top)

    def busy(self, job: RunningJob) -> None:
        """Record an attempt that was free and will be made again."""
        attempt = job.attempt()
        known = job.record.attempt(attempt.number)
        if known is None or known.outcome == "busy":
            return
        verdict = job.verdict()
        row = row_of(job, attempt, "busy", "no", message=verdict.reason.message, code=verdict.code)
        job.record.write(row, synced=False)  # the saved response says the same

    def refuse(self, job: RunningJob, verdict: Verdict) -> None:
        """End a job that the API refused, or whose response does not say whether it was charged."""
        self._date(job)
        attempt, kind = job.attempt(), verdict.reason.row
        is_unknown = kind.charged == "unknown"
        message = printable(verdict.reason.message) + ("; it may have been charged" if is_unknown else "")
        if kind.name == "broken":
            message = f"{message}; tried {attempt.made} times; nothing was charged"
        outcome = "unknown" if is_unknown else "refused"
        row = row_of(job, attempt, outcome, kind.charged, message=message, code=verdict.code)
        status = attempt.head.status if attempt.head else 0
        top = {
            "message": message,
            "status": status or None,
            "code": printable(verdict.code, 200) or None,
            "credits_required": verdict.credits_required,
            "next": kind.retry_of.get(status, kind.retry),
        }
        self._reject(job, attempt, row, top)

    def unknown(self, job: RunningJob, message: str, *, is_charged: bool = False) -> None:
        """End a job whose request was sent and has no response.

        Args:
            job: The job.
            message: Why not.
            is_charged: Whether a response had come that is charged, and was lost on our side.
        """
        attempt = job.attempt()
        self._date(job)
        if self._adopt(job, "outbox") or self._adopt(job, "errors"):
            return
        message = printable(f"{message}; it {'was' if is_charged else 'may have been'} charged")
        outcome = "completed" if is_charged else "unknown"
        row = row_of(job, attempt, outcome, "yes" if is_charged else "unknown", message=message)
        kind = KINDS["lost" if is_charged else "unknown"]
        self._reject(job, attempt, row, {"message": message, "next": kind.retry})

    def _reject(
        self,
        job: RunningJob,
        attempt: Attempt,
        row: Row,
        top: Mapping[str, object],
        *,
        beside: Move | None = None,
        billing: dict[str, Any] | None = None,
    ) -> None:
        """Decide for the errors folder: the originals, the raw response if it was paid for, the error file last."""
        claim, charged = job.claim, row.charged
        if (found := self._published(claim, "errors")) is not None and found.row.outcome == row.outcome:
            job.record.decide(found.decision, row)  # a shared database has lost it
            return
        ending = f".{beside.name}" if beside else ""
        base = self._spool.delivery.base(claim, "errors", [ERROR, *([ending] if beside else [])])
        originals = self._spool.delivery.free_originals(claim, "errors", self._spool.originals.present(claim), base)
        if base == claim.stem and any(move.name != move.source.partition("/")[2] for move in originals):
            base = tagged(claim.prompt, claim.stem, claim.tag).removesuffix(SUFFIX)
        moves = (*originals, Move(source=beside.source, name=base + ending)) if beside else originals
        name = os.path.join(claim.folder, base)
        if charged != "yes" and all(move.source != f"claim/{claim.prompt}" for move in originals):
            top = {**top, "next": _WITHOUT_PROMPT[charged]}
        if _PLAIN.fullmatch(name):
            top = {**top, "next": str(top["next"]).replace("NAME", name)}
        text, facts = compose(
            claim,
            attempt,
            self._clock(),
            charged=charged,
            top=top,
            billing=billing,
            originals=[{"file": move.name, "dropped_as": move.source.partition("/")[2]} for move in originals],
        )
        name = base + ERROR
        result: dict[str, Any] = {"name": name, "result_file": text, "facts": facts, "mtime_ns": job.mtime_ns}
        self._share(job)
        job.record.decide(Decision(destination="errors", moves=moves, **result), row)

    def _share(self, job: RunningJob) -> None:
        """Let another daemon of the inbox carry out the decision that is about to be written."""
        if self._spool.handover.is_on:
            self._spool.handover.share(job.record)

    # With images

    def read(self, job: RunningJob) -> None:
        """Read a paid response, fetch the images that it names, and decide."""
        self._date(job)
        if self._adopt(job, "outbox"):
            return
        attempt, answer = job.attempt(), job.answer()
        reading = self._pictures.read(job.record.path, answer)
        if any(got.url for got in reading.images):
            answer.make_durable(self._spool.disk)
            # The journal first: it was paid for, and to fetch an image may take long.
            job.record.write(row_of(job, attempt, "completed", "yes", reading=reading), synced=True)
        pictures = self._pictures.collect(job.record.path, reading)
        good = sum(picture.good for picture in pictures)
        asked = attempt.sent.asked if attempt.sent else 1
        problems = [text for text in (answer.tail.reason, reading.problem) if text]
        problems += [f"image {k}: {p.problem}" for k, p in enumerate(pictures, 1) if p.problem]
        if good != asked:
            problems.append(f"asked for {asked}, got {good}")
        message = "" if good else "; ".join([reading.message, *problems] if reading.message else problems)
        row = row_of(job, attempt, "completed", "yes", reading=reading, got=good, message=message, code=reading.code)
        top = {
            "provider": reading.provider or attempt.fields.get("provider"),
            "model": reading.model or attempt.fields.get("model"),
            "asked": asked,
            "got": good,
            "credits_charged": reading.credits,
            "problems": [printable(text) for text in problems] or None,
        }
        if good:
            self._publish(job, attempt, row, top, pictures, reading.billing)
        else:
            answer.make_durable(self._spool.disk)  # nothing else holds what was paid for
            self._keep_raw(job, attempt, row, top, reading)

    def _publish(
        self,
        job: RunningJob,
        attempt: Attempt,
        row: Row,
        top: Mapping[str, object],
        pictures: list[Picture],
        billing: dict[str, Any],
    ) -> None:
        claim = job.claim
        numbered = top["asked"] != 1 or len(pictures) > 1
        there = [(k, picture) for k, picture in enumerate(pictures, 1) if picture.source]
        endings = [f"-{k}{picture.ending}" if numbered else picture.ending for k, picture in there]
        base = self._spool.delivery.base(claim, "outbox", [*endings, RECEIPT])
        named = [(base + ending, picture) for ending, (_, picture) in zip(endings, there, strict=True)]
        text, facts = compose(
            claim,
            attempt,
            self._clock(),
            charged="yes",
            top=top,
            billing=billing,
            images=[picture.table(name) for name, picture in named],
        )
        moves = tuple(Move(source=f"state/{picture.source}", name=name) for name, picture in named)
        if any(picture.source.startswith(DECODED_AFTERWARDS) for _, picture in there):
            job.record.sync_names()
        self._share(job)
        decision = Decision(destination="outbox", moves=moves, name=base + RECEIPT, result_file=text, facts=facts)
        job.record.decide(self._with_originals(job, decision), row)

    def _with_originals(self, job: RunningJob, decision: Decision) -> Decision:
        """Return a decision for the outbox with what becomes of the originals."""
        claimed = self._spool.originals.present(job.claim)
        keep = self._spool.delivery.free_originals(job.claim, "archive", claimed) if self._spool.archive else ()
        return msgspec.structs.replace(decision, keep=keep, mtime_ns=job.mtime_ns)

    def _adopt(self, job: RunningJob, destination: Destination) -> bool:
        """End a job as its result file shows, if a shared database has lost that; return whether there is one.

        Its images may have been moved out of the state folder, and its response may have been removed.
        """
        if (found := self._published(job.claim, destination)) is None:
            return False
        known, decision = found.row, found.decision
        row = row_of(job, job.attempt(), known.outcome, known.charged)
        proven = {name: getattr(known, name) for name in _PROVEN}
        if destination == "outbox":
            decision = self._with_originals(job, decision)
        job.record.decide(decision, msgspec.structs.replace(row, **proven))
        return True

    def _published(self, claim: Claim, destination: Destination) -> ResultFile | None:
        """Return the result file of a job; None if there is none, or if the journal cannot have lost its decision."""
        folder, ending = self._spool.delivery.destination_folder(destination, claim), _ENDINGS[destination]
        for base in self._spool.delivery.bases(claim) if self._spool.journal.file.is_shared else ():
            found = result_file(self._spool, os.path.join(folder, base + ending), destination)
            if found is not None and found.claim.job == claim.job:
                return found
        return None

    def _keep_raw(
        self, job: RunningJob, attempt: Attempt, row: Row, top: Mapping[str, object], reading: Reading
    ) -> None:
        """Decide for the errors folder with the raw response: it was paid for and holds no readable image."""
        answer = job.answer()
        ending = "json" if answer.sample(64).lstrip()[:1] in {b"{", b"["} else "bin"
        with self._spool.disk.writing(job.record.path("raw")) as file:
            for chunk in self._pictures.shown(answer):
                file.write(chunk)
        job.record.sync_names()
        problems = top["problems"]
        first = problems[0] if isinstance(problems, list) else "it is empty"
        message = f"the response was charged, but holds no readable image: {first}"
        message, code = printable(reading.message) or message, printable(reading.code, 200) or None
        status = answer.head.status
        beside = Move(source=_RAW, name=f"answer.{ending}")
        top = {**top, "message": message, "status": status, "code": code, "next": KINDS["unreadable"].retry}
        self._reject(job, attempt, row, top, beside=beside, billing=reading.billing)

    # The decision, afterwards

    def renamed(self, claim: Claim, decision: Decision) -> Decision:
        """Return a decision whose remaining names are free, after a file with one of them was found.

        The base was free when it was chosen; only what is not out yet is renamed.
        """
        folder = self._spool.delivery.destination_folder(decision.destination, claim)
        moved: dict[str, str] = {}
        for move in decision.moves:
            if self._spool.delivery.source_exists(claim, move):
                name = move.name
                for tag in (claim.tag, claim.job):
                    if self._spool.tops.exists(os.path.join(folder, name)):
                        name = tagged(move.name, claim.stem, tag)
                moved[move.name] = name
        name = decision.name
        for tag in (claim.tag, claim.job):
            if self._spool.tops.exists(os.path.join(folder, name)):
                name = tagged(decision.name, claim.stem, tag)
        moves = tuple(msgspec.structs.replace(move, name=moved.get(move.name, move.name)) for move in decision.moves)
        facts = {**decision.facts, "images": [moved.get(image, image) for image in decision.facts["images"]]}
        prompts = [os.path.join(claim.folder, one.removesuffix(ERROR)) for one in (decision.name, name)]
        text = with_files(decision.result_file, moved, *prompts)
        return msgspec.structs.replace(decision, moves=moves, name=name, result_file=text, facts=facts)

    def outcome(self, claim: Claim, decision: Decision, seconds: float) -> Outcome:
        """Return the outcome of a decided job, and log it."""
        facts = decision.facts
        has_response = any(move.source == _RAW for move in decision.moves)
        self._report(decision.destination, facts, seconds, has_response=has_response)
        return Outcome(
            claim.job,
            End.OVER,
            claim.source,
            destination=decision.destination,
            charged=facts["charged"],
            credits=facts.get("credits_charged"),
            answered=facts["answered"],
            message=facts.get("message", ""),
            problems=tuple(facts.get("problems", ())),
            result_file=os.path.join(
                self._spool.delivery.destination_folder(decision.destination, claim), decision.name
            ),
        )

    def _report(self, destination: str, facts: Mapping[str, Any], seconds: float, *, has_response: bool) -> None:
        found: dict[str, object] = {
            "charged": facts["charged"],
            "credits": facts.get("credits_charged"),
            "provider": facts.get("provider"),
            "images": facts["images"],
            "attempts": facts["attempts"],
            "seconds": round(seconds, 3),
            "status": facts.get("status"),
            "error": facts.get("message"),
            "problems": facts.get("problems"),
            **facts.get("ids", {}),
        }
        fields = {name: value for name, value in found.items() if value not in (None, [], "")}
        if destination == "outbox":
            _log.info("completed", **fields)
        else:
            if facts["charged"] == "yes":
                fields["reason"] = "the response holds no readable image" if has_response else KINDS["lost"].cause
            _log.warning("unknown" if facts["charged"] == "unknown" else "failed", **fields)
