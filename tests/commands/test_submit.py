"""The command ``submit`` from outside: a real daemon, a real endpoint on the loopback, real folders."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pytest
from PIL import Image
from support.daemon import KEY, TESTS, Folders, run_reported, until
from support.daemon import command as command_of
from support.inotify import MOVED_TO, Events
from support.losing import SteppingDisk

from imagewatch.commands import submit as command
from imagewatch.commands.drop import Delivery, SubmitRequest
from imagewatch.commands.main import cli, main
from imagewatch.config.load import load
from imagewatch.system.errors import BadRequest, SpoolError

if TYPE_CHECKING:
    from imagewatch.sandbox import Sandbox

RUNNER = str(TESTS / "support/submit_runner.py")
INTERRUPTER = str(TESTS / "support/interrupt_runner.py")
HOSTILE = '](x) ![a](b) <b>&lt; *_`\\ \x1b[31m\x07\r\n\n second\u202eline "quoted"'


def plain_image(kind: str = "PNG", color: tuple[int, int, int] = (58, 110, 150)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 48), color).save(file, kind)
    return file.getvalue()


IMAGE = plain_image()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Sender:
    """A sender who knows only the folders: no key, no URL, no state folder."""

    def __init__(self, folders: Folders, home: Path) -> None:
        self.folders = folders
        self.home = home
        home.mkdir()
        config = home / "imagewatch.toml"
        config.write_text(
            f'[folders]\nroot = "{folders.root}"\nstate = "/nonexistent/state"\n[presets.poster]\nsize = "1024x1536"\n'
        )
        self.environ = {"PATH": os.environ["PATH"], "HOME": str(home), "COLUMNS": "80"}
        self.known = {**self.environ, "IMAGEWATCH_CONFIG": str(config)}

    def submit(
        self,
        *arguments: str | bytes,
        stdin: bytes = b"",
        cwd: Path | None = None,
        environ: dict[str, str] | None = None,
        before: tuple[str, ...] = (),
    ) -> subprocess.CompletedProcess[str]:
        """Run ``submit`` and wait for its end."""
        done = run_reported(
            [*before, sys.executable, "-m", "imagewatch", "submit", *arguments],
            env=self.known if environ is None else environ,
            input=stdin,
            cwd=cwd or self.home,
        )
        out, err = done.stdout.decode(), done.stderr.decode()
        assert "Traceback" not in err
        assert KEY not in out + err
        return subprocess.CompletedProcess(done.args, done.returncode, out, err)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Run ``submit`` in the background."""
        return subprocess.Popen(
            [sys.executable, "-m", "imagewatch", "submit", *arguments],
            env=self.known,
            cwd=self.home,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def file(self, name: str, content: bytes | str = IMAGE) -> str:
        path = self.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def dropped(self) -> list[str]:
        """The files in the inbox, including hidden ones."""
        return [name for name in self.folders.names("inbox") if not name.startswith(".imagewatch")]


@pytest.fixture
def sender(folders: Folders, tmp_path: Path) -> Sender:
    return Sender(folders, tmp_path / "home")


@pytest.fixture
def watched(folders: Folders, start: Any) -> Any:
    """A daemon that is watching."""
    running = start(folders, "run")
    until((folders.state / "status.json").exists)
    return running


AGAIN = "Do not run the command again: it would drop {0} again, and you would pay twice:\n"


def call(sandbox: Sandbox, number: int = 0) -> dict[str, Any]:
    return sandbox.report()["calls"][number]


# Completed prompts


def test_a_text_becomes_an_image_and_its_path_and_price_are_printed(sender, sandbox, watched):
    done = sender.submit("A lighthouse at dusk", "--wait")
    assert done.returncode == 0, done.stderr
    (path,) = done.stdout.splitlines()
    with Image.open(path) as image:
        image.load()
    assert done.stderr == f"1 image, {call(sandbox)['credits']} credits.\n"
    assert Path(path).parent == sender.folders.outbox
    assert re.fullmatch(r"a-lighthouse-at-dusk-[0-9a-f]{6}", Path(path).stem)
    assert call(sandbox)["prompt"] == "A lighthouse at dusk"
    assert sender.dropped() == []


def test_a_submitted_prompt_is_claimed_immediately_however_long_others_have_to_settle(tmp_path, sandbox, start):
    folders = Folders(tmp_path, sandbox.base_url, inbox__settle_seconds="3000", inbox__rescan_seconds="3000")
    sender = Sender(folders, tmp_path / "home")
    start(folders, "run")
    until((folders.state / "status.json").exists)
    done = sender.submit("Make it blue", "--image", sender.file("a.png"), "--wait", "--timeout", "30")
    assert done.returncode == 0, done.stderr


def test_without_waiting_the_name_of_the_prompt_is_printed_and_no_daemon_is_needed(sender):
    done = sender.submit("A cat")
    assert (done.returncode, done.stderr) == (0, "")
    (path,) = done.stdout.splitlines()
    assert Path(path).read_text() == "+++\ninput_images = []\n+++\nA cat\n"
    assert sender.dropped() == [Path(path).name]


def test_without_waiting_json_contains_the_prompts(sender):
    done = sender.submit("A cat", "A dog", "--format", "json")
    result = json.loads(done.stdout)
    assert [one["prompt"] for one in result] == ["A cat", "A dog"]
    assert sorted(one["source"] for one in result) == sender.dropped()
    assert {one["destination"] for one in result} == {None}


def test_many_prompts_in_one_call_are_printed_in_their_order(sender, sandbox, watched):
    prompts = [f"Number {number}" for number in range(7)]
    done = sender.submit(*prompts, "--wait", "--format", "json", "--name", "many")
    result = json.loads(done.stdout)
    assert [one["prompt"] for one in result] == prompts
    assert [one["source"] for one in result] == [f"many-{number}.prompt.txt" for number in range(1, 8)]
    assert [Path(one["images"][0]).name for one in result] == [f"many-{number}.jpg" for number in range(1, 8)]
    assert sum(one["credits_charged"] for one in result) == sandbox.report()["credits"]
    assert sandbox.report()["requests"] == 7
    assert done.stderr.startswith("7 images, ")


def test_all_options_reach_the_request(sender, watched):
    options = {"provider": "openai", "model": "gpt-image-2", "size": "1024x1536", "quality": "high"}
    options |= {"output-format": "webp", "seed": "7"}
    given = [part for name, value in options.items() for part in (f"--{name}", value)]
    done = sender.submit("A cat", "-n", "2", *given, "--wait", "--name", "cat")
    assert done.returncode == 0, done.stderr
    assert [Path(path).name for path in done.stdout.splitlines()] == ["cat-1.webp", "cat-2.webp"]
    assert sender.folders.receipt("cat")["request"] == {
        **{name: value for name, value in options.items() if "-" not in name},
        "output_format": "webp",
        "seed": 7,
        "n": 2,
    }


def test_options_of_a_file_are_used_and_those_of_the_command_line_override_them(sender, sandbox, watched):
    file = sender.file("far/away.txt", '\ufeff+++\nprovider = "gemini"\nn = 3\nseed = 5\n+++\r\nA cat\r\nand a dog\r\n')
    done = sender.submit("--from", file, "-n", "2", "--wait", "--format", "json", cwd=Path("/"))
    (result,) = json.loads(done.stdout)
    assert (call(sandbox)["provider"], call(sandbox)["prompt"]) == ("gemini", "A cat\nand a dog")
    assert len(result["images"]) == 2
    assert sender.folders.receipt(Path(result["source"]).name.removesuffix(".prompt.txt"))["request"]["seed"] == 5


def test_images_that_a_file_names_are_those_beside_it(sender, sandbox, watched):
    for number, name in enumerate(("far/logo.png", "far/cat.png", "logo.png")):
        sender.file(name, plain_image(color=(number, 0, 0)))
    sender.file("far/it.txt", '+++\ninput_images = ["logo.png", "cat.png"]\n+++\nBoth')
    done = sender.submit("--from", "far/it.txt", "--wait")
    assert done.returncode == 0, done.stderr
    assert call(sandbox)["inputs"] == [sha256(plain_image(color=(number, 0, 0))) for number in (0, 1)]


def test_a_file_with_the_name_of_a_prompt_is_sent_with_the_images_it_would_have_in_the_inbox(sender, sandbox, watched):
    for number, name in enumerate(("cat.png", "cat.1.png", "catalog.png")):
        sender.file(name, plain_image(color=(number, 0, 0)))
    file = sender.file("cat.prompt.txt", "Make it blue")
    done = sender.submit("--from", file, "--wait")
    assert done.returncode == 0, done.stderr
    assert call(sandbox)["inputs"] == [sha256(plain_image(color=(number, 0, 0))) for number in (0, 1)]


def test_images_of_the_command_line_replace_those_of_the_file(sender, sandbox, watched):
    sender.file("cat.png", plain_image(color=(1, 0, 0)))
    file = sender.file("cat.prompt.txt", "Make it blue")
    other = sender.file("other.png", plain_image(color=(2, 0, 0)))
    assert sender.submit("--from", file, "--image", other, "--wait").returncode == 0
    assert call(sandbox)["inputs"] == [sha256(plain_image(color=(2, 0, 0)))]


@pytest.mark.parametrize("arguments", [[], ["--from", "-"], ["-"]])
def test_standard_input_is_read(sender, arguments):
    done = sender.submit(*arguments, "--name", "cat", stdin="+++\nn = 2\n+++\nEin Kätzchen\n".encode())
    assert done.returncode == 0, done.stderr
    dropped = (sender.folders.inbox / "cat.prompt.txt").read_text()
    assert dropped == "+++\nn = 2\ninput_images = []\n+++\nEin Kätzchen\n"


def test_files_and_texts_can_be_combined(sender):
    one = sender.file("one.txt", "from one")
    done = sender.submit("from the line", "--from", one, "--from", "-", "--name", "it", stdin=b"from the input")
    assert done.returncode == 0, done.stderr
    texts = [(sender.folders.inbox / f"it-{k}.prompt.txt").read_text().splitlines()[-1] for k in (1, 2, 3)]
    assert texts == ["from the line", "from one", "from the input"]


def test_images_keep_their_order_and_get_the_file_ending_of_their_type(sender, sandbox, watched):
    contents = [plain_image("PNG"), plain_image("JPEG"), plain_image("WEBP"), plain_image("PNG", (9, 9, 9))]
    paths = [
        sender.file(name, content)
        for name, content in zip(("png.jpg", "none", "images/a b.Webp", "zzz.png"), contents, strict=True)
    ]
    (sender.home / "link.png").symlink_to(paths[3])
    given = [*paths[:3], "link.png"]
    done = sender.submit("All", *(part for path in given for part in ("--image", path)), "--wait", "--name", "all")
    assert done.returncode == 0, done.stderr
    assert call(sandbox)["inputs"] == [sha256(content) for content in contents]
    names = [item["file"] for item in sender.folders.receipt("all")["inputs"]]
    assert names == ["all.in1.png", "all.in2.jpeg", "all.in3.webp", "all.in4.png"]
    assert Path(paths[0]).read_bytes() == contents[0], "the sender keeps what is the sender's"


# Refused prompts


def refused(sender: Sender, *arguments: str | bytes, **more: Any) -> str:
    """Submit something invalid; return the message. Nothing may remain in the inbox."""
    before = sender.dropped()
    done = sender.submit(*arguments, **more)
    assert done.returncode == 64, done.stderr
    assert done.stdout == ""
    assert sender.dropped() == before
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", done.stderr)
    return done.stderr


def test_every_problem_of_the_images_is_reported_and_nothing_is_dropped(sender):
    broken, gif = sender.file("broken.png", IMAGE[:-9]), sender.file("a.png", plain_image("GIF"))
    page = sender.file("p")
    Path(page).write_text("<html>")
    os.mkfifo(sender.home / "pipe.png")
    given = ["missing.png", broken, gif, page, "pipe.png", str(sender.home), sender.file("good.png")]
    result = refused(sender, "A cat", *(part for path in given for part in ("--image", path)), "--wait")
    for path, words in (
        ("missing.png", "no such file"),
        (broken, "not a whole image"),
        (gif, "GIF"),
        (page, "its content is"),
        ("pipe.png", "not a plain file"),
        (str(sender.home), "cannot be read|not a plain file"),
    ):
        assert re.search(f"^imagewatch: {re.escape(path)}: .*({words})", result, re.MULTILINE), path
    assert "good.png" not in result
    assert result.endswith("  Nothing was dropped.\n")


def test_if_one_of_many_prompts_is_wrong_none_is_dropped(sender):
    bad = sender.file("bad.txt", "+++\ncolour = 1\n+++\nx")
    result = refused(sender, "fine", "--from", bad, "--from", sender.file("empty.txt", " \n"))
    assert f"{bad}: colour: unknown key" in result
    assert "empty.txt: prompt: there is no text" in result
    result = refused(sender, "fine", "", "--size", "")
    assert "prompt 2: prompt: there is no text" in result
    assert "prompt 1: size:" in result


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x" * 32_001], "32,001 characters"),
        (["A cat", "--model", ""], "model"),
        (["A cat", "--seed", str(2**60)], "seed"),
        (["A cat", "--preset", "postr"], 'did you mean "poster"'),
        ([b"caf\xe9"], "not UTF-8"),
        (["--from", "nowhere.txt"], "No such file"),
        (["--from", "."], "is not a plain file"),
        (["A cat", "-n", "5"], "range"),
        (["A cat", "--provider", "dall-e"], "dall-e"),
        (["A cat", "--timeout", "5"], "--wait"),
        (["A cat", "--format", "markdown"], "--wait"),
        *((["A cat", "--wait", "--timeout", seconds], "--timeout") for seconds in ("nan", "inf", "-inf", "-1")),
    ],
)
def test_a_prompt_that_the_daemon_would_refuse_is_refused_before_it_is_dropped(sender, arguments, words):
    assert words in refused(sender, *arguments)


def test_a_file_that_its_folder_does_not_list_under_this_name_is_refused_because_its_images_would_be_missing(sender):
    with pytest.raises(BadRequest, match=r"cat\.prompt\.txt: its folder lists no file of exactly this name"):
        SubmitRequest.of_file(b"Make it blue", str(sender.home / "cat.prompt.txt"), {}, ())


def test_a_pipe_is_refused_as_a_prompt_file_and_not_waited_for(sender):
    os.mkfifo(sender.home / "cat.prompt.txt")
    assert "cat.prompt.txt: is not a plain file" in refused(sender, "--from", str(sender.home / "cat.prompt.txt"))


def test_the_limits_of_the_configuration_are_checked(sender):
    config = sender.home / "imagewatch.toml"
    config.write_text(config.read_text() + '[limits]\nproviders = ["flux"]\nmax_n = 1\n')
    result = refused(sender, "A cat", "-n", "2", "--provider", "openai")
    assert "limits.providers" in result
    assert "limits.max_n" in result


@pytest.mark.parametrize("name", ["", ".hidden", "~x", "#x", "a/b", "../x", "x\ny", "x\x1b[31m", "x" * 201, b"caf\xe9"])
def test_invalid_names_of_prompts_are_refused(sender, name):
    assert "name: " in refused(sender, "A cat", "--name", name)


@pytest.mark.parametrize("folder", ["..", "a/../..", "/etc", "a\nb", b"\xe9"])
def test_folders_that_are_never_scanned_are_refused(sender, folder):
    assert "folder: " in refused(sender, "A cat", "--folder", folder)
    assert [path.name for path in sender.folders.inbox.iterdir()] == []


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        *((folder, "hidden folder") for folder in (".x", "a/.x", ".Trash-1000", "a/.git/b")),
        *((folder, "recycle bin") for folder in ("@Recycle", "@eaDir", "a/RECYCLER/b", "lost+found", "#recycle")),
        *((folder, "begins with @, #, ~ or $") for folder in ("~x", "#x", "$x", "@x")),
    ],
)
def test_a_folder_that_is_never_entered_is_refused_with_the_reason(sender, folder, words):
    said = refused(sender, "A cat", "--folder", folder)
    assert words in " ".join(said.split())
    assert "never entered" in " ".join(said.split())
    assert [path.name for path in sender.folders.inbox.iterdir()] == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cat.MP.jpg", IMAGE),
        ("Cat.png", IMAGE),
        ("cat (1).png", IMAGE),
        ("cat.unknown", IMAGE),
        ("cat.1.mp4", b"\0"),
    ],
)
def test_a_prompt_file_is_not_dropped_without_a_file_beside_it_that_may_be_meant(sender, name, content):
    sender.file(name, content)
    path = sender.file("cat.prompt.txt", "Make it night")
    said = " ".join(refused(sender, "--from", path).split())
    assert f"{name}: may be meant as an image, and is not used" in said
    assert "input_images = []" in said
    assert [path.name for path in sender.folders.inbox.iterdir()] == []
    image = sender.file("other.png")
    done = sender.submit("--from", path, "--image", image)
    assert done.returncode == 0, done.stderr
    sender.file("cat.prompt.txt", "+++\ninput_images = []\n+++\nMake it night")
    assert sender.submit("--from", path, "--name", "dog").returncode == 0


def test_a_prompt_file_beside_texts_is_dropped(sender):
    for name in ("cat.log", "cat.json", "cat.txt", "cat.png.bak"):
        sender.file(name, '{"plain": "text"}')
    assert sender.submit("--from", sender.file("cat.prompt.txt", "A cat")).returncode == 0


@pytest.mark.parametrize("text", ["\n+++\nn = 2\n+++\na cat", "```\na cat\n```", "<html><body>", "{\\rtf1 a cat}"])
def test_a_file_that_is_clearly_no_prompt_is_not_dropped(sender, text):
    assert "prompt" in refused(sender, "--from", sender.file("cat.prompt.txt", text))
    assert [path.name for path in sender.folders.inbox.iterdir()] == []


def test_a_folder_that_is_a_link_is_refused(sender, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (sender.folders.inbox / "link").symlink_to(tmp_path / "elsewhere")
    assert "is a symbolic link" in refused(sender, "A cat", "--folder", "link")
    assert "points outside the inbox" in refused(sender, "A cat", "--folder", "../x")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_folder_is_refused_where_the_daemon_does_not_scan_folders(sender):
    config = sender.home / "imagewatch.toml"
    config.write_text(config.read_text() + "[inbox]\nrecursive = false\n")
    assert "inbox.recursive" in refused(sender, "A cat", "--folder", "poster")


def test_on_a_terminal_a_missing_prompt_is_an_error_and_not_waited_for(sender):
    master, slave = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "imagewatch", "submit"],
        env=sender.known,
        stdin=slave,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    os.close(slave)
    os.close(master)
    assert done.returncode == 64
    assert "no prompt: give its text" in done.stderr


# Names and folders


def test_a_prompt_that_waits_in_the_inbox_is_not_replaced(sender):
    sender.folders.prompt("cat", "another user's")
    result = refused(sender, "A cat", "--name", "cat", "--image", sender.file("a.png"))
    assert "cat.prompt.txt: the inbox has a file of this name" in result
    assert (sender.folders.inbox / "cat.prompt.txt").read_text() == "another user's"


def test_if_the_name_appears_while_images_are_placed_none_of_them_remains(sender, folders):
    config = load(str(sender.home / "imagewatch.toml"), {})
    with Delivery(config, "") as delivery:
        delivery.stage(SubmitRequest("one", {}, (sender.file("a.png"),)), "one")
        delivery.stage(SubmitRequest("two", {}, (sender.file("a.png"), sender.file("b.png"))), "two")
        folders.prompt("two", "another user's")
        placed = delivery.place()
        assert next(placed).source == "one.prompt.txt"
        with pytest.raises(BadRequest, match=r"two\.prompt\.txt"):
            next(placed)
    assert sender.dropped() == ["one.in1.png", "one.prompt.txt", "two.prompt.txt"]
    assert (folders.inbox / "two.prompt.txt").read_text() == "another user's"


class FailingDisk(SteppingDisk):
    """A disk on which one file gets its final name only in part, or not at all.

    Args:
        name: The file.
        late: Whether the rename happens but is reported as failed, as by a server that responds late.
    """

    def __init__(self, name: str, *, late: bool = False) -> None:
        self._name = name
        self._late = late

    def rename(self, source: str, target: str) -> None:
        if not target.endswith(self._name):
            super().rename(source, target)
            return
        if self._late:
            super().rename(source, target)
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.fixture
def inside(sender, monkeypatch, capsys):
    """Run ``submit`` in this process, on a disk that fails."""
    for name in ("IMAGEWATCH_CONFIG", "HOME"):
        monkeypatch.setenv(name, sender.known[name])

    def call(disk: SteppingDisk, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("imagewatch.commands.drop.Disk", lambda: disk)
        monkeypatch.setattr(sys, "argv", ["imagewatch", "submit", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return call


def test_a_disk_error_between_prompts_does_not_hide_those_that_are_already_in_the_inbox(sender, inside):
    code, out, err = inside(FailingDisk("it-2.prompt.txt"), "One", "Two", "Three", "--name", "it")
    assert (code, out) == (69, f"{sender.folders.inbox}/it-1.prompt.txt\n")
    assert f"cannot drop the file: Input/output error: {sender.folders.inbox}/it-2.prompt.txt\n" in err
    assert "1 of 3 prompts was dropped. The daemon will process it. The others were not dropped.\n" in err
    assert err.endswith(f"{AGAIN.format('this prompt')}  {sender.folders.inbox}/it-1.prompt.txt\n")
    assert sender.dropped() == ["it-1.prompt.txt"]


def test_json_lists_the_dropped_prompts_if_the_others_could_not_be_dropped(sender, inside):
    code, out, _ = inside(FailingDisk("it-3.prompt.txt"), "One", "Two", "Three", "--name", "it", "--wait", "--json")
    assert code == 69
    assert [(one["source"], one["destination"]) for one in json.loads(out)] == [
        ("it-1.prompt.txt", None),
        ("it-2.prompt.txt", None),
    ]
    code, out, err = inside(FailingDisk("so-2.prompt.txt"), "One", "Two", "--name", "so", "--wait")
    assert (code, out) == (69, ""), "with --wait only images are printed"
    assert err.endswith(f"{sender.folders.inbox}/so-1.prompt.txt\n")


def test_if_none_could_be_dropped_it_is_a_disk_error_and_nothing_remains(sender, inside):
    code, out, err = inside(
        FailingDisk("it-1.prompt.txt"), "One", "Two", "--name", "it", "--image", sender.file("a.png")
    )
    assert (code, out) == (74, "")
    assert "will be made" not in err
    assert sender.dropped() == []


def test_a_completed_rename_is_no_failure_even_if_the_server_reports_an_error(sender, inside):
    image = sender.file("a.png")
    code, out, err = inside(FailingDisk("it.prompt.txt", late=True), "One", "--name", "it", "--image", image)
    assert (code, out, err) == (0, f"{sender.folders.inbox}/it.prompt.txt\n", "")
    assert sender.dropped() == ["it.in1.png", "it.prompt.txt"]


class UnsyncedDisk(SteppingDisk):
    """A disk that cannot sync a folder."""

    def sync_folder(self, path: str) -> None:
        raise SpoolError(f"{path}: cannot write the folder to disk", path=path, code=errno.EIO)


def test_a_prompt_that_could_not_be_synced_counts_as_dropped(sender, inside):
    code, out, err = inside(UnsyncedDisk(), "One", "Two", "--name", "it")
    assert (code, len(out.splitlines())) == (0, 2)
    assert err.count("the prompts are dropped, but may be lost if the power fails") == 1
    assert sender.dropped() == ["it-1.prompt.txt", "it-2.prompt.txt"]


class LinkingDisk(SteppingDisk):
    """A disk on which another program creates a link first, in the place of a new folder.

    Args:
        target: The target of the link.
    """

    def __init__(self, target: Path) -> None:
        self._target = target

    def make_folder(self, path: str, mode: int = 0o700) -> None:
        os.symlink(self._target, path)
        super().make_folder(path, mode)


def test_a_link_in_the_place_of_a_new_folder_changes_nothing_elsewhere(sender, inside, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    sender.folders.inbox.chmod(0o777)
    code, out, err = inside(LinkingDisk(elsewhere), "A cat", "--folder", "new")
    assert (code, out) == (74, "")
    assert "a symbolic link is where a folder should be" in err
    assert (elsewhere.stat().st_mode & 0o7777, list(elsewhere.iterdir())) == (0o700, [])


def test_the_images_of_a_prompt_are_no_siblings_of_another_one(sender, folders):
    """``cat.1.prompt.txt``, dropped manually, would use a ``cat.1.png`` as its image and pay for a wrong edit."""
    for stem in ("cat.1", "cat.in", "other"):
        folders.prompt(stem, "not from submit")
    paths = [sender.file(f"{number}.png") for number in range(4)]
    sender.submit("A cat", "--name", "cat", *(part for path in paths for part in ("--image", path)))
    done = subprocess.run(
        [sys.executable, "-m", "imagewatch", "check"],
        env={**sender.environ, **folders.environ},
        capture_output=True,
        text=True,
        check=False,
    )
    rows = dict(re.findall(r"^take +(\S+) +(.+)$", done.stdout, re.MULTILINE))
    assert rows["cat.prompt.txt"] == "gemini, with " + ", ".join(f"cat.in{number}.png" for number in range(1, 5))
    assert rows["cat.1.prompt.txt"] == rows["cat.in.prompt.txt"] == rows["other.prompt.txt"] == "flux"


def test_results_whose_name_existed_are_found_and_not_confused_with_older_ones(sender, sandbox, watched):
    (sender.folders.outbox / "cat.jpg").write_bytes(b"another user's")
    first = json.loads(sender.submit("First", "--name", "cat", "--wait", "--format", "json").stdout)[0]
    second = json.loads(sender.submit("Second", "--name", "cat", "--wait", "--format", "json").stdout)[0]
    third = json.loads(sender.submit("[sandbox: 400]", "--name", "cat", "--wait", "--format", "json").stdout)[0]
    fourth = json.loads(sender.submit("[sandbox: 400]", "--name", "cat", "--wait", "--format", "json").stdout)[0]
    assert [one["destination"] for one in (first, second, third, fourth)] == ["outbox", "outbox", "errors", "errors"]
    assert Path(third["result_file"]).name == "cat.error.toml"
    for one in (first, second, fourth):
        assert Path(one["result_file"]).name.startswith(f"cat.{one['job'][:4]}.")
    assert Path(first["images"][0]).name == f"cat.{first['job'][:4]}.jpg"
    assert len({one["job"] for one in (first, second, third, fourth)}) == 4
    assert sandbox.report()["requests"] == 4


def _touched_by_a_chmod(result_file: Path) -> None:
    result_file.chmod(0o600)


def _linked_by_a_backup(result_file: Path) -> None:
    os.link(result_file, result_file.parent.parent / "backup")


def _copied_under_the_name_of_a_newer_one(result_file: Path) -> None:
    stem, _, ending = result_file.name.partition(".")
    shutil.copy2(result_file, result_file.with_name(f"{stem}.0123.{ending}"))


@pytest.mark.parametrize("text", ["Again", "Again [sandbox: 400]"])
@pytest.mark.parametrize("touch", [_touched_by_a_chmod, _linked_by_a_backup, _copied_under_the_name_of_a_newer_one])
def test_an_older_result_that_is_touched_meanwhile_is_not_confused_with_the_new_one(
    sender, folders, start, text, touch
):
    folders.prompt("cat", text)
    command_of(folders, "once")
    (old,) = [*folders.outbox.glob("*.toml"), *folders.errors.glob("*.toml")]
    waiting = sender.start(text, "--name", "cat", "--wait", "--timeout", "3", "--json")
    until((folders.inbox / "cat.prompt.txt").exists)
    touch(old)
    (old.parent / "something else").touch()  # the folder is scanned again
    out, _ = waiting.communicate(timeout=30)
    assert (waiting.returncode, json.loads(out)[0]["destination"]) == (69, None)
    assert sender.dropped() == ["cat.prompt.txt"], "it waits to be paid for"


def test_a_result_that_appears_under_the_name_of_a_removed_one_is_found(sender, sandbox, watched):
    first = json.loads(sender.submit("Again", "--name", "cat", "--wait", "--format", "json").stdout)[0]
    sandbox.hold()
    second = sender.start("Again", "--name", "cat", "--wait", "--format", "json")
    assert sandbox.wait_for_requests(2, timeout=20)
    for path in (first["result_file"], *first["images"]):
        Path(path).unlink()
    sandbox.release()
    out, err = second.communicate(timeout=30)
    assert second.returncode == 0, err
    (result,) = json.loads(out)
    assert result["job"] != first["job"]
    assert result["result_file"] == first["result_file"]


def test_the_receipt_of_an_earlier_prompt_of_the_same_name_is_not_confused_with_the_new_one(sender, sandbox, watched):
    sandbox.hold()
    assert sender.submit("The earlier one", "--name", "cat").returncode == 0
    assert sandbox.wait_for_requests(1, timeout=20)
    other = sender.start("The later one", "--name", "cat", "--wait", "--format", "json")
    until((sender.folders.inbox / "cat.prompt.txt").exists)
    sandbox.release()
    out, err = other.communicate(timeout=30)
    assert other.returncode == 0, err
    result_file = json.loads(out)[0]["result_file"]
    assert 'prompt = "The later one"' in Path(result_file).read_text()


def test_a_folder_named_like_a_preset_is_created_and_applies_it(tmp_path, sandbox, start):
    folders = Folders(tmp_path, sandbox.base_url, presets__poster__size="1024x1536")
    sender = Sender(folders, tmp_path / "home")
    folders.inbox.chmod(0o2775)
    start(folders, "run")
    done = sender.submit("A cat", "--folder", "poster/mein Frühling/", "--name", "cat", "--wait")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folders.outbox}/poster/mein Frühling/cat.png\n"
    assert folders.receipt("poster/mein Frühling/cat")["request"]["size"] == "1024x1536"
    for made in ("poster", "poster/mein Frühling"):
        assert (folders.inbox / made).stat().st_mode & 0o7777 == 0o2775


@pytest.mark.parametrize(
    ("new", "similar"),
    [("psoter", "poster"), ("postr/may", "poster"), ("hana", "hanna"), ("2026-11", ""), ("poster", ""), ("cats", "")],
)
def test_a_new_folder_is_named_with_a_similar_one_that_may_have_been_meant(tmp_path, sandbox, new, similar):
    folders = Folders(tmp_path, sandbox.base_url, presets__poster__size="1024x1536")
    sender = Sender(folders, tmp_path / "home")
    for name in ("hanna", "2026-10"):
        (folders.inbox / name).mkdir()
    done = sender.submit("A cat", "--folder", new)
    note = f'imagewatch: the folder "{new.partition("/")[0]}" is new; did you mean "{similar}"?\n'
    assert (done.returncode, "is new" in done.stderr) == (0, bool(similar))
    assert not similar or note in done.stderr
    again = sender.submit("A dog", "--folder", new)
    assert "is new" not in again.stderr


def test_a_preset_can_be_asked_for(sender):
    sender.submit("A cat", "--preset", "poster", "--name", "cat")
    assert 'preset = "poster"' in (sender.folders.inbox / "cat.prompt.txt").read_text()


# A share, without configuration


def test_on_a_share_the_root_is_enough_and_the_presets_are_checked_by_the_daemon(tmp_path, sandbox, start):
    folders = Folders(tmp_path, sandbox.base_url, presets__poster__size="1024x1536")
    sender = Sender(folders, tmp_path / "home")
    start(folders, "run")
    environ = {**sender.environ, "IMAGEWATCH_FOLDERS__INBOX": "/wrong", "LETTA_BASE_URL": "not a url"}
    done = sender.submit(
        "A cat", "--root", "../watched", "--preset", "poster", "--name", "cat", "--wait", environ=environ
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folders.outbox}/cat.png\n"
    assert folders.receipt("cat")["request"]["size"] == "1024x1536"


def test_on_a_share_that_is_not_mounted_no_folders_are_created(sender, tmp_path):
    done = sender.submit("A cat", "--root", str(tmp_path / "wrong"), environ=sender.environ)
    assert done.returncode == 74
    assert "no such inbox" in done.stderr
    assert "mounted" in done.stderr
    assert not (tmp_path / "wrong").exists()


def test_without_configuration_and_root_it_exits_with_78(sender):
    (sender.home / "imagewatch.toml").unlink()
    done = sender.submit("A cat", environ=sender.environ)
    assert done.returncode == 78
    assert "folders.root" in done.stderr


# Output


def test_markdown_lines_have_relative_paths_from_any_folder(sender, watched, tmp_path):
    here = tmp_path / "some where" / "else"
    here.mkdir(parents=True)
    name = "Ärger (1) [x] & 50%"
    done = sender.submit(
        HOSTILE, "--name", name, "--folder", "große Bilder", "--wait", "--format", "markdown", cwd=here
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    alt, target = re.fullmatch(r"!\[((?:[^\[\]\\]|\\.)*)\]\(([^()\s<>]+)\)", line).groups()
    assert (here / unquote(target)).resolve() == sender.folders.outbox / "große Bilder" / f"{name}.jpg"
    assert target.startswith("../../watched/outbox/")
    assert line.isprintable()
    assert not re.search(r"(?<!\\)[<*_`!&\[\]]", alt)
    assert re.sub(r"\\(.)", r"\1", alt).startswith("](x) ![a](b) <b>&lt; *_`\\ \\x1b[31m\\x07 second\\u202eline")


def test_paths_and_json_name_the_same_files_in_folders_with_spaces(sender, watched):
    done = sender.submit("A cat", "-n", "2", "--folder", "mein Bild", "--name", "Kätzchen", "--wait")
    paths = [Path(line) for line in done.stdout.splitlines()]
    assert [path.name for path in paths] == ["Kätzchen-1.jpg", "Kätzchen-2.jpg"]
    assert all(path.is_file() for path in paths)
    again = sender.submit(HOSTILE, "--folder", "mein Bild", "--wait", "--format", "json")
    (result,) = json.loads(again.stdout)
    assert Path(result["images"][0]).is_file()
    assert Path(result["result_file"]).parent == sender.folders.outbox / "mein Bild"
    assert result["prompt"] == HOSTILE.replace("\r\n", "\n")
    assert (result["charged"], result["destination"], result["message"]) == ("yes", "outbox", None)
    assert again.stdout.isascii()


def test_fewer_images_than_asked_for_are_printed_and_the_rest_is_reported(sender, watched):
    done = sender.submit("Four [sandbox: fewer]", "-n", "4", "--name", "it", "--wait", "--format", "markdown")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 3
    assert "it.prompt.txt: asked for 4, got 3" in done.stderr
    assert "3 images, " in done.stderr


def test_a_file_that_is_not_an_image_is_not_printed_as_one(sender, watched):
    done = sender.submit("Two [sandbox: not-picture]", "-n", "2", "--name", "it", "--wait", "--format", "markdown")
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 1)
    assert "image 2: not an image" in done.stderr


def test_a_refusal_is_reported_with_the_message_of_the_api_and_the_next_step(sender, watched):
    done = sender.submit("A cat [sandbox: 402]", "--name", "cat", "--wait")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[0].startswith("cat.prompt.txt: not charged: Not enough credits")
    assert "add credits to the account" in done.stderr.splitlines()[1]
    assert done.stderr.splitlines()[2:] == [f"  {sender.folders.errors}/cat.error.toml", "0 images, 0 credits."]


def test_json_is_the_same_as_format_json_and_excludes_other_formats(sender, watched):
    done = sender.submit("A cat", "--name", "cat", "--wait", "--json")
    assert done.returncode == 0
    (result,) = json.loads(done.stdout)
    assert (result["destination"], result["source"]) == ("outbox", "cat.prompt.txt")
    refused = sender.submit("A cat", "--json", "--format", "markdown", "--wait")
    assert (refused.returncode, "cannot be used together" in refused.stderr) == (64, True)


def test_every_problem_is_reported_with_its_error_file(sender, folders, start):
    # Only the daemon's own configuration contains these folders.
    folders.environ |= {"IMAGEWATCH_LIMITS__MAX_N": "1", "IMAGEWATCH_LIMITS__QUALITIES": '["low"]'}
    start(folders, "run")
    until((folders.state / "status.json").exists)
    done = sender.submit("A cat", "-n", "2", "--quality", "high", "--name", "cat", "--wait")
    result = done.stderr.splitlines()
    problems = folders.error("cat")["problems"]
    assert (done.returncode, len(problems)) == (1, 2)
    assert result[:3] == ["cat.prompt.txt: not charged: 2 problems", *(f"  {problem}" for problem in problems)]
    assert result[4:] == [f"  {folders.errors}/cat.error.toml", "0 images, 0 credits."]


def test_a_name_that_a_shell_would_split_is_not_put_into_a_command(sender, watched):
    done = sender.submit("A cat [sandbox: drop]", "--name", "two words", "--wait")
    assert "imagewatch retry --pay-again NAME, or" in done.stderr


def test_after_a_lost_response_the_charge_is_unknown(sender, sandbox, watched):
    done = sender.submit("A cat [sandbox: drop]", "--name", "cat", "--wait")
    assert (done.returncode, done.stdout) == (1, "")
    assert "cat.prompt.txt: may have been charged: " in done.stderr
    assert "imagewatch retry --pay-again cat, or" in done.stderr
    assert done.stderr.endswith("0 images, 0 credits, 1 may have been charged.\n")
    assert sandbox.report()["requests"] == 1


def test_a_charged_response_without_an_image_is_reported_with_its_price(sender, sandbox, watched):
    done = sender.submit("A cat [sandbox: no-images]", "--name", "cat", "--wait")
    assert (done.returncode, done.stdout) == (1, "")
    assert "cat.prompt.txt: charged: " in done.stderr
    assert "imagewatch retry cat reads the saved response again, free of charge" in done.stderr
    assert done.stderr.endswith(f"0 images, {call(sandbox)['credits']} credits.\n")


def test_an_unknown_price_is_not_zero(sender, watched):
    done = sender.submit("A cat [sandbox: no-billing]", "--wait")
    assert done.returncode == 0
    assert done.stderr.endswith("1 image, 0 credits, 1 charged, amount not reported.\n")


def test_with_one_failure_among_many_it_exits_with_1_and_prints_the_others(sender, watched):
    done = sender.submit("One", "Two [sandbox: 400]", "Three", "--wait", "--name", "it")
    assert done.returncode == 1
    assert [Path(path).name for path in done.stdout.splitlines()] == ["it-1.jpg", "it-3.jpg"]


@pytest.mark.parametrize("price", ["9" * 400, "nan", "inf", "-1", "true", "1979-05-27", '"12"'])
@pytest.mark.parametrize("form", ["paths", "json"])
def test_a_receipt_with_an_impossible_price_is_reported_as_one_without_a_price(sender, folders, price, form):
    waiting = sender.start("A cat", "--name", "cat", "--wait", "--format", form)
    until((folders.inbox / "cat.prompt.txt").exists)
    hidden = folders.outbox / ".tmp"
    hidden.write_text(
        f'schema = 1\njob = "0123456789abcdef"\nsource = "cat.prompt.txt"\ncharged = "yes"\nmodel = 1979-05-27\n'
        f'credits_charged = {price}\n[[images]]\nfile = "cat.png"\nmime = "image/png"\n'
    )
    hidden.rename(folders.outbox / "cat.receipt.toml")
    out, err = waiting.communicate(timeout=30)
    assert (waiting.returncode, err) == (0, "1 image, 0 credits, 1 charged, amount not reported.\n")
    if form == "json":
        assert json.loads(out)[0]["credits_charged"] is None
    else:
        assert out == f"{folders.outbox}/cat.png\n"


# Waiting


def test_after_the_timeout_it_exits_with_69_and_the_daemon_continues(sender, sandbox, watched):
    sandbox.hold()
    done = sender.submit("A cat", "--name", "cat", "--wait", "--timeout", "0.3", "--format", "json")
    assert done.returncode == 69
    assert json.loads(done.stdout)[0]["destination"] is None
    assert "1 prompt is not finished. The daemon will process it; to cancel, remove it from" in done.stderr
    assert done.stderr.endswith(f"{AGAIN.format('this prompt')}  {sender.folders.inbox}/cat.prompt.txt\n")
    sandbox.release()
    until(lambda: sender.folders.finished() == {"cat": "outbox"})


def test_if_one_is_unfinished_it_exits_with_69_even_if_another_failed(sender, sandbox, folders, start):
    folders.environ["IMAGEWATCH_LIMITS__MAX_N"] = "1"  # only the daemon's own configuration contains it
    start(folders, "run")
    until((folders.state / "status.json").exists)
    sandbox.hold()
    wrong = sender.file("wrong.txt", "+++\nn = 2\n+++\nTwo cats")
    done = sender.submit("A cat", "--from", wrong, "--name", "it", "--wait", "--timeout", "5", "--json")
    assert done.returncode == 69
    assert [(one["destination"], one["charged"]) for one in json.loads(done.stdout)] == [(None, None), ("errors", "no")]
    assert "it-2.prompt.txt: not charged: " in done.stderr
    assert done.stderr.endswith(f"{AGAIN.format('this prompt')}  {folders.inbox}/it-1.prompt.txt\n")
    sandbox.release()


def test_without_a_daemon_the_prompt_stays_and_the_command_reports_it(sender, monkeypatch, capsys):
    monkeypatch.setattr(command, "_UNCLAIMED_SECONDS", 0.0)
    for name in ("IMAGEWATCH_CONFIG", "HOME"):
        monkeypatch.setenv(name, sender.known[name])
    with pytest.raises(SystemExit) as ended:
        cli.main(["submit", "A cat", "--name", "cat", "--wait", "--timeout", "0.5"], standalone_mode=False)
    assert ended.value.code == 69
    assert capsys.readouterr().err.count("No prompt has been claimed from") == 1
    assert sender.dropped() == ["cat.prompt.txt"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ctrl_c_while_waiting_leaves_the_prompt_in_the_inbox(sender, number):
    waiting = sender.start("A cat", "--name", "cat", "--wait")
    until(lambda: sender.dropped() == ["cat.prompt.txt"])
    waiting.send_signal(number)
    out, err = waiting.communicate(timeout=30)
    assert (waiting.returncode, out) == (69, "")
    assert err.startswith(f"imagewatch: interrupted by {number.name}\n")
    assert err.endswith(f"{AGAIN.format('this prompt')}  {sender.folders.inbox}/cat.prompt.txt\n")
    assert "Traceback" not in err
    assert sender.dropped() == ["cat.prompt.txt"]


# Interrupted commands


def interrupted(
    sender: Sender, number: int, ending: str, *arguments: str, ignoring: str = ""
) -> subprocess.CompletedProcess[str]:
    """Drop three prompts with an image each; after one step of the disk every step sends a signal."""
    image = sender.file("a.png")
    texts = ("One", "Two", "Three", "--name", "it", "--image", image)
    shell = ("sh", "-c", f"trap '' {ignoring}; exec \"$@\"", "-") if ignoring else ()
    done = subprocess.run(
        [*shell, sys.executable, INTERRUPTER, str(number), ending, "submit", *texts, *arguments],
        env={**sender.known, "PYTHONPATH": str(TESTS)},
        cwd=sender.home,
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done


TWO = ["it-1.prompt.txt", "it-2.prompt.txt"]
WHOLE = ["it-1.in1.png", "it-1.prompt.txt", "it-2.in1.png", "it-2.prompt.txt"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("ending", ["/it-2.in1.png", "/it-2.prompt.txt"])
def test_a_signal_while_prompts_are_dropped_names_those_that_are_in_the_inbox(sender, number, ending):
    done = interrupted(sender, number, ending)
    assert done.returncode == 69
    assert done.stderr.splitlines() == [
        f"imagewatch: interrupted by {number.name}",
        "2 of 3 prompts were dropped. The daemon will process them. The others were not dropped.",
        AGAIN.format("these prompts").strip(),
        *(f"  {sender.folders.inbox}/{name}" for name in TWO),
    ]
    assert done.stdout.splitlines() == [f"{sender.folders.inbox}/{name}" for name in TWO]
    assert sender.dropped() == WHOLE, "no prompt without its image, and nothing hidden"


@pytest.mark.parametrize("wait", [(), ("--wait",)])
def test_json_lists_the_prompts_that_were_dropped_before_a_signal(sender, wait):
    done = interrupted(sender, signal.SIGTERM, "/it-2.prompt.txt", "--json", *wait)
    assert done.returncode == 69
    assert [(one["source"], one["destination"]) for one in json.loads(done.stdout)] == [(name, None) for name in TWO]
    assert all(f"  {sender.folders.inbox}/{name}\n" in done.stderr for name in TWO)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_anything_is_dropped_ends_as_in_a_shell_and_leaves_nothing(sender, number):
    done = interrupted(sender, number, ".1.png", "--json")
    assert (done.returncode, done.stdout) == (128 + number, "")
    assert done.stderr == f"imagewatch: interrupted by {number.name}\n  Nothing was dropped.\n"
    assert sender.dropped() == []


def test_a_signal_that_the_caller_ignores_ends_nothing(sender):
    done = interrupted(sender, signal.SIGHUP, "/it-1.in1.png", ignoring="HUP")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(sender.dropped()) == 6


@pytest.mark.skipif(shutil.which("setsid") is None, reason="setsid is not installed")
def test_when_the_terminal_is_closed_the_names_are_in_the_output_and_the_exit_code_shows_it(sender):
    master, slave = pty.openpty()
    with open(sender.home / "out", "w+") as out:
        program = [sys.executable, "-m", "imagewatch", "submit", "A cat", "--name", "cat", "--wait", "--json"]
        waiting = subprocess.Popen(
            ["setsid", "--ctty", *program],
            env=sender.known,
            stdin=slave,
            stdout=out,
            stderr=slave,
        )
        os.close(slave)
        assert os.read(master, 100), "the live line"
        os.close(master)
        assert waiting.wait(30) == 69
        out.seek(0)
        assert [(one["source"], one["destination"]) for one in json.load(out)] == [("cat.prompt.txt", None)]


class BrokenDisk(SteppingDisk):
    """A disk with a bug."""

    def rename(self, source: str, target: str) -> None:
        if target.endswith("it-2.prompt.txt"):
            raise RuntimeError("a bug")
        super().rename(source, target)


def test_a_bug_does_not_hide_the_dropped_prompts(sender, inside):
    code, out, err = inside(BrokenDisk(), "One", "Two", "--name", "it")
    assert (code, out) == (70, f"{sender.folders.inbox}/it-1.prompt.txt\n")
    assert f"{AGAIN.format('this prompt')}  {sender.folders.inbox}/it-1.prompt.txt\n" in err
    assert "internal error: RuntimeError: a bug" in err


def test_the_live_line_is_for_terminals_only_and_never_in_the_output(sender, sandbox, watched):
    sandbox.hold()
    began = time.monotonic()
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "imagewatch", "submit", "A cat", "--wait"],
        env=sender.known,
        stdout=subprocess.PIPE,
        stderr=slave,
        text=True,
    )
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):
        while piece := os.read(master, 65536):
            shown += piece
            if b" s " in shown:  # the line is there, before anything is done
                sandbox.release()
    os.close(master)
    out, _ = process.communicate(timeout=30)
    ended = time.monotonic()
    assert process.returncode == 0
    first = re.match(rb"\r0 of 1 done, (\d+) s", shown)
    assert first
    assert int(first[1]) <= ended - began
    assert re.search(rb"\r\x1b\[K1 image, \d+ credits\.\r\n$", shown)
    assert Path(out.removesuffix("\n")).is_file()


# Other users


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is not installed")
class TestAnotherUser:
    """The sender is neither the daemon's user nor in its group; the folders are open to all, the state is not."""

    AS_USER = ("setpriv", "--reuid", "12346", "--regid", "12346", "--clear-groups")

    @pytest.fixture
    def tmp_path(self, open_path: Path) -> Path:
        """A folder that the other user may enter, also while another pytest starts."""
        return open_path

    @pytest.fixture
    def shared(self, sender: Sender) -> Sender:
        for path in (sender.folders.root, *sender.folders.root.iterdir(), sender.home):
            path.chmod(0o777)
        return sender

    @pytest.mark.usefixtures("watched")
    def test_needs_neither_the_key_nor_the_state_folder(self, shared):
        assert shared.folders.state.stat().st_mode & 0o077 == 0
        config = shared.home / "imagewatch.toml"
        config.write_text(config.read_text().replace("/nonexistent/state", str(shared.folders.state)))
        done = shared.submit(
            "A cat", "--folder", "new/er", "--wait", before=("sh", "-c", 'umask 077; exec "$@"', "-", *self.AS_USER)
        )
        assert done.returncode == 0, done.stderr
        assert Path(done.stdout.strip()).is_file()
        assert shared.folders.inbox.joinpath("new/er").stat().st_uid == 12346
        assert shared.dropped() == []

    def test_a_user_who_may_not_write_to_the_inbox_is_referred_to_the_administrator(self, shared):
        shared.folders.inbox.chmod(0o755)
        done = shared.submit("A cat", before=self.AS_USER)
        assert done.returncode == 74
        assert "permission denied: " in done.stderr
        assert "ask the administrator to give you access to this folder" in done.stderr

    def test_a_user_may_drop_into_an_inbox_that_only_the_daemon_can_list(self, shared):
        shared.folders.inbox.chmod(0o333)
        done = shared.submit("One", "Two", "--name", "it", "--folder", "new", before=self.AS_USER)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines() == [f"{shared.folders.inbox}/new/it-{number}.prompt.txt" for number in (1, 2)]
        assert shared.dropped() == ["new/it-1.prompt.txt", "new/it-2.prompt.txt"]

    def test_a_user_who_may_not_list_the_folder_of_a_prompt_is_shown_how_to_name_its_images(self, shared):
        file = Path(shared.file("closed/cat.prompt.txt", "Make it blue"))
        file.parent.chmod(0o711)
        done = shared.submit("--from", str(file), before=self.AS_USER)
        assert done.returncode == 64
        assert "cat.prompt.txt: its folder cannot be listed: Permission denied (name its images with" in done.stderr
        assert shared.dropped() == []

    def test_a_user_who_may_not_enter_the_outbox_gets_an_error_before_anything_is_dropped(self, shared):
        shared.folders.outbox.chmod(0o700)
        done = shared.submit("A cat", "--wait", before=self.AS_USER)
        assert done.returncode == 74
        assert str(shared.folders.outbox) in done.stderr
        assert shared.dropped() == []

    def test_a_user_who_may_not_read_the_receipt_gets_the_reason(self, shared, start):
        shared.folders.environ["IMAGEWATCH_OUTBOX__FILE_MODE"] = "0600"
        start(shared.folders, "run")
        done = shared.submit("A cat", "--wait", before=self.AS_USER)
        assert done.returncode == 69
        assert "outbox.file_mode" in done.stderr

    def test_a_user_who_may_not_read_a_result_gets_the_names_of_the_dropped_prompts(self, shared, start):
        shared.folders.environ["IMAGEWATCH_OUTBOX__FILE_MODE"] = "0600"
        start(shared.folders, "run")
        done = shared.submit("A cat", "--name", "cat", "--wait", "--json", before=self.AS_USER)
        assert done.returncode == 69, "it was dropped, and will be paid for"
        assert [one["source"] for one in json.loads(done.stdout)] == ["cat.prompt.txt"]
        assert "cat.prompt.txt: dropped; its result is not known" in done.stderr


@pytest.mark.parametrize(("folder", "file"), [(0o755, 0o644), (0o750, 0o640), (0o2770, 0o640), (0o700, 0o600)])
def test_a_user_who_may_list_the_inbox_may_read_the_dropped_files(sender, folder, file):
    sender.folders.inbox.chmod(folder)
    private = ("sh", "-c", 'umask 077; exec "$@"', "-")
    assert sender.submit("A cat", "--image", sender.file("a.png"), before=private).returncode == 0
    modes = {path.name.partition(".")[2]: path.stat().st_mode & 0o777 for path in sender.folders.inbox.glob("a-cat-*")}
    assert modes == {"in1.png": file, "prompt.txt": file}


# Complete files or none


@pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")
def test_every_name_appears_by_rename_and_the_prompt_after_its_images(sender):
    events = Events(sender.folders.inbox)
    images = [sender.file(f"{number}.png") for number in range(3)]
    given = [part for path in images for part in ("--image", path)]
    assert sender.submit("One", "Two", "--name", "it", *given).returncode == 0
    seen = [(mask, name) for mask, name in events.read() if not name.startswith(".")]
    events.close()
    names = [f"it-{k}{rest}" for k in (1, 2) for rest in (".in1.png", ".in2.png", ".in3.png", ".prompt.txt")]
    assert seen == [(MOVED_TO, name) for name in names]


@pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")
def test_no_folder_is_created_in_the_inbox_because_it_would_cause_a_scan_of_everything(sender):
    events = Events(sender.folders.inbox)
    assert sender.submit("One", "--image", sender.file("a.png")).returncode == 0
    assert not [name for mask, name in events.read() if mask & 0x40000000]
    events.close()


def test_a_reader_at_any_moment_sees_complete_files_and_no_prompt_without_its_images(sender):
    content = plain_image()
    ended, faults, checks = threading.Event(), [], 0

    def check() -> None:
        nonlocal checks
        while not ended.is_set():
            checks += 1
            names = {name for name in os.listdir(sender.folders.inbox) if not name.startswith(".")}
            for name in names:
                raw = (sender.folders.inbox / name).read_bytes()
                if name.endswith(".prompt.txt") and not raw.endswith(b"\nText\n"):
                    faults.append(f"{name} is not whole")
                if name.endswith(".png") and raw != content:
                    faults.append(f"{name} is not whole")
                # Its images were there before: a listing is not atomic, so each name is checked again.
                declared = re.findall(r'"([^"]+\.png)"', raw.decode("latin-1")) if name.endswith(".txt") else []
                faults.extend(one for one in declared if not (sender.folders.inbox / one).exists())

    watcher = threading.Thread(target=check)
    watcher.start()
    try:
        image = sender.file("a.png", content)
        done = sender.submit(*["Text"] * 10, "--image", image, "--image", image)
    finally:
        ended.set()
        watcher.join()
    assert done.returncode == 0, done.stderr
    assert faults == []
    assert checks > 10
    assert len(sender.dropped()) == 30


def test_a_killed_submit_leaves_nothing_that_is_claimed(sender, sandbox, folders):
    image = sender.file("a.png")

    def run(number: int) -> subprocess.CompletedProcess[str]:
        arguments = ["A cat", "--image", image, "--image", image, "--folder", str(number), "--name", "cat"]
        return subprocess.run(
            [sys.executable, RUNNER, str(number), "submit", *arguments],
            env={**sender.known, "PYTHONPATH": str(TESTS)},
            cwd=sender.home,
            capture_output=True,
            text=True,
            check=False,
        )

    steps = int(run(0).stderr)
    assert steps > 10
    assert {run(number).returncode for number in range(1, steps + 1)} == {-signal.SIGKILL}
    there: dict[str, set[str]] = {}
    for path in map(Path, sender.dropped()):
        there.setdefault(path.parent.name, set()).add(path.name if path.name[0] != "." else "staged")
    whole = {folder for folder, names in there.items() if "cat.prompt.txt" in names}
    assert whole >= {"0", str(steps)}
    assert len(whole) < steps / 2
    for folder in whole:
        assert there[folder] == {"cat.in1.png", "cat.in2.png", "cat.prompt.txt"}
    done = subprocess.run(
        [sys.executable, "-m", "imagewatch", "once"],
        env={**sender.environ, **folders.environ},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {path.parent.name for path in folders.outbox.rglob("*.receipt.toml")} == whole
    assert sandbox.report()["requests"] == len(whole)
    assert not [name for name in sender.dropped() if name.endswith("/cat.prompt.txt")]


def test_files_of_a_killed_submit_are_removed_by_a_later_one_after_a_day(sender, monkeypatch):
    for name in (".submit-0011223344556677.1.png", ".submit-0011223344556677.prompt.txt", ".other"):
        (sender.folders.inbox / name).write_text("x")
    assert sender.submit("A cat", "--name", "one").returncode == 0
    assert len([name for name in sender.dropped() if name.startswith(".")]) == 3, "it may be at work"
    monkeypatch.setattr("imagewatch.commands.drop._STALE_SECONDS", 0.0)
    config = load(str(sender.home / "imagewatch.toml"), {})
    with Delivery(config, ""):
        pass
    assert sender.dropped() == [".other", "one.prompt.txt"]
