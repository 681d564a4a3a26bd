"""``submit --table`` by several users of one inbox in which they cannot remove each other's files."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.daemon import TESTS

from security.people import ATTACKER, DAEMON, HONEST

if TYPE_CHECKING:
    from security.people import Interpreter

RUNNER = str(TESTS / "support/submit_runner.py")
RECORD = ".table-rows.jsonl"


class Shared:
    """An inbox as a service has it: with the sticky bit, writable for a group."""

    def __init__(self, top: Path, interpreter: Interpreter) -> None:
        self.root = top / "watched"
        self.inbox = self.root / "inbox"
        self._interpreter = interpreter
        for name in ("inbox", "outbox", "errors", "archive"):
            (self.root / name).mkdir(parents=True)
        for path in (self.root, *self.root.iterdir()):
            path.chmod(0o2770)
            subprocess.run(["chown", f"{DAEMON}:{DAEMON}", path], check=True)
        self.root.chmod(0o2750)
        self.inbox.chmod(0o3770)
        self.table = top / "x.csv"
        self.table.write_text("name,prompt\na,A\nb,B\n")
        self.runner = top / "runner.py"
        self.runner.write_text(Path(RUNNER).read_text())

    def submit(self, uid: int, *more: str, step: int | None = None) -> subprocess.CompletedProcess[str]:
        begin = ["-m", "imagewatch"] if step is None else [str(self.runner), str(step)]
        arguments = [*begin, "submit", "--root", str(self.root), "--table", str(self.table), *more]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": "/"}
        process = self._interpreter.start(uid, arguments, {"HOME": "/"}, extra_groups=[DAEMON], umask=0o077, **pipes)
        out, err = process.communicate(timeout=40)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def prompts(self) -> list[str]:
        return sorted(path.name for path in self.inbox.iterdir() if not path.name.startswith("."))


@pytest.fixture
def shared(open_path: Path, interpreter: Interpreter) -> Shared:
    return Shared(open_path, interpreter)


@pytest.mark.parametrize("mode", [0o3770, 0o3730])
def test_the_rows_of_one_user_are_not_dropped_again_by_another(shared: Shared, mode: int) -> None:
    shared.inbox.chmod(mode)
    done = shared.submit(HONEST)
    assert done.returncode == 0, done.stderr
    for path in shared.inbox.glob("*.prompt.txt"):
        path.unlink()  # claimed
    shared.table.write_text("name,prompt\na,A\nb,B\nc,C\n")
    done = shared.submit(ATTACKER)
    assert done.returncode == 0, done.stderr
    assert shared.prompts() == ["c.prompt.txt"]
    assert "in flight, or its files were moved): lines 2-3\n" in done.stderr


def test_after_a_killed_run_of_one_user_another_one_drops_the_other_rows(shared: Shared) -> None:
    steps = int(shared.submit(HONEST, step=0).stderr.splitlines()[-1])
    for step in range(1, steps + 1):
        for path in shared.inbox.iterdir():
            path.unlink()
        assert shared.submit(HONEST, step=step).returncode < 0
        for uid in (ATTACKER, HONEST):
            done = shared.submit(uid)
            assert done.returncode == 0, f"{step}: {done.stderr}"
        assert shared.prompts() == ["a.prompt.txt", "b.prompt.txt"]


def test_a_record_that_a_user_may_not_write_is_named_with_what_to_do(shared: Shared) -> None:
    assert shared.submit(HONEST).returncode == 0
    (shared.inbox / RECORD).chmod(0o600)
    done = shared.submit(ATTACKER)
    assert (done.returncode, done.stdout) == (74, "")
    assert f"Permission denied: {shared.inbox}/{RECORD}\n  ask the administrator" in done.stderr


def test_a_hard_link_of_another_user_to_a_private_file_is_never_written_as_the_record(shared: Shared) -> None:
    private = shared.root.parent / "private"
    private.write_text("secret\n")
    subprocess.run(["chown", f"{HONEST}:{HONEST}", private], check=True)
    private.chmod(0o600)
    (shared.inbox / RECORD).hardlink_to(private)
    done = shared.submit(HONEST)
    assert done.returncode == 74, done.stderr
    assert "the record of dropped rows is a hard link to a private file" in done.stderr
    assert private.read_text() == "secret\n"


def test_a_record_of_another_user_has_no_run_remove_images_that_are_not_that_users(shared: Shared) -> None:
    image = shared.inbox / "cat.in1.png"
    image.write_bytes(b"of an honest prompt that waits")
    staged = shared.inbox / ".row-1.prompt.txt"
    staged.write_text("x")
    line = {"name": "cat", "content": "0", "staged": [".row-1.png", staged.name], "images": [image.name]}
    (shared.inbox / RECORD).write_text(json.dumps(line) + "\n")
    for path, uid in ((image, HONEST), (staged, ATTACKER), (shared.inbox / RECORD, ATTACKER)):
        subprocess.run(["chown", f"{uid}:{DAEMON}", path], check=True)
        path.chmod(0o664)
    done = shared.submit(HONEST)
    assert done.returncode == 0, done.stderr
    assert shared.prompts() == ["a.prompt.txt", "b.prompt.txt", "cat.in1.png"]
