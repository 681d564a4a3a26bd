"""The examples for other programs, run unchanged against a real daemon."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.daemon import KEY, Folders, until
from support.endpoint import unique_png
from support.inotify import Events

from imagewatch.protocol.prompt import parse

if TYPE_CHECKING:
    from imagewatch.sandbox import Sandbox

EXAMPLES = Path(__file__).parents[2] / "examples"
WITHOUT_EVENTS = "without inotifywait"


def run(program: list[str], *arguments: str, path: str = os.environ["PATH"]) -> subprocess.CompletedProcess[str]:
    """Run an example as another program would: without this project."""
    return subprocess.run(
        [*program, *arguments],
        env={"PATH": path, "HOME": "/nonexistent"},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


@pytest.fixture
def watched(folders: Folders, start: Any) -> Folders:
    start(folders, "run")
    until((folders.state / "status.json").exists)
    return folders


@pytest.fixture(params=["python", "shell", WITHOUT_EVENTS])
def example(request, tmp_path):
    """One of the two programs that drop a prompt and wait for it; the shell script with and without ``inotifywait``."""
    path = os.environ["PATH"]
    if request.param == "shell" and shutil.which("inotifywait") is None:
        pytest.skip("inotifywait is not installed (inotify-tools)")
    if request.param == WITHOUT_EVENTS:
        path = str(tmp_path / "bin")
        os.mkdir(path)
        for tool in ("date", "cp", "mv", "sleep", "sed", "head", "sh"):
            os.symlink(str(shutil.which(tool)), f"{path}/{tool}")
    program = [sys.executable, "-I", str(EXAMPLES / "submit.py")] if request.param == "python" else None

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return run(program or ["/bin/sh", str(EXAMPLES / "submit.sh")], *arguments, path=path)

    return call


def test_a_text_becomes_images_whose_paths_are_printed(example, watched, sandbox):
    done = example(str(watched.root), 'A "cat" \\ it says: 100 % +++')
    assert done.returncode == 0, done.stderr
    (path,) = map(Path, done.stdout.splitlines())
    assert path.parent == watched.outbox
    assert path.stat().st_size > 1000
    (call,) = sandbox.report()["calls"]
    assert call["prompt"] == 'A "cat" \\ it says: 100 % +++'
    assert done.stderr == f"{call['credits']} credits\n"


def test_images_are_sent_in_their_order(example, watched, sandbox, tmp_path):
    paths = [tmp_path / "b b.png", tmp_path / "a.png"]
    for path in paths:
        path.write_bytes(unique_png(path.name))
    done = example(str(watched.root), "Both", *map(str, paths))
    assert done.returncode == 0, done.stderr
    assert sandbox.report()["calls"][0]["inputs"] == [
        hashlib.sha256(unique_png(path.name)).hexdigest() for path in paths
    ]


def test_an_image_without_an_ending_is_named_before_anything_is_dropped(example, folders, tmp_path):
    (tmp_path / "with.dot").mkdir()
    paths = [tmp_path / "a.png", tmp_path / "with.dot" / "cat"]
    for path in paths:
        path.write_bytes(unique_png(path.name))
    done = example(str(folders.root), "Both", *map(str, paths))
    assert (done.returncode, done.stdout) == (64, "")
    assert done.stderr == f"{paths[1]}: its name must end in .png, .jpg, .jpeg or .webp\n"
    assert [name for name in folders.names("inbox") if not name.startswith(".imagewatch")] == []


def test_any_text_is_a_value_of_the_front_matter(folders):
    code = "import sys, pathlib, submit; submit.drop(pathlib.Path(sys.argv[1]), 'A cat', [], model=sys.argv[2])"
    model = '🎨 \x7f \x01 \t "é" \\ \x80'
    done = run(["env", f"PYTHONPATH={EXAMPLES}", sys.executable, "-B", "-c", code], str(folders.root), model)
    assert (done.returncode, done.stderr) == (0, "")
    (name,) = [name for name in folders.names("inbox") if not name.startswith(".imagewatch")]
    assert parse((folders.inbox / name).read_bytes()).front.model == model


@pytest.mark.parametrize(("tag", "charged"), [("400", "no"), ("drop", "unknown"), ("no-images", "yes")])
def test_an_error_is_reported_with_its_charge_and_nothing_is_dropped_again(example, watched, sandbox, tag, charged):
    done = example(str(watched.root), f"A cat [sandbox: {tag}]")
    assert (done.returncode, done.stdout) == (1, "")
    assert charged in done.stderr.splitlines()[0]
    assert len(done.stderr.splitlines()) == 2
    assert sandbox.report()["requests"] == 1


def test_an_unfinished_prompt_is_not_reported_as_failed_and_exits_with_69(folders):
    code = "import sys, submit; submit.wait.__defaults__ = (0,); sys.exit(submit.main(*sys.argv[1:]))"
    done = run(["env", f"PYTHONPATH={EXAMPLES}", sys.executable, "-B", "-c", code], str(folders.root), "A cat")
    assert (done.returncode, done.stdout) == (69, "")
    assert "do not drop it again" in done.stderr
    assert len(folders.names("inbox")) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="inotify is Linux's")
def test_images_are_dropped_first_and_everything_by_rename(example, watched, tmp_path):
    image = tmp_path / "a.png"
    image.write_bytes(unique_png("a"))
    events = Events(watched.inbox)
    assert example(str(watched.root), "Both", str(image), str(image)).returncode == 0
    seen = [(mask, name) for mask, name in events.read() if not name.startswith(".")]
    events.close()
    assert {mask for mask, _ in seen} == {0x80}, "IN_MOVED_TO only"
    assert [name.partition(".")[2] for _, name in seen] == ["in1.png", "in2.png", "prompt.txt"]


# cron and rsync


class Elsewhere:
    """A folder on "another machine", from which cron sends prompts by rsync and to which it fetches results."""

    def __init__(self, place: Path, folders: Folders) -> None:
        self.place = place
        self._folders = folders

    def write(self, name: str, content: str | bytes) -> None:
        path = self.place / "outgoing" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    def cron(self) -> None:
        done = run(["/bin/sh", str(EXAMPLES / "cron-rsync.sh")], str(self.place), str(self._folders.root))
        assert (done.returncode, done.stderr) == (0, "")

    def names(self, folder: str) -> list[str]:
        top = self.place / folder
        return sorted(path.relative_to(top).as_posix() for path in top.rglob("*") if path.is_file())


@pytest.fixture
def elsewhere(tmp_path: Path, watched: Folders) -> Elsewhere:
    for program in ("rsync", "flock"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    return Elsewhere(tmp_path / "elsewhere", watched)


def test_cron_delivers_prompts_and_fetches_images_and_pays_once_however_often_it_runs(
    elsewhere: Elsewhere, watched: Folders, sandbox: Sandbox
) -> None:
    elsewhere.write("trip/cat.prompt.txt", "make it blue")
    elsewhere.write("trip/cat.png", unique_png("cat"))
    elsewhere.write("dog.prompt.txt", "a dog")
    elsewhere.write("bad.prompt.txt", "a cat [sandbox: 400]")
    elsewhere.write(".unfinished.prompt.txt", "never sent")
    elsewhere.cron()
    until(lambda: len(watched.finished()) == 3)
    for _ in range(3):
        elsewhere.cron()
        until(lambda: [name for name in watched.names("inbox") if not name.startswith(".")] == [])
    assert elsewhere.names("outbox") == ["dog.jpg", "dog.receipt.toml", "trip/cat.jpg", "trip/cat.receipt.toml"]
    assert elsewhere.names("errors") == ["bad.error.toml", "bad.prompt.txt"]
    assert sandbox.report()["requests"] == 3
    assert [call["inputs"] for call in sandbox.report()["calls"] if call["prompt"] == "make it blue"] == [
        [hashlib.sha256(unique_png("cat")).hexdigest()]
    ]


def test_a_prompt_that_is_saved_again_is_a_new_request(
    elsewhere: Elsewhere, watched: Folders, sandbox: Sandbox
) -> None:
    for count in (1, 2):
        elsewhere.write("cat.prompt.txt", "a cat")
        elsewhere.cron()
        until(lambda count=count: len([n for n in watched.names("outbox") if n.endswith(".toml")]) == count)
    elsewhere.cron()
    assert sandbox.report()["requests"] == 2
    assert len([name for name in elsewhere.names("outbox") if name.endswith(".toml")]) == 2


def test_no_receipt_arrives_elsewhere_before_its_images(elsewhere: Elsewhere, watched: Folders, tmp_path: Path) -> None:
    """Between two steps of the script a job ends: its receipt may arrive only with the next run."""
    for number in range(2):
        (watched.outbox / f"cat{number}.webp").write_bytes(b"x")
        (watched.outbox / f"cat{number}.receipt.toml").write_text("schema = 1\n")
    (watched.outbox / "cat1.receipt.toml").rename(tmp_path / "later")
    (watched.outbox / "cat1.webp").rename(tmp_path / "image")
    tools = tmp_path / "tools"
    tools.mkdir()
    # This rsync finishes the second job after the outbox was read first; otherwise it does what rsync does.
    wrapper = tools / "rsync"
    wrapper.write_text(
        f'#!/bin/sh\n"{shutil.which("rsync")}" "$@" || exit\n'
        f'case "$*" in */watched/outbox/*) mv {tmp_path}/image {watched.outbox}/cat1.webp;'
        f" mv {tmp_path}/later {watched.outbox}/cat1.receipt.toml;; esac\nexit 0\n"
    )
    wrapper.chmod(0o755)
    script = ["/bin/sh", str(EXAMPLES / "cron-rsync.sh")]
    done = run(script, str(elsewhere.place), str(watched.root), path=f"{tools}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    assert elsewhere.names("outbox") == ["cat0.receipt.toml", "cat0.webp", "cat1.webp"]
    elsewhere.cron()
    assert elsewhere.names("outbox") == ["cat0.receipt.toml", "cat0.webp", "cat1.receipt.toml", "cat1.webp"]


def test_the_examples_contain_neither_a_key_nor_a_network_address(watched):
    for path in EXAMPLES.iterdir():
        text = path.read_text()
        assert KEY not in text
        assert "http" not in text.replace("http.server", "")  # the module
        assert "import imagewatch" not in text
