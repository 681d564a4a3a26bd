"""``imagewatch gallery``: writes the page, once or whenever something came or went."""

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
    "--output", type=click.Path(), metavar="FILE", help="The page; without it gallery.html beside the outbox."
)
@click.option("--watch", is_flag=True, help="Write it again when something came or went, until stopped.")
def gallery(path: str | None, output: str | None, *, watch: bool) -> None:
    """Write a page of all pictures, costs and failures.

    One HTML file for any browser, without a network. It lies beside the outbox, its thumbnails in gallery_files. Run
    by root, it works with the rights of the owner of the page's folder.
    """

    def tell(written: Written) -> None:
        click.echo(f"Wrote {printable(written.path)}: {written.made} made, {written.failed} failed.")
        for note in written.notes:
            click.echo(f"  {printable(note)}", err=True)

    def count(done: int, total: int) -> None:
        if sys.stderr.isatty():
            click.echo(f"\r  {done} of {total} thumbnails", nl=done == total, err=True)

    page = Gallery(load_config(path), output)
    page.step_down()
    tell(page.write(count))
    if watch:
        with contextlib.suppress(KeyboardInterrupt):
            keep_fresh(page, threading.Event().wait, tell)
