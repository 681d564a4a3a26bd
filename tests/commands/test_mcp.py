"""``imagewatch mcp`` from outside: the client of the protocol's library over stdio, a real daemon, a real endpoint."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mcp.client.client import Client
from mcp.client.stdio import StdioServerParameters, stdio_client
from support.daemon import KEY, Folders, until
from support.endpoint import unique_png

from imagewatch.commands import mcp_server
from imagewatch.commands.allowed_images import AllowedImages
from imagewatch.commands.drop import Delivery
from imagewatch.commands.mcp import _MOST_SECONDS
from imagewatch.commands.mcp_answers import Answers
from imagewatch.commands.name_notes import Notes
from imagewatch.commands.named_jobs import NamedJobs
from imagewatch.protocol import notice
from imagewatch.protocol.images import inspect
from imagewatch.protocol.names import NOTES, SUFFIX

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from mcp import types

    from imagewatch.sandbox import Sandbox

SLOW = " [sandbox: slow 4]"
SECRET = "sk-let-of-the-agents-environment"


class Agent:
    """An agent's program: it starts the server for one conversation and has nothing but the watched folder."""

    def __init__(self, folders: Folders, home: Path) -> None:
        self.root = folders.root
        self.home = home
        home.mkdir()
        self.errors = (home / "stderr").open("w+")

    def talk(
        self, conversation: Callable[[Client], Coroutine[Any, Any, Any]], *arguments: str, wait: str = "20"
    ) -> Any:
        """Start a server, hold a conversation, disconnect; return what it returned."""
        server = StdioServerParameters(
            command=sys.executable,
            args=["-m", "imagewatch", "mcp", "--root", str(self.root), "--wait", wait, *arguments],
            env={"HOME": str(self.home), "LETTA_API_KEY": SECRET, "LETTA_BASE_URL": "http://127.0.0.1:1"},
        )

        async def run() -> Any:
            async with Client(stdio_client(server, errlog=self.errors)) as client:
                return await conversation(client)

        return asyncio.run(run())

    def call(self, tool: str, *arguments: str, wait: str = "20", **values: Any) -> types.CallToolResult:
        """Call one tool in a conversation of its own."""
        return self.talk(lambda client: client.call_tool(tool, values), *arguments, wait=wait)

    def create(self, name: str = "cat", prompt: str = "A cat", **values: Any) -> dict[str, Any]:
        return self.call("create_image", name=name, prompt=prompt, **values).structured_content


@pytest.fixture
def agent(folders: Folders, tmp_path: Path) -> Iterator[Agent]:
    made = Agent(folders, tmp_path / "home")
    with contextlib.closing(made.errors):
        yield made
        made.errors.seek(0)
        written = made.errors.read()
        assert "Traceback" not in written
        assert SECRET not in written


@pytest.fixture
def watched(folders: Folders, start: Any) -> Folders:
    start(folders, "run")
    until((folders.state / "status.json").exists)
    return folders


def finished(folders: Folders, count: int = 1) -> None:
    until(lambda: len(folders.finished()) == count and not folders.leftovers())


def test_the_tools_have_valid_schemas_and_hints(agent):
    tools = agent.talk(lambda client: client.list_tools()).tools
    assert [tool.name for tool in tools] == ["create_image", "get_image", "list_waiting", "cancel_image"]
    for tool in tools:
        jsonschema.Draft202012Validator.check_schema(tool.input_schema)
        assert tool.input_schema["type"] == "object"
        assert tool.input_schema["additionalProperties"] is False
        assert "$ref" not in json.dumps(tool.input_schema)
    assert [tool.annotations.read_only_hint for tool in tools] == [False, True, True, False]
    assert set(tools[0].input_schema["required"]) == {"name", "prompt"}


def test_an_image_is_created_and_the_same_name_is_not_charged_again(agent, watched, sandbox):
    first = agent.create()
    assert (first["name"], first["state"], first["got"]) == ("cat", "completed", 1)
    assert Path(first["images"][0]).read_bytes()
    assert first["result_file"] == str(watched.outbox / "cat.receipt.toml")
    assert agent.create() == first
    assert agent.call("get_image", name="cat").structured_content == first
    for path in watched.outbox.iterdir():
        path.unlink()
    assert agent.create()["state"] == "results_moved"
    assert sandbox.report()["requests"] == 1
    assert sandbox.report()["charged"] == 1


def test_the_cost_and_a_preview_are_in_the_answer_only_if_they_are_asked_for(agent, watched):
    result = agent.call("create_image", name="cat", prompt="A cat", n=2)
    assert "credits" not in json.dumps(result.structured_content)
    assert [part.type for part in result.content] == ["text"]
    result = agent.call("get_image", name="cat", cost=True, preview=True)
    assert result.structured_content["credits_charged"] == watched.receipt("cat")["credits_charged"]
    assert json.loads(result.content[0].text) == result.structured_content
    assert [(part.type, part.mime_type) for part in result.content[1:]] == [("image", "image/webp")] * 2
    for part in result.content[1:]:
        preview = agent.home / "preview"
        preview.write_bytes(base64.b64decode(part.data))
        assert preview.stat().st_size < 200_000
        with preview.open("rb") as file:
            found = inspect(file)
        assert found is not None
        assert max(found.width, found.height) <= 320


def test_an_image_that_is_not_an_image_has_no_preview(agent, watched):
    agent.create()
    (image,) = [path for path in watched.outbox.iterdir() if path.suffix != ".toml"]
    for content in (b"", b"GIF89a", unique_png("a")[:40]):
        image.write_bytes(content)
        assert len(agent.call("get_image", name="cat", preview=True).content) == 1
    image.unlink()
    image.symlink_to("/etc/passwd")
    assert len(agent.call("get_image", name="cat", preview=True).content) == 1


def test_a_client_that_disconnects_after_one_second_causes_one_charge(agent, watched, sandbox):
    async def disconnect(client: Client) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                await client.call_tool("create_image", {"name": "cat", "prompt": "A cat" + SLOW})

    for _ in range(3):
        agent.talk(disconnect)
    finished(watched)
    assert agent.create(prompt="A cat" + SLOW)["state"] == "completed"
    assert sandbox.report()["charged"] == 1
    assert sandbox.report()["requests"] == 1


def test_a_server_that_is_killed_during_a_call_leads_to_one_charge(agent, watched, sandbox):
    command = [sys.executable, "-m", "imagewatch", "mcp", "--root", str(watched.root)]
    hello = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
    call = {"name": "create_image", "arguments": {"name": "cat", "prompt": "A cat" + SLOW}}
    messages = (
        {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": hello},
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        {"jsonrpc": "2.0", "id": 2, "method": "tools/call", "params": call},
    )
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        assert process.stdin is not None
        process.stdin.write("".join(f"{json.dumps(message)}\n" for message in messages).encode())
        process.stdin.flush()
        until(lambda: sandbox.report()["requests"] == 1)
        process.send_signal(signal.SIGKILL)
    finished(watched)
    assert agent.create(prompt="A cat" + SLOW)["state"] == "completed"
    assert sandbox.report()["charged"] == 1


def test_a_call_is_answered_in_time_with_name_and_state(agent, watched, sandbox):
    prompt = "A cat"
    sandbox.hold()

    async def timed(client: Client) -> tuple[float, dict[str, Any]]:
        began = time.monotonic()
        result = await client.call_tool("create_image", {"name": "cat", "prompt": prompt})
        return time.monotonic() - began, result.structured_content

    seconds, answer = agent.talk(timed, wait="1")
    assert seconds < 10, "on a busy machine"
    assert (answer["name"], answer["state"] in {"waiting", "in_progress"}) == ("cat", True)
    assert sandbox.wait_for_requests(1, timeout=20)
    until(lambda: agent.call("get_image", name="cat", wait="1").structured_content["state"] == "in_progress")
    assert "get_image" in agent.call("get_image", name="cat", wait="1").structured_content["message"]
    too_late = agent.call("cancel_image", name="cat").structured_content
    assert (too_late["state"], "too late" in too_late["message"]) == ("in_progress", True)
    sandbox.release()
    until(lambda: agent.call("get_image", name="cat").structured_content["state"] == "completed")
    assert sandbox.report()["charged"] == 1


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A folder does not respond until this is set; the server waits a tenth of a second for it."""
    opened = threading.Event()
    for name, seconds in {"_FOLDER_SECONDS": 0.1, "_MORE_SECONDS": 0.0, "_PREVIEW_SECONDS": 0.1}.items():
        monkeypatch.setattr(mcp_server, name, seconds)
    yield opened
    opened.set()


def offered(folders: Folders, seconds: float = 0.1) -> mcp_server.Tools:
    images = AllowedImages([str(folders.root)], 1 << 20)
    return mcp_server.Tools(NamedJobs(folders.config(), "", images, blind=True), seconds)


def behind(gate: threading.Event, owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one function wait as it does for a share whose server is down."""
    function = getattr(owner, name)

    def waits(*arguments: Any, **more: Any) -> Any:
        gate.wait(20)
        return function(*arguments, **more)

    monkeypatch.setattr(owner, name, waits)


@pytest.mark.parametrize("place", [(Delivery, "stage"), (Delivery, "place"), (Notes, "read"), (Notes, "create")])
def test_a_folder_that_does_not_respond_delays_no_answer_and_the_same_call_is_the_same_job(
    folders: Folders, gate: threading.Event, monkeypatch: pytest.MonkeyPatch, place: tuple[Any, str]
) -> None:
    behind(gate, *place, monkeypatch)
    tools = offered(folders)

    async def calls() -> tuple[Any, Any]:
        asked = {"name": "cat", "prompt": "A cat"}
        first = await tools.call("create_image", asked)
        assert [path for path in folders.names("inbox") if path.endswith(SUFFIX) and path[0] != "."] == []
        gate.set()
        await asyncio.wait(tools.drops)
        monkeypatch.setattr(mcp_server, "_FOLDER_SECONDS", 15.0)
        return first, await tools.call("create_image", asked)

    first, second = asyncio.run(asyncio.wait_for(calls(), 25))
    assert (first.structured_content["name"], first.structured_content["state"]) == ("cat", "slow")
    assert "with the same name and arguments: it is not charged twice" in first.structured_content["message"]
    assert second.structured_content["state"] == "waiting"
    assert [path for path in folders.names("inbox") if path[0] != "."] == [f"cat{SUFFIX}"]


@pytest.mark.parametrize(
    ("tool", "place"),
    [("get_image", (Notes, "read")), ("cancel_image", (Notes, "read")), ("list_waiting", (notice, "read"))],
)
def test_each_tool_answers_although_a_folder_does_not_respond(
    folders: Folders, gate: threading.Event, monkeypatch: pytest.MonkeyPatch, tool: str, place: tuple[Any, str]
) -> None:
    behind(gate, *place, monkeypatch)

    async def call() -> Any:
        asked = {} if tool == "list_waiting" else {"name": "cat"}
        result = await asyncio.wait_for(offered(folders).call(tool, asked), 10)
        gate.set()  # else the end of the loop waits for the thread
        return result.structured_content

    assert asyncio.run(call())["state"] == "slow"


def test_a_preview_that_takes_too_long_is_left_out(
    agent: Agent, watched: Folders, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent.create()
    monkeypatch.setattr(mcp_server, "_FOLDER_SECONDS", 15.0)
    behind(gate, Answers, "previews", monkeypatch)

    async def call() -> Any:
        result = await asyncio.wait_for(offered(watched).call("get_image", {"name": "cat", "preview": True}), 10)
        gate.set()
        return result

    result = asyncio.run(call())
    assert (result.structured_content["state"], len(result.content)) == ("completed", 1)


class Jumping(selectors.DefaultSelector):
    """Lets time pass for an event loop instead of waiting."""

    now = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "it would wait without end"
        self.now += max(timeout, 0.0)
        return super().select(0)

    def loop(self) -> asyncio.AbstractEventLoop:
        made = asyncio.SelectorEventLoop(self)
        made.time = lambda: self.now  # type: ignore[method-assign]
        return made


CALLS = [
    ("create_image", {"name": "cat", "prompt": "A cat", "preview": True, "cost": True}),
    ("get_image", {"name": "cat", "preview": True}),
    ("get_image", {"name": "done", "preview": True, "cost": True}),
    ("cancel_image", {"name": "dog"}),
    ("list_waiting", {}),
]


@pytest.mark.parametrize(("tool", "asked"), CALLS)
@given(
    wait=st.floats(1, _MOST_SECONDS),
    delays=st.lists(st.sampled_from([0.0, 0.05, 1.0, 7.0, 14.9, 29.0, 36.0, 1e6]), min_size=1, max_size=8),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_however_slowly_the_folders_respond_a_call_is_answered_within_45_seconds(
    folders: Folders, tool: str, asked: dict[str, Any], wait: float, delays: list[float]
) -> None:
    (folders.outbox / "done.receipt.toml").write_text('source = "done.prompt.txt"\n[[images]]\nfile = "done.png"\n')
    (folders.outbox / "done.png").write_bytes(unique_png("a"))
    for stem in ("cat", "dog"):
        for path in (folders.inbox / f"{stem}.prompt.txt", folders.inbox / NOTES / f"{stem}.json"):
            path.unlink(missing_ok=True)
    passing, left = Jumping(), itertools.cycle(delays)

    async def slowly(work: Callable[..., Any], *arguments: Any) -> Any:
        await asyncio.sleep(next(left))
        return work(*arguments)

    images = AllowedImages([str(folders.root)], 1 << 20)
    jobs = NamedJobs(folders.config(), "", images, blind=True)
    tools = mcp_server.Tools(jobs, wait, lambda: passing.now, slowly)
    with asyncio.Runner(loop_factory=passing.loop) as runner:
        began = passing.now
        result = runner.run(tools.call(tool, asked))
        took = passing.now - began
    assert took <= 45.01
    assert result.structured_content
    if max(delays) < 0.1 and tool != "list_waiting" and not result.is_error:
        assert result.structured_content["state"] != "slow"


def test_what_a_name_may_be_is_said_in_words(agent):
    result = agent.call("create_image", name="a cat!", prompt="A cat")
    assert result.is_error
    assert "1 to 80 letters, digits, - and _" in result.content[0].text


def test_no_longer_wait_than_that_of_clients_can_be_asked_for(agent):
    done = subprocess.run(
        [sys.executable, "-m", "imagewatch", "mcp", "--root", str(agent.root), "--wait", "31"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 64
    assert "30" in done.stderr


def test_two_servers_that_are_called_at_the_same_time_drop_each_name_once(agent, watched, sandbox):
    names = [f"cat-{number}" for number in range(6)]

    async def create(client: Client) -> list[Any]:
        calls = (client.call_tool("create_image", {"name": name, "prompt": "A cat"}) for name in names * 2)
        return [result.structured_content for result in await asyncio.gather(*calls)]

    async def both() -> list[list[Any]]:
        return await asyncio.gather(*(asyncio.to_thread(agent.talk, create) for _ in range(2)))

    for answers in asyncio.run(both()):
        assert [answer["state"] for answer in answers] == ["completed"] * 12, answers
    assert sandbox.report()["charged"] == 6


def test_an_image_is_edited_from_the_watched_folder_or_an_allowed_one_and_from_no_other(agent, watched, sandbox):
    allowed, other = agent.home / "allowed", agent.home / "other"
    for folder in (allowed, other):
        folder.mkdir()
        (folder / "boat.png").write_bytes(unique_png(folder.name))
    (watched.root / "boat.png").write_bytes(unique_png("root"))
    for number, path in enumerate(["/etc/shadow", str(other / "boat.png"), str(allowed / "boat.png")]):
        result = agent.call("create_image", name=f"no-{number}", prompt="At night", images=[path])
        assert result.is_error
        assert "not in a folder from which images may be sent" in json.dumps(result.structured_content)
    answer = agent.create("own", images=["boat.png"])
    assert answer["state"] == "completed"
    allowing = ("--allow", str(allowed), "--allow", str(watched.root))
    both = [str(allowed / "boat.png"), str(watched.root / "boat.png")]
    result = agent.call("create_image", *allowing, name="both", prompt="At night", images=both)
    assert result.structured_content["state"] == "completed"
    result = agent.call("create_image", *allowing, name="no", prompt="At night", images=[str(other / "boat.png")])
    assert result.is_error
    assert [len(call["inputs"]) for call in sandbox.report()["calls"]] == [1, 2]


WRONG = [
    ({"name": "a/b"}, "name"),
    ({"name": "../x"}, "name"),
    ({"name": ".x"}, "name"),
    ({"name": "x" * 81}, "name"),
    ({"name": "x.y"}, "name"),
    ({"name": "x\n"}, "name"),
    ({"name": 7}, "name"),
    ({"name": "x", "prompt": ""}, "prompt"),
    ({"name": "x", "prompt": "x" * 32_001}, "prompt"),
    ({"name": "x", "prompt": "x\0"}, "NUL"),
    ({"name": "x", "n": 5}, "n"),
    ({"name": "x", "n": "1"}, "n"),
    ({"name": "x", "quality": "best"}, "quality"),
    ({"name": "x", "model": "best"}, "family"),
    ({"name": "x", "images": ["x.png"] * 15}, "images"),
    ({"name": "x", "qualty": "high"}, "qualty"),
    ({}, "name"),
]


def test_wrong_arguments_are_named_and_nothing_is_dropped(agent, folders):
    async def call(client: Client) -> list[Any]:
        return [await client.call_tool("create_image", {"prompt": "A cat", **values}) for values, _ in WRONG]

    for result, (values, problem) in zip(agent.talk(call), WRONG, strict=True):
        assert result.is_error, values
        assert problem in json.dumps(result.structured_content), values
    assert folders.names("inbox") == []


def test_a_failure_has_its_reason_and_whether_it_was_charged(agent, watched, sandbox):
    answer = agent.create("bad", "A cat [sandbox: 400]")
    assert (answer["state"], answer["charged"]) == ("failed", "no")
    assert "safety system" in answer["error"]
    answer = agent.create("lost", "A cat [sandbox: 502]")
    assert (answer["state"], answer["charged"]) == ("failed", "unknown")
    assert "ask the user" in answer["message"]
    assert agent.create("lost", "A cat [sandbox: 502]") == answer
    assert sandbox.report()["requests"] == 2


def hold(root: Path, **more: Any) -> None:
    """A status file as the daemon writes it while the queue is on hold."""
    now = notice.at(time.time())
    values = {"version": "1", "state": "on_hold", "written_at": now, "next_writing_at": notice.at(time.time() + 60)}
    reason = notice.HoldNotice(kind="credits", message="Not enough credits", next="add credits")
    waiting = notice.WaitingFile(name="anna/tree.prompt.txt", why="ready", message="ready")
    values |= {"holds": (reason,), "waiting": notice.Waiting(count=7, files=(waiting,) * 7)}
    (root / notice.JSON).write_bytes(notice.encode(notice.Notice(**{**values, **more})))


def test_an_image_that_waits_comes_with_the_reason_for_the_hold(agent, folders):
    hold(folders.root)
    answer = agent.call("create_image", wait="1", name="cat", prompt="A cat").structured_content
    assert answer["state"] == "waiting"
    assert answer["queue"]["state"] == "on_hold"
    assert "report the reason" in answer["message"]
    assert answer["queue"]["holds"][0]["message"] == "Not enough credits"
    assert agent.call("list_waiting").structured_content == answer["queue"]
    assert agent.call("cancel_image", name="cat").structured_content["state"] == "canceled"
    assert [name for name in folders.names("inbox") if name[0] != "."] == []
    assert agent.create()["state"] == "canceled"


def test_a_daemon_that_is_stopped_or_overdue_is_reported(agent, folders):
    hold(folders.root, state="stopped", next_writing_at=None)
    assert agent.call("list_waiting").structured_content["state"] == "not_running"
    hold(folders.root, next_writing_at=notice.at(time.time() - 120))
    assert agent.call("list_waiting").structured_content["state"] == "not_running"
    (folders.root / notice.JSON).write_text("{")
    assert agent.call("list_waiting").structured_content["state"] == "unknown"


def test_a_prompt_that_a_killed_daemon_has_not_seen_is_reported(folders):
    now = time.time()
    running = {"state": "running", "holds": (), "next_writing_at": notice.at(now + 86_400)}
    hold(folders.root, **running, written_at=notice.at(now - 60))
    passed = 0.0
    images = AllowedImages([str(folders.root)], 1 << 20)
    jobs = NamedJobs(folders.config(), "", images, blind=True, clock=lambda: now + passed)
    answers = Answers(jobs)
    job = jobs.create("cat", "A cat", {}, [])
    assert answers.job(job)["queue"]["state"] == "running"
    inbox = folders.config().inbox
    passed = inbox.settle_seconds + inbox.rescan_seconds + 29.0
    assert answers.job(jobs.find("cat"))["queue"]["state"] == "running"
    passed += 2.0
    answer = answers.job(jobs.find("cat"))
    assert answer["queue"]["state"] == "not_running"
    assert answer["queue"]["message"].startswith("The daemon is probably not running: it has not written its status")
    assert answer["queue"]["holds"] == []
    assert "report the reason" in answer["message"]
    assert answers.queue()["state"] == "running"
    hold(folders.root, next_writing_at=running["next_writing_at"], written_at=notice.at(now - 30))
    answer = answers.job(jobs.find("cat"))
    assert answer["queue"]["state"] == "on_hold", "the clock of its daemon is half a minute behind"
    another = NamedJobs(folders.config(), "", images, blind=True, clock=lambda: now + passed)
    assert Answers(another).job(another.find("cat"))["queue"]["state"] == "on_hold"
    passed += inbox.settle_seconds + inbox.rescan_seconds + 31.0
    assert Answers(another).job(another.find("cat"))["queue"]["state"] == "not_running"


def test_all_prompts_of_a_server_go_into_its_folder(agent, folders, start):
    start(folders, "run")
    result = agent.call("create_image", "--folder", "agents", name="cat", prompt="A cat")
    assert result.structured_content["images"][0].startswith(f"{folders.outbox}/agents/cat.")
    assert agent.call("get_image", name="cat").structured_content["state"] == "unknown"


def test_the_names_that_the_server_notes_are_not_listed_as_ignored(agent, watched):
    agent.create()
    finished(watched)
    until(lambda: json.loads((watched.state / "status.json").read_text())["waiting"]["ready"] == 0)
    assert ".imagewatch-mcp" not in (watched.state / "status.json").read_text()


def test_the_server_has_no_use_for_a_key_or_a_network(agent, watched):
    agent.create()
    agent.create("lost", "A cat [sandbox: 502]")
    for path in [*watched.root.rglob("*"), *agent.home.rglob("*")]:
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes()
            assert KEY.encode() not in path.read_bytes()


def test_the_server_works_without_any_network(agent, watched):
    if subprocess.run(["unshare", "--net", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no network namespace can be created here")

    async def run() -> Any:
        arguments = ["--net", sys.executable, "-m", "imagewatch", "mcp", "--root", str(watched.root)]
        server = StdioServerParameters(command="unshare", args=arguments, env={"HOME": str(agent.home)})
        async with Client(stdio_client(server, errlog=agent.errors)) as client:
            return await client.call_tool("create_image", {"name": "cat", "prompt": "A cat"})

    assert asyncio.run(run()).structured_content["state"] == "completed"


def test_without_the_extra_the_command_names_the_installation(folders):
    script = "import sys; sys.modules['mcp'] = None; from imagewatch.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "mcp", "--root", str(folders.root)],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 64
    assert done.stderr.splitlines() == [
        "imagewatch: the library for the Model Context Protocol is not installed",
        "  install it as you installed imagewatch, for example: pipx install --force 'imagewatch[mcp]'",
    ]
    assert done.stdout == ""


def test_a_folder_that_does_not_exist_is_named_before_the_first_call(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "imagewatch", "mcp", "--root", str(tmp_path / "missing")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 64
    assert "missing" in done.stderr
    assert done.stdout == ""


def test_ctrl_c_ends_the_server(folders):
    command = [sys.executable, "-m", "imagewatch", "mcp", "--root", str(folders.root)]
    hello = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"}}
    message = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": hello}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(message).encode() + b"\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["result"]["serverInfo"]["name"] == "imagewatch"
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()


def test_a_prompt_of_a_person_is_not_canceled(agent, folders):
    folders.prompt("tree", "A tree")
    assert agent.call("cancel_image", name="tree").is_error
    assert folders.names("inbox") == [f"tree{SUFFIX}"]


def test_an_unknown_tool_is_an_error(agent: Agent, sandbox: Sandbox):
    assert agent.call("delete_everything").is_error
    assert sandbox.report()["requests"] == 0
