"""The sections of a configuration as frozen values: names, types, defaults and bounds, as in ``config.example.toml``.

A test holds the two together. An API key is never part of a configuration, so a ``Config`` may be printed.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

Provider = Literal["flux", "gemini", "openai"]

# A day at most: longer waits overflow timers, and no one means them.
_Seconds = Annotated[float, Meta(ge=0, le=86_400)]
_Timeout = Annotated[float, Meta(gt=0, le=86_400)]
_Amount = Annotated[float, Meta(ge=0)]
_Bytes = Annotated[int, Meta(ge=0)]
_Text = Annotated[str, Meta(min_length=1)]
# A title is the type as docs/make.py names it.
_Path = Annotated[str, Meta(min_length=1, title="path")]
_Mode = Annotated[int, Meta(title="octal mode, as text")]
_Command = Annotated[tuple[str, ...], Meta(title="list of text: a program and its arguments")]


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What a request may ask for besides its text; ``None`` means not set.

    Names, types and bounds are the published request body's (image-generation skill, "Request body");
    ``provider = "auto"`` is ours. ``model`` is not checked: model names change too often.
    """

    provider: Literal["auto", "flux", "gemini", "openai"] | None = None
    model: Annotated[str, msgspec.Meta(min_length=1, max_length=200)] | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=4)] | None = None
    size: Annotated[str, msgspec.Meta(min_length=1, max_length=40)] | None = None
    quality: Literal["low", "medium", "high", "auto"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    seed: Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)] | None = None

    def over(self, lower: Options) -> Options:
        """Return these options with what is not set here taken from ``lower``."""
        values = {
            name: mine if (mine := getattr(self, name)) is not None else getattr(lower, name)
            for name in self.__struct_fields__
        }
        return Options(**values)


class Folders(msgspec.Struct, frozen=True, kw_only=True):
    """``[folders]``: where everything is. Loaded, all paths are absolute.

    Attributes:
        root: The folder that the others are in unless set alone; empty when not set.
        inbox: Where prompts are dropped.
        outbox: Where images and receipts are published.
        errors: Where refused prompts go, each with an error file.
        archive: Where completed prompts go, or the word ``delete``.
        state: Ledger with the job records, responses and lock; local and private.
        notice: Where the status files for users are; loaded, it is empty if there are none.
    """

    root: _Path = ""
    inbox: _Path = ""
    outbox: _Path = ""
    errors: _Path = ""
    archive: _Path = ""
    state: _Path = ""
    notice: _Path = ""


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """``[endpoint]``: the API, the key, and how long to wait.

    Attributes:
        base_url: Without ``/v1`` and without a slash at the end.
        api_key_file: Absolute path of a file that holds the key alone.
        api_key_command: Program and arguments that print the key; empty when not set.
        connect_timeout_seconds: For the connection alone.
        timeout_seconds: For each single read of the response.
        deadline_seconds: For one request in total.
        max_response_bytes: A longer response is cut off.
        ca_file: Absolute path of a PEM bundle to trust instead of the usual ones.
        allow_private_downloads: Whether an image's URL may point to a private address.
    """

    base_url: str = "https://api.letta.com"
    api_key_file: _Path | None = None
    api_key_command: _Command = ()
    connect_timeout_seconds: _Timeout = 10.0
    timeout_seconds: _Timeout = 600.0
    deadline_seconds: _Timeout = 900.0
    max_response_bytes: Annotated[int, Meta(ge=1)] = 400_000_000
    ca_file: _Path | None = None
    allow_private_downloads: bool = False


class Inbox(msgspec.Struct, frozen=True, kw_only=True):
    """``[inbox]``: how the inbox is watched.

    Attributes:
        watch: Change events of the kernel, polling, or whichever works.
        settle_seconds: How long files must have been unchanged.
        input_wait_seconds: How long declared input images are waited for.
        rescan_seconds: Interval of the complete scan that needs no events.
        recursive: Whether sub-folders are watched.
        redelivery: What to do with a finished prompt that a sync tool delivers again.
    """

    watch: Literal["auto", "native", "poll"] = "auto"
    settle_seconds: Annotated[float, Meta(ge=0, le=3600)] = 5.0
    input_wait_seconds: _Seconds = 60.0
    rescan_seconds: Annotated[float, Meta(ge=0.1, le=86_400)] = 30.0
    recursive: bool = True
    redelivery: Literal["skip", "run"] = "skip"


class Outbox(msgspec.Struct, frozen=True, kw_only=True):
    """``[outbox]``: who may read what is published.

    Attributes:
        file_mode: Permission bits of published files; ``None`` leaves it to the umask.
        folder_mode: Permission bits of created folders; ``None`` leaves it to the umask.
        group: Name of the group that owns both; ``None`` leaves it to the system.
    """

    file_mode: _Mode | None = None
    folder_mode: _Mode | None = None
    group: _Text | None = None


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """``[limits]``: guard rails for money, disk and what prompts may ask. An empty list allows all.

    Attributes:
        concurrency: Requests at the same time.
        requests_per_minute: Requests begun in a minute; 0 is off.
        credits_per_day: Credits in a day, by UTC; 0 is off.
        credits_per_month: Credits in a calendar month, by UTC; 0 is off.
        assumed_credits: Credits reserved for each image of a request whose price is not known yet.
        burst: So many new prompts may come at the same time; more put the queue on hold until a release; 0 is off.
        providers: Providers that may be asked.
        models: Models that may be asked.
        qualities: Qualities that may be asked.
        max_n: Images per request.
        max_prompt_chars: Characters of a prompt.
        max_input_bytes: Bytes of all input images of one request together.
        min_free_bytes: Free space below which nothing new is begun.
    """

    concurrency: Annotated[int, Meta(ge=1, le=64)] = 4
    requests_per_minute: _Amount = 0.0
    credits_per_day: _Amount = 0.0
    credits_per_month: _Amount = 0.0
    assumed_credits: _Amount = 150.0
    burst: Annotated[int, Meta(ge=0)] = 0
    providers: tuple[Provider, ...] = ()
    models: tuple[_Text, ...] = ()
    qualities: tuple[Literal["low", "medium", "high", "auto"], ...] = ()
    max_n: Annotated[int, Meta(ge=1, le=4)] = 4
    max_prompt_chars: Annotated[int, Meta(ge=1, le=32_000)] = 32_000
    max_input_bytes: _Bytes = 300_000_000
    min_free_bytes: _Bytes = 500_000_000


class FolderBudget(msgspec.Struct, frozen=True, kw_only=True):
    """``[budgets."FOLDER"]``: caps for a first-level folder of the inbox and all below it, besides ``[limits]``.

    Attributes:
        credits_per_day: Credits in a day, by UTC; 0 is off.
        credits_per_month: Credits in a calendar month, by UTC; 0 is off.
        requests_per_minute: Requests begun in a minute; 0 is off.
    """

    credits_per_day: _Amount = 0.0
    credits_per_month: _Amount = 0.0
    requests_per_minute: _Amount = 0.0


class Notify(msgspec.Struct, frozen=True, kw_only=True):
    """``[notify]``: who is notified of how jobs end and of holds. Without a command or a URL there are no events.

    Attributes:
        command: Program and arguments that get each event on standard input; empty when not set.
        url: Address to which each event is posted. It may hold a secret, so it is never shown whole.
        secret_file: Absolute path of a file with the secret that signs what is posted.
    """

    command: _Command = ()
    url: _Text | None = None
    secret_file: _Path | None = None


class Shared(msgspec.Struct, frozen=True, kw_only=True):
    """``[shared]``: one database for several daemons that use the same account. Without a database it is off.

    Attributes:
        database: Service, connection string or URI of PostgreSQL, without a password; empty: the journal is in the
            state folder.
        account: Daemons that name the same account share its caps, rates and holds.
        instance: Name of this daemon, unique in the database; empty: see ``config.shared``.
        inbox: Daemons that name the same inbox process one inbox together; empty: each has one of its own.
        lease_seconds: After this time without a sign of a daemon, the others take it to be stopped.
        durability: Whether a standby server must have each payment before its request is sent.
    """

    database: str = ""
    account: str = "main"
    instance: str = ""
    inbox: str = ""
    lease_seconds: Annotated[float, Meta(ge=10, le=3600)] = 60.0
    durability: Literal["replicated", "single"] = "replicated"


class Retry(msgspec.Struct, frozen=True, kw_only=True):
    """``[retry]``: for what is provably free only.

    Attributes:
        attempts: Attempts in all, the first included.
        initial_seconds: Wait after the first; doubled after each.
        max_seconds: The longest wait.
    """

    attempts: Annotated[int, Meta(ge=1, le=20)] = 4
    initial_seconds: _Seconds = 1.0
    max_seconds: _Seconds = 60.0


class Log(msgspec.Struct, frozen=True, kw_only=True):
    """``[log]``: how much is logged, and in which form.

    Attributes:
        level: The least important level that is shown.
        format: For people, for machines, or by whether a terminal reads it.
    """

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json"] = "auto"


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """A whole configuration, checked. Holds no key.

    Attributes:
        folders: ``[folders]``, all absolute.
        endpoint: ``[endpoint]``.
        inbox: ``[inbox]``.
        outbox: ``[outbox]``.
        defaults: ``[defaults]``; ``provider`` is always set.
        presets: ``[presets.NAME]`` by name.
        limits: ``[limits]``.
        budgets: ``[budgets."FOLDER"]`` by the name of the folder.
        notify: ``[notify]``.
        shared: ``[shared]``.
        retry: ``[retry]``.
        log: ``[log]``.
        source: Absolute name of the file, or ``environment``.
    """

    folders: Folders
    endpoint: Endpoint = Endpoint()
    inbox: Inbox = Inbox()
    outbox: Outbox = Outbox()
    defaults: Options = Options(provider="auto")
    presets: dict[str, Options] = msgspec.field(default_factory=dict)
    limits: Limits = Limits()
    budgets: dict[str, FolderBudget] = msgspec.field(default_factory=dict)
    notify: Notify = Notify()
    shared: Shared = Shared()
    retry: Retry = Retry()
    log: Log = Log()
    source: str = "environment"


SECTIONS: Final[dict[str, type[msgspec.Struct]]] = {
    "folders": Folders,
    "endpoint": Endpoint,
    "inbox": Inbox,
    "outbox": Outbox,
    "defaults": Options,
    "limits": Limits,
    "notify": Notify,
    "shared": Shared,
    "retry": Retry,
    "log": Log,
}
"""All but those in ``NAMED``."""
NAMED: Final[dict[str, type[msgspec.Struct]]] = {"presets": Options, "budgets": FolderBudget}
"""Sections such as ``[presets.NAME]``, of which there are any number, by the name before the dot."""
RESTART: Final = ("folders", "outbox", "shared")
"""Sections that are read at the start only: folders and the journal are proved before anything is paid for. A reload
applies all others."""
SINCE: Final[dict[str, str]] = {}
"""For each key that version 0.1 does not have, such as ``limits.burst``, the version that has it first."""
DELETE: Final = "delete"
"""In the place of the archive: originals are removed."""
OFF: Final = "off"
"""In the place of the folder for the status files: there are none."""
