"""The recipes of ``docs/howto/notify.md`` and the examples, run unchanged but for their addresses and paths."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import pytest
from support.daemon import Folders, command, until
from support.pages import marked, page
from support.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.receiver import Receiver

ROOT = Path(__file__).parents[2]
PAGE = page("howto/notify")
EXAMPLES = ROOT / "examples"


def recipe(name: str) -> str:
    """A configuration of the page."""
    return marked("toml")[name]


@pytest.fixture
def once(folders: Folders, tmp_path: Path) -> Callable[..., Any]:
    """Process a prompt with a configuration."""
    folders.prompt("anna/cat", "a cat")

    def run(text: str, **environ: str) -> None:
        (tmp_path / "config.toml").write_text(text)
        done = command(folders, "once", IMAGEWATCH_CONFIG=str(tmp_path / "config.toml"), **environ)
        assert done.returncode == 0, done.stderr

    return run


def test_each_recipe_is_tried_here():
    names = re.findall(r"^<!-- tested: (\w+) -->\n```toml$", PAGE, re.MULTILINE)
    text = Path(__file__).read_text()
    assert len(names) == 4
    assert all(f'recipe("{name}")' in text for name in names)
    for block in re.findall(r"^```toml\n(.+?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        tomllib.loads(block)


def test_the_recipe_for_ntfy(once: Callable[..., Any], receiver: Receiver) -> None:
    once(recipe("ntfy").replace("https://ntfy.example.com", receiver.url.removesuffix("/hook")))
    (post,) = receiver.posts
    parts = urlsplit(post.path)
    assert parts.path == "/imagewatch"
    shown = {name: from_template(values[0], post.page) for name, values in parse_qs(parts.query).items()}
    assert shown == {"tpl": "1", "t": "imagewatch: completed", "m": "anna/cat.prompt.txt: 1 image, 30 credits"}


def from_template(text: str, page: dict[str, Any]) -> str:
    """What ntfy makes of a template: the values of the JSON that was posted."""
    return re.sub(r"\{\{\.(\w+)\}\}", lambda found: str(page[found[1]]), text)


def test_the_recipe_for_apprise(once: Callable[..., Any], receiver: Receiver, tmp_path: Path) -> None:
    apprise = Path(sys.executable).with_name("apprise")
    assert apprise.exists(), "apprise is one of the packages of the tests (pyproject.toml)"
    host = urlsplit(receiver.url).netloc
    text = recipe("apprise").replace("/usr/local/bin", str(EXAMPLES))
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "apprise").symlink_to(apprise)
    (programs / "python3").symlink_to(sys.executable)
    path = f"{programs}:{os.environ['PATH']}"
    once(text.replace("ntfy://ntfy.example.com", f"ntfy://{host}"), PATH=path)
    (post,) = receiver.posts
    assert (post.page["topic"], post.page["title"]) == ("imagewatch", "imagewatch: completed")
    assert post.page["message"].strip() == "anna/cat.prompt.txt: 1 image, 30 credits"


def test_a_message_that_apprise_could_not_send_is_tried_again(receiver: Receiver, tmp_path: Path) -> None:
    receiver.answer = lambda _: 500
    apprise = Path(sys.executable).with_name("apprise")
    page = {"event": "held", "title": "imagewatch: held", "text": "--config=/etc/passwd"}
    done = subprocess.run(
        [sys.executable, EXAMPLES / "notify_apprise.py", f"ntfy://{urlsplit(receiver.url).netloc}/x"],
        input=json.dumps(page),
        env={"PATH": str(apprise.parent), "HOME": str(tmp_path)},
        text=True,
        capture_output=True,
        timeout=50,
        check=False,
    )
    assert done.returncode != 0
    assert receiver.posts[0].page["message"].strip() == "--config=/etc/passwd"


def test_the_recipe_for_a_webhook(once: Callable[..., Any], receiver: Receiver, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("a secret")
    text = recipe("webhook").replace("/etc/imagewatch/notify_secret", str(tmp_path / "secret"))
    address = urlsplit(receiver.url).netloc
    once(text.replace("https://", "http://").replace("n8n.example.com", address))
    (post,) = receiver.posts
    assert post.path == "/webhook/imagewatch"
    assert post.headers["authorization"] == "Basic " + base64.b64encode(b"imagewatch:password").decode()
    assert "x-imagewatch-signature" in post.headers
    assert (post.page["event"], post.page["receipt"]["source"]) == ("completed", "anna/cat.prompt.txt")


def test_the_recipe_for_a_file(once: Callable[..., Any], folders: Folders, tmp_path: Path) -> None:
    folders.prompt("wrong", "+++\ncolour = 1\n+++\nnever sent")
    text = recipe("file").replace("/srv/imagewatch", str(tmp_path))
    with contextlib.suppress(AssertionError):  # one of the prompts fails
        once(text)
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["event"] for line in lines) == ["completed", "failed"]


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The receiver of the examples, as another program would run it."""
    (tmp_path / "secret").write_text("a secret\n")
    port = free_port()
    program = [sys.executable, "-I", str(EXAMPLES / "notify_receiver.py"), str(tmp_path / "secret"), str(port)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd="/") as process:
        until(lambda: is_open(port))
        yield f"http://127.0.0.1:{port}/", process
        process.terminate()


def is_open(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def test_the_example_of_a_receiver_takes_what_is_signed_once_and_nothing_else(
    once: Callable[..., Any], listening: tuple[str, subprocess.Popen[str]], tmp_path: Path
) -> None:
    url, process = listening
    assert post(url, b'{"event": "held", "event_id": "x", "text": "forged"}', "sha256=00") == 403
    assert post(url, b"not JSON", "") == 403
    once(f'[notify]\nurl = "{url}"\nsecret_file = "secret"\n')
    body = b'{"event": "cap", "event_id": "x", "text": "80 %"}'
    signed = "sha256=" + "8f9a" * 16
    assert post(url, body, signed) == 403
    for _ in range(2):
        assert post(url, body, signature(body)) == 204
    process.terminate()
    assert process.stdout is not None
    assert process.stdout.read().splitlines() == ["completed anna/cat.prompt.txt: 1 image, 30 credits", "cap 80 %"]


def signature(body: bytes) -> str:
    """What OpenSSL makes of a body: another program than ours."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to sign with")
    done = subprocess.run(
        ["openssl", "dgst", "-sha256", "-hmac", "a secret"], input=body, capture_output=True, check=True
    )
    return f"sha256={done.stdout.decode().split()[-1]}"


def post(url: str, body: bytes, signed: str) -> int:
    request = urllib.request.Request(url, body, {"X-Imagewatch-Signature": signed}, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_the_page_shows_the_core_of_the_example():
    (core,) = re.findall(r"^```python\n(.+?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    program = (EXAMPLES / "notify_receiver.py").read_text()
    assert all(line in [one.strip() for one in program.splitlines()] for line in core.splitlines())
