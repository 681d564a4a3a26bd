"""A strict local endpoint with the wire format of the real one, which counts what it "charged".

It is a second, independent reading of the published contract: nothing is shared with the client's side, so
that a misunderstanding on either side shows. Pictures are placeholders, and say so. Prices are made up.

The modules, from the top; each imports only from those below it::

    endpoint     Sandbox: its address and its life
    server       HTTP: framing, the routes, writing an answer well or badly
    service      what each route answers
    tags         misbehaviour on request: "[sandbox: 402]" in a prompt edits the Plan
    plan         what is done with one request, and the answer that comes of it
    books        what was asked and charged, before a byte of the answer is written
    delivery     the image host: signed urls and what they deliver
    replies      answers as values
    contract     a body becomes an Asked, or is refused
    placeholder  draws the pictures
    picture      their bytes

The real endpoint promises nothing for ``Idempotency-Key``, so a repeated key buys again here, too.
"""

from imagewatch.sandbox.contract import (
    BALANCE_ROUTE,
    CREDITS_PER_IMAGE,
    DEFAULT_MODELS,
    DELIVERY,
    MAX_BODY_BYTES,
    OPENAI_CREDITS,
    PROPOSED_KEY,
    REDIRECTED_ROUTE,
    REPORT_ROUTE,
    ROUTE,
)
from imagewatch.sandbox.endpoint import Sandbox
from imagewatch.sandbox.tags import TAGS, Tag, tags_help

__all__ = [
    "BALANCE_ROUTE",
    "CREDITS_PER_IMAGE",
    "DEFAULT_MODELS",
    "DELIVERY",
    "MAX_BODY_BYTES",
    "OPENAI_CREDITS",
    "PROPOSED_KEY",
    "REDIRECTED_ROUTE",
    "REPORT_ROUTE",
    "ROUTE",
    "TAGS",
    "Sandbox",
    "Tag",
    "tags_help",
]
