"""Write the pages of the reference that follow from the code: ``python docs/make.py``, or ``make reference``.

A key's meaning is its comment in ``config.example.toml``; all else about it is in ``config/schema.py``. Commands and
exit codes are in their help texts.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, get_args, get_origin

import click
import msgspec

from imagewatch.commands import metrics
from imagewatch.commands.main import COMMANDS, cli, load_command
from imagewatch.config.example import example
from imagewatch.config.schema import NAMED, RESTART, SECTIONS, SINCE

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDER = Path(__file__).parent / "reference"
MARK = "<!-- Written by docs/make.py: change the code or the example of a configuration instead. -->"
FIRST = "0.1"
_KEY = re.compile(r"(?P<marks>#{0,2}) ?(?P<key>[a-z_]+) = (?P<value>.+)")
_HEAD = re.compile(r"(## )?\[(?P<name>[a-z]+)(\.\w+)?\]")
_WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text"}

CONFIGURATION = """\
# Configuration

The configuration is one TOML file. `imagewatch init` writes one with every key, its default and a comment;
`imagewatch check` lists every problem of yours.

The daemon and the commands use the first of these that exists:

1. the file of `--config`, or of `IMAGEWATCH_CONFIG` in the environment;
2. `./imagewatch.toml`, only if it and the folder belong to you or root and no other user may write them;
3. `~/.config/imagewatch/config.toml`;
4. `/etc/imagewatch/config.toml`.

Relative paths start at the folder of the file. A path may begin with `~/`.

**Environment.** Each key has a name in the environment, which overrides the file. Write text as it is, and other
values as in TOML:
`IMAGEWATCH_LIMITS__CONCURRENCY=2`, `IMAGEWATCH_LIMITS__PROVIDERS='["flux"]'`. `LETTA_BASE_URL` and `LETTA_API_KEY`
count if the configuration does not set the URL or the key.

**Change.** *Reload*: `systemctl reload imagewatch`, or SIGHUP, applies a change while the daemon runs. If the new
configuration has a problem, the old one stays in use, and the log has `reload_failed`.
*Restart*: a change needs a restart; a reload refuses it. A change in the environment always needs a restart. Other
commands read the configuration at each call.
"""
COMMANDS_HEAD = """\
# Commands

`imagewatch COMMAND --help` prints the same, and so does `man imagewatch`. [Exit codes](exit-codes.md) has the exit
codes of all commands,
[JSON output of the commands](json-output.md) what `--json` prints.
"""
EXITS = """\
# Exit codes

Every command exits with one of these codes.

| code | meaning |
|---|---|
"""
EXITS_FOOT = """
A command that a signal ends exits with 128 and the number of the signal, such as 130 after Ctrl-C and 143 after
SIGTERM.
[JSON output of the commands](json-output.md) explains for `once` and `submit` what is queued after each code, and
whether you may run the command again.
[Fix failed and stuck jobs](../howto/failures.md#when-it-does-not-start) explains the codes of a daemon that does not
start.
"""
METRICS = """\
# Metrics

`imagewatch status --prometheus` prints these metrics in the text format of Prometheus. [Monitor the
service](../howto/monitor.md) has the set-up and alerting rules.

Each name begins with `imagewatch_`. Each series has the label `inbox`, the path of the inbox; further labels are in
the table. Days and months are in UTC.

| metric | type | labels | meaning |
|---|---|---|---|
"""
METRICS_FOOT = """
| label | values |
|---|---|
| `reason` of `imagewatch_held` | a [kind of hold](holds.md). A hold for one folder only is not in it |
| `reason` of `imagewatch_not_ready_prompts` | a [key of `waiting.why`](json-output.md), or `other` |
| `outcome` | `completed`, `refused`, `unknown` |
| `period` | `day`, `month` |
| `folder` | a folder with a budget |
| `version` | the version of the daemon |

- Some metrics are not always there. Those of budgets need `[budgets]`, those of caps a cap, and those of notifications
  `[notify]`. Those of the balance appear when the API has reported one.
- If daemons share an account, `imagewatch_period_jobs`, `imagewatch_period_credits`, `imagewatch_balance_credits`,
  `imagewatch_budget_credits` and `imagewatch_redelivered_prompts_total` are those of the account, with the same value
  from each host: use `max`, not `sum`. Those of an idle host are as of its last scan, up to `inbox.rescan_seconds`
  (30 seconds by default) ago.
- While the daemon is down, `imagewatch_up` is 0, and the figures about waiting prompts are those of its last scan.
"""
_SUMS = {"completed": 0, "refused": 0, "unknown": 0, "credits": 0, "cap": 1}
_TIME = "2026-01-01T00:00:00Z"
STATUS = {
    "inbox": "/srv/imagewatch/inbox",
    "is_running": True,
    "version": "1",
    "last_scan": _TIME,
    "updated": _TIME,
    "waiting": {"ready": 0, "why": {}},
    "ignored": {"count": 0},
    "in_flight": [],
    "stuck": [],
    "holds": [],
    "today": _SUMS,
    "month": _SUMS,
    "budgets": [{"folder": "anna", "today": _SUMS, "month": _SUMS}],
    "balance": {"credits": 0, "at": _TIME},
    "notifications": {"pending": 0, "failed": 0},
    "redelivered": 0,
}
"""A status for which each metric is printed."""


class Entry(NamedTuple):
    """A key of the example: its comment, and its value as it is written there."""

    meaning: str
    value: str
    is_default: bool


def examples() -> tuple[dict[str, str], dict[str, Entry]]:
    """The texts above the sections of the example, and its keys by their dotted names."""
    sections: dict[str, str] = {}
    keys: dict[str, Entry] = {}
    section, comment = "", ""
    for line in example().splitlines():
        head, key = _HEAD.fullmatch(line), _KEY.fullmatch(line)
        if head is not None:
            section = head["name"]
            sections[section], comment = comment if head[1] else "", ""
        elif line == "#":
            sections[section], comment = comment, ""
        elif key is not None:
            keys[f"{section}.{key['key']}"] = Entry(comment, key["value"], key["marks"] != "##")
            comment = ""
        else:
            comment = f"{comment} {line.removeprefix('# ')}".strip() if line.startswith("# ") else ""
    return sections, keys


def words(text: str) -> str:
    """A comment as Markdown: what is quoted there is code."""
    text = re.sub(r"(imagewatch)?\[[a-z.]+\]", lambda found: f"`{found[0]}`", text)
    text = text.replace("docs/howto/notify.md", "[Notifications](../howto/notify.md)")
    quoted = re.sub(r'"([^"]+)"', lambda found: f"`{found[1]}`" if " " in found[1] else f'`"{found[1]}"`', text)
    return re.sub(r"(?<![`\w.])([a-z]+_[a-z_]+)(?![`\w.])", r"`\1`", quoted)


def kind(type_: object, key: str) -> str:
    """The type of a key for a reader."""
    if get_origin(type_) is Annotated:
        base, *metas = get_args(type_)
        metas = [meta for meta in metas if isinstance(meta, msgspec.Meta)]
        titles = [meta.title for meta in metas if meta.title]
        return titles[0] if titles else kind(base, key) + "".join(bounds(meta) for meta in metas)
    if get_origin(type_) is Literal:
        return "one of " + ", ".join(f'`"{word}"`' for word in get_args(type_))
    if get_origin(type_) is tuple:
        return f"list of {kind(get_args(type_)[0], key)}"
    if type(None) in get_args(type_):
        (inner,) = (one for one in get_args(type_) if one is not type(None))
        return kind(inner, key)
    unit = next((f" of {unit}" for unit in ("seconds", "bytes") if key.endswith(f"_{unit}")), "")
    return _WORDS[type_] + unit


def bounds(meta: msgspec.Meta) -> str:
    """What a value may be."""
    least, most = meta.ge, meta.le
    if meta.gt is not None:
        return f", more than {meta.gt:,}, at most {most:,}"
    if least is not None and most is not None:
        return f", {least:,} to {most:,}" if abs(least) < 2**53 else ", -2<sup>53</sup> to 2<sup>53</sup>"
    if least is not None:
        return f", {least:,} or more"
    return f", at most {meta.max_length} characters" if meta.max_length else ""


def value(name: str, entry: Entry) -> str:
    """The default of a key."""
    if name == "folders.root":
        return "none: set it, or each of the four folders"
    if not entry.is_default:
        return f"not set (an example: `{entry.value}`)"
    return f"`{entry.value.replace('/srv/imagewatch', 'ROOT')}`"


def key_entry(section: str, field: msgspec.structs.FieldInfo, entry: Entry, variable: str, shown: str) -> Iterator[str]:
    """The part of the page about one key."""
    name = f"{section}.{field.name}"
    change = "restart" if section in RESTART else "reload"
    yield f"### {name}\n\n{words(entry.meaning)}\n"
    yield "| type | default | since | change | environment |\n|---|---|---|---|---|"
    yield f"| {kind(field.type, field.name)} | {shown} | {SINCE.get(name, FIRST)} | {change} | `{variable}` |\n"


def configuration() -> str:
    """The page about the keys of the configuration."""
    sections, keys = examples()
    lines = [MARK, "", CONFIGURATION]
    for section, struct in SECTIONS.items():
        lines += [f"## {section}\n"]
        lines += [f"{words(sections[section])}\n"] if sections[section] else []
        fields = {f"{section}.{field.name}": field for field in msgspec.structs.fields(struct)}
        for name, field in ((name, fields[name]) for name in keys if name in fields):
            variable = f"IMAGEWATCH_{section}__{field.name}".upper()
            lines += key_entry(section, field, keys[name], variable, value(name, keys[name]))
        for named, home in (("presets", "defaults"), ("budgets", "limits")):
            if home == section:
                lines += named_section(named, home, sections[named])
    return "\n".join(lines)


def named_section(name: str, home: str, text: str) -> Iterator[str]:
    """The part about a section of which there are any number."""
    of = {"presets": "NAME", "budgets": "FOLDER"}[name]
    yield f"## {name}.{of}\n\n{words(text)}\n"
    yield "| key | type | since | change | environment |\n|---|---|---|---|---|"
    for field in msgspec.structs.fields(NAMED[name]):
        linked = f"[`{field.name}`](#{home}{field.name})"
        variable = f"IMAGEWATCH_{name}__{of}__{field.name}".upper()
        since = SINCE.get(f"{name}.{field.name}", FIRST)
        yield f"| {linked} | {kind(field.type, field.name)} | {since} | reload | `{variable}` |"
    yield ""


def plain(text: str) -> str:
    """Help text as Markdown."""
    return re.sub(r"(?<=\s)(--?[a-z][a-z-]*)", r"`\1`", re.sub(r"([*_<>|\[\]])", r"\\\1", f" {text}")).strip()


def command(name: str, one: click.Command) -> Iterator[str]:
    """The part of the page about one command."""
    given = [part for part in one.params if isinstance(part, click.Argument)]
    arguments = [
        part.metavar or (str(part.name).upper() if part.required else f"[{part.name}]".upper()) for part in given
    ]
    usage = " ".join(
        ["imagewatch", name, "[OPTIONS]", *arguments, *(["COMMAND"] if isinstance(one, click.Group) else [])]
    )
    yield f"{'##' if ' ' not in name else '###'} {name}\n\n```text\n{usage}\n```\n"
    for part in (one.help or "").partition("\f")[0].strip().split("\n\n"):
        yield plain(" ".join(part.split())) + "\n"
    options = [part for part in one.params if isinstance(part, click.Option)]
    yield "| option | meaning |\n|---|---|"
    for option in options:
        names = ", ".join(f"`{text}`" for text in (*option.opts, *option.secondary_opts))
        choices = "|".join(map(str, option.type.choices)) if isinstance(option.type, click.Choice) else ""
        metavar = "" if option.is_flag else (option.metavar or choices).replace("|", "\\|")
        default = f" (default: `{option.default}`)" if option.show_default else ""
        yield f"| {names}{f' `{metavar}`' if metavar else ''} | {plain(str(option.help))}{default} |"
    yield "| `-h`, `--help` | Print the help text and exit |\n"
    if isinstance(one, click.Group):
        for inner in sorted(one.commands):
            yield from command(f"{name} {inner}", one.commands[inner])


def commands() -> str:
    """The page about the commands."""
    lines = [MARK, "", COMMANDS_HEAD, "| command | what it does |\n|---|---|"]
    lines += [f"| [`{name}`](#{name}) | {plain(text)} |" for name, (_, text) in sorted(COMMANDS.items())]
    lines += [""]
    for name in sorted(COMMANDS):
        lines += command(name, load_command(name))
    return "\n".join(lines)


def exits() -> str:
    """The page about the exit codes."""
    codes = re.findall(r"^  (\d+) +(.+)$", re.sub(r"\n {6}", " ", str(cli.epilog)), re.MULTILINE)
    rows = [f"| {code} | {plain(text)} |" for code, text in codes]
    return "\n".join([MARK, "", EXITS.rstrip(), *rows, EXITS_FOOT])


def metric_page() -> str:
    """The page about the metrics."""
    rows = []
    for name, meaning, type_ in re.findall(r"^# HELP (\w+) (.+)\n# TYPE \1 (\w+)$", metrics.text(STATUS), re.MULTILINE):
        labels = re.findall(rf"^{name}{{(.+)}} ", metrics.text(STATUS), re.MULTILINE)
        names = dict.fromkeys(re.findall(r'(\w+)="', ",".join(labels)))
        others = ", ".join(f"`{label}`" for label in names if label != "inbox")
        rows.append(f"| `{name}` | {type_} | {others} | {meaning} |")
    return "\n".join([MARK, "", METRICS.rstrip(), *rows, METRICS_FOOT])


PAGES = {"configuration": configuration, "commands": commands, "exit-codes": exits, "metrics": metric_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (FOLDER / f"{name}.md").write_text(page().rstrip() + "\n", encoding="utf-8")
