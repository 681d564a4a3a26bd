"""``imagewatch demo``: six prompts through the real daemon, on the local endpoint."""

from __future__ import annotations

import os
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from PIL import Image, ImageDraw, ImageFont

from imagewatch.commands.progress import progress
from imagewatch.config.load import load
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
    "logo-ideas": "four images in one request",
    "poster": "with options",
    "typo": "mistakes in the options, so no request was sent",
    "too-expensive": "the account has too few credits",
}
_IMAGES = {"postcard.png": ("harbour", (58, 110, 150)), "postcard.1.png": ("boat", (170, 80, 50))}


@click.command()
@click.argument("folder", default="imagewatch-demo", type=click.Path(file_okay=False))
def demo(folder: str) -> None:
    """Show everything on a local endpoint: no key, no cost.

    Creates FOLDER (default: imagewatch-demo; if it exists, a number is added to the name), drops six prompts into its
    inbox and runs the daemon on them. No data leaves this machine.
    """
    with progress(shown=sys.stderr.isatty()) as bar:
        lines = _play(folder, on_outcome=bar.finished, on_found=bar.found)
    for line in lines:
        click.echo(line)


def _play(folder: str, *, on_outcome: Callable[[Outcome], None], on_found: Callable[[int], None]) -> list[str]:
    """Create the folders, drop the prompts and run the daemon; return what to print.

    Args:
        folder: The folder to create; if it exists, a number is added to its name.
        on_outcome: Called for each job that has ended.
        on_found: Called with the number of prompts that wait.

    Raises:
        SpoolError: The folder cannot be created.
    """
    from imagewatch.daemon.loop import Daemon  # noqa: PLC0415  loads the HTTP library, which --help does not need

    folder = _fresh(folder)
    with Sandbox(latency_seconds=0.8) as sandbox:
        environ = {
            "LETTA_BASE_URL": sandbox.base_url,
            "LETTA_API_KEY": PROPOSED_KEY,
            "IMAGEWATCH_FOLDERS__ROOT": folder,
            "IMAGEWATCH_FOLDERS__STATE": os.path.join(folder, "state"),
            "IMAGEWATCH_INBOX__SETTLE_SECONDS": "0.5",
            # All at the same time, so that the hold of the last prompt does not delay the others.
            "IMAGEWATCH_LIMITS__CONCURRENCY": str(len(_PROMPTS)),
            "IMAGEWATCH_LIMITS__MIN_FREE_BYTES": "1000000",
        }
        config = load(None, environ)
        _drop(config.folders.inbox)
        log.configure("error", "auto")
        daemon = Daemon(config, environ, once=True, on_outcome=on_outcome, on_found=on_found)
        daemon.run()
        report = sandbox.report()
    return _summary(folder, Gallery(config).write().path, report, daemon.hold)


def _fresh(folder: str) -> str:
    """Create a folder that did not exist."""
    for number in range(1, 1000):
        path = os.path.abspath(folder if number == 1 else f"{folder}-{number}")
        try:
            os.makedirs(path)
        except FileExistsError:
            continue
        except OSError as error:
            message = f"cannot create the folder: {error.strerror}: {printable(path)}"
            raise SpoolError(message, hint="choose another folder") from None
        return path
    raise SpoolError(f"there are too many such folders: {printable(folder)}", hint="remove old ones")


def _drop(inbox: str) -> None:
    """Drop the prompts, images first, as a careful sender does."""
    os.makedirs(inbox)
    for name, (word, color) in _IMAGES.items():
        image = Image.new("RGB", (320, 240), color)
        ImageDraw.Draw(image).text((160, 120), word, anchor="mm", font=ImageFont.load_default(40), fill="white")
        image.save(os.path.join(inbox, name))
    for stem, text in _PROMPTS.items():
        with open(os.path.join(inbox, f"{stem}.prompt.txt"), "w", encoding="utf-8") as file:
            file.write(text)


def _summary(folder: str, page: str, report: dict[str, Any], hold: Hold | None) -> list[str]:
    """Return the lines to print: the results, where they are, and what they cost."""
    lines = ["", click.style("Results of the six prompts", bold=True), ""]
    credits_spent = 0.0
    for stem in _PROMPTS:
        found = _facts(folder, stem)
        credits_spent += found.get("credits_charged") or 0
        lines += _paragraph(stem, found)
    counted, charged = report["credits"], report["charged"]
    lines += [
        "",
        f"Receipts: {amount(credits_spent)} credits. The endpoint counted {amount(counted)} for {charged} requests.",
        "No key was used, no data left this machine, and the images are placeholders.",
        "",
        f"  images and receipts    {os.path.join(folder, 'outbox')}",
        f"  failed, with reasons   {os.path.join(folder, 'errors')}",
        f"  completed prompts      {os.path.join(folder, 'archive')}",
        f"  all of it in a browser {Path(page).as_uri()}",
    ]
    if hold:
        lines += [
            "",
            f"The queue is now on hold ({hold.kind}): {printable(hold.reason.message)}.",
            "New prompts would wait in the inbox, and cost nothing.",
        ]
    lines += [
        "",
        "To start for real: imagewatch init --root FOLDER, export LETTA_API_KEY=…, imagewatch check, imagewatch run.",
        "",
    ]
    return lines


def _paragraph(stem: str, found: dict[str, Any]) -> list[str]:
    title = f"  {click.style(f'{stem:<15}', bold=True)}{_EXPLAINED[stem]}"
    if found["destination"] == "errors":
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


def _facts(folder: str, stem: str) -> dict[str, Any]:
    for destination, ending in (("outbox", "receipt"), ("errors", "error")):
        path = os.path.join(folder, destination, f"{stem}.{ending}.toml")
        if os.path.exists(path):
            with open(path, "rb") as file:
                return {**tomllib.load(file), "destination": destination}
    raise SpoolError(f"there is no receipt or error file: {stem}", hint="report this error")
