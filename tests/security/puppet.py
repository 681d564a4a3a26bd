"""What another user does. Run as that user, one call per line of standard input, one reply per line of output."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import random
import sys
import threading

_AT_FDCWD = -100
_EXCHANGE = 2
_LIBC = ctypes.CDLL(None, use_errno=True)
_kept: list[object] = []


def exchange(one: str, other: str) -> None:
    """Give two names to each other's files, at the same moment."""
    if _LIBC.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), one)


def mkdir(path: str, mode: int = 0o777) -> None:
    """Create a folder with exactly this mode."""
    os.mkdir(path, mode)


def write(path: str, text: str, mode: int = 0o666) -> None:
    """Create a file with exactly this mode."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(text.encode("latin-1"))


def drop(path: str, text: str, mode: int = 0o666) -> None:
    """Drop a file as a careful sender does: under another name, then renamed."""
    folder, name = os.path.split(path)
    write(os.path.join(folder, f".{name}.part"), text, mode)
    os.rename(os.path.join(folder, f".{name}.part"), path)


def lock(path: str, kind: str = "exclusive") -> None:
    """Lock a file or a folder until this process ends."""
    descriptor = os.open(path, os.O_RDONLY)
    _kept.append(descriptor)
    fcntl.flock(descriptor, fcntl.LOCK_NB | (fcntl.LOCK_EX if kind == "exclusive" else fcntl.LOCK_SH))


def readable_with(top: str, secrets: list[str]) -> list[str]:
    """Return every file below a folder that this user can read and that holds one of these texts."""
    found = []
    for folder, _, names in os.walk(top):
        for name in names:
            try:
                descriptor = os.open(os.path.join(folder, name), os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            except OSError:
                continue
            with open(descriptor, "rb") as file:
                content = file.read()
            if any(secret.encode("latin-1") in content for secret in secrets):
                found.append(os.path.join(folder, name))
    return found


class _Racing(threading.Thread):
    """Exchanges two names again and again, until it is stopped."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(daemon=True)
        self._names = one, other
        self.rounds = 0
        self.over = threading.Event()

    def run(self) -> None:
        chance = random.Random(0)
        while not self.over.is_set():
            exchange(*self._names)
            self.rounds += 1
            # A process that is as quick as it can is seldom at the same place twice when the daemon scans.
            for _ in range(chance.randrange(5000)):
                pass
        if self.rounds % 2:
            exchange(*self._names)


def race(one: str, other: str) -> None:
    """Begin to exchange two names again and again."""
    racing = _Racing(one, other)
    _kept.append(racing)
    racing.start()


def stop_racing() -> int:
    """End every race, with each name where it was at first; return how often names were exchanged."""
    rounds = 0
    for racing in [one for one in _kept if isinstance(one, _Racing)]:
        racing.over.set()
        racing.join()
        _kept.remove(racing)
        rounds += racing.rounds
    return rounds


def storm(seed: int, count: int, places: list[str], targets: list[str], spared: list[str]) -> int:
    """Do things at random to names in some folders; return how many of them could be done.

    Args:
        seed: Of the order.
        count: How many things.
        places: Folders whose names are renamed, swapped, linked and given other modes.
        targets: What links lead to.
        spared: Names that nothing is done to.
    """
    chance, done = random.Random(seed), 0
    for number in range(count):
        place = chance.choice(places)
        try:
            names = sorted(set(os.listdir(place)) - set(spared)) or ["nothing"]
            one, other = (os.path.join(place, chance.choice(names)) for _ in range(2))
            new = os.path.join(place, f"new-{seed}-{number}.{os.path.basename(one).partition('.')[2]}".rstrip("."))
            act = chance.randrange(7)
            if act == 0:
                os.rename(one, new)
            elif act == 1:
                exchange(one, other)
            elif act == 2:
                os.symlink(chance.choice(targets), new)
                exchange(one, new)
            elif act == 3:
                os.link(one, new, follow_symlinks=False)
            elif act == 4:
                os.chmod(one, chance.choice([0o000, 0o444, 0o700, 0o777]))
            elif act == 5:
                mkdir(new)
                exchange(one, new)
            else:
                os.symlink(chance.choice(targets), new)
            done += 1
        except OSError:
            continue
    return done


def serve() -> None:
    """Do what is asked until nothing is asked any more."""
    own = {name: value for name, value in globals().items() if callable(value) and not name.startswith("_")}
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            result = (own.get(name) or getattr(os, name))(*arguments)
        except OSError as error:
            answer = {"errno": error.errno or errno.EIO, "path": str(error.filename)}
        else:
            answer = {"result": result}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    os.umask(0)  # a new file has the mode that is asked for
    serve()
