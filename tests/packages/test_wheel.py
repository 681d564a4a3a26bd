"""The wheel and the source as a user gets them: built, installed without the checkout, and used."""

from __future__ import annotations

import email
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.daemon import run_reported

from imagewatch import __version__

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUNDLED = ("completions", "examples", "schemas", "systemd")
LEFT = (
    "completions/_imagewatch~",
    "examples/.env",
    "examples/left/outbox/cat.png",
    "examples/secrets/database_password",
    "examples/secrets/letta_api_key",
    "imagewatch/secrets/letta_api_key",
    "pictures/outbox/cat.png",
    "schemas/.receipt.schema.json.swp",
    "secrets/letta_api_key",
    "systemd/imagewatch.service.orig",
)
"""What the commands of the pages, and editors, leave in a clone."""
PIP = [os.path.join(sys.base_prefix, "bin", "python3"), "-m", "pip", "--disable-pip-version-check", "--python"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@dataclass(frozen=True)
class Installed:
    """An environment with the built wheel alone.

    Attributes:
        folder: The environment.
        wheel: The wheel.
        source: The source distribution.
    """

    folder: Path
    wheel: Path
    source: Path

    def run(self, *command: str | Path, code: int = 0) -> str:
        """Run a program of the environment; return its output."""
        environ = {"PATH": f"{self.folder}/bin:/usr/bin:/bin", "HOME": str(self.folder), "COLUMNS": "80"}
        done = run_reported([self.folder / "bin" / command[0], *command[1:]], text=True, env=environ, cwd=self.folder)
        assert done.returncode == code, done.stderr
        return done.stdout


def environment(folder: Path) -> Path:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder


def pip(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PIP, folder, *arguments], capture_output=True, text=True, check=False)


def used_clone(folder: Path) -> Path:
    """Copy the checkout to a folder, and leave in it what its users leave."""
    shutil.copytree(ROOT, folder, symlinks=True, ignore=shutil.ignore_patterns(".?*env", ".git", ".*_cache", ".build"))
    for name in LEFT:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("secret")
    return folder


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    top = tmp_path_factory.mktemp("wheel")
    tools, used = environment(top / "tools"), environment(top / "used")
    locked = ["install", "--quiet", "--require-hashes", "--only-binary", ":all:", "-r"]
    for folder, name in ((tools, "build"), (used, "service")):
        done = pip(folder, *locked, ROOT / f"requirements/{name}.txt")
        if "No module named pip" in done.stderr:
            pytest.skip("this Python has no pip")
        if re.search("Failed to establish|Temporary failure|NewConnectionError", done.stderr):
            pytest.skip("there is no package index")
        assert done.returncode == 0, done.stderr
    build = [tools / "bin/python", "-m", "hatchling", "build", "-d", top / "dist"]
    subprocess.run(build, cwd=used_clone(top / "clone"), check=True, capture_output=True)
    (wheel,), (source,) = (top / "dist").glob("*.whl"), (top / "dist").glob("*.tar.gz")
    done = pip(used, "install", "--quiet", "--no-deps", "--no-index", wheel)
    assert done.returncode == 0, done.stderr
    return Installed(used, wheel, source)


def test_the_program_of_the_wheel_does_not_use_the_checkout(installed):
    where = installed.run("python", "-c", "import imagewatch; print(imagewatch.__file__)")
    assert where.startswith(f"{installed.folder}/")
    assert installed.run("imagewatch", "--version") == f"imagewatch {__version__}\n"


def test_the_demo_works(installed):
    output = installed.run("imagewatch", "demo", installed.folder / "demo")
    assert (installed.folder / "demo/outbox").is_dir()
    assert "outbox" in output


def test_all_that_the_checkout_has_for_users_is_in_the_wheel(installed):
    wanted = {
        path.relative_to(ROOT).as_posix() for top in BUNDLED for path in (ROOT / top).rglob("*") if path.is_file()
    }
    wanted = {name for name in wanted if "__pycache__" not in name}
    wanted |= {"config.example.toml", "man/imagewatch.1", "skills/imagewatch/SKILL.md"}
    assert set(installed.run("imagewatch", "files").split()) == wanted
    for name in sorted(wanted):
        place = ROOT / name if (ROOT / name).exists() else ROOT / "imagewatch" / name
        assert installed.run("imagewatch", "files", name) == place.read_text(), name


def test_units_start_the_installed_program(installed):
    unit = installed.run("imagewatch", "service", "print", "imagewatch.service")
    assert f"\nExecStart={installed.folder}/bin/imagewatch run --config /etc/imagewatch/config.toml\n" in unit
    top = installed.folder / "image"
    installed.run("imagewatch", "service", "install", "--root", top)
    assert unit in (top / "etc/systemd/system/imagewatch.service").read_text()


def test_skill_schemas_configuration_and_completion_are_printed(installed):
    assert installed.run("imagewatch", "skill") == (ROOT / "imagewatch/skills/imagewatch/SKILL.md").read_text()
    for line in installed.run("imagewatch", "schema").splitlines():
        name = line.split()[0]
        assert json.loads(installed.run("imagewatch", "schema", name))["title"] in line
    installed.run("imagewatch", "init", "--root", installed.folder / "watched")
    assert str(installed.folder / "watched") in (installed.folder / "imagewatch.toml").read_text()
    for shell in ("bash", "fish", "zsh"):
        assert "_IMAGEWATCH_COMPLETE" in installed.run("imagewatch", "completion", shell)


def test_manual_page_and_completions_are_where_programs_look_for_them(installed):
    page = installed.folder / "share/man/man1/imagewatch.1"
    assert page.read_text() == (ROOT / "man/imagewatch.1").read_text()
    for place, name in {
        "bash-completion/completions/imagewatch": "imagewatch.bash",
        "fish/vendor_completions.d/imagewatch.fish": "imagewatch.fish",
        "zsh/site-functions/_imagewatch": "_imagewatch",
    }.items():
        assert (installed.folder / "share" / place).read_text() == (ROOT / "completions" / name).read_text()


def test_the_description_of_the_package_is_complete(installed):
    with zipfile.ZipFile(installed.wheel) as wheel:
        names = wheel.namelist()
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        content = email.message_from_bytes(wheel.read(metadata))
    assert content["Version"] == __version__
    links = dict(one.split(", ") for one in content.get_all("Project-URL"))
    assert {"Homepage", "Source", "Issues"} <= set(links)
    classifiers = content.get_all("Classifier")
    assert "Development Status :: 5 - Production/Stable" in classifiers
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)} <= set(classifiers)
    text = content.get_payload()
    assert f"]({links['Source']}/raw/v{__version__}/docs/" in text, "the image"
    assert not re.search(r"\]\((?!https://|#)", text), "a link that works only in the repository"
    assert "imagewatch/py.typed" in names
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests")]


def test_nothing_that_users_leave_in_a_clone_is_packed(installed):
    with zipfile.ZipFile(installed.wheel) as wheel:
        assert [name for name in wheel.namelist() if wheel.read(name) == b"secret"] == []
    with tarfile.open(installed.source) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert packed & {name for name in LEFT if re.search(r"secrets/|\.png$|\.env$", name)} == set()


def test_a_clone_lists_the_files_of_imagewatch_and_none_of_its_user(tmp_path):
    clone = used_clone(tmp_path / "clone")
    done = run_reported([sys.executable, "-m", "imagewatch", "files"], text=True, env={"PATH": "/usr/bin"}, cwd=clone)
    listed = done.stdout.split()
    assert "examples/submit.py" in listed
    assert "systemd/user/imagewatch.service" in listed
    assert [name for name in listed if name.startswith("examples/") and name.count("/") > 1] == []


def test_the_source_has_all_files_of_the_repository(installed):
    with tarfile.open(installed.source) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is no clone, or git is not installed")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = {name for name in listed.split("\0") if name and (ROOT / name).exists()}
    assert tracked - packed == set()
