"""The API key: where it comes from, and a type that hides it when printed.

The first of these that is set is used: ``api_key_command``, ``api_key_file``, the systemd credential
``letta_api_key``, the environment variable ``LETTA_API_KEY``. The key is read for each request, because tokens expire.
No message of this module holds it.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import stat
import subprocess
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from imagewatch.config.secret_file import SecretFileError, read_secret_file
from imagewatch.system.errors import ConfigError, Problem
from imagewatch.system.masking import Mask, known

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from imagewatch.config.schema import Endpoint

_CREDENTIAL: Final = "letta_api_key"
_VARIABLE: Final = "LETTA_API_KEY"
_MAX_BYTES: Final = 64 * 1024
_MAX_ERROR_BYTES: Final = 1024 * 1024
_MAX_ECHO: Final = 200
_MIN_ECHO_SECRET: Final = 8
_ALONE: Final = "write the key alone, on one line"
_STEP_SECONDS: Final = 0.05
_SECRETS: Final = "/run/secrets"
"""Where Docker and Podman put secrets; the image names it as the folder of credentials."""
_NO_KEY: Final = (
    "set api_key_file or api_key_command below [endpoint], the systemd credential letta_api_key "
    "(LoadCredential=letta_api_key:/path), or the environment variable LETTA_API_KEY; "
    "if the daemon is running, restart it"
)


class Key:
    """A key that can be used and compared, but is not shown by accident. This process masks it wherever it writes.

    Attributes:
        secret: Replaces the key in what is written down.
    """

    __slots__ = ("_value", "secret")

    def __init__(self, value: str) -> None:
        self._value = value
        self.secret = Mask(value)
        known.remember(self.secret)

    def __repr__(self) -> str:
        return "Key(***)"

    __str__ = __repr__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __reduce__(self) -> str:
        raise TypeError("a key is never serialized")

    def reveal(self) -> str:
        """Return the key itself; for the request header and nothing else."""
        return self._value

    def mask(self, text: str) -> str:
        """Return a text with the key replaced by ``***``, in whatever form it is there."""
        return self.secret.text(text)


class _Source(NamedTuple):
    """One way to the key.

    Attributes:
        field: The field to report.
        label: The name to show.
        step: What to do if the API does not accept the key.
        read: Returns the key.
        path: The file that holds it, or an empty string.
    """

    field: str
    label: str
    step: str
    read: Callable[[], bytes]
    path: str = ""


def read_key(endpoint: Endpoint, environ: Mapping[str, str], *, command_timeout: float = 30.0) -> Key:
    """Return the key from the first source that is set. If that one gives no key, the others are not tried.

    Args:
        endpoint: The configuration's ``[endpoint]``.
        environ: The environment; also that of the command.
        command_timeout: Seconds that ``api_key_command`` may take.

    Returns:
        The key.

    Raises:
        ConfigError: If no source is set, or the first that is set gives no key.
    """
    source = _source(endpoint, environ, command_timeout)
    if source is None:
        raise ConfigError([Problem("endpoint", "no API key is set", _no_key(environ))])
    value = source.read().strip()
    if not value:
        raise _failure(source.field, "the key is empty", _ALONE)
    if not re.fullmatch(rb"[\x21-\x7e]+", value):
        raise _failure(source.field, "the key contains spaces or non-ASCII characters", _ALONE)
    return Key(value.decode("ascii"))


def key_source(endpoint: Endpoint, environ: Mapping[str, str]) -> str:
    """Return the name of the source that the key is read from, or an empty string when none is set.

    Args:
        endpoint: The configuration's ``[endpoint]``.
        environ: The environment.

    Returns:
        For example ``api_key_file /etc/imagewatch/key``; of a command at most the program is named.
    """
    source = _source(endpoint, environ, 0)
    return source.label if source else ""


def key_step(endpoint: Endpoint, environ: Mapping[str, str]) -> str:
    """Return what to do if the API does not accept the key.

    Args:
        endpoint: The configuration's ``[endpoint]``.
        environ: The environment.
    """
    source = _source(endpoint, environ, 0)
    return source.step if source else _no_key(environ)


def key_problem(endpoint: Endpoint, environ: Mapping[str, str]) -> Problem | None:
    """Return why no key can be read, or None. A command is not run for that: it may ask a person.

    Args:
        endpoint: The configuration's ``[endpoint]``.
        environ: The environment.
    """
    if endpoint.api_key_command:
        return None
    try:
        read_key(endpoint, environ)
    except ConfigError as error:
        return error.problems[0]
    return None


def key_stamp(endpoint: Endpoint, environ: Mapping[str, str]) -> object:
    """Return a value that differs when the file that holds the key was changed; None if no file holds it.

    Args:
        endpoint: The configuration's ``[endpoint]``.
        environ: The environment.
    """
    source = _source(endpoint, environ, 0)
    if source is None or not source.path:
        return None
    try:
        status = os.stat(source.path)
    except OSError:
        return ()
    return (status.st_ino, status.st_size, status.st_mtime_ns)


def key_file_problem(path: str) -> str:
    """Return a warning when others than its owner can read a key file, else an empty string.

    Args:
        path: The key file; one that cannot be read is reported elsewhere.
    """
    try:
        mode = stat.S_IMODE(os.stat(path).st_mode)
    except OSError:
        return ""
    if not mode & (stat.S_IRGRP | stat.S_IROTH):
        return ""
    return f"other users can read {path} (mode {mode:04o}); run: chmod 600 {path}"


def _no_key(environ: Mapping[str, str]) -> str:
    """Return where to put the key."""
    if environ.get("CREDENTIALS_DIRECTORY") == _SECRETS:
        return f"mount a file with the key at {_SECRETS}/{_CREDENTIAL}, then start a new container"
    return _NO_KEY


def _failure(field: str, reason: str, hint: str) -> ConfigError:
    return ConfigError([Problem(field, reason, hint)])


def _source(endpoint: Endpoint, environ: Mapping[str, str], timeout: float) -> _Source | None:
    """Return the first source that is set."""
    command, path = endpoint.api_key_command, endpoint.api_key_file
    folder = environ.get("CREDENTIALS_DIRECTORY", "")
    credential = os.path.join(folder, _CREDENTIAL)
    if command:
        field = "endpoint.api_key_command"
        # Arguments may be secret. If the first word is not a program, it may be the key. Neither is shown.
        program = command[0] if shutil.which(command[0], path=environ.get("PATH")) else ""
        label = f"api_key_command {program}".strip()
        step = "make api_key_command print a valid key; the daemon runs it again automatically"
        return _Source(field, label, step, lambda: _run(command, environ, timeout))
    if path is not None:
        field = "endpoint.api_key_file"
        step = f"replace the key in {path}; the daemon notices the change automatically"
        return _Source(field, f"api_key_file {path}", step, lambda: _read(path, field), path)
    if folder and os.path.lexists(credential):
        field = f"credential {_CREDENTIAL}"
        step = f"replace the file of the systemd credential {_CREDENTIAL}, then restart the service"
        label = f"systemd {field}"
        if folder == _SECRETS:
            step = f"replace the key in the file that is mounted at {credential}, then restart the container"
            label = credential
        return _Source(field, label, step, lambda: _read(credential, field), credential)
    if value := environ.get(_VARIABLE):
        field = f"environment variable {_VARIABLE}"
        step = f"set {_VARIABLE} to a valid key and restart the daemon"
        return _Source(_VARIABLE, field, step, lambda: value.encode("utf-8", "surrogatepass"))
    return None


def _read(path: str, field: str) -> bytes:
    """Return the content of a small regular file."""
    try:
        return read_secret_file(path, _MAX_BYTES)
    except SecretFileError as error:
        raise _failure(field, f"{path!a} {error}", "name a file that the daemon's user can read") from None


def _run(command: tuple[str, ...], environ: Mapping[str, str], timeout: float) -> bytes:
    """Return what a command prints; it has no shell, no input and a time limit."""
    field, hint = "endpoint.api_key_command", "run the command as the daemon's user to see why"
    outcome: _Outcome | None = None
    reason = ""
    try:
        # A session of its own: a Ctrl-C does not reach it, and its children can be ended with it.
        with subprocess.Popen(  # noqa: S603  the administrator's own command, no shell
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(environ),
            start_new_session=True,
        ) as process:
            outcome = _collect(process, time.monotonic() + timeout)
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else None
        reason = f"cannot be started: {cause or 'not a command'}"
    if outcome is not None:
        reason = outcome.fault or _fault(outcome, math.inf) or _exit_reason(process.returncode, outcome)
    if outcome is None or reason:
        raise _failure(field, reason, hint)
    return outcome.output


class _Outcome(NamedTuple):
    """What a command wrote, and why this process ended it, if it did."""

    output: bytes
    errors: bytes
    fault: str = ""


def _collect(process: subprocess.Popen[bytes], deadline: float) -> _Outcome:
    """Wait for a command and return its outputs; end it when it takes too long or prints too much.

    Step by step: a single ``communicate`` keeps any amount in memory, and waits for a child of the command that keeps
    the outputs open.
    """
    while True:
        has_ended = process.poll() is not None  # asked before, so that its last output is read
        try:
            return _Outcome(*process.communicate(timeout=_STEP_SECONDS))
        except subprocess.TimeoutExpired as waited:
            outcome = _Outcome(waited.output or b"", waited.stderr or b"")
        if has_ended:
            return outcome
        if fault := _fault(outcome, deadline):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with its children: the session is its own
            return outcome._replace(fault=fault)


def _fault(outcome: _Outcome, deadline: float) -> str:
    """Return why a command is ended, or what it printed is not used; an empty string without a reason."""
    if len(outcome.output) > _MAX_BYTES:
        return "printed more than 64 KiB"
    if len(outcome.errors) > _MAX_ERROR_BYTES:
        return "printed more than 1 MiB to standard error"
    return "did not end in time" if time.monotonic() >= deadline else ""


def _exit_reason(code: int, outcome: _Outcome) -> str:
    """Return why a command failed, with its last error line, or an empty string."""
    if code == 0:
        return ""
    text = outcome.errors.decode("utf-8", "replace")
    # A command that fails late may have the key in both outputs.
    for word in outcome.output.decode("utf-8", "replace").split():
        if len(word) >= _MIN_ECHO_SECRET:
            text = text.replace(word, "***")
    last = text.strip().rpartition("\n")[2]
    how = f"failed with exit status {code}" if code > 0 else f"was ended by signal {-code}"
    return f"{how}: {ascii(last)[1:-1][:_MAX_ECHO]}" if last else how
