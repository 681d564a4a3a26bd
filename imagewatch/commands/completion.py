"""``imagewatch completion``: what a shell needs to complete commands and options."""

from __future__ import annotations

import click

from imagewatch.system.bundled import read

_FILES = {
    "bash": "completions/imagewatch.bash",
    "fish": "completions/imagewatch.fish",
    "zsh": "completions/_imagewatch",
}


@click.command()
@click.argument("shell", type=click.Choice(sorted(_FILES)))
def completion(shell: str) -> None:
    """Print the completion script of a shell.

    SHELL is bash, fish or zsh. bash finds it as ~/.local/share/bash-completion/completions/imagewatch, fish as
    ~/.config/fish/completions/imagewatch.fish, and zsh as _imagewatch in a folder of $fpath.
    """
    click.echo(read(_FILES[shell]), nl=False)
