"""The blocks of the pages for users that ``<!-- run: NAME -->`` marks, run exactly as they are written.

``<!-- seen -->`` marks what the command before it prints; numbers, ids and the folder may differ. ``…`` is any number
of lines, or the rest of a line. A block that no test runs says so: ``<!-- manually -->`` or ``<!-- not tried -->``.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.daemon import KEY, Folders, until
from support.endpoint import unique_png
from support.pages import DOCS, page, table
from support.ports import free_port

from imagewatch.commands.batch import MOST_WITHOUT_YES
from imagewatch.config.load import load
from imagewatch.config.schema import Endpoint, Limits, Retry
from imagewatch.inbox.candidate import Wait
from imagewatch.journal.holds import LONGEST_ASKED_SECONDS, LONGEST_SECONDS
from imagewatch.protocol import prompt as prompts
from imagewatch.protocol.image_reader import MAX_PIXELS
from imagewatch.protocol.jpeg import MAX_SCANS
from imagewatch.protocol.prompt import parse
from imagewatch.protocol.reasons import HOLDS
from imagewatch.system.exits import EXIT_CONFIG, EXIT_HELD, EXIT_INTERNAL, EXIT_RUNNING, EXIT_SPOOL, EXIT_USAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from imagewatch.sandbox import Sandbox

    Shell = Callable[..., subprocess.CompletedProcess[str]]

PAGES = [
    "tutorial",
    "troubleshooting",
    *(
        f"howto/{name}"
        for name in (
            "back-up",
            "budgets",
            "edit-pictures",
            "first-inbox",
            "log-retention",
            "monitor",
            "presets",
            "purge-results",
            "rotate-key",
            "selinux-apparmor",
            "several-inboxes",
            "share-nfs",
            "share-samba",
            "share-syncthing",
            "upgrade",
        )
    ),
]
_BLOCK = re.compile(r"^<!-- (run|seen)(?:: (\w+))? -->\n```(\w+)\n(.+?)^```$", re.MULTILINE | re.DOTALL)
_READS = ("ls ", "cat pictures", "grep ", "imagewatch status", "imagewatch history")
PROGRAMS = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
PLACE = "/srv/imagewatch"
DAY = 86_400
RUN = {name: text for one in PAGES for kind, name, _, text in _BLOCK.findall(page(one)) if kind == "run"}
"""The blocks that a test here runs, by name."""


def masked(text: str, here: Path) -> str:
    """A text without what differs each time."""
    text = text.replace(str(here), "/home/you/tutorial")
    text = re.sub(r"\b[0-9a-f]{16,}\b|-[0-9a-f]{6}\b", "#", text)
    return re.sub(r" +", " ", re.sub(r"\d+", "0", text))


def is_seen(printed: str, shown: str, here: Path) -> bool:
    """Whether a command printed what a page shows."""
    lines = masked(shown, here).splitlines()
    pattern = "".join("(?:.*\n)*?" if line == "…" else f"{_of_line(line)}\n" for line in lines)
    return re.fullmatch(pattern, masked(printed, here)) is not None


def _of_line(line: str) -> str:
    """A pattern for a line, which a page may cut with an ``…`` at its end."""
    return re.escape(line.removesuffix("…")) + ".*" * line.endswith("…")


class Terminals:
    """Three terminals of one user: two with a program that continues to run."""

    def __init__(self, here: Path, **environ: str) -> None:
        self.here = here
        self._environ = {"PATH": PROGRAMS, "HOME": str(here), "COLUMNS": "200", **environ}
        self._running: list[subprocess.Popen[bytes]] = []

    def export(self, text: str) -> None:
        """Set variables for all that is run later."""
        self._environ |= dict(re.findall(r"^export (\w+)=(.+)$", text, re.MULTILINE))

    def start(self, text: str, name: str) -> Path:
        """Start a program; return the file with what it prints."""
        output = self.here.parent / f"{name}.output"
        with output.open("wb") as file:
            command = ["bash", "-c", f"exec {text}"]
            options: dict[str, Any] = {"stdout": file, "stderr": file, "stdin": subprocess.DEVNULL}
            self._running.append(subprocess.Popen(command, cwd=self.here, env=self._environ, **options))
        return output

    def run(self, text: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run commands to their end."""
        where = {"cwd": self.here, "env": self._environ, "timeout": 50}
        joined: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.run(["bash", "-uc", text], check=False, **where, **joined, **options)

    def end(self) -> None:
        """Ctrl-C in each, the newest first."""
        for process in reversed(self._running):
            process.send_signal(signal.SIGINT)
            process.wait(30)


@pytest.fixture
def terminals(tmp_path: Path) -> Iterator[Callable[..., Terminals]]:
    opened: list[Terminals] = []

    def make(**environ: str) -> Terminals:
        here = tmp_path / "here"
        here.mkdir()
        opened.append(Terminals(here, **environ))
        return opened[-1]

    yield make
    for one in opened:
        one.end()


@pytest.fixture
def shell(folders: Folders, start: Any, tmp_path: Path) -> Shell:
    """Run commands of a page beside a daemon, in its folders in the place of those of a service."""
    start(folders, "run")
    until((folders.state / "status.json").exists)
    pictures = tmp_path / "Pictures"
    pictures.mkdir()

    def run(text: str) -> subprocess.CompletedProcess[str]:
        environ = {"PATH": PROGRAMS, "COLUMNS": "200", **folders.environ, "HOME": str(tmp_path)}
        text = text.replace(PLACE, str(folders.root))
        return subprocess.run(
            ["sh", "-euc", text], env=environ, cwd=pictures, capture_output=True, text=True, timeout=50, check=True
        )

    return run


def test_each_block_of_commands_says_whether_it_was_run():
    marks = r"<!-- (?:run: \w+|tested: \w+|manually|not tried) -->"
    for name in PAGES:
        text = page(name)
        marked = re.findall(rf"^{marks}\n```sh$", text, re.MULTILINE)
        assert len(marked) == len(re.findall(r"^```sh$", text, re.MULTILINE)), name


def test_each_marked_block_is_run_here():
    text = Path(__file__).read_text()
    assert all(f'RUN["{name}"]' in text for name in RUN if name not in {"tutorial", "sandbox", "variables", "daemon"})


# The tutorial


def test_the_tutorial_works_and_prints_what_it_shows(terminals: Callable[..., Terminals]) -> None:
    settings = {"IMAGEWATCH_INBOX__SETTLE_SECONDS": "0", "IMAGEWATCH_LOG__FORMAT": "console"}
    here = terminals(**settings)
    port, printed, output = free_port(), "", Path("/nonexistent")
    reads = ""
    for kind, name, _, text in _BLOCK.findall(page("tutorial")):
        block = text.replace("8283", str(port))
        if kind == "run" and name == "tutorial":
            reads = block if all(line.startswith(_READS) for line in block.splitlines()) else ""
            printed = here.run(block).stdout
            if "imagewatch release" in block:
                until(lambda: any((here.here / "pictures/outbox").glob("a-garden*.receipt.toml")))
        elif kind == "run" and name == "variables":
            here.export(block)
        elif kind == "run":
            output = here.start(block.strip() + (f" --port {port}" if name == "sandbox" else ""), name)
        elif name:
            until(lambda file=output, shown=block: is_seen(file.read_text().rstrip() + "\n", shown, here.here))
        elif reads:
            until(lambda what=reads, shown=block: is_seen(here.run(what).stdout, shown, here.here))
        else:
            assert is_seen(printed, block, here.here), printed


# The first inbox


def test_the_first_inbox_works_as_written(terminals: Callable[..., Terminals], sandbox: Sandbox) -> None:
    here = terminals(LETTA_BASE_URL=sandbox.base_url)
    for block, text in ((RUN["first_configuration"], None), (RUN["first_key"], f"{KEY}\n"), (RUN["first_cap"], None)):
        done = here.run(block, input=text)
        assert done.returncode == 0, done.stdout
    checked = here.run(RUN["first_check"])
    assert checked.returncode == 0, checked.stdout
    assert not re.search(r"^bad ", checked.stdout, re.MULTILINE)
    config = load(str(here.here / ".config/imagewatch/config.toml"), {})
    assert config.limits.credits_per_day == 1000
    output = here.start(RUN["first_run"].strip(), "daemon")
    until(lambda: "started" in output.read_text())
    done = here.run(RUN["first_prompt"])
    assert done.returncode == 0, done.stdout
    assert Path(done.stdout.splitlines()[0]).parent == here.here / "Pictures/imagewatch/outbox"
    status, history = RUN["first_look"].splitlines()
    until(lambda: "1 completed, 0 refused" in here.run(status).stdout, saw=lambda: here.run(status).stdout)
    assert "1 completed, 0 refused" in here.run(history).stdout


# How-to pages


def test_images_are_edited_as_written(shell: Shell, folders: Folders, tmp_path: Path, sandbox: Sandbox) -> None:
    for name in ("harbour.jpg", "boat.png"):
        (tmp_path / "Pictures" / name).write_bytes(unique_png(name))
    shell(RUN["edit_drop"])
    until(lambda: folders.finished() == {"harbour": "outbox"})
    assert [one["file"] for one in folders.receipt("harbour")["inputs"]] == ["harbour.jpg"]
    assert shell(RUN["edit_submit"]).stdout.startswith(str(folders.outbox))
    assert sorted(len(call["inputs"]) for call in sandbox.report()["calls"]) == [1, 2]
    assert parse(RUN["edit_names"].encode()).front.input_images == ("quay.jpg", "boat.png")


def test_the_configurations_on_the_pages_are_valid(tmp_path: Path) -> None:
    file = tmp_path / "imagewatch.toml"
    parts = (RUN["presets"], RUN["caps"], RUN["budgets"])
    file.write_text(f'[folders]\nroot = "{tmp_path}/root"\n' + "".join(parts))
    config = load(str(file), {})
    assert set(config.presets) == {"poster", "draft"}
    assert config.limits.credits_per_month == 20_000
    assert set(config.budgets) == {"anna", "Marketing team"}
    assert parse(RUN["prompt_with_preset"].encode()).front.preset in config.presets
    blocks = re.compile(r"^```toml\n(.+?)^```$", re.MULTILINE | re.DOTALL)
    others = [block for name in PAGES for block in blocks.findall(page(name))]
    assert len(others) >= 6
    for block in others:
        rest = block.replace("[folders]\n", "")  # only the first table of a block may be that
        file.write_text(f"[folders]\nroot = '{tmp_path}/root'\n{rest}")
        load(str(file), {})


def aged(path: Path, days: int) -> Path:
    """A file that was last changed so many days ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    at = time.time() - days * DAY
    os.utime(path, (at, at))
    return path


@pytest.fixture
def results(folders: Folders) -> dict[str, Path]:
    made = {
        f"{name} {days}": folders.root / name / "sub" / f"{days}.png"
        for name in ("outbox", "archive")
        for days in (89, 91)
    }
    made |= {"errors": folders.errors / "old.prompt.txt", "inbox": folders.inbox / "old.png"}
    for name, path in made.items():
        aged(path, 89 if "89" in name else 91)
    return made


def remaining(results: dict[str, Path]) -> set[str]:
    return {name for name, path in results.items() if path.exists()}


KEPT = {"outbox 89", "archive 89", "errors", "inbox"}


def test_old_results_are_purged_and_nothing_else(shell: Shell, results: dict[str, Path]) -> None:
    shell(RUN["purge"])
    assert remaining(results) == KEPT


def test_systemd_purges_old_results_and_nothing_else(
    folders: Folders, results: dict[str, Path], tmp_path: Path
) -> None:
    program = shutil.which("systemd-tmpfiles")
    if program is None:
        pytest.skip("needs systemd-tmpfiles")
    file = tmp_path / "imagewatch-purge.conf"
    file.write_text(RUN["purge_tmpfiles"].replace(PLACE, str(folders.root)))
    done = subprocess.run([program, "--clean", file], capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert remaining(results) == KEPT


def test_the_ledger_is_exported_and_an_unknown_charge_is_looked_up(
    shell: Shell, folders: Folders, tmp_path: Path
) -> None:
    folders.prompt("ship", "A ship [sandbox: drop]")
    until(lambda: folders.finished() == {"ship": "errors"})
    shell(RUN["history_csv"])
    assert "ship" in (tmp_path / "Pictures/history.csv").read_text()
    looked = shell(RUN["unknown"]).stdout
    assert "may have been charged" in looked
    assert "total balance" in looked


def test_the_rules_are_checked_as_written() -> None:
    if shutil.which("promtool") is None:
        pytest.skip("needs promtool (apt install prometheus)")
    subprocess.run(["sh", "-euc", RUN["promtool"]], cwd=DOCS / "howto", check=True, timeout=50)


# Names


@pytest.mark.parametrize("name", ["troubleshooting", "glossary"])
def test_a_page_has_each_kind_of_hold(name: str) -> None:
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", page(name), re.MULTILINE)
    assert set(HOLDS) <= {kind for row in rows for kind in re.findall(r"\w+", row)}


def test_troubleshooting_has_each_reason_why_a_prompt_waits() -> None:
    stays = page("troubleshooting").partition("## My file stays in the inbox")[2].partition("\n## ")[0]
    assert [wait for wait in Wait if wait.text.partition(":")[0] not in stays] == []


def test_troubleshooting_has_each_exit_code_of_a_daemon_that_does_not_start() -> None:
    rows = table(page("troubleshooting"), "The exit code names the kind of problem")
    codes = {int(code) for row in rows for code in row[0].split(", ")}
    assert {EXIT_USAGE, EXIT_CONFIG, EXIT_RUNNING, EXIT_SPOOL, EXIT_HELD, EXIT_INTERNAL} <= codes


def test_the_glossary_defines_each_term_once() -> None:
    terms = re.findall(r"^\| ([a-z][\w ,]+) \|", page("glossary"), re.MULTILINE)
    terms = [term for term in terms if term not in {"term", "kind of hold"}]
    assert len(terms) > 50
    assert len(terms) == len(set(terms))


LIMITS = {
    "32,000": prompts.MAX_CHARACTERS,
    "262,144": prompts.MAX_BYTES,
    "16,384": prompts.MAX_FRONT,
    "images of one prompt | 14": prompts.MAX_INPUTS,
    "100,000,000": MAX_PIXELS,
    "scans of one JPEG | 100": MAX_SCANS,
    "300,000,000": Limits().max_input_bytes,
    "500,000,000": Limits().min_free_bytes,
    "400,000,000": Endpoint().max_response_bytes,
    "900 seconds": Endpoint().deadline_seconds,
    "600 seconds | `endpoint.timeout_seconds`": Endpoint().timeout_seconds,
    "10 seconds | `endpoint.connect_timeout_seconds`": Endpoint().connect_timeout_seconds,
    "attempts for a request that was not charged | 4": Retry().attempts,
    "requests at the same time | 4": Limits().concurrency,
    "up to 15 minutes": LONGEST_SECONDS / 60,
    "at most 6 hours": LONGEST_ASKED_SECONDS / 3600,
    "more than 100 new prompts": MOST_WITHOUT_YES,
}
"""What the page of limits says, and the value in the code that has the same number."""


@pytest.mark.parametrize("text", LIMITS)
def test_a_limit_on_the_page_is_that_of_the_code(text: str) -> None:
    assert text in page("reference/limits")
    number = re.findall(r"\d[\d,]*", text)[-1]
    assert int(number.replace(",", "")) == LIMITS[text]
