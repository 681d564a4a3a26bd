"""How a job ends: the ledger row, then the decision with its document.

Both can be written again without harm. Nothing here sends a request.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec
import structlog

from imagewatch import __version__
from imagewatch.job.outcome import End, Outcome
from imagewatch.job.receipts import Course, compose, with_files
from imagewatch.journal.budget import CAPS
from imagewatch.journal.ledger import Ledger, Row
from imagewatch.protocol.names import tagged
from imagewatch.protocol.reasons import KINDS
from imagewatch.protocol.values import Claim, Decision, Move, Sent
from imagewatch.system.errors import Problem, SpoolError
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from imagewatch.endpoint.api import Verdict
    from imagewatch.endpoint.decode import Reading
    from imagewatch.endpoint.pictures import Picture, Pictures
    from imagewatch.endpoint.saved_answer import Answer
    from imagewatch.job.record import Record
    from imagewatch.job.rules import Evidence
    from imagewatch.job.spool import Spool
    from imagewatch.protocol.values import Charged

_WITHOUT_PROMPT = {
    "unknown": "check the balance (imagewatch check --balance); the prompt is missing, so nothing can be sent again",
    "no": "the prompt is missing, so nothing can be sent again; drop it again",
}
"""Next step by charge, where the prompt is not among the files in the errors folder."""
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]*")
"""Names that can be typed after a command as they are."""
_log = structlog.get_logger()


@dataclass(frozen=True)
class Case:
    """A job at its end: what its evidence holds.

    Attributes:
        record: Where the evidence lies.
        claim: What was claimed.
        attempt: Number of the newest attempt, 0 without.
        sent: That attempt.
        answer: Its answer, if one is banked.
        mtime_ns: What the prompt gets as its mtime where it goes now, nanoseconds; 0: it goes nowhere.
    """

    record: Record
    claim: Claim
    attempt: int = 0
    sent: Sent | None = None
    answer: Answer | None = None
    mtime_ns: int = 0

    @classmethod
    def of(cls, record: Record, claim: Claim, evidence: Evidence) -> Case:
        """Read what is left of the newest attempt."""
        attempt = evidence.sent
        answer = record.answer(attempt) if evidence.answered >= attempt > 0 else None
        return cls(record, claim, attempt, record.sent(attempt), answer)

    @property
    def fields(self) -> dict[str, Any]:
        """What was asked for."""
        return self.sent.fields if self.sent else {}

    def course(self, finished: float) -> Course:
        """Return how it went, for the document."""
        answered = self.answer if self.answer and self.answer.head.status else None
        return Course(
            self.claim,
            sent=self.sent,
            head=answered.head if answered else None,
            tail=answered.tail if answered else None,
            attempts=self.attempt,
            finished=finished,
        )


class Closing:
    """Ends jobs.

    Args:
        spool: The folders.
        pictures: Gets the pictures out of answers.
        ledger: The ledger.
        clock: Wall clock, seconds since the epoch.
    """

    def __init__(self, spool: Spool, pictures: Pictures, ledger: Ledger, clock: Callable[[], float]) -> None:
        self._spool = spool
        self._pictures = pictures
        self._ledger = ledger
        self._clock = clock

    def _dated(self, case: Case) -> Case:
        """Return a case with a new mtime for its prompt: the ledger knows it before anybody sees the file."""
        return replace(case, mtime_ns=int(self._clock() * 1e9))

    def begin(self, case: Case) -> None:
        """Note an attempt that is about to be sent.

        Raises:
            SpoolError: It cannot be recorded, so it must not be sent; or the ledger knows what came of it.
        """
        row = self._ledger.job(case.claim.job)
        if row and (row["attempt"] > case.attempt or (row["attempt"] == case.attempt and row["outcome"] != "sent")):
            raise _outdated(case, row)
        self._write_row(case, "sent", "unknown")

    # Without a picture

    def redelivered(self, case: Case, twin: str) -> None:
        """End a job whose files are those of a job that is over: nothing is sent, nothing is published."""
        self._ledger.count_redelivery(twin, self._clock())
        case.record.decide(Decision(door="away"))
        reason = "a sync tool delivered a finished prompt again; skipped, not charged"
        _log.info("redelivered", finished=twin, reason=reason)

    def invalid(self, case: Case, problems: list[Problem], contents: dict[str, str], kind: str = "invalid") -> None:
        """End a job that our own checks refuse: no call was made.

        Args:
            case: The job.
            problems: What is wrong.
            contents: Hash of each file as dropped, by name.
            kind: Row of the table of reasons.
        """
        case = self._dated(case)
        told = [printable(str(problem)) for problem in problems]
        message = told[0] if len(told) == 1 else f"{len(told)} problems: {told[0]} …"
        self._write_row(case, "invalid", "no", message="; ".join(told), contents=contents)
        if all(problem.field in CAPS for problem in problems):
            kind = "too_expensive"
        self._reject(case, {"message": message, "problems": told, "next": KINDS[kind].retry}, "no")

    def busy(self, case: Case, verdict: Verdict) -> None:
        """Note an attempt that was free and will be made again."""
        self._write_row(case, "busy", "no", message=verdict.reason.message, code=verdict.code)

    def refuse(self, case: Case, verdict: Verdict) -> None:
        """End a job that the API refused, or whose outcome its answer leaves open."""
        case = self._dated(case)
        row = verdict.reason.row
        unknown = row.charged == "unknown"
        message = printable(verdict.reason.message) + ("; it may have been charged" if unknown else "")
        if row.name == "broken":
            message = f"{message}; tried {case.attempt} times; nothing was charged"
        self._write_row(case, "unknown" if unknown else "refused", row.charged, message=message, code=verdict.code)
        top = {
            "message": message,
            "status": (case.answer.head.status if case.answer else 0) or None,
            "code": printable(verdict.code, 200) or None,
            "credits_required": verdict.credits_required,
            "next": row.retry,
        }
        self._reject(case, top, row.charged)

    def doubt(self, case: Case, message: str, *, is_charged: bool = False) -> None:
        """End a job whose request was sent and of which we have no answer.

        Args:
            case: The job.
            message: Why not, in words.
            is_charged: Whether an answer had come that is charged for, and was lost on our side.

        Raises:
            SpoolError: The ledger knows what came of it; what is on the disk is an older copy.
        """
        row = self._ledger.job(case.claim.job) or {"attempt": 0}
        if row["attempt"] > case.attempt:
            raise _outdated(case, row)
        if row["attempt"] == case.attempt and row["outcome"] not in {"sent", "unknown"}:
            if row["answered_at"] is not None or row["charged"] != "yes":  # of an answer that was lost it has no time
                raise _outdated(case, row)
            is_charged, message, case = True, row["message"], replace(case, mtime_ns=row["placed_mtime_ns"])
        else:
            case = self._dated(case)
            message = printable(f"{message}; it {'was' if is_charged else 'may have been'} charged")
            outcome = "completed" if is_charged else "unknown"
            self._write_row(case, outcome, "yes" if is_charged else "unknown", message=message)
        kind = KINDS["lost" if is_charged else "unknown"]
        self._reject(case, {"message": message, "next": kind.retry}, kind.charged)

    def _reject(
        self,
        case: Case,
        top: Mapping[str, object],
        charged: Charged,
        *,
        beside: Move | None = None,
        billing: dict[str, Any] | None = None,
    ) -> None:
        """Decide for the errors folder: the originals, the raw answer if it was paid for, the error file last."""
        claim = case.claim
        ending = f".{beside.name}" if beside else ""
        base = self._spool.base(claim, "errors", [".error.toml", *([ending] if beside else [])])
        originals = self._spool.free_originals(claim, "errors", self._spool.present(claim), base)
        if base == claim.stem and any(move.name != move.source.partition("/")[2] for move in originals):
            base = tagged(claim.prompt, claim.stem, claim.tag).removesuffix(".prompt.txt")
        moves = (*originals, Move(source=beside.source, name=base + ending)) if beside else originals
        name = os.path.join(claim.folder, base)
        if charged != "yes" and all(move.source != f"claim/{claim.prompt}" for move in originals):
            top = {**top, "next": _WITHOUT_PROMPT[charged]}
        if _PLAIN.fullmatch(name):
            top = {**top, "next": str(top["next"]).replace("NAME", name)}
        document, facts = compose(
            case.course(self._clock()),
            charged=charged,
            top=top,
            billing=billing,
            originals=[{"file": move.name, "dropped_as": move.source.partition("/")[2]} for move in originals],
        )
        name = f"{base}.error.toml"
        told: dict[str, Any] = {"name": name, "document": document, "facts": facts, "mtime_ns": case.mtime_ns}
        case.record.decide(Decision(door="errors", moves=moves, **told))

    # With pictures

    def read(self, case: Case) -> None:
        """Read a paid answer, fetch what it names, and decide."""
        case = self._dated(case)
        assert case.answer is not None
        reading = self._pictures.read(case.record.path, case.answer)
        if any(got.url for got in reading.images):
            # The ledger first: it was paid for, and to fetch a picture may take long.
            self._write_row(case, "completed", "yes", reading=reading)
        pictures = self._pictures.collect(case.record.path, reading)
        good = sum(picture.good for picture in pictures)
        asked = case.sent.asked if case.sent else 1
        told = [text for text in (case.answer.tail.reason, reading.problem) if text]
        told += [f"image {k}: {p.problem}" for k, p in enumerate(pictures, 1) if p.problem]
        if good != asked:
            told.append(f"asked for {asked}, got {good}")
        words = "" if good else "; ".join([reading.message, *told] if reading.message else told)
        self._write_row(case, "completed", "yes", reading=reading, got=good, message=words, code=reading.code)
        top = {
            "provider": reading.provider or case.fields.get("provider"),
            "model": reading.model or case.fields.get("model"),
            "asked": asked,
            "got": good,
            "credits_charged": reading.credits,
            "problems": [printable(text) for text in told] or None,
        }
        if good:
            self._publish(case, top, pictures, reading.billing)
        else:
            self._keep_raw(case, top, reading)

    def _publish(self, case: Case, top: Mapping[str, object], pictures: list[Picture], billing: dict[str, Any]) -> None:
        claim = case.claim
        numbered = top["asked"] != 1 or len(pictures) > 1
        there = [(k, picture) for k, picture in enumerate(pictures, 1) if picture.source]
        endings = [f"-{k}{picture.ending}" if numbered else picture.ending for k, picture in there]
        base = self._spool.base(claim, "outbox", [*endings, ".receipt.toml"])
        named = [(base + ending, picture) for ending, (_, picture) in zip(endings, there, strict=True)]
        document, facts = compose(
            case.course(self._clock()),
            charged="yes",
            top=top,
            billing=billing,
            images=[picture.table(name) for name, picture in named],
        )
        moves = tuple(Move(source=f"state/{picture.source}", name=name) for name, picture in named)
        claimed = self._spool.present(claim)
        keep = self._spool.free_originals(claim, "archive", claimed) if self._spool.archive else ()
        name = f"{base}.receipt.toml"
        told: dict[str, Any] = {"name": name, "document": document, "facts": facts, "mtime_ns": case.mtime_ns}
        case.record.decide(Decision(door="outbox", moves=moves, keep=keep, **told))

    def _keep_raw(self, case: Case, top: Mapping[str, object], reading: Reading) -> None:
        """Decide for the errors folder with the raw answer: it was paid for and holds no picture we can read."""
        assert case.answer is not None
        ending = "json" if case.answer.sample(64).lstrip()[:1] in {b"{", b"["} else "bin"
        with self._spool.disk.writing(case.record.path("raw")) as file:
            for chunk in self._pictures.shown(case.answer):
                file.write(chunk)
        problems = top["problems"]
        first = problems[0] if isinstance(problems, list) else "it is empty"
        message = f"the endpoint answered, and charged for it, but there is no picture in the answer: {first}"
        message, code = printable(reading.message) or message, printable(reading.code, 200) or None
        status = case.answer.head.status
        beside = Move(source="state/raw", name=f"answer.{ending}")
        top = {**top, "message": message, "status": status, "code": code, "next": KINDS["unreadable"].retry}
        self._reject(case, top, "yes", beside=beside, billing=reading.billing)

    # The decision, afterwards

    def renamed(self, claim: Claim, decision: Decision) -> Decision:
        """Return a decision whose remaining names are free, after somebody took one of them.

        The base was free when it was chosen; only what is not out yet is renamed.
        """
        folder = self._spool.door_folder(decision.door, claim)
        moved: dict[str, str] = {}
        for move in decision.moves:
            if self._spool.source_exists(claim, move):
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
        prompts = [os.path.join(claim.folder, one.removesuffix(".error.toml")) for one in (decision.name, name)]
        document = with_files(decision.document, moved, *prompts)
        return msgspec.structs.replace(decision, moves=moves, name=name, document=document, facts=facts)

    def outcome(self, claim: Claim, decision: Decision, seconds: float) -> Outcome:
        """Return what a decided job came to, and log its one line."""
        facts = decision.facts
        self._report(decision.door, facts, seconds)
        return Outcome(
            claim.job,
            End.OVER,
            claim.source,
            door=decision.door,
            charged=facts["charged"],
            credits=facts.get("credits_charged"),
            answered=facts["answered"],
            message=facts.get("message", ""),
            problems=tuple(facts.get("problems", ())),
            document=os.path.join(self._spool.door_folder(decision.door, claim), decision.name),
        )

    def _report(self, door: str, facts: Mapping[str, Any], seconds: float) -> None:
        say: dict[str, object] = {
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
        told = {name: value for name, value in say.items() if value not in (None, [], "")}
        if door == "outbox":
            _log.info("completed", **told)
        else:
            if facts["charged"] == "yes":
                told["reason"] = "the response holds no readable image"
            _log.warning("unknown" if facts["charged"] == "unknown" else "failed", **told)

    # The ledger

    def _write_row(
        self,
        case: Case,
        outcome: str,
        charged: Charged,
        *,
        message: str = "",
        code: str = "",
        reading: Reading | None = None,
        got: int = 0,
        contents: dict[str, str] | None = None,
    ) -> None:
        claim, sent = case.claim, case.sent
        row = Row(
            job=claim.job,
            attempt=case.attempt,
            source=claim.source,
            source_size=claim.size,
            source_mtime_ns=claim.mtime_ns,
            outcome=outcome,
            charged=charged,
            credits=reading.credits if reading else None,
            transaction_id=printable(reading.transaction, 200) if reading else "",
            new_credit_balance=reading.balance if reading else None,
            owner=claim.owner,
            provider=(reading and reading.provider) or case.fields.get("provider", ""),
            model=(reading and reading.model) or case.fields.get("model", ""),
            got=got,
            code=printable(code, 200),
            message=printable(message),
            contents=json.dumps(contents) if contents else "",
            version=__version__,
            claimed_at=claim.at,
            placed_mtime_ns=case.mtime_ns,
        )
        self._ledger.write(_answered(_sent(row, sent), case.answer))


def _outdated(case: Case, row: Mapping[str, Any]) -> SpoolError:
    """Return the error for a record that is older than its result in the ledger."""
    folder = printable(case.record.folder)
    return SpoolError(
        f"job {case.claim.job}: its record is an older copy: the result is not in it, and the ledger says: "
        f"{row['outcome']}, charged: {row['charged']}",
        path=folder,
        hint=f"restore the state folder as a whole, or remove {folder}; the job is over",
    )


def _sent(row: Row, sent: Sent | None) -> Row:
    """Return a row with what is known of the request."""
    if sent is None:
        return row
    return msgspec.structs.replace(
        row,
        contents=json.dumps(sent.contents),
        fields=json.dumps(sent.fields),
        prompt_sha256=sent.prompt_sha256,
        asked=sent.asked,
        endpoint=sent.endpoint,
        sent_at=sent.at,
    )


def _answered(row: Row, answer: Answer | None) -> Row:
    """Return a row with what is known of the answer."""
    if answer is None:
        return row
    headers = answer.head.headers
    request_id = headers.get("x-request-id") or headers.get("cf-ray") or ""
    return msgspec.structs.replace(row, status=answer.head.status, request_id=request_id, answered_at=answer.tail.at)
