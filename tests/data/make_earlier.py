"""Make ``earlier.tar.xz`` and ``earlier.json``: folders of this version at every kill point, for later versions.

    .venv/bin/python tests/data/make_earlier.py

Run it in a checkout of the version whose folders are wanted; it takes about three minutes. The real daemon runs in a
process of its own and stops before each change of the disk, each write to the ledger and each piece of a response,
until its folders are copied (``stopping_daemon``). Then this version is started on each copy, with a new endpoint
(``support.earlier``). How that ends is the reference for later versions. It is compared with what the endpoint has
seen: no prompt is charged twice, and ``balanced`` says whether the ledger has every charge.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import stopping_daemon
from earlier_scenarios import SCENARIOS, Scenario, Stage
from support.daemon import Folders
from support.earlier import ARCHIVE, MANIFEST, NO_PORT, Archive, Entry, State, end_of
from support.small_endpoint import SmallEndpoint

from imagewatch import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator

_NOT_STORED = {"lock", "ledger.sqlite3-shm"}
"""Nothing is in a lock; SQLite makes the other one again."""
_OF_A_JOB = re.compile(r"(jobs|paid|\.imagewatch)/JOB|control/|ledger|response")
_ANYWHERE = b"/srv/imagewatch"
"""What is stored in place of the path of the folders; only ``status.json`` has it."""


class Store(Archive):
    """The folders that are to be stored."""

    def __init__(self) -> None:
        super().__init__([], [], [])
        self._numbers: dict[Any, int] = {}

    def copy(self, root: Path, base_url: str) -> int:
        """Copy the folders below a root; return their number. The same folders have the same number."""
        found = [self._entry(path, root, base_url) for path in _below(root) if path.name not in _NOT_STORED]
        return self._number(self._trees, [self._number(self._entries, one) for one in found])

    def _entry(self, path: Path, root: Path, base_url: str) -> Entry:
        status, blob = path.lstat(), -1
        if path.is_file():
            content = path.read_bytes()
            if path.name.startswith("answer."):
                content = content.replace(base_url.removeprefix("http://").encode(), NO_PORT)
            if path.name.startswith("status.json"):
                content = content.replace(os.fsencode(root), _ANYWHERE)
            blob = self._number(self._blobs, content)
        return Entry(str(path.relative_to(root)), status.st_mode, status.st_mtime_ns, status.st_ino, blob)

    def _number(self, values: list[Any], value: Any) -> int:
        key = id(values), tuple(value) if isinstance(value, list) else value
        if key not in self._numbers:
            self._numbers[key] = len(values)
            values.append(value)
        return self._numbers[key]

    def look(self, tree: int) -> object:
        """Return what makes folders different from others: all but times and the status."""
        entries = (self._entries[number] for number in self._trees[tree])
        return [(entry.path, entry.mode, entry.blob) for entry in entries if "status.json" not in entry.path]

    def write(self, trees: list[int]) -> None:
        """Write the archive, with these folders only."""
        entries = sorted({number for tree in trees for number in self._trees[tree]})
        kept = [self._entries[number] for number in entries]
        paths = {entry.blob: stopping_daemon.JOB.sub("", os.path.basename(entry.path)) for entry in reversed(kept)}
        # Similar contents beside each other take less room.
        blobs = sorted(paths.keys() - {-1}, key=lambda blob: (paths[blob], blob))
        new = {old: number for number, old in enumerate(blobs)} | {-1: -1}
        place = {old: number for number, old in enumerate(entries)}
        index = {
            "entries": [[*entry[:-1], new[entry.blob]] for entry in kept],
            "trees": [[place[number] for number in self._trees[tree]] for tree in trees],
        }
        with tarfile.open(ARCHIVE, "w:xz", preset=9, format=tarfile.USTAR_FORMAT) as tar:
            _add(tar, "index.json", json.dumps(index, separators=(",", ":")).encode())
            for number, old in enumerate(blobs):
                _add(tar, f"{number:04}", self._blobs[old])


def _below(top: Path) -> Iterator[Path]:
    for path in sorted(top.iterdir()):
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from _below(path)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@dataclass
class Maker:
    """Makes the states of all scenarios, in a folder."""

    top: Path

    def __post_init__(self) -> None:
        self.store = Store()
        self.states: list[State] = []
        self._looks: list[object] = []

    def play(self, name: str, scenario: Scenario) -> None:
        """Run a scenario and keep its states."""
        self._looks = []
        with SmallEndpoint() as endpoint, tempfile.TemporaryDirectory(dir=self.top) as root:
            folders = Folders(Path(root), endpoint.base_url, **{"limits__concurrency": "1", **scenario.settings})
            for file, content in scenario.files.items():
                folders.drop(file, content)
            stage = Stage(Path(root), folders, endpoint)
            scenario.before(stage)
            if not scenario.runs:
                self._keep(name, "before the start", stage, scenario)
                return
            endpoint.together = scenario.together
            process = stopping_daemon.start(folders, scenario.fault)
            for point in stopping_daemon.points(process):
                # What a start does before it has a job is the same in all scenarios.
                is_begun = bool(self._looks) or name == "one image" or _OF_A_JOB.search(point)
                if is_begun and (scenario.only is None or re.match(scenario.only, point)):
                    self._keep(name, f"before {point}", stage, scenario)
            assert process.wait() == 0
            self._keep(name, "after the end", stage, scenario)

    def _keep(self, name: str, point: str, stage: Stage, scenario: Scenario) -> None:
        """Keep the folders as they are now, and those that the changes of the scenario make of them."""
        base_url = stage.endpoint.base_url
        tree, requests, charged = self.store.copy(stage.root, base_url), *stage.endpoint.seen()
        look = self.store.look(tree), requests, charged
        if look in self._looks:
            return
        self._looks.append(look)
        if scenario.keeps_unchanged:
            self.states.append(State(name, point, tree, requests, charged))
        for what, change in scenario.changes.items():
            with tempfile.TemporaryDirectory(dir=self.top) as folder:
                self.store.restore(tree, Path(folder), base_url)
                if change(Path(folder)):
                    changed = self.store.copy(Path(folder), base_url)
                    changed_name = f"{name}: {what}" if what else name
                    self.states.append(State(changed_name, point, changed, requests, charged))

    def end(self, state: State) -> dict[str, Any]:
        """Start this version on a state; return how it ended."""
        scenario = SCENARIOS[state.scenario.partition(":")[0]]
        with tempfile.TemporaryDirectory(dir=self.top) as root:
            end = end_of(self.store, state, Path(root) / "restored", scenario.settings, scenario.then)
        most = 2 if "--pay-again" in scenario.then else 1
        assert max(end["charged"].values(), default=0) <= most, (state, end)
        return end


def write_manifest(states: list[State], ends: list[dict[str, Any]], trees: list[int]) -> None:
    """Write the manifest: a line for each scenario, each thing that was seen, each way to end, and each state."""
    place = {tree: number for number, tree in enumerate(trees)}
    tables: dict[str, list[str]] = {"seen": [], "ends": [], "states": []}

    def number(table: str, value: object) -> int:
        text = json.dumps(value, sort_keys=True)
        if text not in tables[table]:
            tables[table].append(text)
        return tables[table].index(text)

    for state, end in zip(states, ends, strict=True):
        seen = number("seen", [state.requests, state.charged])
        values = [state.scenario, state.point, place[state.tree], seen, number("ends", end)]
        tables["states"].append(json.dumps(values))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    lines = [f'"version": "{__version__}"', f'"commit": "{commit}"']
    scenarios = {name: {"settings": one.settings, "then": one.then} for name, one in SCENARIOS.items()}
    lines.append(
        '"scenarios": {\n' + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in scenarios.items()) + "}"
    )
    lines += [f'"{name}": [\n' + ",\n".join(table) + "]" for name, table in tables.items()]
    MANIFEST.write_text("{" + ",\n".join(lines) + "}\n")


def main() -> None:
    """Make both files, of all scenarios or of those that are named."""
    with tempfile.TemporaryDirectory() as folder:
        maker = Maker(Path(folder))
        for name in [one for one in SCENARIOS if one in sys.argv[1:] or not sys.argv[1:]]:
            maker.play(name, SCENARIOS[name])
            print(f"{len(maker.states):4} states  {name}", flush=True)  # noqa: T201
        ends = [maker.end(state) for state in maker.states]
    trees = sorted({state.tree for state in maker.states})
    maker.store.write(trees)
    write_manifest(maker.states, ends, trees)
    unbalanced = {state.scenario for state, end in zip(maker.states, ends, strict=True) if not end["balanced"]}
    print(f"the ledger lacks charges: {sorted(unbalanced)}")  # noqa: T201
    print(f"{ARCHIVE.stat().st_size} bytes archive, {MANIFEST.stat().st_size} bytes manifest")  # noqa: T201


if __name__ == "__main__":
    main()
