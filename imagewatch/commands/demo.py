"""``imagewatch demo``: six telling prompts through the real daemon, on the local endpoint."""

from __future__ import annotations

import os
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from PIL import Image, ImageDraw, ImageFont

from imagewatch.commands.progress import progress
from imagewatch.config.load import load
from imagewatch.daemon.loop import Daemon
from imagewatch.gallery import Gallery
from imagewatch.sandbox import PROPOSED_KEY, Sandbox
from imagewatch.system import log
from imagewatch.system.errors import SpoolError
from imagewatch.system.text import amount, printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from imagewatch.job.outcome import Outcome
    from imagewatch.journal.holds import Hold

_PROMPTS = {
    "lighthouse": "A lighthouse on a cliff at dusk, long exposure, calm sea\n",
    "postcard": "Put the boat into the harbour, evening light, like an old postcard\n",
    "logo-ideas": '+++\nprovider = "gemini"\nn = 4\n+++\nA friendly robot mascot, waving, flat vector logo, mint\n',
    "poster": (
        '+++\nprovider = "openai"\nsize = "1024x1536"\nquality = "high"\noutput_format = "webp"\n+++\n'
        "A poster for a chamber music festival in a railway station\n"
    ),
    "typo": '+++\nqualtiy = "high"\nn = 9\n+++\nThis one has two mistakes in its front matter\n',
    "too-expensive": "[sandbox: 402] A cathedral of glass, in the highest quality there is\n",
}
_EXPLAINED = {
    "lighthouse": "text only",
    "postcard": "an edit of two images",
    "logo-ideas": "four at once",
    "poster": "with options",
    "typo": "mistakes, so no call was made",
    "too-expensive": "the account has no credits left",
}
_PICTURES = {"postcard.png": ("harbour", (58, 110, 150)), "postcard.1.png": ("boat", (170, 80, 50))}


@click.command()
@click.argument("folder", default="imagewatch-demo", type=click.Path(file_okay=False))
def demo(folder: str) -> None:
    """Show everything at once on a local endpoint: no key, no cost.

    Makes FOLDER (default: imagewatch-demo; a number is added if it is there), drops six prompts into its inbox and
    runs the real daemon on them. Nothing leaves this machine.
    """
    with progress(shown=sys.stderr.isatty()) as bar:
        story = _play(folder, on_outcome=bar.finished, on_seen=bar.found)
    for line in story.lines:
        click.echo(line)


@dataclass
class Story:
    """What the demo showed.

    Attributes:
        folder: Where everything is.
        lines: What to print.
        report: What the endpoint counted.
    """

    folder: str
    lines: list[str] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)


def _play(folder: str, *, on_outcome: Callable[[Outcome], None], on_seen: Callable[[int], None]) -> Story:
    """Make the folders, drop the prompts, run the daemon.

    Args:
        folder: Where to; if it exists, a number is appended.
        on_outcome: Called for each finished job.
        on_seen: Called with the number of prompts that wait.

    Raises:
        SpoolError: The folder cannot be made.
    """
    story = Story(_fresh(folder))
    with Sandbox(latency_seconds=0.8) as sandbox:
        environ = {
            "LETTA_BASE_URL": sandbox.base_url,
            "LETTA_API_KEY": PROPOSED_KEY,
            "IMAGEWATCH_FOLDERS__ROOT": story.folder,
            "IMAGEWATCH_FOLDERS__STATE": os.path.join(story.folder, "state"),
            "IMAGEWATCH_INBOX__SETTLE_SECONDS": "0.5",
            "IMAGEWATCH_LIMITS__CONCURRENCY": str(len(_PROMPTS)),  # all at once: the refusal holds nobody up
            "IMAGEWATCH_LIMITS__MIN_FREE_BYTES": "1000000",
        }
        config = load(None, environ)
        _drop(config.folders.inbox)
        log.configure("error", "auto")
        daemon = Daemon(config, environ, once=True, on_outcome=on_outcome, on_seen=on_seen)
        daemon.run()
        story.report = sandbox.report()
    page = Gallery(config).write().path
    story.lines = _told(story, page, daemon.hold)
    return story


def _fresh(folder: str) -> str:
    """Make a folder that was not there."""
    for number in range(1, 1000):
        path = os.path.abspath(folder if number == 1 else f"{folder}-{number}")
        try:
            os.makedirs(path)
        except FileExistsError:
            continue
        except OSError as error:
            raise SpoolError(
                f"{printable(path)}: cannot be made: {error.strerror}", hint="name another folder"
            ) from None
        return path
    raise SpoolError(f"{printable(folder)}: there are too many of them", hint="remove old demos")


def _drop(inbox: str) -> None:
    """Drop the prompts, images first, as a careful sender does."""
    os.makedirs(inbox)
    for name, (word, colour) in _PICTURES.items():
        picture = Image.new("RGB", (320, 240), colour)
        ImageDraw.Draw(picture).text((160, 120), word, anchor="mm", font=ImageFont.load_default(40), fill="white")
        picture.save(os.path.join(inbox, name))
    for stem, text in _PROMPTS.items():
        with open(os.path.join(inbox, f"{stem}.prompt.txt"), "w", encoding="utf-8") as file:
            file.write(text)


def _told(story: Story, page: str, hold: Hold | None) -> list[str]:
    """Return the end of the story: what is where, and what it cost."""
    lines = ["", click.style("What became of the six prompts", bold=True), ""]
    credits_spent = 0.0
    for stem in _PROMPTS:
        found = _document(story.folder, stem)
        credits_spent += found.get("credits_charged") or 0
        lines += _paragraph(stem, found)
    counted = story.report["credits"]
    charged = story.report["charged"]
    lines += [
        "",
        f"Receipts say {amount(credits_spent)} credits; the endpoint counted {amount(counted)} for {charged} requests.",
        "No key was used, nothing left this machine, the pictures are placeholders.",
        "",
        f"  pictures and receipts  {os.path.join(story.folder, 'outbox')}",
        f"  refused, with reasons  {os.path.join(story.folder, 'errors')}",
        f"  prompts that were done {os.path.join(story.folder, 'archive')}",
        f"  all of it to look at   {Path(page).as_uri()}",
    ]
    if hold:
        lines += [
            "",
            f"The queue is now held ({hold.kind}): {printable(hold.reason.message)}.",
            "New prompts would wait in the inbox, unpaid.",
        ]
    lines += [
        "",
        "For real: imagewatch init --root FOLDER, export LETTA_API_KEY=…, imagewatch check, imagewatch run.",
        "",
    ]
    return lines


def _paragraph(stem: str, found: dict[str, Any]) -> list[str]:
    title = f"  {click.style(f'{stem:<15}', bold=True)}{_EXPLAINED[stem]}"
    if found["door"] == "errors":
        reasons = found.get("problems") or [found["message"]]
        return [title, *(click.style(f"    ✗ {printable(reason)}", fg="red") for reason in reasons)]
    return [
        title,
        *(
            f"    {click.style('✓', fg='green')} outbox/{image['file']}  {image['width']} x {image['height']}"
            for image in found["images"]
        ),
        f"      {found['provider']}, {found['model']}, {found['credits_charged']} credits",
    ]


def _document(folder: str, stem: str) -> dict[str, Any]:
    for door, ending in (("outbox", "receipt"), ("errors", "error")):
        path = os.path.join(folder, door, f"{stem}.{ending}.toml")
        if os.path.exists(path):
            with open(path, "rb") as file:
                return {**tomllib.load(file), "door": door}
    raise SpoolError(f"{stem}: neither receipt nor error file appeared", hint="please report this")
