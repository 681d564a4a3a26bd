"""The image, built and run by Podman as a user would; its base is made from Debian packages, without a registry.

Nothing of it is left when it ends: Podman has a storage of its own in a temporary folder.
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
    from collections.abc import Sequence

ROOT = Path(__file__).parents[2]
NAME = "localhost/imagewatch"
_PROGRAMS = ("podman", "conmon", "mmdebstrap")
_SECONDS = 240


class Unavailable(Exception):  # noqa: N818  reads as the sentence it is
    """This machine cannot build or run a container; the message gives the reason."""


def unavailable() -> str:
    """Why no image can be built here, as far as that is known without trying, or an empty string."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs Linux and root"
    if missing := [program for program in _PROGRAMS if shutil.which(program) is None]:
        return f"needs {', '.join(missing)} (apt install podman mmdebstrap)"
    if suite() == "":
        return "the base of the image is made of Debian's packages, and this is no Debian"
    return ""


def suite() -> str:
    """The code name of this Debian, so that its Python is the one for which the packages are downloaded."""
    lines = Path("/etc/os-release").read_text().splitlines()
    values = {name: value.strip('"') for name, _, value in (line.partition("=") for line in lines)}
    return values.get("VERSION_CODENAME", "") if values.get("ID") == "debian" else ""


class Podman:
    """Podman with a storage of its own.

    Args:
        folder: An empty folder of its own.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.options = ["--root", str(folder / "root"), "--runroot", str(folder / "run"), "--tmpdir", str(folder / "tmp")]
        self.options += ["--cgroup-manager", "cgroupfs", "--events-backend", "none", "--storage-driver", "overlay"]
        if self.run("info", check=False).returncode != 0:  # on an overlay there is no other one
            self.options[-1] = "vfs"

    def run(
        self, *command: str, check: bool = True, text: str = "", seconds: float = _SECONDS, cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of Podman; one that fails is an error, unless ``check`` is off."""
        whole = ["podman", *self.options, *command]
        done = subprocess.run(
            whole, input=text, capture_output=True, text=True, check=False, timeout=seconds, cwd=cwd or self._folder
        )
        report_output(whole, done.returncode, done.stdout, done.stderr)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done

    def inspect(self, what: str, *options: str) -> dict[str, Any]:
        """Return what Podman knows about an image or a container."""
        (found,) = json.loads(self.run("inspect", *options, what).stdout)
        assert isinstance(found, dict)
        return found

    def import_bases(self) -> None:
        """Make the base of the image and that of its builder."""
        script = ROOT / ".ci/image_base.sh"
        done = subprocess.run([script, self._folder / "bases", suite()], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise Unavailable(f"the base of the image cannot be made: {done.stderr.strip()[-300:]}")
        for name in ("base", "builder"):
            self.run("import", "--quiet", f"{self._folder}/bases/{name}.tar", f"{NAME}-{name}")
            (self._folder / f"bases/{name}.tar").unlink()

    def build(self, *options: str, tag: str = NAME) -> None:
        """Build the image without the network: its packages are downloaded by this machine's pip."""
        packages = self._folder / "packages"
        if not packages.exists():
            pip = ["python3", "-m", "pip", "download", "--quiet", "--only-binary", ":all:", "--require-hashes"]
            for name in ("service", "build"):
                subprocess.run(["/usr/bin/env", *pip, "-d", packages, "-r", ROOT / f"requirements/{name}.txt"], check=True)
        bases = ["--build-arg", f"BASE={NAME}-base", "--build-arg", f"BUILDER={NAME}-builder"]
        offline = ["--build-arg", "PIP_NO_INDEX=1", "--build-arg", "PIP_FIND_LINKS=/packages", "--network", "none"]
        offline += ["--volume", f"{packages}:/packages:ro", "--pull-never"]
        command = ["build", "--format", "docker", "--tag", tag, *bases, *offline, *options, "."]
        self.run(*command, cwd=ROOT)

    def close(self) -> None:
        """Remove all containers, images and volumes."""
        self.run("rm", "--all", "--force", "--time", "0", check=False)
        self.run("system", "reset", "--force", check=False)


def as_arguments(settings: Sequence[tuple[str, str]]) -> list[str]:
    """Return options for a command line."""
    return [word for pair in settings for word in pair if word]
