"""Where a line goes, and in which form: a terminal and a file are tested with the commands, the journal here."""

from __future__ import annotations

import json
import os
import socket
from typing import TYPE_CHECKING, TextIO

import pytest
import structlog

from imagewatch.system import log

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = structlog.get_config()
    yield
    structlog.configure(**before)


class Journal:
    """A journal's socket, and a stream that systemd would have connected to it."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "socket")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._socket.settimeout(10)
        self.stream: TextIO = (folder / "stream").open("w+", encoding="utf-8")
        status = os.fstat(self.stream.fileno())
        self.environ = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}

    def close(self) -> None:
        self._socket.close()
        self.stream.close()

    def entry(self) -> dict[str, str]:
        """The next entry, read as the journal reads it: a name, a length, so many bytes."""
        content, fields = self._socket.recv(1 << 20), {}
        while content:
            name, _, rest = content.partition(b"\n")
            length = int.from_bytes(rest[:8], "little")
            assert rest[8 + length : 9 + length] == b"\n"
            assert name.decode() not in fields
            fields[name.decode()] = rest[8 : 8 + length].decode()
            content = rest[9 + length :]
        return fields

    def lines(self) -> list[str]:
        self.stream.flush()
        self.stream.seek(0)
        return self.stream.read().splitlines()


@pytest.fixture
def journal(tmp_path) -> Iterator[Journal]:
    made = Journal(tmp_path)
    yield made
    made.close()


def configure(journal: Journal, form: str = "auto", path: str | None = None) -> structlog.typing.BindableLogger:
    log.configure("info", form, journal.stream, environ=journal.environ, journal=path or journal.path)
    return structlog.get_logger()


@pytest.mark.parametrize(("level", "priority"), [("info", "6"), ("warning", "4"), ("error", "3")])
def test_an_entry_of_the_journal_has_a_level_a_text_and_its_values_as_fields(journal, level, priority):
    getattr(configure(journal), level)("made", source="cat.prompt.txt", credits=40.5, images=["cat.png", "cat-2.png"])
    entry = journal.entry()
    assert entry == {
        "PRIORITY": priority,
        "SYSLOG_IDENTIFIER": "imagewatch",
        "IMAGEWATCH_EVENT": "made",
        "IMAGEWATCH_SOURCE": "cat.prompt.txt",
        "IMAGEWATCH_CREDITS": "40.5",
        "IMAGEWATCH_IMAGES": '["cat.png", "cat-2.png"]',
        "MESSAGE": entry["MESSAGE"],
    }
    assert entry["MESSAGE"].startswith("made ")
    assert "source=cat.prompt.txt" in entry["MESSAGE"]
    assert journal.lines() == []


def test_what_is_below_the_level_is_not_said(journal):
    logger = configure(journal)
    logger.debug("step")
    logger.info("made")
    assert journal.entry()["MESSAGE"] == "made"


def test_a_hostile_value_ends_no_field_and_begins_no_other(journal):
    name = "x\nPRIORITY=0\nMESSAGE=\x1b[2Jgone\udcff"
    configure(journal).warning("ignored", file=name)
    entry = journal.entry()
    assert entry["PRIORITY"] == "4"
    assert entry["IMAGEWATCH_FILE"] == "x\\nPRIORITY=0\\nMESSAGE=\\x1b[2Jgone\\udcff"
    assert "\x1b" not in entry["MESSAGE"]
    assert "\n" not in entry["MESSAGE"]


def test_a_name_that_the_journal_would_refuse_becomes_one_that_it_takes(journal):
    configure(journal).info("made", **{"cf-ray": "8f", "x" * 100: "long", "ünï": "code"})
    fields = {name: value for name, value in journal.entry().items() if name.startswith("IMAGEWATCH_")}
    assert fields["IMAGEWATCH_CF_RAY"] == "8f"
    assert "code" in fields.values()
    assert all(len(name) <= 64 and name.replace("_", "").isalnum() and name.isascii() for name in fields)


def fail(logger: structlog.typing.BindableLogger) -> None:
    """Log a failure with its traceback."""
    try:
        int("the cause\x1b")
    except ValueError:
        logger.exception("a bug")


def test_a_traceback_is_part_of_its_entry(journal):
    fail(configure(journal))
    entry = journal.entry()
    assert (entry["PRIORITY"], entry["MESSAGE"].split("\n")[0]) == ("3", "a bug")
    assert "the cause\\x1b" in entry["IMAGEWATCH_EXCEPTION"].split("\n")[-1]
    assert "\x1b" not in entry["MESSAGE"] + entry["IMAGEWATCH_EXCEPTION"]


@pytest.mark.parametrize("cause", ["nothing listens", "it is too large"])
def test_what_the_journal_does_not_take_is_a_line_with_its_level(journal, tmp_path, cause):
    logger = configure(journal, path=str(tmp_path / "nothing") if cause == "nothing listens" else None)
    logger.warning("refused", reason="no", problems=["x" * 2000] * (500 if cause == "it is too large" else 1))
    (line,) = journal.lines()
    assert line.startswith("<4>refused ")


def test_json_keeps_its_level_in_the_journal(journal):
    configure(journal, "json").warning("refused", source="cat.prompt.txt")
    (line,) = journal.lines()
    assert line.startswith("<4>{")
    assert json.loads(line[3:])["source"] == "cat.prompt.txt"


def test_each_line_for_people_keeps_its_level_in_the_journal(journal):
    fail(configure(journal, "console"))
    assert len(journal.lines()) > 3
    assert all(line.startswith("<3>") for line in journal.lines())


@pytest.mark.parametrize("environ", [{}, {"JOURNAL_STREAM": "1:2"}, {"JOURNAL_STREAM": "nonsense"}])
def test_a_stream_that_does_not_lead_to_the_journal_gets_plain_json(journal, environ):
    log.configure("info", "auto", journal.stream, environ=environ, journal=journal.path)
    structlog.get_logger().warning("refused", source="cat.prompt.txt")
    (line,) = journal.lines()
    assert json.loads(line)["level"] == "warning"
