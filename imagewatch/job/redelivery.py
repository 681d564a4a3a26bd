"""Redelivery: a sync tool delivers a finished prompt again.

A file with the same path, size, mtime and content as the prompt of a finished job is that prompt, and not a new
request. For a new request the sender saves the prompt again, or moves it out of ``errors`` or ``archive``, where it got
a new mtime.
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
    """Return the id of the finished job that had the same files, or an empty string.

    Images may be missing: a tool that delivers one file after the other is not done yet. An image that is there and
    differs makes it a new job.

    Args:
        ledger: The ledger.
        claim: What was claimed.
        folder: The folder of its originals.
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
