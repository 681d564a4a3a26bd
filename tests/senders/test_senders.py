"""Shells, copies, moves, archives and version control put files into the inbox of a running daemon."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.daemon import until
from support.senders import PAUSE, SLOW, Parcel, Service, pause, pieces, program, run, serving, writers_are_seen

if TYPE_CHECKING:
    from collections.abc import Iterator
    from io import FileIO

GIT = ["git", "-c", "user.name=A sender", "-c", "user.email=sender@example.org", "-c", "init.defaultBranch=main"]


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("native")) as service:
        yield service


@pytest.fixture(scope="module")
def polled(tmp_path_factory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("polled"), inbox__watch="poll", inbox__rescan_seconds="0.5") as service:
        yield service


@pytest.fixture
def parcel(native, tmp_path) -> Parcel:
    """Files to send to a daemon with change events."""
    return native.parcel(tmp_path)


@pytest.fixture(params=["native", "poll"])
def either(tmp_path, request) -> Parcel:
    """Files to send to a daemon with change events, and to one without."""
    service = request.getfixturevalue("native" if request.param == "native" else "polled")
    return service.parcel(tmp_path)


@pytest.fixture
def elsewhere(tmp_path) -> Iterator[Path]:
    """A folder on another file system."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system to write to")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def prompt_first(parcel: Parcel) -> list[Path]:
    """The files in the worst order: the prompt, then its images."""
    names = sorted(parcel.files, key=lambda name: name != "cat.prompt.txt")
    return [parcel.source / name for name in names]


def send_each(command: list[str], parcel: Parcel) -> None:
    """Send each file with a program of its own, the prompt first."""
    for path in prompt_first(parcel):
        run([*command, path, parcel.target])


def send_all(command: list[str], parcel: Parcel) -> None:
    """Send all files with one program, the prompt first."""
    run([*command, *prompt_first(parcel), parcel.target])


def send_images(parcel: Parcel) -> None:
    run(["cp", *prompt_first(parcel)[1:], parcel.target])


def send_all_but_one(parcel: Parcel) -> None:
    """Send the prompt and two of its images."""
    run(["cp", *(parcel.source / name for name in ("cat.prompt.txt", "cat.1.png", "cat.2.jpg")), parcel.target])


# Copies and moves


def test_cp_with_the_prompt_first(either):
    either.send(lambda: send_each(["cp"], either))
    either.is_completed()


def make_old(parcel: Parcel) -> None:
    for path in parcel.source.iterdir():
        os.utime(path, (1_000_000_000, 1_000_000_000))


def test_cp_that_keeps_old_times(parcel):
    parcel.prepare(make_old).send(lambda: send_all(["cp", "-a"], parcel))
    parcel.is_completed()


def test_mv_within_a_file_system_with_the_prompt_first(either):
    either.send(lambda: send_each(["mv"], either))
    either.is_completed()


@SLOW
def test_mv_from_another_file_system(parcel, elsewhere):
    parcel.prepare(lambda parcel: run(["cp", *parcel.source.iterdir(), elsewhere]))
    parcel.send(lambda: run(["mv", *(elsewhere / path.name for path in prompt_first(parcel)), parcel.target]))
    parcel.is_completed()


@SLOW
def test_hard_links(parcel):
    parcel.send(lambda: send_all(["ln"], parcel))
    parcel.is_completed()


# Writing under the final name


def test_a_sender_that_stalls_for_any_time_with_the_file_open(either, tmp_path):
    writers_are_seen(tmp_path)
    send_images(either)
    content = either.files["cat.prompt.txt"]
    script = ["sh", "-c", 'cat > "$1"', "sh", either.target / "cat.prompt.txt"]
    with subprocess.Popen(script, stdin=subprocess.PIPE, bufsize=0) as writing:
        assert writing.stdin
        writing.stdin.write(content[:9000])
        either.is_not_claimed()
        writing.stdin.write(content[9000:])
    either.is_completed()


def test_an_image_that_stalls_while_its_prompt_is_unchanged(parcel, tmp_path):
    writers_are_seen(tmp_path)
    with contextlib.ExitStack() as opened:

        def begin() -> None:
            nonlocal file
            send_all_but_one(parcel)
            file = opened.enter_context((parcel.target / "cat.webp").open("wb", buffering=0))
            file.write(parcel.files["cat.webp"][:9000])

        file: FileIO
        parcel.send(begin)
        parcel.is_not_claimed()
        file.write(parcel.files["cat.webp"][9000:])
    parcel.is_completed()


def test_a_sender_that_first_gives_files_their_full_size(parcel, tmp_path):
    """What Samba does for Windows: the full size in zeros, then the bytes, then the old time."""
    writers_are_seen(tmp_path)
    with contextlib.ExitStack() as opened:

        def fill(path: Path, file: FileIO) -> None:
            for piece in pieces(parcel.files[path.name]):
                file.write(piece)
            file.close()
            os.utime(parcel.target / path.name, (1_000_000_000, 1_000_000_000))

        def begin() -> None:
            nonlocal last, file
            *others, last = prompt_first(parcel)
            for path in (*others, last):
                file = opened.enter_context((parcel.target / path.name).open("wb", buffering=0))
                file.truncate(len(parcel.files[path.name]))
                if path != last:
                    fill(path, file)

        last: Path
        file: FileIO
        parcel.send(begin)
        parcel.is_not_claimed()
        fill(last, file)
    parcel.is_completed()


def test_a_shell_that_writes_slowly(parcel):
    def write() -> None:
        parts = []
        for number, piece in enumerate(pieces(parcel.files["cat.prompt.txt"])):
            parts.append(parcel.source / f"piece{number}")
            parts[-1].write_bytes(piece)
        script = f'for piece in "$@"; do cat "$piece"; sleep {PAUSE}; done > "$target"'
        run(["sh", "-c", script, "sh", *parts], env={**os.environ, "target": str(parcel.prompt)})

    parcel.prepare(send_images).send(write)
    parcel.is_completed()


def test_a_shell_that_appends_in_pieces(either):
    def append() -> None:
        for piece in pieces(either.files["cat.prompt.txt"]):
            run(["sh", "-c", 'cat >> "$1"', "sh", either.prompt], input=piece)
            pause()

    either.prepare(send_images).send(append)
    either.is_completed()


def test_images_that_are_created_empty_and_filled_under_another_name(parcel):
    """What Firefox does: an empty file reserves the final name while another one grows."""
    (parcel.target / "cat.webp").touch()
    send_all_but_one(parcel)
    growing = parcel.target / "Xy12Ab34.webp.part"
    growing.write_bytes(parcel.files["cat.webp"][:9000])
    parcel.is_not_claimed()
    growing.write_bytes(parcel.files["cat.webp"])
    growing.rename(parcel.target / "cat.webp")
    parcel.is_completed()


FORMS = {
    "KDE": "{}.part",
    "Chrome": "{}.crdownload",
    "Thunar": "{}.partial~",
    "WinSCP": "{}.filepart",
    "FTP servers": ".in.{}.",
    "scripts": "{}.tmp",
    "GNOME's library": "{}.A1B2C3",
    "Nextcloud": ".{}.~1a2b3c4d",
    "Unison": ".unison.{}.0123456789abcdef0123456789abcdef.unison.tmp",
    "rclone": "{}.1a2b3c4d.partial",
    "Syncthing": ".syncthing.{}.tmp",
}
"""Names that senders use for a file while they write it."""


def test_another_name_during_the_transfer(native, tmp_path):
    parcels = [native.parcel(tmp_path) for _ in FORMS]
    sent = list(zip(parcels, FORMS.values(), strict=True))
    for parcel, form in sent:

        def begin(parcel: Parcel = parcel, form: str = form) -> None:
            send_all_but_one(parcel)
            (parcel.target / form.format("cat.webp")).write_bytes(parcel.files["cat.webp"][:9000])

        parcel.send(begin)
    parcels[0].is_not_claimed()
    assert [parcel.calls for parcel in parcels] == [[] for _ in FORMS]
    for parcel, form in sent:
        growing = parcel.target / form.format("cat.webp")
        growing.write_bytes(parcel.files["cat.webp"])
        growing.rename(parcel.target / "cat.webp")
    for parcel in parcels:
        parcel.is_completed()


def test_system_files_beside_prompts_are_neither_claimed_nor_reported(native, parcel):
    """AppleDouble files of macOS, lock files, thumbnails, backups."""
    names = ["._cat.prompt.txt", "._cat.webp", ".DS_Store", "~$other.prompt.txt", "cat.prompt.txt~", "Thumbs.db"]

    def litter(parcel: Parcel) -> None:
        for name in (*names, "cat.prompt.txt:Zone.Identifier", "@eaDir/cat.prompt.txt", ".git/cat.prompt.txt"):
            (parcel.target / name).parent.mkdir(exist_ok=True)
            (parcel.target / name).write_bytes(parcel.files["cat.prompt.txt"])

    parcel.prepare(litter).send(lambda: send_all(["cp"], parcel))
    parcel.is_completed()
    assert [line["file"] for line in native.daemon.events("ignored") if line["file"].startswith(parcel.name)] == []


def test_ignored_files_that_may_have_been_meant_as_prompts_are_named_in_the_log(native, parcel):
    meant = ["cat.txt", "cat.prompt.txt.txt", "Dog.Prompt.txt", "#1.prompt.txt", "@home/cat.prompt.txt"]

    def litter(parcel: Parcel) -> None:
        for name in meant:
            (parcel.target / name).parent.mkdir(exist_ok=True)
            (parcel.target / name).write_text("A cat")
        (parcel.target / "link.png").symlink_to("cat.txt")
        (parcel.target / "#folder").mkdir()

    parcel.prepare(litter).send(lambda: send_all(["cp"], parcel))
    parcel.is_completed()
    wanted = {f"{parcel.name}/{name}" for name in (*meant[:-1], "@home", "link.png", "#folder")}
    until(lambda: {line["file"] for line in native.daemon.events("ignored")} >= wanted)


# Folders, archives, version control


def nest(parcel: Parcel) -> None:
    """Put the files two levels below."""
    inner = parcel.source / "deep/er"
    inner.mkdir(parents=True)
    for path in prompt_first(parcel):
        path.rename(inner / path.name)


@pytest.fixture
def nested(parcel) -> Parcel:
    """A folder with the files two levels below."""
    return parcel.prepare(nest)


def test_a_folder_that_is_moved_in_whole(nested):
    run(["mv", nested.source / "deep", nested.target])
    nested.is_completed("deep/er")


def test_a_folder_that_is_moved_in_whole_without_change_events(polled, tmp_path):
    parcel = polled.parcel(tmp_path)
    parcel.target.rmdir()
    run(["mv", parcel.source, polled.folders.inbox])
    parcel.is_completed()


def test_a_folder_that_is_moved_in_from_another_file_system(nested, elsewhere):
    nested.prepare(lambda parcel: run(["cp", "-r", parcel.source / "deep", elsewhere]))
    nested.send(lambda: run(["mv", elsewhere / "deep", nested.target]))
    nested.is_completed("deep/er")


@SLOW
def test_a_folder_that_is_copied_in(nested):
    nested.send(lambda: run(["cp", "-r", nested.source / "deep", nested.target]))
    nested.is_completed("deep/er")


def pack_tar(parcel: Parcel) -> None:
    names = [path.name for path in prompt_first(parcel)]
    run(["tar", "-C", parcel.source, "-cf", parcel.source.with_suffix(".tar"), *names])


def test_tar_reading_from_a_slow_line(parcel):
    def unpack() -> None:
        with subprocess.Popen(["tar", "-C", parcel.target, "-xf", "-"], stdin=subprocess.PIPE, bufsize=0) as unpacking:
            assert unpacking.stdin
            for piece in pieces(parcel.source.with_suffix(".tar").read_bytes()):
                unpacking.stdin.write(piece)
                pause()

    parcel.prepare(pack_tar).send(unpack)
    parcel.is_completed()


def pack_zip(parcel: Parcel) -> None:
    with zipfile.ZipFile(parcel.source.with_suffix(".zip"), "w") as file:
        for path in prompt_first(parcel):
            file.write(path, path.name)


def test_unzip(parcel):
    unzip = program("unzip")
    parcel.prepare(pack_zip)
    parcel.send(lambda: run([unzip, "-q", parcel.source.with_suffix(".zip"), "-d", parcel.target]))
    parcel.is_completed()


def commit(parcel: Parcel) -> None:
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "Prompts"]):
        run([*GIT, "-C", parcel.source, *command])


@pytest.fixture
def repository(nested) -> Parcel:
    """A parcel whose source is a repository."""
    program("git")
    return nested.prepare(commit)


def test_git_clone_into_the_inbox(repository):
    repository.send(lambda: run([*GIT, "clone", "-q", repository.source, repository.target]))
    repository.is_completed("deep/er")


def test_git_checkout_in_the_inbox(repository):
    repository.prepare(lambda parcel: run([*GIT, "clone", "-q", "--no-checkout", parcel.source, parcel.target]))
    repository.send(lambda: run([*GIT, "-C", repository.target, "checkout", "-q", "main"]))
    repository.is_completed("deep/er")
