"""Write the manual page from the help texts of the commands: ``python man/make.py > man/imagewatch.1``."""

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

COMMON = "Every command that uses the folders has the first option; every command has the second."
CONFIG = next(part for part in load_command("run").params if isinstance(part, click.Option))
HELP = click.Option(["-h", "--help"], is_flag=True, help="Print the help text of the command and exit.")

FOOT = r"""
.SH FILES
.TP
.I ./imagewatch.toml, ~/.config/imagewatch/config.toml, /etc/imagewatch/config.toml
The configuration: the first of these that exists, unless
.B \-\-config
or
.B IMAGEWATCH_CONFIG
names another. The one in the current folder is used only if it and the folder belong to you or root
and no other user may write them.
.B imagewatch init
creates one with every key and its default.
.TP
.I ROOT/inbox/NAME.prompt.txt
A prompt. Its images are in the same folder.
.TP
.I ROOT/outbox/NAME.receipt.toml
The receipt. It appears last, after the images of the same name.
.TP
.I ROOT/errors/NAME.error.toml
What is wrong, whether it was charged, and what to do next. It appears last, after the files that were dropped.
.TP
.I ROOT/archive
Completed prompts and their images.
.TP
.I ~/.local/state/imagewatch
The ledger with the records of all jobs, and saved responses; private. A service uses
.BR $STATE_DIRECTORY .
.SH ENVIRONMENT
.TP
.B LETTA_API_KEY
The API key, unless the configuration names a file or a command, or systemd gives the credential
.BR letta_api_key .
.TP
.B CREDENTIALS_DIRECTORY
The folder of systemd's credentials, such as
.BR letta_api_key .
.TP
.B LETTA_BASE_URL
The URL of the API, unless the configuration names one.
.TP
.B IMAGEWATCH_CONFIG
The configuration file.
.TP
.B IMAGEWATCH_SECTION__KEY
Any key of the configuration, such as
.BR IMAGEWATCH_FOLDERS__ROOT .
Those of a preset are
.BR IMAGEWATCH_PRESETS__NAME__KEY .
.SH EXAMPLES
.TP
Try everything, without a key and at no cost:
.B imagewatch demo
.TP
Create an image and print its path:
.B imagewatch submit \-\-wait \(dqA lighthouse at dusk\(dq
.TP
Edit two images, with a daemon on another machine and the folder on a share:
.B imagewatch submit \-\-root /mnt/pictures \-\-image boat.png \-\-image harbour.jpg \(dqThe boat in the harbour\(dq
.SH SEE ALSO
.BR inotifywait (1),
.BR rsync (1),
.BR systemd.service (5)
"""


def escaped(text: str) -> str:
    """Return text in which troff finds no request."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace('"', "\\(dq")
    return re.sub(r"^([.'])", r"\\&\1", text, flags=re.MULTILINE)


def paragraphs(text: str) -> Iterator[str]:
    """Yield the paragraphs of a help text."""
    for number, part in enumerate(text.partition("\f")[0].strip().split("\n\n")):
        if number:
            yield ".PP"
        yield escaped(" ".join(part.split()))


def option(one: click.Option) -> Iterator[str]:
    """Yield the entry of an option."""
    names = ", ".join(f"\\fB{escaped(name)}\\fR" for name in (*one.opts, *one.secondary_opts))
    value = one.metavar or ("|".join(map(str, one.type.choices)) if isinstance(one.type, click.Choice) else "")
    yield ".TP"
    yield names if one.is_flag else f"{names} \\fI{escaped(value)}\\fR"
    default = f" [default: {one.default}]" if one.show_default else ""
    yield escaped(f"{one.help}{default}")


def _argument(part: click.Argument) -> str:
    name = str(part.name).upper()
    return name if part.required else f"[{name}]"


def command(name: str, one: click.Command) -> Iterator[str]:
    """Yield the section of a command."""
    given = (part for part in one.params if isinstance(part, click.Argument))
    arguments = [part.metavar or _argument(part) for part in given]
    yield f'.SS "{escaped(" ".join(["imagewatch", name, "[OPTIONS]", *arguments]))}"'
    yield from paragraphs(one.help or "")
    for part in one.params:
        if isinstance(part, click.Option) and part.name != CONFIG.name:
            yield from option(part)
    if isinstance(one, click.Group):
        for inner in sorted(one.commands):
            yield from command(f"{name} {inner}", one.commands[inner])


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
