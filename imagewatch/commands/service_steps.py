"""The commands that an administrator runs after the files of a service were written: those that the case needs."""

from __future__ import annotations

import os
import pwd
import shutil
from typing import TYPE_CHECKING, Final

from imagewatch.commands.service_files import State

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from imagewatch.commands.service_files import ServiceFile

_SYSTEM_CONFIG: Final = "/etc/imagewatch/config.toml"
_SYSTEM_KEY: Final = "/etc/imagewatch/letta_api_key"
_GALLERY_FOLDER: Final = "/srv/imagewatch/gallery"
_PASTE: Final = "      # paste the key, Enter, Ctrl-D"


def system_steps(states: Mapping[ServiceFile, State], program: str, root: str) -> Iterator[str]:
    """Yield the commands for a system service.

    Args:
        states: What was there before the files were written.
        program: What the units start.
        root: The folder in the place of ``/``: the commands are for the system that will use it.
    """
    name, is_here = _name(program), root == "/"
    new = {os.path.basename(one.path) for one, state in states.items() if state is not State.SAME}
    has_gallery = any("gallery" in one.path for one in states)
    for user in ("imagewatch", *(["imagewatch-gallery"] if has_gallery else [])):
        if not is_here or f"{user}.conf" in new or not _is_user(user):
            yield f"systemd-sysusers {user}.conf"
    if not is_here or "imagewatch.conf" in new or not os.path.isdir("/srv/imagewatch/inbox"):
        yield "systemd-tmpfiles --create imagewatch.conf"
    if has_gallery and not (is_here and os.path.isdir(_GALLERY_FOLDER)):
        yield f"install -d -o imagewatch-gallery -g imagewatch -m 2750 {_GALLERY_FOLDER}"
    if not (is_here and os.path.exists(_SYSTEM_CONFIG)):
        yield "install -d /etc/imagewatch"
        yield f"{name} init --root /srv/imagewatch {_SYSTEM_CONFIG}"
        yield f"sed -i 's|^## state = |state = |' {_SYSTEM_CONFIG}"
    if not (is_here and os.path.exists(_SYSTEM_KEY)):
        yield f"install -m 600 /dev/stdin {_SYSTEM_KEY}{_PASTE}"
    wants = os.path.join(root, "etc/systemd/system")
    yield from _units(
        states,
        "systemctl",
        {
            "imagewatch": f"{wants}/multi-user.target.wants/imagewatch.service",
            **(
                {"imagewatch-gallery.timer": f"{wants}/timers.target.wants/imagewatch-gallery.timer"}
                if has_gallery
                else {}
            ),
        },
    )


def user_steps(states: Mapping[ServiceFile, State], program: str, config_home: str) -> Iterator[str]:
    """Yield the commands for the service of one person.

    Args:
        states: What was there before the file was written.
        program: What the unit starts.
        config_home: The configuration folder, such as ``~/.config``.
    """
    folder = f"{config_home}/imagewatch"
    shown = "~/.config/imagewatch" if folder == os.path.expanduser("~/.config/imagewatch") else folder
    if not os.path.exists(f"{folder}/config.toml"):
        yield f"mkdir -p {shown}"
        yield f"{_name(program)} init --root ~/Pictures/imagewatch {shown}/config.toml"
        yield f"sed -i 's|^## api_key_file = .*|api_key_file = \"./letta_api_key\"|' {shown}/config.toml"
        if not os.path.exists(f"{folder}/letta_api_key"):
            yield f"(umask 077; cat > {shown}/letta_api_key){_PASTE}"
    enabled = f"{config_home}/systemd/user/default.target.wants/imagewatch.service"
    yield from _units(states, "systemctl --user", {"imagewatch": enabled})


def _units(states: Mapping[ServiceFile, State], systemctl: str, enabled: Mapping[str, str]) -> Iterator[str]:
    """Yield what makes systemd use the units.

    Args:
        states: What was there before.
        systemctl: The command.
        enabled: Each unit that runs, and the link that shows that it starts at the boot.
    """
    is_changed = any(one.is_unit and state is not State.SAME for one, state in states.items())
    if is_changed:
        yield f"{systemctl} daemon-reload"
    for unit, link in enabled.items():
        if not os.path.lexists(link):
            yield f"{systemctl} enable --now {unit}"
        elif is_changed:
            yield f"{systemctl} restart {unit}"


def _name(program: str) -> str:
    """Return how the program is called in a shell: by its name if that is this one."""
    found = shutil.which("imagewatch")
    return "imagewatch" if found and os.path.realpath(found) == program else program


def _is_user(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True
