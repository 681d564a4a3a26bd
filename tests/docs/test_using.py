"""The instructions on the pages for people and agents, run exactly as written."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.daemon import until
from support.endpoint import unique_png
from support.pages import page

from imagewatch.protocol import notice
from imagewatch.protocol.prompt import parse

if TYPE_CHECKING:
    from support.daemon import Folders

ROOT = Path(__file__).parents[2]
USING = page("howto/use-the-folder") + page("howto/submit")
SKILL_FILE = ROOT / "imagewatch/skills/imagewatch/SKILL.md"
SKILL = SKILL_FILE.read_text()
PLACE = "/srv/imagewatch"
PROGRAMS = Path(sys.executable).parent


def blocks(page: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


@pytest.fixture
def shell(folders: Folders, start: Any, tmp_path: Path) -> Any:
    """Runs commands unchanged from the page, in a folder with the images that they name."""
    start(folders, "run")
    until((folders.state / "status.json").exists)
    here = tmp_path / "here"
    here.mkdir()
    for name in ("boat.png", "quay.jpg", "harbour.jpg"):
        (here / name).write_bytes(unique_png(name))
    (here / "harbour.prompt.txt").write_text("In the evening")
    (here / "products.csv").write_text("".join(blocks(USING, "csv")))
    (here / "poster.txt").write_text("A poster for {product} in {color}")

    def run(command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", "-euc", command.replace(PLACE, shlex.quote(str(folders.root)))],
            env={"PATH": f"{PROGRAMS}:{os.environ['PATH']}", "HOME": "/nonexistent"},
            cwd=here,
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )

    return run


# The page for people


def test_every_prompt_on_the_page_for_people_can_be_read():
    prompts = [text for text in blocks(USING, "text") if "outbox/" not in text]
    assert len(prompts) == 3
    assert parse(prompts[2].encode()).front.output_format == "webp"
    assert all(parse(text.encode()).text for text in prompts)


def test_every_command_on_the_page_for_people_works(shell, folders, sandbox):
    lines = [line for block in blocks(USING, "sh") for line in block.splitlines() if line.startswith("imagewatch")]
    assert len(lines) == 6
    for line in lines:
        done = shell(line)
        assert done.returncode == 0, done.stderr
        paths = [] if "--dry-run" in line else done.stdout.splitlines()
        assert all(Path(path).exists() or "/inbox/" in path for path in paths)
    until(lambda: len(folders.finished()) == 6)
    assert sorted(len(call["inputs"]) for call in sandbox.report()["calls"]) == [0, 0, 0, 0, 1, 2]
    assert sum(call["prompt"].startswith("A poster for Chair") for call in sandbox.report()["calls"]) == 2


def test_the_documented_error_messages_are_the_real_ones(folders, start):
    folders.environ["IMAGEWATCH_LIMITS__CREDITS_PER_DAY"] = "300"
    folders.prompt("cap", "+++\nn = 4\n+++\nx")
    folders.prompt("family", "+++\nmodel = 'best'\n+++\nx")
    folders.prompt("key", "+++\nqualty = 'high'\n+++\nx")
    folders.prompt("value", "+++\nquality = 'best'\n+++\nx")
    folders.prompt("quotes", "+++\nprovider = openai\n+++\nx")
    folders.prompt("colon", "+++\nprovider: openai\n+++\nx")
    folders.drop("kind.gif", b"GIF89a")
    folders.prompt("kind", "x")
    folders.drop("whole.png", unique_png("a")[:-5])
    folders.prompt("whole", "x")
    folders.prompt("beside", "x")
    folders.drop("beside-2.png", unique_png("a"))
    folders.prompt("fence", "++++\nn = 2\n++++\nx")
    folders.prompt("yaml", "---\nn: 2\n---\nx")
    folders.prompt("page", "<!doctype html>\n<html><head><title>404</title></head>")
    folders.prompt("rich", "{\\rtf1 x}")
    folders.drop("latin.prompt.txt", "Küste".encode("latin-1"))
    folders.prompt("safety", "x [sandbox: 400]")
    folders.prompt("credits", "x [sandbox: 402]")
    start(folders, "run")
    until(lambda: len(folders.finished()) == 16)
    found = {stem: folders.error(stem)["message"] for stem in folders.finished()}
    table = USING.partition("| `message` says")[2].partition("\n\n")[0]
    cells = [row.split(" | ")[0] for row in table.splitlines()[2:]]
    texts = [text.removesuffix(" …") for cell in cells for text in re.findall(r"`(.+?)`", cell)]
    elsewhere = ["it is too large", "it is not supported"]  # test_requests.py has such images
    documented_texts = [text for text in texts if text not in elsewhere]
    assert len(documented_texts) == len(texts) - len(elsewhere)
    refused = ("key", "value", "quotes", "colon", "kind", "beside", "fence", "yaml", "page", "rich", "latin", "whole")
    stems = (*refused, "safety", "credits", "cap", "family")
    for stem, text in zip(stems, documented_texts, strict=True):
        assert text in found[stem]


# The page for agents


def front_matter() -> dict[str, str]:
    """The front matter. It has only plain ``key: value`` lines, so that every reader gets the same."""
    assert SKILL.startswith("---\n")
    lines = SKILL.split("---\n")[1].splitlines()
    return dict(line.split(": ", 1) for line in lines)


def test_the_skill_has_the_format_that_agents_expect():
    front = front_matter()
    assert set(front) <= {"name", "description", "license", "compatibility", "metadata", "allowed-tools"}
    assert front["name"] == SKILL_FILE.parent.name
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", front["name"])
    assert len(front["name"]) <= 64
    assert 1 <= len(front["description"]) <= 1024
    assert not re.search(r": | #|^[\"'\[{&*!|>%@`]|<", front["description"]), "no YAML but plain text"
    assert len(SKILL.splitlines()) < 500
    assert [path.name for path in SKILL_FILE.parent.iterdir()] == ["SKILL.md"], "text only"


def status_file(root: Path, **more: Any) -> None:
    """Write what the daemon writes while the queue is on hold."""
    now = time.time()
    held = notice.HoldNotice(kind="credits", message="Not enough credits", next="add credits")
    values = {"state": "on_hold", "holds": (held,), "waiting": notice.Waiting(count=7), **more}
    times = {"written_at": notice.at(now), "next_writing_at": notice.at(now + 60)}
    content = notice.encode(notice.Notice(**{"version": "1", **times, **values}))
    (root / notice.JSON).write_bytes(content)


def test_the_skill_reads_the_status_file(shell, folders, tmp_path):
    status = blocks(SKILL, "sh")[0]
    until((folders.root / notice.JSON).exists)
    first, *others = shell(status).stdout.splitlines()
    assert re.fullmatch(r"state: running - written at: \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", first)
    assert others == ["waiting: 0 - in flight: 0"]
    held = status.replace(PLACE, shlex.quote(str(tmp_path)))  # where no daemon writes
    status_file(tmp_path)
    first, *others = shell(held).stdout.splitlines()
    assert first.startswith("state: on_hold - written at: ")
    assert others == [
        "on hold: Not enough credits - next: add credits",
        "waiting: 7 - in flight: 0",
    ]
    status_file(tmp_path, next_writing_at=notice.at(time.time() - 61))
    assert shell(held).stdout.startswith("state: not running (the status is overdue) - written at: ")
    status_file(tmp_path, state="stopped", next_writing_at=None, holds=())
    assert shell(held).stdout.startswith("state: stopped - written at: ")


def test_every_command_of_the_skill_works_in_its_order(shell, folders, sandbox):
    commands = blocks(SKILL, "sh")
    assert len(commands) == 7
    _, text, edit, wait, image, prompt, read = commands
    done = shell(text)
    assert done.returncode == 0, done.stderr
    alt = r'A lighthouse at dusk, "Last Light" in \$5 letters on its wall'
    assert re.fullmatch(rf"!\[{alt}\]\(\.\./watched/outbox/lighthouse-3f9c\.\w+\)\n", done.stdout)
    assert re.fullmatch(r"1 image, \d+ credits\.\n", done.stderr)
    assert folders.receipt("lighthouse-3f9c")["prompt"].startswith('A lighthouse at dusk, "Last Light" in $5')
    done = shell(edit)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("![Put the boat into the harbor](../watched/outbox/harbor-71d0-") == 2
    assert shell(wait).stdout.endswith("outbox/lighthouse-3f9c.receipt.toml\n")
    for command in (image, prompt, wait.replace("lighthouse-3f9c", "boat-9a41")):
        done = shell(command)
        assert done.returncode == 0, done.stderr
    receipt = tomllib.loads((folders.outbox / "boat-9a41.receipt.toml").read_text())
    assert (receipt["prompt"], len(receipt["inputs"])) == ("The boat at night", 1)
    assert shell(read).stdout.splitlines() == [
        "charged = yes",
        f"image = {receipt['images'][0]['file']}",
    ], "nothing of the input, and no credits"
    assert sandbox.report()["requests"] == 3


def test_the_skill_reads_the_keys_of_a_receipt_and_not_the_text_of_its_prompt(shell, folders):
    read = blocks(SKILL, "sh")[6]
    text = 'Write:\n[[images]]\nfile = "no.png"\ncharged = "no"\n""" [[images]]\nfile = "no.png"\nEnd'
    front = '+++\ninput_images = ["boat-9a41.in1.png"]\nn = 2\n+++\n'
    folders.drop("boat-9a41.in1.png", unique_png("boat"))
    folders.prompt("boat-9a41", front + text)
    until(lambda: folders.finished() == {"boat-9a41": "outbox"})
    receipt = folders.receipt("boat-9a41")
    assert receipt["prompt"] == text
    found = shell(read).stdout.splitlines()
    assert found[1:] == [f"image = {image['file']}" for image in receipt["images"]]


def test_the_skill_reads_an_error_file(shell, folders):
    read = blocks(SKILL, "sh")[6].replace("outbox/boat-9a41.receipt.toml", "errors/boat-9a41.error.toml")
    folders.prompt("boat-9a41", "+++\nn = 9\nqualty = 'high'\n+++\nx")
    until(lambda: folders.finished() == {"boat-9a41": "errors"})
    error = folders.error("boat-9a41")
    assert shell(read).stdout.splitlines() == [
        f"message = {error['message']}",
        f"next = {error['next']}",
        "charged = no",
        *(f"problem = {problem}" for problem in error["problems"]),
    ]


def test_waiting_as_in_the_skill_ends_when_there_is_an_error_file(shell, folders):
    wait = blocks(SKILL, "sh")[3]
    folders.prompt("lighthouse-3f9c", "x [sandbox: 400]")
    assert shell(wait).stdout.endswith("errors/lighthouse-3f9c.error.toml\n")


def test_no_prompt_in_the_skill_is_an_argument_of_a_command():
    for command in blocks(SKILL, "sh"):
        for line in command.splitlines():
            if line.startswith("imagewatch submit"):
                words = shlex.split(line.partition(" <<")[0])[2:]
                values = {"--root", "--name", "--timeout", "--format", "--image", "-n"}
                free = [
                    w for before, w in zip(["", *words], words, strict=False) if w[0] != "-" and before not in values
                ]
                assert (free, line.endswith(" <<'END'")) == ([], True)


def test_the_exit_codes_of_the_skill_are_those_of_the_command():
    found = set(re.findall(r"^\| (\d\d?) \|", SKILL, re.MULTILINE))
    assert found == {"0", "1", "64", "69", "70", "74"}
    assert shutil.which("sh")
