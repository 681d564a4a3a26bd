"""A strict local endpoint with the wire format of the real one, which counts what it "charged".

It is a second, independent implementation of the published contract. It shares no code with ``endpoint/``, so that
a mistake on one side makes a test fail. Images are placeholders and are marked as such. Prices are made up.

The modules, from the top; each imports only from those below it::

    endpoint     Sandbox: binds an address, serves it and stops
    server       HTTP: framing, the routes, writing a response correctly or not
    service      the response of each route
    tags         faults on request: "[sandbox: 402]" in a prompt edits the Plan
    plan         what is done with one request, and its response
    books        what was requested and charged, recorded before a byte of the response is written
    delivery     the image host: signed URLs and what they return
    replies      responses as values
    contract     checks a body and returns an Asked
    placeholder  draws the images
    image        the bytes of an image

The real endpoint promises nothing for ``Idempotency-Key``. So a request with a repeated key is charged here, too.
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
