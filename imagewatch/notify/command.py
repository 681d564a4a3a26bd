"""A receiver that is a program: it gets an event on standard input and exits with 0 when it has it.

It runs without a shell, in a session of its own and with a time limit. Its environment has only what a program needs to
run: neither the API key nor the folder of systemd's credentials. It runs as the daemon's user, so this protects the key
from a mistake, not from a hostile program.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from imagewatch.system.masking import known
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SECONDS: Final = 60.0
"""How long it may take."""
_STEP_SECONDS: Final = 0.05
_MOST_BYTES: Final = 1 << 20
_LONGEST_LINE: Final = 300
_PASSED: Final = {
    *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR", "SSL_CERT_FILE", "SSL_CERT_DIR"),
    *("http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
}
_PASSED_BEGINNINGS: Final = ("LC_", "XDG_")


class Command:
    """The program.

    Args:
        command: Program and arguments.
        environ: The daemon's environment.
    """

    name: Final = "command"

    def __init__(self, command: Sequence[str], environ: Mapping[str, str]) -> None:
        self._command = tuple(command)
        self._environ = environ
        self._process: subprocess.Popen[bytes] | None = None

    def stop(self) -> None:
        """End the program, if it runs: nothing waits for it any more."""
        process = self._process
        if process is not None and process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def deliver(self, body: bytes, seconds: float = SECONDS) -> str:
        """Run it once.

        Args:
            body: The event.
            seconds: How long it may take.

        Returns:
            Why it does not have the event, or an empty string.
        """
        limit = min(seconds, SECONDS)
        try:
            with subprocess.Popen(  # noqa: S603  the administrator's own command, no shell
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                cwd="/",
                env=environment(self._environ),
                start_new_session=True,
            ) as process:
                self._process = process
                ended = _wait(process, body + b"\n", time.monotonic() + limit)
        except (OSError, ValueError) as error:
            cause = (error.strerror if isinstance(error, OSError) else None) or "it is not a command"
            return f"the command cannot be started: {cause}"
        if ended.is_late:
            return f"the command did not end within {limit:g} s"
        return _reason(process.returncode, ended.errors)


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return what of an environment the program gets."""
    return {
        name: value
        for name, value in environ.items()
        if (name in _PASSED or name.startswith(_PASSED_BEGINNINGS)) and known.text(value) == value
    }


class _Ended(NamedTuple):
    errors: bytes
    is_late: bool = False


def _wait(process: subprocess.Popen[bytes], body: bytes, deadline: float) -> _Ended:
    """Give a program its input and wait for its end; end it if it takes too long or prints too much.

    Step by step, because a child of the program may keep its outputs open after it has ended.
    """
    given: bytes | None = body
    while True:
        has_ended = process.poll() is not None  # asked before, so that its last output is read
        try:
            return _Ended(process.communicate(given, timeout=_STEP_SECONDS)[1])
        except subprocess.TimeoutExpired as waited:
            errors = waited.stderr or b""
        given = None
        if has_ended:
            return _Ended(errors)
        is_late = time.monotonic() >= deadline
        if (is_late or len(errors) > _MOST_BYTES) and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with its children: the session is its own
            process.wait()
            return _Ended(errors, is_late)


def _reason(code: int, errors: bytes) -> str:
    """Return why a program does not have the event, with its last error line; an empty string if it has it."""
    if code == 0:
        return ""
    last = errors[-4096:].decode("utf-8", "replace").strip().rpartition("\n")[2]
    how = f"the command exited with status {code}" if code > 0 else f"the command was ended by signal {-code}"
    return f"{how}: {printable(known.text(last), _LONGEST_LINE)}" if last else how
