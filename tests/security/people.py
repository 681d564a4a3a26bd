"""Other users of this machine: numeric user ids that no other user has, and processes of theirs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

import imagewatch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

DAEMON, ATTACKER, HONEST = 61234, 61235, 61236
"""User ids, and as group ids the group of each. No account is needed for them."""
_PUPPET = (Path(__file__).parent / "puppet.py").read_text()


class Interpreter:
    """This Python with all it can import, also for users who may not enter the folders it is in.

    Root opens the folders; a process of another user gets them open, and finds them below ``/proc/self/fd``.
    """

    def __init__(self) -> None:
        own = [str(Path(imagewatch.__file__).parents[1]), str(Path(__file__).parents[1])]
        places = [path for path in sys.path if path and os.path.isdir(path) and not path.startswith(sys.base_prefix)]
        folders = [sys.base_prefix, *dict.fromkeys([*own, *places])]
        self.descriptors = [os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) for folder in folders]
        base, *modules = (f"/proc/self/fd/{descriptor}" for descriptor in self.descriptors)
        self.program = os.path.join(base, os.path.relpath(os.path.realpath(sys.executable), sys.base_prefix))
        self.environ = {
            "PATH": os.environ["PATH"],
            "PYTHONHOME": base,
            "PYTHONPATH": ":".join(modules),
            "PYTHONDONTWRITEBYTECODE": "1",
            "LD_LIBRARY_PATH": f"{base}/lib",
        }

    def close(self) -> None:
        """Close the folders."""
        for descriptor in self.descriptors:
            os.close(descriptor)

    def start(
        self, uid: int, arguments: Sequence[str], environ: Mapping[str, str] = {}, **more: Any
    ) -> subprocess.Popen[str]:
        """Start a Python process of a user.

        Args:
            uid: The user; their group has the same number.
            arguments: After ``python``.
            environ: Variables beside those that Python needs.
            more: As of ``Popen``.
        """
        groups = more.pop("extra_groups", [])
        return subprocess.Popen(
            [self.program, *arguments],
            env={**self.environ, **environ},
            user=uid,
            group=uid,
            extra_groups=groups,
            pass_fds=self.descriptors,
            text=True,
            **more,
        )

    def problem(self) -> str:
        """Return why another user cannot run this Python, or an empty string."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "cwd": "/"}
        process = self.start(DAEMON, ["-c", "import imagewatch.commands.run, imagewatch.commands.main"], **pipes)
        result, _ = process.communicate(timeout=60)
        return result.strip().rpartition("\n")[2] if process.returncode else ""


class Person:
    """A process of a user that follows instructions: each method is a function of ``puppet`` or of ``os``.

    What the kernel forbids them is raised here, too.

    Args:
        interpreter: The Python to run.
        uid: The user.
        folder: Where they are.
    """

    def __init__(self, interpreter: Interpreter, uid: int, folder: str) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": folder}
        self._process = interpreter.start(uid, ["-S", "-c", _PUPPET], **pipes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.do(name, *arguments)

    def do(self, name: str, *arguments: object) -> Any:
        """Have something done; return what came of it.

        Raises:
            OSError: The kernel refused.
        """
        plain = [os.fspath(one) if isinstance(one, os.PathLike) else one for one in arguments]
        _pipe(self._process.stdin).write(json.dumps([name, plain]) + "\n")
        _pipe(self._process.stdin).flush()
        answer = json.loads(_pipe(self._process.stdout).readline())
        if "errno" in answer:
            raise OSError(answer["errno"], os.strerror(answer["errno"]), answer["path"])
        return answer["result"]

    def may(self, name: str, *arguments: object) -> bool:
        """Try something; return whether the kernel allowed it."""
        try:
            self.do(name, *arguments)
        except OSError:
            return False
        return True

    def leave(self) -> None:
        """End the process, and with it all that it holds."""
        if self._process.poll() is None:
            _pipe(self._process.stdin).close()
            self._process.wait(20)
            _pipe(self._process.stdout).close()


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


def walk(top: Path) -> Iterator[Path]:
    """Yield all files below a folder, with links as links."""
    for folder, inner, names in os.walk(top):
        for name in (*names, *(name for name in inner if os.path.islink(os.path.join(folder, name)))):
            yield Path(folder, name)


def seen(path: Path) -> os.stat_result | None:
    """Return what a path is, links as links; None if a running daemon has removed it since it was listed."""
    try:
        return path.lstat()
    except FileNotFoundError:
        return None


def snapshot(folder: Path) -> dict[str, tuple[int, int, int, int, bytes]]:
    """Return what a folder is, and everything in it. By its time a folder shows also what was in it for a moment."""
    found = {}
    for path in (folder, *walk(folder)):
        now, content = path.lstat(), b""
        if path.is_symlink():
            content = os.fsencode(os.readlink(path))
        elif path.is_file():
            content = path.read_bytes()
        found[str(path.relative_to(folder))] = (now.st_ino, now.st_mode, now.st_uid, now.st_mtime_ns, content)
    return found
