"""The server of ``imagewatch mcp``: tools, their arguments, and what they answer. The only module that imports ``mcp``.

A job takes longer than most clients wait for a call. So each call is answered after a bounded time, with the name and
the state. If a client disconnects, nothing is lost: what was dropped continues, and the same name asks for it again.
Also a folder that does not respond (a share whose server is down) delays no answer: its calls run in threads.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import os
import signal
import time
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec
from mcp import types
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server

from imagewatch import __version__
from imagewatch.commands.mcp_answers import Answers
from imagewatch.commands.named_jobs import NAME
from imagewatch.config.schema import Options
from imagewatch.protocol.prompt import MAX_INPUTS
from imagewatch.system.errors import BadRequest, ImagewatchError
from imagewatch.system.exits import EXIT_SIGNAL
from imagewatch.system.text import printable, to_json

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from mcp.server import ServerRequestContext

    from imagewatch.commands.named_jobs import Job, NamedJobs

_T = TypeVar("_T")
_POLL_SECONDS = 0.4
_FOLDER_SECONDS = 15.0
"""The folders have at least this time to respond, however short the wait is."""
_MORE_SECONDS = 3.0
"""How much longer than the wait they have."""
_PREVIEW_SECONDS = 41.0
"""The latest end of previews. All else is known after 33 s: the longest wait is 30 s (``mcp``)."""
_ANSWER_SECONDS = 2.0
"""How long it may take to read what else an answer has."""
_LEAVE_SECONDS = 10.0
"""How long a signal lets the server complete what is being dropped."""
_SLOW = (
    "The watched folder does not respond in time, so the state is not known. The request may have been dropped. Repeat "
    "the same call later, with the same name and arguments: it is not charged twice. Do not use another name."
)
_INSTRUCTIONS = (
    "Creates and edits images through a folder that a daemon watches. Each new name is one paid request. "
    "Call create_image once for each image that the user asks for, with a new name each time. If the answer says that "
    "the image is not ready, call get_image with the same name until it is; do not create it again under another name. "
    "Mention the cost only if the user asks."
)

_CREATE = (
    "Create or edit an image. Costs credits, once for each new name. Waits a short time. If the image is not ready "
    "then, the answer has the state, and get_image with the same name has the result later."
)

_BAD_NAME = "name must be 1 to 80 letters, digits, - and _, and begin with a letter or a digit"
_TOO_LATE = (
    "It is too late to cancel the request: it is in progress, and continues. Ask for the result with get_image and the "
    "same name."
)

_Name = Annotated[
    str,
    msgspec.Meta(
        pattern=NAME,
        description="Name of the request and of its files: letters, digits, - and _. New for each image, such as "
        "lighthouse-3f9c. The same name again is the same request and is not charged again",
    ),
]
_Text = Annotated[
    str, msgspec.Meta(min_length=1, max_length=32_000, description="What the image shows, or how the images change")
]
_Images = Annotated[
    tuple[str, ...],
    msgspec.Meta(
        max_length=MAX_INPUTS,
        description="Paths of images to edit, in order (PNG, JPEG, WebP), below the folders that are allowed",
    ),
]
_Preview = Annotated[bool, msgspec.Meta(description="Also return a small preview of each image")]
_Cost = Annotated[bool, msgspec.Meta(description="Also return the credits charged; only if the user asks for them")]


class CreateImage(Options, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Arguments of ``create_image``."""

    name: _Name
    prompt: _Text
    images: _Images = ()
    preset: Annotated[str, msgspec.Meta(min_length=1, max_length=100)] | None = None
    preview: _Preview = False
    cost: _Cost = False


class GetImage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Arguments of ``get_image``."""

    name: _Name
    preview: _Preview = False
    cost: _Cost = False


class ListWaiting(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Arguments of ``list_waiting``: none."""


class CancelImage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Arguments of ``cancel_image``."""

    name: _Name


_TOOLS: tuple[tuple[type[msgspec.Struct], str, str, dict[str, bool]], ...] = (
    (
        CreateImage,
        "create_image",
        _CREATE,
        {"readOnlyHint": False, "destructiveHint": False, "idempotentHint": True, "openWorldHint": True},
    ),
    (
        GetImage,
        "get_image",
        "Return the state of a request and the paths of its images. Waits a short time if it is not finished. Free.",
        {"readOnlyHint": True},
    ),
    (
        ListWaiting,
        "list_waiting",
        "Return whether the daemon runs, why requests are on hold, and which prompts wait. Free.",
        {"readOnlyHint": True},
    ),
    (
        CancelImage,
        "cancel_image",
        "Take a request out of the queue, if it was not claimed yet. Nothing is charged then. Its name stays used.",
        {"readOnlyHint": False, "destructiveHint": True, "idempotentHint": True},
    ),
)


def tools() -> list[types.Tool]:
    """Return the tools with the schemas of their arguments."""
    return [
        types.Tool(
            name=name,
            description=description,
            input_schema=_schema(kind),
            annotations=types.ToolAnnotations.model_validate(hints),
        )
        for kind, name, description, hints in _TOOLS
    ]


def _schema(kind: type[msgspec.Struct]) -> dict[str, Any]:
    (_, components) = msgspec.json.schema_components([kind])
    schema = dict(components[kind.__name__])
    return {key: value for key, value in schema.items() if key not in {"title", "description"}} | {
        "additionalProperties": False
    }


class _SlowError(Exception):
    """The folders did not respond in time."""


class Tools:
    """Carries out the calls.

    Args:
        jobs: The jobs.
        seconds: A call is answered after this time at the latest.
        clock: Monotonic clock, seconds.
        in_thread: Runs a function that uses the folders.

    Attributes:
        drops: What is being dropped now.
    """

    def __init__(
        self,
        jobs: NamedJobs,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
        in_thread: Callable[..., Coroutine[Any, Any, Any]] = asyncio.to_thread,
    ) -> None:
        self._jobs = jobs
        self._seconds = seconds
        self._clock = clock
        self._in_thread = in_thread
        self._answers = Answers(jobs)
        self.drops: set[asyncio.Task[Job]] = set()

    async def call(self, name: str, arguments: dict[str, Any]) -> types.CallToolResult:
        """Return what a tool answers; what is wrong with the call is an answer, too."""
        kind = next((kind for kind, tool, *_ in _TOOLS if tool == name), None)
        if kind is None:
            return _failed(f"there is no tool {printable(name, 100)}", [])
        try:
            asked = msgspec.convert(arguments, kind, str_keys=False)
            return await self._answer(asked)
        except msgspec.ValidationError as error:
            return _failed(printable(_BAD_NAME if "regex" in str(error) else str(error)), [])
        except BadRequest as error:
            return _failed("nothing was dropped", [printable(str(problem)) for problem in error.problems])
        except ImagewatchError as error:
            return _failed(printable(str(error)), [printable(error.hint)] if error.hint else [])

    async def _answer(self, asked: msgspec.Struct) -> types.CallToolResult:
        began = self._clock()
        latest = began + max(self._seconds + _MORE_SECONDS, _FOLDER_SECONDS)
        try:
            if isinstance(asked, ListWaiting):
                return _structured(await self._within(latest, self._answers.queue))
            if isinstance(asked, CancelImage):
                job = await self._within(latest, self._jobs.cancel, asked.name)
                answer = await self._within(latest + _ANSWER_SECONDS, self._answers.job, job)
                return _structured(answer | ({"message": _TOO_LATE} if job.state == "in_progress" else {}))
            assert isinstance(asked, CreateImage | GetImage)
            return await self._awaited(asked, began, latest)
        except _SlowError:
            name = getattr(asked, "name", None)
            return _structured(({"name": name} if name else {}) | {"state": "slow", "message": _SLOW})

    async def _awaited(self, asked: CreateImage | GetImage, began: float, latest: float) -> types.CallToolResult:
        """Return what a job has become, after waiting for it."""
        if isinstance(asked, CreateImage):
            options = {name: getattr(asked, name) for name in (*Options.__struct_fields__, "preset")}
            job = await self._dropped(latest, self._jobs.create, asked.name, asked.prompt, options, asked.images)
        else:
            job = await self._within(latest, self._jobs.find, asked.name)
        while not job.is_over and self._clock() - began < self._seconds:
            await asyncio.sleep(_POLL_SECONDS)
            job = await self._within(latest, self._jobs.find, asked.name)
        previews: list[bytes] = []
        if asked.preview:
            with contextlib.suppress(_SlowError):
                previews = await self._within(began + _PREVIEW_SECONDS, self._answers.previews, job)
        latest = max(latest, self._clock()) + _ANSWER_SECONDS
        return _structured(
            await self._within(latest, functools.partial(self._answers.job, job, cost=asked.cost)), previews
        )

    async def _within(self, latest: float, work: Callable[..., _T], *arguments: object) -> _T:
        """Return what a function returns that uses the folders. It runs in a thread, and continues there if it is slow.

        Raises:
            _SlowError: It has not returned in time.
        """
        task = asyncio.ensure_future(self._in_thread(work, *arguments))
        return await self._ended(latest, task)

    async def _ended(self, latest: float, task: asyncio.Task[_T]) -> _T:
        done, _ = await asyncio.wait({task}, timeout=max(latest - self._clock(), 0.0))
        if not done:
            task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # else asyncio reports it
            raise _SlowError
        return task.result()

    async def _dropped(self, latest: float, work: Callable[..., Job], *arguments: object) -> Job:
        """Drop a prompt in a thread; if the client disconnects meanwhile, this is completed first."""
        task = asyncio.ensure_future(self._in_thread(work, *arguments))
        self.drops.add(task)
        task.add_done_callback(self.drops.discard)
        try:
            return await self._ended(latest, task)
        except asyncio.CancelledError:
            await asyncio.wait({task})
            raise


def _structured(answer: dict[str, Any], previews: list[bytes] | None = None) -> types.CallToolResult:
    content: list[types.ContentBlock] = [types.TextContent(type="text", text=to_json(answer, default=str))]
    content += [
        types.ImageContent(type="image", data=base64.b64encode(preview).decode(), mime_type="image/webp")
        for preview in previews or ()
    ]
    return types.CallToolResult(content=content, structured_content=answer)


def _failed(message: str, problems: list[str]) -> types.CallToolResult:
    result = _structured({"message": message, "problems": problems})
    result.is_error = True
    return result


def serve(jobs: NamedJobs, seconds: float) -> None:
    """Answer the calls of one client on standard input and output until it disconnects.

    Args:
        jobs: The jobs.
        seconds: A call is answered after this time at the latest.
    """
    asyncio.run(_serve(Tools(jobs, seconds)))


async def _leave(offered: Tools, number: int) -> None:
    """End the process after a signal. The thread that reads standard input cannot be interrupted."""
    if offered.drops:
        await asyncio.wait(offered.drops, timeout=_LEAVE_SECONDS)
    os._exit(EXIT_SIGNAL + number)


async def _serve(offered: Tools) -> None:
    loop = asyncio.get_running_loop()
    leaving: set[asyncio.Task[None]] = set()

    def on_signal(number: int) -> None:
        leaving.add(asyncio.ensure_future(_leave(offered, number)))

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, on_signal, number)

    async def on_list_tools(
        _context: ServerRequestContext[Any], _params: types.PaginatedRequestParams | None
    ) -> types.ListToolsResult:
        return types.ListToolsResult(tools=tools())

    async def on_call_tool(
        _context: ServerRequestContext[Any], params: types.CallToolRequestParams
    ) -> types.CallToolResult:
        return await offered.call(params.name, params.arguments or {})

    server: Server[Any] = Server(
        "imagewatch",
        version=__version__,
        instructions=_INSTRUCTIONS,
        on_list_tools=on_list_tools,
        on_call_tool=on_call_tool,
    )
    async with stdio_server() as (incoming, outgoing):
        await server.run(incoming, outgoing, server.create_initialization_options())
