"""``again`` from outside: the real command, a real daemon, a real endpoint on the loopback, real folders."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
import subprocess
import sys
import tomllib
from typing import TYPE_CHECKING, Any

import pytest
import tomli_w
from support.daemon import Folders, run_reported, until
from support.daemon import command as command_of

from commands.test_submit import Sender, plain_image

if TYPE_CHECKING:
    from pathlib import Path

    from imagewatch.sandbox import Sandbox


class Person(Sender):
    """A sender who needs some prompts once more."""

    def again(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        done = run_reported([sys.executable, "-m", "imagewatch", "again", *arguments], env=self.known, cwd=self.home)
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())

    def once(self, **settings: str) -> None:
        """Have the daemon process what is in the inbox."""
        command_of(self.folders, "once", **settings)

    def new(self) -> dict[str, Any]:
        """The front matter of the only prompt in the inbox, with its text."""
        (path,) = self.folders.inbox.rglob("*.prompt.txt")
        _, front, text = path.read_text().split("+++\n", 2)
        return {**tomllib.loads(front), "text": text.strip(), "name": path.relative_to(self.folders.inbox).as_posix()}


@pytest.fixture
def person(folders: Folders, tmp_path: Path) -> Person:
    return Person(folders, tmp_path / "home")


def refused(person: Person, *arguments: str) -> str:
    before = person.dropped()
    done = person.again(*arguments)
    assert (done.returncode, done.stdout) == (64, ""), done.stderr
    assert person.dropped() == before
    return done.stderr


def test_a_finished_prompt_is_dropped_once_more_under_a_new_name_and_its_cost_is_printed_first(person, sandbox, start):
    start(person.folders, "run")
    until((person.folders.state / "status.json").exists)
    given = ["-n", "2", "--provider", "openai", "--quality", "low", "--size", "1024x1536", "--seed", "7"]
    images = ["--image", person.file("a.png"), "--image", person.file("b.jpg", plain_image("JPEG"))]
    assert person.submit("A cat {x} +++", "--name", "cat", *given, *images, "--wait").returncode == 0
    first = person.folders.receipt("cat")
    until(lambda: len(person.folders.names("archive")) == 3)
    done = person.again("cat", "--wait", "--json")
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)
    assert re.fullmatch(r"cat-[0-9a-f]{6}\.prompt\.txt", result["source"])
    second = tomllib.loads((person.folders.outbox / result["result_file"]).read_text())
    assert (second["prompt"], second["request"]) == (first["prompt"], first["request"])
    assert [one["sha256"] for one in second["inputs"]] == [one["sha256"] for one in first["inputs"]]
    assert done.stderr.splitlines()[:3] == [
        f"Once more: {person.folders.outbox}/cat.receipt.toml",
        "The seed is 7; the same seed may give the same image again (--seed changes it).",
        f"Expected cost: {first['credits_charged']} credits.",
    ]
    assert sandbox.report()["requests"] == 2


def test_number_and_seed_can_be_changed_and_the_cost_is_that_of_the_new_number(person, sandbox):
    person.folders.prompt("cat", "+++\nn = 2\n+++\nA cat")
    person.once()
    cost = person.folders.receipt("cat")["credits_charged"]
    done = person.again("cat", "-n", "4", "--seed", "-5")
    assert done.returncode == 0, done.stderr
    lines = [f"Once more: {person.folders.outbox}/cat.receipt.toml", f"Expected cost: {cost * 2} credits."]
    assert done.stderr.splitlines()[:2] == lines
    new = person.new()
    assert (new["n"], new["seed"], new["text"], new["input_images"]) == (4, -5, "A cat", [])


def test_the_new_one_can_be_dropped_once_more_and_names_do_not_grow(person):
    person.folders.prompt("cat", "A cat")
    person.once()
    name = "cat"
    for _ in range(2):
        assert person.again(name).returncode == 0
        name = person.new()["name"].removesuffix(".prompt.txt")
        assert re.fullmatch(r"cat-[0-9a-f]{6}", name)
        person.once()


def test_without_the_receipt_the_archive_has_the_prompt_and_its_images(person):
    person.folders.drop("a/cat.png", plain_image())
    person.folders.drop("a/cat.prompt.txt", "+++\nquality = 'low'\n+++\nMake it blue")
    person.once()
    (person.folders.outbox / "a/cat.receipt.toml").unlink()
    done = person.again("a/cat")
    assert done.returncode == 0, done.stderr
    new = person.new()
    assert new["name"].startswith("a/cat-")
    assert (new["quality"], new["text"], len(new["input_images"])) == ("low", "Make it blue", 1)
    assert "The cost is not known" in done.stderr


def test_without_the_receipt_the_images_are_those_of_the_same_job(person):
    colors = (1, 2, 3), (4, 5, 6)
    for color in colors:
        person.folders.drop("cat.png", plain_image(color=color))
        person.folders.drop("cat.prompt.txt", f"+++\ninput_images = ['cat.png']\n+++\nA cat {color}")
        person.once()
    for receipt in person.folders.outbox.glob("*.receipt.toml"):
        receipt.unlink()
    (second,) = person.folders.archive.glob("cat.????.prompt.txt")
    done = person.again(str(second))
    assert done.returncode == 0, done.stderr
    (name,) = person.new()["input_images"]
    assert (person.folders.inbox / name).read_bytes() == plain_image(color=colors[1])


def test_when_the_archive_deletes_the_receipt_is_enough_for_a_prompt_without_images(person):
    person.folders.prompt("cat", "A cat")
    person.folders.drop("dog.png", plain_image())
    person.folders.prompt("dog", "A dog")
    person.once(IMAGEWATCH_FOLDERS__ARCHIVE="delete")
    person.known["IMAGEWATCH_FOLDERS__ARCHIVE"] = "delete"
    assert person.again("cat").returncode == 0
    assert person.new()["text"] == "A cat"
    text = refused(person, "dog")
    assert "the image dog.png of this prompt was removed (archive = delete)" in text
    assert "imagewatch submit --image FILE" in text


def test_images_are_recognized_by_their_content_also_under_another_name_and_never_replaced_by_others(person):
    for color in (1, 2, 3), (4, 5, 6):
        person.folders.drop("cat.png", plain_image(color=color))
        person.folders.prompt("cat", f"A cat {color}")
        person.once()
    names = [path.name for path in person.folders.outbox.glob("*.receipt.toml")]
    (tagged,) = (name for name in names if name != "cat.receipt.toml")
    assert person.again(tagged).returncode == 0
    assert person.new()["text"] == "A cat (4, 5, 6)"
    (image,) = person.folders.inbox.glob("*.in1.png")
    assert image.read_bytes() == plain_image(color=(4, 5, 6))
    (person.folders.archive / "cat.png").write_bytes(plain_image(color=(9, 9, 9)))
    assert "cat.png of this prompt is not in the archive, or was changed" in refused(
        person, str(person.folders.outbox / "cat.receipt.toml")
    )


def test_a_name_of_several_different_prompts_is_refused_with_their_paths(person):
    for text in ("A cat", "A dog"):
        person.folders.prompt("cat", text)
        person.once()
    text = refused(person, "cat")
    assert text.startswith("imagewatch: several finished prompts have this name: cat\n  name one by its path: ")
    paths = text.partition("path: ")[2].strip().split(", ")
    assert set(paths) == {str(path) for path in person.folders.outbox.glob("*.receipt.toml")}
    for path in paths:
        assert person.again(path).returncode == 0
    tag = next(path for path in paths if path.count(".") == 3).rpartition("/")[2].removesuffix(".receipt.toml")
    assert person.again(tag).returncode == 0, "the name with the id is not ambiguous"


def test_the_same_prompt_dropped_twice_is_not_ambiguous(person):
    for _ in range(2):
        person.folders.prompt("cat", "A cat")
        person.once()
    assert person.again("cat").returncode == 0


def test_what_is_not_finished_is_refused_with_the_reason(person, sandbox, start):
    person.folders.prompt("bad", "A cat [sandbox: 400]")
    person.folders.drop("deep/er/cat.prompt.txt", "A cat")
    person.once()
    assert f"what to do is in {person.folders.errors}/bad.error.toml" in refused(person, "bad")
    assert "did you mean deep/er/cat?" in refused(person, "cat")
    assert "no finished prompt has this name: none" in refused(person, "none")
    assert "no finished prompt has this name" in refused(person, "../../etc/passwd")
    person.folders.prompt("waits", "A cat")
    assert "waits in the inbox and is not finished: waits.prompt.txt" in refused(person, "waits")


def in_flight(person: Person, sandbox: Sandbox, start: Any, environ: dict[str, str], count: int = 1) -> str:
    sandbox.hold()
    try:
        person.folders.prompt("flies", "A cat")
        start(person.folders, "run")
        assert sandbox.wait_for_requests(count, 20)
        person.known = environ
        return refused(person, "flies")
    finally:
        sandbox.release()


def test_a_prompt_in_flight_is_refused(person, sandbox, start):
    text = in_flight(person, sandbox, start, {**person.environ, **person.folders.environ})
    assert "the prompt is in flight and not finished: flies.prompt.txt" in text


def test_a_job_that_has_its_receipt_is_finished_although_the_status_still_names_it(person):
    person.folders.prompt("cat", "A cat")
    person.once()
    path = person.folders.root / "imagewatch-status.json"
    status = json.loads(path.read_text())
    status["in_flight"] = {"count": 1, "files": [{"name": "cat.prompt.txt"}]}
    path.write_text(json.dumps(status))
    with contextlib.closing(sqlite3.connect(person.folders.state / "ledger.sqlite3")) as database, database:
        assert database.execute("UPDATE jobs SET state = 'published'").rowcount == 1
    person.known = {**person.environ, **person.folders.environ}
    assert person.again("cat").returncode == 0


def test_a_newer_prompt_of_the_name_in_flight_is_refused_if_the_journal_can_be_read(person, sandbox, start):
    person.folders.prompt("flies", "An older one")
    person.once()
    text = in_flight(person, sandbox, start, {**person.environ, **person.folders.environ}, count=2)
    assert "the prompt is in flight and not finished: flies.prompt.txt" in text


def test_a_sender_with_only_the_folders_reads_that_it_may_be_in_flight(person, sandbox, start):
    text = in_flight(person, sandbox, start, person.known)
    assert "in flight" in text


def test_the_status_in_the_folder_shows_what_is_in_flight(person):
    status = {"schema": 1, "version": "1", "state": "running", "written_at": "2026-11-29T12:00:00Z"}
    status |= {"next_writing_at": None, "stopped_at": None, "holds": []}
    status["in_flight"] = {"count": 1, "files": [{"name": "cat.prompt.txt"}]}
    (person.folders.root / "imagewatch-status.json").write_text(json.dumps(status))
    assert "the prompt is in flight and not finished: cat.prompt.txt" in refused(person, "cat")


def test_a_stopped_daemon_is_reported(person):
    person.folders.prompt("cat", "A cat")
    person.once()
    done = person.again("cat")
    assert done.returncode == 0, done.stderr
    assert "imagewatch: the daemon is not running: it was stopped" in done.stderr


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "Another text"},
        {"prompt": 1},
        {"request": {"provider": "flux", "n": 10**30}},
        {"request": "x"},
        {"inputs": [{"file": "../../secret.png", "sha256": "0"}]},
        {"inputs": [{"file": "none.png", "sha256": "0"}]},
    ],
)
def test_a_receipt_that_another_user_has_changed_is_refused(person, change):
    person.folders.prompt("cat", "A cat")
    person.once()
    path = person.folders.outbox / "cat.receipt.toml"
    path.write_text(tomli_w.dumps(person.folders.receipt("cat") | change))
    assert refused(person, "cat")


@pytest.mark.parametrize(
    "source", ["a\nb.prompt.txt", "../../x.prompt.txt", ".hidden.prompt.txt", "é" * 120 + ".prompt.txt"]
)
def test_the_new_name_is_one_that_submit_writes_whatever_the_receipt_says(person, source):
    person.folders.prompt("cat", "A cat")
    person.once()
    path = person.folders.outbox / "cat.receipt.toml"
    path.write_text(tomli_w.dumps(person.folders.receipt("cat") | {"source": source}))
    assert person.again(str(path)).returncode == 0
    name = person.new()["name"]
    assert re.fullmatch(r"[\wé]+(-cat)?-[0-9a-f]{6}\.prompt\.txt", name)
    assert len(name.encode()) < 220


def test_names_of_other_senders_reach_no_terminal_unescaped(person):
    assert "\x1b" not in refused(person, "cat\x1b[31m")
