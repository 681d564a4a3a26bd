"""``imagewatch gallery``: writes the page, once or whenever files or the status change."""

from __future__ import annotations

import contextlib
import sys
import threading

import click

from imagewatch.commands.common import config_option, load_config
from imagewatch.gallery import Gallery, Written, keep_fresh
from imagewatch.system.text import printable


@click.command()
@config_option
@click.option(
    "--output", type=click.Path(), metavar="FILE", help="Path of the page; without it: gallery.html beside the outbox"
)
@click.option("--watch", is_flag=True, help="Write the page again when files or the status change, until stopped")
def gallery(path: str | None, output: str | None, *, watch: bool) -> None:
    """Write a web page of all images, costs and failures.

    At its top are holds and what waits in the inbox. The page is one HTML file for any browser, and needs no network.
    It is beside the outbox. Its thumbnails are in a folder beside the page: gallery_files, or with --output NAME.html
    NAME_files. If root runs the command, it works with the rights of the owner of the page's folder.
    """

    def report(written: Written) -> None:
        click.echo(f"Wrote {printable(written.path)}: {written.completed} completed, {written.failed} failed.")
        for note in written.notes:
            click.echo(f"  {printable(note)}", err=True)

    def count(done: int, total: int) -> None:
        if sys.stderr.isatty():
            click.echo(f"\r  {done} of {total} thumbnails", nl=done == total, err=True)

    page = Gallery(load_config(path), output)
    page.step_down()
    report(page.write(count))
    if watch:
        with contextlib.suppress(KeyboardInterrupt):
            keep_fresh(page, threading.Event().wait, report)
