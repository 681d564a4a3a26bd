"""A disk that loses power, and keeps only what it was asked to keep."""

from __future__ import annotations

import enum
import errno
import os
import shutil
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from imagewatch.system.disk import Disk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

LONG_AGO_NS = 1_600_000_000_000_000_000


class PowerCut(BaseException):
    """The power was cut; not an ``Exception``, so that no code can handle it."""


class Losing(enum.Enum):
    """What is left after the end. All but ``KILLED`` are power losses."""

    KILLED = "the process died, the machine goes on: everything is there, and what was not synced is still not durable"
    NOTHING = "only what was synced"
    TWINS = "only what was synced; a file that moved into a synced folder from one that was not has both names"
    NAMES = "all names as they were, but nothing of the content that was not synced"
    TORN = "all names as they were, and the first half of the content that was not synced"


class SteppingDisk(Disk):
    """A disk that reports each change before it makes it. The whole list of what can change a disk."""

    def step(self, what: str, path: str) -> None:
        """Something is about to change."""

    def make_folder(self, path: str, mode: int = 0o700) -> None:
        if not os.path.isdir(path):
            self.step("make_folder", path)
        super().make_folder(path, mode)

    def create(self, path: str, mode: int = 0o600) -> IO[bytes]:
        self.step("create", path)
        return super().create(path, mode)

    def append(self, path: str) -> IO[bytes]:
        self.step("append", path)
        return super().append(path)

    def symlink(self, text: str, path: str) -> None:
        self.step("symlink", path)
        super().symlink(text, path)

    def sync(self, file: IO[bytes], path: str) -> None:
        file.flush()
        self.step("sync", path)
        super().sync(file, path)

    def sync_folder(self, path: str) -> None:
        self.step("sync_folder", path)
        super().sync_folder(path)

    def replace(self, source: str, target: str) -> None:
        self.step("replace", target)
        super().replace(source, target)

    def rename(self, source: str, target: str) -> None:
        if os.path.lexists(source):
            self.step("rename", target)
        super().rename(source, target)

    def unlink(self, path: str) -> None:
        if os.path.lexists(path):
            self.step("unlink", path)
        super().unlink(path)

    def touch(self, path: str, mtime_ns: int = 0) -> bool:
        if os.path.lexists(path):
            self.step("touch", path)
        return super().touch(path, mtime_ns)

    def remove_folder(self, path: str) -> bool:
        if os.path.lexists(path):
            self.step("remove_folder", path)
        return super().remove_folder(path)


class _File:
    """A file of the model: what of its content is durable. ``None`` is: nothing yet."""

    def __init__(self, synced: bytes | None = None) -> None:
        self.synced = synced


class _Link:
    """A symbolic link of the model."""

    def __init__(self, text: str) -> None:
        self.text = text


class _Folder:
    """A folder of the model: its names as they are, and as they were when it was last synced."""

    def __init__(self) -> None:
        self.now: dict[str, _Node] = {}
        self.synced: dict[str, _Node] = {}


_Node = _File | _Link | _Folder


@dataclass
class _Crossing:
    """A rename from one folder into another of which the source folder was not synced since.

    ``arrived``: the target folder was, and so the rename can no longer be undone as a whole.
    """

    node: _Node
    source: _Folder
    name: str
    target: _Folder
    arrived: bool = False


@dataclass(frozen=True)
class Image:
    """The whole content of a disk, as plain values: it can be compared, kept and given back. Node 0 is the root.

    ``nodes`` holds ``("folder", names now, names synced)``, ``("file", content now, content synced)`` and
    ``("link", text)``; ``crossings`` the renames that are half durable.
    """

    nodes: tuple[tuple[object, ...], ...]
    crossings: tuple[tuple[int, int, str, int, bool], ...] = ()

    def visible(self) -> Image:
        """Return the same disk as a reader sees it: as if all of it were durable."""
        numbers: dict[int, int] = {}
        nodes: list[tuple[object, ...]] = []

        def keep(number: int) -> int:
            if number in numbers:
                return numbers[number]
            mine = numbers[number] = len(nodes)
            kind, *rest = self.nodes[number]
            nodes.append(())
            if kind == "folder":
                names = tuple((name, keep(inner)) for name, inner in rest[0])  # type: ignore[attr-defined]
                nodes[mine] = (kind, names, names)
            else:
                nodes[mine] = (kind, rest[0], rest[0]) if kind == "file" else (kind, *rest)
            return mine

        keep(0)
        return Image(tuple(nodes))


class LosingDisk(SteppingDisk):
    """A disk on real folders with a model beside them of what would survive a power cut.

    What is modelled, from POSIX and from what ext4, xfs and btrfs were seen to do:

    - What a file holds is durable as it was at its last ``sync``, and not at all before the first.
    - A name (created, renamed, removed) is durable when its folder was synced after the change. Changes in one
      folder that were not synced are undone together.
    - A folder's names are lost with the folder, if that has no durable name itself.
    - A rename between two folders is never lost on both sides. When only the source folder was synced since, the
      file is durable at its new place (with the folders above it). When only the target folder was synced, it
      is there as well, and the old name is missing (``Losing.NOTHING``: a journal, the rename is one transaction) or
      still there too (``Losing.TWINS``: btrfs logs each folder separately; a folder never has two names).
    - The opposite may happen, too: names that were not synced survive, and content that was not synced does not
      (``NAMES``, ``TORN``): the empty files that ext4 and xfs leave after a commit of their journal.
    - What died with its process (``KILLED``) is all there, but not a bit more durable than before: a power cut after
      the restart can still undo it.

    What is under the root at the beginning, and what ``adopt`` gets, is durable: senders are
    believed. Modes and times are not modelled. There is no real fsync.

    Args:
        root: A real folder; everything the disk changes is below it.
        cut: Number of the step, from 1, at which the power goes; without, never.
        after: Whether the step itself still happens.
        losing: What is left then.
        mounts: Folders that are file systems of their own: no rename leads in or out.
        watch: Called before each step with its name, in place of a cut.
    """

    def __init__(
        self,
        root: str,
        *,
        cut: int | None = None,
        after: bool = False,
        losing: Losing = Losing.NOTHING,
        mounts: tuple[str, ...] = (),
        watch: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.root = os.path.abspath(root)
        self.steps: list[str] = []
        self.watch = watch
        self._cut, self._after, self._losing, self._mounts = cut, after, losing, mounts
        self._left: Image | None = None
        self._top = _Folder()
        self._crossings: list[_Crossing] = []
        self.adopt()

    # Power

    def tick(self, what: str) -> None:
        """Another moment at which the power may go; nothing changes on the disk."""
        self.step(what, self.root)
        self._stepped()

    def step(self, what: str, path: str) -> None:
        if self._left is not None:
            raise PowerCut
        self.steps.append(f"{what} {path[len(self.root) + 1 :] or '.'}")
        self.watch(self.steps[-1])
        if len(self.steps) == self._cut and not self._after:
            self._go_dark()

    def _stepped(self) -> None:
        """The step has happened."""
        if len(self.steps) == self._cut and self._after:
            self._go_dark()

    def _go_dark(self) -> None:
        self._left = self.image(self._losing)
        raise PowerCut

    def come_back(self) -> None:
        """Put on the real disk what was left at the cut; the disk works again, for ever."""
        assert self._left is not None, "the power did not go"
        left, self._left, self._cut = self._left, None, None
        self.restore(left)

    def image(self, losing: Losing) -> Image:
        """Return what would be left if the end came now."""
        return self.images((losing,))[0]

    def images(self, losings: Iterable[Losing]) -> list[Image]:
        """Return what would be left if the end came now, in each of some ways."""
        contents: dict[int, bytes] = {}
        _read(self.root, self._top, contents)
        freezer = _Freezer(self._top, self._crossings, contents)
        return [freezer.image(losing) for losing in losings]

    def restore(self, image: Image) -> None:
        """Bring model and real disk into the state of an image."""
        self.__dict__.pop("tops", None)  # what starts next is another process
        made = [_thawed(node) for node in image.nodes]
        for node, frozen in zip(made, image.nodes, strict=True):
            if isinstance(node, _Folder):
                node.now = {name: made[number] for name, number in frozen[1]}  # type: ignore[attr-defined]
                node.synced = {name: made[number] for name, number in frozen[2]}  # type: ignore[attr-defined]
        assert isinstance(made[0], _Folder)
        self._top = made[0]
        self._crossings = [
            _Crossing(made[node], made[source], name, made[target], arrived)  # type: ignore[arg-type]
            for node, source, name, target, arrived in image.crossings
        ]
        _clear(self.root, self._top)
        contents = {id(node): frozen[1] for node, frozen in zip(made, image.nodes, strict=True)}
        _build(self.root, self._top, contents, {})

    def adopt(self) -> None:
        """Take what another process has put below the root as durable."""
        _adopt(self.root, self._top)

    # The changes

    def write(self, path: str, content: bytes) -> None:
        # The folder of claims is known by its inode, which the model has not, and by random digits.
        fixed = {"claims.json": b"{}", ".imagewatch-claims": b"mark"}
        super().write(path, fixed.get(os.path.basename(path), content))

    def make_folder(self, path: str, mode: int = 0o700) -> None:
        if os.path.isdir(path):
            return
        super().make_folder(path, mode)
        folder = self._top
        for part in self._parts(path):
            folder = folder.now.setdefault(part, _Folder())  # type: ignore[assignment]
        self._stepped()

    def create(self, path: str, mode: int = 0o600) -> IO[bytes]:
        file = super().create(path, mode)
        self._put(path, _File())
        return self._opened(file)

    def symlink(self, text: str, path: str) -> None:
        super().symlink(text, path)
        self._put(path, _Link(text))
        self._stepped()

    def sync(self, file: IO[bytes], path: str) -> None:
        file.flush()
        self.step("sync", path)
        place = os.readlink(f"/proc/self/fd/{file.fileno()}")  # the path may be the name it will have
        node = self._get(place)
        assert isinstance(node, _File), place
        node.synced = _content(place)
        self._stepped()

    def sync_folder(self, path: str) -> None:
        if not self._is_modelled(path):
            return  # not ours, and there already
        if not os.path.isdir(path):
            Disk.sync_folder(self, path)
        self.step("sync_folder", path)
        self._sync_names(self._folder(path))
        self._stepped()

    def _sync_names(self, folder: _Folder) -> None:
        folder.synced = dict(folder.now)
        for crossing in self._crossings:
            if crossing.target is folder and crossing.node in folder.now.values():
                crossing.arrived = True
        gone = [crossing for crossing in self._crossings if crossing.source is folder]
        self._crossings = [crossing for crossing in self._crossings if crossing.source is not folder]
        for crossing in gone:
            _anchor(self._top, crossing.node)

    def replace(self, source: str, target: str) -> None:
        self._refuse_mounts(source, target)
        super().replace(source, target)
        self._move(source, target)
        self._stepped()

    def rename(self, source: str, target: str) -> None:
        self._refuse_mounts(source, target)
        super().rename(source, target)
        self._move(source, target)
        self._stepped()

    def unlink(self, path: str) -> None:
        there = os.path.lexists(path)
        super().unlink(path)
        if there:
            self._pop(path)
            self._stepped()

    def remove_folder(self, path: str) -> bool:
        there = os.path.lexists(path)
        gone = super().remove_folder(path)
        if there:
            if gone:
                self._pop(path)
            self._stepped()
        return gone

    def touch(self, path: str, mtime_ns: int = 0) -> bool:
        there = os.path.lexists(path)
        done = super().touch(path, mtime_ns)
        if there:
            self._stepped()
        return done

    def append(self, path: str) -> IO[bytes]:
        return self._opened(super().append(path))

    def _opened(self, file: IO[bytes]) -> IO[bytes]:
        try:
            self._stepped()
        except PowerCut:
            file.close()
            raise
        return file

    # The model

    def _refuse_mounts(self, source: str, target: str) -> None:
        if self._mount(source) != self._mount(target):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), target)

    def _mount(self, path: str) -> str:
        return next((mount for mount in self._mounts if path.startswith(mount + "/")), "")

    def _is_modelled(self, path: str) -> bool:
        return (path + "/").startswith(self.root + "/")

    def _parts(self, path: str) -> list[str]:
        assert self._is_modelled(path), f"{path} is not part of the model"
        return [part for part in path[len(self.root) :].split("/") if part]

    def _folder(self, path: str) -> _Folder:
        folder = self._top
        for part in self._parts(path):
            folder = folder.now[part]  # type: ignore[assignment]
        return folder

    def _get(self, path: str) -> _Node:
        return self._folder(os.path.dirname(path)).now[os.path.basename(path)]

    def _put(self, path: str, node: _Node) -> None:
        self._folder(os.path.dirname(path)).now[os.path.basename(path)] = node

    def _pop(self, path: str) -> _Node:
        return self._folder(os.path.dirname(path)).now.pop(os.path.basename(path))

    def _move(self, source: str, target: str) -> None:
        node = self._pop(source)
        self._put(target, node)
        left, entered = self._folder(os.path.dirname(source)), self._folder(os.path.dirname(target))
        if left is not entered:
            self._crossings.append(_Crossing(node, left, os.path.basename(source), entered))


def _anchor(top: _Folder, node: _Node) -> None:
    """Make a node durable wherever it is now, with the folders above it."""
    for path in _paths(top, node):
        folder = top
        for inner, name in path:
            folder = inner
            folder.synced[name] = folder.now[name]


def _paths(folder: _Folder, node: _Node) -> Iterator[list[tuple[_Folder, str]]]:
    for name, inner in folder.now.items():
        if inner is node:
            yield [(folder, name)]
        elif isinstance(inner, _Folder):
            for path in _paths(inner, node):
                yield [(folder, name), *path]


def _read(path: str, folder: _Folder, contents: dict[int, bytes]) -> None:
    for name, node in folder.now.items():
        if isinstance(node, _Folder):
            _read(f"{path}/{name}", node, contents)
        elif isinstance(node, _File) and id(node) not in contents:
            contents[id(node)] = _content(f"{path}/{name}")


class _Freezer:
    """Makes images of the model."""

    def __init__(self, top: _Folder, crossings: list[_Crossing], contents: dict[int, bytes]) -> None:
        self._top, self._crossings, self._live = top, crossings, contents
        self._numbers: dict[int, int] = {}
        self._nodes: list[tuple[object, ...]] = []

    def image(self, losing: Losing) -> Image:
        self._numbers, self._nodes = {}, []
        return self._everything() if losing is Losing.KILLED else self._survivors(losing)

    def _everything(self) -> Image:
        self._keep_all(self._top)
        numbers = self._numbers
        crossings = tuple(
            (numbers[id(c.node)], numbers[id(c.source)], c.name, numbers[id(c.target)], c.arrived)
            for c in self._crossings
            if id(c.node) in numbers and id(c.source) in numbers and id(c.target) in numbers
        )
        return Image(tuple(self._nodes), crossings)

    def _keep_all(self, node: _Node) -> int:
        if id(node) in self._numbers:
            return self._numbers[id(node)]
        number = self._numbers[id(node)] = len(self._nodes)
        self._nodes.append(())
        if isinstance(node, _Folder):
            now = tuple((name, self._keep_all(inner)) for name, inner in sorted(node.now.items()))
            synced = tuple((name, self._keep_all(inner)) for name, inner in sorted(node.synced.items()))
            self._nodes[number] = ("folder", now, synced)
        elif isinstance(node, _File):
            self._nodes[number] = ("file", self._live.get(id(node), node.synced or b""), node.synced)
        else:
            self._nodes[number] = ("link", node.text)
        return number

    def _survivors(self, losing: Losing) -> Image:
        by_name = losing in {Losing.NAMES, Losing.TORN}
        dropped: set[tuple[int, str]] = set()
        if losing in {Losing.NOTHING, Losing.TWINS}:
            there = _reachable(self._top)
            dropped = {
                (id(crossing.source), crossing.name)
                for crossing in self._crossings
                if crossing.arrived
                and (losing is Losing.NOTHING or isinstance(crossing.node, _Folder))
                and crossing.source.synced.get(crossing.name) is crossing.node
                and any(crossing.node in folder.synced.values() for folder in there if folder is not crossing.source)
            }
        self._keep_some(self._top, by_name=by_name, torn=losing is Losing.TORN, dropped=dropped)
        return Image(tuple(self._nodes))

    def _keep_some(self, node: _Node, *, by_name: bool, torn: bool, dropped: set[tuple[int, str]]) -> int:
        if id(node) in self._numbers:
            return self._numbers[id(node)]
        number = self._numbers[id(node)] = len(self._nodes)
        self._nodes.append(())
        if isinstance(node, _Folder):
            names = tuple(
                (name, self._keep_some(inner, by_name=by_name, torn=torn, dropped=dropped))
                for name, inner in sorted((node.now if by_name else node.synced).items())
                if (id(node), name) not in dropped
            )
            self._nodes[number] = ("folder", names, names)
        elif isinstance(node, _File):
            content = node.synced or b""
            live = self._live.get(id(node), content)
            if torn and live != content:
                content = live[: max(len(content), len(live) // 2)]
            self._nodes[number] = ("file", content, content)
        else:
            self._nodes[number] = ("link", node.text)
        return number


def _reachable(folder: _Folder) -> list[_Folder]:
    found = [folder]
    for node in folder.synced.values():
        if isinstance(node, _Folder):
            found += _reachable(node)
    return found


def _thawed(frozen: tuple[object, ...]) -> _Node:
    if frozen[0] == "folder":
        return _Folder()
    return _File(frozen[2]) if frozen[0] == "file" else _Link(frozen[1])  # type: ignore[arg-type]


def _content(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.read(descriptor, 1 << 24)
    finally:
        os.close(descriptor)


def _clear(path: str, kept: _Folder) -> None:
    """Remove everything but the folders that are wanted again."""
    with os.scandir(path) as entries:
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
            elif isinstance(folder := kept.now.get(entry.name), _Folder):
                _clear(entry.path, folder)
            else:
                shutil.rmtree(entry.path)


def _build(path: str, folder: _Folder, contents: dict[int, object], made: dict[int, str]) -> None:
    for name, node in folder.now.items():
        inner = f"{path}/{name}"
        if isinstance(node, _Folder):
            if not os.path.isdir(inner):
                os.mkdir(inner, 0o700)
            _build(inner, node, contents, made)
        elif isinstance(node, _Link):
            os.symlink(node.text, inner)
        elif id(node) in made:
            os.link(made[id(node)], inner)
        else:
            made[id(node)] = inner
            with open(inner, "xb") as file:
                file.write(contents[id(node)])  # type: ignore[arg-type]
            os.utime(inner, ns=(LONG_AGO_NS, LONG_AGO_NS))


def _adopt(path: str, folder: _Folder) -> None:
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name in folder.now:
                node = folder.now[entry.name]
            elif entry.is_symlink():
                node = _Link(os.readlink(entry.path))
            else:
                node = _Folder() if entry.is_dir() else _File(_content(entry.path))
            folder.now[entry.name] = folder.synced[entry.name] = node
            if isinstance(node, _Folder):
                _adopt(entry.path, node)
