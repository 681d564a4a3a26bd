"""The command ``submit``: for people at a terminal, and for programs and agents that speak files."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from imagewatch.admin import config_option, load
from imagewatch.errors import BadRequest
from imagewatch.text import amount, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from imagewatch.config import Config
    from imagewatch.sender import Made, Waiting, Wish

EXIT_FAILED = 1
EXIT_USAGE = 64
EXIT_WAITING = 69
_LOOK_SECONDS = 0.2
_UNTOUCHED_SECONDS = 60.0


@click.command()
@click.argument("prompts", nargs=-1, metavar="[PROMPT]…")
@click.option("--image", "images", multiple=True, metavar="FILE", help="An input image; again for more, in this order.")
@click.option("--from", "files", multiple=True, metavar="FILE", help="A file with a prompt; - is standard input.")
@click.option("--provider", type=click.Choice(["auto", "flux", "gemini", "openai"]), help="Whom to ask.")
@click.option("--model", metavar="NAME", help="The model; passed on as it is.")
@click.option("-n", "n", type=click.IntRange(1, 4), metavar="NUMBER", help="Pictures, 1 to 4.")
@click.option("--size", metavar="SIZE", help="Width and height, such as 1024x1536.")
@click.option("--quality", type=click.Choice(["low", "medium", "high", "auto"]), help="For openai.")
@click.option("--output-format", type=click.Choice(["png", "jpeg", "webp"]), help="Kind of the pictures.")
@click.option("--seed", type=int, metavar="NUMBER", help="The same number may give the same picture again.")
@click.option("--preset", metavar="NAME", help="A preset of the configuration.")
@click.option("--folder", default="", metavar="NAME", help="A folder below the inbox.")
@click.option("--name", metavar="NAME", help="Name of the results. Without it: the first words and some digits.")
@click.option("--root", metavar="FOLDER", help="The watched folder, where there is no configuration: a share.")
@click.option("--wait", is_flag=True, help="Wait for the result and print it.")
@click.option("--timeout", type=float, metavar="SECONDS", help="Wait for so long at most; the prompts stay.")
@click.option(
    "--format", "form", type=click.Choice(["paths", "markdown", "json"]), default="paths", help="What --wait prints."
)
@config_option
def submit(prompts: Sequence[str], path: str | None, **options: Any) -> None:  # noqa: ANN401  click's own
    """Drop prompts into the inbox, the right way.

    PROMPT is the text. Images and prompt are checked, copied and put into the inbox in the right order; the key is not
    needed. With --wait the pictures are printed (as paths, Markdown image lines or JSON), and the credits.
    """
    config = _config(path, options.pop("root"))
    jobs = _dropped(prompts, options, config)
    if not options["wait"]:
        for job in jobs:
            click.echo(printable(os.path.join(config.folders.inbox, job.source)))
        return
    left = _waited(jobs, config, options["timeout"])
    _print(jobs, options["form"])
    _tell(jobs, left, config)
    if any(job.door == "errors" for job in jobs):
        sys.exit(EXIT_FAILED)
    sys.exit(EXIT_WAITING if left else 0)


def _config(path: str | None, root: str | None) -> Config:
    if root is None:
        return load(path)
    from imagewatch.config import load as read  # noqa: PLC0415

    own = {name: value for name, value in os.environ.items() if not name.startswith("IMAGEWATCH_")}
    return read(None, {**own, "IMAGEWATCH_FOLDERS__ROOT": os.path.abspath(root)})


def _dropped(prompts: Sequence[str], options: dict[str, Any], config: Config) -> list[Made]:
    from imagewatch.sender import deliver, stem_for  # noqa: PLC0415

    jobs = []
    try:
        wishes = _wishes(prompts, options)
        folder = _folder(options["folder"])
        for number, wish in enumerate(wishes, 1):
            name = options["name"]
            stem = stem_for(wish.text) if name is None else _stem(name, number, len(wishes))
            jobs.append(deliver(wish, config, folder, stem))
    except BadRequest as error:
        for problem in error.problems:
            click.echo(f"imagewatch: {printable(str(problem))}", err=True)
        told = f"{len(jobs)} prompts before it were dropped." if jobs else "Nothing was dropped."
        click.echo(f"  {told}", err=True)
        sys.exit(EXIT_USAGE)
    return jobs


def _wishes(prompts: Sequence[str], options: dict[str, Any]) -> list[Wish]:
    from imagewatch.prompt import MAX_BYTES  # noqa: PLC0415
    from imagewatch.sender import Wish  # noqa: PLC0415

    names = ("provider", "model", "n", "size", "quality", "output_format", "seed", "preset")
    asked = {name: options[name] for name in names}
    images = tuple(options["images"])
    wishes = [Wish(text.strip(), asked, images) for text in prompts]
    for file in options["files"] or (() if prompts else ("-",)):
        if file == "-" and sys.stdin.isatty() and not options["files"]:
            raise click.UsageError("say what the picture should show")
        try:
            with click.open_file(file, "rb") as stream:
                raw = stream.read(MAX_BYTES + 1)
        except OSError as error:
            raise click.UsageError(f"{file}: {error.strerror}") from None
        wishes.append(Wish.of_file(raw, asked, images, os.path.dirname(os.path.abspath(file))))
    return wishes


def _folder(name: str) -> str:
    parts = [part for part in name.split("/") if part]
    if any(part.startswith((".", "~", "#")) for part in parts):
        raise click.UsageError(f"--folder {name}: hidden folders are not looked into")
    return "/".join(parts)


def _stem(name: str, number: int, count: int) -> str:
    if "/" in name or name[:1] in {"", ".", "~", "#"}:
        raise click.UsageError(f"--name {name}: not the name of a prompt")
    return name if count == 1 else f"{name}-{number}"


def _waited(jobs: Sequence[Made], config: Config, timeout: float | None) -> list[Made]:
    """Wait until all is over; return what is not."""
    from imagewatch.sender import Waiting  # noqa: PLC0415

    waiting, began, wait = Waiting(config.folders, jobs), time.monotonic(), threading.Event().wait
    warned = False
    while left := waiting.look():
        passed = time.monotonic() - began
        if timeout is not None and passed >= timeout:
            break
        _live(len(jobs) - len(left), len(jobs), passed)
        if not warned and passed > _UNTOUCHED_SECONDS and waiting.untouched():
            warned = True
            _clear()
            _warn(waiting, config)
        wait(_LOOK_SECONDS)
    _clear()
    return left


def _live(done: int, count: int, passed: float) -> None:
    if sys.stderr.isatty():
        click.echo(f"\r{done} of {count} done, {passed:.0f} s \033[K", nl=False, err=True)


def _clear() -> None:
    if sys.stderr.isatty():
        click.echo("\r\033[K", nl=False, err=True)


def _warn(waiting: Waiting, config: Config) -> None:
    count = waiting.untouched()
    click.echo(
        f"{count} of them still in {printable(config.folders.inbox)}: is the daemon running, or held? "
        '"imagewatch status" tells.',
        err=True,
    )


def _print(jobs: Sequence[Made], form: str) -> None:
    if form == "json":
        click.echo(json.dumps([_plain(job) for job in jobs], indent=1))
        return
    for job in jobs:
        for image in job.images:
            click.echo(_markdown(job, image) if form == "markdown" else printable(image))


def _plain(job: Made) -> dict[str, Any]:
    told = ("charged", "credits_charged", "provider", "model", "message", "next", "job")
    return {
        "source": job.source,
        "prompt": job.prompt,
        "door": job.door or None,
        "document": job.document or None,
        "images": job.images,
        **{name: job.facts.get(name) for name in told},
    }


def _markdown(job: Made, image: str) -> str:
    """Return an image line with a relative path, as chat windows and agents show it."""
    said = printable(" ".join(job.prompt.split()), 200)
    alt = "".join(f"\\{letter}" if letter in "\\[]*_`<>" else letter for letter in said)
    return f"![{alt}]({quote(os.path.relpath(image))})"


def _tell(jobs: Sequence[Made], left: Sequence[Made], config: Config) -> None:
    """Say on the other channel what it cost, and what went wrong."""
    for job in jobs:
        if job.door == "errors":
            click.echo(f"{printable(job.source)}: {printable(str(job.facts.get('message', '')))}", err=True)
            click.echo(f"  {printable(str(job.facts.get('next', '')))}", err=True)
        elif problems := job.facts.get("problems"):
            click.echo(f"{printable(job.source)}: {printable('; '.join(map(str, problems)))}", err=True)
    pictures, spent = sum(len(job.images) for job in jobs), sum(_credits(job) for job in jobs)
    click.echo(f"{pictures} {'picture' if pictures == 1 else 'pictures'}, {amount(spent)} credits.", err=True)
    if left:
        where = printable(config.folders.inbox)
        click.echo(
            f"{len(left)} not done yet; they go on without you, as long as nobody removes them from {where}.", err=True
        )


def _credits(job: Made) -> float:
    value = job.facts.get("credits_charged")
    return float(value) if isinstance(value, int | float) else 0.0
