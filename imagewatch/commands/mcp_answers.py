"""What the tools of ``imagewatch mcp`` answer about a job and about the queue, as values for JSON.

All that comes from the folders may have been written by others: texts are bounded and printable, lists are short.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from imagewatch.commands.queue_state import SILENT
from imagewatch.gallery.decoder import Decoder, NoThumbnail, Patience
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from imagewatch.commands.named_jobs import Job, NamedJobs
    from imagewatch.protocol.notice import Notice

_MOST_FILES = 20
_MOST_TEXT = 500
_MOST_PIXELS = 20_000_000
_PATIENCE = Patience(processor=5.0, clock=7.0)
"""For one preview."""
_PREVIEWS_SECONDS = 7.0
"""After this time no further preview is begun."""
_MOST_PREVIEWS = 4
_MESSAGES = {
    "waiting": "The request waits in the queue. It continues without you: ask again with get_image and the same name.",
    "in_progress": "The request is in progress. It continues without you: ask again with get_image and the same name.",
    "completed": "The images are ready. Show them to the user by their paths.",
    "canceled": "The request was canceled. Nothing was charged. A new request needs a new name.",
    "not_dropped": "The request was interrupted before it was dropped; nothing was charged. Call create_image again "
    "with the same arguments.",
    "results_moved": "The request was completed earlier. Its results were moved or removed. Do not create it again "
    "unless the user asks for another image.",
    "missing": "The request was dropped earlier, and is in none of the folders now. It may have been charged: ask the "
    "user before you create it again.",
    "unknown": "There is no request of this name. Check the name; create_image makes a new request.",
}
_STOPPED = (
    "The request is kept, and nothing is sent at the moment: report the reason in queue to the user. It continues "
    "automatically later. Do not create it again; ask with get_image and the same name if the user asks for it."
)
_FAILED = {
    "no": "The request failed and nothing was charged. If the cause is in the prompt or its images, fix it and create "
    "it under a new name, once. Else report the error to the user.",
    "unknown": "The request failed and may have been charged. Do not create it again: ask the user first.",
    "yes": "The request was charged, but the response holds no readable image. Report it. Do not create it again.",
}


class Answers:
    """Answers about jobs.

    Args:
        jobs: The jobs.
    """

    def __init__(self, jobs: NamedJobs) -> None:
        self._jobs = jobs

    def job(self, job: Job, *, cost: bool = False) -> dict[str, Any]:
        """Return name, state, what to do next, and what is in the result file.

        Args:
            job: The job.
            cost: Whether the credits are asked for.
        """
        answer: dict[str, Any] = {"name": job.name, "state": job.state}
        if job.state == "failed":
            charged = str(job.facts.get("charged"))
            answer["message"] = _FAILED.get(charged, _FAILED["unknown"])
            answer["charged"] = charged if charged in _FAILED else "unknown"
            answer["error"] = _text(job.facts.get("message"))
            answer["next"] = _text(job.facts.get("next"))
            answer["problems"] = _texts(job.facts.get("problems"))
        else:
            answer["message"] = _MESSAGES[job.state]
        if job.state == "completed":
            answer["images"] = [printable(path) for path in job.images]
            answer["asked"], answer["got"] = _number(job.facts.get("asked")), _number(job.facts.get("got"))
            answer["problems"] = _texts(job.facts.get("problems"))
        if job.result_file:
            answer["result_file"] = printable(job.result_file)
        if cost and job.result_file:
            answer["credits_charged"] = _number(job.facts.get("credits_charged"))
        if not job.is_over:
            answer["queue"] = self.queue(job)
            if answer["queue"]["state"] in {"on_hold", "not_running"}:
                answer["message"] = _STOPPED
        return answer

    def queue(self, job: Job | None = None) -> dict[str, Any]:
        """Return whether the daemon runs, why prompts are not sent, and which prompts wait.

        Args:
            job: A job that is not over, if it is about one.
        """
        found = self._jobs.last_status()
        if found is None:
            return {"state": "unknown", "message": "There is no status file. Ask the user to run: imagewatch status"}
        if found.state == "stopped" or found.is_overdue(time.time()):
            return {"state": "not_running", "message": "The daemon is not running; prompts wait until it is started."}
        if job and self._jobs.is_silent(job, found):
            message = f"{SILENT[0].upper()}{SILENT[1:]}. Ask the user to check it."
            return _queue(found) | {"state": "not_running", "message": message}
        return _queue(found)

    def previews(self, job: Job) -> list[bytes]:
        """Return a small WebP of each image that can be decoded in a short time."""
        made: list[bytes] = []
        began = time.monotonic()
        decoder = Decoder(_PATIENCE)
        try:
            for path in job.images[:_MOST_PREVIEWS]:
                if time.monotonic() - began > _PREVIEWS_SECONDS:
                    break
                try:
                    with self._jobs.open_image(path) as file:
                        made.append(decoder.shrink(file, _MOST_PIXELS))
                except (OSError, NoThumbnail):
                    continue  # its path is in the answer anyway
        finally:
            decoder.close()
        return made


def _queue(found: Notice) -> dict[str, Any]:
    holds = [
        {
            "kind": hold.kind,
            "provider": hold.provider,
            "folder": hold.folder,
            "message": hold.message,
            "next": hold.next,
            "next_try_at": hold.next_try_at.isoformat() if hold.next_try_at else None,
        }
        for hold in found.holds[:_MOST_FILES]
    ]
    waiting = [{"name": one.name, "why": one.why, "message": one.message} for one in found.waiting.files[:_MOST_FILES]]
    return {
        "state": found.state,
        "message": "Nothing is sent at the moment." if found.state == "on_hold" else "The daemon is running.",
        "holds": holds,
        "waiting": found.waiting.count,
        "first_waiting": waiting,
        "in_flight": found.in_flight.count,
    }


def _text(value: object) -> str:
    return printable(value, _MOST_TEXT) if isinstance(value, str) else ""


def _texts(value: object) -> list[str]:
    return [_text(str(one)) for one in value[:_MOST_FILES]] if isinstance(value, list) else []


def _number(value: object) -> int | float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
