"""Prompts that come again: sync tools bring back what the daemon took away.

What is at the same path with the same size, mtime and content as a job that is over is that job's prompt again, and
not a new wish: whoever wants another variation writes the words anew, or takes the prompt out of ``errors`` or
``archive``, where it got a new mtime.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from imagewatch.protocol.request import contents
from imagewatch.system.untrusted import open_file

if TYPE_CHECKING:
    from imagewatch.journal.ledger import Ledger
    from imagewatch.protocol.request import Opener
    from imagewatch.protocol.values import Claim


def finished_twin(ledger: Ledger, claim: Claim, folder: str, most_bytes: int, opener: Opener = open_file) -> str:
    """Return the id of the job that is over and had the very same files, or an empty string.

    Images may be missing: a tool that brings back one file after the other is not done yet. An image that is
    there and differs makes it a new job.

    Args:
        ledger: The ledger.
        claim: What was claimed.
        folder: Where its originals lie.
        most_bytes: Largest file that is read for its hash.
        opener: Opens the originals.
    """
    known = ledger.finished(claim.job, claim.source, claim.size, claim.mtime_ns)
    if not known:
        return ""
    found = contents(folder, claim.originals, most_bytes, opener)
    for job, recorded in known:
        had = json.loads(recorded)
        if claim.prompt in found and found.items() <= had.items():
            return job
    return ""
