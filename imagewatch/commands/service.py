"""``imagewatch service``: the systemd units of an installation without a checkout."""

from __future__ import annotations

import difflib
import os
from typing import TYPE_CHECKING

import click

from imagewatch.commands.service_files import ServiceFile, State, system_files, user_file
from imagewatch.commands.service_program import require_usable, this_program
from imagewatch.commands.service_steps import system_steps, user_steps
from imagewatch.commands.terminal import say
from imagewatch.config.locate import xdg
from imagewatch.system.errors import UsageError
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Mapping

_user_option = click.option("--user", "is_user", is_flag=True, help="The service of one person: systemctl --user")
_gallery_option = click.option(
    "--gallery", "has_gallery", is_flag=True, help="Also the units and the user of the gallery"
)
_program_option = click.option(
    "--program", type=click.Path(), metavar="PATH", help="Program that the units start; without it, this installation's"
)


@click.group()
def service() -> None:
    """Install or print the systemd units for this installation.

    "service install" writes them into /etc (as root), or with --user into ~/.config/systemd/user. "service print" shows
    them. To remove the service, disable it and remove the files that "service print" names.
    """


@service.command("print")
@click.argument("file", required=False)
@_user_option
@_gallery_option
@_program_option
def print_files(file: str | None, *, is_user: bool, has_gallery: bool, program: str | None) -> None:
    """Print the units, and the files for the user and the folders.

    With FILE, such as imagewatch.service or tmpfiles.d/imagewatch.conf, only that file is printed.
    """
    used = program or this_program()
    chosen = _files(used, "/", is_user=is_user, has_gallery=has_gallery or bool(file))
    if file is not None:
        found = [one for one in chosen if f"/{one.path}".endswith(f"/{file}")]
        if not found:
            hint = "list them with: imagewatch service print --gallery"
            raise UsageError(f"there is no such file: {printable(file, 100)}", hint=hint)
        click.echo(found[0].text, nl=False)
    else:
        click.echo("\n".join(f"# {printable(one.path)}\n{one.text}" for one in chosen), nl=False)
    _warn(used, is_user=is_user)


@service.command()
@_user_option
@_gallery_option
@_program_option
@click.option(
    "--root", "folder", type=click.Path(), metavar="FOLDER", help="Write below this folder instead of /, for an image"
)
@click.option("--dry-run", is_flag=True, help="Print what would be written, and write nothing")
@click.option("--force", is_flag=True, help="Also replace files that were changed manually")
def install(
    *, is_user: bool, has_gallery: bool, program: str | None, folder: str | None, dry_run: bool, force: bool
) -> None:
    """Write the units, and the files for the user and the folders.

    Then the command prints what to run next. A file that was changed manually is not replaced without --force; put your
    changes into a drop-in (systemctl edit imagewatch). Run the command again after an upgrade.
    """
    root = os.path.abspath(folder or "/")
    if is_user and (folder or has_gallery):
        raise UsageError("--user goes with neither --root nor --gallery", hint="leave one of them out")
    used = program or this_program()
    if folder is None:
        require_usable(used, is_user=is_user)
    chosen = _files(used, root, is_user=is_user, has_gallery=has_gallery)
    _require_no_package(chosen, root)
    states = {one: one.state() for one in chosen}
    if dry_run:
        _show(states)
    _require_unchanged(states, force=force)
    if not dry_run:
        if not is_user and folder is None:
            _require_root(used)
        _write(states, 0o700 if is_user else 0o755)
    _say_next(states, used, root, is_user=is_user)


def _files(program: str, root: str, *, is_user: bool, has_gallery: bool) -> list[ServiceFile]:
    return [user_file(program, _config_home())] if is_user else system_files(program, root, has_gallery=has_gallery)


def _config_home() -> str:
    return xdg(os.environ, "XDG_CONFIG_HOME", "~/.config")


def _require_no_package(chosen: list[ServiceFile], root: str) -> None:
    """Require that the units are not those of a package of the system, which ours would hide."""
    kind = "user" if "/systemd/user/" in chosen[0].path else "system"
    path = os.path.join(root, "usr/lib/systemd", kind, "imagewatch.service")
    if os.path.lexists(path):
        hint = "use it: systemctl enable --now imagewatch; or remove the package first"
        raise UsageError(f"a package has installed the service: {printable(path)}", hint=hint)


def _require_unchanged(states: Mapping[ServiceFile, State], *, force: bool) -> None:
    links = [one.path for one in states if os.path.lexists(one.path) and not _is_plain(one.path)]
    changed = [one.path for one, state in states.items() if state is State.CHANGED]
    if links:
        hint = "nothing was written; remove it (systemctl unmask, if it is a masked unit), then repeat the command"
        raise UsageError(f"is not a plain file: {printable(' '.join(links))}", hint=hint)
    if changed and not force:
        hint = "nothing was written; see the differences with --dry-run, keep your changes in a drop-in, or use --force"
        raise UsageError(f"changed manually, so not replaced: {printable(' '.join(changed))}", hint=hint)


def _is_plain(path: str) -> bool:
    return os.path.isfile(path) and not os.path.islink(path)


def _show(states: Mapping[ServiceFile, State]) -> None:
    """Print what would be written: new files by name, others with their differences."""
    for one, state in states.items():
        click.echo(f"{printable(one.path)}: {state.value}")
        if state in {State.EARLIER, State.CHANGED} and _is_plain(one.path):
            try:
                present = one.present().splitlines()
            except (OSError, UnicodeDecodeError):
                continue
            for line in difflib.unified_diff(present, one.text.splitlines(), "present", "new", lineterm=""):
                click.echo(printable(line))


def _require_root(program: str) -> None:
    if os.geteuid() != 0:
        hint = f"run: sudo {program} service install; for a service of your own, add --user"
        raise UsageError("only root can install a service of the system", hint=hint)


def _write(states: Mapping[ServiceFile, State], folder_mode: int) -> None:
    for one, state in states.items():
        if state is not State.SAME:
            one.write(folder_mode)
        done = {State.MISSING: "wrote", State.SAME: "unchanged"}.get(state, f"replaced ({state.value})")
        click.echo(f"{done}: {printable(one.path)}")


def _say_next(states: Mapping[ServiceFile, State], program: str, root: str, *, is_user: bool) -> None:
    steps = user_steps(states, program, _config_home()) if is_user else system_steps(states, program, root)
    lines = list(steps)
    if not lines:
        click.echo("Nothing else needs to be done.")
        return
    where = "in the system that uses this folder, as root" if root != "/" else "as yourself" if is_user else "as root"
    click.echo(f"Next, run these commands {where}:")
    for line in lines:
        click.echo(f"  {line}")


def _warn(program: str, *, is_user: bool) -> None:
    """Say on standard error that a unit with this program would not work."""
    try:
        require_usable(program, is_user=is_user)
    except UsageError as error:
        say(f"imagewatch: warning: {printable(str(error))}")
        say(f"  {printable(error.hint)}")
