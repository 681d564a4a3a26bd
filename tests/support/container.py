"""A real systemd, booted by systemd-nspawn from an overlay of the running system.

Nothing of it is left when it ends: what it writes is in a tmpfs, its mounts in a namespace of its own, its processes
in a cgroup of its own. Its network is a loopback device.
"""

from __future__ import annotations

import compileall
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).parents[2]
VENV = "/opt/imagewatch"
_PROGRAMS = ("systemd-nspawn", "systemctl", "journalctl", "nsenter", "setpriv", "unshare", "mount")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_BOOT_SECONDS = 30.0
_MOUNT = """\
set -eu
mount -t tmpfs tmpfs "$1"
mkdir "$1/work" "$1/root"
cp -a "$2" "$1/upper"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=$3:$4" "$1/root$5"
shift 5
exec "$@"
"""
_JOIN = """\
until test "$1" = --; do echo $$ >"$1/cgroup.procs"; shift; done
shift
exec "$@"
"""
_BASE_TARGET = """\
[Unit]
Description=Enough of a system for tests
DefaultDependencies=no
Requires=sysinit.target systemd-journald.service
After=sysinit.target systemd-journald.service
AllowIsolate=yes
"""


class Unavailable(Exception):  # noqa: N818  reads as the sentence it is
    """This machine cannot boot a container; the message gives the reason."""


def unavailable() -> str:
    """Why no container can be booted here, as far as that is known without trying, or an empty string."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs Linux and root"
    if missing := [program for program in _PROGRAMS if shutil.which(program) is None]:
        return f"needs {', '.join(missing)} (apt install systemd-container)"
    if _python() is None:
        return f"{sys.base_prefix}: this Python is not below /usr, and /usr has none of its version"
    if not _hierarchies():
        return "there is no cgroup that can be written"
    return ""


def _python() -> str | None:
    """Return the interpreter for the container: this one, or the system's of the same version."""
    name = f"bin/python{sys.version_info.major}.{sys.version_info.minor}"
    found = [f"{prefix}/{name}" for prefix in (sys.base_prefix, "/usr") if prefix.startswith("/usr")]
    return next((path for path in found if os.access(path, os.X_OK)), None)


def _hierarchies() -> list[str]:
    """Return where systemd keeps its cgroups here: one place, or two with both versions at the same time."""
    top = "/sys/fs/cgroup"
    places = [top] if os.path.exists(f"{top}/cgroup.procs") else [f"{top}/systemd", f"{top}/unified"]
    return [place for place in places if os.access(f"{place}/cgroup.procs", os.W_OK) and _may_make(place)]


def _may_make(place: str) -> bool:
    probe = f"{place}/imagewatch-probe-{os.getpid()}"
    try:
        os.mkdir(probe)
        os.rmdir(probe)
    except OSError:
        return False
    return True


class Container:
    """A booted system with imagewatch's program in it, and nothing else of it yet.

    Args:
        folder: An empty folder of its own, on a disk.
    """

    def __init__(self, folder: Path) -> None:
        self._name = f"imagewatch-test-{os.getpid()}"
        self._cgroups = [f"{place}/{self._name}" for place in _hierarchies()]
        self._files = folder / "files"
        self._site = folder / "site"
        self._mount = folder / "mount"
        self._console = folder / "console"
        self._write_files()
        self._boot()

    # Before

    def put(self, path: str, content: str, mode: int = 0o644) -> None:
        """Write a file; before the boot or after."""
        target = self._files / path.lstrip("/") if not hasattr(self, "leader") else self.path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content)
        target.chmod(mode)

    def _write_files(self) -> None:
        python = _python()
        assert python is not None
        self._mount.mkdir(parents=True)
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        self.packages = f"{VENV}/lib/python{version}/site-packages"
        (self._files / self.packages.lstrip("/")).mkdir(parents=True)
        self.put(f"{VENV}/pyvenv.cfg", f"home = {os.path.dirname(python)}\ninclude-system-site-packages = false\n")
        (self._files / VENV.lstrip("/") / "bin").mkdir()
        (self._files / VENV.lstrip("/") / "bin/python").symlink_to(python)
        entry = "import sys\nfrom imagewatch.commands.main import main\nsys.exit(main())\n"
        self.put(f"{VENV}/bin/imagewatch", f"#!{VENV}/bin/python\n{entry}", 0o755)
        # Not the editable install of the test's own environment, which leads out of what a service may see.
        shutil.copytree(ROOT / "imagewatch", self._site / "imagewatch", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "config.example.toml", self._site / "imagewatch")
        shutil.copytree(ROOT / "systemd", self._site / "imagewatch/systemd")
        compileall.compile_dir(self._site, quiet=1)
        self.put("/etc/systemd/system/tests.target", _BASE_TARGET)
        self.put("/etc/systemd/journald.conf.d/tests.conf", "[Journal]\nStorage=volatile\nRateLimitBurst=0\n")
        self.put("/etc/fstab", "")
        self.put("/etc/tmpfiles.d/tmp.conf", "")  # else every file of the real /tmp would be hidden, one by one
        masked = self._files / "etc/systemd/system/network-online.target"
        masked.symlink_to("/dev/null")  # it would never report that it is online here

    # Boot and end

    def _boot(self) -> None:
        for cgroup in self._cgroups:
            os.mkdir(cgroup)
        try:
            self._start()
            self.leader = self._wait_for_leader()
            self._wait_for_boot()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        nspawn = ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--private-network", "--boot"]
        nspawn += ["-D", f"{self._mount}/root", "-M", self._name, "systemd.unit=tests.target", "systemd.show_status=no"]
        site = sysconfig.get_path("purelib")
        mount = ["sh", "-c", _MOUNT, "sh", self._mount, self._files, self._site, site, self.packages]
        # A test run that is killed takes the container along.
        command = ["setpriv", "--pdeathsig=TERM", "sh", "-c", _JOIN, "sh", *self._cgroups, "--"]
        command += ["unshare", "--mount", "--propagation", "private"]
        with self._console.open("wb") as console:
            self._process = subprocess.Popen(
                [*command, *mount, *nspawn],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={"PATH": os.environ["PATH"]},
            )

    def _wait_for_leader(self) -> int:
        """Return the process that is number 1 inside."""
        children = f"/proc/{self._process.pid}/task/{self._process.pid}/children"
        deadline, pause = time.monotonic() + _BOOT_SECONDS, threading.Event()
        while self._process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                for child in Path(children).read_text().split():
                    status = Path(f"/proc/{child}/status").read_text()
                    if "\nNSpid:\t" in status and status.split("NSpid:")[1].split("\n")[0].split()[-1] == "1":
                        return int(child)
            pause.wait(0.02)
        raise Unavailable(self._last_words())

    def _wait_for_boot(self) -> None:
        deadline, pause = time.monotonic() + _BOOT_SECONDS, threading.Event()
        while self._process.poll() is None and time.monotonic() < deadline:
            done = self.run("systemctl", "is-active", "tests.target", check=False)
            if done.stdout.strip() == "active":
                return
            pause.wait(0.05)
        raise Unavailable(self._last_words())

    def _last_words(self) -> str:
        lines = self._console.read_text(errors="replace").strip().split("\n")
        return f"systemd-nspawn does not boot here: {lines[-1]}"

    def stop(self) -> None:
        """End the container; its mounts go with its last process."""
        if hasattr(self, "_process") and self._process.poll() is None:
            # There is nothing to save: with its first process all others die, and then systemd-nspawn ends.
            if hasattr(self, "leader"):
                os.kill(self.leader, signal.SIGKILL)
            else:
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(30)
        for cgroup in self._cgroups:
            for folder, _, _ in os.walk(cgroup, topdown=False):
                os.rmdir(folder)

    # Inside

    def path(self, path: str) -> Path:
        """Return the path by which this side sees a file of the container."""
        return Path(f"/proc/{self.leader}/root{path}")

    def run(
        self,
        *command: str,
        user: str | None = None,
        check: bool = True,
        text: str = "",
        cwd: str = "/",
        variables: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside, as root or as a user; one that fails is an error, unless ``check`` is off."""
        enter = ["nsenter", f"--target={self.leader}", "--mount", "--uts", "--ipc", "--net", "--pid", f"--wdns={cwd}"]
        done = subprocess.run(
            [*enter, *(["runuser", "-u", user, "--"] if user else []), *command],
            input=text,
            capture_output=True,
            text=True,
            check=False,
            timeout=50,
            env={"PATH": _PATH, "HOME": "/root", **(variables or {})},
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done

    def show(self, unit: str, name: str) -> str:
        """Return one property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit).stdout.strip()

    def journal(self, unit: str, cursor: str) -> list[dict[str, Any]]:
        """Return the journal's entries about a unit since a cursor, the manager's own entries about it included."""
        self.run("journalctl", "--sync")
        only = [f"--unit={unit}", f"--after-cursor={cursor}"]
        lines = self.run("journalctl", "--output=json", "--all", *only).stdout.splitlines()
        return [json.loads(line) for line in lines]
