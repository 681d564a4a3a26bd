"""The Compose files, the Containerfile and the page about containers agree."""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from imagewatch.config.load import load

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/howto/install-container.md").read_text()
CONTAINERFILE = (ROOT / "Containerfile").read_text()
GRACE = re.findall(r"^TimeoutStopSec=(\d+)$", (ROOT / "systemd/imagewatch.service").read_text(), re.MULTILINE)[0]
IMAGE_ENVIRON = dict(re.findall(r"^(?:ENV)? +(\w+)=([/\w.]+) ?\\?$", CONTAINERFILE, re.MULTILINE))


def services(path: str) -> dict[str, dict[str, Any]]:
    yaml = pytest.importorskip("yaml")
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (ROOT / path).read_text())
    found = yaml.safe_load(text)["services"]
    return {name: one for name, one in found.items() if "imagewatch" in one["image"]}


DAEMONS = [("compose.yaml", "imagewatch"), ("examples/compose.shared.yaml", "left")]
DAEMONS += [("examples/compose.shared.yaml", name) for name in ("right", "third")]


@pytest.mark.parametrize(("path", "name"), DAEMONS)
def test_a_service_has_no_rights_and_the_time_to_finish_its_requests(path: str, name: str) -> None:
    service = services(path)[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert f"\nUSER {service['user']}\n" in CONTAINERFILE
    assert service["init"] is True
    assert service["stop_grace_period"] == f"{GRACE}s"
    assert service["restart"] == "unless-stopped"


@pytest.mark.parametrize(("path", "name"), DAEMONS)
def test_a_service_has_the_health_check_of_the_image(path: str, name: str) -> None:
    check = services(path)[name]["healthcheck"]
    (line,) = re.findall(r"^HEALTHCHECK (.+)$", CONTAINERFILE, re.MULTILINE)
    words = ", ".join(f'"{word}"' for word in check["test"][1:])
    assert line == (
        f"--interval={check['interval']} --timeout={check['timeout']} --start-period={check['start_period']} "
        f"--retries={check['retries']} CMD [{words}]"
    )


@pytest.mark.parametrize(("path", "name"), DAEMONS)
def test_a_service_has_a_valid_configuration_whose_folders_are_its_mounts(path: str, name: str) -> None:
    service = services(path)[name]
    environ = {name: str(value) for name, value in service["environment"].items()}
    config = load(None, {**IMAGE_ENVIRON, **environ})
    mounts = {volume.split(":")[1] for volume in service["volumes"]}
    assert config.folders.root in mounts
    assert config.folders.state.rpartition("/")[0] in mounts
    assert "letta_api_key" in service["secrets"]
    assert IMAGE_ENVIRON["CREDENTIALS_DIRECTORY"] == "/run/secrets"


def test_the_page_gives_the_same_rights_and_the_same_time_as_compose() -> None:
    commands = re.findall(r"podman run --detach.+?localhost/imagewatch\n", PAGE, re.DOTALL)
    assert len(commands) == 2
    for command in commands:
        for option in ("--init", f"--stop-timeout {GRACE}", "--read-only", "--cap-drop ALL"):
            assert f" {option} " in command
        assert "--security-opt no-new-privileges" in command
        assert set(re.findall(r"(?:\$PWD/)?[\w-]+:(/[\w/]+)", command)) == {
            "/srv/imagewatch",
            "/var/lib/imagewatch",
            "/run/secrets/letta_api_key",
        }


def test_the_commands_on_the_page_are_those_at_the_top_of_the_compose_files() -> None:
    for path in ("compose.yaml", "examples/compose.shared.yaml"):
        top = (ROOT / path).read_text().split("\n\n")[0]
        commands = re.findall(r"^#   (.+)$", top, re.MULTILINE)
        assert len(commands) > 3
        assert all(command in PAGE for command in commands), path


@pytest.mark.parametrize("path", ["compose.yaml", "examples/compose.shared.yaml"])
def test_only_their_owner_can_read_the_secrets_that_the_commands_write(path: str, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    text = (ROOT / path).read_text()
    commands = re.findall(r"^#   ((?:mkdir|install|\(?umask|openssl) .*secrets.*)$", text, re.MULTILINE)
    script = "\n".join(["umask 022", *commands])
    subprocess.run(["sh", "-euc", script], cwd=tmp_path, input="key\n", text=True, check=True)
    written = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "secrets").iterdir()}
    assert written == dict.fromkeys(re.findall(r"file: secrets/(\w+)", text), 0o600)


def test_no_secret_and_no_image_of_a_user_is_copied_into_the_image_or_into_git() -> None:
    docker, git = ((ROOT / name).read_text().splitlines() for name in (".dockerignore", ".gitignore"))
    assert {
        ".*",
        "**/.env",
        "**/secrets",
        "pictures",
        *(f"examples/{name}" for name in ("left", "right", "third")),
    } <= {*docker}
    assert {".env", "secrets/", "/pictures/", "/examples/left/", "/examples/right/", "/examples/third/"} <= {*git}
    assert CONTAINERFILE.count("--require-hashes --only-binary :all:") == 2
