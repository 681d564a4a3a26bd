"""What a receipt or error file says, as far as the page shows it. Pure.

Others may have written the file: its types are checked, its texts are cut, and a name in it counts only if it is that
of an image in the file's own folder.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import msgspec

from imagewatch.config.validate import shown
from imagewatch.gallery.values import Job, JobImage
from imagewatch.job.receipts import unvouched
from imagewatch.protocol.prompt import MAX_CHARACTERS

_MOST_CHARACTERS = 4000
"""Of one text on the page, so that a few long ones do not make it slow; the result files have all of it."""
_MOST_PROBLEMS = 50

_Whole = Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)]  # the range of JSON and browsers


class NamedFile(msgspec.Struct):
    """One entry of ``images`` or ``inputs``."""

    file: str
    width: _Whole = 0
    height: _Whole = 0
    bytes: _Whole = 0
    content_credentials: bool = False
    problem: str = ""


class ResultFile(msgspec.Struct):
    """The keys of a receipt or error file that the page shows."""

    source: str
    charged: Literal["yes", "no", "unknown"]
    job: str = ""
    credits_charged: float | None = None
    provider: str = ""
    model: str = ""
    prompt: str = ""
    asked: _Whole = 0
    message: str = ""
    problems: list[str] = []
    status: _Whole = 0
    code: str = ""
    credits_required: float | None = None
    next: str = ""
    request: dict[str, Any] = {}
    times: dict[str, datetime] = {}
    images: list[NamedFile] = []
    inputs: list[NamedFile] = []


def parsed(content: bytes) -> ResultFile | str:
    """Return what a result file says, or in words what is wrong with it."""
    try:
        return msgspec.convert(unvouched(content.decode()), ResultFile)
    except msgspec.ValidationError as error:
        return f"is not a result file of imagewatch: {error}"
    except UnicodeDecodeError:
        return "is not UTF-8"
    except ValueError as error:  # not TOML
        return cut(str(error))
    except RecursionError:
        return "is nested too deeply"


def image_of(file: NamedFile) -> JobImage:
    """Return an image as the result file describes it; whether it exists is not known here."""
    width, height = max(file.width, 0), max(file.height, 0)
    return JobImage(
        cut(file.file),
        width=width,
        height=height,
        bytes=file.bytes,
        has_credentials=file.content_credentials,
        problem=cut(file.problem),
    )


def job_of(facts: ResultFile) -> Job:
    """Return a job without its folder, its prompt and its images."""
    times = {name: _seconds(moment) for name, moment in facts.times.items()}
    known = [value for name in ("published", "answered", "sent", "claimed") if (value := times.get(name))]
    asked = {name: value for name, value in facts.request.items() if name not in {"provider", "model", "n"}}
    return Job(
        completed=False,
        name="",
        result_file="",
        at=int(known[0] * 1000) if known else 0,
        seconds=round(max(times.get("answered", 0) - times.get("sent", 0), 0), 1) if "sent" in times else 0,
        job=cut(facts.job),
        charged=facts.charged,
        credits=facts.credits_charged,
        provider=cut(facts.provider or _plain(facts.request.get("provider", ""))),
        model=cut(facts.model or _plain(facts.request.get("model", ""))),
        asked=facts.asked,
        options=cut(", ".join(f"{name} {_plain(value)}" for name, value in asked.items())),
        message=cut(facts.message),
        problems=[cut(problem) for problem in facts.problems[:_MOST_PROBLEMS]],
        status=facts.status,
        code=cut(facts.code),
        needs=facts.credits_required,
        next=cut(facts.next),
    )


def set_prompt(job: Job, text: str) -> None:
    """Give a job its prompt: all of it, as people copy it, unless it is longer than any prompt may be."""
    job.prompt, job.is_cut = text[:MAX_CHARACTERS], len(text) > MAX_CHARACTERS


def _seconds(moment: datetime) -> float:
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _plain(value: object) -> str:
    return value if isinstance(value, str) else shown(value)


def cut(text: str) -> str:
    """Return a text of bounded length."""
    return text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS] + " …"
