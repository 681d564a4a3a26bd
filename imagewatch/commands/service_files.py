"""The files of a service: where they belong, what is in them, and whether a file on the disk was changed manually."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from dataclasses import dataclass
from enum import Enum
from typing import Final

from imagewatch.commands.service_program import quoted
from imagewatch.system.bundled import read
from imagewatch.system.disk import Disk
from imagewatch.system.permissions import Permissions
from imagewatch.system.untrusted import open_file

_SYSTEM: Final = {
    "systemd/imagewatch.service": "etc/systemd/system",
    "systemd/imagewatch@.service": "etc/systemd/system",
    "systemd/sysusers.d/imagewatch.conf": "etc/sysusers.d",
    "systemd/tmpfiles.d/imagewatch.conf": "etc/tmpfiles.d",
}
_GALLERY: Final = {
    "systemd/imagewatch-gallery.service": "etc/systemd/system",
    "systemd/imagewatch-gallery.timer": "etc/systemd/system",
    "systemd/imagewatch-gallery@.service": "etc/systemd/system",
    "systemd/imagewatch-gallery@.timer": "etc/systemd/system",
    "systemd/sysusers.d/imagewatch-gallery.conf": "etc/sysusers.d",
}
_USER: Final = "systemd/user/imagewatch.service"
_PROGRAM: Final = re.compile(r"^(ExecStart=)\S+/imagewatch (?=run |gallery )", re.MULTILINE)
_HEADER: Final = '# Written by "imagewatch service install"; SHA-256 of the lines below: '
_MOST_BYTES: Final = 1 << 20
_FILE_MODE: Final = 0o644


class State(Enum):
    """What is on the disk in the place of a file; the value is printed for it."""

    MISSING = "new"
    SAME = "unchanged"
    EARLIER = "from another version or installation"
    CHANGED = "changed manually"


@dataclass(frozen=True, slots=True)
class ServiceFile:
    """A file of a service.

    Attributes:
        path: Where it belongs.
        text: What is in it.
    """

    path: str
    text: str

    @property
    def is_unit(self) -> bool:
        """Whether systemd's manager reads it."""
        return self.path.endswith((".service", ".timer"))

    def present(self) -> str:
        """Return the text of the file that is there, without our first line.

        Raises:
            OSError: There is none, or it is not a plain file.
        """
        return _split(self._present())[1]

    def state(self) -> State:
        """Return what is there."""
        try:
            checksum, body = _split(self._present())
        except FileNotFoundError:
            return State.MISSING
        except (OSError, UnicodeDecodeError):
            return State.CHANGED
        if body == self.text:
            return State.SAME
        return State.EARLIER if checksum == _checksum(body) else State.CHANGED

    def write(self, folder_mode: int) -> None:
        """Write the file with a first line that has its checksum; folders that are missing are made.

        Raises:
            SpoolError: It cannot be written.
        """
        disk = Disk()
        disk.make_inner("/", os.path.dirname(self.path).strip("/"), folder_mode)
        content = f"{_HEADER}{_checksum(self.text)}\n{self.text}".encode()
        temporary = f"{self.path}.{secrets.token_hex(8)}"
        disk.show(self.path, temporary, content, Permissions(_FILE_MODE, None, None).apply)

    def _present(self) -> str:
        with open_file(self.path, most_bytes=_MOST_BYTES) as file:
            return file.read().decode()


def system_files(program: str, root: str, *, has_gallery: bool) -> list[ServiceFile]:
    """Return the files of a system service.

    Args:
        program: What the units start.
        root: The folder in the place of ``/``.
        has_gallery: Whether the gallery is a service, too.
    """
    chosen = _SYSTEM | (_GALLERY if has_gallery else {})
    return [
        ServiceFile(os.path.join(root, chosen[name], os.path.basename(name)), _text(name, program)) for name in chosen
    ]


def user_file(program: str, config_home: str) -> ServiceFile:
    """Return the unit of one person, in a configuration folder such as ``~/.config``."""
    return ServiceFile(os.path.join(config_home, "systemd/user", os.path.basename(_USER)), _text(_USER, program))


def _text(name: str, program: str) -> str:
    command = quoted(program)
    return _PROGRAM.sub(lambda found: f"{found[1]}{command} ", read(name))


def _split(text: str) -> tuple[str, str]:
    """Return the checksum in our first line, or an empty string, and the lines below it."""
    first, _, rest = text.partition("\n")
    return (first.removeprefix(_HEADER), rest) if first.startswith(_HEADER) else ("", text)


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
