"""How a job ends: the ledger row, the pictures, the decision and its document.

Each method first writes the ledger, then the decision; both can be written again without harm. Nothing here sends
a request; pictures by url are fetched, which is free.
"""

from __future__ import annotations

import hashlib
import os
import tomllib
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import msgspec
import structlog
import tomli_w

from imagewatch import __version__
from imagewatch.client import Client, FetchError, bare
from imagewatch.documents import compose
from imagewatch.durable import ours
from imagewatch.images import Image, foreign, inspect
from imagewatch.job import Charged, Claim, Decision, Head, Move, Reaction, Sent, Tail
from imagewatch.ledger import Ledger, Row
from imagewatch.names import tagged
from imagewatch.outcome import End, Outcome
from imagewatch.reading import Got, Reading, read
from imagewatch.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from imagewatch.config import Config
    from imagewatch.durable import Disk
    from imagewatch.errors import Problem
    from imagewatch.record import Answer, Record
    from imagewatch.spool import Spool
    from imagewatch.wire import Verdict

_FETCH_SECONDS = 600.0
"""How long a picture's url is tried. Known signed urls live ten minutes (BFL's skills repository)."""
_MOST_TRIES_4XX = 3
_COPY_BYTES = 1 << 20
_NEXT_RETRY = "correct the cause, then move the prompt back into the inbox"
_NEXT = {
    "invalid": "correct the prompt or its images, then move them back into the inbox",
    "key": "give imagewatch a valid key; then move the prompt back into the inbox",
    "credits": "add credits to the account; then move the prompt back into the inbox",
    "quota": "wait for the quota to be renewed; then move the prompt back into the inbox",
    "address": "correct base_url in the configuration; then move the prompt back into the inbox",
    "doubt": "look at the account's balance; move the prompt back into the inbox only if you accept to pay again",
    "paid": "do not send it again; the paid answer lies beside this file, and its words may say more",
    "busy": "the endpoint was busy for too long; move the prompt back into the inbox to try again",
}
_log = structlog.get_logger()


@dataclass(frozen=True)
class Picture:
    """One picture of a paid answer, on our disk.

    Attributes:
        source: Its file in the record.
        image: What its bytes are, or None when they are no picture we know.
        mime: What the endpoint said they are.
        size: Bytes.
        sha256: Their hash.
        problem: What is wrong with it, or an empty string.
        broken: Whether its base64 could not be decoded to the end; the file is only its beginning.
    """

    source: str
    image: Image | None
    mime: str
    size: int
    sha256: str
    problem: str
    broken: bool = False

    @property
    def good(self) -> bool:
        """Whether this is what was paid for, as far as it came."""
        return self.image is not None and not self.broken

    @property
    def ending(self) -> str:
        """The ending that follows the bytes, not the endpoint's word."""
        return f".{self.image.extension}" if self.image else ".bin"


class Closing:
    """Ends jobs.

    Args:
        spool: The folders.
        client: For pictures by url.
        ledger: The ledger.
        config: Limits.
        clock: Wall clock, seconds since the epoch.
        wait: Waits some seconds.
    """

    def __init__(
        self,
        spool: Spool,
        client: Client,
        ledger: Ledger,
        config: Config,
        *,
        clock: Callable[[], float],
        wait: Callable[[float], object],
    ) -> None:
        self._spool = spool
        self._client = client
        self._ledger = ledger
        self._limit = config.endpoint.max_response_bytes
        self._clock = clock
        self._wait = wait

    # Without a picture

    def invalid(self, record: Record, claim: Claim, problems: list[Problem]) -> None:
        """End a job that our own checks refuse: no call was made."""
        told = [printable(str(problem)) for problem in problems]
        message = told[0] if len(told) == 1 else f"{len(told)} problems: {told[0]} …"
        self._write_row(claim, 0, None, outcome="invalid", charged="no", message="; ".join(told))
        top = {"message": message, "problems": told, "next": _NEXT["invalid"]}
        self._reject(record, claim, 0, top, charged="no")

    def busy(self, record: Record, claim: Claim, attempt: int, verdict: Verdict) -> None:
        """Note an attempt that was free, and whose prompt will be sent again."""
        unreached = verdict.reaction is Reaction.UNREACHED
        outcome, answer = "unreached" if unreached else "busy", record.answer(attempt)
        sent = record.sent(attempt)
        self._write_row(claim, attempt, sent, outcome=outcome, charged="no", verdict=verdict, answer=answer)

    def refuse(self, record: Record, claim: Claim, attempt: int, verdict: Verdict) -> None:
        """End a job that the API refused, or whose outcome its answer leaves open."""
        unknown = verdict.reaction is Reaction.UNKNOWN
        charged: Charged = "unknown" if unknown else "no"
        outcome = "unknown" if unknown else "refused"
        answer = record.answer(attempt)
        sent = record.sent(attempt)
        self._write_row(claim, attempt, sent, outcome=outcome, charged=charged, verdict=verdict, answer=answer)
        what = "doubt" if unknown else verdict.account or ("busy" if verdict.reaction is Reaction.BUSY else "")
        top: dict[str, object] = {
            "message": printable(verdict.message),
            "status": answer.head.status,
            "code": printable(verdict.code, 200) or None,
            "credits_required": verdict.credits_required,
            "next": _NEXT.get(what, _NEXT_RETRY),
        }
        self._reject(record, claim, attempt, top, charged=charged, answer=answer)

    def doubt(self, record: Record, claim: Claim, attempt: int, message: str) -> None:
        """End a job whose request was sent and whose answer never came."""
        message = f"{message}; it may have been charged"
        sent = record.sent(attempt)
        self._write_row(claim, attempt, sent, outcome="unknown", charged="unknown", message=message)
        top = {"message": printable(message), "next": _NEXT["doubt"]}
        self._reject(record, claim, attempt, top, charged="unknown")

    def _reject(
        self,
        record: Record,
        claim: Claim,
        attempt: int,
        top: Mapping[str, object],
        *,
        charged: Charged,
        answer: Answer | None = None,
        beside: Move | None = None,
        billing: dict[str, Any] | None = None,
    ) -> None:
        """Decide for the errors folder: the originals, the raw answer if it was paid for, the error file last."""
        present = self._spool.present(claim)
        ending = f".{beside.name}" if beside else ""
        base = self._spool.base(claim, "errors", [".error.toml", *([ending] if beside else [])])
        originals = self._spool.free_originals(claim, "errors", present, base)
        if base == claim.stem and any(move.name != move.source.partition("/")[2] for move in originals):
            base = tagged(claim.prompt, claim.stem, claim.tag).removesuffix(".prompt.txt")
        moves = (*originals, Move(source=beside.source, name=base + ending)) if beside else originals
        document = compose(
            claim,
            charged=charged,
            sent=record.sent(attempt),
            head=answer.head if answer and answer.head.status else None,
            tail=answer.tail if answer else None,
            attempts=attempt,
            finished=self._clock(),
            top=top,
            billing=billing,
        )
        record.decide(Decision(door="errors", moves=moves, name=f"{base}.error.toml", document=document))

    # With pictures

    def read(self, record: Record, claim: Claim, attempt: int) -> None:
        """Read a paid answer, fetch what it names, and decide."""
        answer, sent = record.answer(attempt), record.sent(attempt)
        assert sent is not None
        reading = read(
            answer.chunks(),
            encoding=answer.head.headers.get("content-encoding", ""),
            limit=2 * self._limit,
            create=lambda number: self._create(record.path(f"image.{number}")),
        )
        # The ledger first: it was paid for, whatever becomes of the pictures.
        self._write_made(claim, attempt, sent, answer, reading, got=0)
        pictures = [self._picture(record, number, got) for number, got in enumerate(reading.images)]
        good = [picture for picture in pictures if picture.good]
        self._write_made(claim, attempt, sent, answer, reading, got=len(good))
        problems = self._problems(reading, answer.tail, pictures, sent.asked, len(good))
        if good:
            self._publish(record, claim, attempt, sent, answer, reading, pictures, problems)
        else:
            self._keep_raw(record, claim, attempt, answer, reading, problems)

    def _create(self, path: str) -> IO[bytes]:
        return _Ours(self._spool.disk, path)  # type: ignore[return-value]

    def _picture(self, record: Record, number: int, got: Got) -> Picture:
        if got.problem and got.decoded is None:
            return Picture("", None, got.mime, 0, "", got.problem)
        if got.url:
            name = f"fetched.{number}"
            if problem := self._fetch(got.url, record.path(name)):
                return Picture("", None, got.mime, 0, "", problem)
        else:
            name = f"image.{got.decoded}"
        return _inspected(record.path(name), name, got)

    def _fetch(self, url: str, path: str) -> str:
        """Fetch a picture, again and again until it is here or its url has expired; return what went wrong."""
        until, tries, refused = self._clock() + _FETCH_SECONDS, 0, 0
        if os.path.lexists(path):
            return ""  # an earlier run has it, durably; the url may not work twice
        while True:
            try:
                with self._spool.disk.writing(path) as file:
                    self._client.fetch(url, file, self._limit)
                self._spool.disk.sync_folder(os.path.dirname(path))
            except FetchError as error:
                tries += 1
                refused += error.refused
                if error.final or refused >= _MOST_TRIES_4XX or self._clock() >= until:
                    return str(error)
                _log.warning("picture not fetched yet", url=bare(url), reason=str(error), tries=tries)
                self._wait(min(0.25 * 2**tries, 15.0))
            else:
                return ""

    def _problems(self, reading: Reading, tail: Tail, pictures: list[Picture], asked: int, good: int) -> list[str]:
        told = [text for text in (tail.reason, reading.problem) if text]
        told += [f"image {k}: {p.problem}" for k, p in enumerate(pictures, 1) if p.problem]
        if good != asked:
            told.append(f"asked for {asked}, got {good}")
        return [printable(text) for text in told]

    def _publish(
        self,
        record: Record,
        claim: Claim,
        attempt: int,
        sent: Sent,
        answer: Answer,
        reading: Reading,
        pictures: list[Picture],
        problems: list[str],
    ) -> None:
        numbered = sent.asked > 1 or len(pictures) > 1
        there = [(k, picture) for k, picture in enumerate(pictures, 1) if picture.source]
        endings = [f"-{k}{p.ending}" if numbered else p.ending for k, p in there]
        base = self._spool.base(claim, "outbox", [*endings, ".receipt.toml"])
        names = [base + ending for ending in endings]
        document = compose(
            claim,
            charged="yes",
            sent=sent,
            head=answer.head,
            tail=answer.tail,
            attempts=attempt,
            finished=self._clock(),
            top={
                "provider": reading.provider or sent.fields.get("provider"),
                "model": reading.model or sent.fields.get("model"),
                "asked": sent.asked,
                "got": sum(1 for picture in pictures if picture.good),
                "credits_charged": reading.credits,
                "problems": problems or None,
            },
            billing=reading.billing,
            images=[_table(name, picture) for name, (_, picture) in zip(names, there, strict=True)],
        )
        moves = tuple(Move(source=f"state/{p.source}", name=n) for n, (_, p) in zip(names, there, strict=True))
        present = self._spool.present(claim)
        keep = self._spool.free_originals(claim, "archive", present) if self._spool.archive else ()
        record.decide(Decision(door="outbox", moves=moves, name=f"{base}.receipt.toml", document=document, keep=keep))

    def _keep_raw(
        self, record: Record, claim: Claim, attempt: int, answer: Answer, reading: Reading, problems: list[str]
    ) -> None:
        """Decide for the errors folder with the raw answer: it was paid for and holds no picture we can read."""
        first = answer.sample(64).lstrip()[:1]
        ending = "json" if first in {b"{", b"["} else "bin"
        with self._spool.disk.writing(record.path("raw")) as file:
            for chunk in answer.chunks(_COPY_BYTES):
                file.write(chunk)
        top = {
            "message": "the endpoint answered, and charged for it, but there is no picture in the answer: "
            + (problems[0] if problems else "it is empty"),
            "status": answer.head.status,
            "problems": problems or None,
            "next": _NEXT["paid"],
            "credits_charged": reading.credits,
        }
        beside = Move(source="state/raw", name=f"answer.{ending}")
        self._reject(record, claim, attempt, top, charged="yes", answer=answer, beside=beside, billing=reading.billing)

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
                    if os.path.lexists(os.path.join(folder, name)):
                        name = tagged(move.name, claim.stem, tag)
                moved[move.name] = name
        name = decision.name
        for tag in (claim.tag, claim.job):
            if os.path.lexists(os.path.join(folder, name)):
                name = tagged(decision.name, claim.stem, tag)
        document = tomllib.loads(decision.document)
        for table in document.get("images", []):
            table["file"] = moved.get(table["file"], table["file"])
        moves = tuple(msgspec.structs.replace(move, name=moved.get(move.name, move.name)) for move in decision.moves)
        text = tomli_w.dumps(document, multiline_strings=True)
        return msgspec.structs.replace(decision, moves=moves, name=name, document=text)

    def outcome(self, claim: Claim, decision: Decision) -> Outcome:
        """Return what a decided job came to."""
        document = tomllib.loads(decision.document)
        return Outcome(
            claim.job,
            End.OVER,
            claim.source,
            door=decision.door,
            charged=document["charged"],
            credits=document.get("credits_charged"),
            answered="answered" in document["times"],
            message=document.get("message", ""),
        )

    def report(self, claim: Claim, decision: Decision, seconds: float) -> None:
        """Log the one line of a finished job."""
        document = tomllib.loads(decision.document)
        say: dict[str, object] = {
            "charged": document["charged"],
            "credits": document.get("credits_charged"),
            "provider": document.get("provider") or document.get("request", {}).get("provider"),
            "images": [image["file"] for image in document.get("images", [])],
            "attempts": document["attempts"],
            "seconds": round(seconds, 3),
            "status": document.get("status"),
            "error": document.get("message"),
            "problems": document.get("problems"),
            **document.get("ids", {}),
        }
        told = {name: value for name, value in say.items() if value not in (None, [], "")}
        if decision.door == "outbox":
            _log.info("made", **told)
        else:
            _log.warning(
                {"no": "refused", "unknown": "unknown", "yes": "paid, not readable"}[document["charged"]], **told
            )

    # The ledger

    def _write_made(
        self, claim: Claim, attempt: int, sent: Sent, answer: Answer, reading: Reading, *, got: int
    ) -> None:
        self._write_row(claim, attempt, sent, outcome="made", charged="yes", answer=answer, reading=reading, got=got)

    def _write_row(
        self,
        claim: Claim,
        attempt: int,
        sent: Sent | None,
        *,
        outcome: str,
        charged: Charged,
        message: str = "",
        verdict: Verdict | None = None,
        answer: Answer | None = None,
        reading: Reading | None = None,
        got: int = 0,
    ) -> None:
        fields = sent.fields if sent else {}
        head = answer.head if answer else Head(status=0)
        said = verdict.message if verdict else message
        self._ledger.write(
            Row(
                job=claim.job,
                attempt=attempt,
                source=claim.source,
                source_size=claim.size,
                source_mtime_ns=claim.mtime_ns,
                content_sha256=sent.content_sha256 if sent else "",
                prompt_sha256=sent.prompt_sha256 if sent else "",
                outcome=outcome,
                charged=charged,
                credits=reading.credits if reading else None,
                provider=(reading and reading.provider) or fields.get("provider", ""),
                model=(reading and reading.model) or fields.get("model", ""),
                asked=sent.asked if sent else 0,
                got=got,
                status=head.status,
                code=printable(verdict.code, 200) if verdict else "",
                message=printable(said),
                request_id=head.headers.get("x-request-id") or head.headers.get("cf-ray") or "",
                endpoint=sent.endpoint if sent else "",
                version=__version__,
                claimed_at=claim.at,
                sent_at=sent.at if sent else None,
                answered_at=answer.tail.at if answer else None,
            )
        )


class _Ours:
    """A file of ours that is written to by code that knows nothing of our disk. It is durable when it is closed."""

    def __init__(self, disk: Disk, path: str) -> None:
        disk.unlink(path)
        self._disk = disk
        self._file = disk.create(path)
        self._path = path

    def write(self, content: bytes) -> int:
        with ours(self._path, "write"):
            return self._file.write(content)

    def close(self) -> None:
        if not self._file.closed:
            self._disk.sync(self._file, self._path)
            self._file.close()


def _inspected(path: str, name: str, got: Got) -> Picture:
    """Judge a picture by its bytes."""
    with open(path, "rb") as file:
        digest, size = hashlib.sha256(), 0
        while chunk := file.read(_COPY_BYTES):
            digest.update(chunk)
            size += len(chunk)
        image = inspect(file)
        problem = got.problem
        if image is None:
            file.seek(0)
            kind = foreign(file.read(512)) or "nothing that we know"
            problem = problem or f"not a picture: its content is {kind}"
        else:
            problem = problem or image.problem
    return Picture(name if size else "", image, got.mime, size, digest.hexdigest(), problem, broken=bool(got.problem))


def _table(name: str, picture: Picture) -> dict[str, object]:
    table: dict[str, object] = {
        "file": name,
        "mime": picture.image.mime if picture.image else "application/octet-stream",
        "bytes": picture.size,
        "width": picture.image.width if picture.image else None,
        "height": picture.image.height if picture.image else None,
        "sha256": picture.sha256,
    }
    if picture.mime and picture.mime != table["mime"]:
        table["declared_mime"] = printable(picture.mime, 100)
    if picture.problem:
        table["problem"] = printable(picture.problem)
    return table
