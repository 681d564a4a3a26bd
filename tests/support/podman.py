"""Podman with a storage of its own, and the image of imagewatch in it: built without a registry, or loaded.

Nothing is left when it ends. Its containers use the network of this machine, so that they reach the endpoint of a test.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from support.daemon import report_output

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).parents[2]
IMAGE = "localhost/imagewatch"
VARIABLE = "IMAGEWATCH_IMAGE"
_PROGRAMS = ("podman", "runc")
_SECONDS = 900
_SETTINGS = """\
[containers]
default_ulimits = ["nofile=10000:10000", "nproc=10000:10000"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "none"
"""
"""The default limits need a capability that a test machine may lack. crun refuses two versions of cgroups together."""
_SHIM = """\
#!/bin/sh
export CONTAINERS_CONF={folder}/containers.conf
test "$1" != run || {{ shift; set -- run $RUN_OPTIONS "$@"; }}
exec {podman} --root {folder}/root --runroot {folder}/run --tmpdir {folder}/tmp --storage-driver {driver} "$@"
"""


class Unavailable(Exception):  # noqa: N818  reads as the sentence it is
    """This machine cannot build or run a container; the message gives the reason."""


def unavailable() -> str:
    """Why no container can be run here, as far as that is known without trying, or an empty string."""
    if not os.environ.get(VARIABLE):
        return f"takes minutes: set {VARIABLE} to build, or to the archive of an image (CONTRIBUTING.md)"
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs Linux and root"
    if missing := [program for program in _PROGRAMS if shutil.which(program) is None]:
        return f"needs {', '.join(missing)} (apt install podman runc catatonit mmdebstrap)"
    return ""


class Podman:
    """The command ``podman``, for a test and for the shell commands of a page.

    Args:
        folder: An empty folder of its own.

    Attributes:
        path: The value of PATH for a shell that is to use it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._bin = folder / "bin"
        self._bin.mkdir()
        (folder / "containers.conf").write_text(_SETTINGS)
        self.path = f"{self._bin}:{os.environ['PATH']}"
        for driver in ("overlay", "vfs"):  # on some file systems there is no overlay
            shim = _SHIM.format(folder=folder, podman=shutil.which("podman"), driver=driver)
            (self._bin / "podman").write_text(shim)
            (self._bin / "podman").chmod(0o755)
            if self.run("info", check=False).returncode == 0:
                break
        else:
            raise Unavailable("podman info fails here")

    def run(
        self, *command: str, check: bool = True, text: str = "", **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of Podman; one that fails is an error, unless ``check`` is off."""
        return self.shell('podman "$@"', *command, check=check, text=text, variables=variables)

    def shell(
        self,
        script: str,
        *arguments: str,
        check: bool = True,
        text: str = "",
        cwd: Path = ROOT,
        variables: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run shell commands that use Podman."""
        done = subprocess.run(
            ["bash", "-euc", script, "bash", *arguments],
            input=text,
            capture_output=True,
            text=True,
            check=False,
            timeout=_SECONDS,
            cwd=cwd,
            env={**os.environ, "PATH": self.path, **(variables or {})},
        )
        if arguments[:1] != ("logs",):  # which is asked for the report
            report_output([script, *arguments], done.returncode, done.stdout, done.stderr)
        assert not check or done.returncode == 0, f"{script} {arguments}: {done.stdout}{done.stderr}"
        return done

    def inspect(self, what: str) -> dict[str, Any]:
        """Return what Podman knows about an image or a container."""
        (found,) = json.loads(self.run("inspect", what).stdout)
        assert isinstance(found, dict)
        return found

    def get_image(self) -> None:
        """Build the image, or load it from the archive that the variable names."""
        archive = Path(os.environ[VARIABLE])
        if archive.is_file():
            self.run("load", "--quiet", "--input", str(archive.resolve()))
        else:
            done = self.shell('.ci/image.sh "$@"', IMAGE, check=False, variables={"VARIANT": "extract"})
            if done.returncode != 0:
                raise Unavailable(f"the image cannot be built here: {done.stderr.strip()[-500:]}")

    def close(self) -> None:
        """Remove all containers, images and volumes."""
        self.run("rm", "--all", "--force", "--volumes", "--time", "0", check=False)
        self.run("rmi", "--all", "--force", check=False)
        subprocess.run(["umount", self._folder / "root/overlay"], capture_output=True, check=False)  # Podman keeps it
