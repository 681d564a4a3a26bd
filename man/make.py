"""Write the manual page: ``python man/make.py > man/imagewatch.1``. The commands' own words."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

import click

from imagewatch.commands.main import COMMANDS, cli, load_command

if TYPE_CHECKING:
    from collections.abc import Iterator

HEAD = r"""
.\" Written by man/make.py from the commands themselves.
.TH IMAGEWATCH 1 "" "imagewatch" "User Commands"
.SH NAME
imagewatch \- a watched folder for paid image generation
.SH SYNOPSIS
.B imagewatch
.I COMMAND
[\fIOPTIONS\fR]\ .\|.\|.
"""

COMMON = "Every command that looks at the folders takes the first, every command the second."
CONFIG = next(part for part in load_command("run").params if isinstance(part, click.Option))
HELP = click.Option(["-h", "--help"], is_flag=True, help="Say what the command does and what it takes, and end.")

FOOT = r"""
.SH FILES
.TP
.I ./imagewatch.toml, ~/.config/imagewatch/config.toml, /etc/imagewatch/config.toml
The configuration: the first that is there, unless
.B \-\-config
or
.B IMAGEWATCH_CONFIG
names another. The one in the current folder is used only if it and the folder belong to you or root and nobody else may
write them.
.B imagewatch init
writes one with every key and its default.
.TP
.I ROOT/inbox/NAME.prompt.txt
A prompt. Its images are beside it.
.TP
.I ROOT/outbox/NAME.receipt.toml
The receipt. It appears last, after the pictures of the same name.
.TP
.I ROOT/errors/NAME.error.toml
What went wrong, whether it was charged, and what to do. It appears last, after the files that were dropped.
.TP
.I ROOT/archive
What was dropped for pictures that were made.
.TP
.I ~/.local/state/imagewatch
Evidence of jobs under way, paid answers and the ledger; private.
.B $STATE_DIRECTORY
as a service.
.SH ENVIRONMENT
.TP
.B LETTA_API_KEY
The key, unless the configuration names a file or a command.
.TP
.B LETTA_BASE_URL
The endpoint, unless the configuration names one.
.TP
.B IMAGEWATCH_CONFIG
The configuration file.
.TP
.B IMAGEWATCH_SECTION__KEY
Any key of the configuration, such as
.BR IMAGEWATCH_FOLDERS__ROOT .
.SH EXAMPLES
.TP
See everything, without a key and without cost:
.B imagewatch demo
.TP
Make a picture and print its path:
.B imagewatch submit \-\-wait \(dqA lighthouse at dusk\(dq
.TP
Change two images, with a daemon on another machine and the folder on a share:
.B imagewatch submit \-\-root /mnt/pictures \-\-image boat.png \-\-image harbour.jpg \(dqThe boat in the harbour\(dq
.SH SEE ALSO
.BR inotifywait (1),
.BR rsync (1),
.BR systemd.service (5)
"""


def escaped(text: str) -> str:
    """Return text that is no request of troff."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace('"', "\\(dq")
    return re.sub(r"^([.'])", r"\\&\1", text, flags=re.MULTILINE)


def paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs of a help text."""
    for number, part in enumerate(text.partition("\f")[0].strip().split("\n\n")):
        if number:
            yield ".PP"
        yield escaped(" ".join(part.split()))


def option(one: click.Option) -> Iterator[str]:
    """Yield what is said of an option."""
    names = ", ".join(f"\\fB{escaped(name)}\\fR" for name in (*one.opts, *one.secondary_opts))
    value = one.metavar or ("|".join(map(str, one.type.choices)) if isinstance(one.type, click.Choice) else "")
    yield ".TP"
    yield names if one.is_flag else f"{names} \\fI{escaped(value)}\\fR"
    default = f" [default: {one.default}]" if one.show_default else ""
    yield escaped(f"{one.help}{default}")


def command(name: str, one: click.Command) -> Iterator[str]:
    """Yield the section of a command."""
    given = (part for part in one.params if isinstance(part, click.Argument))
    arguments = [part.metavar or f"[{str(part.name).upper()}]" for part in given]
    yield f'.SS "{escaped(" ".join(["imagewatch", name, "[OPTIONS]", *arguments]))}"'
    yield from paragraphs(one.help or "")
    for part in one.params:
        if isinstance(part, click.Option) and part.name != CONFIG.name:
            yield from option(part)


def page() -> str:
    """Return the whole page."""
    lines = [HEAD.strip(), ".SH DESCRIPTION", *paragraphs(cli.help or ""), ".SH COMMANDS"]
    for name in sorted(COMMANDS):
        lines += command(name, load_command(name))
    lines += [".SH OPTIONS", COMMON, *option(CONFIG), *option(HELP), ".SH EXIT STATUS"]
    codes = re.sub(r"\n {6}", " ", str(cli.epilog))
    for code, words in re.findall(r"^  (\d+) +(.+)$", codes, re.MULTILINE):
        lines += [".TP", code, escaped(words)]
    return "\n".join([*lines, FOOT.strip()]) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
